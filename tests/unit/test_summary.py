"""A run's summary: a table small enough to compute by hand."""

from __future__ import annotations

import csv
import io
import json
import math

import pytest

from fastface_cli.evaluation.metrics.base import Column
from fastface_cli.evaluation.rows import Row, row_key
from fastface_cli.evaluation.summary import images_csv, summarize, summary_csv

COLUMNS = {
    "id": Column("id", "ID", True, "", "similarity"),
    "clip": Column("clip", "CLIP", True, "", "cosine"),
    "unused": Column("unused", "unused", None, "", "nobody has it"),
}


def row(recipe: str, identity: str, prompt: int, scores: dict, **more) -> Row:
    stress = more.get("stress")
    defaults = {"file": "x.png", "attributes": {"light": "dim" if identity == "ann" else "day"}}
    return Row(
        key=row_key(recipe, identity, prompt, 0, stress),
        recipe=recipe,
        identity=identity,
        prompt=f"p{prompt}",
        prompt_index=prompt,
        seed_index=0,
        seed=1,
        scores=scores,
        **(defaults | more),
    )


ROWS = [
    row("plain", "ann", 0, {"id": 0.2, "clip": 0.30}),
    row("plain", "ann", 1, {"id": None, "clip": 0.20}),
    row("plain", "bob", 0, {"id": 0.4, "clip": 0.10}),
    row("plain", "bob", 1, {}, file=None, error={"kind": "device", "message": "out of memory"}),
    row("fast", "ann", 0, {"id": 0.5, "clip": 0.25}),
    row("fast", "ann", 1, {"id": 0.7, "clip": math.nan}),
    row("fast", "bob", 0, {"id": 0.6, "clip": 0.30}),
    row("fast", "bob", 1, {"id": 0.9, "clip": 0.40}),
    row("fast", "ann", 0, {"id": 0.1, "clip": 0.20}, stress="blur"),
    row("fast", "bob", 0, {"id": None, "clip": 0.20}, stress="blur"),
]


def test_means_differences_and_counts_are_those_computed_by_hand() -> None:
    actual = summarize(ROWS, COLUMNS, resamples=200)
    assert actual["version"] == 1
    assert list(actual["recipes"]) == ["plain", "fast"]
    means = {name: {c: (n["mean"], n["n"]) for c, n in v.items()} for name, v in actual["recipes"].items()}
    assert means["plain"] == {"id": (pytest.approx(0.3), 2), "clip": (pytest.approx(0.2), 3)}
    assert means["fast"] == {"id": (pytest.approx(0.675), 4), "clip": (pytest.approx(0.95 / 3), 3)}
    # Pairs that both have: id ann-0 (+0.3), bob-0 (+0.2); clip ann-0 (-0.05), bob-0 (+0.2).
    assert list(actual["paired"]) == ["fast"]
    paired = actual["paired"]["fast"]
    assert (paired["id"]["difference"], paired["id"]["n"]) == (pytest.approx(0.25), 2)
    assert (paired["clip"]["difference"], paired["clip"]["n"]) == (pytest.approx(0.075), 2)
    assert paired["id"]["low"] <= 0.25 <= paired["id"]["high"]
    assert actual["counts"] == {
        "plain": {"images": 3, "failed": 1, "no_face": 1},
        "fast": {"images": 4, "failed": 0, "no_face": 0},
    }


def test_a_run_without_the_conditioning_recognizer_counts_faces_by_another() -> None:
    columns = {"dlib": Column("dlib", "ID (dlib)", True, "", "")}
    rows = [row("a", "ann", 0, {"dlib": 0.5}), row("a", "ann", 1, {"dlib": None}), row("a", "bob", 0, {})]
    assert summarize(rows, columns, resamples=100)["counts"]["a"]["no_face"] == 1


def test_stress_results_are_compared_with_clean_images() -> None:
    actual = summarize(ROWS, COLUMNS, resamples=200)["stress"]["blur"]
    assert list(actual["recipes"]) == ["fast"]
    assert actual["recipes"]["fast"]["id"]["mean"] == pytest.approx(0.1)
    against = actual["against_clean"]["fast"]
    assert (against["id"]["difference"], against["id"]["n"]) == (pytest.approx(-0.4), 1)
    assert against["clip"]["difference"] == pytest.approx((-0.05 - 0.10) / 2)
    assert actual["counts"] == {"fast": {"images": 2, "failed": 0, "no_face": 1}}


def test_attributes_and_identities_are_tabled() -> None:
    actual = summarize(ROWS, COLUMNS, resamples=200)
    assert actual["attributes"]["light"]["dim"]["fast"]["id"]["mean"] == pytest.approx(0.6)
    assert actual["identities"]["bob"]["plain"]["id"] == {"mean": 0.4, "low": None, "high": None, "n": 1}


def test_only_columns_that_an_image_has_and_only_finite_numbers() -> None:
    actual = summarize(ROWS, COLUMNS, recipes=["fast", "plain"], resamples=200)
    assert list(actual["columns"]) == ["id", "clip"]
    assert actual["columns"]["id"] == {
        "title": "ID",
        "higher_is_better": True,
        "unit": "",
        "description": "similarity",
    }
    assert list(actual["paired"]) == ["plain"]
    json.dumps(actual, allow_nan=False)


def test_an_empty_run_has_an_empty_summary() -> None:
    actual = summarize([], COLUMNS)
    assert (actual["recipes"], actual["paired"], actual["columns"], actual["stress"]) == ({}, {}, {}, {})


def test_csv_holds_the_same_numbers() -> None:
    summary = summarize(ROWS, COLUMNS, resamples=200)
    lines = list(csv.DictReader(io.StringIO(summary_csv(summary))))
    fast = next(
        line for line in lines if (line["recipe"], line["stress"], line["column"]) == ("fast", "", "id")
    )
    assert float(fast["mean"]) == pytest.approx(0.675)
    assert float(fast["difference"]) == pytest.approx(0.25)
    blur = next(line for line in lines if line["stress"] == "blur" and line["column"] == "id")
    assert float(blur["difference"]) == pytest.approx(-0.4)
    images = list(csv.DictReader(io.StringIO(images_csv(ROWS, ["id", "clip"]))))
    assert [line["id"] for line in images[:2]] == ["0.2", ""]
    assert (images[3]["error"], images[5]["clip"], images[0]["light"]) == ("out of memory", "", "dim")
