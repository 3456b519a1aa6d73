"""`fastface doctor`: check this machine and print the command that fixes each problem."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .. import console
from . import options

if TYPE_CHECKING:
    from ..doctor.finding import Finding


def doctor(
    recipe: options.RecipeOption = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="Replace packages that overwrite each other (ONNX Runtime, OpenCV).")
    ] = False,
    offline: options.OfflineOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Check this machine and print the command that fixes each problem.

    The exit code is 0 only if the recipe can run here.

    Example: fastface doctor --recipe pocket
    """
    from ..doctor.checks import examine
    from ..doctor.face_libraries import repair_packages
    from ..doctor.machine import inspect_machine
    from ..recipe.files import load_recipe
    from ..settings import load_settings

    settings = load_settings()
    recipe_name = recipe or settings.recipe
    loaded = load_recipe(recipe_name).recipe
    machine = inspect_machine()
    repaired = repair_packages(machine, console.note) if fix else []
    if fix and not repaired:
        console.note("--fix has nothing to replace: no packages overwrite each other")
    findings = examine(loaded, recipe_name, settings, machine, offline=True if offline else None)
    failures = [finding for finding in findings if finding.level == "failure"]
    report: dict[str, object] = {
        "recipe": loaded.name,
        "mended": repaired,
        "findings": [finding.record() for finding in findings],
    }
    if not as_json:
        for finding in findings:
            console.print_finding(finding.level, finding.check, finding.message, finding.command)
        if any(finding.fixable for finding in findings):
            console.line("`fastface doctor --fix` runs the commands that replace packages")
        if not failures:
            console.line(f"{loaded.name} can run here")
    if failures:
        raise _failure(loaded.name, failures, report)
    if as_json:
        console.print_json({"ok": True, **report, "error": None})


def _failure(name: str, failures: list[Finding], report: dict[str, object]) -> Exception:
    """Return the first failure as the error that `generate` would raise."""
    first = failures[0]
    others = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    error = first.error(f"{name} cannot run here: {first.message}{others}", first.command)
    error.partial = report
    return error
