"""Write `report.html`, a single page next to the images of a run that opens from disk without a network."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import quote

from ..files import write_atomically
from .finished import read_rows, read_summary
from .numbers import Style, Verdict, verdict
from .plots import COLORS, Point, scatter
from .rows import Row, finite
from .runs import Run
from .table import styles

ID_COLUMNS = ("adaface", "dlib", "id")
"""Identity metrics, independent recognizers first; each one in the run gets a plot."""
PROMPT_COLUMNS = ("clip_l14", "clip_b32", "clip_pocket")
"""Prompt metrics; the first one in the run is the other axis of the plots."""
FEW = 8
"""Intervals for fewer identities are too narrow, as `statistics.mean_interval` explains."""
MARKS: Mapping[Verdict, str] = {"better": "▲", "worse": "▼", "differs": "◆", "unclear": ""}
"""A symbol for each verdict, because many readers cannot distinguish the colors."""


def write_report(run: Path) -> Path:
    """Write the report page of a run that is scored and summarized.

    Args:
        run: folder of the run, with run.json, images.jsonl and summary.json.

    Returns:
        RUN/report.html.

    Raises:
        UsageError: the folder is not a run, or the run has no summary yet.
    """
    info = Run.reopen(run, writable=False)
    summary = read_summary(run)
    rows = read_rows(run)
    page = render("report.html.j2", _page(run, info, summary, rows))
    return write_atomically(run / "report.html", page.encode("utf-8", "replace"), force=True)


def _page(run: Path, info: Run, summary: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Return the variables of the template."""
    recipes = list(summary["recipes"])
    dataset = info.info.get("dataset") or {}
    return {
        "title": dataset.get("name") or run.resolve().name,
        "recipes": recipes,
        "first": recipes[0] if recipes else "",
        "facts": facts(summary, rows),
        "opening": opening(summary),
        "extremes": _extremes(summary, rows),
        "few": len(summary["identities"]) if len(summary["identities"]) < FEW else None,
        "counts": summary["counts"],
        "results": _results(summary),
        "stress": list(summary.get("stress", {})),
        "plots": _plots(summary),
        "failures": _failures(rows, info.score_errors()),
        "about": _about(info.info),
        "recipe_files": {name: _pretty(value) for name, value in (info.info.get("recipes") or {}).items()},
        "data": _data(run, summary, rows),
    }


def facts(summary: Mapping[str, Any], rows: Sequence[Row]) -> list[tuple[int, str]]:
    """Return the size of the run as (count, word)."""
    generated = [row for row in rows if row.file is not None]
    clean = sum(row.stress is None for row in generated)
    numbers = [
        (len(summary["recipes"]), "recipe", "recipes"),
        (len({row.identity for row in rows}), "identity", "identities"),
        (len({(row.prompt_index, row.prompt) for row in rows}), "prompt", "prompts"),
        (len({row.seed_index for row in rows}), "seed", "seeds"),
        (clean, "image", "images"),
        (len(generated) - clean, "image of a degraded reference", "images of degraded references"),
        (len(rows) - len(generated), "failed", "failed"),
    ]
    return [(count, singular if count == 1 else plural) for count, singular, plural in numbers if count]


def _judge(summary: Mapping[str, Any]) -> str | None:
    """The identity metric that decides: the most independent recognizer in the run."""
    return next((name for name in ID_COLUMNS if name in summary["columns"]), None)


def opening(summary: Mapping[str, Any]) -> list[str]:
    """Return one sentence for each recipe but the first: likeness, prompt and cost against the first."""
    first = next(iter(summary["recipes"]), "")
    against = next((name for name in PROMPT_COLUMNS if name in summary["columns"]), None)
    sentences = []
    for recipe in list(summary["recipes"])[1:]:
        clauses = [
            _clause(summary, recipe, name)
            for name in (_judge(summary), against, "unet_samples", "seconds")
            if name is not None and summary["paired"].get(recipe, {}).get(name)
        ]
        if clauses:
            sentences.append(f"{recipe} against {first}: {'; '.join(clauses)}.")
    return sentences


_WORDS: Mapping[Verdict, str] = {
    "better": "better",
    "worse": "worse",
    "differs": "different",
    "unclear": "no clear difference",
}


def _clause(summary: Mapping[str, Any], recipe: str, name: str) -> str:
    """A difference from the first recipe in words: `dlib similarity -0.045 [-0.049, -0.041], worse`."""
    column, paired = summary["columns"][name], summary["paired"][recipe][name]
    style = styles(summary)[name]
    numbers = f"{style.difference(paired['difference'])} {style.interval(paired['low'], paired['high'])}"
    meaning = _WORDS[verdict(paired, column["higher_is_better"])]
    return f"{column['title']} {typeset(numbers).strip()}, {meaning}"


def _extremes(summary: Mapping[str, Any], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return, for each recipe, its most and its least similar image, by the metric that decides."""
    name = _judge(summary)
    if name is None:
        return []
    column, style = summary["columns"][name], styles(summary)[name]
    sign = -1 if column["higher_is_better"] is False else 1
    extremes = []
    for recipe in summary["recipes"]:
        scored = [
            (sign * value, row)
            for row in rows
            if row.recipe == recipe and row.file is not None and row.stress is None
            if (value := finite(row.scores.get(name))) is not None
        ]
        if not scored:
            continue
        images = [
            {
                "word": word,
                "file": link(row.file),
                "identity": row.identity,
                "prompt": row.prompt,
                "score": typeset(style.value(sign * value)),
            }
            for word, (value, row) in (
                ("best", max(scored, key=lambda item: item[0])),
                ("worst", min(scored, key=lambda item: item[0])),
            )
        ]
        extremes.append({"recipe": recipe, "title": column["title"], "images": images})
    return extremes


# -------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Bar:
    """A mean and its interval on a scale of 0 to 100, shared by all recipes of a metric."""

    mean: float
    low: float
    high: float


def _results(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one entry per column, with one cell per recipe."""
    results = []
    written = styles(summary)
    for name, column in summary["columns"].items():
        means = {recipe: numbers.get(name) for recipe, numbers in summary["recipes"].items()}
        if not any(means.values()):
            continue  # only scored on degraded references
        ends = [
            end
            for mean in means.values()
            if mean
            for end in (mean["mean"], mean["low"], mean["high"])
            if end is not None
        ]
        cells = [
            _cell(
                mean,
                summary["paired"].get(recipe, {}).get(name),
                written[name],
                column["higher_is_better"],
                (min(ends), max(ends)),
                summary["counts"].get(recipe, {}).get("images"),
            )
            for recipe, mean in means.items()
        ]
        results.append({"heading": heading(column), "description": column["description"], "cells": cells})
    return results


def _cell(
    mean: Mapping[str, Any] | None,
    paired: Mapping[str, Any] | None,
    style: Style,
    higher_is_better: bool | None,
    scale: tuple[float, float],
    images: int | None,
) -> dict[str, Any] | None:
    if mean is None:
        return None
    result = verdict(paired, higher_is_better)
    return {
        "mean": typeset(style.value(mean["mean"])),
        "interval": typeset(style.interval(mean["low"], mean["high"])),
        "n": mean["n"] if mean["n"] != images else None,
        "bar": _bar(mean, *scale),
        "difference": typeset(style.difference(paired["difference"])) if paired else None,
        "between": typeset(style.interval(paired["low"], paired["high"])) if paired else "",
        "verdict": result,
        "mark": MARKS[result],
    }


def heading(column: Mapping[str, Any]) -> str:
    """Return the title of a column with an arrow in the better direction."""
    arrow = {True: " ↑", False: " ↓", None: ""}[column["higher_is_better"]]
    return f"{column['title']}{arrow}"


def typeset(number: str) -> str:
    """Return a number with a typographic minus sign."""
    return number.replace("-", "−")


def _bar(mean: Mapping[str, Any], least: float, most: float) -> Bar | None:
    if mean["low"] is None or mean["high"] is None or least == most:
        return None
    low, middle, high = (
        round(100 * (mean[name] - least) / (most - least), 1) for name in ("low", "mean", "high")
    )
    return Bar(middle, low, high)


def _plots(summary: Mapping[str, Any]) -> list[str]:
    columns = summary["columns"]
    against = next((name for name in PROMPT_COLUMNS if name in columns), None)
    if against is None:
        return []
    plots = []
    for name in ID_COLUMNS:
        if name not in columns:
            continue
        points = [
            Point(recipe, _ends(numbers.get(against)), _ends(numbers.get(name)))
            for recipe, numbers in summary["recipes"].items()
        ]
        if any(point.known for point in points):
            plots.append(scatter(points, heading(columns[against]), heading(columns[name])))
    return plots


def _ends(mean: Mapping[str, Any] | None) -> tuple[float, float | None, float | None]:
    if mean is None:
        return float("nan"), None, None
    return mean["mean"], mean["low"], mean["high"]


# ------------------------------------------------------------------------------------------- failures


def _failures(rows: Sequence[Row], unscored: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return failures with their images, grouped by cause, most frequent first."""
    causes: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.error is not None:
            why = row.error.get("message") or row.error.get("kind") or "unknown"
            causes.setdefault(("failed", str(why), str(row.error.get("hint") or "")), []).append(row.key)
        for metric, error in unscored.get(row.key, {}).items():
            why = error.get("message", "") if isinstance(error, Mapping) else str(error)
            causes.setdefault((f"without {metric}", why, ""), []).append(row.key)
    return [
        {"what": what, "why": why, "hint": hint, "keys": keys}
        for (what, why, hint), keys in sorted(causes.items(), key=lambda item: -len(item[1]))
    ]


# ---------------------------------------------------------------------------------------------- about


def _about(info: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the parts of run.json about the setup of the run; long lists as their length."""
    parts = []
    for name in ("dataset", "options", "versions", "hardware"):
        value = info.get(name)
        if value:
            entries = value.items() if isinstance(value, Mapping) else [(name, value)]
            parts.append((name, [(str(key), _short(entry)) for key, entry in entries]))
    return parts


def _short(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and len(value) > 8:
        return f"{len(value)} entries"
    return json.dumps(value, ensure_ascii=False)


def _pretty(value: Any) -> str:
    import yaml

    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)


# ----------------------------------------------------------------------------------------------- data


def _data(run: Path, summary: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Return the data of the page's script: breakdowns and gallery. Names occur once; cells are numbers."""
    recipes, columns = list(summary["recipes"]), list(summary["columns"])
    recipes += sorted({row.recipe for row in rows} - set(recipes))
    written = styles(summary)
    return {
        "recipes": recipes,
        "columns": [
            {
                "name": name,
                "heading": heading(column),
                "title": column["title"],
                "higher": column["higher_is_better"],
                "unit": column["unit"],
                "digits": written[name].digits,
                "kind": _kind(column["unit"], [row.scores.get(name) for row in rows]),
            }
            for name, column in summary["columns"].items()
        ],
        "identities": summary["identities"],
        "attributes": summary["attributes"],
        "clean": summary["recipes"],
        "stress": summary.get("stress", {}),
        "groups": _groups(run, rows, recipes, columns),
    }


def _kind(unit: str, values: Sequence[float | None]) -> str:
    """Return the number format of a single image: a verdict is yes or no, a count has no decimals."""
    known = {number for value in values if (number := finite(value)) is not None}
    if unit == "share":
        return "verdict" if 1.0 in known and known <= {0.0, 1.0} else "any"
    return "count" if known and not unit and all(float(number).is_integer() for number in known) else "any"


def _groups(
    run: Path, rows: Sequence[Row], recipes: Sequence[str], columns: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the gallery rows: one per identity, prompt, seed and stress, with one image per recipe."""

    @functools.cache
    def photo(path: str | None) -> str | None:
        """Return the link of a photo; None if it could not be read and therefore was not copied."""
        return link(path) if path and (run / path).is_file() else None

    number = {name: index for index, name in enumerate(recipes)}
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        place = (row.stress or "", row.identity, row.prompt_index, row.seed_index)
        if place not in groups:
            groups[place] = {
                "identity": row.identity,
                "prompt": row.prompt,
                "index": [row.prompt_index, row.seed_index],
                "seed": row.seed,
                "stress": row.stress,
                "attributes": row.attributes,
                "reference": photo(row.reference),
                "degraded": photo(row.degraded),
                "held_out": photo(row.held_out),
                "pictures": [None] * len(recipes),
            }
        groups[place]["pictures"][number[row.recipe]] = {
            "file": link(row.file),
            "error": (row.error.get("message") or "failed") if row.error else None,
            "seconds": row.seconds,
            "samples": row.unet_samples,
            "scores": [_rounded(row.scores.get(name)) for name in columns],
        }
    return [groups[place] for place in sorted(groups)]


def _rounded(value: float | None) -> float | None:
    """Round to five digits: enough to sort by, and a small page."""
    known = finite(value)
    return None if known is None else float(f"{known:.5g}")


def link(path: str | None) -> str | None:
    """Return the link of a file: relative to the page within the run, absolute elsewhere.

    Names are percent-encoded, and relative links start with `./`, so that no file name of a data set is
    parsed as a scheme, a fragment or a query.
    """
    if not path:
        return None
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(path).is_absolute():
            return kind(path).as_uri()
    return "./" + quote(path.replace("\\", "/"), errors="surrogateescape")


# ------------------------------------------------------------------------------------------ rendering


def render(template: str, page: Mapping[str, Any]) -> str:
    """Fill in a template of this folder."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fastface_cli.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    script = _text("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        page, style=_text("report.css"), script=script, script_hash=f"sha256-{digest}", series=COLORS
    )


def _text(name: str) -> str:
    return resources.files("fastface_cli.evaluation").joinpath(name).read_text(encoding="utf-8")
