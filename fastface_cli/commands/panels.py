"""Help pages whose options are grouped under headings, and a suggestion for a mistyped option."""

from __future__ import annotations

import difflib
from typing import Any

from typer.core import TyperCommand, TyperGroup


class SuggestingGroup(TyperGroup):
    """A group that says what an unknown option or a stray argument of its commands was meant to be."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            suggestion = _suggestion(error)
            if suggestion:
                error.message = f"{error.message}. {suggestion}"  # type: ignore[attr-defined]
                error.possibilities = None  # type: ignore[attr-defined]
            raise


def _suggestion(error: Exception) -> str | None:
    """What to do about an error of the arguments, in one sentence; None: nothing is known."""
    command = getattr(error, "cmd", None)
    option = getattr(error, "option_name", None)
    if command is None:
        return None
    options = {name for parameter in command.params for name in parameter.opts}
    if option is not None:
        # NoSuchOption lists up to three options that resemble the given one.
        closest = difflib.get_close_matches(option, getattr(error, "possibilities", None) or (), n=1)
        if closest:
            return f"Did you mean {closest[0]}?"
        takes_names = any(parameter.param_type_name == "argument" for parameter in command.params)
        return "Write the recipe without --recipe" if option == "--recipe" and takes_names else None
    if not str(getattr(error, "message", "")).startswith("Got unexpected extra argument"):
        return None
    if "--prompt" in options:
        return "Write --face before a photo, --prompt before text"
    return "Write --recipe before a recipe" if "--recipe" in options else None


class PanelledCommand(TyperCommand):
    """A command that lists options by their `rich_help_panel`, as plain text: rich takes longer to import
    than all the rest of --help."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write one section for each panel, in the order of its first option."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                panel = getattr(parameter, "rich_help_panel", None) or "Options"
                panels.setdefault(panel, []).append(record)
        for panel, records in panels.items():
            with formatter.section(panel):
                formatter.write_dl(records)
