"""What a metric is, and how metrics are found. Nothing heavy is imported here."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

from ...errors import FastFaceError, ModelUnavailableError, UsageError, nearest, unexpected
from ..rows import Row

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

GROUP = "fastface.metrics"
"""Entry point group: NAME = "package.module:Class"."""
Rules: TypeAlias = Literal["fastface", "published"]
"""`published` is METHOD's evaluation protocol to the letter; `fastface` is it without its faults."""
Scores: TypeAlias = dict[str, float | None]
"""By column; None: it could not be measured (no face, no held-out photo)."""
T = TypeVar("T")


@dataclass(frozen=True)
class Column:
    """One number that a metric gives for each picture."""

    name: str
    """Key in scores and summaries: a-z, 0-9 and _; starts with its metric's name in one word."""
    title: str
    """Heading of tables and plots."""
    higher_is_better: bool | None
    """None: neither end is better."""
    unit: str
    """What follows the number: "s", or empty. "share" is a number from 0 to 1 shown as a percentage."""
    description: str
    """One or two sentences for the page's legend."""


@dataclass(frozen=True)
class Needs:
    """What must be there before a metric is loaded."""

    artifacts: tuple[str, ...] = ()
    """Names of the manifest, or `hub:` references; `Context.paths` has them under these names."""
    roles: tuple[str, ...] = ()
    """Parts of the run's recipes, as `face`; `Context.paths` has them under these names."""
    extras: tuple[str, ...] = ()
    """Extras of fastface-cli, as `dlib`."""
    modules: tuple[str, ...] = ()
    """Modules that those extras bring; where one is missing the metric cannot run."""


@dataclass(frozen=True, eq=False)
class Sample:
    """A picture to score. Pictures are upright RGB."""

    key: str
    """The row's."""
    picture: Image.Image
    reference: Image.Image | None
    """The photo that conditioned."""
    prompt: str
    held_out: Image.Image | None = None
    """A photo of the same person that did not condition."""
    identity: str = ""


@dataclass
class Context:
    """What metrics are loaded with; one for all metrics of a process."""

    paths: Mapping[str, Path] = field(default_factory=dict)
    """Where each artifact and role lies that some metric needs."""
    device: str = "cpu"
    """As torch names it."""
    rules: Rules = "fastface"
    shared: dict[str, Any] = field(default_factory=dict)
    """Models that several metrics use."""

    def once(self, name: str, make: Callable[[], T]) -> T:
        """The model of that name, made by the first metric that asks for it."""
        if name not in self.shared:
            self.shared[name] = make()
        found: T = self.shared[name]
        return found


@runtime_checkable
class Metric(Protocol):
    """Made without arguments; then, in the process that scores, `load`, then `score` as often as there are
    batches."""

    name: str
    """As `--metrics` takes it: a-z, 0-9 and -."""
    summary: str
    """One line for lists."""
    columns: tuple[Column, ...]
    """Everything that `score` and, in a `RunMetric`, `finish` can give."""
    needs: Needs

    def load(self, context: Context) -> None:
        """Make the models. May raise any FastFaceError."""
        ...

    def score(self, samples: Sequence[Sample]) -> list[Scores]:
        """One mapping a sample, in order; a column left out is one of `finish`."""
        ...


@runtime_checkable
class RunMetric(Metric, Protocol):
    """A metric with columns that only the whole run decides, as a rank among all identities."""

    def vectors(self, samples: Sequence[Sample]) -> list[dict[str, np.ndarray]]:
        """What `finish` will need of each sample, by name; asked after `score` of the same samples, and
        kept in the run (`vectors/`). What does not exist is left out."""
        ...

    def finish(
        self, rows: Sequence[Row], vectors: Mapping[str, Mapping[str, np.ndarray]]
    ) -> dict[str, Scores]:
        """Scores to add, by key. Called once all rows are scored, in a process that may not have loaded the
        metric.

        Args:
            rows: every row of the run, with what `score` gave.
            vectors: by key; a row without any is left out.
        """
        ...


@dataclass(frozen=True)
class SampleResult:
    """What came of one sample."""

    scores: Scores
    errors: dict[str, dict[str, Any]]
    """By metric: {"kind", "message"}, where it failed on this sample."""
    vectors: dict[str, np.ndarray]
    """By "METRIC/NAME"."""


def score_batch(metrics: Sequence[Metric], samples: Sequence[Sample]) -> list[SampleResult]:
    """Every metric on a batch. Where a metric fails on the batch, each sample is tried alone, and the one
    that cannot be scored records why: it never costs the others theirs."""
    found = [SampleResult({}, {}, {}) for _ in samples]
    for metric in metrics:
        try:
            _score(metric, samples, found)
        except Exception as error:
            if len(samples) == 1:
                _record(metric, error, found[0])
                continue
            for sample, scored in zip(samples, found, strict=True):
                try:
                    _score(metric, [sample], [scored])
                except Exception as alone:
                    _record(metric, alone, scored)
    return found


def _score(metric: Metric, samples: Sequence[Sample], found: Sequence[SampleResult]) -> None:
    given = metric.score(samples)
    vectors: Sequence[Mapping[str, np.ndarray]] = [{} for _ in samples]
    if isinstance(metric, RunMetric):
        vectors = metric.vectors(samples)
    if not len(given) == len(vectors) == len(samples):
        raise FastFaceError(
            f"the metric {metric.name} gave {len(given)} results for {len(samples)} pictures",
            "it must give one for each picture, in order",
        )
    for scored, scores, named in zip(found, given, vectors, strict=True):
        scored.scores.update(scores)
        scored.vectors.update({f"{metric.name}/{name}": vector for name, vector in named.items()})


def _record(metric: Metric, error: Exception, scored: SampleResult) -> None:
    known = error if isinstance(error, FastFaceError) else unexpected(error)
    scored.errors[metric.name] = {"kind": known.kind, "message": known.message}


def finish_run(
    metrics: Sequence[Metric], rows: Sequence[Row], vectors: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, Scores]:
    """What the whole run decides, by key.

    Args:
        rows: every row of the run, scored.
        vectors: by key and "METRIC/NAME", as `SampleResult.vectors`.
    """
    found: dict[str, Scores] = {}
    for metric in metrics:
        if not isinstance(metric, RunMetric):
            continue
        start = f"{metric.name}/"
        own = {
            key: {name[len(start) :]: vector for name, vector in named.items() if name.startswith(start)}
            for key, named in vectors.items()
        }
        for key, scores in metric.finish(rows, {key: named for key, named in own.items() if named}).items():
            found.setdefault(key, {}).update(scores)
    return found


@functools.cache
def registry() -> dict[str, type[Metric]]:
    """Every metric that is installed, by name.

    Raises:
        UsageError: a package's metric does not import, or two share a name.
    """
    found: dict[str, type[Metric]] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        try:
            kind = point.load()
        except Exception as error:
            package = point.dist.name if point.dist else point.value
            raise UsageError(
                f"the metric {point.name} of {package} does not import: {error}",
                f"update or remove {package}",
            ) from error
        if found.setdefault(point.name, kind) is not kind:
            raise UsageError(f"two packages bring a metric called {point.name}", "remove one of them")
    return found


def make_metrics(names: Iterable[str]) -> list[Metric]:
    """Metrics by name, not loaded yet; each once.

    Raises:
        UsageError: there is no such metric, or two give a column of the same name.
        ModelUnavailableError: one needs an extra that is not installed.
    """
    known = registry()
    made: list[Metric] = []
    owners: dict[str, str] = {}
    for name in dict.fromkeys(names):
        if name not in known:
            near = nearest(name, known)
            raise UsageError(
                f"there is no metric called '{name}'",
                f"did you mean '{near}'?" if near else f"metrics are {', '.join(known)}",
            )
        metric = known[name]()
        if missing := missing_modules(metric):
            extras = ",".join(metric.needs.extras)
            raise ModelUnavailableError(
                f"the metric {name} needs {', '.join(missing)}, which is not installed",
                f"pip install 'fastface-cli[{extras}]'" if extras else f"install {', '.join(missing)}",
            )
        for column in metric.columns:
            if owners.setdefault(column.name, name) != name:
                raise UsageError(f"the metrics {owners[column.name]} and {name} both give '{column.name}'")
        made.append(metric)
    return made


def missing_modules(metric: Metric | type[Metric]) -> list[str]:
    """Modules that a metric needs and that are not installed."""
    return [name for name in metric.needs.modules if importlib.util.find_spec(name) is None]


def columns_of(metrics: Iterable[Metric]) -> dict[str, Column]:
    """Every column of some metrics, by name, in order."""
    return {column.name: column for metric in metrics for column in metric.columns}
