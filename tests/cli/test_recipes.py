"""`fastface recipes` on the command line."""

import json
import subprocess
import sys

import pytest

from fastface_cli.recipe.files import SHORT_NAMES, list_recipes, load_recipe, recipes_folder


@pytest.fixture
def run(capfd):
    from fastface_cli import cli

    def run(*arguments):
        code = cli.run(["recipes", *map(str, arguments)])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


def test_list_names_every_recipe(run):
    code, out, err = run("list", "--all")
    assert (code, err) == (0, "")
    for info in list_recipes():
        assert info.name in out
        assert info.summary in out


def test_list_shows_the_default_model_first(run):
    code, out, _ = run("list")
    rows = [line for line in out.splitlines() if line.startswith("│")]
    assert code == 0
    assert "hyper (default)" in rows[0]
    assert "12.10 GB" in rows[0]
    listed = {line.split()[1] for line in rows}
    assert listed == set(SHORT_NAMES)


def test_list_as_json(run):
    code, out, _ = run("list", "--json")
    data = json.loads(out)
    assert (code, data["schema"], data["ok"]) == (0, 1, True)
    assert [row["name"] for row in data["recipes"]] == [info.name for info in list_recipes()]
    assert {row["short"]: row["name"] for row in data["recipes"]}["pocket"] == "pocket-baseline"


def test_show_prints_the_file(run):
    code, out, _ = run("show", "hyper")
    assert code == 0
    assert out == (recipes_folder() / "hyper-fastface.yaml").read_text()


def test_show_resolved_prints_the_origin_of_each_value(run, tmp_path):
    code, out, _ = run("show", "hyper", "--resolved", "--steps", "8", "--set", "adapter.scale=0.5")
    assert code == 0
    assert "  steps: 8 " in out
    assert "# --steps" in out
    assert "# --set" in out
    assert "# default" in out
    assert "# recipes/models/hyper.yaml:" in out
    path = tmp_path / "mine.yaml"
    path.write_text(out)
    expected = load_recipe("hyper", overrides=["sampling.steps=8", "adapter.scale=0.5"]).recipe
    assert load_recipe(path).recipe.digest() == expected.digest()


def test_show_with_an_override_shows_the_complete_recipe(run):
    code, out, _ = run("show", "lcm-am2", "--set", "guidance.text=[1, 2]")
    assert code == 0
    assert "text: [1.0, 2.0]" in out
    assert "#" not in out


def test_show_as_json(run):
    code, out, _ = run("show", "turbo", "--json")
    data = json.loads(out)
    actual = load_recipe("turbo")
    assert code == 0
    assert data["recipe"] == actual.recipe.canonical()
    assert data["origins"] == actual.origins
    assert data["digest"] == actual.recipe.digest()


@pytest.mark.parametrize(
    ("arguments", "says", "hint"),
    [
        (("show", "hyperr"), "there is no recipe 'hyperr'", "did you mean"),
        (("show", "hyper", "--steps", "3"), "--steps: field sampling.steps: no checkpoint is", None),
        (("show", "hyper", "--set", "guidance.txet=1"), "field guidance.txet: unknown key", "guidance.text"),
        (("show", "hyper", "--stack", "/nowhere"), "--stack /nowhere: there is no such folder", None),
        (("validate", "hyper", "gone.yaml"), "there is no recipe file gone.yaml", None),
    ],
)
def test_errors_are_reported_with_exit_code_two(run, arguments, says, hint):
    code, _, err = run(*arguments)
    assert code == 2
    assert says in err
    assert hint is None or hint in err
    assert "Traceback" not in err


def test_errors_as_json(run):
    code, out, _ = run("show", "hyper", "--set", "steps=3", "--json")
    data = json.loads(out)
    assert (code, data["ok"], data["error"]["kind"], data["error"]["code"]) == (2, False, "recipe", 2)


def test_validate_goes_through_all(run, tmp_path):
    good, bad, worse = (tmp_path / name for name in ("good.yaml", "bad.yaml", "worse.yaml"))
    good.write_text("extends: hyper\n")
    bad.write_text("extends: hyper\nguidance:\n  txet: 1\n")
    worse.write_text("a: [\n")
    code, out, err = run("validate", good, bad, "pocket", worse)
    assert code == 2
    assert out == f"{good}: valid\npocket: valid\n"
    assert f"{bad}:3: field guidance.txet: unknown key" in err
    assert f"{worse}:2: is not valid YAML" in err
    code, out, _ = run("validate", good, bad, "--json")
    data = json.loads(out)
    assert code == 2
    assert [row["ok"] for row in data["recipes"]] == [True, False]
    assert data["recipes"][1]["problems"] == [f"{bad}:3: field guidance.txet: unknown key"]
    code, out, err = run("validate", *[info.name for info in list_recipes()], "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["ok"] is True


PROBE = """
import sys
from fastface_cli import cli
code = cli.run(sys.argv[1:])
heavy = {"torch", "diffusers", "transformers", "numpy", "huggingface_hub", "insightface", "cv2"}
sys.exit(f"exit {code}, imported {heavy & set(sys.modules)}" if code or heavy & set(sys.modules) else 0)
"""


@pytest.mark.parametrize("arguments", [["list"], ["show", "hyper", "--resolved"], ["validate", "pocket"]])
def test_recipes_import_nothing_heavy(arguments):
    done = subprocess.run(
        [sys.executable, "-c", PROBE, "recipes", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_completion_reads_no_recipe():
    code = (
        "import sys\nfrom fastface_cli.commands.recipes import complete_recipe\n"
        "assert 'hyper-am1' in complete_recipe('hyp') and 'hyper' in complete_recipe('h')\n"
        "sys.exit('pydantic' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
