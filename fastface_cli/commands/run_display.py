"""Show that a run is in progress: bars and a spinner on a terminal, otherwise a line every 30 seconds."""

from __future__ import annotations

import contextlib
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING

from .. import console

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from ..store import ProgressObserver
    from ..store.progress import StoreEvent

INTERVAL = 30.0
"""Seconds between two lines without a terminal."""


class RunDisplay:
    """Shows the current stage of a run on stderr while the context is open."""

    def __init__(self, *, interval: float = INTERVAL) -> None:
        self.interval = interval
        self._began = time.monotonic()
        self._stage = "starting"
        self._closed = threading.Event()
        self._heartbeat: threading.Thread | None = None
        self._shown = contextlib.ExitStack()
        """The bar or spinner on the terminal: one at a time."""
        self._observer: ProgressObserver | None = None
        self._steps: tuple[Progress, TaskID] | None = None

    def __enter__(self) -> RunDisplay:
        if not console.err().is_terminal:
            self._heartbeat = threading.Thread(target=self._beat, daemon=True)
            self._heartbeat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._shown.close()
        if self._heartbeat is not None:
            self._heartbeat.join()

    def working(self, stage: str) -> None:
        """Show a spinner with the name of a stage of unknown length."""
        self._show_next(stage)
        self._shown.enter_context(console.spinner(stage))

    def transfer(self, event: StoreEvent) -> None:
        """Show the progress of downloads."""
        if self._observer is None:
            self._show_next("downloading models")
            self._observer = self._shown.enter_context(console.download_bars())
        self._observer(event)

    def steps(self, done: int, total: int) -> None:
        """Show the number of finished sampling steps."""
        self._stage = f"{done} of {total} steps"
        if self._steps is None:
            self._show_next(self._stage)
            progress = self._shown.enter_context(console.step_progress())
            self._steps = progress, progress.add_task("steps")
        progress, bar = self._steps
        progress.update(bar, total=total, completed=done)

    def _show_next(self, stage: str) -> None:
        self._shown.close()
        self._observer = self._steps = None
        self._stage = stage

    def _beat(self) -> None:
        while not self._closed.wait(self.interval):
            console.note(f"{self._stage} ({time.monotonic() - self._began:.0f} s)")
