"""The trained miniature of the complete system, which is part of the wheel."""

from __future__ import annotations

import functools
import re
from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
WORD = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
"""A word of a caption, in lower case."""

BASE, IMAGE_ENCODER = "pocket-base", "pocket-clip"
"""Models in recipes of the pocket stack."""

STYLES = ("photo", "comic", "pencil drawing", "watercolour", "black and white", "sepia", "pixel art")
"""Styles that the pocket stack generates well."""


_FUNCTION_WORDS = frozenset(
    ("the", "at", "to", "by", "is", "are", "as", "his", "her", "their", "its", "from", "for", "into", "over")
)
"""Words without a content of their own; naming them would explain nothing."""


@functools.cache
def known_words() -> frozenset[str]:
    """The words of the captions that the pocket stack was trained on; it ignores all others."""
    return frozenset((Path(__file__).parent / "words.txt").read_text(encoding="utf-8").split())


def ignored_words(prompt: str) -> list[str]:
    """Return the words of a prompt that the pocket stack ignores, in order."""
    words = dict.fromkeys(WORD.findall(prompt.lower()))
    return [word for word in words if word not in known_words() | _FUNCTION_WORDS]
