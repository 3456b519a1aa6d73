"""A run from plan to numbers: rows are planned, made, scored beside that, and joined."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DeviceError, ModelUnavailableError
from ..files import write_atomically
from .dataset import Dataset
from .engines import Pool, make_all
from .maker import ImageTask, error_record
from .people import People, degraded_path, held_out_path, reference_path
from .processes import Answerer
from .rows import Row, image_seed, row_key
from .runs import Run, read_info, read_lines
from .scoring import CHUNK, Chunks, Load, RunScorer, ScoringProcess, judging, load_vectors

if TYPE_CHECKING:
    from ..recipe.schema import Recipe
    from .metrics.base import Column, Metric


@dataclass(frozen=True)
class EvaluationPlan:
    """What is to be made."""

    recipes: Mapping[str, Recipe]
    """By name, in the order wanted; differences are taken to the first."""
    dataset: Dataset
    seeds: int = 1
    stresses: tuple[str, ...] = ()
    """Besides the photos as they are."""
    shard: tuple[int, int] = (1, 1)
    """Which part of how many, counted from 1."""

    def rows(self) -> Iterator[Row]:
        """Every row of this shard, in the order of making: a recipe's images stand together, because models
        take long to load, and among them a person's."""
        for recipe, stress, chunk in self._chunks():
            for place in chunk:
                yield self._row(recipe, stress, place)

    def count(self) -> int:
        """How many rows this shard has."""
        return sum(len(chunk) for _, _, chunk in self._chunks())

    def _chunks(self) -> Iterator[tuple[str, str | None, range]]:
        """Recipe, stress, and places among the images of both. Shards take whole chunks in turn: what is
        scored together stays together, so that they give the numbers of one run."""
        images = len(self.dataset.subjects) * len(self.dataset.prompts) * self.seeds
        part, parts = self.shard
        groups = itertools.product(self.recipes, (None, *self.stresses), range(0, images, CHUNK))
        for recipe, stress, start in itertools.islice(groups, part - 1, None, parts):
            yield recipe, stress, range(start, min(start + CHUNK, images))

    def _row(self, recipe: str, stress: str | None, place: int) -> Row:
        """The row at a place: people change slowest, seeds fastest."""
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
    made: Callable[[int], None] = lambda _: None
    """Told how many more rows are made (or have failed)."""
    scored: Callable[[int], None] = lambda _: None
    """Told how many more rows are scored."""


@dataclass(frozen=True)
class Scoring:
    """Metrics, and how they get their models."""

    metrics: Sequence[Metric]
    """Not loaded: here they only say what they are, and look at the run as a whole."""
    load: Load

    def judge(self) -> ScoringProcess:
        """Start the process that scores. It comes last: who waits for a score is nobody, but a worker waits
        for its next job, and that for whoever hands it out."""
        return Answerer(functools.partial(judging, self.load), last=True)

    def start(self, run: Run, scored: Callable[[int], None]) -> RunScorer | None:
        """A scorer for a run; None where there is nothing to measure."""
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
    """Make what is not made yet, and score what is not scored yet beside that.

    Args:
        run: open for writing.
        plan: what `run` is of.
        pool: starts the workers; called if anything is left to make.
        people: makes identities.
        scoring: what measures.
        retry_failed: try rows again that have failed before.
        observer: told of progress.

    Raises:
        FastFaceError: no image can be made or scored at all; what was done is kept.
    """
    observer = observer or RunObserver()
    done = {key: row for key, row in run.rows().items() if row.file is not None or not retry_failed}
    scorer = scoring.start(run, observer.scored)
    chunks = _Pending(Chunks(run.info), scorer, _scored_already(run, scoring), observer)
    try:
        for row in done.values():
            chunks.add(row)
        observer.made(len(done))
        known = set(done)
        del done  # a run may have more rows than should lie in memory twice
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


class _Pending:
    """Hands complete chunks to the scorer, unless all of their rows are scored."""

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
        """Have incomplete chunks scored too: this is all there will be."""
        for rows in self._chunks.rest():
            self._put(rows)

    def _put(self, rows: list[Row]) -> None:
        to_score = [row for row in rows if row.file is not None]
        if self._scorer is None:
            return
        if any(row.key not in self._scored for row in to_score):
            self._scorer.put(rows)
        else:
            self._observer.scored(len(rows))


class _Tasks:
    """Jobs for the workers, one by one; a person without a usable face fails here."""

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
            face = str(self._plan.recipes[row.recipe].model.face)
            try:
                identity = self._people.identity(subject, row.stress, face)
            except (ModelUnavailableError, DeviceError):
                raise  # nobody's face could be seen
            except Exception as error:  # whatever a photo brings about costs its own person alone
                self.finished(replace(row, file=None, error=error_record(error)), None)
                continue
            yield ImageTask(row, identity)

    def finished(self, row: Row, picture: bytes | None) -> None:
        """Write a row and its picture, and pass it on to be scored."""
        self._run.add(row, picture)
        self._chunks.add(row)
        self._observer.made(1)


def score(run: Run, scoring: Scoring, observer: RunObserver | None = None, *, again: bool = False) -> None:
    """Score what a run holds and has no scores of these metrics for.

    Args:
        run: open for writing.
        scoring: what measures.
        observer: told of progress.
        again: also what is scored already.
    """
    observer = observer or RunObserver()
    scorer = scoring.start(run, observer.scored)
    if scorer is None:
        return
    known = set() if again else _scored_already(run, scoring)
    chunks = _Pending(Chunks(run.info), scorer, known, observer)
    try:
        for row in run.rows().values():
            chunks.add(row)
        chunks.close()
        scorer.finish()
    except BaseException:
        scorer.stop()
        raise


def _scored_already(run: Run, scoring: Scoring) -> set[str]:
    names = {metric.name for metric in scoring.metrics}
    return {key for key, scored in run.scores().items() if names <= scored.metrics}


def joined(run: Run, metrics: Sequence[Metric]) -> list[Row]:
    """Every row with every score, sorted by key, run-wide columns included."""
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
    """Write what a run ends with: images.jsonl, summary.json, both CSV files and the page.

    Args:
        run: scored.
        metrics: every metric that has scored it.
        columns: of these metrics, in the order of tables.

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
    """The metrics that have scored a run, by name: those it was begun with, then the others as they came."""
    begun = read_info(folder).get("metrics") or []
    lines = read_lines(folder / "scores.jsonl")
    return list(dict.fromkeys([*begun, *(name for line in lines for name in line.get("metrics") or [])]))
