"""Scoring beside generation: chunks of finished rows go through the metrics on a thread of their own.

Rows are scored in fixed chunks of the run's plan, each as soon as all of it has been made. Matrix products
round differently in batches of other sizes: with fixed chunks the numbers do not depend on who was fast, on
where a run was cut off, or on the engine.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FastFaceError
from ..files import write_atomically
from .maker import error_record
from .rows import Row
from .runs import Run

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from .metrics.base import Metric, Sample

CHUNK = 16
"""Rows that are scored together."""
WAITING = 64
"""Chunks that may wait to be scored before generation waits for scoring."""
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


class Scorer:
    """Scores chunks on a thread; what goes wrong there is raised at the next call.

    Args:
        run: takes scores and vectors.
        metrics: not loaded yet: `load` does it on the thread.
        load: loads the metrics.
        scored: told how many rows have just been scored.
    """

    def __init__(
        self,
        run: Run,
        metrics: Sequence[Metric],
        load: Callable[[], None],
        scored: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._run = run
        self._metrics = metrics
        self._load = load
        self._scored = scored
        self._queue: queue.Queue[list[Row] | None] = queue.Queue(WAITING)
        self._error: BaseException | None = None
        self._stopped = False
        self._photo = lru_cache(32)(_photo)
        self._thread = threading.Thread(target=self._work, name="scoring", daemon=True)
        self._thread.start()

    def put(self, rows: list[Row]) -> None:
        """Have a chunk scored; waits while too many wait already.

        Raises:
            FastFaceError: scoring has failed for good.
        """
        while True:
            self._check()
            try:
                self._queue.put(rows, timeout=0.5)
            except queue.Full:
                continue
            return

    def finish(self) -> None:
        """Wait until everything is scored."""
        while self._thread.is_alive():
            try:
                self._queue.put(None, timeout=0.5)
                break
            except queue.Full:
                continue
        self._thread.join()
        self._check()

    def stop(self) -> None:
        """End after the chunk at hand; what waits stays unscored."""
        self._stopped = True
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._queue.put(None)
                self._thread.join()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            loaded = False
            while (rows := self._queue.get()) is not None:
                if self._stopped:
                    return
                if not loaded:  # models come with the first chunk: a run may have nothing left to score
                    self._load()
                    loaded = True
                self._chunk(rows)
                self._scored(len(rows))
        except BaseException as error:
            self._error = error

    def _chunk(self, rows: Sequence[Row]) -> None:
        from .metrics.base import score_batch

        samples, scores = [], dict[str, tuple[dict[str, float | None], dict[str, Any]]]()
        for row in rows:
            if row.file is None:
                continue
            try:
                samples.append(self._sample(row))
            except FastFaceError as error:
                scores[row.key] = ({}, {READ: error_record(error)})
        found = score_batch(self._metrics, samples) if samples else []
        vectors: dict[str, dict[str, np.ndarray]] = {}
        for sample, one in zip(samples, found, strict=True):
            scores[sample.key] = (one.scores, one.errors)
            for name, vector in one.vectors.items():
                vectors.setdefault(name.partition("/")[0], {})[f"{sample.key}\t{name}"] = vector
        for metric, arrays in vectors.items():
            first = rows[0].key.replace("/", "~")
            _save_vectors(self._run.folder / "vectors" / metric / f"{first}.npz", arrays)
        self._run.add_scores(scores, [metric.name for metric in self._metrics])

    def _sample(self, row: Row) -> Sample:
        from ..photos import read_photo
        from .metrics.base import Sample

        return Sample(
            key=row.key,
            picture=read_photo(self._run.folder / str(row.file)),
            reference=self._photo(self._run.folder, row.reference),
            prompt=row.prompt,
            held_out=self._photo(self._run.folder, row.held_out),
            identity=row.identity,
        )


def _photo(folder: Path, path: str | None) -> Image.Image | None:
    """A photo that was kept in the run; None where there is none that can be read."""
    from ..photos import read_photo

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
