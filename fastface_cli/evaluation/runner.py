"""Run an evaluation: plan rows, generate and score them in parallel, and write the results."""

from __future__ import annotations

import functools
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FastFaceError, NoFaceError, UsageError
from ..files import write_atomically
from .dataset import Dataset
from .engines import Pool, make_all
from .maker import ImageTask, error_record
from .people import People, degraded_path, held_out_path, identity_key, reference_path
from .processes import Answerer
from .rows import Row, image_seed, row_key
from .runs import Run, read_info, score_lines
from .scoring import (
    CHUNK,
    READ,
    Chunks,
    Load,
    RunScorer,
    ScoringProcess,
    judging,
    load_vectors,
    remove_damaged_vectors,
)

if TYPE_CHECKING:
    from ..recipe.schema import Recipe
    from .metrics.base import Column, Metric

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationPlan:
    """What to generate."""

    recipes: Mapping[str, Recipe]
    """By name, in display order; the first one is the baseline."""
    dataset: Dataset
    seeds: int = 1
    stresses: tuple[str, ...] = ()
    """Degradations to use besides the original photos."""
    shard: tuple[int, int] = (1, 1)
    """(part, parts), counted from 1."""

    def rows(self) -> Iterator[Row]:
        """Yield every row of this shard in generation order: by recipe, because models load slowly, then by
        person."""
        for recipe, stress, chunk in self._chunks():
            for place in chunk:
                yield self._row(recipe, stress, place)

    def count(self) -> int:
        """Return the number of rows of this shard."""
        return sum(len(chunk) for _, _, chunk in self._chunks())

    def _chunks(self) -> Iterator[tuple[str, str | None, range]]:
        """Yield recipe, stress and a range of places. Shards take complete chunks in turn: chunks are scored
        together, so that merged shards have the scores of one run."""
        images = len(self.dataset.subjects) * len(self.dataset.prompts) * self.seeds
        part, parts = self.shard
        groups = itertools.product(self.recipes, (None, *self.stresses), range(0, images, CHUNK))
        for recipe, stress, start in itertools.islice(groups, part - 1, None, parts):
            yield recipe, stress, range(start, min(start + CHUNK, images))

    def _row(self, recipe: str, stress: str | None, place: int) -> Row:
        """Return the row at a place: people change slowest, seeds fastest."""
        place, seed_index = divmod(place, self.seeds)
        person, prompt_index = divmod(place, len(self.dataset.prompts))
        subject, prompt = self.dataset.subjects[person], self.dataset.prompts[prompt_index]
        key = row_key(recipe, subject.name, prompt_index, seed_index, stress)
        return Row(
            key=key,
            recipe=recipe,
            identity=subject.name,
            prompt=prompt,
            prompt_index=prompt_index,
            seed_index=seed_index,
            seed=image_seed(subject.name, prompt, seed_index),
            stress=stress,
            attributes=dict(subject.attributes),
            reference=reference_path(subject),
            degraded=None if stress is None else degraded_path(subject, stress),
            held_out=held_out_path(subject),
            file=f"images/{key}.png",
        )


@dataclass
class RunObserver:
    """Callbacks that report the progress of a run."""

    log: Callable[[str], None] = lambda _: None
    generated: Callable[[int], None] = lambda _: None
    """Called with the number of newly generated (or failed) rows."""
    scored: Callable[[int], None] = lambda _: None
    """Called with the number of newly scored rows."""


@dataclass(frozen=True)
class Scoring:
    """Metrics, and how to load them."""

    metrics: Sequence[Metric]
    """Not loaded: only used for their names, columns and run-wide scores."""
    load: Load

    def judge(self) -> ScoringProcess:
        """Start the scoring process at low priority: nothing waits for scores, but workers wait for this
        process to assign tasks."""
        return Answerer(functools.partial(judging, self.load), last=True)

    def start(self, run: Run, scored: Callable[[int], None]) -> RunScorer | None:
        """Return a scorer for a run; None without metrics."""
        names = [metric.name for metric in self.metrics]
        return RunScorer(run, names, self.judge, scored) if names else None


def generate(
    run: Run,
    plan: EvaluationPlan,
    pool: Callable[[], Pool],
    people: People,
    scoring: Scoring,
    *,
    retry_failed: bool = False,
    observer: RunObserver | None = None,
) -> None:
    """Generate the missing images, and score missing rows in parallel.

    Args:
        run: open for writing.
        plan: the plan of `run`.
        pool: starts the workers; only called if images are missing.
        people: computes identities.
        scoring: metrics.
        retry_failed: retry failed rows.
        observer: receives progress.

    Raises:
        FastFaceError: no image can be generated or scored at all; finished rows are kept.
    """
    observer = observer or RunObserver()
    rows = run.rows(verify=True)
    done = {key: row for key, row in rows.items() if row.file is not None or not retry_failed}
    scorer = scoring.start(run, observer.scored)
    chunks = _Pending(Chunks(run.info), scorer, _scored_already(run, scoring, rows), observer)
    del rows
    try:
        for row in done.values():
            chunks.add(row)
        observer.generated(len(done))
        known = set(done)
        del done  # large runs: do not keep the rows in memory twice
        left = (row for row in plan.rows() if row.key not in known)
        if (first := next(left, None)) is not None:
            if scorer is not None:
                scorer.begin()
            tasks = _Tasks(run, plan, people, chunks, observer, itertools.chain([first], left))
            for outcome in make_all(pool(), tasks, observer.log):
                tasks.finished(outcome.row, outcome.image)
        chunks.close()
        if scorer is not None:
            scorer.finish()
    except BaseException:
        if scorer is not None:
            scorer.stop()
        raise
    missing = plan.count() - len(run.rows().keys() & {row.key for row in plan.rows()})
    if missing:
        raise FastFaceError(
            f"{missing} of {plan.count()} images are missing from {run.folder}, which changed during the run",
            "run the same command again to generate them",
        )


class _Pending:
    """Pass complete chunks to the scorer, unless all of their rows are scored."""

    def __init__(
        self, chunks: Chunks, scorer: RunScorer | None, scored: set[str], observer: RunObserver
    ) -> None:
        self._observer = observer
        self._chunks = chunks
        self._scorer = scorer
        self._scored = scored

    def add(self, row: Row) -> None:
        rows = self._chunks.add(row)
        if rows is not None:
            self._put(rows)

    def close(self) -> None:
        """Score incomplete chunks too, because no more rows will follow."""
        for rows in self._chunks.rest():
            self._put(rows)

    def _put(self, rows: list[Row]) -> None:
        if self._scorer is None:
            return
        if any(row.key not in self._scored for row in rows if row.file is not None):
            self._scorer.put(rows)
        else:
            self._observer.scored(len(rows))


class _Tasks:
    """Tasks for the workers; rows of a person without a usable face fail here."""

    def __init__(
        self,
        run: Run,
        plan: EvaluationPlan,
        people: People,
        chunks: _Pending,
        observer: RunObserver,
        rows: Iterable[Row],
    ) -> None:
        self._run = run
        self._plan = plan
        self._people = people
        self._chunks = chunks
        self._observer = observer
        self._rows = rows
        self._subjects = {subject.name: subject for subject in plan.dataset.subjects}
        self._kept: set[str] = set()

    def __iter__(self) -> Iterator[ImageTask]:
        for row in self._rows:
            subject = self._subjects[row.identity]
            if row.identity not in self._kept:
                self._people.keep_photos(subject)
                self._kept.add(row.identity)
            face = identity_key(self._plan.recipes[row.recipe])
            try:
                identity = self._people.identity(subject, row.stress, face)
            except (NoFaceError, UsageError) as error:
                self._fail(row, error)
                continue
            except (FastFaceError, OSError, MemoryError):
                raise  # not the fault of a photo: the models, a full disk
            except Exception as error:  # a photo that breaks the detector only fails its own person
                self._fail(row, error)
                continue
            yield ImageTask(row, identity)

    def _fail(self, row: Row, error: Exception) -> None:
        self.finished(replace(row, file=None, error=error_record(error)), None)

    def finished(self, row: Row, image: bytes | None) -> None:
        """Write a row and its image, and pass the row on to scoring."""
        self._chunks.add(self._run.add(row, image))
        self._observer.generated(1)


def score(run: Run, scoring: Scoring, observer: RunObserver | None = None, *, again: bool = False) -> None:
    """Score the rows of a run that have no scores of these metrics.

    Args:
        run: open for writing.
        scoring: metrics.
        observer: receives progress.
        again: score all rows again.
    """
    observer = observer or RunObserver()
    scorer = scoring.start(run, observer.scored)
    if scorer is None:
        return
    rows = run.rows(verify=True)
    if damaged := len(run.rows()) - len(rows):
        log.warning("%d images changed after they were generated; `fastface eval` makes them again", damaged)
    known = set() if again else _scored_already(run, scoring, rows)
    chunks = _Pending(Chunks(run.info), scorer, known, observer)
    try:
        for row in rows.values():
            chunks.add(row)
        chunks.close()
        scorer.finish()
    except BaseException:
        scorer.stop()
        raise


def _scored_already(run: Run, scoring: Scoring, rows: Mapping[str, Row]) -> set[str]:
    """Return the keys of rows whose present image has all scores."""
    names = {metric.name for metric in scoring.metrics}
    damaged = remove_damaged_vectors(run.folder)
    return {
        key
        for key, scored in run.scores().items()
        if key in rows
        and names <= scored.metrics
        and scored.image in (None, rows[key].sha256)
        and READ not in scored.errors
        and not (damaged and _is_first(key, damaged))
    }


def _is_first(key: str, chunks: set[str]) -> bool:
    return key.replace("/", "~") in chunks


def joined(run: Run, metrics: Sequence[Metric]) -> list[Row]:
    """Return every row with all scores, sorted by key, including run-wide columns."""
    from .metrics.base import finish_run

    scores = run.scores()
    rows = [
        replace(row, scores=dict(scores[key].scores) if key in scores and row.file is not None else {})
        for key, row in sorted(run.rows().items())
    ]
    vectors = load_vectors(run.folder, [metric.name for metric in metrics])
    more = finish_run(metrics, rows, vectors)
    return [replace(row, scores={**row.scores, **more.get(row.key, {})}) for row in rows]


def finish(run: Run, metrics: Sequence[Metric], columns: Mapping[str, Column]) -> dict[str, Any]:
    """Write the results of a run: images.jsonl, summary.json, both CSV files and the report page.

    Args:
        run: a scored run.
        metrics: all metrics that scored it.
        columns: columns of these metrics, in display order.

    Returns:
        The summary.
    """
    from .report import write_report
    from .summary import images_csv, summarize, summary_csv

    rows = joined(run, metrics)
    summary = summarize(rows, columns, recipes=list(run.info["recipes"]))
    lines = "".join(json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows)
    for name, text in (
        ("images.jsonl", lines),
        ("summary.json", json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n"),
        ("summary.csv", summary_csv(summary)),
        ("images.csv", images_csv(rows, summary["columns"])),
    ):
        write_atomically(run.folder / name, text.encode("utf-8", "replace"), force=True)
    write_report(run.folder)
    return summary


def metrics_of(folder: Path) -> list[str]:
    """Return the names of all metrics of a run: the initial ones, then later ones in order."""
    initial = read_info(folder).get("metrics") or []
    return list(dict.fromkeys([*initial, *(name for line in score_lines(folder) for name in line.metrics)]))
