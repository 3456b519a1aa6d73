"""Files appear whole or not at all, and never in place of another unless that is asked for."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from .errors import FastFaceError, UsageError

LONGEST_NAME = 255
"""Bytes of one file name that common file systems take."""


def check_target(path: Path, *, force: bool) -> None:
    """Refuse, before any work is done, a file name that could not be written at its end.

    Args:
        path: the file to be written; its folder may still be missing.
        force: whether an existing file may be replaced.

    Raises:
        UsageError: the name is taken, cannot exist, or lies where nothing may be written.
    """
    if any(ord(character) < 32 for character in str(path)):
        raise UsageError(f"the file name {str(path)!r} holds a control character", "choose another name")
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
        _check_folder(path.parent)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}", "choose another place") from error


def _check_free(path: Path, force: bool) -> None:
    if not os.path.lexists(path):
        return
    if path.is_dir():
        raise UsageError(f"{path} is a folder, not a file", f"write into it with '{path}{os.sep}'")
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise UsageError(f"{path} is not a regular file", "choose another name")
    if not force:
        raise UsageError(f"{path} already exists", "choose another name, or give --force to replace it")


def _check_folder(folder: Path) -> None:
    """The nearest folder that exists must be one that may be written to."""
    for known in (folder, *folder.parents):
        if os.path.lexists(known):
            if not known.is_dir():
                raise UsageError(
                    f"cannot write into {folder}: {known} is not a folder", "choose another place"
                )
            if not os.access(known, os.W_OK | os.X_OK):
                raise UsageError(
                    f"cannot write into {folder}: no permission to write to {known}", "choose another place"
                )
            return


def write_atomically(path: Path, data: bytes, *, force: bool) -> Path:
    """Write beside the final name, then move: the name never holds a part of the data.

    A name that was taken by another process since `check_target` is not overwritten (unless `force`) and
    the data is not lost either: it goes to the next free of `x-1`, `x-2`, ...

    Args:
        path: the file to write; a missing folder is made.
        data: the whole content.
        force: replace an existing file.

    Returns:
        The path that was written, which is `path` but in that one case.

    Raises:
        FastFaceError: the file system refuses; nothing is left behind.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _write(path, data, force)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FastFaceError(f"cannot write {path}: {reason}", "make room, or choose another place") from error


def _write(path: Path, data: bytes, force: bool) -> Path:
    temporary = path.parent / f".fastface-{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
        return _place(temporary, path, force)
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
                # No hard links here (FAT, some network folders): claim the name, then replace the claim.
                open(candidate, "xb").close()
                os.replace(temporary, candidate)
        except FileExistsError:
            continue
        return candidate
    raise AssertionError("unreachable: the candidates do not end")


def _candidates(path: Path) -> Iterator[Path]:
    yield path
    number = 0
    while True:
        number += 1
        yield numbered(path, number)


def numbered(path: Path, number: int) -> Path:
    """`x.png` and 2 give `x-2.png`."""
    return path.with_name(f"{path.stem}-{number}{path.suffix}")
