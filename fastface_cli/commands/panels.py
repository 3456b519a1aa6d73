"""Help pages whose options are grouped under headings, and a suggestion for a mistyped option."""

from __future__ import annotations

import difflib
from typing import Any

from typer.core import TyperCommand, TyperGroup


class SuggestingGroup(TyperGroup):
    """A group that names the closest option for an unknown one, of any of its commands."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            # NoSuchOption lists up to three options that resemble the given one.
            possibilities = getattr(error, "possibilities", None)
            closest = difflib.get_close_matches(getattr(error, "option_name", ""), possibilities or (), n=1)
            if closest:
                error.message = f"{error.message}. Did you mean {closest[0]}?"  # type: ignore[attr-defined]
                error.possibilities = None  # type: ignore[attr-defined]
            raise


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
