"""Write files in the background while the device generates the next image."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

WAITING = 2
"""Maximum number of waiting jobs; more would only use memory."""


class Behind:
    """Runs jobs one after another on a background thread. Leaving the context waits for all of them.

    An error of a job is raised by a later call, or on leaving the context.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="writing")
        self._jobs: deque[Future[None]] = deque()

    def do(self, job: Callable[[], None]) -> None:
        """Queue a job. Blocks while too many jobs are waiting."""
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
                future = self._jobs.popleft()
                if error is None:
                    future.result()
                else:
                    future.exception()  # finish writing despite the error, so that no generated image is lost
        finally:
            self._pool.shutdown(cancel_futures=True)
