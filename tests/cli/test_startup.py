"""Commands that only print text import no heavy packages."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.heavy import HEAVY

RUN_AND_LIST_MODULES = """
import sys
from fastface_cli.cli import run
code = run(sys.argv[1:])
print("MODULES", *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
sys.exit(code)
"""


def imported(*arguments: str, code: int = 0) -> set[str]:
    """Return the top-level modules that a process imports for the command."""
    done = subprocess.run(
        [sys.executable, "-c", RUN_AND_LIST_MODULES, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout or code, "the command printed nothing"
    return set(done.stderr.rpartition("MODULES")[2].split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["generate", "--help"],
        ["download", "--help"],
        ["cache", "--help"],
        ["recipes", "list"],
        ["recipes", "list", "--json"],
        ["recipes", "show", "hyper-fastface"],
        ["recipes", "show", "hyper-fastface", "--resolved"],
        ["recipes", "validate", "hyper-fastface"],
    ],
    ids=" ".join,
)
def test_imports_nothing_heavy(arguments: list[str]) -> None:
    modules = imported(*arguments)
    assert "typer" in modules
    assert modules.isdisjoint(HEAVY)


def test_help_builds_no_models_of_settings_or_recipes() -> None:
    """pydantic, yaml and rich cost more than everything else that `--help` does."""
    assert imported("--help").isdisjoint({"pydantic", "yaml", "rich"})


def test_wrong_arguments_import_nothing_heavy() -> None:
    assert imported("generate", "--no-such-option", code=2).isdisjoint(HEAVY)
    assert imported("recipes", "show", "no-such-recipe", code=2).isdisjoint(HEAVY)
