"""The only place that prints. stdout: paths, tables, JSON. stderr: progress, logs, hints."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .errors import FastFaceError

if TYPE_CHECKING:  # rich is imported where it is used: `--help` must come at once
    from rich.console import Console
    from rich.progress import Progress

SCHEMA = 1
"""Version of every JSON object printed by `--json`."""


def _plain() -> bool:
    return "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"


def out() -> Console:
    """Console of results."""
    from rich.console import Console

    return Console(no_color=_plain() or None, highlight=False, soft_wrap=True)


def err() -> Console:
    """Console of progress, logs and hints."""
    from rich.console import Console

    return Console(stderr=True, no_color=_plain() or None, highlight=False, soft_wrap=True)


def line(text: str) -> None:
    """One line of result on stdout, exactly as given."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """One line for the person who watches, on stderr."""
    err().print(text, markup=False)


def show_logs() -> None:
    """Print what the library logs, one line each, on stderr."""
    import logging

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note(record.getMessage())

    logger = logging.getLogger("fastface_cli")
    if not any(type(handler).__name__ == "Notes" for handler in logger.handlers):
        logger.addHandler(Notes())


def print_json(value: dict[str, Any]) -> None:
    """One versioned JSON object on stdout."""
    value = {"schema": SCHEMA, **value}
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # file names that are no text, terminals that know few letters
        text = json.dumps(value)
    line(text)


def print_table(
    title: str, columns: Iterable[str], rows: Iterable[Iterable[str]], *, aside: bool = False
) -> None:
    """A table on stdout, or `aside` on stderr; whole cells even when piped. A `[` in a name is a `[`."""
    from rich.table import Table
    from rich.text import Text

    console = err() if aside else out()
    table = Table(title=Text(title) if title else None, title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    if not console.is_terminal:
        console.width = 200
    console.print(table)


def print_finding(level: str, subject: str, message: str, command: str | None) -> None:
    """One line of a report on stdout: what was looked at, what was found, and the command that mends it."""
    from rich.table import Table
    from rich.text import Text

    console = out()
    color = {"ok": "green", "warning": "yellow", "failure": "bold red"}[level]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=7)
    grid.add_column(width=14)
    grid.add_column(overflow="fold")
    grid.add_row(Text(level, style=color), subject, Text(message))
    if not console.is_terminal:
        console.width = 1000
    console.print(grid)
    if command is not None:  # unbroken, whatever the width: it is made to be copied
        console.print(Text(" " * 25 + command, style="cyan"), crop=False, overflow="ignore", no_wrap=True)


def print_error(error: FastFaceError) -> None:
    """One sentence, a blank line, a hint."""
    console = err()
    console.print("[red]error[/red]: ", end="")
    console.print(error.message, markup=False)
    if error.hint:
        console.print()
        console.print("[cyan]hint[/cyan]: ", end="")
        console.print(error.hint, markup=False)


def transfer_progress(*, quiet: bool = False) -> Progress:
    """Progress of bytes; silent where stderr is not a terminal."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = err()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=quiet or not console.is_terminal,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # a pipe or a file gets its lines past the display
    )


def step_progress(*, quiet: bool = False) -> Progress:
    """Progress of counted work; silent where stderr is not a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = err()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=quiet or not console.is_terminal,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # a pipe or a file gets its lines past the display
    )
