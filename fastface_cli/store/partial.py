"""A file that is received in parts, in any order, and survives a killed process."""

from __future__ import annotations

import hashlib
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .links import open_for_writing

TransferReport = Callable[[int], None]
"""Called with each change in the number of bytes on disk."""

PART = 32 << 20
"""Bytes of one part; each part is requested separately."""
_NUMBER = struct.Struct("<Q")


@dataclass
class Part:
    """A range of a file.

    Args:
        start: the first byte.
        end: the byte after the last one; None is the end of a file of unknown size.
        done: number of bytes received, from the start.
    """

    start: int
    end: int | None
    done: int = 0

    @property
    def complete(self) -> bool:
        """Whether all bytes are received."""
        return self.end is not None and self.start + self.done >= self.end


class PartialFile:
    """A partial file, and beside it a file with the number of bytes of each part.

    A file of one part needs no second file: its length is the number of bytes. `write` may be called by
    several threads, each for its own part.

    Args:
        path: the file; bytes of an earlier transfer are kept.
        size: bytes of the complete file; None if unknown.
        report: called with each change in bytes.
    """

    def __init__(self, path: Path, size: int | None, report: TransferReport) -> None:
        self.path, self.step, self.kept = path, PART, True
        self._journal: BinaryIO | None = None
        self._report = report
        self._lock, self._hash_lock = threading.Lock(), threading.Lock()
        self._file = open_for_writing(path)
        self._counts = ranges_path(path)
        self._plan(size, _received(path, size))
        too_long = any(part.end is not None and part.start + part.done > part.end for part in self.parts)
        if size is None or too_long or not self.done:
            self.restart()

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._close_journal()

    @property
    def done(self) -> int:
        """Number of bytes received."""
        return sum(part.done for part in self.parts)

    def set_size(self, size: int) -> None:
        """Set the size that was unknown before, and divide the file into parts; the first one stays."""
        first = self.parts[0]
        self._plan(size, _contiguous(size, first.done))
        first.end = self.parts[0].end
        self.parts[0] = first

    def restart(self, *, divide: bool = True) -> None:
        """Discard everything.

        Args:
            divide: whether the file may be received in several parts.
        """
        size = self.parts[-1].end
        if self.done:
            self._report(-self.done)
        self._file.truncate(0)
        self.kept = False
        count = _count(size) if divide else 1
        if len(self.parts) == 1 == count:
            self.parts[0].done = 0
            self._digest, self._hashed = hashlib.sha256(), 0
        else:
            self._plan(size, [0] * count)

    def write(self, part: Part, block: bytes) -> None:
        """Append bytes to a part."""
        with self._lock:
            self._file.seek(part.start + part.done)
            self._file.write(block)
            if self._journal is not None:
                self._file.flush()  # the count follows the bytes
            part.done += len(block)
            self._save(part)
            self._report(len(block))

    def hash_ready_parts(self) -> None:
        """Hash the complete parts at the front of the file that are not hashed yet."""
        with self._hash_lock:
            while self._hashed < len(self.parts) and self.parts[self._hashed].complete:
                self._hash(self.parts[self._hashed])
                self._hashed += 1

    def finish(self) -> str:
        """Hash the rest of a complete file; returns the SHA-256 (hex)."""
        self._file.flush()
        for part in self.parts:
            part.end = part.start + part.done
        self.hash_ready_parts()
        self._close_journal()
        self._counts.unlink(missing_ok=True)
        return self._digest.hexdigest()

    def _close_journal(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def _plan(self, size: int | None, counts: list[int]) -> None:
        self._close_journal()
        starts = [self.step * index for index in range(len(counts))]
        self.parts = [
            Part(start, end, done)
            for start, end, done in zip(starts, [*starts[1:], size], counts, strict=True)
        ]
        self._digest, self._hashed = hashlib.sha256(), 0
        if len(counts) == 1:
            self._counts.unlink(missing_ok=True)
            return
        self._journal = open_for_writing(self._counts)
        self._journal.write(b"".join(map(_NUMBER.pack, counts)))  # in one piece: a kill loses no count
        self._journal.truncate()
        self._journal.flush()

    def _save(self, part: Part) -> None:
        if self._journal is not None:
            self._journal.seek(part.start // self.step * _NUMBER.size)
            self._journal.write(_NUMBER.pack(part.done))
            self._journal.flush()

    def _hash(self, part: Part) -> None:
        with self._lock:
            self._file.flush()
        with self.path.open("rb") as file:
            file.seek(part.start)
            left = part.done
            while left and (block := file.read(min(left, 1 << 20))):
                self._digest.update(block)
                left -= len(block)


def ranges_path(path: Path) -> Path:
    """The file with the number of bytes of each part of a partial file."""
    return path.with_name(f"{path.name}.ranges")


def received_bytes(path: Path, size: int | None = None) -> int:
    """Number of bytes of a partial file that are received; 0 if it does not exist."""
    try:
        return sum(_received(path, size))
    except OSError:
        return 0


def _count(size: int | None) -> int:
    return 1 if size is None else max(1, -(-size // PART))


def _received(path: Path, size: int | None) -> list[int]:
    """The number of bytes of each part; without counts, the file has no gaps."""
    length = path.stat().st_size
    counts = ranges_path(path)
    if counts.is_file() and not counts.is_symlink():
        data = counts.read_bytes()
        numbers = [number for (number,) in _NUMBER.iter_unpack(data[: len(data) // 8 * 8])]
        expected = _count(size) if size is not None else len(numbers)
        fits = all(not done or PART * index + done <= length for index, done in enumerate(numbers))
        if len(numbers) == expected and fits and max(numbers, default=0) <= PART:
            return numbers
        return [0] * _count(size)
    return _contiguous(size, length)


def _contiguous(size: int | None, done: int) -> list[int]:
    last = _count(size) - 1
    return [min(max(done - PART * n, 0), PART) for n in range(last)] + [max(done - PART * last, 0)]
