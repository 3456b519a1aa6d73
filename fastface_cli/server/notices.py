"""Messages of the library about a run become events of that run; none about people is in the log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from .worker import Worker

LIBRARY = __package__.partition(".")[0]
LOGGED = (f"{LIBRARY}.server", f"{LIBRARY}.store")
"""Loggers whose messages are about the machine, never about a photo or a prompt."""
THREADS = ("fastface-", "writing")
"""Names of the threads on which a run works."""


class NoticeHandler(logging.Handler):
    """Publishes messages about the current run as its `notice` events."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(logging.WARNING)
        self._worker = worker

    def emit(self, record: logging.LogRecord) -> None:
        """Publish a message."""
        run = self._worker.current
        if run is not None and str(record.threadName).startswith(THREADS) and not is_logged(record):
            run.publish("notice", {"message": record.getMessage()})


def is_logged(record: logging.LogRecord) -> bool:
    """Whether a message belongs into the log of the server."""
    return record.name.startswith(LOGGED) or not record.name.startswith(LIBRARY)


@contextmanager
def routed(worker: Worker) -> Iterator[None]:
    """Route messages inside the context."""
    logger = logging.getLogger(LIBRARY)
    handlers, notices = list(logger.handlers), NoticeHandler(worker)
    for handler in handlers:
        handler.addFilter(is_logged)
    logger.addHandler(notices)
    try:
        yield
    finally:
        logger.removeHandler(notices)
        for handler in handlers:
            handler.removeFilter(is_logged)
