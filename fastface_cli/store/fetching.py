"""Fetching one missing file: transfer, verification and placement, safe against concurrent processes."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import ModelUnavailableError
from . import transfer
from .failures import SourceError, StoppedError, no_hub
from .layout import CacheLayout, blob_name, check_room, link, source_of
from .links import make_folder, open_for_writing, remove_entry
from .manifest import Artifact, RemoteFile
from .partial import received_bytes
from .progress import DownloadProgress, ProgressObserver, VerifyProgress, one_at_a_time, reporting
from .records import Record, file_sha256, mismatch, quarantine, short_hash

log = logging.getLogger(__name__)

FILES = 4
"""Number of files that are fetched at the same time."""


@dataclass(frozen=True)
class FetchTask:
    """A file to fetch, and the artifact that needs it.

    Args:
        artifact: the artifact.
        file: the file.
        label: its name in progress events, different from that of every other file; empty is its path.
    """

    artifact: Artifact
    file: RemoteFile
    label: str = ""

    @property
    def source(self) -> str:
        """The key of the file in the records."""
        return source_of(self.artifact, self.file)


class Fetcher:
    """Fetches files into the cache.

    Args:
        layout: the cache.
        observer: receives progress events, one at a time.
        client: sends the requests; None only verifies files.
    """

    def __init__(
        self,
        layout: CacheLayout,
        observer: ProgressObserver,
        client: transfer.TransferClient | None = None,
    ) -> None:
        self.layout = layout
        self.records = layout.records
        self.observer = one_at_a_time(observer)
        self._client = client

    @property
    def client(self) -> transfer.TransferClient:
        """Sends the requests."""
        assert self._client is not None, "this fetcher only verifies files"
        return self._client

    def fetch(self, task: FetchTask) -> None:
        """Fetch one file from its repository, URL or archive.

        Raises:
            ModelUnavailableError: refused, unreachable, or wrong bytes.
        """
        artifact, pinned = task.artifact, task.file.sha256 is not None
        if artifact.repo is None:
            self._fetch_url(task)
            return
        try:
            self._fetch_hub(task, str(artifact.commit))
        except SourceError as error:
            if error.status in (404, 410) and artifact.fallback is not None and pinned:
                log.warning("%s; trying commit %s", error.message, artifact.fallback)
                self._fetch_hub(task, artifact.fallback)
            elif artifact.archive is not None and pinned:
                self._fetch_archive(task, error)
            else:
                raise

    def is_verified(self, task: FetchTask) -> bool:
        """Whether the file is in the cache and verified."""
        place = self.layout.place(task.artifact, task.file.path)
        record = self.records.read(task.source)
        return record.describes(place) and task.file.sha256 in (None, record.sha256)

    def verify(self, task: FetchTask, path: Path, etag: str | None) -> str:
        """Hash a file and compare it with the expected hash.

        Returns:
            SHA-256 (hex) of the file.

        Raises:
            WrongBytesError: it differs, and the file was moved to the quarantine.
        """
        size = path.stat().st_size
        with reporting(self.observer, VerifyProgress, task.label or task.file.path, size) as add:
            sha256 = file_sha256(path, add)
        self._compare(task, path, sha256, etag)
        return sha256

    def _compare(self, task: FetchTask, path: Path, sha256: str, etag: str | None) -> None:
        expected = mismatch(sha256, task.file.sha256 or self.records.read(task.source).sha256, etag, path)
        if expected is not None:
            root = self.layout.root(task.artifact)
            place = quarantine(path, root, self.layout.quarantine, task.source, sha256)
            raise WrongBytesError(task, sha256, expected, place)

    def _fetch_hub(self, task: FetchTask, commit: str) -> None:
        artifact, file = task.artifact, task.file
        record = self.records.read(task.source)

        def check(announced: transfer.Announcement) -> None:
            if announced.commit not in (None, commit):
                raise no_hub(artifact, file.path, announced.url)
            _check_announcement(task, announced, record)

        if file.sha256 is not None:  # the response that brings the file announces it, too
            url = transfer.hub_url(artifact, file, commit)
            source = transfer.Announcement(url, file.sha256, file.bytes)
        else:
            source = self.client.announce(artifact, file)
            check(source)
        blob = self.layout.repo(artifact) / "blobs" / blob_name(source.etag)
        with self._locked(task, blob.name):
            if self.is_verified(task):
                return
            self.records.write(replace(record, etag=source.etag))
            sha256 = self._reuse(task, blob, source.etag)
            if sha256 is None:
                partial = blob.with_name(f"{blob.name}.incomplete")
                sha256 = self._download(task, source, partial, check)
                os.replace(partial, blob)
            self._place(task, blob, sha256, source.etag)

    def _reuse(self, task: FetchTask, blob: Path, etag: str) -> str | None:
        """The hash of an existing blob, fetched for another path or by another program."""
        if not blob.is_file():
            return None
        try:
            return self.verify(task, blob, etag)
        except WrongBytesError as error:
            log.warning("%s; fetching it again", error.message)
            return None

    def _download(
        self,
        task: FetchTask,
        source: transfer.Announcement,
        partial: Path,
        check: Callable[[transfer.Announcement], None] | None = None,
    ) -> str:
        """Fetch into a partial file and verify it; the caller moves it into the cache.

        A file with wrong bytes that was resumed from an earlier transfer is fetched once more from the start.
        """
        size = source.size or task.file.expected_bytes
        label = task.label or task.file.path
        make_folder(partial.parent, self.layout.root(task.artifact))
        while True:
            here = received_bytes(partial, source.size)
            check_room(partial.parent, size - here)
            with reporting(self.observer, DownloadProgress, label, size, here) as add:
                result = self.client.fetch(task.artifact, task.file.path, source, partial, add, check)
            try:
                self._compare(task, partial, result.sha256, source.etag or None)
            except WrongBytesError as error:
                if not result.resumed:
                    raise
                log.warning("%s; fetching it again from the start", error.message)
                continue
            return result.sha256

    def _place(self, task: FetchTask, blob: Path, sha256: str, etag: str | None) -> None:
        place = self.layout.place(task.artifact, task.file.path)
        link(place, blob, self.layout.root(task.artifact))
        self.records.save_hash(task.source, place, sha256, etag)

    def _fetch_url(self, task: FetchTask) -> None:
        place = self.layout.place(task.artifact, task.file.path)
        partial = place.with_name(place.name + ".part")
        with self._locked(task, short_hash(task.source)):
            if self.is_verified(task):
                return
            announcement = transfer.Announcement(str(task.artifact.url), "", task.file.bytes)
            sha256 = self._download(task, announcement, partial)
            os.replace(partial, place)
            self.records.save_hash(task.source, place, sha256)

    def _fetch_archive(self, task: FetchTask, reason: SourceError) -> None:
        """Fetch a file out of the publisher's zip, at any depth."""
        artifact, file = task.artifact, task.file
        url = str(artifact.archive)
        log.warning("%s; trying %s", reason.message, url)
        name = url.rsplit("/", 1)[-1]
        archive = self.layout.settings.home / "files" / artifact.name / name
        blob = self.layout.repo(artifact) / "blobs" / str(file.sha256)
        with self._locked(task, short_hash(url)):
            if self.is_verified(task):
                return
            if not archive.exists():
                self._fetch_zip(artifact, url, archive, reason)
            make_folder(blob.parent, self.layout.root(artifact))
            partial = blob.with_name(f"{blob.name}.incomplete")
            try:
                extract(archive, file.path.rsplit("/", 1)[-1], partial, file.bytes)
            except ModelUnavailableError:
                archive.unlink()
                raise
            sha256 = self.verify(task, partial, None)
            os.replace(partial, blob)
            self._place(task, blob, sha256, None)

    def _fetch_zip(self, artifact: Artifact, url: str, archive: Path, reason: SourceError) -> None:
        make_folder(archive.parent, self.layout.settings.home)
        partial = archive.with_name(archive.name + ".part")
        try:
            with reporting(self.observer, DownloadProgress, archive.name, 0) as add:
                self.client.fetch(artifact, archive.name, transfer.Announcement(url, "", None), partial, add)
        except SourceError as error:
            message = f"{reason.message}; its archive failed too: {error.message}"
            raise SourceError(message, reason.hint, reason.status) from error
        os.replace(partial, archive)

    @contextlib.contextmanager
    def _locked(self, task: FetchTask, name: str) -> Iterator[None]:
        """One process at a time for each blob, with the lock file that huggingface_hub uses too."""
        from filelock import FileLock, Timeout

        folder = self.layout.settings.hub_folder / ".locks"
        if task.artifact.repo is not None:
            folder /= self.layout.repo(task.artifact).name
        make_folder(folder, self.layout.settings.hub_folder)
        lock = FileLock(folder / f"{name}.lock")
        waited = False
        while not lock.is_locked:
            try:
                lock.acquire(timeout=0.5)
            except Timeout:
                if self.client.stopped.is_set():
                    raise StoppedError("the transfer was stopped") from None
                if not waited:
                    log.info("waiting for another process that is fetching %s", task.file.path)
                waited = True
        try:
            yield
        finally:
            lock.release()


class WrongBytesError(ModelUnavailableError):
    """A file has an unexpected hash and was moved to the quarantine."""

    def __init__(self, task: FetchTask, actual: str, expected: str, place: Path | None) -> None:
        super().__init__(
            f"{task.artifact.name}: {task.file.path} has the wrong bytes: SHA-256 {actual}, "
            + f"expected {expected}; "
            + (f"it was moved to {place}" if place else "the link to it was removed"),
            "run the same command again to fetch the file again; if the error persists, a server or proxy "
            "alters the file",
        )


def extract(archive: Path, name: str, target: Path, size: int | None) -> None:
    """Extract one file from a zip by its bare name, at any depth.

    Args:
        archive: the zip.
        name: name of the file, without folders.
        target: where to write it.
        size: its maximum number of bytes; None is no limit.

    Raises:
        ModelUnavailableError: not a zip, no such file, or too large.
    """
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = [member for member in zipped.infolist() if member.filename.rsplit("/", 1)[-1] == name]
            if not members:
                raise ModelUnavailableError(
                    f"{archive} does not contain {name}", "run the same command again"
                )
            member = min(members, key=lambda member: member.filename.count("/"))
            if size is not None and member.file_size > size:
                raise ModelUnavailableError(
                    f"{name} in {archive} has {member.file_size} bytes, not {size}",
                    "run the same command again",
                )
            with zipped.open(member) as source, open_for_writing(target) as sink:
                sink.truncate()
                while block := source.read(1 << 20):
                    sink.write(block)
    except zipfile.BadZipFile as error:
        raise ModelUnavailableError(
            f"{archive} is not a complete zip: {error}", "run the same command again"
        ) from error


def fetch_all(fetcher: Fetcher, tasks: Sequence[FetchTask]) -> None:
    """Fetch several files at once, small ones first, so that refusals occur early.

    Raises:
        ModelUnavailableError: the first failure; the other transfers are stopped, and the next call resumes
            them.
    """
    paths = Counter(task.file.path for task in tasks)
    calls = []
    for task in sorted(tasks, key=lambda task: task.file.expected_bytes):
        label = task.file.path if paths[task.file.path] == 1 else f"{task.artifact.name}/{task.file.path}"
        calls.append(functools.partial(fetcher.fetch, replace(task, label=label)))
    transfer.run_all(FILES, calls, fetcher.client.stopped)
    for artifact in {task.artifact.name for task in tasks if task.artifact.archive}:
        for archive in (fetcher.layout.settings.home / "files" / artifact).glob("*.zip"):
            remove_entry(archive, fetcher.layout.settings.home)


def offered_difference(
    file: RemoteFile, announcement: transfer.Announcement, expected: str | None
) -> str | None:
    """How a server's file differs from the expected hash, or without one from the size; None: it does not."""
    if expected and announcement.names_sha256:
        return None if announcement.etag == expected else f"SHA-256 {announcement.etag}, expected {expected}"
    if file.bytes is not None and announcement.size not in (None, file.bytes):
        return f"{announcement.size} bytes, expected {file.bytes}"
    return None


def _check_announcement(task: FetchTask, announcement: transfer.Announcement, record: Record) -> None:
    """Refuse before the transfer if the announced hash or size is wrong."""
    difference = offered_difference(task.file, announcement, task.file.sha256 or record.sha256)
    if difference is None:
        return
    raise ModelUnavailableError(
        f"{task.artifact.name}: the server offers a different file as {task.file.path} ({difference}); "
        "nothing was fetched",
        "unset HF_ENDPOINT if it names a mirror, or pin another file in the recipe: "
        f"hub:{task.artifact.repo}@<commit>:{task.file.path}",
    )
