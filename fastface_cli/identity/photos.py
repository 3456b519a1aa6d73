"""Read photos: converts any image that Pillow opens to an upright 8-bit RGB image."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from ..errors import UsageError

MAX_PHOTOS = 64
"""Maximum number of photos of a person."""
MAX_PIXELS = 1 << 27
"""Larger JPEG images (134 megapixels) are refused; they are decoded at a reduced size."""
MAX_PIXELS_IN_FULL = 1 << 26
"""Larger images of other formats (67 megapixels) are refused, because they are decoded in full."""
MAX_PIXELS_BUFFERED = 1 << 25
"""Larger WebP and AVIF images (33 megapixels) are refused, because their decoders keep further copies."""
MAX_PIXELS_HEIC = 50_000_000
"""Telephones take HEIC photos of up to 48.8 megapixels."""
MAX_SIDE = 4096
"""Longest side in pixels after loading: faces are detected at 640 and cropped at 224."""
ORIENTATION = 0x0112
"""EXIF tag of the camera orientation."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that makes an image of each EXIF orientation upright."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP", "DIB", "PPM", "TGA")
"""Formats that are read, beside HEIC. Pillow knows more: some run external programs, and the decoder of
JPEG 2000 uses a hundred times the memory of the image."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".heic", ".heif", ".avif", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Usual endings of photos, which tell them from other files of a folder."""

_URL = re.compile(r"(https?|ftp|data|file):/?", re.IGNORECASE)
"""The start of an address; a path object has lost the second slash."""


@dataclass(frozen=True)
class Photo:
    """An upright RGB image, and its name in messages."""

    image: Image.Image
    """Mode RGB, longest side at most `MAX_SIDE`."""
    name: str
    scale: float = 1.0
    """Pixels of `image` per pixel of the upright original."""
    sha256: str | None = None
    """Hash (hex) of the file; None for an image that was not read from one."""


def read_photo(source: Path | str | bytes) -> Image.Image:
    """Read a photo as an upright RGB image whose longest side is at most 4096 pixels.

    Applies EXIF orientation, puts white behind transparency, scales 16 bits to 8, and takes the first frame
    of an animation.

    Args:
        source: a path, or the bytes of a file.

    Raises:
        UsageError: the file does not exist, is not a complete image, or is too large.
    """
    return open_photo(source).image


def open_photos(sources: Sequence[Path | str | Image.Image | Photo]) -> list[Photo]:
    """Open several photos of a person; messages call those that are not files "photo 1", "photo 2", ...

    Raises:
        UsageError: there are none or too many, or one cannot be read.
    """
    if not 1 <= len(sources) <= MAX_PHOTOS:
        raise UsageError(f"an identity requires 1 to {MAX_PHOTOS} photos, not {len(sources)}")
    several = len(sources) > 1
    return [
        open_photo(source, f"photo {number}" if several else "the photo")
        for number, source in enumerate(sources, start=1)
    ]


def open_photo(source: Path | str | bytes | Image.Image | Photo, name: str = "the photo") -> Photo:
    """Like `read_photo`, but also accepts opened images and photos, and returns the scale.

    Args:
        source: a path, the bytes of a file, an image in any mode, or a photo, which is returned.
        name: used in messages for a source that is not a path.
    """
    if isinstance(source, Photo):
        return source
    if isinstance(source, Image.Image):
        return _guarded(lambda: _decoded(source, name), name)
    if isinstance(source, bytes):
        return _guarded(lambda: _opened(io.BytesIO(source), name), name, source[:12])
    if _URL.match(str(source)):
        raise UsageError(f"the photo {source} is an address on the web", "download it and give its path")
    path = Path(source)
    try:
        if path.is_dir():
            raise UsageError(f"the photo {path} is a folder", "give the path of one photo")
        if not path.is_file():
            problem = f"the photo {path} is not a file" if path.exists() else f"there is no photo {path}"
            raise UsageError(problem, "check the path")
        with path.open("rb") as file:
            start = file.read(12)
            photo = _guarded(lambda: _opened(file, str(path)), str(path), start)
            # From the same open file: the path may be replaced at any time.
            file.seek(0)
            return replace(photo, sha256=hashlib.file_digest(file, "sha256").hexdigest())
    except (OSError, ValueError) as error:  # ValueError: the path contains a null byte
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(
            f"cannot read the photo {path}: {reason}", "check the path and its permissions"
        ) from error


def _guarded(decode: Callable[[], Photo], name: str, start: bytes = b"") -> Photo:
    """Turn any error of a decoder into a UsageError."""
    try:
        with warnings.catch_warnings():
            # Pillow warns about sizes that are refused here, and about damaged metadata that is not used.
            warnings.simplefilter("ignore")
            return decode()
    except UsageError:
        raise
    except UnidentifiedImageError as error:
        raise UsageError(f"{name} is not a readable image", _hint(start)) from error
    except Image.DecompressionBombError as error:
        raise UsageError(f"{name} is too large: {error}", "scale it down") from error
    except Exception as error:  # Pillow's decoders raise many kinds of errors for damaged files
        reason = f": {error}" if str(error) else ""
        raise UsageError(f"{name} is damaged or incomplete{reason}", "save or copy the file again") from error


def _opened(file: IO[bytes], name: str) -> Photo:
    file.seek(0)
    box = file.read(12)
    file.seek(0)
    Image.init()
    formats: tuple[str, ...] = FORMATS
    if box[4:8] == b"ftyp" and box[8:12] not in (b"avif", b"avis"):
        from pillow_heif import register_heif_opener

        register_heif_opener(thumbnails=False)
        formats = ("HEIF",)
    with Image.open(file, formats=formats) as image:
        return _decoded(image, name)


def _hint(start: bytes) -> str:
    if start[4:8] == b"ftyp" and start[8:10] in (b"he", b"mi", b"ms"):
        return "the HEIC file is damaged; save or copy it again"
    if start[4:8] == b"ftyp":
        return "videos are not supported; save one frame as JPEG or PNG"
    if start[4:6] == b"jP":
        return "JPEG 2000 is not supported; save the photo as JPEG or PNG"
    if start[8:10] in (b'{"', b"{ "):
        return "pass an identity file with --identity"
    return "use a JPEG, PNG, HEIC, WebP or TIFF file"


def _decoded(image: Image.Image, name: str) -> Photo:
    width, height = image.size
    limit = _limit(image.format)
    if width * height > limit:
        raise UsageError(
            f"{name} is too large: {width}x{height} pixels, the limit is {limit // 10**6} million",
            "scale it down",
        )
    if width * height == 0:
        raise UsageError(f"{name} is empty: {width}x{height} pixels")
    image.draft("RGB", (MAX_SIDE, MAX_SIDE))  # JPEG: decode at the smallest size that is large enough
    image.load()
    longest = max(width, height)
    if longest > MAX_SIDE:
        image = _shrunk(image)
    return Photo(_rgb(_upright(image)), name, max(image.size) / longest)


def _shrunk(image: Image.Image) -> Image.Image:
    """Scale to `MAX_SIDE`. Deep modes and transparency are averaged over blocks, which needs less memory."""
    factor = -(-max(image.size) // MAX_SIDE)
    orientation = image.getexif().get(ORIENTATION)
    if image.mode.startswith("I;16"):
        image = image.convert("I")
    if factor > 1 and (image.mode in ("I", "F") or image.has_transparency_data):
        shrunk = (image.convert("RGBA") if image.mode in ("P", "PA") else image).reduce(factor)
    else:
        scale = MAX_SIDE / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        rgb = image if image.mode in ("RGB", "L", "CMYK") else _rgb(image)
        shrunk = rgb.resize(size, Image.Resampling.LANCZOS)
    if orientation is not None:
        shrunk.getexif()[ORIENTATION] = orientation
    return shrunk


def _limit(kind: str | None) -> int:
    if kind in ("JPEG", "MPO"):
        return MAX_PIXELS
    if kind == "HEIF":
        return MAX_PIXELS_HEIC
    return MAX_PIXELS_BUFFERED if kind in ("WEBP", "AVIF") else MAX_PIXELS_IN_FULL


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF raises many kinds of errors, and the image itself may be fine
        return image
    method = UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to 8-bit RGB."""
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_eight_bits(np.asarray(image), image.mode)).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None  # None only with inPlace=True
        return converted
    if image.mode == "La":
        image = image.convert("LA")  # the only premultiplied mode that Pillow cannot convert directly to RGBA
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Scale the gray values of a deep mode, [height, width], to 0..255 uint8.

    The range of I;16 is 0..65535. I and F have no defined range: white is the smallest of 1 (F only), 255 and
    65535 that no value exceeds, otherwise the largest value.
    """
    gray = np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0).clip(min=0.0)
    if mode.startswith("I;16"):
        white = 65535.0
    else:
        peak = float(gray.max())
        ranges = [1.0, 255.0, 65535.0] if mode == "F" else [255.0, 65535.0]
        white = next((limit for limit in ranges if peak <= limit), peak)
    scaled: np.ndarray = np.round(gray / white * 255.0).astype(np.uint8)
    return scaled
