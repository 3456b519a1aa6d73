"""Symbolic links in the cache: the store never writes, moves or removes what is outside of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
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


# The Hub cache of other programs


@pytest.fixture
def other_cache(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A default Hub cache in which huggingface_hub has put the LoRA and the base."""
    cache = tmp_path / "huggingface/hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for repo, file in (
        ("lora", "lora.safetensors"),
        ("base", "unet/config.json"),
        ("base", "vae/model.safetensors"),
        ("open", "config.json"),
    ):
        huggingface_hub.hf_hub_download(
            f"tiny/{repo}", file, revision=COMMIT, cache_dir=cache, endpoint=shop.hub.url
        )
    shop.hub.log.clear()
    return cache


def tree(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every entry below a folder, with its type, time and content."""
    entries = {}
    for path in sorted(folder.rglob("*")):
        stat = path.lstat()
        entries[str(path.relative_to(folder))] = (
            stat.st_mode,
            stat.st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
    return entries


def test_the_default_hub_cache_is_used_and_never_changed(shop: Shop, other_cache: Path) -> None:
    before = tree(other_cache)
    store = shop.store(offline=True)
    names = ("lora", "base")
    assert store.missing([shop[name] for name in names]) == []
    assert store.entries() == [], "nothing is ours yet"
    paths = store.ensure([shop[name] for name in names])
    assert paths["tiny-lora"].read_bytes() == BIG
    assert (paths["tiny-base"] / "vae/model.safetensors").read_bytes() == MODEL
    assert [file.state for name in names for file in store.status(shop[name])] == ["present"] * 3
    assert store.disk_bytes() == 0
    assert [store.remove(shop[name]) for name in names] == [0, 0]
    assert not paths["tiny-lora"].is_symlink()
    assert shop.hub.log == []
    assert tree(other_cache) == before


def test_files_without_a_hash_in_the_manifest_are_checked_by_the_name_of_their_blob(
    shop: Shop, other_cache: Path
) -> None:
    shop.store().ensure([shop["open"]])
    assert [request.path.rsplit("/", 1)[-1] for request in shop.hub.asked("GET")] == ["model.safetensors"] * 2


@pytest.mark.parametrize("wrong", [BIG[::-1], BIG[:-1]])
def test_other_bytes_in_the_default_hub_cache_are_not_used(
    shop: Shop, other_cache: Path, wrong: bytes
) -> None:
    (blob,) = (other_cache / "models--tiny--lora/blobs").iterdir()
    blob.write_bytes(wrong)
    before = tree(other_cache)
    store = shop.store()
    path = store.ensure([shop["lora"]])["tiny-lora"]
    assert path.read_bytes() == BIG
    assert path.resolve().is_relative_to(shop.home)
    assert tree(other_cache) == before


def test_a_file_that_leaves_the_default_hub_cache_is_fetched(shop: Shop, other_cache: Path) -> None:
    shop.store().ensure([shop["lora"]])
    (blob,) = (other_cache / "models--tiny--lora/blobs").iterdir()
    blob.unlink()
    assert [item.artifact.name for item in shop.store().missing([shop["lora"]])] == ["tiny-lora"]
    assert shop.store().ensure([shop["lora"]])["tiny-lora"].read_bytes() == BIG
