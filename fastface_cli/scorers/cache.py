"""Cache keys for results of images: several metrics need the same result of the same image."""

from __future__ import annotations

import hashlib

from PIL import Image

CACHE_SIZE = 1024
"""Results that each cache keeps: the photos of a run and some batches of its images."""


def image_key(image: Image.Image) -> bytes:
    """A cache key that is equal for equal pixels."""
    head = f"{image.mode} {image.size}".encode()
    return hashlib.blake2b(head + image.tobytes(), digest_size=16).digest()


def method_key(_self: object, image: Image.Image) -> bytes:
    """`image_key` for `cachetools.cachedmethod`."""
    return image_key(image)
