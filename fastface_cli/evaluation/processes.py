"""Worker processes of this machine: request in, answer out, until the pipe is closed."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

from ..errors import FastFaceError
from .maker import error_record

Answer: TypeAlias = Callable[[Any], Any]

# A fork would inherit half-initialized CUDA and the locks of other threads.
_SPAWN = get_context("spawn")


@dataclass(frozen=True)
class Broken:
    """The answer of a process that cannot handle any request; contains the record of a FastFaceError."""

    error: dict[str, Any]

    def raised(self) -> FastFaceError:
        """Return the error of the other process, with its exit code."""
        error = FastFaceError(self.error["message"], self.error["hint"])
        error.exit_code, error.kind = self.error["code"], self.error["kind"]
        return error


class GoneError(Exception):
    """The process has ended; the message says why."""


class Answerer:
    """A process that answers requests in order.

    Args:
        prepare: called once in the process; returns the function that answers. Picklable, must not raise.
        last: run the process at low priority.
    """

    def __init__(self, prepare: Callable[[], Answer], *, last: bool = False) -> None:
        self._pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(theirs, prepare, last), daemon=True)
        self._process.start()
        theirs.close()
        self._answered = False

    @property
    def ends(self) -> tuple[Any, Any]:
        """For `multiprocessing.connection.wait`: one of them is ready when `receive` would not block."""
        # The pipe alone is not enough: Windows does not close it if a process crashes during start-up.
        return self._pipe, self._process.sentinel

    def send(self, request: Any) -> None:
        """Send a request. Does not raise if the process has ended; `receive` does."""
        with contextlib.suppress(OSError):  # `receive` reports the closed pipe
            self._pipe.send(request)

    def receive(self) -> Any:
        """Wait for the next answer.

        Raises:
            GoneError: the process has ended without an answer.
        """
        try:
            if self._pipe not in connection.wait(self.ends):
                raise EOFError
            answer = self._pipe.recv()
        except (EOFError, OSError):
            raise GoneError(self._cause()) from None
        self._answered = True
        return answer

    def terminate(self) -> None:
        """Terminate the process; `receive` then raises unless an answer is already in the pipe."""
        self._process.terminate()

    def close(self) -> None:
        """Terminate the process and wait for its end."""
        self._pipe.close()
        self._process.terminate()
        self._process.join(5)
        self._process.kill()
        self._process.join()

    def _cause(self) -> str:
        self._process.join(5)
        code = self._process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            memory = " (the system kills processes that use too much memory)" if code == -9 else ""
            return f"ended by {name}{memory}"
        if code == 1 and not self._answered:  # a new process first imports the main script
            return "ended at start-up: does the script guard its start with if __name__ == '__main__'?"
        return f"ended with code {code}"


def _serve(pipe: Connection, prepare: Callable[[], Answer], last: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if last and sys.platform != "win32":
        os.nice(10)
    answer = prepare()
    while True:
        try:
            request = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            result = answer(request)
        except BaseException as error:  # also SystemExit of a library: report it to the caller
            result = Broken(error_record(error))
        try:
            pipe.send(result)
        except OSError:
            return
        except Exception as error:  # it cannot be pickled
            pipe.send(Broken(error_record(error)))


def _end_with_parent() -> None:
    """Exit with the parent: an orphan would only block memory that the next run needs."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
