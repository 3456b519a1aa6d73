"""The folder of a run: what it is of, and what has been made and scored so far.

    run.json         what is run; written once, and compared with whatever comes to this folder later
    generated.jsonl  one row an image, appended when its picture is in place
    scores.jsonl     {"key", "scores", "errors", "metrics"}, appended a chunk at a time; later lines add to
                     earlier ones
    vectors/         what run-wide metrics keep of every image
    references/      the photos as they were used
    identities/      the people as `--identity` takes them
    images/          RECIPE/IDENTITY/PROMPT-SEED.png

One process writes; `Run.open` holds a lock. A line goes out in one call and to the disk at least every
`SYNC` seconds, so that a killed process loses the image it was making, and a power cut the last moments. A
torn line, or a row whose picture is not there, counts as never written.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import FastFaceError, UsageError
from ..files import check_target, write_atomically
from .rows import Row, finite

VERSION = 1
"""Of the files in a run's folder."""
SYNC = 2.0
"""Seconds between two waits for the disk."""
UNCOMPARED = ("hardware", "metrics", "started")
"""What may differ when a run is taken up again: it changes no picture."""


class RowLog:
    """An append-only file of JSON lines that survives being cut off anywhere."""

    def __init__(self, path: Path) -> None:
        self.path = path
        _drop_torn_line(path)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  closed by `close`
        self._synced = time.monotonic()

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write lines, all in one call.

        Raises:
            FastFaceError: the disk refuses.
        """
        data = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
        try:
            left = memoryview(data.encode("utf-8", "replace"))
            while left:  # a disk that is nearly full takes a part, and says so by a number alone
                left = left[self._file.write(left) :]
            if time.monotonic() - self._synced > SYNC:
                self._sync()
        except OSError as error:
            raise FastFaceError(
                f"cannot write {self.path}: {error.strerror}", "make room; the same command goes on from here"
            ) from error

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Wait for the disk and let go."""
        self._sync()
        self._file.close()


class Run:
    """A run's folder. As a context manager it closes its files and its lock.

    Args:
        folder: RUN/.
        info: what `run.json` says.
        writable: whether to lock it and open its logs.
    """

    def __init__(self, folder: Path, info: Mapping[str, Any], *, writable: bool) -> None:
        self.folder = folder
        self.info = info
        self._lock = _locked(folder) if writable else None
        self._generated = RowLog(folder / "generated.jsonl") if writable else None
        self._scores = RowLog(folder / "scores.jsonl") if writable else None

    @classmethod
    def open(cls, folder: Path, info: Mapping[str, Any]) -> Run:
        """Begin a run in a new or empty folder, or go on with the one that is there.

        Args:
            folder: RUN/.
            info: recipes, dataset, options, versions, hardware.

        Raises:
            UsageError: the folder holds something else, or a run of other inputs; another process writes it.
        """
        path = folder / "run.json"
        wanted = json.loads(json.dumps({"version": VERSION, **info}))
        if path.is_file():
            known = read_info(folder)
            differences = list(compare(_compared(known), _compared(wanted)))
            if differences:
                raise UsageError(
                    f"{folder} holds a run of other inputs:\n" + "\n".join(differences[:10]),
                    "give another folder with -o, or the inputs of that run",
                )
            return cls(folder, known, writable=True)
        # Hidden files may be left of a start that was cut off: the lock, a run.json that was half written.
        if folder.is_dir() and any(not child.name.startswith(".") for child in folder.iterdir()):
            raise UsageError(f"{folder} is not empty, and not a run", "give a new folder with -o")
        run_json = json.dumps(wanted, indent=1, ensure_ascii=False).encode()
        check_target(path, force=False)
        write_atomically(path, run_json, force=False)
        return cls(folder, wanted, writable=True)

    @classmethod
    def reopen(cls, folder: Path, *, writable: bool = True) -> Run:
        """A run that is there, whatever its inputs.

        Raises:
            UsageError: there is none.
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

    def add(self, row: Row, picture: bytes | None) -> None:
        """One image: first its picture (an encoded file), then its row."""
        assert self._generated is not None
        if row.file is not None and picture is not None:
            write_atomically(self.folder / row.file, picture, force=True)
        record = row.to_json()
        del record["scores"]
        self._generated.append([record])

    def add_scores(
        self,
        scores: Mapping[str, tuple[Mapping[str, float | None], Mapping[str, Any]]],
        metrics: Sequence[str],
    ) -> None:
        """Scores, and why some are missing, by key.

        Args:
            scores: by key: numbers by column, errors by metric.
            metrics: which were asked.
        """
        assert self._scores is not None
        self._scores.append(
            {
                "key": key,
                "scores": {name: finite(value) for name, value in values.items()},
                "errors": errors,
                "metrics": list(metrics),
            }
            for key, (values, errors) in scores.items()
        )

    def take(self, generated: Iterable[Mapping[str, Any]], scores: Iterable[Mapping[str, Any]]) -> None:
        """Lines of another run's logs, as they are; its files must be in place."""
        assert self._generated is not None
        assert self._scores is not None
        self._generated.append(generated)
        self._scores.append(scores)

    # ------------------------------------------------------------------------------------------ reading

    def rows(self) -> dict[str, Row]:
        """Every row so far, by key, without scores; the last of several counts."""
        found = {}
        for record in read_lines(self.folder / "generated.jsonl"):
            try:
                row = Row.from_json(record)
            except TypeError:
                continue  # not a row: like a torn line, it was never written
            if row.file is None or _has_bytes(self.folder / row.file):
                found[row.key] = row
            else:
                found.pop(row.key, None)
        return found

    def scores(self) -> dict[str, RowScores]:
        """Every score so far, by key; later lines add to earlier ones."""
        found: dict[str, RowScores] = {}
        for record in read_lines(self.folder / "scores.jsonl"):
            key = record.get("key")
            if not isinstance(key, str):
                continue
            scored = found.setdefault(key, RowScores())
            scored.scores.update(record.get("scores") or {})
            asked = record.get("metrics") or []
            scored.metrics.update(asked)
            # Asked again, a metric's earlier failure no longer counts.
            scored.errors = {name: one for name, one in scored.errors.items() if name not in asked}
            scored.errors.update(record.get("errors") or {})
        return found

    def score_errors(self) -> dict[str, dict[str, Any]]:
        """Why scores are missing: {"kind", "message"} by key and metric."""
        return {key: scored.errors for key, scored in self.scores().items() if scored.errors}


@dataclass
class RowScores:
    """What scoring has given for one image."""

    scores: dict[str, float | None] = field(default_factory=dict)
    """By column."""
    errors: dict[str, Any] = field(default_factory=dict)
    """By metric."""
    metrics: set[str] = field(default_factory=set)
    """Those that were asked."""


def read_info(folder: Path) -> dict[str, Any]:
    """What `run.json` says.

    Raises:
        UsageError: there is no run, or one of a later version.
    """
    path = folder / "run.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"there is no run in {folder}", "a run's folder holds run.json") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}", "is it a run's folder?") from error
    if not isinstance(info, dict) or not isinstance(info.get("version"), int):
        raise UsageError(f"{path} is not of a run", "is it a run's folder?")
    if info["version"] > VERSION:
        raise UsageError(f"{folder} was written by a newer fastface", "upgrade fastface")
    return info


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a log; what is none (a torn line, a block of zeros) is passed over."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def compare(known: Any, wanted: Any, path: str = "") -> Iterator[str]:
    """Each difference between two trees of plain data, one line."""
    if isinstance(known, dict) and isinstance(wanted, dict):
        for name in sorted(known.keys() | wanted.keys()):
            place = f"{path}.{name}" if path else name
            if name not in wanted:
                yield f"  {place}: {_short(known[name])} then, not there now"
            elif name not in known:
                yield f"  {place}: not there then, {_short(wanted[name])} now"
            else:
                yield from compare(known[name], wanted[name], place)
    elif isinstance(known, list) and isinstance(wanted, list) and known != wanted:
        gone, new = [[one for one in a if one not in b] for a, b in ((known, wanted), (wanted, known))]
        if gone or new:
            yield f"  {path}: " + ", ".join(
                f"{_short(one)} {when}"
                for some, when in ((gone, "then alone"), (new, "now alone"))
                for one in some
            )
        else:
            yield f"  {path}: the same in another order, or another number of times"
    elif known != wanted:
        yield f"  {path}: {_short(known)} then, {_short(wanted)} now"


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


def _drop_torn_line(path: Path) -> None:
    """Cut a file after its last line end."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        end = size
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)


def _locked(folder: Path) -> Any:
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UsageError(
            f"another process is writing to {folder}", "wait for it, or give another folder with -o"
        ) from error
    return lock
