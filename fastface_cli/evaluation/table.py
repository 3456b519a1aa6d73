"""A summary, or the difference of two runs, as tables for the terminal. Pure: `console` prints them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .numbers import Style, verdict


@dataclass(frozen=True)
class Table:
    """What `console.print_table` takes."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def tables(summary: Mapping[str, Any]) -> list[Table]:
    """The tables of a run: recipes against each other, then degraded references against clean ones.

    Args:
        summary: what `summary.json` holds.
    """
    recipes = list(summary["recipes"])
    first = recipes[0] if recipes else ""
    heads: tuple[str, ...]
    heads = ("metric", "recipe", "mean", "95% interval", f"less {first}", "95% interval", "verdict", "n")
    lines = _lines(summary, summary["recipes"], summary["paired"])
    if len(recipes) < 2:  # nothing to take a difference to
        heads, lines = heads[:4] + heads[7:], [line[:4] + line[7:] for line in lines]
    found = [
        Table("", heads, lines),
        Table("images", ("recipe", "made", "failed", "no face"), _counts(summary["counts"])),
    ]
    for stress, part in summary.get("stress", {}).items():
        heads = ("metric", "recipe", "mean", "95% interval", "less clean", "95% interval", "verdict", "n")
        lines = _lines(summary, part["recipes"], part["against_clean"])
        found.append(Table(f"references degraded: {stress}", heads, lines))
    return found


def styles(summary: Mapping[str, Any]) -> dict[str, Style]:
    """How the numbers of each column are written, one style for the whole run."""
    return {
        name: Style.of(
            column["unit"],
            [numbers[name]["mean"] for numbers in summary["recipes"].values() if name in numbers],
        )
        for name, column in summary["columns"].items()
    }


def heading(column: Mapping[str, Any]) -> str:
    """A column's title, and that less is better where it is: any terminal can show it."""
    return f"{column['title']} (less is better)" if column["higher_is_better"] is False else column["title"]


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
            said = verdict(other, column["higher_is_better"])
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
                    "" if said == "unclear" else said,
                    str(mean["n"]),
                )
            )
            title = ""  # a metric names itself once
    return lines


def _counts(counts: Mapping[str, Mapping[str, int]]) -> list[tuple[str, ...]]:
    return [
        (recipe, *(str(count[name]) for name in ("images", "failed", "no_face")))
        for recipe, count in counts.items()
    ]
