"""Two runs against each other: pairs, differences, what is said to differ, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.run_folder import build_run

from fastface_cli.cli import run as fastface
from fastface_cli.errors import UsageError
from fastface_cli.evaluation.compare import compare_runs, comparison_tables


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("before")
    build_run(folder, effect=0.04, stresses=(None, "blur"), no_face=["am1/ann/0000-0"], resamples=50)
    return folder


@pytest.fixture(scope="module")
def after(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One person and one prompt fewer, the prompts in another order, recipes 0.02 apart more."""
    folder = tmp_path_factory.mktemp("after")
    prompts = ("a portrait at night", "watercolour; a man reading", "a smiling woman in a garden")
    people = ("ann", "bob", "cai", "dee", "eli")
    build_run(folder, effect=0.06, stresses=(None, "blur"), identities=people, prompts=prompts, resamples=50)
    return folder


def test_the_difference_is_that_of_equal_people_prompts_and_seeds(before: Path, after: Path) -> None:
    actual = compare_runs(before, after, resamples=200)
    places = [(pairing.a, pairing.b, pairing.stress) for pairing in actual.pairings]
    assert places == [
        (name, name, stress) for name in ("baseline", "am1", "fastface") for stress in (None, "blur")
    ]
    for number, pairing in enumerate(actual.pairings):
        # The fixture's noise hangs on person, prompt and seed alone: it leaves every pair's difference.
        assert pairing.pairs == 15
        assert pairing.alone == (9, 0)
        assert pairing.other_seeds == 0
        likeness = pairing.columns["id"]
        assert likeness["difference"] == pytest.approx(0.02 * (number // 2))
        assert likeness["low"] == pytest.approx(likeness["high"])
        assert likeness["b"] - likeness["a"] == pytest.approx(likeness["difference"])
    am1 = actual.pairings[2].columns
    assert am1["id"]["n"] == 14  # one has no face in the first run
    assert am1["detection"]["n"] == 15
    assert am1["detection"]["difference"] == pytest.approx(1 / 15)


def test_recipes_of_other_names_are_paired_on_demand(before: Path, after: Path) -> None:
    actual = compare_runs(before, after, recipes={"baseline": "fastface"}, resamples=50)
    assert [(pairing.a, pairing.b) for pairing in actual.pairings] == [("baseline", "fastface")] * 2
    assert actual.pairings[0].columns["id"]["difference"] > 0.05
    assert [line.strip() for line in actual.pairings[0].changed] == ["number: 0 before, 2 now"]


def test_the_only_recipes_of_two_runs_go_together(tmp_path: Path) -> None:
    for name in ("one", "two"):
        build_run(tmp_path / name, recipes=(name,), identities=("ann", "bob"), resamples=50)
    (pairing,) = compare_runs(tmp_path / "one", tmp_path / "two", resamples=50).pairings
    assert (pairing.a, pairing.b, pairing.pairs) == ("one", "two", 8)
    assert pairing.columns["id"]["n"] == 8


def test_what_differs_between_the_runs_is_named(before: Path, after: Path) -> None:
    changed = compare_runs(before, after, resamples=50).changed
    assert any(line.strip().startswith("dataset.identities:") for line in changed)
    assert not any("options" in line or "versions" in line for line in changed)


def test_pairs_from_other_seeds_are_counted(tmp_path: Path) -> None:
    for name in ("one", "two"):
        build_run(tmp_path / name, recipes=("same",), identities=("ann", "bob"), resamples=50)
    path = tmp_path / "two" / "images.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["seed"] += 1
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (pairing,) = compare_runs(tmp_path / "one", tmp_path / "two", resamples=50).pairings
    assert pairing.other_seeds == 1


def test_runs_with_nothing_in_common_are_refused(tmp_path: Path, before: Path) -> None:
    build_run(tmp_path / "others", identities=("zoe", "yan"), resamples=50)
    with pytest.raises(UsageError, match="no image of the same person"):
        compare_runs(before, tmp_path / "others")
    build_run(tmp_path / "names", recipes=("x", "y"), resamples=50)
    with pytest.raises(UsageError, match="no recipe in common"):
        compare_runs(before, tmp_path / "names")
    with pytest.raises(UsageError, match="second run has no recipe 'nope'"):
        compare_runs(before, tmp_path / "names", recipes={"am1": "nope"})
    summary = json.loads((tmp_path / "others" / "summary.json").read_text())
    (tmp_path / "others" / "summary.json").write_text(json.dumps({**summary, "columns": {}}))
    with pytest.raises(UsageError, match="no metric in common"):
        compare_runs(before, tmp_path / "others")


def test_the_table_reads_like_the_numbers(before: Path, after: Path) -> None:
    tables = comparison_tables(compare_runs(before, after, resamples=50))
    assert [table.title for table in tables[:2]] == ["baseline", "baseline, references degraded: blur"]
    line = next(line for line in tables[4].rows if line[0] == "ID")
    assert line[3:6] == ("+0.040", "[0.040, 0.040]", "better")


def test_the_command_prints_tables_and_json(
    before: Path, after: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fastface(["eval", "compare", str(before), str(after)]) == 0
    printed = capsys.readouterr()
    assert "second run" in printed.out
    assert "dataset.identities" in printed.err
    assert fastface(["eval", "compare", str(before), str(after), "--recipe", "am1=fastface", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["ok"]
    assert record["pairings"][0]["columns"]["id"]["n"] == 14
    assert fastface(["eval", "compare", str(before), str(after), "--recipe", "am1"]) == 2
    assert "FIRST=SECOND" in capsys.readouterr().err
