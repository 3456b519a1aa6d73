"""Summarize scored rows as means, intervals and differences for `summary.json`."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from .metrics.base import Column
from .rows import Row, finite
from .statistics import RESAMPLES, Interval, mean_interval, paired_difference

VERSION = 1
LIKENESS = ("id", "adaface", "dlib")
"""Metrics that define `no_face`: the first one in the run."""
Numbers: TypeAlias = dict[str, dict[str, float | int | None]]
"""By column: {mean or difference, low, high, n}; columns without values are omitted."""


def summarize(
    rows: Sequence[Row],
    columns: Mapping[str, Column],
    *,
    recipes: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """Return the contents of `summary.json`; every number is finite or None.

    - `recipes`: {NAME: {COLUMN: {mean, low, high, n}}}, for clean references
    - `paired`: {NAME: {COLUMN: {difference, low, high, n}}}: each further recipe minus the first one, over
      images of the same identity, prompt and seed with two scores
    - `counts`: {NAME: {images, failed, no_face}}; `no_face` counts images without an identity score
    - `columns`: {COLUMN: {title, higher_is_better, unit, description}}, for columns with values
    - `attributes`: {ATTRIBUTE: {VALUE: {NAME: {COLUMN: {mean, low, high, n}}}}}
    - `identities`: {IDENTITY: {NAME: {COLUMN: {mean, low, high, n}}}}; a single person has no interval: null
    - `stress`: {STRESS: {recipes, against_clean, counts}}: images with degraded references, and the
      difference {NAME: {COLUMN: {difference, low, high, n}}}, degraded minus clean

    Args:
        rows: every image of the run.
        columns: columns of every metric, in display order.
        recipes: display order; None for the order of first appearance.
        resamples: see `statistics.mean_interval`.
    """
    names = list(recipes) if recipes is not None else list(dict.fromkeys(row.recipe for row in rows))
    present = {name for row in rows for name, value in row.scores.items() if finite(value) is not None}
    used = {name: column for name, column in columns.items() if name in present}
    clean = [row for row in rows if row.stress is None]
    by_recipe = {name: [row for row in clean if row.recipe == name] for name in names}

    def means(some: Mapping[str, Sequence[Row]]) -> dict[str, Numbers]:
        return {name: _means(group, used, resamples) for name, group in some.items() if group}

    # Grouped in one pass, because a run may have thousands of people.
    people: dict[str, dict[str, list[Row]]] = {}
    attributes: dict[str, dict[str, dict[str, list[Row]]]] = {}
    for recipe, group in by_recipe.items():
        for row in group:
            people.setdefault(row.identity, {}).setdefault(recipe, []).append(row)
            for name, value in row.attributes.items():
                attributes.setdefault(name, {}).setdefault(value, {}).setdefault(recipe, []).append(row)
    return {
        "version": VERSION,
        "recipes": means(by_recipe),
        "paired": {
            name: _differences(by_recipe[name], by_recipe[names[0]], used, resamples) for name in names[1:]
        },
        "counts": {name: _counts(group) for name, group in by_recipe.items()},
        "columns": {name: _described(column) for name, column in used.items()},
        "attributes": {
            name: {value: means(group) for value, group in sorted(values.items())}
            for name, values in sorted(attributes.items())
        },
        "identities": {identity: means(group) for identity, group in sorted(people.items())},
        "stress": {
            stress: _stressed([row for row in rows if row.stress == stress], by_recipe, used, resamples)
            for stress in sorted({row.stress for row in rows if row.stress is not None})
        },
    }


def summary_csv(summary: Mapping[str, Any]) -> str:
    """Return a summary as CSV: one line per recipe, stress and column; empty cells without a number."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    fields = ("mean", "low", "high", "n", "difference", "difference_low", "difference_high", "difference_n")
    writer.writerow(("recipe", "stress", "column", *fields))
    parts = [("", summary["recipes"], summary["paired"])]
    parts += [(name, part["recipes"], part["against_clean"]) for name, part in summary["stress"].items()]
    for stress, means, differences in parts:
        for recipe, numbers in means.items():
            for column, values in numbers.items():
                other = differences.get(recipe, {}).get(column, {})
                line = [values.get(key) for key in ("mean", "low", "high", "n")]
                line += [other.get(key) for key in ("difference", "low", "high", "n")]
                writer.writerow((recipe, stress, column, *line))
    return text.getvalue()


def images_csv(rows: Iterable[Row], columns: Iterable[str]) -> str:
    """Return rows as CSV: one line per image with its scores; empty cells without a score."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    fields = ("key", "recipe", "identity", "prompt", "prompt_index", "seed_index", "seed", "stress", "file")
    names = list(columns)
    rows = list(rows)
    attributes = sorted({name for row in rows for name in row.attributes})
    writer.writerow((*fields, *attributes, "error", *names))
    for row in rows:
        plain = [getattr(row, field) for field in fields]
        free = [row.attributes.get(name) for name in attributes]
        error = row.error.get("message") if row.error else None
        writer.writerow((*plain, *free, error, *(finite(row.scores.get(name)) for name in names)))
    return text.getvalue()


def _means(rows: Sequence[Row], columns: Iterable[str], resamples: int) -> Numbers:
    identities = [row.identity for row in rows]
    numbers = {}
    for column in columns:
        values = [finite(row.scores.get(column)) for row in rows]
        interval = mean_interval(values, identities, resamples=resamples)
        if interval is not None:
            numbers[column] = _numbers(interval, "mean")
    return numbers


def _differences(rows: Sequence[Row], base: Sequence[Row], columns: Iterable[str], resamples: int) -> Numbers:
    """Return the difference from the rows of the same identity, prompt and seed in `base`."""
    others = {_place(row): row for row in base}
    pairs = [(row, others[_place(row)]) for row in rows if _place(row) in others]
    identities = [row.identity for row, _ in pairs]
    numbers = {}
    for column in columns:
        a = [finite(row.scores.get(column)) for row, _ in pairs]
        b = [finite(other.scores.get(column)) for _, other in pairs]
        interval = paired_difference(a, b, identities, resamples=resamples)
        if interval is not None:
            numbers[column] = _numbers(interval, "difference")
    return numbers


def _stressed(
    rows: Sequence[Row], clean: Mapping[str, Sequence[Row]], columns: Iterable[str], resamples: int
) -> dict[str, Any]:
    by_recipe = {name: [row for row in rows if row.recipe == name] for name in clean}
    groups = {name: group for name, group in by_recipe.items() if group}
    return {
        "recipes": {name: _means(group, columns, resamples) for name, group in groups.items()},
        "against_clean": {
            name: _differences(group, clean[name], columns, resamples) for name, group in groups.items()
        },
        "counts": {name: _counts(group) for name, group in groups.items()},
    }


def _place(row: Row) -> tuple[str, int, int]:
    return row.identity, row.prompt_index, row.seed_index


def _counts(rows: Sequence[Row]) -> dict[str, int]:
    generated = [row for row in rows if row.file is not None]
    scored = {name for row in generated for name in row.scores}
    likeness = next((name for name in LIKENESS if name in scored), "")
    return {
        "images": len(generated),
        "failed": sum(row.file is None for row in rows if row.error is not None),
        "no_face": sum(likeness in row.scores and row.scores[likeness] is None for row in generated),
    }


def _numbers(interval: Interval, name: str) -> dict[str, float | int | None]:
    return {name: interval.mean, "low": interval.low, "high": interval.high, "n": interval.n}


def _described(column: Column) -> dict[str, Any]:
    data = dataclasses.asdict(column)
    del data["name"]
    return data
