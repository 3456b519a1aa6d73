"""Compare two runs: images of the same person, prompt and seed form pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

from ..errors import UsageError
from .finished import read_rows, read_summary
from .numbers import Style, verdict
from .rows import Row, finite
from .runs import compare as differences
from .runs import read_info
from .statistics import RESAMPLES, paired_difference
from .table import Table, heading

COMPARED = ("dataset", "options", "versions", "hardware")
"""Parts of run.json whose differences are reported, besides the recipes."""
Cell: TypeAlias = tuple[str, str, int]
"""Identity, prompt, seed index."""


@dataclass(frozen=True)
class Pairing:
    """One recipe of each run, on clean references or on one kind of degraded references."""

    a: str
    b: str
    stress: str | None
    pairs: int
    """Number of images of the same person, prompt and seed index in both runs."""
    alone: tuple[int, int]
    """Number of images only in the first run, and only in the second run."""
    other_seeds: int
    """Number of pairs with different seeds: their difference includes the initial noise."""
    columns: dict[str, dict[str, Any]]
    """{COLUMN: {a, b, difference, low, high, n}}: means over pairs with two scores, and second minus
    first."""
    changed: list[str]
    """Differences of the recipes, one per line."""


@dataclass(frozen=True)
class Comparison:
    """The comparison of two runs."""

    pairings: list[Pairing]
    columns: dict[str, dict[str, Any]]
    """As in `summary.json`; only columns of both runs."""
    changed: list[str]
    """Differences of data sets, options, versions and machines, one per line."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON-compatible data."""
        return asdict(self)


def compare_runs(
    a: Path, b: Path, *, recipes: Mapping[str, str] | None = None, resamples: int = RESAMPLES
) -> Comparison:
    """Compare two finished runs.

    Args:
        a: the baseline.
        b: the other run; differences are `b` minus `a`.
        recipes: pairs of a recipe of `a` and one of `b`; None pairs equal names, or the only recipe of each.
        resamples: see `.statistics.mean_interval`.

    Raises:
        UsageError: a run is unfinished, or the runs have no recipe, metric or image in common.
    """
    infos = [read_info(run) for run in (a, b)]
    summaries = [read_summary(run) for run in (a, b)]
    columns = {
        name: column for name, column in summaries[0]["columns"].items() if name in summaries[1]["columns"]
    }
    if not columns:
        raise UsageError(
            f"{a} and {b} have no metric in common", f"add metrics: fastface eval score {b} --metrics NAMES"
        )
    pairs = _recipes([list(info["recipes"]) for info in infos], recipes)
    rows = [_by_place(read_rows(run)) for run in (a, b)]
    stresses = [None, *sorted({stress for _, stress in rows[0] if stress} & {s for _, s in rows[1] if s})]
    pairings = []
    for mine, other in pairs.items():
        changed = list(differences(infos[0]["recipes"][mine], infos[1]["recipes"][other]))
        for stress in stresses:
            left, right = (
                part.get((name, stress), {}) for part, name in zip(rows, (mine, other), strict=True)
            )
            if left.keys() & right.keys():
                pairings.append(_pairing(mine, other, stress, left, right, columns, changed, resamples))
    if not pairings:
        raise UsageError(
            f"{a} and {b} have no image of the same person, prompt and seed index in common",
            "compare runs of the same data set",
        )
    rest = [line for part in COMPARED for line in differences(infos[0].get(part), infos[1].get(part), part)]
    return Comparison(pairings, columns, rest)


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Return one table per pair of recipes."""
    return [_table(pairing, comparison.columns) for pairing in comparison.pairings]


def _recipes(names: Sequence[Sequence[str]], pairs: Mapping[str, str] | None) -> dict[str, str]:
    """Pair the recipes of two runs.

    Raises:
        UsageError: an unknown name, or no recipe in common.
    """
    if pairs:
        for name, run in [(name, 0) for name in pairs] + [(name, 1) for name in pairs.values()]:
            if name not in names[run]:
                which = ("first", "second")[run]
                raise UsageError(
                    f"the {which} run has no recipe '{name}'", f"its recipes are {', '.join(names[run])}"
                )
        return dict(pairs)
    both = [name for name in names[0] if name in names[1]]
    if both:
        return {name: name for name in both}
    if len(names[0]) == len(names[1]) == 1:
        return {names[0][0]: names[1][0]}
    raise UsageError(
        f"the runs have no recipe in common: {', '.join(names[0])}; {', '.join(names[1])}",
        "pair them with --recipe FIRST=SECOND",
    )


def _by_place(rows: Sequence[Row]) -> dict[tuple[str, str | None], dict[Cell, Row]]:
    """Group rows by recipe and stress, then by cell. Cells use the prompt itself: its index may differ."""
    groups: dict[tuple[str, str | None], dict[Cell, Row]] = {}
    for row in rows:
        cells = groups.setdefault((row.recipe, row.stress), {})
        cells[row.identity, row.prompt, row.seed_index] = row
    return groups


def _pairing(
    a: str,
    b: str,
    stress: str | None,
    left: Mapping[Cell, Row],
    right: Mapping[Cell, Row],
    columns: Mapping[str, Any],
    changed: list[str],
    resamples: int,
) -> Pairing:
    cells = [cell for cell in left if cell in right]
    results = {}
    for column in columns:
        numbers = _column(column, [left[cell] for cell in cells], [right[cell] for cell in cells], resamples)
        if numbers is not None:
            results[column] = numbers
    return Pairing(
        a=a,
        b=b,
        stress=stress,
        pairs=len(cells),
        alone=(len(left) - len(cells), len(right) - len(cells)),
        other_seeds=sum(left[cell].seed != right[cell].seed for cell in cells),
        columns=results,
        changed=changed,
    )


def _column(
    column: str, left: Sequence[Row], right: Sequence[Row], resamples: int
) -> dict[str, float | int | None] | None:
    """Return means and difference over pairs with two scores; None without such a pair."""
    pairs = [
        (row.identity, first, second)
        for row, other in zip(left, right, strict=True)
        if (first := finite(row.scores.get(column))) is not None
        and (second := finite(other.scores.get(column))) is not None
    ]
    people = [identity for identity, _, _ in pairs]
    a, b = [first for _, first, _ in pairs], [second for _, _, second in pairs]
    difference = paired_difference(b, a, people, resamples=resamples)
    if difference is None:
        return None
    return {
        "a": fmean(a),
        "b": fmean(b),
        "difference": difference.mean,
        "low": difference.low,
        "high": difference.high,
        "n": difference.n,
    }


def _table(pairing: Pairing, columns: Mapping[str, Any]) -> Table:
    title = pairing.a if pairing.a == pairing.b else f"{pairing.b} minus {pairing.a}"
    if pairing.stress:
        title += f", references degraded: {pairing.stress}"
    lines: list[tuple[str, ...]] = []
    for name, numbers in pairing.columns.items():
        column = columns[name]
        style = Style.of(column["unit"], [numbers["a"], numbers["b"]])
        result = verdict(numbers, column["higher_is_better"])
        lines.append(
            (
                heading(column),
                style.value(numbers["a"]),
                style.value(numbers["b"]),
                style.difference(numbers["difference"]),
                style.interval(numbers["low"], numbers["high"]),
                "" if result == "unclear" else result,
                str(numbers["n"]),
            )
        )
    heads = ("metric", "first run", "second run", "difference", "95% interval", "verdict", "n")
    return Table(title, heads, lines)
