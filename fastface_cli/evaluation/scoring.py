"""Scoring beside generation: chunks of finished rows go through the metrics in a process of its own.

dlib, for one, keeps the interpreter to itself while it looks at a face; on a thread beside it, whoever hands
out jobs and writes rows would stand still.

Rows are scored in fixed chunks of the run's plan, each as soon as all of it has been made. Matrix products
round differently in batches of other sizes: with fixed chunks the numbers do not depend on who was fast, on
where a run was cut off, or on the engine.
"""

from __future__ import annotations

import contextlib
import queue
import threading
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

CHUNK = 16
"""Rows that are scored together."""
WAITING = 64
"""Chunks that may wait to be scored before generation waits for scoring."""
Load: TypeAlias = "Callable[[], Sequence[Metric]]"
"""Makes metrics and loads their models; picklable, for it is called in the scoring process."""
READ = "pictures"
"""In the place of a metric's name: the picture could not be read."""


class Chunks:
    """Collects rows until a chunk of the plan is complete.

    Args:
        info: what `run.json` says: people, prompts and seeds give every row its place.
    """

    def __init__(self, info: Mapping[str, Any]) -> None:
        data = info["dataset"]
        self._people = {name: index for index, name in enumerate(data["identities"])}
        self._prompts = len(data["prompts"])
        self._seeds = int(info["options"]["seeds"])
        self._total = len(self._people) * self._prompts * self._seeds
        self._open: dict[tuple[str, str, int], list[Row]] = {}

    def add(self, row: Row) -> list[Row] | None:
        """Take a row, failed or not; gives the rows of its chunk, in the plan's order, once all are there."""
        chunk = self._place(row) // CHUNK
        name = (row.recipe, row.stress or "", chunk)
        rows = self._open.setdefault(name, [])
        rows.append(row)
        if len(rows) < min(CHUNK, self._total - chunk * CHUNK):
            return None
        del self._open[name]
        return sorted(rows, key=self._place)

    def rest(self) -> list[list[Row]]:
        """What is left of chunks that never became complete (an unfinished run)."""
        return [sorted(rows, key=self._place) for _, rows in sorted(self._open.items())]

    def _place(self, row: Row) -> int:
        """Position of a row among those of its recipe and stress."""
        person = self._people[row.identity]
        return (person * self._prompts + row.prompt_index) * self._seeds + row.seed_index


@dataclass(frozen=True)
class ToScore:
    """A request to the scoring process: rows that have a picture."""

    folder: Path
    """RUN/."""
    rows: tuple[Row, ...]


Judged: TypeAlias = "dict[str, SampleResult] | Broken"
"""Its answer, by key."""


def judging(load: Load) -> Callable[[ToScore], Judged]:
    """What the scoring process does with a chunk; models come with the first one."""
    metrics: Sequence[Metric] | None = None
    photo = lru_cache(32)(_photo)

    def one(chunk: ToScore) -> Judged:
        from ..identity.photos import read_photo
        from .metrics.base import Sample, SampleResult, score_batch

        nonlocal metrics
        judged, samples = dict[str, SampleResult](), []
        try:
            metrics = load() if metrics is None else metrics
            for row in chunk.rows:
                try:
                    picture = read_photo(chunk.folder / str(row.file))
                except FastFaceError as error:
                    judged[row.key] = SampleResult({}, {READ: error_record(error)}, {})
                    continue
                samples.append(
                    Sample(
                        key=row.key,
                        picture=picture,
                        reference=photo(chunk.folder, row.reference),
                        prompt=row.prompt,
                        held_out=photo(chunk.folder, row.held_out),
                        identity=row.identity,
                    )
                )
            found = score_batch(metrics, samples) if samples else []
        except Exception as error:
            return Broken(error_record(error))
        return judged | {sample.key: scored for sample, scored in zip(samples, found, strict=True)}

    return one


class ScoringProcess(Protocol):
    """What answers `ToScore` with `Judged`: an `Answerer`, or a stand-in."""

    def send(self, request: Any) -> None: ...
    def receive(self) -> Any: ...
    def terminate(self) -> None: ...
    def close(self) -> None: ...


class RunScorer:
    """Has chunks scored and keeps what comes of them; what goes wrong is raised at the next call.

    Args:
        run: takes scores and vectors.
        metrics: names of what measures.
        start: starts the judge; called when there is something to score or soon will be.
        scored: told how many rows have just been scored.
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
        self._judge: ScoringProcess | None = None
        self._queue: queue.Queue[list[Row] | None] = queue.Queue(WAITING)
        self._error: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread()

    def begin(self) -> None:
        """Start the judge, if it has not been: models load while the first pictures are being made."""
        if self._judge is None:
            self._judge = self._start()
            self._thread = threading.Thread(
                target=self._work, args=(self._judge,), name="scoring", daemon=True
            )
            self._thread.start()

    def put(self, rows: list[Row]) -> None:
        """Have a chunk scored; waits while too many wait already.

        Raises:
            FastFaceError: scoring has failed for good.
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
        if self._judge is None:
            return
        while self._thread.is_alive():
            try:
                self._queue.put(None, timeout=0.5)
                break
            except queue.Full:
                continue
        self._thread.join()
        self._judge.close()
        self._check()

    def stop(self) -> None:
        """End at once; what is not scored yet stays unscored."""
        if self._judge is None:
            return
        self._stopped = True
        self._judge.terminate()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(None)
            self._thread.join(0.05)
        self._judge.close()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self, judge: ScoringProcess) -> None:
        """The thread that talks to the judge: it mostly waits, and keeps nobody else from working."""
        rows: list[Row] | None = []
        try:
            while rows is not None and not self._stopped:
                judge.send(ToScore(self._run.folder, tuple(row for row in rows if row.file is not None)))
                judged: Judged = judge.receive()
                if isinstance(judged, Broken):
                    raise judged.raised()
                if rows:  # the first chunk is empty: it has the models loaded
                    self._keep(rows, judged)
                    self._scored(len(rows))
                rows = self._queue.get()
        except GoneError as gone:
            if not self._stopped:
                over = f" over the {len(rows)} pictures from {rows[0].key} on" if rows else ""
                self._error = FastFaceError(
                    f"the scoring process has {gone}{over}",
                    "the pictures are kept, and the same command goes on; --metrics takes fewer models",
                )
        except BaseException as error:
            self._error = error

    def _keep(self, rows: Sequence[Row], judged: Mapping[str, SampleResult]) -> None:
        vectors: dict[str, dict[str, np.ndarray]] = {}
        for key, one in judged.items():
            for name, vector in one.vectors.items():
                vectors.setdefault(name.partition("/")[0], {})[f"{key}\t{name}"] = vector
        for metric, arrays in vectors.items():
            first = rows[0].key.replace("/", "~")
            _save_vectors(self._run.folder / "vectors" / metric / f"{first}.npz", arrays)
        scores = {key: (one.scores, one.errors) for key, one in judged.items()}
        self._run.add_scores(scores, self._metrics)


def _photo(folder: Path, path: str | None) -> Image.Image | None:
    """A photo that was kept in the run; None where there is none that can be read."""
    from ..identity.photos import read_photo

    if not path:
        return None
    try:
        return read_photo(folder / path)
    except FastFaceError:
        return None  # said when it was copied; the metrics that need it give no number


def _save_vectors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    import io

    import numpy as np

    data = io.BytesIO()
    np.savez(data, allow_pickle=False, **arrays)
    write_atomically(path, data.getvalue(), force=True)


def load_vectors(folder: Path, metrics: Iterable[str]) -> dict[str, dict[str, np.ndarray]]:
    """What run-wide metrics kept of every row: by key and "METRIC/NAME".

    Args:
        folder: RUN/.
        metrics: names of metrics.
    """
    import numpy as np

    found: dict[str, dict[str, np.ndarray]] = {}
    for metric in metrics:
        for file in sorted((folder / "vectors" / metric).glob("*.npz")):
            with np.load(file, allow_pickle=False) as arrays:
                for entry in arrays.files:
                    key, _, name = entry.partition("\t")
                    found.setdefault(key, {})[name] = arrays[entry]
    return found
