"""Artefacts made present: fetched, verified, remembered, removed.

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
from .fetching import Bars, Fetcher, Job, WrongBytesError, fetch_all
from .fused_cache import FusedCache
from .layout import Layout, blob_name, check_room, remove_empty, remove_file, source_of
from .manifest import Artefact, RemoteFile, load_manifest, resolve
from .records import short_hash
from .states import Entry, FileStatus, Missing, State, count_models, human_size, licence_line, offline_error


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
        known: Mapping[str, Artefact] | None = None,
    ) -> None:
        self.settings = settings
        self.offline = transfer.is_offline() if offline is None else offline
        self.known = load_manifest() if known is None else known
        self.layout = Layout(settings)
        self._found: dict[str, tuple[RemoteFile, ...]] = {}

    @property
    def fused(self) -> FusedCache:
        """Fused models kept between runs."""
        return FusedCache(self.settings.home / "fused", int(self.settings.fused_cache * 1e9))

    def path(self, artefact: Artefact) -> Path:
        """What a loader opens: `Layout.path` says what that is for each kind. It need not exist yet."""
        return self.layout.path(artefact)

    def status(self, artefact: Artefact) -> list[FileStatus]:
        """Each file of an artefact, without network and without hashing."""
        if artefact.local is not None:
            size = _size(artefact.local)
            there = artefact.local.exists()
            return [FileStatus(str(artefact.local), size, "present" if there else "missing", size)]
        files = self._files(artefact)
        if not files:
            return [FileStatus(artefact.folder or "all of it", 0, "missing", 0)]
        return [self._file_status(artefact, file) for file in files]

    def missing(self, artefacts: Iterable[Artefact]) -> list[Missing]:
        """The artefacts that are not all here; no network, no hashing."""
        found = []
        for artefact in _unique(artefacts):
            states = self.status(artefact)
            files = tuple(file for file in states if file.state not in ("present", "unverified"))
            if files:
                found.append(Missing(artefact, files))
        return found

    def ensure(
        self,
        artefacts: Sequence[Artefact],
        *,
        progress: bool = True,
        listed: Callable[[Sequence[Missing]], None] | None = None,
    ) -> dict[str, Path]:
        """Fetch what is missing, check every byte, and say where everything is.

        Args:
            artefacts: what is wanted; twice the same is the same.
            progress: show a bar for each file and one for all, on a terminal.
            listed: told what will be fetched, before it is; None prints names, sizes and licences.

        Returns:
            `path` of each artefact, by name.

        Raises:
            ModelUnavailableError: offline, refused, not reachable, wrong bytes, no room; what arrived is
                kept, and the same call goes on where it stopped.
        """
        wanted = _unique(artefacts)
        for artefact in wanted:
            _check_local(artefact)
        with _writing(self.settings.home), Bars(show=progress) as bars:
            for artefact in wanted:
                self._list(artefact)
                self._check_present(artefact, bars)
            missing = self.missing(wanted)
            if missing:
                if self.offline:
                    raise offline_error(missing)
                self._check_room(missing)
                (listed or self._announce)(missing)
                fetch_all(Fetcher(self.layout, bars), self._jobs(missing))
        return {artefact.name: self.path(artefact) for artefact in wanted}

    def verify(self, artefact: Artefact, *, progress: bool = True) -> list[FileStatus]:
        """Hash every file of an artefact that is here; a wrong one is moved aside and reported as bad."""
        if artefact.local is not None:
            return self.status(artefact)
        with _writing(self.settings.home), Bars(show=progress) as bars:
            return [self._verify_file(artefact, file, bars) for file in self._files(artefact)]

    def remove(self, artefact: Artefact) -> int:
        """Remove an artefact's files, whole, partial and quarantined; what others share stays.

        Returns:
            Bytes freed.

        Raises:
            ModelUnavailableError: the file system refuses.
        """
        if artefact.local is not None:
            return 0
        freed = 0
        with _writing(self.settings.home):
            repo = self.layout.repo(artefact) if artefact.repo else None
            for file in self._removable(artefact):
                freed += remove_file(self.layout.place(artefact, file.path), repo)
                freed += self._remove_leftovers(artefact, file)
            if repo is not None:
                remove_empty(repo)
            elsewhere = self.settings.home / "files" / artefact.name
            if elsewhere.is_dir():
                freed += _size(elsewhere)
                shutil.rmtree(elsewhere)
        return freed

    def entries(self) -> list[Entry]:
        """Every artefact of the manifest, and every Hub reference ever used, that takes room on this disk."""
        found = []
        for artefact in (*self.known.values(), *self._strangers()):
            if artefact.local is not None:
                continue
            states = self.status(artefact)
            there = [file for file in states if file.state not in ("missing", "partial")]
            partial = sum(file.here for file in states if file.state == "partial")
            if self._own(artefact) & {file.path for file in states if file.here}:
                size = sum(file.here for file in there)
                found.append(Entry(artefact, len(there), size, partial, len(there) == len(states)))
        return found

    def disk_bytes(self) -> int:
        """Bytes that all entries take together; a file that several of them share counts once."""
        entries = self.entries()
        places = {
            self.layout.place(entry.artefact, file.path).resolve()
            for entry in entries
            for file in self._files(entry.artefact)
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

    def _file_status(self, artefact: Artefact, file: RemoteFile) -> FileStatus:
        place = self.layout.place(artefact, file.path)
        if os.path.isfile(place):  # False, not an error, in a folder that may not be entered
            size = place.stat().st_size
            record = self.layout.records.read(source_of(artefact, file))
            state: State = "unverified"
            if record.describes(place):
                state = "present" if file.sha256 in (None, record.sha256) else "bad"
            return FileStatus(file.path, size, state, size)
        partial = self.layout.partial(artefact, file)
        here = partial.stat().st_size if partial is not None and os.path.isfile(partial) else 0
        return FileStatus(file.path, max(file.expected_bytes, here), "partial" if here else "missing", here)

    def _verify_file(self, artefact: Artefact, file: RemoteFile, bars: Bars) -> FileStatus:
        place = self.layout.place(artefact, file.path)
        if not place.is_file():
            return self._file_status(artefact, file)
        size, real = place.stat().st_size, place.resolve()
        source = source_of(artefact, file)
        etag = self.layout.records.read(source).etag or (real.name if real.parent.name == "blobs" else None)
        try:
            got = Fetcher(self.layout, bars).verify(Job(artefact, file), place, etag)
        except WrongBytesError as error:
            return FileStatus(file.path, size, "bad", 0, error.message)
        self.layout.records.seen(source, place, got, etag)
        return FileStatus(file.path, size, "present", size)

    def _check_present(self, artefact: Artefact, bars: Bars) -> None:
        """Hash what lies in the cache but was never verified; what is wrong is moved aside, to be fetched."""
        if artefact.local is not None:
            return
        for file in self._files(artefact):
            if self._file_status(artefact, file).state in ("unverified", "bad"):
                found = self._verify_file(artefact, file, bars)
                if found.state == "bad":
                    console.note(found.detail)

    def _files(self, artefact: Artefact) -> tuple[RemoteFile, ...]:
        """The files of an artefact; of a whole Hub folder those of the listing that was kept."""
        if not artefact.whole or artefact.name in self._found:
            return self._found.get(artefact.name, artefact.files)
        try:
            kept = json.loads(self._listing(artefact).read_text(encoding="utf-8"))
            return tuple(RemoteFile(**one) for one in kept)
        except (OSError, ValueError, TypeError):
            return ()

    def _listing(self, artefact: Artefact) -> Path:
        return self.settings.home / "listings" / f"{short_hash(artefact.name)}.json"

    def _list(self, artefact: Artefact) -> None:
        """Learn once which files a whole Hub folder means; offline, what is in the cache will have to do."""
        if not artefact.whole or self._files(artefact):
            return
        if self.offline:
            root = self.layout.folder(artefact)
            found = sorted(path for path in self.path(artefact).rglob("*") if path.is_file())
            if not found:
                raise offline_error([Missing(artefact, ())])
            self._found[artefact.name] = tuple(
                RemoteFile(path.relative_to(root).as_posix()) for path in found
            )
            return
        files = transfer.list_folder(artefact)
        place = self._listing(artefact)
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(f"{place.stem}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps([asdict(file) for file in files]), encoding="utf-8")
        os.replace(temporary, place)

    def _jobs(self, missing: Sequence[Missing]) -> list[Job]:
        jobs: dict[Path, Job] = {}
        for one in missing:
            wanted = {file.path for file in one.files}
            for file in self._files(one.artefact):
                if file.path in wanted:
                    jobs.setdefault(self.layout.place(one.artefact, file.path), Job(one.artefact, file))
        return list(jobs.values())

    def _check_room(self, missing: Sequence[Missing]) -> None:
        """Refuse before the first byte what will not fit."""
        needs: dict[int, tuple[Path, int]] = {}
        for one in missing:
            folder = self.settings.hub_folder if one.artefact.repo else self.settings.home
            folder.mkdir(parents=True, exist_ok=True)
            device = folder.stat().st_dev
            needs[device] = (folder, needs.get(device, (folder, 0))[1] + one.bytes)
        for folder, need in needs.values():
            check_room(folder, need)

    def _announce(self, missing: Sequence[Missing]) -> None:
        total = human_size(sum(one.bytes for one in missing))
        console.note(f"fetching {count_models(len(missing))}, {total}, into {self.settings.home}")
        for one in missing:
            console.note(f"  {one.artefact.name}  {human_size(one.bytes)}  {licence_line(one.artefact)}")

    def _strangers(self) -> list[Artefact]:
        """Hub references that recipes named by themselves, one artefact for each repository and commit."""
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

    def _own(self, artefact: Artefact) -> set[str]:
        """Paths of an artefact that no other artefact of the manifest names; all, where there are none."""
        paths = {file.path for file in self._files(artefact)}
        others = (one for one in self.known.values() if one.name != artefact.name)
        shared = {
            file.path
            for one in others
            if one.repo is not None and (one.repo, one.commit) == (artefact.repo, artefact.commit)
            for file in one.files
        }
        return paths - shared or paths

    def _removable(self, artefact: Artefact) -> list[RemoteFile]:
        """An artefact's files, but for those that another artefact that is here also needs."""
        strangers = {one.name: one for one in self._strangers()}
        files = {file.path: file for file in self._files(strangers.get(artefact.name, artefact))}
        files |= {file.path: file for file in self._files(artefact)}
        named = set(files)
        for other in self.known.values():
            if other.name == artefact.name or (other.repo, other.commit) != (artefact.repo, artefact.commit):
                continue
            own = [file for file in other.files if file.path not in named]
            if any(self.layout.place(other, file.path).is_file() for file in own):
                for file in other.files:
                    files.pop(file.path, None)
        return list(files.values())

    def _remove_leftovers(self, artefact: Artefact, file: RemoteFile) -> int:
        """Remove partial and quarantined copies, and what huggingface_hub left of its own transfers."""
        source = source_of(artefact, file)
        etag = file.sha256 or self.layout.records.read(source).etag
        leftovers = [path for path in self.quarantined() if path.name.startswith(short_hash(source)[:12])]
        if artefact.repo and etag:
            leftovers += (self.layout.repo(artefact) / "blobs").glob(f"{blob_name(etag)}*.incomplete")
        freed = 0
        for path in leftovers:
            freed += path.stat().st_size
            path.unlink()
        return freed


def _unique(artefacts: Iterable[Artefact]) -> list[Artefact]:
    return list({artefact.name: artefact for artefact in artefacts}.values())


def _size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; 0 where there is nothing."""
    if path.is_file():
        return path.stat().st_size
    return sum(child.stat().st_size for child in path.rglob("*") if child.is_file())


def _check_local(artefact: Artefact) -> None:
    if artefact.local is None:
        return
    try:
        if artefact.local.exists():
            return
    except OSError as error:
        raise ModelUnavailableError(
            f"cannot read {artefact.local}: {error.strerror or error}",
            "check the permissions of it and of the folders above it",
        ) from error
    if artefact.packaged:
        raise ModelUnavailableError(
            f"this installation lacks {artefact.name} ({artefact.local})", "install fastface-cli again"
        )
    raise ModelUnavailableError(f"{artefact.local} does not exist", "check the path in the recipe")


@contextlib.contextmanager
def _writing(home: Path) -> Iterator[None]:
    """What the file system refuses becomes one sentence."""
    try:
        yield
    except OSError as error:
        raise transfer.disk_error(error, f"cannot keep models in {home}") from error
