"""Reading photographs: any picture that Pillow opens becomes an upright 8-bit RGB image."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from ..errors import UsageError

MAX_PIXELS = 1 << 27
"""Pictures above 134 megapixels are refused before they are decoded (400 MB of memory)."""
MAX_SIDE = 4096
"""Longest side that is kept, in pixels: faces are measured at 640 and cut out at 224."""
ORIENTATION = 0x0112
"""EXIF tag: how the camera was held."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a picture of that EXIF orientation upright."""
EXECUTED = ("EPS", "WMF")
"""Formats that Pillow has another program draw; a photo never comes in one."""


@dataclass(frozen=True)
class Photo:
    """An upright RGB picture and the name that messages call it by."""

    image: Image.Image
    """Mode RGB, longest side at most `MAX_SIDE`."""
    name: str
    scale: float = 1.0
    """Pixels of `image` per pixel of the upright original."""


def read_photo(source: Path | str | bytes) -> Image.Image:
    """A photograph as an upright RGB image whose longest side is at most 4096 pixels.

    EXIF orientation is applied, transparency is laid over white, 16 bits are scaled to 8, and of an
    animation the first frame is taken.

    Args:
        source: a path, or the bytes of a file.

    Raises:
        UsageError: there is no such file, or it is not a whole picture, or it is too large.
    """
    return open_photo(source).image


def open_photo(source: Path | str | bytes | Image.Image, name: str = "the photo") -> Photo:
    """Like `read_photo`, for opened images too, and with what happened to the size.

    Args:
        source: a path, the bytes of a file, or an image in any mode.
        name: what to call a source that is not a path.
    """
    if isinstance(source, Image.Image):
        return _guarded(lambda: _decoded(source, name), name)
    if isinstance(source, bytes):
        return _guarded(lambda: _opened(io.BytesIO(source), name), name, source[:12])
    path = Path(source)
    try:
        if path.is_dir():
            raise UsageError(f"the photo {path} is a folder", "give the path of one picture")
        if not path.is_file():
            told = f"the photo {path} is not a file" if path.exists() else f"there is no photo {path}"
            raise UsageError(told, "check the path")
        with path.open("rb") as file:
            start = file.read(12)
            return _guarded(lambda: _opened(file, str(path)), str(path), start)
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(
            f"cannot read the photo {path}: {reason}", "check the path and its permissions"
        ) from error


def _guarded(decode: Callable[[], Photo], name: str, start: bytes = b"") -> Photo:
    """Whatever a decoder raises as one sentence."""
    try:
        with warnings.catch_warnings():
            # Pillow warns where we refuse, and about damaged metadata that nobody asked for.
            warnings.simplefilter("ignore")
            return decode()
    except UsageError:
        raise
    except UnidentifiedImageError as error:
        raise UsageError(f"{name} is not a picture that can be read", _hint(start)) from error
    except Image.DecompressionBombError as error:
        raise UsageError(f"{name} is too large: {error}", "scale it down") from error
    except Exception as error:  # each of Pillow's decoders fails on damage in its own way
        reason = f": {error}" if str(error) else ""
        raise UsageError(f"{name} is damaged or incomplete{reason}", "save or copy it again") from error


def _opened(file: IO[bytes], name: str) -> Photo:
    file.seek(0)
    Image.init()
    with Image.open(file, formats=[each for each in Image.OPEN if each not in EXECUTED]) as image:
        return _decoded(image, name)


def _hint(start: bytes) -> str:
    if start[4:8] == b"ftyp":
        return "HEIC and films cannot be read; save the photo as JPEG or PNG"
    if start[8:10] in (b'{"', b"{ "):
        return "an identity file goes to --identity"
    return "use a JPEG, PNG, WebP or TIFF file"


def _decoded(image: Image.Image, name: str) -> Photo:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UsageError(
            f"{name} is too large: {width}x{height} pixels, the limit is {MAX_PIXELS // 10**6} million",
            "scale it down",
        )
    if width * height == 0:
        raise UsageError(f"{name} is empty: {width}x{height} pixels")
    image.load()
    image = _upright(image)
    longest = max(image.size)
    if longest <= MAX_SIDE:
        return Photo(_rgb(image), name)
    scale = MAX_SIDE / longest
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return Photo(_rgb(image).resize(size, Image.Resampling.LANCZOS), name, scale)


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF fails in many ways and says nothing about the picture itself
        return image
    method = UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB from any mode."""
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_eight_bits(np.asarray(image), image.mode)).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        found = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert found is not None  # only with inPlace=True
        return found
    if image.mode == "La":
        image = image.convert("LA")  # the one premultiplied mode without a way straight to RGBA
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return image.convert("RGB")


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey values of a deep mode, [height, width], scaled to 0..255 uint8.

    I;16 spans 0..65535. I and F do not say what they span: the smallest of 1 (F only), 255 and 65535 that
    holds every value, else the largest value.
    """
    grey = np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0).clip(min=0.0)
    if mode.startswith("I;16"):
        white = 65535.0
    else:
        peak = float(grey.max())
        spans = [1.0, 255.0, 65535.0] if mode == "F" else [255.0, 65535.0]
        white = next((span for span in spans if peak <= span), peak)
    scaled: np.ndarray = np.round(grey / white * 255.0).astype(np.uint8)
    return scaled
