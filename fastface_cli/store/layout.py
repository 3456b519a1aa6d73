"""Paths of cached files: the Hub's cache layout for Hub files, `home/files` for everything else."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from pathlib import Path, PurePosixPath

from ..errors import ModelUnavailableError
from ..settings import Settings
from .links import link_target, make_folder, outside_link, remove_entry
from .manifest import Artifact, RemoteFile
from .records import Records
from .states import human_bytes

MARGIN = 256 << 20
"""Bytes that must stay free on the disk after a download."""


def source_of(artifact: Artifact, file: RemoteFile) -> str:
    """The key of a file in the records: `owner/name@commit:path`, or its URL."""
    return f"{artifact.repo}@{artifact.commit}:{file.path}" if artifact.repo else str(artifact.url)


def blob_name(etag: str) -> str:
    """The file name for an etag; unusual etags are hashed, so that no server can choose a path."""
    plain = re.fullmatch(r"[0-9A-Za-z][0-9A-Za-z_-]{0,127}", etag)
    return etag if plain else f"etag-{hashlib.sha256(etag.encode()).hexdigest()}"


class CacheLayout:
    """Paths of artifacts on this machine; they need not exist.

    Args:
        settings: the cache folders.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.records = Records(settings.home / "records")
        self.quarantine = settings.home / "quarantine"

    def path(self, artifact: Artifact) -> Path:
        """The path that a loader opens.

        - a LoRA, a Lightning UNet, an adapter, or any other single-file artifact: the file itself;
        - `base`, `scheduler`, and a `unet` of several files: the folder that contains `unet/`, `scheduler/`
          and so on, as in the repository;
        - `vae` and `image_encoder`: the folder that directly contains `config.json` and the weights;
        - `face`: the folder that directly contains the `.onnx` files (for an InsightFace pack it is
          `<root>/models/<pack>`, so `FaceAnalysis(name=path.name, root=path.parent.parent)`);
        - a Hub reference without a file: the snapshot; with a folder: that folder;
        - a local path: that path.
        """
        if artifact.local is not None:
            return artifact.local
        if artifact.root is None and len(artifact.files) == 1:
            return self.place(artifact, artifact.files[0].path)
        return self.folder(artifact) / (artifact.root or "")

    def folder(self, artifact: Artifact) -> Path:
        """The folder to which the file paths of an artifact are relative."""
        if artifact.repo is None:
            return self.settings.home / "files" / artifact.name
        return self.repo(artifact) / "snapshots" / str(artifact.commit)

    def root(self, artifact: Artifact) -> Path:
        """The cache folder of an artifact: nothing outside it is changed."""
        return self.settings.hub_folder if artifact.repo else self.settings.home

    def repo(self, artifact: Artifact) -> Path:
        """The folder of a repository in the Hub cache."""
        return self.settings.hub_folder / f"models--{str(artifact.repo).replace('/', '--')}"

    def place(self, artifact: Artifact, path: str) -> Path:
        """The path of one file.

        Raises:
            ModelUnavailableError: the path leads outside the repository.
        """
        parts = PurePosixPath(path)
        if parts.is_absolute() or ".." in parts.parts or "\\" in path:
            raise ModelUnavailableError(
                f"{artifact.name}: '{path}' is not a path inside a repository", "check the recipe"
            )
        return self.folder(artifact).joinpath(*parts.parts)

    def shared_file(self, artifact: Artifact, file: RemoteFile) -> Path | None:
        """A Hub file in the default cache of other programs, to be verified before use; never written there.

        Its size must match, and its hash must be known: from the manifest, or from the name of its blob.
        """
        cache = default_hub_cache()
        if artifact.repo is None or cache.resolve() == self.settings.hub_folder.resolve():
            return None
        repo = cache / self.repo(artifact).name
        path = PurePosixPath(file.path)
        candidates = [repo / "snapshots" / str(artifact.commit) / path]
        if file.sha256 is not None:
            candidates.append(repo / "blobs" / file.sha256)
        for candidate in candidates:
            real = candidate.resolve()
            hashed = file.sha256 or re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", real.name)
            if hashed and real.is_file() and file.bytes in (None, real.stat().st_size):
                return real
        return None

    def partial(self, artifact: Artifact, file: RemoteFile) -> Path | None:
        """The path of a partial download, or None if it depends on an etag that is not known yet."""
        if artifact.repo is None:
            return self.place(artifact, file.path + ".part")
        etag = file.sha256 or self.records.read(source_of(artifact, file)).etag
        return self.repo(artifact) / "blobs" / f"{blob_name(etag)}.incomplete" if etag else None


def default_hub_cache() -> Path:
    """The folder in which huggingface_hub caches files, unless HF_HUB_CACHE moves it."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(caches, "huggingface")
    return Path(os.path.expandvars(home)).expanduser() / "hub"


def check_room(folder: Path, need: int) -> None:
    """Check that a download fits on the disk.

    Args:
        folder: an existing folder on that disk.
        need: bytes to write.

    Raises:
        ModelUnavailableError: less than `need` plus MARGIN is free.
    """
    free = shutil.disk_usage(folder).free
    if free < need + MARGIN:
        raise ModelUnavailableError(
            f"{human_bytes(need + MARGIN)} are needed in {folder}, but only {human_bytes(free)} are free",
            "free some disk space (`fastface cache list` shows the downloaded models), or set FASTFACE_HOME "
            "to a folder on a larger disk",
        )


def link(place: Path, blob: Path, root: Path) -> None:
    """Make `place` a relative symbolic link to `blob`, or move the blob there if links are unsupported."""
    make_folder(place.parent, root)
    if os.path.lexists(place):
        place.unlink()
    try:
        place.symlink_to(os.path.relpath(blob, place.parent))
    except FileExistsError:
        raise
    except OSError:
        os.replace(blob, place)


def remove_file(place: Path, root: Path, repo: Path | None) -> int:
    """Remove a file, and its blob in `repo` once nothing else in the repository links to it.

    Args:
        place: the file.
        root: the cache folder; nothing outside it is removed.
        repo: the folder of its repository in the Hub cache, if any.

    Returns:
        Bytes freed.
    """
    blob = link_target(place) if place.is_symlink() and outside_link(place, root) is None else None
    freed = remove_entry(place, root)
    if blob is None or repo is None or blob.parent != Path(os.path.abspath(repo / "blobs")):
        return freed
    if any(link_target(other) == blob for other in (repo / "snapshots").rglob("*") if other.is_symlink()):
        return freed
    blob = repo / "blobs" / blob.name
    return freed if outside_link(blob, root) is not None else freed + remove_entry(blob, root)


def remove_empty(folder: Path) -> None:
    """Remove the empty folders below `folder`, then `folder` itself if it is empty."""
    if not folder.is_dir() or folder.is_symlink():
        return
    for child in folder.iterdir():
        remove_empty(child)
    with contextlib.suppress(OSError):
        folder.rmdir()


def face_pack_folder(path: Path) -> Path:
    """The folder that directly contains the .onnx files of a pack; some zips nest it one folder deeper.

    Args:
        path: the folder of a pack, or its parent.

    Raises:
        ModelUnavailableError: no .onnx files.
    """
    for folder in (path, *sorted(child for child in path.glob("*") if child.is_dir())):
        if any(folder.glob("*.onnx")):
            return folder
    raise ModelUnavailableError(
        f"{path} contains no .onnx files", "check the path of the face pack in the recipe"
    )
