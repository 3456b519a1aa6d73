"""Help pages whose options are grouped under headings."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand


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
