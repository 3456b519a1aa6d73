"""`fastface doctor`: check this machine and print the command that fixes each problem."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .. import console
from ..errors import ModelUnavailableError, UsageError
from . import options

if TYPE_CHECKING:
    from ..doctor.finding import Finding


def doctor(
    recipe: options.RecipeOption = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="Replace packages that overwrite each other (ONNX Runtime, OpenCV).")
    ] = False,
    offline: options.OfflineOption = False,
    online: Annotated[
        bool,
        typer.Option("--online", help="Only ask the servers for every pinned file; download nothing."),
    ] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Check this machine and print the command that fixes each problem.

    The exit code is 0 only if the recipe can run here.

    Example: fastface doctor --recipe pocket
    """
    if online and offline:
        raise UsageError("--online and --offline exclude each other", "leave one of them out")
    if online:
        _check_pins(as_json=as_json)
        return
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


def _check_pins(*, as_json: bool) -> None:
    from ..doctor.pins import check_pins
    from ..store import load_manifest

    with console.spinner("asking for every pinned file"):
        pins = check_pins(load_manifest().values())
    bad = [pin for pin in pins if pin.problem]
    report = {"pins": [pin.record() for pin in pins]}
    if not as_json:
        rows = [
            [pin.artifact, pin.path, pin.problem or ("ok" if pin.hash_seen else "ok, hash not named")]
            for pin in pins
        ]
        console.print_table("", ["model", "file", "answer"], rows)
        console.line(f"{len(pins) - len(bad)} of {len(pins)} pinned files are available as pinned")
    if bad:
        error = ModelUnavailableError(
            f"{len(bad)} of {len(pins)} pinned files are not available as pinned: {bad[0].problem}",
            "check the network with `fastface doctor`",
        )
        error.partial = report
        raise error
    if as_json:
        console.print_json({"ok": True, **report, "error": None})


def _failure(name: str, failures: list[Finding], report: dict[str, object]) -> Exception:
    """Return the first failure as the error that `generate` would raise."""
    first = failures[0]
    others = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    error = first.error(f"{name} cannot run here: {first.message}{others}", first.command)
    error.partial = report
    return error
