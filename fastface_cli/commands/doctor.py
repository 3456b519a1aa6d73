"""`fastface doctor`: whether a recipe can run here, and the one command that mends what is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .. import console
from .options import RecipeOption

if TYPE_CHECKING:
    from ..doctor.checks import Finding


def doctor(
    recipe: RecipeOption = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="Replace packages that shadow the right one; nothing else.")
    ] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Leave the network alone.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what is right and wrong on this machine; exit code 0 only if the recipe can run here.

    Example: fastface doctor --recipe pocket
    """
    from ..doctor.checks import examine, mend
    from ..doctor.machine import look
    from ..recipe.files import load_recipe
    from ..settings import load_settings

    settings = load_settings()
    named = recipe or settings.recipe
    wanted = load_recipe(named).recipe
    machine = look()
    mended = mend(machine, console.note) if fix else []
    if fix and not mended:
        console.note("no package shadows another: --fix has nothing to replace")
    findings = examine(wanted, named, settings, machine, offline=True if offline else None)
    failures = [finding for finding in findings if finding.level == "failure"]
    report: dict[str, object] = {
        "recipe": wanted.name,
        "mended": mended,
        "findings": [finding.record() for finding in findings],
    }
    if not as_json:
        for finding in findings:
            console.print_finding(finding.level, finding.check, finding.message, finding.mend)
        if not failures:
            console.line(f"{wanted.name} can run here")
    if failures:
        raise _refusal(wanted.name, failures, report)
    if as_json:
        console.print_json({"ok": True, **report, "error": None})


def _refusal(name: str, failures: list[Finding], report: dict[str, object]) -> Exception:
    """The first failure as the error that `generate` would end with."""
    first = failures[0]
    more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    error = first.error(f"{name} cannot run here: {first.message}{more}", first.mend)
    error.partial = report
    return error
