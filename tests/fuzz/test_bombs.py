"""Small files that claim to be huge: each is refused in a process that may take one gigabyte more."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

from fastface_cli.errors import UsageError
from fastface_cli.identity.photos import open_photo

READ = """
import resource, sys
from pathlib import Path
{imports}
from fastface_cli.errors import FastFaceError
import numpy, PIL.Image
PIL.Image.init()
{warm}
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
try:
    {read}(Path(sys.argv[1]))
except FastFaceError as error:
    print("refused:", error.message)
"""
PHOTO = READ.format(imports="from fastface_cli.identity.photos import open_photo", warm="", read="open_photo")
REPLAY = READ.format(imports="from fastface_cli.output.replay import read", warm="", read="read")
IDENTITY = READ.format(
    imports="from fastface_cli.identity.identity import Identity",
    warm="import safetensors",
    read="Identity.load",
)
RECIPE = READ.format(imports="from fastface_cli.recipe.files import load_recipe", warm="", read="load_recipe")
MANIFEST = READ.format(
    imports="from fastface_cli.evaluation.dataset import load_dataset", warm="", read="load_dataset"
)

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits memory as Linux does")


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *more: bytes, rows: int = 1) -> bytes:
    """A PNG of few bytes whatever it claims: `rows` lines of zeros."""
    pixels = zlib.compress(bytes((width + 1) * rows), 9)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def text_bomb(kind: bytes) -> bytes:
    """300 MB of text in a chunk of 300 kB."""
    packed = zlib.compress(bytes(300_000_000), 9)
    body = {
        b"zTXt": b"fastface\0\0",
        b"iTXt": b"fastface\0\1\0\0\0",
        b"iCCP": b"profile\0\0",
    }[kind]
    return chunk(kind, body + packed)


def safetensors(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header


def tensor(shape: list[int], end: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}


def yaml_aliases() -> bytes:
    """Every line doubles the one before: 2^40 values."""
    lines = ["a0: &a0 [1, 1]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))]
    return "\n".join(lines).encode()


BOMBS = {
    "PNG of 4 gigapixels": (PHOTO, lambda: png(65535, 65535)),
    "PNG of the largest claim": (PHOTO, lambda: png(2**31 - 1, 2**31 - 1, rows=0)),
    "PNG with pixels to inflate": (PHOTO, lambda: png(60000, 60000, rows=5000)),
    "PNG text, photo": (PHOTO, lambda: png(8, 8, text_bomb(b"zTXt"), rows=8)),
    "PNG profile, photo": (PHOTO, lambda: png(8, 8, text_bomb(b"iCCP"), rows=8)),
    "PNG text, replay": (REPLAY, lambda: png(8, 8, text_bomb(b"zTXt"), rows=8)),
    "PNG international text, replay": (REPLAY, lambda: png(8, 8, text_bomb(b"iTXt"), rows=8)),
    "PNG of 4 gigapixels, replay": (REPLAY, lambda: png(65535, 65535)),
    "GIF of 4 gigapixels": (
        PHOTO,
        lambda: b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",\0\0\0\0" + b"\xff" * 8,
    ),
    "BMP of the largest claim": (
        PHOTO,
        lambda: (
            b"BM"
            + struct.pack("<IHHI", 100, 0, 0, 54)
            + struct.pack("<IiiHHIIiiII", 40, 2**31 - 1, 2**31 - 1, 1, 24, 0, 0, 0, 0, 0, 0)
        ),
    ),
    "header of 2^63 bytes": (IDENTITY, lambda: safetensors(b"{}", 2**63)),
    "header of 90 MB": (IDENTITY, lambda: safetensors(b" " * 1000, 90_000_000)),
    "tensor of 2^60 numbers": (
        IDENTITY,
        lambda: safetensors(json.dumps({"id_embedding": tensor([2**30, 2**30], 2**62)}).encode()),
    ),
    "tensor of more than its bytes": (
        IDENTITY,
        lambda: safetensors(json.dumps({"id_embedding": tensor([2**28], 2**30)}).encode()) + bytes(64),
    ),
    "aliases without end": (RECIPE, yaml_aliases),
    "deep YAML": (RECIPE, lambda: b"a: " + b"[" * 60_000),
    "deep manifest": (MANIFEST, lambda: b"[" * 500_000),
}


@pytest.mark.parametrize("case", BOMBS)
def test_refused_in_little_memory(case: str, tmp_path: Path) -> None:
    script, content = BOMBS[case]
    suffix = {RECIPE: ".yaml", IDENTITY: ".safetensors", MANIFEST: ".jsonl"}.get(script, ".png")
    path = tmp_path / f"bomb{suffix}"
    path.write_bytes(content())
    assert path.stat().st_size < 2_000_000
    (tmp_path / "prompts.txt").write_text("a prompt\n")
    done = subprocess.run(
        [sys.executable, "-c", script, path],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "MemoryError" not in done.stdout
    # Text or a profile that nobody asked for may be passed over; nothing else of it may be taken.
    if case not in ("PNG text, photo", "PNG profile, photo"):
        assert done.stdout.startswith("refused:"), done.stdout


PEAK = """
import sys
from pathlib import Path
from fastface_cli.identity.photos import open_photo
print(*open_photo(Path(sys.argv[1])).image.size)
status = Path("/proc/self/status").read_text()
print(status.split("VmHWM:")[1].split()[0])
"""
LARGEST = {
    "PNG": ("RGBA", 8190, {"compress_level": 9}),
    "TIFF": ("F", 8190, {"compression": "tiff_adobe_deflate"}),
    "WEBP": ("RGBA", 5790, {"lossless": True, "method": 0}),
    "AVIF": ("RGBA", 5790, {"speed": 10}),
    "GIF": ("P", 8190, {}),
    "JPEG": ("CMYK", 11580, {}),
}
"""The largest side that each format may have; solid color, so that the file is small."""


@pytest.mark.parametrize("kind", LARGEST)
def test_the_largest_photos_are_decoded_in_little_memory(kind: str, tmp_path: Path) -> None:
    mode, side, options = LARGEST[kind]
    path = tmp_path / f"largest.{kind.lower()}"
    Image.new(mode, (side, side)).save(path, kind, **options)
    done = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    size, peak = done.stdout.splitlines()
    assert max(map(int, size.split())) <= 4096
    assert int(peak) < 750 * 1024, f"{int(peak) // 1024} MB"


def test_jpeg_2000_is_refused_undecoded(tmp_path: Path) -> None:
    path = tmp_path / "x.jp2"
    Image.new("RGB", (64, 64)).save(path, "JPEG2000")
    with pytest.raises(UsageError, match="not a readable image") as caught:
        open_photo(path)
    assert "JPEG 2000" in str(caught.value.hint)
