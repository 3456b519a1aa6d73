"""The only place that prints. stdout: paths, tables, JSON. stderr: progress, logs, hints."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from .errors import FastFaceError

if TYPE_CHECKING:  # rich is imported where it is used: `--help` must come at once
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn, TaskID

    from .store import ProgressObserver
    from .store.progress import StoreEvent

SCHEMA = 1
"""Version of every JSON object printed by `--json`."""


def _plain() -> bool:
    return "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"


_state = {"quiet": False}


def be_quiet(quiet: bool = True) -> None:
    """Print only results and errors from now on, without progress and notes."""
    _state["quiet"] = quiet


def out() -> Console:
    """Console of results."""
    from rich.console import Console

    return Console(no_color=_plain() or None, highlight=False, soft_wrap=True)


def err() -> Console:
    """Console of progress, logs and hints."""
    from rich.console import Console

    return Console(stderr=True, no_color=_plain() or None, highlight=False, soft_wrap=True)


# Control characters, which include the escape sequences of terminals, and marks that reorder text.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def safe(text: str) -> str:
    """Escape characters that control a terminal: names and metadata come from files of other people.

    The escapes are those of JSON, so that escaped JSON has the same meaning.
    """
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def line(text: str) -> None:
    """One line of result on stdout; exactly as given unless stdout is a terminal."""
    sys.stdout.write((safe(text) if sys.stdout.isatty() else text) + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """One line of progress or advice on stderr."""
    if _state["quiet"]:
        return
    err().print(safe(text), markup=False)


class _NoteHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


@contextlib.contextmanager
def log_notes() -> Iterator[None]:
    """Print the log messages of the library on stderr."""
    be_quiet(False)
    logger, handler = logging.getLogger(__package__), _NoteHandler()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a handler of another library must not print them twice
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


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
    """A table on stdout, or with `aside` on stderr. Cells are never cut, and `[` is not markup."""
    from rich.table import Table
    from rich.text import Text

    console = err() if aside else out()
    table = Table(title=Text(safe(title)) if title else None, title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(Text(safe(column)), overflow="fold")
    for row in rows:
        table.add_row(*(Text(safe(cell)) for cell in row))
    if not console.is_terminal:
        console.width = 200
    console.print(table)


def print_finding(level: str, subject: str, message: str, command: str | None) -> None:
    """One line of a report on stdout: subject, message, and the command that fixes it."""
    from rich.table import Table
    from rich.text import Text

    console = out()
    color = {"ok": "green", "warning": "yellow", "failure": "bold red"}[level]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=7)
    grid.add_column(width=14)
    grid.add_column(overflow="fold")
    grid.add_row(Text(level, style=color), Text(safe(subject)), Text(safe(message)))
    if not console.is_terminal:
        console.width = 1000
    console.print(grid)
    if command is not None:  # unbroken, whatever the width: it is made to be copied
        console.print(
            Text(" " * 25 + safe(command), style="cyan"), crop=False, overflow="ignore", no_wrap=True
        )


def print_error(error: FastFaceError) -> None:
    """One sentence, a blank line, a hint."""
    console = err()
    console.print("[red]error[/red]: ", end="")
    console.print(safe(error.message), markup=False)
    if error.hint:
        console.print()
        console.print("[cyan]hint[/cyan]: ", end="")
        console.print(safe(error.hint), markup=False)


def _progress(*columns: ProgressColumn, quiet: bool = False) -> Progress:
    """A progress display on stderr with a description; silent where stderr is not a terminal."""
    from rich.progress import Progress, TextColumn

    console = err()
    return Progress(
        TextColumn("{task.description}", markup=False),
        *columns,
        console=console,
        disable=quiet or _state["quiet"] or not console.is_terminal,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # a pipe or a file gets its lines past the display
    )


def transfer_progress(*, quiet: bool = False) -> Progress:
    """Progress of bytes."""
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

    return _progress(BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), quiet=quiet)


def step_progress(*, quiet: bool = False) -> Progress:
    """Progress of counted work."""
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

    return _progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), quiet=quiet)


@contextlib.contextmanager
def spinner(text: str) -> Iterator[None]:
    """Show work of unknown length."""
    from rich.progress import SpinnerColumn, TimeElapsedColumn

    with _progress(SpinnerColumn(), TimeElapsedColumn()) as progress:
        progress.add_task(safe(text), total=None)
        yield


@contextlib.contextmanager
def download_bars(*, quiet: bool = False) -> Iterator[ProgressObserver]:
    """Show a progress bar for the current file and one for all files; yields the observer for `Store`."""
    from .store.progress import DownloadProgress, DownloadStarted, FileFinished

    progress = transfer_progress(quiet=quiet)
    bars: dict[str, TaskID] = {}
    received: dict[str, int] = {}
    overall: list[TaskID] = []

    def observe(event: StoreEvent) -> None:
        if isinstance(event, DownloadStarted):
            overall.append(progress.add_task("all files", total=event.total or None))
            return
        if isinstance(event, FileFinished):
            progress.remove_task(bars.pop(event.name))
            return
        downloads = isinstance(event, DownloadProgress)
        if event.name not in bars:
            label = safe(event.name if downloads else f"verifying {event.name}")
            bars[event.name] = progress.add_task(label, total=event.total or None)
            received[event.name] = event.done  # earlier bytes are not part of the overall total
        progress.update(bars[event.name], completed=event.done)
        if downloads and overall:
            progress.advance(overall[0], event.done - received[event.name])
            received[event.name] = event.done

    with progress:
        yield observe
