"""Typed progress events of downloads, for observers such as the progress bars of the command line."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .states import Missing


@dataclass(frozen=True)
class DownloadStarted:
    """The list of missing artifacts is complete; their files are fetched next."""

    missing: tuple[Missing, ...]

    @property
    def total(self) -> int:
        """Bytes to fetch; approximate if a size is not known exactly."""
        return sum(item.bytes for item in self.missing)


@dataclass(frozen=True)
class DownloadProgress:
    """Bytes of one file on disk.

    Args:
        name: path of the file, after the name of its model if another file has the same path.
        done: bytes on disk; less than before if the transfer restarts.
        total: size of the file; 0 if unknown.
    """

    name: str
    done: int
    total: int


@dataclass(frozen=True)
class VerifyProgress:
    """Bytes of one file that are hashed; the fields are those of DownloadProgress."""

    name: str
    done: int
    total: int


@dataclass(frozen=True)
class FileFinished:
    """The transfer or verification of a file ended, successfully or not."""

    name: str


StoreEvent = DownloadStarted | DownloadProgress | VerifyProgress | FileFinished
ProgressObserver = Callable[[StoreEvent], None]
"""Receives the events of several files at once; called by several threads, but by one at a time."""


def one_at_a_time(observer: ProgressObserver) -> ProgressObserver:
    """An observer that several threads may call: the calls do not overlap."""
    lock = threading.Lock()

    def call(event: StoreEvent) -> None:
        with lock:
            observer(event)

    return call


def ignore(_event: StoreEvent) -> None:
    """The default observer."""


@contextlib.contextmanager
def reporting(
    observer: ProgressObserver,
    kind: type[DownloadProgress] | type[VerifyProgress],
    name: str,
    total: int,
    done: int = 0,
) -> Iterator[Callable[[int], None]]:
    """Turn changes in bytes into events about one file.

    Yields:
        A function to call with each change in bytes.
    """
    observer(kind(name, done, total))

    def add(change: int) -> None:
        nonlocal done
        done += change
        observer(kind(name, done, total))

    try:
        yield add
    finally:
        observer(FileFinished(name))
