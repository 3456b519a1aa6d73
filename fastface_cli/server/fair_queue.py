"""A bounded queue in which clients take turns."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque

from .runs import BusyError, ServedRun

TYPICAL_SECONDS = 5.0
"""Assumed duration of a run before the first one has ended."""


class FairQueue:
    """Waiting runs: each client has its own line, and the lines take turns.

    Args:
        limit: waiting runs of all clients.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.seconds = TYPICAL_SECONDS
        """Mean duration of recent runs."""
        self._lines: OrderedDict[str, deque[ServedRun]] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def put(self, run: ServedRun) -> None:
        """Append a run to its client's line.

        Raises:
            BusyError: the queue is full.
        """
        with self._changed:
            waiting = len(self)
            if waiting >= self.limit:
                raise BusyError(max(1, round(self.seconds * waiting / 2)))
            self._lines.setdefault(run.client, deque()).append(run)
            self._announce()
            self._changed.notify()

    def take(self, seconds: float | None) -> ServedRun | None:
        """The next run; None when `seconds` have passed without one, or the queue is closed."""
        until = None if seconds is None else time.monotonic() + seconds
        with self._changed:
            while not self._lines:
                left = None if until is None else until - time.monotonic()
                if self._closed or (left is not None and left <= 0):
                    return None
                self._changed.wait(left)
            client, line = self._lines.popitem(last=False)
            run = line.popleft()
            if line:
                self._lines[client] = line  # at the end: the other clients are next
            self._announce()
            return run

    def remove(self, run: ServedRun) -> bool:
        """Remove a waiting run; False if it is not waiting."""
        with self._changed:
            line = self._lines.get(run.client)
            if line is None or run not in line:
                return False
            line.remove(run)
            if not line:
                del self._lines[run.client]
            self._announce()
            return True

    def position(self, run: ServedRun) -> int | None:
        """Number of waiting runs ahead of a waiting run."""
        with self._changed:
            order = self._order()
        return next((index for index, other in enumerate(order) if other is run), None)

    def took(self, seconds: float) -> None:
        """Record the duration of a run, for `Retry-After`."""
        self.seconds += 0.2 * (seconds - self.seconds)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def close(self) -> list[ServedRun]:
        """Wake the worker for the last time; return the runs that were waiting."""
        with self._changed:
            self._closed = True
            waiting = self._order()
            self._lines.clear()
            self._changed.notify_all()
        return waiting

    def _order(self) -> list[ServedRun]:
        """Waiting runs in the order in which they will be taken."""
        lines = [list(line) for line in self._lines.values()]
        depth = max(map(len, lines), default=0)
        return [line[index] for index in range(depth) for line in lines if index < len(line)]

    def _announce(self) -> None:
        for position, run in enumerate(self._order()):
            run.publish("queued", {"position": position})
