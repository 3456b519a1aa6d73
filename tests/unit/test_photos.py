"""Reading photos: modes, formats, orientation, and one-sentence errors for broken files."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastface_cli.errors import UsageError
from fastface_cli.identity.photos import MAX_PIXELS, MAX_SIDE, open_photo, read_photo

RED, GREEN, BLUE, GREY = (250, 10, 20), (10, 240, 30), (20, 30, 230), (128, 128, 128)


def quarters(width: int = 64, height: int = 48) -> Image.Image:
    """Four colors, clockwise from the top left: red, green, grey, blue; no symmetry at all."""
    picture = np.empty((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2] = RED
    picture[: height // 2, width // 2 :] = GREEN
    picture[height // 2 :, width // 2 :] = GREY
    picture[height // 2 :, : width // 2] = BLUE
    return Image.fromarray(picture)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    """Colors near the four corners, clockwise from the top left."""
    right, bottom = image.width - 6, image.height - 6
    return [image.getpixel(at) for at in ((5, 5), (right, 5), (right, bottom), (5, bottom))]


def near(actual: list[tuple[int, ...]], expected: list[tuple[int, ...]], tolerance: int) -> bool:
    return bool(np.abs(np.subtract(actual, expected)).max() <= tolerance)


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("TGA", {}, 0),
        ("PPM", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 95}, 8),
        ("JPEG", {"quality": 95, "progressive": True}, 8),
        ("GIF", {}, 4),
    ],
)
def test_formats(kind: str, options: dict[str, object], tolerance: int) -> None:
    image = read_photo(encoded(quarters(), kind, **options))
    assert (image.mode, image.size) == ("RGB", (64, 48))
    assert near(corners(image), [RED, GREEN, GREY, BLUE], tolerance)


def test_exact_pixels_of_a_plain_jpeg() -> None:
    """Nothing is done to a picture that needs nothing."""
    data = encoded(quarters(), "JPEG")
    assert np.array_equal(np.asarray(read_photo(data)), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        # Stored: red, green, grey, blue. EXIF says which sides of the scene row 0 and column 0 are.
        (1, [RED, GREEN, GREY, BLUE]),  # top, left
        (2, [GREEN, RED, BLUE, GREY]),  # top, right
        (3, [GREY, BLUE, RED, GREEN]),  # bottom, right
        (4, [BLUE, GREY, GREEN, RED]),  # bottom, left
        (5, [RED, BLUE, GREY, GREEN]),  # left, top
        (6, [BLUE, RED, GREEN, GREY]),  # right, top
        (7, [GREY, GREEN, RED, BLUE]),  # right, bottom
        (8, [GREEN, GREY, BLUE, RED]),  # left, bottom
    ],
)
def test_exif_orientation(kind: str, orientation: int, expected: list[tuple[int, ...]]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = read_photo(encoded(quarters(), kind, exif=exif))
    assert image.size == ((64, 48) if orientation < 5 else (48, 64))
    assert near(corners(image), expected, 12)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_unknown_orientation_changes_nothing(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert near(corners(read_photo(encoded(quarters(), "PNG", exif=exif))), [RED, GREEN, GREY, BLUE], 0)


def test_damaged_exif_leaves_the_image_usable() -> None:
    image = read_photo(encoded(quarters(), "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage"))
    assert near(corners(image), [RED, GREEN, GREY, BLUE], 8)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "RGBX", "RGBa", "CMYK", "HSV", "YCbCr", "P", "PA"])
def test_color_modes(mode: str) -> None:
    source = quarters()
    if mode in ("P", "PA"):
        source = source.quantize(8)
    if mode == "RGBa":
        source = source.convert("RGBA")
    image = open_photo(source.convert(mode)).image
    assert (image.mode, image.size) == ("RGB", (64, 48))
    assert near(corners(image), [RED, GREEN, GREY, BLUE], 6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La"])
def test_grey_modes(mode: str) -> None:
    source = quarters().convert("L")
    if mode == "La":
        source = source.convert("LA")
    source = source.convert(mode)
    expected = np.asarray((quarters().convert("L") if mode == "La" else source).convert("L"))
    actual = np.asarray(open_photo(source).image)
    assert np.array_equal(actual, np.repeat(expected[..., None], 3, axis=2))


def test_lab() -> None:
    lab = np.zeros((48, 64, 3), np.uint8)
    lab[..., 0] = 255 * 54 // 100  # a and b are signed: 0 is grey
    actual = open_photo(Image.frombytes("LAB", (64, 48), lab.tobytes())).image
    assert actual.mode == "RGB"
    assert near(corners(actual)[:1], [GREY], 6)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_files(kind: str) -> None:
    assert near(corners(read_photo(encoded(quarters().convert("CMYK"), kind))), [RED, GREEN, GREY, BLUE], 20)


def test_transparency_is_laid_over_white() -> None:
    ghost = quarters().convert("RGBA")
    ghost.putalpha(0)
    half = quarters().convert("RGBA")
    half.putalpha(128)
    palette = quarters().quantize(8)
    key = palette.getpixel((5, 5))
    for image, expected in (
        (read_photo(encoded(ghost, "PNG")), (255, 255, 255)),
        (read_photo(encoded(half, "PNG")), (252, 132, 137)),
        (read_photo(encoded(half.convert("LA"), "PNG")), (171, 171, 171)),
        (read_photo(encoded(palette, "PNG", transparency=key)), (255, 255, 255)),
        (read_photo(encoded(quarters(), "PNG", transparency=RED)), (255, 255, 255)),
    ):
        assert near(corners(image)[:1], [expected], 6)


def deep_png(values: np.ndarray) -> bytes:
    """A 16-bit PNG of `values` [h, w] (grey) or [h, w, 3] (RGB), written by hand."""

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if values.ndim == 3 else 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    ramp = np.tile(np.linspace(0, 65535, 256).round(), (16, 1))
    expected = np.arange(256)
    for image in (
        read_photo(deep_png(ramp)),
        read_photo(encoded(Image.fromarray(ramp.astype(np.uint16)), "TIFF")),
        read_photo(deep_png(np.repeat(ramp[..., None], 3, axis=2))),
        open_photo(Image.fromarray(ramp.astype(np.int32))).image,
        open_photo(Image.fromarray(ramp.astype(np.float32))).image,
        open_photo(Image.fromarray((ramp / 65535).astype(np.float32))).image,
    ):
        assert np.abs(np.asarray(image).astype(int) - expected[None, :, None]).max() <= 1


def test_deep_modes_of_a_small_range_keep_it() -> None:
    grey = np.tile(np.arange(100, dtype=np.int32), (16, 1))
    for values in (grey, grey.astype(np.float32)):
        assert np.array_equal(np.asarray(open_photo(Image.fromarray(values)).image)[0, :, 0], np.arange(100))


def test_odd_floats_do_no_harm() -> None:
    values = np.array([[np.nan, np.inf, -np.inf, -5.0, 0.0, 1.0]], np.float32)
    assert np.asarray(open_photo(Image.fromarray(values)).image)[0, :, 0].tolist() == [0, 0, 0, 0, 0, 255]
    assert not np.asarray(open_photo(Image.fromarray(np.zeros((2, 2), np.float32))).image).any()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (32, 32), color) for color in (RED, GREEN, BLUE)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert near(corners(read_photo(data)), [RED] * 4, 12)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (2, 3), (16, 16)])
def test_tiny(size: tuple[int, int]) -> None:
    assert read_photo(encoded(Image.new("RGB", size, RED), "PNG")).size == size


@pytest.mark.parametrize("size", [(10000, 10), (10, 10000), (5000, 4000), (30000, 1)])
def test_huge_images_are_scaled_to_the_longest_side(size: tuple[int, int]) -> None:
    photo = open_photo(encoded(Image.new("RGB", size, RED), "PNG"))
    assert max(photo.image.size) == MAX_SIDE
    assert min(photo.image.size) == max(1, round(min(size) * photo.scale))
    assert photo.scale == MAX_SIDE / max(size)
    assert photo.image.getpixel((0, 0)) == RED


def test_paths_and_bytes_agree(tmp_path: Path) -> None:
    path = tmp_path / "ich & du – 照片.png"
    path.write_bytes(encoded(quarters(), "PNG"))
    assert read_photo(path).tobytes() == read_photo(path.read_bytes()).tobytes()
    assert read_photo(str(path)).tobytes() == quarters().tobytes()
    assert open_photo(path).name == str(path)


def test_the_source_image_is_left_alone() -> None:
    source = quarters()
    actual = open_photo(source).image
    actual.putpixel((0, 0), (0, 0, 0))
    assert source.getpixel((0, 0)) == RED


def refused(source: Path | bytes) -> UsageError:
    with pytest.raises(UsageError) as caught:
        read_photo(source)
    assert "\n" not in caught.value.message
    return caught.value


def test_missing_folder_and_special_files(tmp_path: Path) -> None:
    assert str(tmp_path / "none.jpg") in refused(tmp_path / "none.jpg").message
    assert "folder" in refused(tmp_path).message
    assert refused(Path("a\0b.jpg")).exit_code == 2
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
        assert str(tmp_path / "pipe") in refused(tmp_path / "pipe").message


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "closed.png"
    path.write_bytes(encoded(quarters(), "PNG"))
    path.chmod(0)
    assert str(path) in refused(path).message


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 4096, b"%PDF-1.7\n", b"<svg></svg>"])
def test_not_a_image(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "me.jpg"
    path.write_bytes(content)
    error = refused(path)
    assert str(path) in error.message
    assert error.hint is not None


def test_hints_for_likely_mistakes() -> None:
    assert "HEIC" in str(refused(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic").hint)
    assert "--identity" in str(refused(struct.pack("<Q", 100) + b'{"id_embedding"' + b" " * 90).hint)


def test_postscript_is_never_run() -> None:
    assert (
        "not a readable image"
        in refused(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n").message
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated(tmp_path: Path, kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    path = tmp_path / "half.jpg"
    path.write_bytes(data[: int(len(data) * share)])
    assert str(path) in refused(path).message


def test_bombs_are_refused_before_decoding() -> None:
    def claims(width: int, height: int) -> bytes:
        body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        idat = b"IDAT" + zlib.compress(b"\0" * 1000)
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))
            for part in (body, idat, b"IEND")
        )

    for side in (12000, 20000, 2**31 - 1):
        assert side**2 > MAX_PIXELS
        assert "too large" in refused(claims(side, side)).message


def mode_or_error(data: bytes) -> str:
    """Mode of what was read, or the name of the only error allowed; anything else fails the test."""
    try:
        return read_photo(data).mode
    except UsageError:
        return "UsageError"


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_never_crash(data: bytes) -> None:
    assert mode_or_error(data) in ("RGB", "UsageError")


MAGIC = {
    kind: encoded(quarters(), kind)
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "ICO", "JPEG2000", "TGA", "PCX", "SGI")
}


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(sorted(MAGIC)), st.data())
def test_damaged_files_never_crash(kind: str, data: st.DataObject) -> None:
    """True files with bytes changed, cut or put in."""
    content = bytearray(MAGIC[kind])
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, min(len(content) - 1, 400)))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
        if not content:
            break
    assert mode_or_error(bytes(content)) in ("RGB", "UsageError")
