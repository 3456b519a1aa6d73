"""Two runs against each other: the images of the same person, prompt and seed in pairs."""

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
"""Parts of run.json whose differences are named, besides the recipes."""
Cell: TypeAlias = tuple[str, str, int]
"""Identity, prompt, seed index."""


@dataclass(frozen=True)
class Pairing:
    """One recipe of each run, on clean references or on one kind of degraded ones."""

    a: str
    b: str
    stress: str | None
    pairs: int
    """Images of the same person, prompt and seed index that both runs have."""
    alone: tuple[int, int]
    """Images that only the first, only the second run has."""
    other_seeds: int
    """Pairs made from different seeds: their difference holds that of the noise."""
    columns: dict[str, dict[str, Any]]
    """{COLUMN: {a, b, difference, low, high, n}}: means over the pairs that both have a score for, and the
    second less the first."""
    changed: list[str]
    """How the recipes differ, a line each."""


@dataclass(frozen=True)
class Comparison:
    """What two runs say together."""

    pairings: list[Pairing]
    columns: dict[str, dict[str, Any]]
    """As in `summary.json`: those that both runs have."""
    changed: list[str]
    """How data sets, options, versions and machines differ, a line each."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def compare_runs(
    a: Path, b: Path, *, recipes: Mapping[str, str] | None = None, resamples: int = RESAMPLES
) -> Comparison:
    """The difference of two finished runs.

    Args:
        a: the run that is compared with.
        b: the other; differences are `b` less `a`.
        recipes: which recipe of `a` goes with which of `b`; None pairs those of one name, or the only two.
        resamples: see `.statistics.mean_interval`.

    Raises:
        UsageError: a run is not finished, or they have no recipe, measure or image in common.
    """
    known = [read_info(run) for run in (a, b)]
    summaries = [read_summary(run) for run in (a, b)]
    columns = {
        name: column for name, column in summaries[0]["columns"].items() if name in summaries[1]["columns"]
    }
    if not columns:
        raise UsageError(
            f"{a} and {b} have no measure in common", f"fastface eval score {b} --metrics NAMES adds more"
        )
    pairs = _recipes([list(info["recipes"]) for info in known], recipes)
    rows = [_by_place(read_rows(run)) for run in (a, b)]
    stresses = [None, *sorted({stress for _, stress in rows[0] if stress} & {s for _, s in rows[1] if s})]
    found = []
    for mine, other in pairs.items():
        changed = list(differences(known[0]["recipes"][mine], known[1]["recipes"][other]))
        for stress in stresses:
            left, right = (
                part.get((name, stress), {}) for part, name in zip(rows, (mine, other), strict=True)
            )
            if left.keys() & right.keys():
                found.append(_pairing(mine, other, stress, left, right, columns, changed, resamples))
    if not found:
        raise UsageError(
            f"{a} and {b} have no image of the same person, prompt and seed index in common",
            "compare runs of the same data set",
        )
    rest = [line for part in COMPARED for line in differences(known[0].get(part), known[1].get(part), part)]
    return Comparison(found, columns, rest)


def comparison_tables(comparison: Comparison) -> list[Table]:
    """The tables of a comparison, one a pair of recipes."""
    return [_table(pairing, comparison.columns) for pairing in comparison.pairings]


def _recipes(names: Sequence[Sequence[str]], wanted: Mapping[str, str] | None) -> dict[str, str]:
    """Which recipe goes with which.

    Raises:
        UsageError: an unknown name, or none in common.
    """
    if wanted:
        for name, run in [(name, 0) for name in wanted] + [(name, 1) for name in wanted.values()]:
            if name not in names[run]:
                which = ("first", "second")[run]
                raise UsageError(f"the {which} run has no recipe '{name}'", f"it has {', '.join(names[run])}")
        return dict(wanted)
    both = [name for name in names[0] if name in names[1]]
    if both:
        return {name: name for name in both}
    if len(names[0]) == len(names[1]) == 1:
        return {names[0][0]: names[1][0]}
    raise UsageError(
        f"the runs have no recipe in common: {', '.join(names[0])}; {', '.join(names[1])}",
        "say which go together with --recipe FIRST=SECOND",
    )


def _by_place(rows: Sequence[Row]) -> dict[tuple[str, str | None], dict[Cell, Row]]:
    """Rows by recipe and stress, then by cell; the prompt counts and not its number, which may differ."""
    found: dict[tuple[str, str | None], dict[Cell, Row]] = {}
    for row in rows:
        cells = found.setdefault((row.recipe, row.stress), {})
        cells[row.identity, row.prompt, row.seed_index] = row
    return found


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
    found = {}
    for column in columns:
        numbers = _column(column, [left[cell] for cell in cells], [right[cell] for cell in cells], resamples)
        if numbers is not None:
            found[column] = numbers
    return Pairing(
        a=a,
        b=b,
        stress=stress,
        pairs=len(cells),
        alone=(len(left) - len(cells), len(right) - len(cells)),
        other_seeds=sum(left[cell].seed != right[cell].seed for cell in cells),
        columns=found,
        changed=changed,
    )


def _column(
    column: str, left: Sequence[Row], right: Sequence[Row], resamples: int
) -> dict[str, float | int | None] | None:
    """Means and difference over the pairs that both have a score for; None where there is no such pair."""
    pairs = [
        (row.identity, one, two)
        for row, other in zip(left, right, strict=True)
        if (one := finite(row.scores.get(column))) is not None
        and (two := finite(other.scores.get(column))) is not None
    ]
    people = [who for who, _, _ in pairs]
    ones, twos = [one for _, one, _ in pairs], [two for _, _, two in pairs]
    difference = paired_difference(twos, ones, people, resamples=resamples)
    if difference is None:
        return None
    return {
        "a": fmean(ones),
        "b": fmean(twos),
        "difference": difference.mean,
        "low": difference.low,
        "high": difference.high,
        "n": difference.n,
    }


def _table(pairing: Pairing, columns: Mapping[str, Any]) -> Table:
    title = pairing.a if pairing.a == pairing.b else f"{pairing.b} less {pairing.a}"
    if pairing.stress:
        title += f", references degraded: {pairing.stress}"
    lines: list[tuple[str, ...]] = []
    for name, numbers in pairing.columns.items():
        column = columns[name]
        style = Style.of(column["unit"], [numbers["a"], numbers["b"]])
        said = verdict(numbers, column["higher_is_better"])
        lines.append(
            (
                heading(column),
                style.value(numbers["a"]),
                style.value(numbers["b"]),
                style.difference(numbers["difference"]),
                style.interval(numbers["low"], numbers["high"]),
                "" if said == "unclear" else said,
                str(numbers["n"]),
            )
        )
    heads = ("metric", "first run", "second run", "difference", "95% interval", "verdict", "n")
    return Table(title, heads, lines)
