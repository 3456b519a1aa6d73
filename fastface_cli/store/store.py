"""Artifacts made present: fetched, verified, remembered, removed.

A file enters the cache only after its SHA-256 was checked; one that is wrong is moved to `home/quarantine`.
Files of the Hub lie in the Hub's own cache layout, so an HF_HUB_CACHE that other programs filled is used as
it is; files from elsewhere lie in `home/files`. What was verified is remembered in `home/records`: as long
as size and time of change stay, a file is not hashed again. Records outlive their files: what was fetched
once must have the same bytes ever after.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from .. import console
from ..errors import ModelUnavailableError
from ..settings import Settings
from . import transfer
from .fetching import Bars, Fetcher, FetchTask, WrongBytesError, fetch_all
from .fused_cache import FusedCache
from .layout import CacheLayout, blob_name, check_room, remove_empty, remove_file, source_of
from .manifest import Artifact, RemoteFile, load_manifest, resolve
from .records import short_hash
from .states import Entry, FileStatus, Missing, State, count_models, human_size, license_line, offline_error


class Store:
    """The models on this machine.

    Args:
        settings: where they are kept.
        offline: never use the network; None asks HF_HUB_OFFLINE.
        known: the manifest; None is the one that ships.
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
        self._found: dict[str, tuple[RemoteFile, ...]] = {}

    @property
    def fused(self) -> FusedCache:
        """Fused models kept between runs."""
        return FusedCache(self.settings.home / "fused", int(self.settings.fused_cache * 1e9))

    def path(self, artifact: Artifact) -> Path:
        """What a loader opens: `CacheLayout.path` says what that is for each kind. It need not exist yet."""
        return self.layout.path(artifact)

    def status(self, artifact: Artifact) -> list[FileStatus]:
        """Each file of an artifact, without network and without hashing."""
        if artifact.local is not None:
            size = _size(artifact.local)
            there = artifact.local.exists()
            return [FileStatus(str(artifact.local), size, "present" if there else "missing", size)]
        files = self._files(artifact)
        if not files:
            return [FileStatus(artifact.folder or "all of it", 0, "missing", 0)]
        return [self._file_status(artifact, file) for file in files]

    def missing(self, artifacts: Iterable[Artifact]) -> list[Missing]:
        """The artifacts that are not all here; no network, no hashing."""
        found = []
        for artifact in _unique(artifacts):
            states = self.status(artifact)
            files = tuple(file for file in states if file.state not in ("present", "unverified"))
            if files:
                found.append(Missing(artifact, files))
        return found

    def ensure(
        self,
        artifacts: Sequence[Artifact],
        *,
        progress: bool = True,
        listed: Callable[[Sequence[Missing]], None] | None = None,
    ) -> dict[str, Path]:
        """Fetch what is missing, check every byte, and say where everything is.

        Args:
            artifacts: what is wanted; twice the same is the same.
            progress: show a bar for each file and one for all, on a terminal.
            listed: told what will be fetched, before it is; None prints names, sizes and licenses.

        Returns:
            `path` of each artifact, by name.

        Raises:
            ModelUnavailableError: offline, refused, not reachable, wrong bytes, no room; what arrived is
                kept, and the same call goes on where it stopped.
        """
        wanted = _unique(artifacts)
        for artifact in wanted:
            _check_local(artifact)
        with _writing(self.settings.home), Bars(show=progress) as bars:
            for artifact in wanted:
                self._list(artifact)
                self._check_present(artifact, bars)
            missing = self.missing(wanted)
            if missing:
                if self.offline:
                    raise offline_error(missing)
                self._check_room(missing)
                (listed or self._announce)(missing)
                fetch_all(Fetcher(self.layout, bars), self._tasks(missing))
        return {artifact.name: self.path(artifact) for artifact in wanted}

    def verify(self, artifact: Artifact, *, progress: bool = True) -> list[FileStatus]:
        """Hash every file of an artifact that is here; a wrong one is moved aside and reported as bad."""
        if artifact.local is not None:
            return self.status(artifact)
        with _writing(self.settings.home), Bars(show=progress) as bars:
            return [self._verify_file(artifact, file, bars) for file in self._files(artifact)]

    def remove(self, artifact: Artifact) -> int:
        """Remove an artifact's files, whole, partial and quarantined; what others share stays.

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
                freed += remove_file(self.layout.place(artifact, file.path), repo)
                freed += self._remove_leftovers(artifact, file)
            if repo is not None:
                remove_empty(repo)
            elsewhere = self.settings.home / "files" / artifact.name
            if elsewhere.is_dir():
                freed += _size(elsewhere)
                shutil.rmtree(elsewhere)
        return freed

    def entries(self) -> list[Entry]:
        """Every artifact of the manifest, and every Hub reference ever used, that takes room on this disk."""
        found = []
        for artifact in (*self.known.values(), *self._strangers()):
            if artifact.local is not None:
                continue
            states = self.status(artifact)
            there = [file for file in states if file.state not in ("missing", "partial")]
            partial = sum(file.here for file in states if file.state == "partial")
            if self._own(artifact) & {file.path for file in states if file.here}:
                size = sum(file.here for file in there)
                found.append(Entry(artifact, len(there), size, partial, len(there) == len(states)))
        return found

    def disk_bytes(self) -> int:
        """Bytes that all entries take together; a file that several of them share counts once."""
        entries = self.entries()
        places = {
            self.layout.place(entry.artifact, file.path).resolve()
            for entry in entries
            for file in self._files(entry.artifact)
        }
        whole = sum(place.stat().st_size for place in places if place.is_file())
        return whole + sum(entry.partial_bytes for entry in entries)

    def quarantined(self) -> list[Path]:
        """Files that were moved aside because their bytes were wrong."""
        folders = [self.layout.quarantine, *self.settings.hub_folder.glob("models--*/blobs/quarantine")]
        return sorted(path for folder in folders if folder.is_dir() for path in folder.iterdir())

    def clear_quarantine(self) -> int:
        """Remove every file that was moved aside; returns the bytes freed."""
        freed = 0
        with _writing(self.settings.home):
            for path in self.quarantined():
                freed += path.stat().st_size
                path.unlink()
        return freed

    def _file_status(self, artifact: Artifact, file: RemoteFile) -> FileStatus:
        place = self.layout.place(artifact, file.path)
        if os.path.isfile(place):  # False, not an error, in a folder that may not be entered
            size = place.stat().st_size
            record = self.layout.records.read(source_of(artifact, file))
            state: State = "unverified"
            if record.describes(place):
                state = "present" if file.sha256 in (None, record.sha256) else "bad"
            return FileStatus(file.path, size, state, size)
        partial = self.layout.partial(artifact, file)
        here = partial.stat().st_size if partial is not None and os.path.isfile(partial) else 0
        return FileStatus(file.path, max(file.expected_bytes, here), "partial" if here else "missing", here)

    def _verify_file(self, artifact: Artifact, file: RemoteFile, bars: Bars) -> FileStatus:
        place = self.layout.place(artifact, file.path)
        if not place.is_file():
            return self._file_status(artifact, file)
        size, real = place.stat().st_size, place.resolve()
        source = source_of(artifact, file)
        etag = self.layout.records.read(source).etag or (real.name if real.parent.name == "blobs" else None)
        try:
            got = Fetcher(self.layout, bars).verify(FetchTask(artifact, file), place, etag)
        except WrongBytesError as error:
            return FileStatus(file.path, size, "bad", 0, error.message)
        self.layout.records.save_hash(source, place, got, etag)
        return FileStatus(file.path, size, "present", size)

    def _check_present(self, artifact: Artifact, bars: Bars) -> None:
        """Hash what lies in the cache but was never verified; what is wrong is moved aside, to be fetched."""
        if artifact.local is not None:
            return
        for file in self._files(artifact):
            if self._file_status(artifact, file).state in ("unverified", "bad"):
                found = self._verify_file(artifact, file, bars)
                if found.state == "bad":
                    console.note(found.detail)

    def _files(self, artifact: Artifact) -> tuple[RemoteFile, ...]:
        """The files of an artifact; of a whole Hub folder those of the listing that was kept."""
        if not artifact.whole or artifact.name in self._found:
            return self._found.get(artifact.name, artifact.files)
        try:
            kept = json.loads(self._listing(artifact).read_text(encoding="utf-8"))
            return tuple(RemoteFile(**one) for one in kept)
        except (OSError, ValueError, TypeError):
            return ()

    def _listing(self, artifact: Artifact) -> Path:
        return self.settings.home / "listings" / f"{short_hash(artifact.name)}.json"

    def _list(self, artifact: Artifact) -> None:
        """Learn once which files a whole Hub folder means; offline, what is in the cache will have to do."""
        if not artifact.whole or self._files(artifact):
            return
        if self.offline:
            root = self.layout.folder(artifact)
            found = sorted(path for path in self.path(artifact).rglob("*") if path.is_file())
            if not found:
                raise offline_error([Missing(artifact, ())])
            self._found[artifact.name] = tuple(
                RemoteFile(path.relative_to(root).as_posix()) for path in found
            )
            return
        files = transfer.list_folder(artifact)
        place = self._listing(artifact)
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(f"{place.stem}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps([asdict(file) for file in files]), encoding="utf-8")
        os.replace(temporary, place)

    def _tasks(self, missing: Sequence[Missing]) -> list[FetchTask]:
        tasks: dict[Path, FetchTask] = {}
        for one in missing:
            wanted = {file.path for file in one.files}
            for file in self._files(one.artifact):
                if file.path in wanted:
                    tasks.setdefault(
                        self.layout.place(one.artifact, file.path), FetchTask(one.artifact, file)
                    )
        return list(tasks.values())

    def _check_room(self, missing: Sequence[Missing]) -> None:
        """Refuse before the first byte what will not fit."""
        needs: dict[int, tuple[Path, int]] = {}
        for one in missing:
            folder = self.settings.hub_folder if one.artifact.repo else self.settings.home
            folder.mkdir(parents=True, exist_ok=True)
            device = folder.stat().st_dev
            needs[device] = (folder, needs.get(device, (folder, 0))[1] + one.bytes)
        for folder, need in needs.values():
            check_room(folder, need)

    def _announce(self, missing: Sequence[Missing]) -> None:
        total = human_size(sum(one.bytes for one in missing))
        console.note(f"fetching {count_models(len(missing))}, {total}, into {self.settings.home}")
        for one in missing:
            console.note(f"  {one.artifact.name}  {human_size(one.bytes)}  {license_line(one.artifact)}")

    def _strangers(self) -> list[Artifact]:
        """Hub references that recipes named by themselves, one artifact for each repository and commit."""
        pinned = {source_of(one, file) for one in self.known.values() for file in one.files}
        found: dict[str, list[RemoteFile]] = {}
        for record in self.layout.records.all():
            match = re.fullmatch(r"([\w.-]+/[\w.-]+@[0-9a-f]{40}):(.+)", record.source)
            if match and record.source not in pinned:
                found.setdefault(match[1], []).append(RemoteFile(match[2], sha256=record.sha256))
        return [
            replace(resolve(f"hub:{name}", self.known), files=tuple(files), whole=False, root="")
            for name, files in found.items()
        ]

    def _own(self, artifact: Artifact) -> set[str]:
        """Paths of an artifact that no other artifact of the manifest names; all, where there are none."""
        paths = {file.path for file in self._files(artifact)}
        others = (one for one in self.known.values() if one.name != artifact.name)
        shared = {
            file.path
            for one in others
            if one.repo is not None and (one.repo, one.commit) == (artifact.repo, artifact.commit)
            for file in one.files
        }
        return paths - shared or paths

    def _removable(self, artifact: Artifact) -> list[RemoteFile]:
        """An artifact's files, but for those that another artifact that is here also needs."""
        strangers = {one.name: one for one in self._strangers()}
        files = {file.path: file for file in self._files(strangers.get(artifact.name, artifact))}
        files |= {file.path: file for file in self._files(artifact)}
        named = set(files)
        for other in self.known.values():
            if other.name == artifact.name or (other.repo, other.commit) != (artifact.repo, artifact.commit):
                continue
            own = [file for file in other.files if file.path not in named]
            if any(self.layout.place(other, file.path).is_file() for file in own):
                for file in other.files:
                    files.pop(file.path, None)
        return list(files.values())

    def _remove_leftovers(self, artifact: Artifact, file: RemoteFile) -> int:
        """Remove partial and quarantined copies, and what huggingface_hub left of its own transfers."""
        source = source_of(artifact, file)
        etag = file.sha256 or self.layout.records.read(source).etag
        leftovers = [path for path in self.quarantined() if path.name.startswith(short_hash(source)[:12])]
        if artifact.repo and etag:
            leftovers += (self.layout.repo(artifact) / "blobs").glob(f"{blob_name(etag)}*.incomplete")
        freed = 0
        for path in leftovers:
            freed += path.stat().st_size
            path.unlink()
        return freed


def _unique(artifacts: Iterable[Artifact]) -> list[Artifact]:
    return list({artifact.name: artifact for artifact in artifacts}.values())


def _size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; 0 where there is nothing."""
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
            f"this installation lacks {artifact.name} ({artifact.local})", "install fastface-cli again"
        )
    raise ModelUnavailableError(f"{artifact.local} does not exist", "check the path in the recipe")


@contextlib.contextmanager
def _writing(home: Path) -> Iterator[None]:
    """What the file system refuses becomes one sentence."""
    try:
        yield
    except OSError as error:
        raise transfer.disk_error(error, f"cannot keep models in {home}") from error
