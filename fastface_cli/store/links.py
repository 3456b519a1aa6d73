"""Symbolic links in the cache: nothing outside the cache folder is written, moved or removed through one.

The cache folder itself may be a link, and links inside it (the Hub's `snapshots` to `blobs`) are followed.
Reading through a link is allowed everywhere.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from ..errors import ModelUnavailableError


def outside_link(path: Path, root: Path) -> Path | None:
    """The link among the folders between `root` and `path` that leads outside `root`, if any.

    Args:
        path: a path below `root`; whether it is a link itself does not matter.
        root: the cache folder, which may be a link.
    """
    root = folder = Path(os.path.abspath(root))
    for part in Path(os.path.abspath(path)).relative_to(root).parts[:-1]:
        folder /= part
        if folder.is_symlink() and not folder.resolve().is_relative_to(root.resolve()):
            return folder
    return None


def make_folder(folder: Path, root: Path) -> Path:
    """Create a folder below `root` and its parents; returns it.

    Raises:
        ModelUnavailableError: a link leads it outside `root`.
    """
    link = outside_link(folder / "file", root)
    if link is not None:
        raise ModelUnavailableError(
            f"{link} is a symbolic link to {link.resolve()}, outside the cache; nothing is written there",
            f"remove the link; to use another disk, set FASTFACE_HOME or make all of {root} a link",
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def open_for_writing(path: Path) -> BinaryIO:
    """Open a file for reading and writing, and create it if necessary; a link at `path` is removed first."""
    if path.is_symlink():
        path.unlink()
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    return open(os.open(path, flags, 0o666), "r+b")


def link_target(link: Path) -> Path:
    """The direct target of a link: a blob may itself be a link into the storage of another program."""
    return Path(os.path.abspath(link.parent / os.readlink(link)))


def file_behind(path: Path, root: Path) -> Path | None:
    """The file below `root` that `path` is or links to; None if there is none, or if it is outside `root`."""
    path, root = Path(os.path.abspath(path)), Path(os.path.abspath(root))
    for _ in range(8):
        if not path.is_relative_to(root) or outside_link(path, root) is not None:
            return None
        if not path.is_symlink():
            return path if path.is_file() else None
        path = link_target(path)
    return None


def remove_entry(path: Path, root: Path) -> int:
    """Remove a file or a link, but not what it links to.

    If a folder above it is a link that leads outside `root`, that link is removed and nothing else.

    Returns:
        Bytes freed.
    """
    link = outside_link(path, root)
    if link is not None:
        link.unlink()
        return 0
    if not os.path.lexists(path):
        return 0
    freed = 0 if path.is_symlink() else path.lstat().st_size
    path.unlink()
    return freed
