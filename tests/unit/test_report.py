"""Report page and terminal tables as text: numbers, verdicts, escaping, links."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.run_folder import COLUMNS, RECIPES, build_run

from fastface_cli import console
from fastface_cli.errors import UsageError
from fastface_cli.evaluation.index import write_index
from fastface_cli.evaluation.numbers import Style, verdict
from fastface_cli.evaluation.plots import Point, scatter
from fastface_cli.evaluation.report import _kind, link, write_report
from fastface_cli.evaluation.summary import summarize
from fastface_cli.evaluation.table import tables


def data_of(page: str) -> dict[str, Any]:
    actual = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert actual
    data: dict[str, Any] = json.loads(actual[1])
    return data


def words(page: str) -> str:
    """The visible text of a page, with single spaces."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


# -------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("unit", "values", "number", "value", "difference"),
    [
        ("", [0.51, 0.498], 0.51234, "0.512", "+0.512"),
        ("", [5.2], 5.234, "5.23", "+5.23"),
        ("s", [12.3, 99.0], 12.34, "12.3 s", "+12.3 s"),
        ("", [1234.0], 1234.4, "1234", "+1234"),
        ("share", [0.9], 0.9375, "93.8%", "+93.8 points"),
        ("", [0.2], -0.0512, "-0.051", "-0.051"),
        ("", [], 0.5, "0.50", "+0.50"),
        ("", [0.0], None, "-", "-"),
    ],
)
def test_numbers_have_their_unit(
    unit: str, values: list[float | None], number: float | None, value: str, difference: str
) -> None:
    style = Style.of(unit, values)
    assert style.value(number) == value
    assert style.difference(number) == difference


@pytest.mark.parametrize(
    ("low", "high", "higher", "expected"),
    [
        (0.01, 0.2, True, "better"),
        (0.01, 0.2, False, "worse"),
        (-0.2, -0.01, True, "worse"),
        (-0.2, -0.01, False, "better"),
        (-0.2, -0.01, None, "differs"),
        (-0.1, 0.1, True, "unclear"),
        (0.0, 0.1, True, "unclear"),
        (None, None, True, "unclear"),
    ],
)
def test_verdict_requires_an_interval_without_zero(
    low: float | None, high: float | None, higher: bool | None, expected: str
) -> None:
    assert verdict({"difference": 0.0, "low": low, "high": high}, higher) == expected


def test_verdict_without_a_difference_is_unclear() -> None:
    assert verdict(None, True) == "unclear"


# ------------------------------------------------------------------------------------------- terminal


def test_table_matches_the_summary(tmp_path: Path) -> None:
    rows = build_run(tmp_path, stresses=(None, "blur"), no_face=["am1/ann/0000-0"])
    summary = summarize(rows, COLUMNS, recipes=RECIPES, resamples=500)
    results, counts, blur = tables(summary)
    assert results.columns[4] == "minus baseline"
    lines = {(line[0], line[1]): line for line in results.rows}
    mean = summary["recipes"]["am1"]["id"]
    assert lines["ID", "baseline"][4:7] == ("", "", "")
    assert lines["", "am1"][2:]  # the metric is named only in its first row
    am1 = next(line for line in results.rows if line[1] == "am1")
    assert am1[2] == f"{mean['mean']:.3f}"
    assert am1[3] == f"[{mean['low']:.3f}, {mean['high']:.3f}]"
    assert am1[4] == f"{summary['paired']['am1']['id']['difference']:+.3f}"
    assert am1[6] == "better"
    assert am1[7] == "23"
    assert ("am1", "24", "0", "1") in counts.rows
    assert blur.title == "references degraded: blur"
    assert [line[6] for line in blur.rows[:3]] == ["worse"] * 3  # the fixture subtracts 0.1


def test_brackets_in_names_are_printed_verbatim(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table("[bold]title", ["[red]head"], [["[link=x]cell[/link]"], ["[/]"]])
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("[bold]title", "[red]head", "[link=x]cell[/link]", "[/]"))


def test_lower_is_better_is_labeled_and_changes_the_verdict(tmp_path: Path) -> None:
    summary = summarize(build_run(tmp_path), COLUMNS, recipes=RECIPES, resamples=500)
    line = next(line for line in tables(summary)[0].rows if line[0].startswith("Latency"))
    assert line[0] == "Latency (lower is better)"
    slower = [line for line in tables(summary)[0].rows if line[4] == "+0.50 s"]
    assert [line[6] for line in slower] == ["worse"]


# ----------------------------------------------------------------------------------------------- page


@pytest.mark.parametrize(
    ("unit", "values", "kind"),
    [
        ("share", [1.0, 0.0, None], "verdict"),
        ("share", [0.0, 0.4, 1.0], "any"),
        ("share", [0.0, 0.0], "any"),  # such as a face ratio without faces
        ("", [10, 12, None], "count"),
        ("", [0.5, 1.0], "any"),
        ("s", [1.0], "any"),
        ("", [None], "any"),
    ],
)
def test_kind_of_a_single_image_value(unit, values, kind) -> None:
    assert _kind(unit, values) == kind


def test_page_matches_the_summary(tmp_path: Path) -> None:
    build_run(tmp_path, fail=["am1/bob/0001-0"])
    page = write_report(tmp_path).read_text(encoding="utf-8")
    summary = json.loads((tmp_path / "summary.json").read_text())
    text = words(page)
    for recipe in summary["recipes"]:
        mean = summary["recipes"][recipe]["id"]
        assert f"{mean['mean']:.3f} [{mean['low']:.3f}, {mean['high']:.3f}]" in text
    paired = summary["paired"]["fastface"]["id"]
    assert f"+{paired['difference']:.3f} ▲ [{paired['low']:.3f}, {paired['high']:.3f}]" in text
    clip = summary["paired"]["fastface"]["clip_l14"]
    assert f"−{-clip['difference']:.3f} ▼ [−{-clip['low']:.3f}, −{-clip['high']:.3f}]" in text
    assert "1 failed: out of memory on cuda:0 close programs am1/bob/0001-0" in text
    assert "6 identities" in text
    assert "71 images" in text


def test_page_loads_no_external_resources(tmp_path: Path) -> None:
    build_run(tmp_path)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    linked = set(re.findall(r'(?:src|href)="([^"#]+)', page))
    assert all(link.startswith("./images/") for link in linked)
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", page)
    assert "default-src 'none'" in page


HOSTILE = (
    "</script><script>window.hacked=1</script>",
    '"><img src=x onerror="window.hacked=1">',
    "<!--<script>",
    "{{ 7*7 }}{% raw %}",
    "$x^2$ & 'quotes' \u2028 \U0001f600",
)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_data_set_text_is_never_parsed_as_html(tmp_path: Path, hostile: str) -> None:
    """In prompts, identities, attributes, recipes, errors and the data set name."""
    rows = build_run(tmp_path, recipes=("first", "second"), prompts=("plain", hostile), identities=("a", "b"))
    clean = write_report(tmp_path).read_text(encoding="utf-8")
    for name in ("images.jsonl", "summary.json", "run.json"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        spoiled = text
        for word in ("first", "bright", "made-up", "pocket", "light", "dim"):
            spoiled = spoiled.replace(json.dumps(word), json.dumps(hostile + word))
        assert name == "summary.json" or spoiled != text
        (tmp_path / name).write_text(spoiled, encoding="utf-8")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert tags(page) == tags(clean)
    assert hostile in {group["prompt"] for group in data_of(page)["groups"]}
    assert data_of(page)["recipes"] == [hostile + "first", "second"]
    assert len(data_of(page)["groups"]) == len(rows) / 2


def tags(page: str) -> list[str]:
    """The elements of a page as a parser sees them."""
    from html.parser import HTMLParser

    class Parser(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[str] = []

        def handle_starttag(self, tag: str, _attributes: list[tuple[str, str | None]]) -> None:
            self.found.append(tag)

    parser = Parser()
    parser.feed(re.sub(r"<svg role.*?</svg>", "<svg>", page, flags=re.DOTALL))
    return parser.found


def test_page_of_a_run_without_scores(tmp_path: Path) -> None:
    rows = build_run(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps(summarize(rows, {})))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert data_of(page)["columns"] == []
    assert "72 images" in words(page)


def test_the_index_lists_runs_the_newest_first(tmp_path: Path) -> None:
    for name, started in (("old & good", "2026-01-01T00:00:00Z"), ("new", "2026-02-01T00:00:00Z")):
        build_run(tmp_path / name)
        write_report(tmp_path / name)
        info = json.loads((tmp_path / name / "run.json").read_text())
        (tmp_path / name / "run.json").write_text(json.dumps(info | {"started": started}))
    (tmp_path / "deep" / "unfinished").mkdir(parents=True)
    (tmp_path / "deep" / "unfinished" / "run.json").write_text(json.dumps(info | {"started": "2025"}))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text("{")
    path, runs = write_index(tmp_path)
    names = [run.relative_to(tmp_path).as_posix() for run in runs]
    assert names == ["new", "old & good", "deep/unfinished", "damaged"]
    page = path.read_text(encoding="utf-8")
    assert re.findall(r'<a href="([^"]+)', page) == ["./new/report.html", "./old%20%26%20good/report.html"]
    assert "fastface against baseline: ID (dlib)" in words(page)
    assert "deep/unfinished is not finished: it has no summary.json" in words(page)
    assert page.count("caution") - page.split("</style>")[0].count("caution") == 2


def test_a_folder_without_runs_has_no_index(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="contains no run"):
        write_index(tmp_path)


def test_gallery_shows_only_existing_photos(tmp_path: Path) -> None:
    build_run(tmp_path, identities=("ann", "bob"), stresses=(None, "blur"))
    (tmp_path / "references" / "001.png").unlink()  # bob's photo could not be read
    groups = data_of(write_report(tmp_path).read_text(encoding="utf-8"))["groups"]
    photos = {
        (group["identity"], group["stress"]): (group["reference"], group["degraded"]) for group in groups
    }
    assert photos == {
        ("ann", None): ("./references/000.png", None),
        ("ann", "blur"): ("./references/000.png", "./references/000%2Bblur.png"),
        ("bob", None): (None, None),
        ("bob", "blur"): (None, "./references/001%2Bblur.png"),
    }


def test_page_of_one_recipe_and_one_person(tmp_path: Path) -> None:
    build_run(tmp_path, recipes=("alone",), identities=("ann",))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "The second line is the difference" not in page
    table = tables(json.loads((tmp_path / "summary.json").read_text()))[0]
    assert table.columns == ("metric", "recipe", "mean", "95% interval", "n")
    assert {len(line) for line in table.rows} == {5}
    assert "Results for one identity do not generalize to other people: there is no interval." in words(page)
    assert "1 recipe 1 identity 4 prompts" in words(page)


def test_page_warns_about_few_identities(tmp_path: Path) -> None:
    people = [f"person {number}" for number in range(8)]
    build_run(tmp_path / "seven", identities=people[:7], prompts=("one",), resamples=50)
    build_run(tmp_path / "eight", identities=people, prompts=("one",), resamples=50)
    pages = [words(write_report(tmp_path / name).read_text(encoding="utf-8")) for name in ("seven", "eight")]
    assert (
        "Results for 7 identities do not generalize to other people: these intervals are too narrow."
        in pages[0]
    )
    assert "too narrow" not in pages[1]


def test_failures_are_grouped_by_cause_most_frequent_first(tmp_path: Path) -> None:
    build_run(tmp_path, fail=["am1/bob/0001-0", "am1/ann/0001-0"])
    errors = {"dlib": {"kind": "run_failed", "message": "picture too small"}}
    line = {"key": "baseline/ann/0000-0", "scores": {"dlib": None}, "errors": errors, "metrics": ["dlib"]}
    (tmp_path / "scores.jsonl").write_text(json.dumps(line) + "\n")
    text = words(write_report(tmp_path).read_text(encoding="utf-8"))
    assert text.index("2 failed: out of memory") < text.index("1 without dlib: picture too small")


def test_unfinished_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run in"):
        write_report(tmp_path)
    build_run(tmp_path)
    (tmp_path / "summary.json").unlink()
    with pytest.raises(UsageError, match=r"not finished.*summary\.json"):
        write_report(tmp_path)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
def test_file_names_never_become_a_scheme_query_or_fragment(name: str) -> None:
    address = link(name)
    assert address is not None
    assert address.startswith(("./", "file:///", "file://"))
    assert not set(address) & set('<>"?# \n')


def test_links_to_file_names_with_special_characters(tmp_path: Path) -> None:
    from urllib.parse import unquote

    name = "images/a b/50%/was #1?/é<&>.png"
    assert unquote(link(name) or "") == "./" + name
    assert link(None) is None
    assert link("") is None
    assert link("javascript:alert(1)") == "./javascript%3Aalert%281%29"
    assert link(str(tmp_path / "a b.png")) == (tmp_path / "a b.png").as_uri()


# ----------------------------------------------------------------------------------------------- plot


def test_plot_uses_page_colors_and_keeps_names_as_text() -> None:
    points = [
        Point("_first</text><script>", (0.2, 0.1, 0.3), (1.0, 0.9, 1.2)),
        Point("$no$ math", (0.3, None, None), (1.1, None, None)),
        Point("unmeasured", (float("nan"), None, None), (1.0, 0.9, 1.1)),
    ]
    plot = scatter(points, "CLIP ↑", "ID ↑")
    assert plot.startswith('<svg role="img" aria-label="ID ↑ against CLIP ↑"')
    assert "_first&lt;/text&gt;&lt;script&gt;" in plot
    assert "$no$ math" in plot
    assert "unmeasured" not in plot
    assert "var(--series-0)" in plot
    assert not re.search(r"#0a0b|#010203|#040506|<metadata|http(?!://www\.w3\.org/)", plot)
    assert plot == scatter(points, "CLIP ↑", "ID ↑")
