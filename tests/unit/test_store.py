"""The store against a real HTTP server on loopback that speaks the Hub's protocol."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.hub_server import COMMIT, hub_server
from support.socks_proxy import socks_proxy
from support.tiny_manifest import BIG, CONFIG, DETECTOR, MODEL, RECOGNISER, Shop, fill, sha256, use_hub

from fastface_cli.errors import ModelUnavailableError, RecipeError
from fastface_cli.recipe.schema import HubReference
from fastface_cli.settings import Settings
from fastface_cli.store import (
    DownloadProgress,
    DownloadStarted,
    FileFinished,
    Store,
    face_pack_folder,
    resolve,
)


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    with hub_server() as hub:
        fill(hub)
        use_hub(monkeypatch, hub, tmp_path / "home")
        yield Shop(hub, tmp_path / "home")


def states(store: Store, shop: Shop, name: str) -> list[str]:
    return [file.state for file in store.status(shop[name])]


def failure(store: Store, *artifacts) -> ModelUnavailableError:
    with pytest.raises(ModelUnavailableError) as caught:
        store.ensure(artifacts)
    assert caught.value.exit_code == 3
    assert caught.value.hint
    return caught.value


# What is fetched, and where it lies


def test_fetches_everything_and_the_second_time_nothing(shop: Shop) -> None:
    store = shop.store()
    expected = [shop[name] for name in ("lora", "base", "unet", "open", "face", "url", "package")]
    assert [each.artifact.name for each in store.missing(expected)] == [each.name for each in expected[:-1]]
    paths = store.ensure(expected)
    assert paths["tiny-lora"].read_bytes() == BIG
    assert paths["tiny-lora"].name == "lora.safetensors"
    assert (paths["tiny-base"] / "unet/config.json").read_bytes() == CONFIG
    assert (paths["tiny-unet"] / "unet/model.safetensors").read_bytes() == MODEL
    assert sorted(path.name for path in paths["tiny-face"].iterdir()) == ["det.onnx", "rec.onnx"]
    assert paths["tiny-face"].parts[-2:] == ("models", "tiny_l")
    assert paths["tiny-url"].read_bytes() == MODEL
    assert paths["tiny-package"].name == "errors.py"
    shop.hub.log.clear()
    again = shop.store()
    assert again.missing(expected) == []
    assert again.ensure(expected) == paths
    assert shop.hub.log == []


def test_a_file_that_two_artifacts_share_is_fetched_once(shop: Shop) -> None:
    shop.store().ensure([shop["base"], shop["unet"], shop["unet"]])
    assert len(shop.hub.asked("GET", "config.json")) == 1


def test_small_files_come_first(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastface_cli.store.fetching.FILES", 1)
    shop.store().ensure([shop["lora"], shop["base"]])
    assert [each.path.rsplit("/", 1)[-1] for each in shop.hub.asked("GET") if not each.cdn] == [
        "config.json",
        "model.safetensors",
        "lora.safetensors",
    ]


def test_the_cache_has_the_layout_of_the_hub(shop: Shop, tmp_path: Path) -> None:
    from huggingface_hub import try_to_load_from_cache

    cache = tmp_path / "hub-cache"
    path = shop.store(hub_cache=cache).ensure([shop["lora"]])["tiny-lora"]
    actual = try_to_load_from_cache("tiny/lora", "lora.safetensors", cache_dir=cache, revision=COMMIT)
    assert Path(str(actual)) == path
    assert (cache / "models--tiny--lora" / "blobs" / sha256(BIG)).is_file()
    assert not (shop.home / "hub").exists()


def test_files_of_another_program_are_checked_and_used(shop: Shop, tmp_path: Path) -> None:
    from huggingface_hub import constants, hf_hub_download

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        hf_hub_download(
            "tiny/lora", "lora.safetensors", revision=COMMIT, cache_dir=tmp_path / "c", endpoint=shop.hub.url
        )
    shop.hub.log.clear()
    store = shop.store(hub_cache=tmp_path / "c")
    assert states(store, shop, "lora") == ["unverified"]
    assert store.missing([shop["lora"]]) == []
    store.ensure([shop["lora"]])
    assert states(store, shop, "lora") == ["present"]
    assert shop.hub.log == []


def test_the_token_goes_to_the_hub_alone(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    shop.hub.token = "hf_right"
    shop.store().ensure([shop["lora"]])
    assert {each.authorization for each in shop.hub.log if not each.cdn} == {"Bearer hf_right"}
    assert [each.authorization for each in shop.hub.log if each.cdn] == [None]


def test_licenses_and_sizes_are_logged_once(
    shop: Shop, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO", "fastface_cli")
    shop.store().ensure([shop["open"], shop["lora"]])
    assert "fetching 2 models, 4 MB" in caplog.text
    assert "research only (https://example.org/terms): no commercial use, for non-commercial" in caplog.text
    assert "tiny-lora  4 MB  MIT" in caplog.text
    caplog.clear()
    shop.store().ensure([shop["open"], shop["lora"]])
    assert caplog.text == ""
    assert capsys.readouterr() == ("", "")


def test_an_observer_receives_the_missing_artifacts_and_every_byte(shop: Shop) -> None:
    events: list[object] = []
    shop.hub.cuts = [2_000_000]
    shop.store().ensure([shop["base"], shop["lora"]], progress=events.append)
    started = events[0]
    assert isinstance(started, DownloadStarted)
    assert [(item.artifact.name, item.bytes) for item in started.missing] == [
        ("tiny-base", len(CONFIG) + len(MODEL)),
        ("tiny-lora", len(BIG)),
    ]
    assert started.total == len(CONFIG) + len(MODEL) + len(BIG)
    large = [event for event in events if getattr(event, "name", "") == "lora.safetensors"]
    assert large[0] == DownloadProgress("lora.safetensors", 0, len(BIG))
    assert large[-2:] == [
        DownloadProgress("lora.safetensors", len(BIG), len(BIG)),
        FileFinished("lora.safetensors"),
    ]
    done = [event.done for event in large if isinstance(event, DownloadProgress)]
    assert done == sorted(done)


# Interrupted and resumed


def test_interrupted_transfer_resumes_within_one_run(shop: Shop) -> None:
    shop.hub.cuts = [2_000_000]
    path = shop.store().ensure([shop["lora"]])["tiny-lora"]
    assert path.read_bytes() == BIG
    first, second = shop.hub.asked("GET", "/cdn/")
    assert first.range is None
    assert second.range is not None
    assert 0 < int(second.range.removeprefix("bytes=").rstrip("-")) <= 2_000_000


def test_next_run_resumes_where_the_last_one_stopped(shop: Shop) -> None:
    shop.hub.cuts = [2_000_000, *[0] * 40]
    error = failure(shop.store(), shop["lora"])
    assert "was interrupted after" in error.message
    assert "resumes where it stopped" in str(error.hint)
    store = shop.store()
    (status,) = store.status(shop["lora"])
    assert status.state == "partial"
    assert status.here > 1_000_000
    assert store.missing([shop["lora"]])[0].bytes == len(BIG) - status.here
    shop.hub.cuts = []
    shop.hub.log.clear()
    assert store.ensure([shop["lora"]])["tiny-lora"].read_bytes() == BIG
    assert [each.range for each in shop.hub.asked("GET", "/cdn/")] == [f"bytes={status.here}-"]


def test_a_server_without_ranges_starts_over(shop: Shop) -> None:
    shop.hub.cuts, shop.hub.ranges = [2_000_000], False
    assert shop.store().ensure([shop["lora"]])["tiny-lora"].read_bytes() == BIG


def test_a_damaged_partial_file_is_fetched_again(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    blobs = shop.home / "hub/models--tiny--lora/blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{sha256(BIG)}.incomplete").write_bytes(bytes(1_000_000))
    assert shop.store().ensure([shop["lora"]])["tiny-lora"].read_bytes() == BIG
    assert [each.range for each in shop.hub.asked("GET", "/cdn/")] == ["bytes=1000000-", None]
    assert "fetching it again from the start" in caplog.text


def test_a_partial_file_that_is_too_long_is_dropped(shop: Shop) -> None:
    blobs = shop.home / "hub/models--tiny--lora/blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{sha256(BIG)}.incomplete").write_bytes(bytes(len(BIG) + 1))
    assert shop.store().ensure([shop["lora"]])["tiny-lora"].read_bytes() == BIG


CHILD = """
import sys
from pathlib import Path
from fastface_cli.settings import load_settings
from fastface_cli.store import Store, parse_manifest
known = parse_manifest(Path(sys.argv[1]).read_text())
path = Store(load_settings(), known=known).ensure([known["tiny-lora"]])["tiny-lora"]
print(path)
"""


def start_child(shop: Shop, tmp_path: Path) -> subprocess.Popen[str]:
    text = tmp_path / "manifest.yaml"
    text.write_text(shop.text, encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(text)],
        env={**os.environ, "HF_HUB_OFFLINE": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_in_the_middle_then_resumed(shop: Shop, tmp_path: Path) -> None:
    shop.hub.pause = 0.05
    child = start_child(shop, tmp_path)
    partial = shop.home / f"hub/models--tiny--lora/blobs/{sha256(BIG)}.incomplete"
    for _ in range(600):
        if partial.exists() and partial.stat().st_size > 1_000_000:
            break
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    kept = partial.stat().st_size
    assert 1_000_000 < kept < len(BIG)
    assert not shop.store().path(shop["lora"]).exists()
    shop.hub.pause = 0.0
    shop.hub.log.clear()
    assert shop.store().ensure([shop["lora"]])["tiny-lora"].read_bytes() == BIG
    assert [each.range for each in shop.hub.asked("GET", "/cdn/")] == [f"bytes={kept}-"]


def test_two_processes_at_once_fetch_it_once(shop: Shop, tmp_path: Path) -> None:
    shop.hub.pause = 0.02
    children = [start_child(shop, tmp_path) for _ in range(2)]
    outputs = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert {out.strip() for out, _ in outputs} == {str(shop.store().path(shop["lora"]))}
    assert shop.store().path(shop["lora"]).read_bytes() == BIG
    assert len(shop.hub.asked("GET", "/cdn/")) == 1


# Wrong bytes


def test_wrong_bytes_are_moved_aside_and_never_loaded(shop: Shop) -> None:
    wrong = b"!" + BIG[1:]
    shop.hub.served["tiny/lora/lora.safetensors"] = wrong
    store = shop.store()
    error = failure(store, shop["lora"])
    assert sha256(wrong) in error.message
    assert sha256(BIG) in error.message
    (aside,) = store.quarantined()
    assert str(aside) in error.message
    assert aside.read_bytes() == wrong
    assert aside.parent == shop.home / "quarantine"
    assert not store.path(shop["lora"]).exists()
    assert states(store, shop, "lora") == ["missing"]
    shop.hub.served.clear()
    assert store.ensure([shop["lora"]])["tiny-lora"].read_bytes() == BIG


def test_what_the_server_announces_otherwise_is_refused_before_it_is_fetched(shop: Shop) -> None:
    shop.hub.files["tiny/lora/lora.safetensors"] = BIG[::-1]
    error = failure(shop.store(), shop["lora"])
    assert "offers a different file as lora.safetensors" in error.message
    assert shop.hub.asked("GET", "/cdn/") == []


def test_a_file_that_changed_on_disk_is_replaced(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    store = shop.store()
    path = store.ensure([shop["lora"]])["tiny-lora"]
    caplog.clear()
    with path.open("r+b") as file:
        file.write(b"!!!!")
    assert states(store, shop, "lora") == ["unverified"]
    assert store.ensure([shop["lora"]])["tiny-lora"].read_bytes() == BIG
    assert "wrong bytes" in caplog.text


def test_verify_hashes_again_and_reports(shop: Shop) -> None:
    store = shop.store()
    path = store.ensure([shop["base"]])["tiny-base"] / "vae/model.safetensors"
    assert [each.state for each in store.verify(shop["base"])] == ["present", "present"]
    stat = path.stat()
    path.write_bytes(bytes(len(MODEL)))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert states(store, shop, "base") == ["present", "present"]  # cheap: size and time say so
    actual = store.verify(shop["base"])
    assert [each.state for each in actual] == ["present", "bad"]
    assert sha256(MODEL) in actual[1].detail
    assert states(store, shop, "base") == ["present", "missing"]


def test_a_hash_seen_once_must_stay(shop: Shop) -> None:
    store = shop.store()
    store.ensure([shop["open"]])
    assert store.remove(shop["open"]) == len(CONFIG) + len(MODEL)
    shop.hub.files["tiny/open/model.safetensors"] = MODEL[::-1]
    error = failure(shop.store(), shop["open"])
    assert sha256(MODEL) in error.message
    assert not (store.path(shop["open"]) / "model.safetensors").exists()


def test_without_a_pinned_hash_the_etag_decides(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastface_cli.store.fetching.FILES", 1)
    shop.hub.served["tiny/open/config.json"] = b'{"sample_size": 5}'
    error = failure(shop.store(), shop["open"])
    assert "config.json has the wrong bytes" in error.message
    assert "expected git:" in error.message
    shop.hub.served = {"tiny/open/model.safetensors": MODEL[::-1]}
    assert "model.safetensors has the wrong bytes" in failure(shop.store(), shop["open"]).message


def test_a_file_of_a_url_with_wrong_bytes(shop: Shop) -> None:
    shop.hub.plain["/release/a+b.pth"] = MODEL[::-1]
    store = shop.store()
    assert "wrong bytes" in failure(store, shop["url"]).message
    assert not store.path(shop["url"]).exists()
    shop.hub.plain["/release/a+b.pth"] = MODEL
    assert store.ensure([shop["url"]])["tiny-url"].read_bytes() == MODEL


# Refused


@pytest.mark.parametrize(
    ("status", "message", "hint"),
    [
        (401, "refuses this account access to tiny-lora (lora.safetensors)", "HF_TOKEN"),
        (403, "HTTP 403", "accept its terms at https://huggingface.co/tiny/lora"),
        (404, "was not found at http://127.0.0.1", "HF_ENDPOINT"),
        (429, "too many requests", "wait 7 seconds"),
        (500, "HTTP 500", "later"),
    ],
)
def test_refusals(shop: Shop, status: int, message: str, hint: str) -> None:
    shop.hub.status["tiny/lora"] = status
    shop.hub.headers = {"Retry-After": "7"}
    error = failure(shop.store(), shop["lora"])
    assert message in error.message
    assert hint in str(error.hint)


def test_gated_without_and_with_a_wrong_token(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.hub.token = "hf_right"
    error = failure(shop.store(), shop["lora"])
    assert "HTTP 401" in error.message
    assert "was rejected" not in str(error.hint)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "was rejected" in str(failure(shop.store(), shop["lora"]).hint)


def test_a_stale_token_is_left_out(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_stale")
    shop.hub.stale = "hf_stale"
    store = shop.store()
    store.ensure([shop["lora"], shop["base"], shop["open"]])
    assert store.missing([shop["lora"], shop["base"], shop["open"]]) == []
    assert "rejected the token in HF_TOKEN; continuing without it" in caplog.text
    assert all(request.authorization is None for request in shop.hub.log if request.cdn)


def test_the_token_is_left_out_once_and_its_file_is_named(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("hf_wrong")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    shop.hub.token = "hf_right"
    error = failure(shop.store(), shop["lora"])
    assert "HTTP 401" in error.message
    assert f"(the token in {tmp_path / 'token'} was rejected)" in str(error.hint)
    assert [request.authorization for request in shop.hub.log] == ["Bearer hf_wrong", None]


def test_the_fallback_commit_is_tried_if_the_first_is_gone(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    second = "d" * 40
    shop.hub.commit = second
    lora = replace(shop["lora"], fallback=second)
    store = shop.store()
    path = store.ensure([lora])["tiny-lora"]
    assert path.read_bytes() == BIG
    assert path.parent.name == COMMIT, "recipes and records know the first"
    assert f"trying commit {second}" in caplog.text
    assert [request.path.split("/")[4] for request in shop.hub.log if not request.cdn] == [COMMIT, second]
    assert "HTTP 404" in failure(store, replace(shop["base"], fallback="e" * 40)).message


def test_the_fallback_commit_must_have_the_same_bytes(shop: Shop) -> None:
    shop.hub.commit = "d" * 40
    shop.hub.files["tiny/lora/lora.safetensors"] = BIG[::-1]
    error = failure(shop.store(), replace(shop["lora"], fallback="d" * 40))
    assert "offers a different file" in error.message


def test_a_socks_proxy_is_used(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socks_proxy() as proxy:
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        assert shop.store().ensure([shop["lora"]])["tiny-lora"].read_bytes() == BIG
    assert {f"http://{host}:{port}" for host, port in proxy.targets} == {shop.hub.url, shop.hub.cdn}


@pytest.mark.parametrize("proxy", ["socks4://127.0.0.1:1", "ftp://127.0.0.1:1"])
def test_a_proxy_that_cannot_be_used(shop: Shop, monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    error = failure(shop.store(), shop["lora"])
    assert "the proxy of this environment cannot be used" in error.message
    assert "socks5://" in str(error.hint)


def test_a_socks_proxy_without_its_package(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    error = failure(shop.store(), shop["lora"])
    assert "socksio" in error.message
    assert "pip install socksio" in str(error.hint)


def test_a_busy_server_is_asked_again(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.hub.status["tiny/lora"] = 503
    monkeypatch.setattr("fastface_cli.store.transfer.pause", lambda *_: shop.hub.status.clear())
    assert shop.store().ensure([shop["lora"]])["tiny-lora"].read_bytes() == BIG


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_transfers_and_listings_are_retried_too(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    pauses: list[float] = []

    def recover(seconds: float, _stopped: threading.Event) -> None:
        pauses.append(seconds)
        shop.hub.status.clear()

    monkeypatch.setattr("fastface_cli.store.transfer.pause", recover)
    shop.hub.headers = {"Retry-After": "7"}
    shop.hub.status["/release/a+b.pth"] = status
    assert shop.store().ensure([shop["url"]])["tiny-url"].read_bytes() == MODEL
    shop.hub.status["tiny/base"] = status
    folder = resolve(f"hub:tiny/base@{COMMIT}")
    assert shop.store().ensure([folder])[folder.name].is_dir()
    assert pauses == [7, 7]


def test_permanent_refusals_are_not_retried(shop: Shop) -> None:
    shop.hub.status["tiny/lora"] = 404
    failure(shop.store(), shop["lora"])
    assert len(shop.hub.log) == 1


def test_an_interrupted_file_of_a_url_resumes_in_the_next_run(shop: Shop) -> None:
    part = shop.store().path(shop["url"]).with_name("a+b.pth.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(MODEL[:2000])
    assert shop.store().ensure([shop["url"]])["tiny-url"].read_bytes() == MODEL
    assert [request.range for request in shop.hub.asked("GET")] == ["bytes=2000-"]


def test_the_proxy_of_the_environment_is_used(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", shop.hub.url)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    shop.store().ensure([shop["open"]])
    assert len(shop.hub.asked("HEAD")) == 2


def test_refused_connection_is_reported(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    error = failure(shop.store(), shop["lora"])
    assert "cannot reach 127.0.0.1:9" in error.message
    assert "pocket" in str(error.hint)


def test_a_url_that_is_gone(shop: Shop) -> None:
    shop.hub.status["/release/a+b.pth"] = 404
    assert "HTTP 404" in failure(shop.store(), shop["url"]).message


def test_offline_names_what_is_missing(shop: Shop) -> None:
    error = failure(shop.store(offline=True), shop["lora"], shop["base"], shop["package"])
    assert "tiny-lora (4 MB), tiny-base (5 kB); 4 MB in total" in error.message
    assert "2 models are missing" in error.message
    assert shop.hub.log == []


def test_offline_by_the_environment(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = Settings(home=shop.home)
    assert Store(settings).offline
    assert not Store(settings, offline=False).offline


def test_offline_is_enough_when_everything_is_here(shop: Shop) -> None:
    shop.store().ensure([shop["lora"]])
    shop.store(offline=True).ensure([shop["lora"]])


def test_a_disk_that_is_too_small(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 2_000_000})())
    error = failure(shop.store(), shop["lora"])
    assert "are needed in" in error.message
    assert "2 MB are free" in error.message
    assert "FASTFACE_HOME" in str(error.hint)
    assert shop.hub.log == []


def test_a_disk_that_is_too_small_for_a_file_of_unknown_size(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fastface_cli")
    shop.hub.files["other/style/pastel.safetensors"] = BIG
    artifact = resolve(f"hub:other/style@{COMMIT}:pastel.safetensors")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": (256 << 20) + 2_000_000})())
    assert "are needed in" in failure(shop.store(), artifact).message
    assert "size unknown" in caplog.text
    assert shop.hub.asked("GET") == []


def test_a_disk_that_fills_up(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastface_cli.store.transfer.PartialFile.write", full)
    assert "the disk is full" in failure(shop.store(), shop["lora"]).message


def test_a_home_that_is_a_file(shop: Shop) -> None:
    shop.home.write_text("in the way")
    assert "cannot store models" in failure(shop.store(), shop["lora"]).message


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full in /there"),
        (errno.EACCES, "no permission to write in /there"),
        (errno.EROFS, "no permission to write in /there"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_what_the_file_system_refuses(shop: Shop, number: int, message: str) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number), "/there/file")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastface_cli.store.fetching.link", refuse)
        error = failure(shop.store(), shop["lora"])
    assert error.message.startswith("cannot store models")
    assert message in error.message
    shop.hub.log.clear()
    shop.store().ensure([shop["lora"]])
    assert shop.hub.asked("GET") == []  # what had arrived whole is used


# Face packs


def pack(prefix: str) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as zipped:
        zipped.writestr(f"{prefix}det.onnx", DETECTOR)
        zipped.writestr(f"{prefix}rec.onnx", RECOGNISER)
        zipped.writestr(f"{prefix}genderage.onnx", b"not wanted")
    return held.getvalue()


@pytest.mark.parametrize("prefix", ["", "tiny_l/", "tiny_l/tiny_l/"])
def test_archive_replaces_an_unavailable_repository(shop: Shop, prefix: str) -> None:
    shop.hub.status["tiny/face"] = 404
    shop.hub.plain["/release/tiny_l.zip"] = pack(prefix)
    folder = shop.store().ensure([shop["face"]])["tiny-face"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "det.onnx": DETECTOR,
        "rec.onnx": RECOGNISER,
    }
    assert len(shop.hub.asked("GET", ".zip")) == 1
    assert list(shop.home.rglob("*.zip")) == []


def test_neither_repository_nor_archive(shop: Shop) -> None:
    shop.hub.status |= {"tiny/face": 404, "/release/tiny_l.zip": 404}
    message = failure(shop.store(), shop["face"]).message
    assert "tiny/face" in message
    assert "its archive failed too" in message


@pytest.mark.parametrize("content", [b"no zip at all", pack("")[:-40]])
def test_a_broken_archive(shop: Shop, content: bytes) -> None:
    shop.hub.status["tiny/face"] = 404
    shop.hub.plain["/release/tiny_l.zip"] = content
    assert "is not a complete zip" in failure(shop.store(), shop["face"]).message
    shop.hub.plain["/release/tiny_l.zip"] = pack("")
    shop.store().ensure([shop["face"]])


def test_an_archive_with_other_bytes(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastface_cli.store.fetching.FILES", 1)
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as zipped:
        zipped.writestr("det.onnx", DETECTOR[::-1])
    shop.hub.status["tiny/face"] = 404
    shop.hub.plain["/release/tiny_l.zip"] = held.getvalue()
    assert "wrong bytes" in failure(shop.store(), shop["face"]).message


def test_a_pack_nested_one_folder_too_deep(tmp_path: Path) -> None:
    (tmp_path / "antelope" / "antelope").mkdir(parents=True)
    (tmp_path / "antelope" / "antelope" / "det.onnx").write_bytes(b"")
    assert face_pack_folder(tmp_path / "antelope") == tmp_path / "antelope" / "antelope"
    assert face_pack_folder(tmp_path / "antelope" / "antelope") == tmp_path / "antelope" / "antelope"
    with pytest.raises(ModelUnavailableError, match=r"contains no \.onnx files"):
        face_pack_folder(tmp_path)


# References of recipes


def test_local_references(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "mine.safetensors"
    file.write_bytes(b"12345")
    artifact = resolve("~/mine.safetensors")
    assert shop.store(offline=True).ensure([artifact]) == {"~/mine.safetensors": file}
    (status,) = shop.store().status(artifact)
    assert (status.state, status.bytes) == ("present", 5)
    gone = resolve("./gone.safetensors")
    assert "gone.safetensors does not exist" in failure(shop.store(), gone).message
    assert [each.artifact for each in shop.store().missing([gone])] == [gone]


def test_a_hub_file_by_reference(shop: Shop) -> None:
    artifact = resolve(f"hub:tiny/lora@{COMMIT}:lora.safetensors", shop.known)
    assert artifact.files[0].sha256 == sha256(BIG)  # the manifest knows it
    assert artifact.license == "MIT"
    same = resolve(HubReference(repo="tiny/lora", commit=COMMIT, file="lora.safetensors"), shop.known)
    assert same == artifact
    path = shop.store().ensure([artifact])[artifact.name]
    assert path.read_bytes() == BIG


def test_complete_repository_by_reference(shop: Shop) -> None:
    extra = [
        "unet/model.fp16.safetensors",
        "unet/model.onnx",
        "flat.safetensors",
        "vae_1_0/model.safetensors",
    ]
    shop.hub.files |= {f"tiny/base/{name}": MODEL[::-1] for name in extra}
    shop.hub.files["tiny/base/model_index.json"] = b"{}"
    artifact = resolve(f"hub:tiny/base@{COMMIT}")
    store = shop.store()
    assert store.status(artifact)[0].state == "missing"
    folder = store.ensure([artifact])[artifact.name]
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "model_index.json",
        "unet/config.json",
        "unet/model.fp16.safetensors",
        "vae/model.safetensors",
    ]
    shop.hub.log.clear()
    assert shop.store(offline=True).ensure([artifact]) == {artifact.name: folder}
    assert shop.hub.log == []


def test_a_folder_by_reference(shop: Shop) -> None:
    artifact = resolve(f"hub:tiny/face@{COMMIT}:models/tiny_l", shop.known)
    shop.hub.files["tiny/face/models/tiny_l/readme.txt"] = b"hello"
    folder = shop.store().ensure([artifact])[artifact.name]
    assert folder.parts[-2:] == ("models", "tiny_l")
    assert {path.name for path in folder.iterdir()} == {"readme.txt", "det.onnx", "rec.onnx"}


def test_a_repository_that_is_not_listed(shop: Shop) -> None:
    artifact = resolve(f"hub:tiny/base@{COMMIT}")
    shop.hub.status["tiny/base"] = 401
    assert "HTTP 401" in failure(shop.store(), artifact).message
    assert "1 model is missing" in failure(shop.store(offline=True), artifact).message


def test_unknown_references() -> None:
    with pytest.raises(RecipeError) as caught:
        resolve("sdxl-bsae")
    assert "did you mean 'sdxl-base'?" in str(caught.value.hint)
    with pytest.raises(RecipeError, match="not a pinned Hub reference"):
        resolve("hub:owner/name@main")


def test_a_reference_cannot_leave_its_folder(shop: Shop) -> None:
    artifact = resolve(f"hub:tiny/lora@{COMMIT}:../../../../outside.safetensors")
    assert "is not a path inside a repository" in failure(shop.store(), artifact).message


# Removing


def test_remove_frees_the_reported_bytes_and_keeps_shared_files(shop: Shop) -> None:
    store = shop.store()
    store.ensure([shop["base"], shop["unet"], shop["url"]])
    stranger = shop.home / "hub/models--other--repo/blobs/theirs"
    stranger.parent.mkdir(parents=True)
    stranger.write_bytes(b"theirs")
    assert store.disk_bytes() == len(CONFIG) + 2 * len(MODEL)  # base and unet share blobs
    assert store.remove(shop["unet"]) == 0  # its weights are the VAE's bytes, its configuration the base's
    assert states(store, shop, "base") == ["present", "present"]
    assert store.remove(shop["base"]) == len(CONFIG) + len(MODEL)
    assert not (shop.home / "hub/models--tiny--base").exists()
    assert store.remove(shop["url"]) == len(MODEL)
    assert stranger.read_bytes() == b"theirs"
    assert store.entries() == []


def test_remove_takes_partial_and_quarantined_files_too(shop: Shop) -> None:
    store = shop.store()
    shop.hub.served["tiny/lora/lora.safetensors"] = bytes(len(BIG))
    failure(store, shop["lora"])
    shop.hub.served.clear()
    shop.hub.cuts = [2_000_000, *[0] * 40]
    failure(store, shop["lora"])
    (entry,) = store.entries()
    assert not entry.complete
    assert entry.partial_bytes > 0
    assert store.remove(shop["lora"]) == entry.partial_bytes + len(BIG)
    assert store.quarantined() == []
    assert store.entries() == []


def test_hub_references_are_listed_and_removed(shop: Shop) -> None:
    store = shop.store()
    shop.hub.files["other/style/pastel.safetensors"] = MODEL
    artifact = resolve(f"hub:other/style@{COMMIT}:pastel.safetensors")
    store.ensure([artifact])
    (entry,) = store.entries()
    assert entry.artifact.name == f"hub:other/style@{COMMIT}"
    assert entry.bytes == len(MODEL)
    assert store.remove(entry.artifact) == len(MODEL)
    assert store.entries() == []


def test_records_survive_nonsense(shop: Shop) -> None:
    store = shop.store()
    store.ensure([shop["lora"]])
    for record in (shop.home / "records").iterdir():
        assert json.loads(record.read_text())["sha256"] == sha256(BIG)
        record.write_text("{nonsense")
    assert states(store, shop, "lora") == ["unverified"]
    store.ensure([shop["lora"]])
    assert states(store, shop, "lora") == ["present"]


def test_a_server_that_is_not_a_hub(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captive portal answers everything with a page of its own."""
    monkeypatch.setenv("HF_ENDPOINT", f"{shop.hub.url}/portal")
    path = f"/portal/tiny/open/resolve/{COMMIT}/config.json"
    shop.hub.plain[path] = b"<html>log in first</html>"
    message = failure(shop.store(), shop["open"]).message
    assert "does not answer like the Hugging Face Hub" in message
    assert not (shop.store().path(shop["open"]) / "config.json").exists()


def test_small_files_are_redirected_within_the_hub(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    shop.hub.token, shop.hub.redirects = "hf_right", True
    paths = shop.store().ensure([shop["base"], shop["open"]])
    assert (paths["tiny-base"] / "unet/config.json").read_bytes() == CONFIG
    assert (paths["tiny-open"] / "config.json").read_bytes() == CONFIG
    assert {each.authorization for each in shop.hub.log if not each.cdn} == {"Bearer hf_right"}


def test_a_page_in_place_of_a_file_with_a_hash_is_refused(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{shop.hub.url}/portal")
    shop.hub.plain[f"/portal/tiny/lora/resolve/{COMMIT}/lora.safetensors"] = b"<html>log in first</html>"
    error = failure(shop.store(), shop["lora"])
    assert "offers a different file as lora.safetensors (25 bytes, expected 3500000)" in error.message
    assert shop.store().quarantined() == []


def test_a_relative_home(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shop.home = Path("home")
    shop.store().ensure([shop["lora"]])
    shop.hub.log.clear()
    shop.home = tmp_path / "home"
    assert states(shop.store(), shop, "lora") == ["present"]
    shop.home = Path("home")
    shop.store().path(shop["lora"]).write_bytes(MODEL)
    assert [file.state for file in shop.store().verify(shop["lora"])] == ["bad"]
    assert [path.read_bytes() for path in shop.store().quarantined()] == [MODEL]


def test_a_snapshot_found_offline_is_completed_online(shop: Shop) -> None:
    """What happens to lie in the cache stands in for the whole only as long as nobody can be asked."""
    shop.store().ensure([shop["base"]])
    artifact = resolve(f"hub:tiny/base@{COMMIT}", shop.known)
    shop.store(offline=True).ensure([artifact])
    folder = shop.store().ensure([artifact])[artifact.name]
    assert (folder / "unet/model.safetensors").read_bytes() == MODEL


def test_a_mirror_with_etags_of_its_own(shop: Shop) -> None:
    """An etag that is no hash names the blob without becoming a path or a hash."""
    shop.hub.etags["tiny/open/config.json"] = "../../../W:weak/strange"
    store = shop.store()
    store.ensure([shop["open"]])
    (blob,) = (shop.home / "hub/models--tiny--open/blobs").glob("etag-*")
    assert blob.read_bytes() == CONFIG
    for record in (shop.home / "records").iterdir():
        record.unlink()
    assert [each.state for each in store.verify(shop["open"])] == ["present", "present"]


TELEMETRY = """
import fastface_cli
from huggingface_hub.utils import build_hf_headers, send_telemetry
from transformers.utils.hub import http_user_agent
print(build_hf_headers(user_agent=http_user_agent())["user-agent"])
send_telemetry("fastface/test")
import time; time.sleep(0.5)  # it is sent by a thread
"""


def test_no_telemetry_leaves_the_process(shop: Shop, tmp_path: Path) -> None:
    def user_agent(**variables: str) -> str:
        environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), **variables}
        for name in ("DISABLE_TELEMETRY", "DO_NOT_TRACK", "TRANSFORMERS_OFFLINE"):
            environment.pop(name, None)
        command = [sys.executable, "-c", TELEMETRY]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert "torch/" in user_agent(HF_HUB_DISABLE_TELEMETRY="0")  # an explicit choice of the user is kept
    assert "/api/agent-harnesses" in [request.path for request in shop.hub.log]
    shop.hub.log.clear()
    assert "agent" not in user_agent()
    assert shop.hub.log == []
