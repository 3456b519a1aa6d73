"""The folder of a run: its inputs, images and scores.

    run.json         inputs; written once, and compared with the inputs of later commands
    generated.jsonl  one row per image, appended after the image is written
    scores.jsonl     {"key", "scores", "errors", "metrics"}, appended in chunks; later lines update earlier
                     ones
    vectors/         vectors of every image for run-wide metrics
    references/      the photos that were used
    identities/      identity files as read by `--identity`
    images/          RECIPE/IDENTITY/PROMPT-SEED.png

Only one process writes: `Run.open` holds a lock. Files are synced to disk before their rows are written.
Lines are written in one call and synced at least every `SYNC` seconds: a killed process loses only the
current image, a power failure only the last seconds. Incomplete or invalid lines, and rows whose image file
is missing or has other contents, are ignored.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import mmap
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import FastFaceError, UsageError
from ..files import check_target, remove_temporaries, sync_folder, write_atomically
from .rows import Row, finite

log = logging.getLogger(__name__)

VERSION = 1
"""Version of the run folder format."""
SYNC = 2.0
"""Seconds between two disk syncs."""
UNCOMPARED = ("hardware", "metrics", "started")
"""Entries that may differ when a run is resumed, because they change no image."""


def open_log(path: Path) -> io.FileIO:
    """Open a file for unbuffered appending."""
    return open(path, "ab", buffering=0)


class RowLog:
    """An append-only file of JSON lines that survives interruption at any byte."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            _drop_incomplete_line(path)
            self._file = open_log(path)
            sync_folder(path.parent)
        except OSError as error:
            raise _not_writable(path.parent, error) from error
        self._synced = time.monotonic()

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write all records in one call.

        Raises:
            FastFaceError: the disk is full, or another write error.
        """
        data = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
        try:
            if os.fstat(self._file.fileno()).st_nlink == 0:
                raise FastFaceError(
                    f"{self.path.parent} was deleted or replaced during the run", "run the same command again"
                )
            rest = memoryview(data.encode("utf-8", "replace"))
            while rest:  # a nearly full disk writes only a part, without an error
                rest = rest[self._file.write(rest) :]
            if time.monotonic() - self._synced > SYNC:
                self._sync()
        except OSError as error:
            raise FastFaceError(
                f"cannot write {self.path}: {error.strerror}",
                "free some disk space, then run the same command again to resume",
            ) from error

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Sync to disk and close the file."""
        self._sync()
        self._file.close()


class Run:
    """The folder of a run. As a context manager it closes its files and releases its lock.

    Args:
        folder: RUN/.
        info: contents of `run.json`.
        writable: lock the folder and open its logs.
    """

    def __init__(self, folder: Path, info: Mapping[str, Any], *, writable: bool) -> None:
        self.folder = folder
        self.info = info
        self._lock = _locked(folder) if writable else None
        if writable:
            remove_temporaries(folder)
        self._generated = RowLog(folder / "generated.jsonl") if writable else None
        self._scores = RowLog(folder / "scores.jsonl") if writable else None

    @classmethod
    def open(cls, folder: Path, info: Mapping[str, Any]) -> Run:
        """Start a run in a new or empty folder, or resume the run in the folder.

        Args:
            folder: RUN/.
            info: recipes, dataset, options, versions, hardware.

        Raises:
            UsageError: the folder is not a run, has other inputs, or is in use by another process.
        """
        path = folder / "run.json"
        requested = json.loads(json.dumps({"version": VERSION, **info}))
        if path.is_file():
            known = read_info(folder)
            differences = list(compare(_compared(known), _compared(requested)))
            if differences:
                raise UsageError(
                    f"{folder} contains a run with other inputs:\n" + "\n".join(differences[:10]),
                    "choose another folder with -o, or use the inputs of that run",
                )
            return cls(folder, known, writable=True)
        # An interrupted start may leave hidden files: the lock, an incomplete run.json.
        if folder.is_dir() and any(not child.name.startswith(".") for child in folder.iterdir()):
            raise UsageError(f"{folder} is not empty and not a run", "choose a new folder with -o")
        run_json = json.dumps(requested, indent=1, ensure_ascii=False).encode()
        check_target(path, force=False)
        write_atomically(path, run_json, force=False)
        return cls(folder, requested, writable=True)

    @classmethod
    def reopen(cls, folder: Path, *, writable: bool = True) -> Run:
        """Open an existing run.

        Raises:
            UsageError: the folder is not a run.
        """
        return cls(folder, read_info(folder), writable=writable)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for log in (self._generated, self._scores):
            if log is not None:
                log.close()
        if self._lock is not None:
            self._lock.release()

    # ------------------------------------------------------------------------------------------ writing

    def add(self, row: Row, image: bytes | None) -> Row:
        """Write one image: first the encoded file, then its row. Returns the row as written."""
        assert self._generated is not None
        if row.file is not None and image is not None:
            write_atomically(self.folder / row.file, image, force=True)
            row = replace(row, sha256=hashlib.sha256(image).hexdigest(), size=len(image))
        record = row.to_json()
        del record["scores"]
        self._generated.append([record])
        return row

    def add_scores(
        self,
        rows: Iterable[Row],
        scores: Mapping[str, tuple[Mapping[str, float | None], Mapping[str, Any]]],
        metrics: Sequence[str],
    ) -> None:
        """Append scores and errors.

        Args:
            rows: the scored rows.
            scores: by key: (scores by column, errors by metric).
            metrics: names of the metrics that ran.
        """
        assert self._scores is not None
        images = {row.key: row.sha256 for row in rows}
        self._scores.append(
            {
                "key": key,
                "image": images.get(key),
                "scores": {name: finite(value) for name, value in values.items()},
                "errors": errors,
                "metrics": list(metrics),
            }
            for key, (values, errors) in scores.items()
        )

    def take(self, generated: Iterable[Mapping[str, Any]], scores: Iterable[Mapping[str, Any]]) -> None:
        """Append lines of another run unchanged; its files must already be copied."""
        assert self._generated is not None
        assert self._scores is not None
        self._generated.append(generated)
        self._scores.append(scores)

    # ------------------------------------------------------------------------------------------ reading

    def rows(self, *, verify: bool = False) -> dict[str, Row]:
        """Return all rows so far by key, without scores; the last row of a key is used.

        Rows whose image is missing or has another size are left out.

        Args:
            verify: read every image and leave out those whose hash differs, too.
        """
        rows = {}
        for number, record in read_lines(self.folder / "generated.jsonl"):
            try:
                row = Row.from_json(record)
            except ValidationError as error:
                _skipped(self.folder / "generated.jsonl", number, error)
                continue
            rows[row.key] = row
        return {
            key: row
            for key, row in rows.items()
            if row.file is None or _is_intact(self.folder / row.file, row, verify)
        }

    def scores(self) -> dict[str, RowScores]:
        """Return all scores so far by key; later lines update earlier ones."""
        results: dict[str, RowScores] = {}
        for line in score_lines(self.folder):
            scored = results.setdefault(line.key, RowScores())
            if line.image != scored.image:
                # The image was generated again: earlier scores are those of another file.
                scored = results[line.key] = RowScores(image=line.image)
            scored.scores.update(line.scores)
            scored.metrics.update(line.metrics)
            # A metric that ran again replaces its earlier error.
            scored.errors = {name: error for name, error in scored.errors.items() if name not in line.metrics}
            scored.errors.update(line.errors)
        return results

    def score_errors(self) -> dict[str, dict[str, Any]]:
        """Return why scores are missing: {"kind", "message"} by key and metric."""
        return {key: scored.errors for key, scored in self.scores().items() if scored.errors}


class ScoreLine(BaseModel):
    """One line of `scores.jsonl`."""

    model_config = ConfigDict(strict=True)

    key: str
    image: str | None = None
    """Hash of the image that was scored; None in lines of earlier versions."""
    scores: dict[str, float | None] = {}
    errors: dict[str, Any] = {}
    metrics: list[str] = []


@dataclass
class RowScores:
    """All scores and errors of one image."""

    image: str | None = None
    """Hash of the image that was scored; None if unknown."""

    scores: dict[str, float | None] = field(default_factory=dict)
    """By column."""
    errors: dict[str, Any] = field(default_factory=dict)
    """By metric."""
    metrics: set[str] = field(default_factory=set)
    """Names of the metrics that ran."""


def read_info(folder: Path) -> dict[str, Any]:
    """Return the contents of `run.json`.

    Raises:
        UsageError: there is no run, or it has a newer format.
    """
    path = folder / "run.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"no run in {folder}", "the folder of a run contains run.json") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}", "check that the folder is a run") from error
    if not isinstance(info, dict) or not isinstance(info.get("version"), int):
        raise UsageError(f"{path} does not describe a run", "check that the folder is a run")
    if info["version"] > VERSION:
        raise UsageError(f"{folder} was written by a newer version of fastface", "upgrade fastface")
    return info


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line numbers and JSON objects of a log; incomplete or damaged lines are skipped."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                yield number, record


def score_lines(folder: Path) -> Iterator[ScoreLine]:
    """Yield the valid lines of `scores.jsonl`."""
    path = folder / "scores.jsonl"
    for number, record in read_lines(path):
        try:
            yield ScoreLine.model_validate(record)
        except ValidationError as error:
            _skipped(path, number, error)


def _skipped(path: Path, number: int, error: ValidationError) -> None:
    first = error.errors(include_input=False, include_url=False)[0]
    field = ".".join(map(str, first["loc"]))
    log.warning("%s:%d is skipped: %s: %s", path, number, field, first["msg"])


def _is_intact(path: Path, row: Row, verify: bool) -> bool:
    """Whether an image file is the one that its row describes."""
    try:
        if path.stat().st_size != row.size if row.size is not None else path.stat().st_size == 0:
            return False
        if not verify or row.sha256 is None:
            return True
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == row.sha256
    except OSError:
        return False


def compare(known: Any, requested: Any, path: str = "") -> Iterator[str]:
    """Yield each difference between two trees of JSON data as one line."""
    if isinstance(known, dict) and isinstance(requested, dict):
        for name in sorted(known.keys() | requested.keys()):
            place = f"{path}.{name}" if path else name
            if name not in requested:
                yield f"  {place}: {_short(known[name])} before, absent now"
            elif name not in known:
                yield f"  {place}: absent before, {_short(requested[name])} now"
            else:
                yield from compare(known[name], requested[name], place)
    elif isinstance(known, list) and isinstance(requested, list) and known != requested:
        before, now = set(map(json.dumps, known)), set(map(json.dumps, requested))
        removed = [f"{_short(item)} only before" for item in known if json.dumps(item) not in now]
        added = [f"{_short(item)} only now" for item in requested if json.dumps(item) not in before]
        if removed or added:
            yield f"  {path}: " + ", ".join(removed + added)
        else:
            yield f"  {path}: same entries in another order or number"
    elif known != requested:
        yield f"  {path}: {_short(known)} before, {_short(requested)} now"


def _compared(info: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in info.items() if name not in UNCOMPARED}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _has_bytes(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _drop_incomplete_line(path: Path) -> None:
    """Truncate a file after its last complete line."""
    if not _has_bytes(path):
        return
    with path.open("r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            end = content.rfind(b"\n") + 1
        file.truncate(end)


def _locked(folder: Path) -> Any:
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UsageError(
            f"another process is writing to {folder}",
            "wait until it has finished, or choose another folder with -o",
        ) from error
    except OSError as error:
        raise _not_writable(folder, error) from error
    return lock


def _not_writable(folder: Path, error: OSError) -> FastFaceError:
    return FastFaceError(
        f"cannot write into the run {folder}: {error.strerror or error}",
        "its results are in report.html and images.jsonl; to resume it, copy it to a writable folder",
    )
