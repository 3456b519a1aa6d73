"""Scoring in parallel with generation: a separate process scores chunks of finished rows.

A thread would not do: dlib, for example, holds the interpreter lock while it processes a face, which would
block the thread that assigns tasks and writes rows.

Rows are scored in fixed chunks of the plan, each as soon as all of its images are generated. Matrix products
round differently in batches of different sizes: with fixed chunks the scores do not depend on worker speed,
on interruptions, or on the engine.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import queue
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from ..errors import FastFaceError
from ..files import write_atomically
from .maker import error_record
from .processes import Broken, GoneError
from .rows import Row
from .runs import Run

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from .metrics.base import Metric, SampleResult

log = logging.getLogger(__name__)

CHUNK = 16
"""Number of rows that are scored together."""
WAITING = 64
"""Number of queued chunks at which generation waits for scoring."""
Load: TypeAlias = "Callable[[], Sequence[Metric]]"
"""Creates metrics and loads their models; picklable, because the scoring process calls it."""
READ = "pictures"
"""Key of the error of an image that cannot be read, instead of a metric name."""


class Chunks:
    """Collect rows until a chunk of the plan is complete.

    Args:
        info: contents of `run.json`; people, prompts and seeds define the place of a row.
    """

    def __init__(self, info: Mapping[str, Any]) -> None:
        data = info["dataset"]
        self._people = {name: index for index, name in enumerate(data["identities"])}
        self._prompts = len(data["prompts"])
        self._seeds = int(info["options"]["seeds"])
        self._total = len(self._people) * self._prompts * self._seeds
        self._open: dict[tuple[str, str, int], list[Row]] = {}

    def add(self, row: Row) -> list[Row] | None:
        """Add a row, also a failed one; return the rows of its chunk in plan order once it is complete."""
        chunk = self._place(row) // CHUNK
        name = (row.recipe, row.stress or "", chunk)
        rows = self._open.setdefault(name, [])
        rows.append(row)
        if len(rows) < min(CHUNK, self._total - chunk * CHUNK):
            return None
        del self._open[name]
        return sorted(rows, key=self._place)

    def rest(self) -> list[list[Row]]:
        """Return the incomplete chunks of an unfinished run."""
        return [sorted(rows, key=self._place) for _, rows in sorted(self._open.items())]

    def _place(self, row: Row) -> int:
        """Return the position of a row within its recipe and stress."""
        person = self._people[row.identity]
        return (person * self._prompts + row.prompt_index) * self._seeds + row.seed_index


@dataclass(frozen=True)
class ToScore:
    """A request to the scoring process: rows with an image."""

    folder: Path
    """RUN/."""
    rows: tuple[Row, ...]


Judged: TypeAlias = "dict[str, SampleResult] | Broken"
"""The answer of the scoring process, by key."""


def judging(load: Load) -> Callable[[ToScore], Judged]:
    """Return the function that scores a chunk; its first call loads the models."""
    metrics: Sequence[Metric] | None = None
    photo = lru_cache(32)(_photo)

    def answer(chunk: ToScore) -> Judged:
        from .metrics.base import Sample, SampleResult, score_batch

        nonlocal metrics
        results, samples = dict[str, SampleResult](), []
        try:
            metrics = load() if metrics is None else metrics
            for row in chunk.rows:
                try:
                    image = _image(chunk.folder, row)
                except FastFaceError as error:
                    results[row.key] = SampleResult({}, {READ: error_record(error)}, {})
                    continue
                samples.append(
                    Sample(
                        key=row.key,
                        image=image,
                        reference=photo(chunk.folder, row.reference),
                        prompt=row.prompt,
                        held_out=photo(chunk.folder, row.held_out),
                        identity=row.identity,
                    )
                )
            scored = score_batch(metrics, samples) if samples else []
        except Exception as error:
            return Broken(error_record(error))
        return results | {sample.key: result for sample, result in zip(samples, scored, strict=True)}

    return answer


class ScoringProcess(Protocol):
    """Answers `ToScore` with `Judged`: an `Answerer`, or a replacement in tests."""

    def send(self, request: Any) -> None: ...
    def receive(self) -> Any: ...
    def terminate(self) -> None: ...
    def close(self) -> None: ...


class RunScorer:
    """Send chunks to the scoring process and store the results; errors are raised at the next call.

    Args:
        run: receives scores and vectors.
        metrics: names of the metrics.
        start: starts the scoring process; called when it is needed.
        scored: called with the number of newly scored rows.
    """

    def __init__(
        self,
        run: Run,
        metrics: Sequence[str],
        start: Callable[[], ScoringProcess],
        scored: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._run = run
        self._metrics = metrics
        self._start = start
        self._scored = scored
        self._process: ScoringProcess | None = None
        self._queue: queue.Queue[list[Row] | None] = queue.Queue(WAITING)
        self._error: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread()

    def begin(self) -> None:
        """Start the scoring process unless it is running: models load while the first images are
        generated."""
        if self._process is None:
            self._process = self._start()
            self._thread = threading.Thread(
                target=self._work, args=(self._process,), name="scoring", daemon=True
            )
            self._thread.start()

    def put(self, rows: list[Row]) -> None:
        """Queue a chunk; blocks while the queue is full.

        Raises:
            FastFaceError: scoring has failed.
        """
        self.begin()
        while True:
            self._check()
            try:
                self._queue.put(rows, timeout=0.5)
            except queue.Full:
                continue
            return

    def finish(self) -> None:
        """Wait until everything is scored."""
        if self._process is None:
            return
        while self._thread.is_alive():
            try:
                self._queue.put(None, timeout=0.5)
                break
            except queue.Full:
                continue
        self._thread.join()
        self._process.close()
        self._check()

    def stop(self) -> None:
        """Stop immediately; remaining rows stay unscored."""
        if self._process is None:
            return
        self._stopped = True
        self._process.terminate()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(None)
            self._thread.join(0.05)
        self._process.close()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self, process: ScoringProcess) -> None:
        """Run the thread that talks to the scoring process; it mostly waits."""
        rows: list[Row] | None = []
        try:
            while rows is not None and not self._stopped:
                process.send(ToScore(self._run.folder, tuple(row for row in rows if row.file is not None)))
                results: Judged = process.receive()
                if isinstance(results, Broken):
                    raise results.raised()
                if rows:  # the first chunk is empty: it only loads the models
                    self._keep(rows, results)
                    self._scored(len(rows))
                rows = self._queue.get()
        except GoneError as gone:
            if not self._stopped:
                where = f" at the {len(rows)} images from {rows[0].key} on" if rows else ""
                self._error = FastFaceError(
                    f"the scoring process has {gone}{where}",
                    "images are kept: run the same command again to resume, or use fewer --metrics",
                )
        except BaseException as error:
            self._error = error

    def _keep(self, rows: Sequence[Row], results: Mapping[str, SampleResult]) -> None:
        vectors: dict[str, dict[str, np.ndarray]] = {}
        for key, result in results.items():
            for name, vector in result.vectors.items():
                vectors.setdefault(name.partition("/")[0], {})[f"{key}\t{name}"] = vector
        for metric, arrays in vectors.items():
            first = next(row.key for row in rows if row.key in results).replace("/", "~")
            _save_vectors(self._run.folder / "vectors" / metric / f"{first}.npz", arrays)
        scores = {key: (result.scores, result.errors) for key, result in results.items()}
        self._run.add_scores(rows, scores, self._metrics)


def _image(folder: Path, row: Row) -> Image.Image:
    """Return the image of a row.

    Raises:
        FastFaceError: it cannot be read, or is not the file that was written.
    """
    from ..identity.photos import read_photo

    path = folder / str(row.file)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FastFaceError(f"cannot read {path}: {error.strerror}") from error
    if row.sha256 is not None and hashlib.sha256(data).hexdigest() != row.sha256:
        raise FastFaceError(f"{path} changed after it was written", "run the same command again")
    return read_photo(data)


def _photo(folder: Path, path: str | None) -> Image.Image | None:
    """Return a photo of the run; None if it is missing or cannot be read."""
    from ..identity.photos import read_photo

    if not path:
        return None
    try:
        return read_photo(folder / path)
    except FastFaceError:
        return None  # already reported when it was copied; metrics that need it have no value


def _save_vectors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    import io

    import numpy as np

    data = io.BytesIO()
    np.savez(data, allow_pickle=False, **arrays)
    write_atomically(path, data.getvalue(), force=True)


def load_vectors(folder: Path, metrics: Iterable[str]) -> dict[str, dict[str, np.ndarray]]:
    """Return the vectors of run-wide metrics by key and "METRIC/NAME".

    Args:
        folder: RUN/.
        metrics: names of metrics.
    """

    vectors: dict[str, dict[str, np.ndarray]] = {}
    for metric in metrics:
        for file in sorted((folder / "vectors" / metric).glob("*.npz")):
            for entry, array in (_read_vectors(file) or {}).items():
                key, _, name = entry.partition("\t")
                vectors.setdefault(key, {})[name] = array
    return vectors


def remove_damaged_vectors(folder: Path) -> set[str]:
    """Remove vector files that cannot be read, and return their names: the first keys of their chunks."""
    damaged = set()
    for file in sorted((folder / "vectors").glob("*/*.npz")):
        if _read_vectors(file) is None:
            log.warning("%s is damaged: its images are scored again", file)
            file.unlink()
            damaged.add(file.stem)
    return damaged


def _read_vectors(file: Path) -> dict[str, np.ndarray] | None:
    """Return the arrays of a file; None if it is damaged."""
    import zipfile

    import numpy as np

    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
        return None
