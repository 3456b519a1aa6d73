"""The store of model files: download, verification, listing and removal.

A file enters the cache only after its SHA-256 is verified; a file with wrong bytes is moved to
`home/quarantine`. Hub files use the Hub's cache layout, so an HF_HUB_CACHE filled by other programs is used.
Files in the default Hub cache are linked and never changed. Other files are in `home/files`. `home/records`
contains the verified hashes: a file is not hashed again while its size and modification time are unchanged.
Records outlive their files: a file that is fetched again must have the same hash.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from ..errors import ModelUnavailableError
from ..settings import Settings
from . import transfer
from .failures import disk_error
from .fetching import Fetcher, FetchTask, WrongBytesError, fetch_all
from .fused_cache import FusedCache
from .layout import CacheLayout, blob_name, check_room, remove_empty, remove_file, source_of
from .links import make_folder, outside_link, remove_entry
from .manifest import REPOSITORY, Artifact, RemoteFile, load_manifest, resolve
from .partial import received_bytes
from .progress import DownloadStarted, ProgressObserver, ignore
from .records import short_hash
from .states import Entry, FileStatus, Missing, State, count_models, human_size, license_line, offline_error

log = logging.getLogger(__name__)


class Store:
    """The models on this machine.

    Args:
        settings: the cache folders.
        offline: never use the network; None reads HF_HUB_OFFLINE.
        known: the manifest; None is the packaged manifest.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        offline: bool | None = None,
        known: Mapping[str, Artifact] | None = None,
    ) -> None:
        self.settings = settings
        self.offline = transfer.is_offline() if offline is None else offline
        self.known = load_manifest() if known is None else known
        self.layout = CacheLayout(settings)
        self._offline_files: dict[str, tuple[RemoteFile, ...]] = {}

    @property
    def fused(self) -> FusedCache:
        """The cache of fused models."""
        return FusedCache(self.settings.home / "fused", int(self.settings.fused_cache * 1e9))

    def path(self, artifact: Artifact) -> Path:
        """The path that a loader opens (see `CacheLayout.path`); it need not exist yet."""
        return self.layout.path(artifact)

    def status(self, artifact: Artifact) -> list[FileStatus]:
        """The state of each file of an artifact, without network access and without hashing.

        A file in the default Hub cache is unverified: `ensure` verifies and links it.
        """
        return self._status(artifact, shared=True)

    def missing(self, artifacts: Iterable[Artifact]) -> list[Missing]:
        """The incomplete artifacts, without network access and without hashing."""
        return self._missing(artifacts, shared=True)

    def ensure(
        self,
        artifacts: Sequence[Artifact],
        *,
        progress: ProgressObserver = ignore,
    ) -> dict[str, Path]:
        """Fetch missing files and verify them.

        Args:
            artifacts: the artifacts; duplicates are ignored.
            progress: receives progress events.

        Returns:
            `path` of each artifact, by name.

        Raises:
            ModelUnavailableError: offline, refused, unreachable, wrong bytes, or no disk space. Received
                bytes are kept, and the same call resumes the download.
        """
        distinct = _unique(artifacts)
        for artifact in distinct:
            _check_local(artifact)
        with _writing(self.settings.home):
            verifier = Fetcher(self.layout, progress)
            for artifact in distinct:
                self._list(artifact)
                self._check_present(artifact, verifier)
            missing = self._missing(distinct, shared=False)
            if missing:
                if self.offline:
                    raise offline_error(missing)
                self._check_room(missing)
                self._announce(missing)
                progress(DownloadStarted(tuple(missing)))
                with transfer.transfer_client() as client:
                    fetch_all(Fetcher(self.layout, progress, client), self._tasks(missing))
        return {artifact.name: self.path(artifact) for artifact in distinct}

    def verify(self, artifact: Artifact, *, progress: ProgressObserver = ignore) -> list[FileStatus]:
        """Hash every file of an artifact; a file with wrong bytes is quarantined and reported as bad."""
        if artifact.local is not None:
            return self.status(artifact)
        with _writing(self.settings.home):
            fetcher = Fetcher(self.layout, progress)
            return [self._verify_file(artifact, file, fetcher) for file in self._files(artifact)]

    def remove(self, artifact: Artifact) -> int:
        """Remove the complete, partial and quarantined files of an artifact; shared files stay.

        Returns:
            Bytes freed.

        Raises:
            ModelUnavailableError: the file system refuses.
        """
        if artifact.local is not None:
            return 0
        freed = 0
        with _writing(self.settings.home):
            repo = self.layout.repo(artifact) if artifact.repo else None
            for file in self._removable(artifact):
                freed += remove_file(self.layout.place(artifact, file.path), self.layout.root(artifact), repo)
                freed += self._remove_leftovers(artifact, file)
            if repo is not None:
                remove_empty(repo)
            freed += self._remove_folder(self.settings.home / "files" / artifact.name)
        return freed

    def entries(self) -> list[Entry]:
        """Every artifact of the manifest, and every Hub reference in the records, that uses disk space."""
        entries = []
        for artifact in (*self.known.values(), *self._unlisted()):
            if artifact.local is not None:
                continue
            states = self._status(artifact, shared=False)
            on_disk = [file for file in states if file.state not in ("missing", "partial")]
            partial = sum(file.here for file in states if file.state == "partial")
            if self._own(artifact) & {file.path for file in states if file.here}:
                size = sum(file.here for file in on_disk)
                entries.append(Entry(artifact, len(on_disk), size, partial, len(on_disk) == len(states)))
        return entries

    def disk_bytes(self) -> int:
        """Total bytes of all entries; shared files count once."""
        entries = self.entries()
        places = {
            self.layout.place(entry.artifact, file.path).resolve()
            for entry in entries
            for file in self._files(entry.artifact)
        }
        roots = [self.settings.home.resolve(), self.settings.hub_folder.resolve()]
        own = [place for place in places if any(place.is_relative_to(root) for root in roots)]
        complete = sum(place.stat().st_size for place in own if place.is_file())
        return complete + sum(entry.partial_bytes for entry in entries)

    def quarantined(self) -> list[Path]:
        """The quarantined files, which have wrong bytes."""
        hub = self.settings.hub_folder
        folders = [(self.layout.quarantine, self.settings.home)]
        folders += [(folder, hub) for folder in hub.glob("models--*/blobs/quarantine")]
        return sorted(
            path
            for folder, root in folders
            if folder.is_dir() and outside_link(folder / "file", root) is None
            for path in folder.iterdir()
        )

    def clear_quarantine(self) -> int:
        """Remove every quarantined file; returns the bytes freed."""
        freed = 0
        with _writing(self.settings.home):
            for path in self.quarantined():
                freed += remove_entry(path, path.parent)
        return freed

    def _status(self, artifact: Artifact, *, shared: bool) -> list[FileStatus]:
        """See `status`; `shared` includes the default Hub cache."""
        if artifact.local is not None:
            size = _size(artifact.local)
            state: State = "present" if artifact.local.exists() else "missing"
            return [FileStatus(str(artifact.local), size, state, size)]
        files = self._files(artifact)
        if not files:
            return [FileStatus(artifact.folder or "all files", 0, "missing", 0)]
        return [self._file_status(artifact, file, shared=shared) for file in files]

    def _missing(self, artifacts: Iterable[Artifact], *, shared: bool) -> list[Missing]:
        incomplete = []
        for artifact in _unique(artifacts):
            states = self._status(artifact, shared=shared)
            files = tuple(file for file in states if file.state not in ("present", "unverified"))
            if files:
                incomplete.append(Missing(artifact, files))
        return incomplete

    def _file_status(self, artifact: Artifact, file: RemoteFile, *, shared: bool = False) -> FileStatus:
        place = self.layout.place(artifact, file.path)
        if os.path.isfile(place):  # False, without an error, in an unreadable folder
            size = place.stat().st_size
            record = self.layout.records.read(source_of(artifact, file))
            state: State = "unverified"
            if record.describes(place):
                state = "present" if file.sha256 in (None, record.sha256) else "bad"
            return FileStatus(file.path, size, state, size)
        other = self.layout.shared_file(artifact, file) if shared else None
        if other is not None:
            return FileStatus(file.path, other.stat().st_size, "unverified", other.stat().st_size)
        partial = self.layout.partial(artifact, file)
        here = received_bytes(partial) if partial is not None and os.path.isfile(partial) else 0
        return FileStatus(file.path, max(file.expected_bytes, here), "partial" if here else "missing", here)

    def _verify_file(self, artifact: Artifact, file: RemoteFile, fetcher: Fetcher) -> FileStatus:
        place = self.layout.place(artifact, file.path)
        if not place.is_file():
            return self._file_status(artifact, file)
        size, real = place.stat().st_size, place.resolve()
        source = source_of(artifact, file)
        etag = self.layout.records.read(source).etag or (real.name if real.parent.name == "blobs" else None)
        try:
            sha256 = fetcher.verify(FetchTask(artifact, file), place, etag)
        except WrongBytesError as error:
            return FileStatus(file.path, size, "bad", 0, error.message)
        self.layout.records.save_hash(source, place, sha256, etag)
        return FileStatus(file.path, size, "present", size)

    def _check_present(self, artifact: Artifact, fetcher: Fetcher) -> None:
        """Verify cached files that are not verified yet; files with wrong bytes are quarantined."""
        if artifact.local is not None:
            return
        for file in self._files(artifact):
            if self._file_status(artifact, file).state in ("missing", "partial"):
                self._link_shared(artifact, file)
            if self._file_status(artifact, file).state in ("unverified", "bad"):
                status = self._verify_file(artifact, file, fetcher)
                if status.state == "bad":
                    log.warning("%s", status.detail)

    def _link_shared(self, artifact: Artifact, file: RemoteFile) -> None:
        """Link to a file in the default Hub cache, if it has the file."""
        other = self.layout.shared_file(artifact, file)
        if other is None:
            return
        place = self.layout.place(artifact, file.path)
        make_folder(place.parent, self.layout.root(artifact))
        with contextlib.suppress(OSError):  # without links, the file is fetched
            place.unlink(missing_ok=True)
            place.symlink_to(other)
            log.info("%s: using %s", artifact.name, other)

    def _files(self, artifact: Artifact) -> tuple[RemoteFile, ...]:
        """The files of an artifact; for an entire Hub folder, those of the cached listing."""
        if not artifact.whole or artifact.name in self._offline_files:
            return self._offline_files.get(artifact.name, artifact.files)
        try:
            listing = json.loads(self._listing(artifact).read_text(encoding="utf-8"))
            return tuple(RemoteFile(**fields) for fields in listing)
        except (OSError, ValueError, TypeError):
            return ()

    def _listing(self, artifact: Artifact) -> Path:
        return self.settings.home / "listings" / f"{short_hash(artifact.name)}.json"

    def _list(self, artifact: Artifact) -> None:
        """Fetch the listing of an entire Hub folder once; offline, use the files in the cache."""
        if not artifact.whole or self._files(artifact):
            return
        if self.offline:
            root = self.layout.folder(artifact)
            paths = sorted(path for path in self.path(artifact).rglob("*") if path.is_file())
            if not paths:
                raise offline_error([Missing(artifact, ())])
            self._offline_files[artifact.name] = tuple(
                RemoteFile(path.relative_to(root).as_posix()) for path in paths
            )
            return
        with transfer.transfer_client() as client:
            files = client.list_folder(artifact)
        place = self._listing(artifact)
        make_folder(place.parent, self.settings.home)
        temporary = place.with_name(f"{place.stem}.{secrets.token_hex(4)}.tmp")
        temporary.write_text(json.dumps([asdict(file) for file in files]), encoding="utf-8")
        os.replace(temporary, place)

    def _tasks(self, missing: Sequence[Missing]) -> list[FetchTask]:
        tasks: dict[Path, FetchTask] = {}
        for item in missing:
            paths = {file.path for file in item.files}
            for file in self._files(item.artifact):
                if file.path in paths:
                    place = self.layout.place(item.artifact, file.path)
                    tasks.setdefault(place, FetchTask(item.artifact, file))
        return list(tasks.values())

    def _check_room(self, missing: Sequence[Missing]) -> None:
        """Check the free disk space before the first transfer."""
        needs: dict[int, tuple[Path, int]] = {}
        for item in missing:
            folder = self.settings.hub_folder if item.artifact.repo else self.settings.home
            folder.mkdir(parents=True, exist_ok=True)
            device = folder.stat().st_dev
            needs[device] = (folder, needs.get(device, (folder, 0))[1] + item.bytes)
        for folder, need in needs.values():
            check_room(folder, need)

    def _announce(self, missing: Sequence[Missing]) -> None:
        total = human_size(sum(item.bytes for item in missing))
        log.info("fetching %s, %s, into %s", count_models(len(missing)), total, self.settings.home)
        for item in missing:
            log.info("  %s  %s  %s", item.artifact.name, human_size(item.bytes), license_line(item.artifact))

    def _unlisted(self) -> list[Artifact]:
        """Hub files outside the manifest, as one artifact for each repository and commit."""
        pinned = {source_of(artifact, file) for artifact in self.known.values() for file in artifact.files}
        by_commit: dict[str, list[RemoteFile]] = {}
        for record in self.layout.records.all():
            match = re.fullmatch(rf"({REPOSITORY}@[0-9a-f]{{40}}):(.+)", record.source, re.ASCII)
            if match and record.source not in pinned:
                by_commit.setdefault(match[1], []).append(RemoteFile(match[2], sha256=record.sha256))
        return [
            replace(resolve(f"hub:{name}", self.known), files=tuple(files), whole=False, root="")
            for name, files in by_commit.items()
        ]

    def _own(self, artifact: Artifact) -> set[str]:
        """The paths that no other artifact of the manifest shares, or all paths if every path is shared."""
        paths = {file.path for file in self._files(artifact)}
        others = (other for other in self.known.values() if other.name != artifact.name)
        shared = {
            file.path
            for other in others
            if other.repo is not None and (other.repo, other.commit) == (artifact.repo, artifact.commit)
            for file in other.files
        }
        return paths - shared or paths

    def _removable(self, artifact: Artifact) -> list[RemoteFile]:
        """The files of an artifact, except those that another downloaded artifact needs."""
        unlisted = {other.name: other for other in self._unlisted()}
        files = {file.path: file for file in self._files(unlisted.get(artifact.name, artifact))}
        files |= {file.path: file for file in self._files(artifact)}
        paths = set(files)
        for other in self.known.values():
            if other.name == artifact.name or (other.repo, other.commit) != (artifact.repo, artifact.commit):
                continue
            own = [file for file in other.files if file.path not in paths]
            if any(self.layout.place(other, file.path).is_file() for file in own):
                for file in other.files:
                    files.pop(file.path, None)
        return list(files.values())

    def _remove_leftovers(self, artifact: Artifact, file: RemoteFile) -> int:
        """Remove partial and quarantined copies, and partial files of huggingface_hub."""
        source = source_of(artifact, file)
        etag = file.sha256 or self.layout.records.read(source).etag
        prefix = short_hash(source)[:12]
        freed = sum(
            remove_entry(path, path.parent) for path in self.quarantined() if path.name.startswith(prefix)
        )
        if artifact.repo and etag:
            blobs = self.layout.repo(artifact) / "blobs"
            for path in blobs.glob(f"{blob_name(etag)}*.incomplete*"):
                freed += remove_entry(path, self.settings.hub_folder)
        return freed

    def _remove_folder(self, folder: Path) -> int:
        """Remove a folder, or the link that leads it outside the cache; returns the bytes freed."""
        if folder.is_symlink() or outside_link(folder, self.settings.home) is not None:
            return remove_entry(folder, self.settings.home)
        files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
        freed = sum(path.stat().st_size for path in files)
        if folder.is_dir():
            shutil.rmtree(folder)
        return freed


def _unique(artifacts: Iterable[Artifact]) -> list[Artifact]:
    return list({artifact.name: artifact for artifact in artifacts}.values())


def _size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; 0 if the path does not exist."""
    if path.is_file():
        return path.stat().st_size
    return sum(child.stat().st_size for child in path.rglob("*") if child.is_file())


def _check_local(artifact: Artifact) -> None:
    if artifact.local is None:
        return
    try:
        if artifact.local.exists():
            return
    except OSError as error:
        raise ModelUnavailableError(
            f"cannot read {artifact.local}: {error.strerror or error}",
            "check the permissions of it and of the folders above it",
        ) from error
    if artifact.packaged:
        raise ModelUnavailableError(
            f"{artifact.name} is missing from this installation ({artifact.local})",
            "reinstall fastface-cli",
        )
    raise ModelUnavailableError(f"{artifact.local} does not exist", "check the path in the recipe")


@contextlib.contextmanager
def _writing(home: Path) -> Iterator[None]:
    """Turn failures of the file system into a message with a hint."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, f"cannot store models in {home}") from error
