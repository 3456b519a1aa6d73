"""Atomic file writing that replaces existing files only on request, and content fingerprints."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from .errors import FastFaceError, UsageError

_TEMPORARIES = ".fastface-*.tmp"

LONGEST_NAME = 255
"""Maximum bytes of a file name in common file systems."""


def check_target(path: Path, *, force: bool, folder: bool = True) -> None:
    """Check, before any work is done, that a file can be written.

    Args:
        path: the file to write; its folder may not exist yet.
        force: whether an existing file may be replaced.
        folder: also check the folder, which is unnecessary for further files in it.

    Raises:
        UsageError: the name is taken or invalid, or the folder is not writable.
    """
    if any(ord(character) < 32 for character in str(path)):
        raise UsageError(f"the file name {str(path)!r} contains a control character", "choose another name")
    try:
        length = len(os.fsencode(path.name))
    except UnicodeEncodeError as error:
        raise UsageError(f"the file name {str(path)!r} is not valid text", "choose another name") from error
    if length > LONGEST_NAME:
        raise UsageError(
            f"the file name '{path.name[:40]}...' is longer than {LONGEST_NAME} bytes",
            "choose a shorter name",
        )
    try:
        _check_free(path, force)
        if folder:
            _check_folder(path.parent)
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror or error}", "choose another folder"
        ) from error


def _check_free(path: Path, force: bool) -> None:
    if not os.path.lexists(path):
        return
    if path.is_dir():
        raise UsageError(f"{path} is a folder, not a file", f"write into it with '{path}{os.sep}'")
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise UsageError(f"{path} is not a regular file", "choose another name")
    if not force:
        raise UsageError(f"{path} already exists", "choose another name, or replace it with --force")


def _check_folder(folder: Path) -> None:
    """Check that the nearest existing folder is writable."""
    for ancestor in (folder, *folder.parents):
        if os.path.lexists(ancestor):
            if not ancestor.is_dir():
                raise UsageError(
                    f"cannot write into {folder}: {ancestor} is not a folder", "choose another folder"
                )
            if not os.access(ancestor, os.W_OK | os.X_OK):
                raise UsageError(
                    f"cannot write into {folder}: no permission to write to {ancestor}",
                    "choose another folder",
                )
            return


def write_atomically(path: Path, data: bytes, *, force: bool, private: bool = False) -> Path:
    """Write a temporary file, then rename it, so that no partial file ever has the final name.

    File and folder are synced to disk, so that this also holds after a power failure.

    If another process took the name since `check_target` and `force` is false, the data goes to the next
    free name of `x-1`, `x-2`, ...

    Args:
        path: the file to write; missing folders are created.
        data: the complete content.
        force: replace an existing file.
        private: only the user can read the file.

    Returns:
        The path that was written: `path`, except in that case.

    Raises:
        FastFaceError: the file cannot be written; no partial file remains.
    """
    try:
        make_folders(path.parent)
        return _write(path, data, force, 0o600 if private else 0o666)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FastFaceError(
            f"cannot write {path}: {reason}", "free disk space, or choose another folder"
        ) from error


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary files of killed processes from a folder that no other process writes to."""
    for path in folder.rglob(_TEMPORARIES):
        path.unlink(missing_ok=True)


def remove_abandoned(folder: Path) -> None:
    """Remove the temporary files of killed processes: those that were last written at least a minute ago.

    They can hold a face. Subfolders are not searched; the folder may be missing.
    """
    for path in folder.glob(_TEMPORARIES):
        with contextlib.suppress(OSError):  # removed meanwhile, or of another user
            if path.stat().st_mtime < time.time() - 60:
                path.unlink()


def make_folders(folder: Path) -> None:
    """Create a folder and its missing parents, and sync their names to disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to disk, so that a new file is found after a power failure."""
    if os.name == "nt":
        return  # Windows cannot open folders; NTFS records renames in its journal
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, data: bytes, force: bool, mode: int) -> Path:
    temporary = path.parent / f".fastface-{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
            file.flush()
            # Before the rename: otherwise a power failure can leave the name with no content.
            os.fsync(file.fileno())
        written = _place(temporary, path, force)
        sync_folder(path.parent)
        return written
    finally:
        temporary.unlink(missing_ok=True)


def _place(temporary: Path, path: Path, force: bool) -> Path:
    if force:
        os.replace(temporary, path)
        return path
    for candidate in _candidates(path):
        try:
            try:
                os.link(temporary, candidate)
            except FileExistsError:
                raise
            except OSError:
                # No hard links on this file system (FAT, some network folders): reserve the name first.
                open(candidate, "xb").close()
                try:
                    os.replace(temporary, candidate)
                except OSError:
                    candidate.unlink(missing_ok=True)
                    raise
        except FileExistsError:
            continue
        return candidate
    raise AssertionError("unreachable: the candidates are infinite")


def _candidates(path: Path) -> Iterator[Path]:
    yield path
    number = 0
    while True:
        number += 1
        yield numbered(path, number)


def numbered(path: Path, number: int) -> Path:
    """`x.png` and 2 give `x-2.png`."""
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def content_mark(path: Path) -> str | None:
    """Return a short fingerprint that distinguishes versions of a local model without reading all of it.

    SHA-256 (first 32 hex digits) over name, size and 16 evenly spaced blocks of 64 KiB of the file, or of
    each file in the folder; None if nothing can be read.

    Args:
        path: a file or a folder.
    """
    fingerprint = hashlib.sha256()
    try:
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        for file in files:
            size = file.stat().st_size
            name = "" if file == path else file.relative_to(path).as_posix()
            fingerprint.update(f"{name}\0{size}\0".encode())
            with file.open("rb") as stream:
                for block in range(16):
                    stream.seek(block * max(size - 65536, 0) // 15)
                    fingerprint.update(stream.read(65536))
    except OSError:
        return None
    return fingerprint.hexdigest()[:32] if files else None
