"""Large files over several connections: parts, resume after a kill, retries, and the events of it all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest
from support.hub_server import hub_server
from support.tiny_manifest import BIG, CONFIG, MODEL, Shop, fill, sha256, use_hub

from fastface_cli.errors import ModelUnavailableError, UsageError
from fastface_cli.store import DownloadProgress, FileFinished, parse_manifest
from fastface_cli.store.partial import received_bytes

PART = 256 << 10
PARTS = -(-len(BIG) // PART)


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    monkeypatch.setattr("fastface_cli.store.partial.PART", PART)
    with hub_server() as hub:
        fill(hub)
        use_hub(monkeypatch, hub, tmp_path / "home")
        yield Shop(hub, tmp_path / "home")


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that transfers would wait before another attempt."""
    seconds: list[float] = []
    monkeypatch.setattr("fastface_cli.store.transfer.pause", lambda wait, _stopped: seconds.append(wait))
    return seconds


def partial_of(shop: Shop) -> Path:
    return shop.home / f"hub/models--tiny--lora/blobs/{sha256(BIG)}.incomplete"


def fetch(shop: Shop) -> bytes:
    return shop.store().ensure([shop["lora"]])["tiny-lora"].read_bytes()


def requested(shop: Shop) -> int:
    """Bytes that all ranges of large files ask for."""
    total = 0
    for request in shop.hub.asked("GET", "/cdn/"):
        first, _, last = str(request.range).removeprefix("bytes=").partition("-")
        total += (int(last) + 1 if last else len(BIG)) - int(first)
    return total


def test_a_large_file_is_fetched_in_parts_over_several_connections(shop: Shop) -> None:
    shop.hub.rate = 1_000_000
    assert fetch(shop) == BIG
    ranges = {str(request.range) for request in shop.hub.asked("GET", "/cdn/")}
    expected = {f"bytes={PART * n}-{PART * (n + 1) - 1}" for n in range(PARTS - 1)}
    assert ranges == expected | {f"bytes={PART * (PARTS - 1)}-"}
    assert requested(shop) == len(BIG)
    assert shop.hub.peak >= 4
    assert len(shop.hub.asked("GET", "/resolve/")) == 1, "the location is asked for once"
    assert shop.hub.asked("HEAD") == [], "the manifest has the hash"
    assert [path.name for path in partial_of(shop).parent.iterdir()] == [sha256(BIG)]


def test_several_files_are_fetched_at_once(shop: Shop) -> None:
    shop.hub.latency = 0.1
    start = time.monotonic()
    shop.store().ensure([shop["base"], shop["open"], shop["face"], shop["url"]])
    requests = len(shop.hub.log)
    assert requests >= 11
    assert time.monotonic() - start < 0.6 * requests * shop.hub.latency


CHILD = """
import sys
from pathlib import Path
from fastface_cli.settings import load_settings
from fastface_cli.store import Store, parse_manifest, partial
partial.PART = int(sys.argv[2])
known = parse_manifest(Path(sys.argv[1]).read_text())
Store(load_settings(), known=known).ensure([known["tiny-lora"]])
"""


def test_every_part_resumes_after_a_kill(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "manifest.yaml").write_text(shop.text, encoding="utf-8")
    shop.hub.rate = 300_000
    command = [sys.executable, "-c", CHILD, str(tmp_path / "manifest.yaml"), str(PART)]
    child = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "0"})
    deadline = time.monotonic() + 60
    while received_bytes(partial_of(shop)) < 1_000_000 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    kept = received_bytes(partial_of(shop))
    assert 1_000_000 <= kept < len(BIG)
    (status,) = shop.store().status(shop["lora"])
    assert (status.state, status.here) == ("partial", kept)
    shop.hub.rate = 0
    shop.hub.log.clear()
    assert fetch(shop) == BIG
    assert requested(shop) == len(BIG) - kept, "no byte is sent twice"


def test_a_file_begun_over_one_connection_is_continued_in_parts(shop: Shop) -> None:
    partial_of(shop).parent.mkdir(parents=True)
    partial_of(shop).write_bytes(BIG[:1_000_000])
    assert fetch(shop) == BIG
    assert requested(shop) == len(BIG) - 1_000_000


@pytest.mark.parametrize("counts", [b"", b"\0" * 7, b"\xff" * 8 * PARTS, b"\1" * 8 * PARTS, b"\0" * 8])
def test_counts_that_cannot_be_true_are_ignored(shop: Shop, counts: bytes) -> None:
    partial_of(shop).parent.mkdir(parents=True)
    partial_of(shop).write_bytes(bytes(1_000_000))
    partial_of(shop).with_name(partial_of(shop).name + ".ranges").write_bytes(counts)
    assert fetch(shop) == BIG
    assert requested(shop) == len(BIG)


def test_wrong_bytes_in_a_resumed_part_are_noticed(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    partial_of(shop).parent.mkdir(parents=True)
    partial_of(shop).write_bytes(bytes(1_000_000))
    assert fetch(shop) == BIG
    assert "fetching it again from the start" in caplog.text


def test_a_server_without_ranges_sends_the_complete_file(shop: Shop) -> None:
    shop.hub.ranges = False
    assert fetch(shop) == BIG


def test_a_size_that_only_the_server_knows(shop: Shop) -> None:
    entry = json.loads(shop.text)
    (lora,) = (artifact for artifact in entry["artifacts"] if artifact["name"] == "tiny-lora")
    lora["files"][0][1] = "~3000000"
    shop.known = parse_manifest(json.dumps(entry))
    assert fetch(shop) == BIG
    assert len(shop.hub.asked("GET", "/cdn/")) == PARTS
    assert shop.hub.asked("HEAD") == []


def test_an_address_that_has_expired_is_asked_for_again(shop: Shop) -> None:
    shop.hub.refusals = [0, 0, 0, 403]
    assert fetch(shop) == BIG
    assert 2 <= len(shop.hub.asked("GET", "/resolve/")) <= 8, "again, but not for each part"


def test_an_address_that_is_refused_from_the_start_is_an_error(shop: Shop) -> None:
    shop.hub.refusals = [403]
    with pytest.raises(ModelUnavailableError, match="HTTP 403"):
        fetch(shop)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_refused_part_is_requested_again(shop: Shop, pauses: list[float], status: int) -> None:
    shop.hub.refusals = [status] * 3
    shop.hub.headers = {"Retry-After": "3"}
    assert fetch(shop) == BIG
    assert pauses == [3, 3, 3]


def test_the_pause_that_a_server_asks_for_is_bounded(shop: Shop, pauses: list[float]) -> None:
    shop.hub.refusals = [429, 429]
    shop.hub.headers = {"Retry-After": formatdate(time.time() + 5000, usegmt=True)}
    assert fetch(shop) == BIG
    shop.store().remove(shop["lora"])
    shop.hub.refusals = [429]
    shop.hub.headers = {"Retry-After": formatdate(time.time() + 20, usegmt=True)}
    assert fetch(shop) == BIG
    assert pauses[:2] == [30, 30]
    assert 15 <= pauses[2] <= 20


def test_the_pauses_grow_and_the_attempts_are_counted(shop: Shop, pauses: list[float]) -> None:
    shop.hub.status["tiny/lora"] = 503
    with pytest.raises(ModelUnavailableError, match="HTTP 503"):
        fetch(shop)
    assert pauses == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("name", ["base", "open", "url"])
def test_slow_answers_are_waited_for_longer_each_time(
    shop: Shop, pauses: list[float], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A HEAD (`open` has no hashes in the manifest) and a GET whose first byte takes too long."""
    monkeypatch.setattr("fastface_cli.store.transfer.PATIENCE", (0.4, 0.8, 20.0))
    monkeypatch.setattr("fastface_cli.store.fetching.FILES", 1)
    shop.hub.stalls = [1.2, 1.2]
    shop.store().ensure([shop[name]])
    assert pauses == [1, 2]


def test_connections_that_break_are_opened_again(shop: Shop, pauses: list[float]) -> None:
    shop.hub.cuts = [50_000, 0, 120_000, 0, 0, 7]
    assert fetch(shop) == BIG
    assert len(pauses) == 6


def test_the_cause_is_reported_and_the_other_transfers_stop(shop: Shop) -> None:
    shop.hub.rate = 100_000
    shop.hub.status["tiny/base"] = 404
    start = time.monotonic()
    with pytest.raises(ModelUnavailableError, match="HTTP 404"):
        shop.store().ensure([shop["lora"], shop["base"]])
    assert time.monotonic() - start < 5, "3.5 MB at 0.8 MB/s were not waited for"
    (status,) = shop.store().status(shop["lora"])
    assert status.state in ("partial", "missing")


def test_an_observer_can_end_the_download(shop: Shop) -> None:
    shop.hub.rate = 100_000

    def cancel(event: object) -> None:
        if isinstance(event, DownloadProgress) and event.done > 500_000:
            raise UsageError("cancelled")

    start = time.monotonic()
    with pytest.raises(UsageError, match="cancelled"):
        shop.store().ensure([shop["lora"], shop["base"]], progress=cancel)
    assert time.monotonic() - start < 4, "3.5 MB at 0.8 MB/s were not waited for"
    (status,) = shop.store().status(shop["lora"])
    assert 500_000 < status.here < len(BIG)


def test_events_of_concurrent_files_do_not_overlap_and_have_unique_names(shop: Shop) -> None:
    inside, overlaps, events = threading.Lock(), [], []

    def observe(event: object) -> None:
        if not inside.acquire(blocking=False):
            overlaps.append(event)
            return
        events.append(event)
        time.sleep(0.001)
        inside.release()

    shop.hub.files["tiny/lora/unet/config.json"] = CONFIG
    entry = json.loads(shop.text)
    (lora,) = (artifact for artifact in entry["artifacts"] if artifact["name"] == "tiny-lora")
    lora["files"].append(["unet/config.json", str(len(CONFIG)), sha256(CONFIG)])
    shop.known = parse_manifest(json.dumps(entry))
    shop.store().ensure([shop["lora"], shop["base"], shop["url"]], progress=observe)
    assert overlaps == []
    last = {event.name: event for event in events if isinstance(event, DownloadProgress)}
    assert {name: (event.done, event.total) for name, event in last.items()} == {
        "lora.safetensors": (len(BIG), len(BIG)),
        "tiny-lora/unet/config.json": (len(CONFIG), len(CONFIG)),
        "tiny-base/unet/config.json": (len(CONFIG), len(CONFIG)),
        "vae/model.safetensors": (len(MODEL), len(MODEL)),
        "a+b.pth": (len(MODEL), len(MODEL)),
    }
    finished = [event.name for event in events if isinstance(event, FileFinished)]
    assert sorted(finished) == sorted(last)
