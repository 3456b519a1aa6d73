"""Symbolic links in the cache: the store never writes, moves or removes what is outside of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hub_server import COMMIT, hub_server
from support.link_cases import CASES, changed
from support.tiny_manifest import BIG, MODEL, Shop, fill, sha256, use_hub

from fastface_cli.errors import ModelUnavailableError


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    with hub_server() as hub:
        fill(hub)
        use_hub(monkeypatch, hub, tmp_path / "home")
        yield Shop(hub, tmp_path / "home")


@pytest.mark.parametrize("case", CASES)
def test_files_outside_the_cache_stay_as_they_are(shop: Shop, tmp_path: Path, case: str) -> None:
    assert changed(shop, case, tmp_path / "outside") is None


def test_a_partial_file_that_is_a_link_is_replaced(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(BIG[:1000])
    partial = shop.home / f"hub/models--tiny--lora/blobs/{sha256(BIG)}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.symlink_to(tmp_path / "mine")
    assert shop.store().ensure([shop["lora"]])["tiny-lora"].read_bytes() == BIG
    assert (tmp_path / "mine").read_bytes() == BIG[:1000]


def test_a_link_to_a_wrong_file_is_removed_and_the_file_is_fetched(
    shop: Shop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mine.safetensors").write_bytes(b"mine")
    place = shop.store().path(shop["lora"])
    place.parent.mkdir(parents=True)
    place.symlink_to(tmp_path / "mine.safetensors")
    assert shop.store().ensure([shop["lora"]])["tiny-lora"].read_bytes() == BIG
    assert (tmp_path / "mine.safetensors").read_bytes() == b"mine"
    assert "the link to it was removed" in caplog.text


def test_a_link_to_the_right_file_is_used(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "mine.safetensors").write_bytes(BIG)
    place = shop.store().path(shop["lora"])
    place.parent.mkdir(parents=True)
    place.symlink_to(tmp_path / "mine.safetensors")
    assert shop.store().ensure([shop["lora"]])["tiny-lora"] == place
    assert shop.hub.log == []
    assert shop.store().remove(shop["lora"]) == 0
    assert (tmp_path / "mine.safetensors").read_bytes() == BIG


def test_a_folder_that_leads_outside_is_refused_with_its_name(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    repo = shop.home / "hub/models--tiny--lora"
    repo.parent.mkdir(parents=True)
    repo.symlink_to(tmp_path / "mine")
    with pytest.raises(ModelUnavailableError) as caught:
        shop.store().ensure([shop["lora"]])
    assert f"{repo} is a symbolic link to {tmp_path / 'mine'}" in caught.value.message
    assert "FASTFACE_HOME" in str(caught.value.hint)
    shop.store().remove(shop["lora"])
    assert not repo.is_symlink()
    assert shop.store().ensure([shop["lora"]])["tiny-lora"].read_bytes() == BIG


@pytest.mark.parametrize("root", ["home", "home/hub"])
def test_the_cache_folder_itself_may_be_a_link(shop: Shop, tmp_path: Path, root: str) -> None:
    disk = tmp_path / "large disk"
    disk.mkdir()
    (tmp_path / root).parent.mkdir(exist_ok=True)
    (tmp_path / root).symlink_to(disk)
    shop.hub.served["tiny/lora/lora.safetensors"] = bytes(len(BIG))
    with pytest.raises(ModelUnavailableError, match="it was moved to"):
        shop.store().ensure([shop["lora"]])
    shop.hub.served.clear()
    store = shop.store()
    assert store.ensure([shop["lora"]])["tiny-lora"].read_bytes() == BIG
    assert store.ensure([shop["url"]])["tiny-url"].read_bytes() == MODEL
    assert len(store.quarantined()) == 1
    assert store.remove(shop["lora"]) == 2 * len(BIG)
    assert store.remove(shop["url"]) == len(MODEL)
    assert [path for path in disk.rglob("*.safetensors")] == []


def test_links_of_the_hub_layout_are_followed(shop: Shop) -> None:
    store = shop.store()
    place = store.ensure([shop["lora"]])["tiny-lora"]
    assert place.is_symlink()
    assert place.parent.name == COMMIT
    place.resolve().write_bytes(b"!" + BIG[1:])
    (state,) = store.verify(shop["lora"])
    assert state.state == "bad"
    assert [path.read_bytes()[:1] for path in store.quarantined()] == [b"!"]
