"""One missing file becomes a verified file at its place, whoever else is fetching it at the same time."""

from __future__ import annotations

import contextlib
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from rich.progress import TaskID

from .. import console
from ..errors import ModelUnavailableError
from . import transfer
from .layout import CacheLayout, blob_name, check_room, link, source_of
from .manifest import Artifact, RemoteFile
from .records import Record, file_sha256, mismatch, quarantine, short_hash


@dataclass(frozen=True)
class FetchTask:
    """A file to fetch, and the artifact that wants it."""

    artifact: Artifact
    file: RemoteFile

    @property
    def source(self) -> str:
        return source_of(self.artifact, self.file)


class Bars:
    """A bar for the file at hand and one for all; nothing where stderr is not a terminal."""

    def __init__(self, *, show: bool) -> None:
        self._progress = console.transfer_progress(quiet=not show)
        self._all: TaskID | None = None

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def total(self, size: int) -> None:
        """Show a bar for all files together."""
        self._all = self._progress.add_task("all files", total=size or None)

    @contextlib.contextmanager
    def one(self, label: str, size: int, done: int = 0) -> Iterator[transfer.TransferReport]:
        """A bar for one file; what it yields is told of every change in bytes."""
        task = self._progress.add_task(label, total=size or None, completed=done)
        if self._all is not None:
            self._progress.advance(self._all, done)

        def report(change: int) -> None:
            self._progress.advance(task, change)
            if self._all is not None:
                self._progress.advance(self._all, change)

        try:
            yield report
        finally:
            self._progress.remove_task(task)

    @contextlib.contextmanager
    def check(self, label: str, size: int) -> Iterator[transfer.TransferReport]:
        """A bar for hashing, which does not count as progress of all files."""
        task = self._progress.add_task(label, total=size or None)
        try:
            yield lambda change: self._progress.advance(task, change)
        finally:
            self._progress.remove_task(task)


class Fetcher:
    """Fetches files into a layout.

    Args:
        layout: where they go.
        bars: told of progress.
    """

    def __init__(self, layout: CacheLayout, bars: Bars) -> None:
        self.layout = layout
        self.records = layout.records
        self.bars = bars

    def fetch(self, task: FetchTask) -> None:
        """Fetch one file, from wherever its artifact comes.

        Raises:
            ModelUnavailableError: refused, not reachable, wrong bytes.
        """
        if task.artifact.repo is None:
            self._fetch_url(task)
            return
        try:
            self._fetch_hub(task)
        except transfer.SourceError as error:
            if task.artifact.archive is None or task.file.sha256 is None:
                raise
            self._fetch_archive(task, error)

    def here(self, task: FetchTask) -> bool:
        """Whether the file lies verified at its place."""
        place = self.layout.place(task.artifact, task.file.path)
        record = self.records.read(task.source)
        return record.describes(place) and task.file.sha256 in (None, record.sha256)

    def verify(self, task: FetchTask, path: Path, etag: str | None) -> str:
        """SHA-256 of a file that must be right.

        Raises:
            WrongBytesError: it is not, and was moved aside.
        """
        expected = task.file.sha256 or self.records.read(task.source).sha256
        with self.bars.check(f"checking {task.file.path}", path.stat().st_size) as report:
            got = file_sha256(path, report)
        right = mismatch(got, expected, etag, path)
        if right is not None:
            aside = quarantine(path, self.layout.quarantine, task.source, got)
            raise WrongBytesError(task, got, right, aside)
        return got

    def _fetch_hub(self, task: FetchTask) -> None:
        said = transfer.announce(task.artifact, task.file)
        record = self.records.read(task.source)
        _refuse_early(task, said, record)
        blob = self.layout.repo(task.artifact) / "blobs" / blob_name(said.etag)
        with self._locked(task, blob.name):
            if self.here(task):
                return
            self.records.write(replace(record, etag=said.etag))
            got = self._reuse(task, blob, said.etag) or self._fetch_blob(task, said, blob)
            self._settle(task, blob, got, said.etag)

    def _reuse(self, task: FetchTask, blob: Path, etag: str) -> str | None:
        """The hash of a blob that is there already, for another path or put there by another program."""
        if not blob.is_file():
            return None
        try:
            return self.verify(task, blob, etag)
        except WrongBytesError as error:
            console.note(f"{error.message}; fetching it anew")
            return None

    def _fetch_blob(self, task: FetchTask, said: transfer.Announcement, blob: Path) -> str:
        """Fetch into a partial file, check it, and only then give it its place.

        A file that was put together from two transfers and is wrong is fetched once more from its start.
        """
        blob.parent.mkdir(parents=True, exist_ok=True)
        partial = blob.with_name(f"{blob.name}.incomplete")
        while True:
            resumed = self._transfer(task, said, partial)
            try:
                got = self.verify(task, partial, said.etag)
            except WrongBytesError as error:
                if not resumed:
                    raise
                console.note(f"{error.message}; fetching it anew from its start")
                continue
            os.replace(partial, blob)
            return got

    def _transfer(self, task: FetchTask, said: transfer.Announcement, partial: Path) -> bool:
        here = partial.stat().st_size if partial.exists() else 0
        check_room(partial.parent, (said.size or task.file.expected_bytes) - here)
        with self.bars.one(task.file.path, said.size or task.file.expected_bytes, here) as report:
            return transfer.fetch(task.artifact, task.file, said, partial, report)

    def _settle(self, task: FetchTask, blob: Path, got: str, etag: str | None) -> None:
        place = self.layout.place(task.artifact, task.file.path)
        link(place, blob)
        self.records.save_hash(task.source, place, got, etag)

    def _fetch_url(self, task: FetchTask) -> None:
        place = self.layout.place(task.artifact, task.file.path)
        partial = place.with_name(place.name + ".part")
        with self._locked(task, short_hash(task.source)):
            if self.here(task):
                return
            self._retrieve(task.artifact, str(task.artifact.url), task.file.expected_bytes, partial)
            got = self.verify(task, partial, None)
            os.replace(partial, place)
            self.records.save_hash(task.source, place, got)

    def _retrieve(self, artifact: Artifact, url: str, size: int, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with self.bars.one(url.rsplit("/", 1)[-1], size) as report:
            transfer.fetch_url(artifact, url, target, report)

    def _fetch_archive(self, task: FetchTask, reason: transfer.SourceError) -> None:
        """The same file out of the publisher's zip, whose folders may be nested in any way."""
        artifact, file = task.artifact, task.file
        url = str(artifact.archive)
        console.note(f"{reason.message}; trying {url}")
        folder = self.layout.settings.home / "files" / artifact.name
        archive = folder / url.rsplit("/", 1)[-1]
        blob = self.layout.repo(artifact) / "blobs" / str(file.sha256)
        with self._locked(task, short_hash(url)):
            if self.here(task):
                return
            try:
                self._retrieve(artifact, url, 0, archive)
            except transfer.SourceError as error:
                raise transfer.SourceError(
                    f"{reason.message}; and its archive: {error.message}", reason.hint
                ) from error
            blob.parent.mkdir(parents=True, exist_ok=True)
            partial = blob.with_name(f"{blob.name}.incomplete")
            try:
                extract(archive, file.path.rsplit("/", 1)[-1], partial, file.bytes)
            except ModelUnavailableError:
                archive.unlink()
                raise
            got = self.verify(task, partial, None)
            os.replace(partial, blob)
            self._settle(task, blob, got, None)

    @contextlib.contextmanager
    def _locked(self, task: FetchTask, name: str) -> Iterator[None]:
        """One process at a time for each blob; the lock that huggingface_hub takes too."""
        from filelock import FileLock, Timeout

        folder = self.layout.settings.hub_folder / ".locks"
        if task.artifact.repo is not None:
            folder /= self.layout.repo(task.artifact).name
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name}.lock")
        try:
            lock.acquire(timeout=0.5)
        except Timeout:
            console.note(f"waiting for another process that is fetching {task.file.path}")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


class WrongBytesError(ModelUnavailableError):
    """A file is not the file it should be; it was moved aside."""

    def __init__(self, task: FetchTask, got: str, right: str, aside: Path) -> None:
        super().__init__(
            f"{task.artifact.name}: {task.file.path} has the wrong bytes: SHA-256 {got}, expected {right}; "
            f"it was moved to {aside}",
            "run the same command again to fetch it anew; if it stays so, a server or proxy changes it",
        )
        self.aside = aside


def extract(archive: Path, name: str, target: Path, size: int | None) -> None:
    """Take one file out of a zip by its bare name, however deep it lies.

    Args:
        size: how many bytes it may have at most; None is no limit.

    Raises:
        ModelUnavailableError: not a zip, no such file in it, or too large.
    """
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = [one for one in zipped.infolist() if one.filename.rsplit("/", 1)[-1] == name]
            if not members:
                raise ModelUnavailableError(f"{archive} does not hold {name}", "run the same command again")
            member = min(members, key=lambda one: one.filename.count("/"))
            if size is not None and member.file_size > size:
                raise ModelUnavailableError(
                    f"{name} in {archive} has {member.file_size} bytes, not {size}",
                    "run the same command again",
                )
            with zipped.open(member) as source, target.open("wb") as sink:
                while block := source.read(1 << 20):
                    sink.write(block)
    except zipfile.BadZipFile as error:
        raise ModelUnavailableError(
            f"{archive} is not a whole zip: {error}", "run the same command again"
        ) from error


def fetch_all(fetcher: Fetcher, tasks: Sequence[FetchTask]) -> None:
    """Fetch files, small ones first, so that what is refused is refused early."""
    ordered = sorted(tasks, key=lambda task: task.file.expected_bytes)
    fetcher.bars.total(sum(task.file.expected_bytes for task in ordered))
    archives = {
        fetcher.layout.settings.home / "files" / task.artifact.name for task in tasks if task.artifact.archive
    }
    for task in ordered:
        fetcher.fetch(task)
    for folder in archives:
        for archive in folder.glob("*.zip"):
            archive.unlink()


def _refuse_early(task: FetchTask, said: transfer.Announcement, record: Record) -> None:
    """What the server announces may already show that these are not the right bytes."""
    expected = task.file.sha256 or record.sha256
    if expected and re.fullmatch(r"[0-9a-f]{64}", said.etag) and said.etag != expected:
        announced = f"SHA-256 {said.etag}, expected {expected}"
    elif expected is None and task.file.bytes is not None and said.size not in (None, task.file.bytes):
        announced = f"{said.size} bytes, expected {task.file.bytes}"
    else:
        return
    raise ModelUnavailableError(
        f"{task.artifact.name}: the server offers other bytes for {task.file.path} ({announced}); "
        "nothing was fetched",
        "unset HF_ENDPOINT if it names a mirror, or name the file yourself in the recipe: "
        f"hub:{task.artifact.repo}@<commit>:{task.file.path}",
    )
