"""Hostile inputs through the command line: each ends in one sentence, quickly and in little memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from fastface_cli.commands.evaluate import check_name
from fastface_cli.errors import UsageError

COMMAND = [sys.executable, "-c", "from fastface_cli.cli import main; main()"]
MEMORY = 1 << 30
"""Bytes of peak memory that a refusal may take."""

NAMES = ("", ".", "..", "a/b", "a\nb", "a\x1b[2Jb", "\u202egnp", "x" * 300, "con+", "a:b", "a\0b")
"""Recipe names that cannot be the name of a folder."""

BOMBS = {
    "PNG": ("RGBA", (20_000, 20_000)),
    "TIFF": ("RGB", (9_000, 9_000)),
    "WEBP": ("RGB", (6_500, 6_500)),
    "GIF": ("P", (9_000, 9_000)),
    "JPEG2000": ("RGB", (4_000, 4_000)),
}
"""Images of a few kilobytes that are too large, by format."""

OVERRIDES = (".".join(["a"] * 5000) + "=1", "guidance.text=" + "[" * 5000, "summary=" + "1" * 60_000 + "x")


def run() -> list[tuple[str, int, int]]:
    """Return (what, passed, of) of each kind of input."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        return [
            ("recipe names that are no folder names are refused", *_count(_name(text) for text in NAMES)),
            ("image bombs are refused below 1 GB", *_count(_bomb(work, kind) for kind in BOMBS)),
            ("deep and long overrides are refused", *_count(map(_override, OVERRIDES))),
        ]


def _count(results: object) -> tuple[int, int]:
    outcomes = list(results)  # type: ignore[call-overload]
    return sum(outcomes), len(outcomes)


def _refused(arguments: list[str | Path], words: str) -> bool:
    """Whether a command ends with code 2 and one sentence, within 30 seconds."""
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False, timeout=30)
    return done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def _name(name: str) -> bool:
    try:
        check_name(name)
    except UsageError:
        return True
    return False


def _bomb(work: Path, kind: str) -> bool:
    mode, size = BOMBS[kind]
    path = work / f"bomb.{kind.lower()}"
    if not path.exists():
        options = {"TIFF": {"compression": "tiff_adobe_deflate"}, "WEBP": {"lossless": True, "method": 0}}
        Image.new(mode, size).save(path, kind, **options.get(kind, {}))
    code = (
        "import sys; from pathlib import Path; from fastface_cli.errors import UsageError\n"
        "from fastface_cli.identity.photos import open_photo\n"
        "try:\n    open_photo(Path(sys.argv[1]))\nexcept UsageError:\n    print('refused')\n"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=False, env=env
    )
    lines = done.stdout.split()
    return lines[:1] == ["refused"] and int(lines[1]) * 1024 < MEMORY


def _override(text: str) -> bool:
    return _refused(["recipes", "show", "pocket", "--resolved", "--set", text], "error: ")
