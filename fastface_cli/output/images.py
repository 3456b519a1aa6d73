"""Output images: file names, image files and contact sheets."""

from __future__ import annotations

import io
import os
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError, nearest
from ..files import check_target, numbered, write_atomically

if TYPE_CHECKING:
    from PIL import Image

FIELDS = ("recipe", "seed", "index", "prompt", "scale")
"""Fields of an output template such as `{recipe}-{seed}.png`."""

DEFAULT_NAME = "fastface-{recipe}-{seed}"
NAME_IN_FOLDER = "{recipe}-{seed}"

FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
"""Pillow's name of each format, by suffix."""

QUALITY = 95
"""Of JPEG (with full color resolution) and WebP."""

COMPRESSION = 1
"""zlib level of PNGs. A 1024x1024 photo-like image with sensor noise takes 100 ms and 2190 KiB at level 1,
136 ms and 2082 KiB at level 6 (Pillow's default), both with zlib-ng; classic zlib widens the gap in time.
A file 5% smaller is not worth the time in a four-step run."""

XMP = "XML:com.adobe.xmp"
"""Keyword of the XMP packet among the text chunks of a PNG."""

LONGEST_SIDE = 8192
"""Pixels: larger contact sheets are scaled down to this."""

_PADDING = re.compile(r"0?[1-9]?[0-9]?d?")
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_SUFFIX = re.compile(r"\.([A-Za-z]\w*)$")


def plan_paths(
    output: str | None,
    *,
    count: int,
    fields: Sequence[Mapping[str, str | int | float]],
    force: bool,
) -> list[Path]:
    """Choose and check the path of each image before any model is loaded.

    A file name is used unchanged; its suffix is the format. Several images with one name become `x-1.png`,
    `x-2.png`, ... For a folder (any name without a suffix) and for None (the current folder), names consist
    of recipe and seed, and of the adapter scale if it varies. They never replace a file: `-1`, `-2`, ... is
    appended until the name is free, with or without `force`. A template contains `FIELDS` in braces; whole
    numbers accept a width (`{index:03}`). A template without a suffix names PNG files.

    Args:
        output: the `-o` of the command line, or None.
        count: number of images.
        fields: the values of `FIELDS` for each image; `index` defaults to the position, from 1.
        force: whether existing files with the requested names may be replaced.

    Returns:
        `count` different paths, relative where `output` is.

    Raises:
        UsageError: the name exists, a field or the format is unknown, or the folder is not writable.
    """
    if count != len(fields):
        raise ValueError(f"{count} images but fields for {len(fields)}")
    varies = "-scale{scale}" if len({values.get("scale") for values in fields}) > 1 else ""
    names = [
        _name(output, {"index": index, **values}, varies) for index, values in enumerate(fields, start=1)
    ]
    requested = Counter(_key(path) for path, automatic in names if not automatic)
    taken = {key for key, times in requested.items() if times == 1}
    numbers: Counter[str] = Counter()
    paths = []
    for path, automatic in names:
        key = _key(path)
        chosen = path
        if automatic or requested[key] > 1:
            while True:
                number = numbers[key] if automatic else numbers[key] + 1
                numbers[key] += 1
                chosen = numbered(path, number) if number else path
                if _key(chosen) not in taken and not (automatic and os.path.lexists(chosen)):
                    break
            taken.add(_key(chosen))
        paths.append(chosen)
    folders: set[Path] = set()
    for path in paths:
        check_target(path, force=force, folder=path.parent not in folders)
        folders.add(path.parent)
    return paths


def _key(path: Path) -> str:
    """A key that is equal for names that some file systems do not distinguish."""
    return unicodedata.normalize("NFC", os.path.abspath(path)).casefold()


def _name(output: str | None, fields: Mapping[str, str | int | float], varies: str) -> tuple[Path, bool]:
    """The path of one image, and whether its name was chosen automatically; `varies` is appended to these."""
    if output is None:
        return Path(_expand(f"{DEFAULT_NAME}{varies}.png", fields)), True
    in_folder = f"{NAME_IN_FOLDER}{varies}.png"
    if "\0" in output or not output.strip():
        raise UsageError("the output name is empty or contains a NUL", "give a file, a folder or a template")
    if output == "-":
        raise UsageError("images cannot be written to stdout", "give a file, a folder or a template")
    output = os.path.expanduser(output)
    if os.path.isdir(output):
        return Path(output) / _expand(in_folder, fields), True
    text = _expand(output, fields)
    if text.endswith(("/", os.sep)) or os.path.basename(text) in (".", "..") or os.path.isdir(text):
        return Path(text) / _expand(in_folder, fields), True
    suffix = _SUFFIX.search(output)
    if suffix is None and text == output:  # no template: a folder that does not exist yet
        return Path(text) / _expand(in_folder, fields), True
    if suffix is None:
        return Path(text + ".png"), False
    if suffix[1].lower() not in FORMATS:
        raise UsageError(
            f"'{output}' is not an image format that fastface writes",
            f"use '{output[: suffix.start()]}.png', .jpg or .webp; end the name of a folder with /",
        )
    if not Path(text).suffix:
        raise UsageError(f"'{output}' is a suffix without a name", "put a name before it")
    return Path(text), False


def _expand(template: str, fields: Mapping[str, str | int | float]) -> str:
    """Fill in a template. Only plain names in braces are supported, and no value can add a folder."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UsageError(
            f"the output template '{template}' has an unmatched brace", "write {{ or }} for a brace"
        ) from error
    text = ""
    for literal, name, padding, conversion in parts:
        text += literal
        if name is None:
            continue
        if name not in fields:
            near = nearest(name, fields)
            raise UsageError(
                f"'{{{name}}}' in the output template '{template}' is not a field",
                f"did you mean '{{{near}}}'?"
                if near
                else "fields are " + ", ".join(f"{{{f}}}" for f in FIELDS),
            )
        value = fields[name]
        if conversion or (padding and not (isinstance(value, int) and _PADDING.fullmatch(padding))):
            raise UsageError(
                f"the output template '{template}' formats '{{{name}}}' in an unsupported way",
                "only whole numbers accept a width, as in {index:03}",
            )
        text += format(value, padding or "") if isinstance(value, int) else _slug(value)
    return text


def _slug(value: str | float) -> str:
    """Convert a value for a file name: no separator, leading dot or reserved name, at most 80 bytes."""
    text = f"{value:g}" if isinstance(value, float) else unicodedata.normalize("NFC", value)
    text = re.sub(r"[^\w.+-]+", "-", text.strip())
    text = text.encode("utf-8", "ignore")[:80].decode("utf-8", "ignore")
    text = re.sub(r"\.{2,}", ".", text).rstrip("-.")
    if isinstance(value, str):
        text = text.lstrip("-.")
    if not text:
        return "image"
    return f"{text}_" if _RESERVED.fullmatch(text) else text


def write_image(
    image: Image.Image, path: Path, *, text: Mapping[str, str] | None = None, force: bool = False
) -> Path:
    """Write one image atomically.

    Args:
        image: the image.
        path: the final path, whose suffix is the format; missing folders are created.
        text: text chunks by keyword (see `metadata.describe`); None or empty writes none.
        force: replace an existing file; otherwise a name taken meanwhile becomes the next free name.

    Returns:
        The path that was written.

    Raises:
        FastFaceError: the file cannot be written; no partial file remains.
    """
    return write_atomically(path, encode_image(image, path.suffix[1:], text), force=force)


def encode_image(image: Image.Image, suffix: str, text: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes of the file that `write_image` writes; `suffix` is one of `FORMATS`."""
    kind = FORMATS[suffix.lower()]
    return encode_png(image, text) if kind == "PNG" else _encode_lossy(image, kind, text)


def _encode_lossy(image: Image.Image, kind: str, text: Mapping[str, str] | None) -> bytes:
    """A JPEG or WebP file. These formats have no text chunks; all metadata is in their XMP packet."""
    encoded = io.BytesIO()
    options = {"subsampling": 0, "optimize": True} if kind == "JPEG" else {"method": 4}
    xmp = (text or {}).get(XMP, "").encode("utf-8", "replace")
    try:
        image.save(encoded, format=kind, quality=QUALITY, **options, **({"xmp": xmp} if xmp else {}))
    except ValueError as error:  # a JPEG holds 64 kB of XMP
        raise UsageError(
            f"the metadata does not fit into a {kind} file: {error}",
            "write a PNG, shorten the prompt, or use --no-metadata",
        ) from error
    return encoded.getvalue()


def encode_png(image: Image.Image, text: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes of the PNG file that `write_image` writes."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for keyword, value in (text or {}).items():
        if value.isascii() and not keyword.startswith("XML:"):
            info.add_text(keyword, value)
        else:
            # Viewers interpret non-ASCII tEXt differently; iTXt is UTF-8 by definition.
            info.add_itxt(keyword, value.encode("utf-8", "replace").decode())
    encoded = io.BytesIO()
    image.save(encoded, format="PNG", compress_level=COMPRESSION, pnginfo=info)
    return encoded.getvalue()


def grid(
    images: Sequence[Image.Image], columns: int | None = None, labels: Sequence[str] | None = None
) -> Image.Image:
    """Return a contact sheet, row by row on white, with each image centered in its cell.

    Args:
        images: one or more images of any sizes.
        columns: images per row; None makes the sheet as square as possible.
        labels: one line of text below each image, shortened to its width.

    Returns:
        An RGB image whose longer side is at most `LONGEST_SIDE` pixels.

    Raises:
        ValueError: no image, less than one column, or not one label per image.
    """
    from PIL import Image

    if not images or (columns is not None and columns < 1):
        raise ValueError("a grid needs at least one image and one column")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels for {len(images)} images")
    wide, high = max(image.width for image in images), max(image.height for image in images)
    across = min(columns or _near_square(len(images), wide / high), len(images))
    down = -(-len(images) // across)
    shrink = min(1.0, LONGEST_SIDE / (across * wide * 1.04), LONGEST_SIDE / (down * high * 1.1))
    wide, high = max(1, int(wide * shrink)), max(1, int(high * shrink))
    gap = max(1, wide // 64)
    line = max(12, high // 24) if labels is not None else 0
    step_x, step_y = wide + gap, high + line + gap
    sheet = Image.new("RGB", (across * step_x + gap, down * step_y + gap), "white")
    for index, image in enumerate(images):
        left, top = gap + index % across * step_x, gap + index // across * step_y
        size = (max(1, int(image.width * shrink)), max(1, int(image.height * shrink)))
        cell = image.convert("RGB")
        cell = cell if cell.size == size else cell.resize(size, Image.Resampling.LANCZOS)
        sheet.paste(cell, (left + (wide - size[0]) // 2, top + (high - size[1]) // 2))
        if labels is not None:
            _caption(sheet, labels[index], (left, top + high), wide, line)
    if max(sheet.size) > LONGEST_SIDE:
        sheet.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return sheet


def enlarged(image: Image.Image, side: int = 256) -> Image.Image:
    """Return an image whose longer side is at least `side` pixels; only smaller images change."""
    from PIL import Image

    factor = side / max(image.size)
    if factor <= 1:
        return image
    size = (round(image.width * factor), round(image.height * factor))
    return image.resize(size, Image.Resampling.LANCZOS)


def _near_square(count: int, aspect: float) -> int:
    """Columns that make the sheet closest to square; ties prefer fewer empty cells, then more columns."""

    def badness(columns: int) -> tuple[float, int, int]:
        rows = -(-count // columns)
        ratio = columns * aspect / rows
        return round(max(ratio, 1 / ratio), 6), rows * columns - count, -columns

    return min(range(1, count + 1), key=badness)


def _caption(sheet: Image.Image, label: str, corner: tuple[int, int], width: int, height: int) -> None:
    from PIL import ImageDraw, ImageFont

    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=height * 0.7)
    # Pillow's default font supports only ASCII: accents are dropped, other scripts become question marks.
    plain = re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFKD", " ".join(label.split())[:500]))
    text = plain.encode("ascii", "replace").decode()
    shown = text
    while shown and draw.textlength(shown, font=font) > width:
        text = text[:-1]
        shown = text.rstrip() + "..." if text else ""
    draw.text((corner[0], corner[1] + height // 8), shown, fill="black", font=font)
