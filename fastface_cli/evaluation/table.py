"""Tables of a summary for the terminal; `console` prints them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .numbers import Style, verdict


@dataclass(frozen=True)
class Table:
    """Arguments of `console.print_table`."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def tables(summary: Mapping[str, Any]) -> list[Table]:
    """Return the tables of a run: recipes compared, then degraded references compared with clean ones.

    Args:
        summary: contents of `summary.json`.
    """
    recipes = list(summary["recipes"])
    first = recipes[0] if recipes else ""
    heads: tuple[str, ...]
    heads = ("metric", "recipe", "mean", "95% interval", f"minus {first}", "95% interval", "verdict", "n")
    lines = _lines(summary, summary["recipes"], summary["paired"])
    if len(recipes) < 2:  # no difference with a single recipe
        heads, lines = heads[:4] + heads[7:], [line[:4] + line[7:] for line in lines]
    tables = [
        Table("", heads, lines),
        Table("images", ("recipe", "generated", "failed", "no face"), _counts(summary["counts"])),
    ]
    for stress, part in summary.get("stress", {}).items():
        heads = ("metric", "recipe", "mean", "95% interval", "minus clean", "95% interval", "verdict", "n")
        lines = _lines(summary, part["recipes"], part["against_clean"])
        tables.append(Table(f"references degraded: {stress}", heads, lines))
    return tables


def styles(summary: Mapping[str, Any]) -> dict[str, Style]:
    """Return the number format of each column, the same for the entire run."""
    return {
        name: Style.of(
            column["unit"],
            [numbers[name]["mean"] for numbers in summary["recipes"].values() if name in numbers],
        )
        for name, column in summary["columns"].items()
    }


def heading(column: Mapping[str, Any]) -> str:
    """Return the title of a column; in words if lower is better, because some terminals show no arrows."""
    return f"{column['title']} (lower is better)" if column["higher_is_better"] is False else column["title"]


def _lines(
    summary: Mapping[str, Any], means: Mapping[str, Any], differences: Mapping[str, Any]
) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    written = styles(summary)
    for name, column in summary["columns"].items():
        style, title = written[name], heading(column)
        for recipe, numbers in means.items():
            if name not in numbers:
                continue
            mean = numbers[name]
            other = differences.get(recipe, {}).get(name)
            result = verdict(other, column["higher_is_better"])
            difference = style.difference(other["difference"]) if other else ""
            between = style.interval(other["low"], other["high"]) if other else ""
            lines.append(
                (
                    title,
                    recipe,
                    style.value(mean["mean"]),
                    style.interval(mean["low"], mean["high"]),
                    difference,
                    between,
                    "" if result == "unclear" else result,
                    str(mean["n"]),
                )
            )
            title = ""  # only in the first row of a metric
    return lines


def _counts(counts: Mapping[str, Mapping[str, int]]) -> list[tuple[str, ...]]:
    return [
        (recipe, *(str(count[name]) for name in ("images", "failed", "no_face")))
        for recipe, count in counts.items()
    ]
