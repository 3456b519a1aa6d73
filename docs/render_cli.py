"""Writes docs/cli.md from the help texts of the command line: python docs/render_cli.py"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from fastface_cli.cli import app

PAGE = Path(__file__).with_name("cli.md")
WIDTH = 100
"""Columns of the help texts, whatever terminal this runs in."""

HEAD = """\
# The command line

The help texts of every command, as `fastface COMMAND --help` prints them; written by
`python docs/render_cli.py`, and a test keeps the two equal.

What changes pixels comes from recipes and flags alone. Machine settings (`home`, `device`, `recipe`,
`verbosity`) come from `~/.config/fastface/config.yaml` or from `FASTFACE_HOME`, `FASTFACE_DEVICE`,
`FASTFACE_RECIPE`, `FASTFACE_VERBOSITY`. With `--json` a command prints one object with `schema`, `ok` and
`error`.

`fastface --install-completion` teaches your shell to complete commands, options, recipes, models and the
fields of `--set`.
"""


def render() -> str:
    """The whole page."""
    os.environ["COLUMNS"] = str(WIDTH)
    parts = [HEAD]
    for path, text in help_texts(typer.main.get_command(app), ("fastface",)):
        parts.append(f"## {path}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def help_texts(command: Any, path: tuple[str, ...], parent: Any = None) -> Iterator[tuple[str, str]]:
    """Name and help text of a command and of all below it."""
    settings = {**command.context_settings, "terminal_width": WIDTH, "max_content_width": WIDTH}
    context = command.context_class(command, info_name=path[-1], parent=parent, **settings)
    lines = command.get_help(context).splitlines()
    yield " ".join(path), re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in lines)).strip()
    for name, below in sorted(getattr(command, "commands", {}).items()):
        if not below.hidden:
            yield from help_texts(below, (*path, name), context)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
