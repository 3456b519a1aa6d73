"""The metric interface and registry. Imports nothing heavy."""

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
"""`published` is the exact evaluation protocol of the paper; `fastface` is the same without its known
bugs."""
Scores: TypeAlias = dict[str, float | None]
"""By column; None if there is no value (no face, no held-out photo)."""
T = TypeVar("T")


@dataclass(frozen=True)
class Column:
    """One number that a metric computes for each image."""

    name: str
    """Key in scores and summaries: a-z, 0-9 and _; starts with its metric's name in one word."""
    title: str
    """Heading of tables and plots."""
    higher_is_better: bool | None
    """None if neither direction is better."""
    unit: str
    """Unit after the number: "s", or empty. "share" is a number from 0 to 1 shown as a percentage."""
    description: str
    """One or two sentences for the legend of the report page."""


@dataclass(frozen=True)
class Needs:
    """Requirements of a metric."""

    artifacts: tuple[str, ...] = ()
    """Manifest names or `hub:` references; keys of `Context.paths`."""
    roles: tuple[str, ...] = ()
    """Model roles of the recipes, such as `face`; keys of `Context.paths`."""
    recognizer: bool = False
    """The role `face` must contain a recognizer, not only a detector."""
    extras: tuple[str, ...] = ()
    """Extras of fastface-cli, such as `dlib`."""
    modules: tuple[str, ...] = ()
    """Python modules of these extras; the metric is unavailable if one is missing."""


@dataclass(frozen=True, eq=False)
class Sample:
    """An image to score. All images are upright RGB."""

    key: str
    """Key of the row."""
    image: Image.Image
    reference: Image.Image | None
    """The photo that conditioned generation."""
    prompt: str
    held_out: Image.Image | None = None
    """A photo of the same person that did not condition generation."""
    identity: str = ""


@dataclass
class Context:
    """What metrics are loaded with; shared by all metrics of a process."""

    paths: Mapping[str, Path] = field(default_factory=dict)
    """Path of each required artifact and role."""
    device: str = "cpu"
    """Torch device name."""
    rules: Rules = "fastface"
    shared: dict[str, Any] = field(default_factory=dict)
    """Models that several metrics share."""

    def once(self, name: str, make: Callable[[], T]) -> T:
        """Return the shared model of that name; the first call creates it."""
        if name not in self.shared:
            self.shared[name] = make()
        model: T = self.shared[name]
        return model


@runtime_checkable
class Metric(Protocol):
    """A metric. The scoring process creates it without arguments, calls `load` once and `score` per batch."""

    name: str
    """Name for `--metrics`: a-z, 0-9 and -."""
    summary: str
    """One line for lists."""
    columns: tuple[Column, ...]
    """All columns that `score` and, in a `RunMetric`, `finish` can return."""
    needs: Needs

    def load(self, context: Context) -> None:
        """Load the models. May raise any FastFaceError."""
        ...

    def score(self, samples: Sequence[Sample]) -> list[Scores]:
        """Return one mapping per sample, in order; columns of `finish` are omitted."""
        ...


@runtime_checkable
class RunMetric(Metric, Protocol):
    """A metric with columns that depend on the entire run, such as a rank among all identities."""

    def vectors(self, samples: Sequence[Sample]) -> list[dict[str, np.ndarray]]:
        """Return what `finish` needs of each sample, by name. Called after `score` with the same samples, and
        stored in the run (`vectors/`). Missing vectors are omitted."""
        ...

    def finish(
        self, rows: Sequence[Row], vectors: Mapping[str, Mapping[str, np.ndarray]]
    ) -> dict[str, Scores]:
        """Return additional scores by key. Called after all rows are scored, possibly without `load`.

        Args:
            rows: every row of the run, with the results of `score`.
            vectors: by key; rows without vectors are omitted.
        """
        ...


@dataclass(frozen=True)
class SampleResult:
    """Scores, errors and vectors of one sample."""

    scores: Scores
    errors: dict[str, dict[str, Any]]
    """By metric: {"kind", "message"} if it failed on this sample."""
    vectors: dict[str, np.ndarray]
    """By "METRIC/NAME"."""


def score_batch(metrics: Sequence[Metric], samples: Sequence[Sample]) -> list[SampleResult]:
    """Run all metrics on a batch. If a metric fails, its samples are scored one by one, so that an error only
    affects its own sample."""
    results = [SampleResult({}, {}, {}) for _ in samples]
    for metric in metrics:
        try:
            _score(metric, samples, results)
        except Exception as error:
            if len(samples) == 1:
                _record(metric, error, results[0])
                continue
            for sample, scored in zip(samples, results, strict=True):
                try:
                    _score(metric, [sample], [scored])
                except Exception as alone:
                    _record(metric, alone, scored)
    return results


def _score(metric: Metric, samples: Sequence[Sample], results: Sequence[SampleResult]) -> None:
    given = metric.score(samples)
    vectors: Sequence[Mapping[str, np.ndarray]] = [{} for _ in samples]
    if isinstance(metric, RunMetric):
        vectors = metric.vectors(samples)
    if not len(given) == len(vectors) == len(samples):
        raise FastFaceError(
            f"the metric {metric.name} returned {len(given)} results for {len(samples)} images",
            "a metric must return one result per image, in order",
        )
    for scored, scores, named in zip(results, given, vectors, strict=True):
        scored.scores.update(scores)
        scored.vectors.update({f"{metric.name}/{name}": vector for name, vector in named.items()})


def _record(metric: Metric, error: Exception, scored: SampleResult) -> None:
    known = error if isinstance(error, FastFaceError) else unexpected(error)
    scored.errors[metric.name] = {"kind": known.kind, "message": known.message}


def finish_run(
    metrics: Sequence[Metric], rows: Sequence[Row], vectors: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, Scores]:
    """Return the run-wide scores by key.

    Args:
        rows: every row of the run, scored.
        vectors: by key and "METRIC/NAME", as `SampleResult.vectors`.
    """
    combined: dict[str, Scores] = {}
    for metric in metrics:
        if not isinstance(metric, RunMetric):
            continue
        start = f"{metric.name}/"
        own = {
            key: {name[len(start) :]: vector for name, vector in named.items() if name.startswith(start)}
            for key, named in vectors.items()
        }
        for key, scores in metric.finish(rows, {key: named for key, named in own.items() if named}).items():
            combined.setdefault(key, {}).update(scores)
    return combined


@functools.cache
def registry() -> dict[str, type[Metric]]:
    """Return all installed metrics by name.

    Raises:
        UsageError: a metric of a package cannot be imported, or two metrics have the same name.
    """
    kinds: dict[str, type[Metric]] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        try:
            kind = point.load()
        except Exception as error:
            package = point.dist.name if point.dist else point.value
            raise UsageError(
                f"the metric {point.name} of {package} cannot be imported: {error}",
                f"update or remove {package}",
            ) from error
        if kinds.setdefault(point.name, kind) is not kind:
            raise UsageError(f"two packages provide a metric called {point.name}", "remove one of them")
    return kinds


def make_metrics(names: Iterable[str]) -> list[Metric]:
    """Create metrics by name without loading them; each once.

    Raises:
        UsageError: unknown metric, or two metrics with a column of the same name.
        ModelUnavailableError: one needs an extra that is not installed.
    """
    known = registry()
    metrics: list[Metric] = []
    owners: dict[str, str] = {}
    for name in dict.fromkeys(names):
        if name not in known:
            near = nearest(name, known)
            raise UsageError(
                f"unknown metric '{name}'",
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
                raise UsageError(f"the metrics {owners[column.name]} and {name} share column '{column.name}'")
        metrics.append(metric)
    return metrics


def missing_modules(metric: Metric | type[Metric]) -> list[str]:
    """Return the required modules of a metric that are not installed."""
    return [name for name in metric.needs.modules if importlib.util.find_spec(name) is None]


def columns_of(metrics: Iterable[Metric]) -> dict[str, Column]:
    """Return the columns of metrics by name, in order."""
    return {column.name: column for metric in metrics for column in metric.columns}
