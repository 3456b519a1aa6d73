"""Work behind the scenes: files are written while the device makes the next picture."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

WAITING = 2
"""Jobs that may wait; more of them would only fill the memory."""


class Behind:
    """Does jobs one after the other on a thread of its own; to leave it is to wait for them all.

    What a job raises is raised by a later call, or on leaving.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="writing")
        self._jobs: deque[Future[None]] = deque()

    def do(self, job: Callable[[], None]) -> None:
        """Have a job done; waits while too many wait already."""
        while self._jobs and (self._jobs[0].done() or len(self._jobs) > WAITING):
            self._jobs.popleft().result()
        self._jobs.append(self._pool.submit(job))

    def __enter__(self) -> Behind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while self._jobs:
                found = self._jobs.popleft()
                if error is None:
                    found.result()
                else:
                    found.exception()  # a picture that is made is not lost over what went wrong after it
        finally:
            self._pool.shutdown(cancel_futures=True)
