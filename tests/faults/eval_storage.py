"""Evaluations under power cuts, full disks and kills: the same command completes each to the same result.

A power cut is a copy of the disk of a mounted ext4 file system: what is only in memory is lost.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ._eval_child import contents, write_photos
from .sizes import size

POWER_CUTS = size("power_cuts", 3, 20)
KILLS = size("eval_kills", 4, 100)
FULL_DISKS_KB = (64, 160, 320, 640, 1024)[: size("full_disks", 2, 5)]
CHILD = [sys.executable, "-m", "tests.faults._eval_child"]
Contents = tuple[list[dict[str, Any]], dict[str, bytes]]


def run() -> list[tuple[str, int, int]]:
    """Return (what, passed, of) of each fault."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        photos = write_photos(work / "photos")
        expected = contents(photos, work / "expected")
        rows = [
            ("kills of an evaluation, resumed to the same rows and files", *_kills(work, photos, expected))
        ]
        if os.geteuid() == 0 and shutil.which("mkfs.ext4") and _can_mount(work):
            rows.append(
                ("power cuts, resumed to the same rows and files", *_power_cuts(work, photos, expected))
            )
            rows.append(("full disks, completed after making room", *_full_disks(work, photos, expected)))
        else:
            print("power cuts and full disks need root and mount: not run", file=sys.stderr)
        return rows


def _start(photos: Path, folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*CHILD, photos, folder], stderr=subprocess.DEVNULL)


def _kills(work: Path, photos: Path, expected: Contents) -> tuple[int, int]:
    """Kill at random moments until the run is complete, then start the next run."""
    rng, kills, runs, right, pending = random.Random(0), 0, 0, 0, 0
    while kills < KILLS or pending:
        folder = work / f"kill{runs}"
        process = _start(photos, folder)
        try:
            process.wait(rng.uniform(0.8, 2.2) if kills < KILLS else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills, pending = kills + 1, pending + 1
            continue
        right += pending if contents(photos, folder) == expected else 0
        runs, pending = runs + 1, 0
    return right, kills


def _power_cuts(work: Path, photos: Path, expected: Contents) -> tuple[int, int]:
    rng, right = random.Random(1), 0
    for number in range(POWER_CUTS):
        disk, snapshot = work / "disk.img", work / "snapshot.img"
        _format(disk)
        with _mounted(disk, work / "disk") as mount:
            process = _start(photos, mount / "run")
            time.sleep(rng.uniform(1.5, 4.0))
            if process.poll() is None:
                process.send_signal(signal.SIGSTOP)
            shutil.copyfile(disk, snapshot)
            process.kill()
            process.wait()
        with _mounted(snapshot, work / f"after{number}") as mount:
            code = _start(photos, mount / "run").wait()
            right += code == 0 and contents(photos, mount / "run") == expected
    return right, POWER_CUTS


def _full_disks(work: Path, photos: Path, expected: Contents) -> tuple[int, int]:
    right = 0
    for kilobytes in FULL_DISKS_KB:
        mount = work / f"full{kilobytes}"
        mount.mkdir()
        _command("mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", mount)
        try:
            code = _start(photos, mount / "run").wait()
            _command("mount", "-o", "remount,size=64m", mount)
            again = _start(photos, mount / "run").wait()
            right += code == 1 and again == 0 and contents(photos, mount / "run") == expected
        finally:
            _command("umount", mount)
    return right, len(FULL_DISKS_KB)


def _can_mount(work: Path) -> bool:
    disk = work / "probe.img"
    _format(disk)
    try:
        with _mounted(disk, work / "probe"):
            return True
    except subprocess.CalledProcessError:
        return False


def _format(disk: Path) -> None:
    disk.unlink(missing_ok=True)
    with disk.open("wb") as file:
        file.truncate(32 << 20)
    _command("mkfs.ext4", "-q", disk)


@contextmanager
def _mounted(disk: Path, folder: Path) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    # Names are committed every second, contents only when they are synced: the worst case of a power cut.
    _command("mount", "-o", "loop,commit=1,noauto_da_alloc", disk, folder)
    try:
        yield folder
    finally:
        _command("umount", folder)


def _command(*words: str | Path) -> None:
    subprocess.run(words, check=True, capture_output=True)
