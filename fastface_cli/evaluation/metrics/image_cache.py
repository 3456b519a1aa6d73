"""What was found in a picture is remembered a while: several metrics ask the same of the same picture."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

from PIL import Image

KEPT = 1024
"""Answers kept, the latest used: the photos of a run and some batches of its pictures."""
T = TypeVar("T")


class Memory(Generic[T]):
    """The latest answers, by key."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._answers: OrderedDict[Hashable, T] = OrderedDict()

    def once(self, key: Hashable, find: Callable[[], T]) -> T:
        """The answer to `key`, found if it is not remembered."""
        return self.many([key], lambda _: [find()])[0]

    def many(self, keys: Sequence[Hashable], find: Callable[[list[int]], Sequence[T]]) -> list[T]:
        """The answers to keys, in order.

        Args:
            keys: may repeat.
            find: from places in `keys`, each of another key that is not remembered, to their answers.
        """
        places = {key: place for place, key in reversed(list(enumerate(keys))) if key not in self._answers}
        new = sorted(places.values())
        fresh = dict(zip((keys[place] for place in new), find(new), strict=True)) if new else {}
        found = [fresh[key] if key in fresh else self._answers[key] for key in keys]
        for key, answer in zip(keys, found, strict=True):
            self._answers[key] = answer
            self._answers.move_to_end(key)
        while len(self._answers) > self._kept:
            self._answers.popitem(last=False)
        return found


def digest(picture: Image.Image) -> bytes:
    """What a picture is remembered by: equal for equal pixels."""
    head = f"{picture.mode} {picture.size}".encode()
    return hashlib.blake2b(head + picture.tobytes(), digest_size=16).digest()
