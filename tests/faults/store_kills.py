"""Downloads that are killed with SIGKILL at random moments and resumed: every byte that counts is right."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.hub_server import Hub, hub_server
from support.tiny_manifest import BIG, fill, manifest_text, sha256

from fastface_cli.store import partial
from fastface_cli.store.partial import ranges_path, received_bytes

from .sizes import size

PART = 256 << 10
CHILD = """
import sys
from pathlib import Path
from fastface_cli.settings import load_settings
from fastface_cli.store import Store, parse_manifest, partial
partial.PART = int(sys.argv[2])
known = parse_manifest(Path(sys.argv[1]).read_text())
Store(load_settings(), known=known).ensure([known["tiny-lora"], known["tiny-base"]])
"""


def run() -> list[tuple[str, int, int]]:
    """Kill downloads; returns (what, passed, of) for the kills and for the completed downloads."""
    rng, number_of_kills = random.Random(0), size("store_kills", 5, 100)
    kills = right = downloads = complete = 0
    with (
        mock.patch.object(partial, "PART", PART),
        hub_server() as hub,
        tempfile.TemporaryDirectory() as work,
    ):
        fill(hub)
        hub.rate = 200_000
        text = Path(work) / "manifest.yaml"
        text.write_text(manifest_text(hub), encoding="utf-8")
        home = Path(work) / "home"
        while kills < number_of_kills:
            downloads += 1
            shutil.rmtree(home, ignore_errors=True)
            while kills < number_of_kills and _kill(hub, text, home, rng):
                kills += 1
                right += _counted_bytes_are_right(home)
            complete += _complete(hub, text, home)
    return [
        ("kills of a download: counted bytes are right", right, kills),
        ("killed downloads: resumed to the same bytes", complete, downloads),
    ]


def _start(hub: Hub, text: Path, home: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "FASTFACE_HOME": str(home), "HF_HOME": str(home / "huggingface")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    environment.pop("HF_HUB_CACHE", None)
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(text), str(PART)], env=environment, stderr=subprocess.DEVNULL
    )


def _partial(home: Path) -> Path:
    return home / f"hub/models--tiny--lora/blobs/{sha256(BIG)}.incomplete"


def _kill(hub: Hub, text: Path, home: Path, rng: random.Random) -> bool:
    """Start a download and kill it after some more bytes; False if it was complete before."""
    enough = received_bytes(_partial(home)) + rng.randrange(900_000)
    child = _start(hub, text, home)
    while child.poll() is None and received_bytes(_partial(home)) <= enough:
        time.sleep(0.005)
    time.sleep(rng.random() * 0.05)
    killed = child.poll() is None
    if killed:
        os.kill(child.pid, signal.SIGKILL)
    child.wait()
    return killed


def _counted_bytes_are_right(home: Path) -> bool:
    """Whether every byte that the next run will keep is a byte of the file."""
    file = _partial(home)
    if not file.exists():
        final = file.with_suffix("")
        return not final.exists() or final.read_bytes() == BIG
    data, counts = file.read_bytes(), ranges_path(file)
    if not counts.exists():
        return data == BIG[: len(data)]
    numbers = memoryview(counts.read_bytes()).cast("Q")
    return all(
        data[PART * index : PART * index + done] == BIG[PART * index : PART * index + done]
        for index, done in enumerate(numbers)
    )


def _complete(hub: Hub, text: Path, home: Path) -> bool:
    """Resume without a kill; whether the file has the right bytes and nothing else is left."""
    rate, hub.rate = hub.rate, 0
    code = _start(hub, text, home).wait()
    hub.rate = rate
    blobs = list(_partial(home).parent.iterdir())
    return code == 0 and [path.name for path in blobs] == [sha256(BIG)] and blobs[0].read_bytes() == BIG
