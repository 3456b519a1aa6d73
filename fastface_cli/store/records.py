"""Records of verified files: their hashes, and the quarantine for files with wrong bytes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .links import file_behind, make_folder, outside_link, remove_entry


@dataclass(frozen=True)
class Record:
    """The verified state of one source.

    Args:
        source: `owner/name@commit:path`, or a URL.
        sha256: hash of the verified bytes; None before the first verification.
        etag: etag of the server.
        path, bytes, mtime_ns: the file at the time it was hashed.
    """

    source: str
    sha256: str | None = None
    etag: str | None = None
    path: str = ""
    bytes: int = -1
    mtime_ns: int = -1

    def describes(self, path: Path) -> bool:
        """Whether `path` is unchanged since it was hashed."""
        try:
            stat = path.stat()
        except OSError:
            return False
        return (
            self.sha256 is not None
            and self.path == str(path.absolute())
            and (self.bytes, self.mtime_ns) == (stat.st_size, stat.st_mtime_ns)
        )


class Records:
    """One small JSON file for each source under `folder`, written atomically, so no lock is needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _place(self, source: str) -> Path:
        return self.folder / f"{short_hash(source)}.json"

    def read(self, source: str) -> Record:
        """The record of a source; an empty record if it does not exist or cannot be read."""
        return _parse(self._place(source)) or Record(source)

    def write(self, record: Record) -> None:
        """Save a record.

        Raises:
            OSError: the folder cannot be written.
        """
        place = self._place(record.source)
        make_folder(self.folder, self.folder.parent)
        temporary = place.with_name(f"{place.stem}.{secrets.token_hex(4)}.tmp")
        temporary.write_text(json.dumps(asdict(record)), encoding="utf-8")
        os.replace(temporary, place)

    def save_hash(self, source: str, path: Path, sha256: str, etag: str | None = None) -> None:
        """Record the hash of `path`, taken just now."""
        stat = path.stat()
        self.write(Record(source, sha256, etag, str(path.absolute()), stat.st_size, stat.st_mtime_ns))

    def all(self) -> Iterator[Record]:
        """Every readable record."""
        for place in sorted(self.folder.glob("*.json")):
            record = _parse(place)
            if record is not None:
                yield record


def _parse(place: Path) -> Record | None:
    try:
        return Record(**json.loads(place.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def short_hash(text: str) -> str:
    """A hash of 32 hex digits, for use in file names."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def file_sha256(path: Path, on_read: Callable[[int], None] | None = None) -> str:
    """SHA-256 (hex) of a file, read as a stream.

    Args:
        path: the file.
        on_read: called with the size of each block.
    """
    digest = hashlib.sha256()
    with path.open("rb") as source:
        while block := source.read(1 << 22):
            digest.update(block)
            if on_read:
                on_read(len(block))
    return digest.hexdigest()


def git_sha1(path: Path) -> str:
    """The git blob hash (hex) of a file, which the Hub uses as the etag of small files."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as source:
        while block := source.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def mismatch(actual: str, expected: str | None, etag: str | None, path: Path) -> str | None:
    """The expected hash of `path` if its bytes are wrong, else None.

    Without an expected SHA-256, the etag is compared if it is a hash.

    Args:
        actual: SHA-256 of the file.
        expected: the SHA-256 of the manifest or of an earlier download.
        etag: 64 hex digits are a SHA-256, 40 are the git blob hash.
    """
    if expected is None and etag is not None:
        if re.fullmatch(r"[0-9a-f]{64}", etag):
            expected = etag
        elif re.fullmatch(r"[0-9a-f]{40}", etag):
            return None if git_sha1(path) == etag else f"git:{etag}"
    return None if expected in (None, actual) else expected


def quarantine(path: Path, root: Path, folder: Path, source: str, sha256: str) -> Path | None:
    """Move a file with wrong bytes to the quarantine, under a name that identifies its source.

    A second copy of the same bytes replaces the first. If `folder` is on another disk, a `quarantine`
    folder next to the file is used, which avoids copying gigabytes. A file outside `root` stays where it is,
    and the link to it is removed.

    Returns:
        The new path, or None if only a link was removed.
    """
    name = f"{short_hash(source)[:12]}-{sha256[:12]}-{source.rsplit('/', 1)[-1]}"
    real = file_behind(path, root)
    if path.is_symlink() or outside_link(path, root) is not None:
        remove_entry(path, root)
    if real is None:
        return None
    try:
        place = make_folder(folder, folder.parent) / name
        os.replace(real, place)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        place = make_folder(real.parent / "quarantine", root) / name
        os.replace(real, place)
    return place
