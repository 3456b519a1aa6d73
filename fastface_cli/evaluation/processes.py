"""Processes of this machine that answer: a request in, an answer out, until the other end closes."""

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

# A fork would take over half-initialised CUDA and threads' locks.
_SPAWN = get_context("spawn")


@dataclass(frozen=True)
class Broken:
    """An answer: no request can be answered at all. Holds the record of a FastFaceError."""

    error: dict[str, Any]

    def raised(self) -> FastFaceError:
        """The error of the other process, with its exit code."""
        error = FastFaceError(self.error["message"], self.error["hint"])
        error.exit_code, error.kind = self.error["code"], self.error["kind"]
        return error


class GoneError(Exception):
    """The process has ended; the text says how."""


class Answerer:
    """A process that answers requests in order.

    Args:
        prepare: called there at the start; makes what answers. Picklable, and raises nothing.
        last: the process gives way to all others where there are more of them than cores.
    """

    def __init__(self, prepare: Callable[[], Answer], *, last: bool = False) -> None:
        self._pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(theirs, prepare, last), daemon=True)
        self._process.start()
        theirs.close()
        self._answered = False

    @property
    def ends(self) -> tuple[Any, Any]:
        """For `multiprocessing.connection.wait`: one of them is ready when `receive` need not wait."""
        # The pipe alone is not enough: Windows does not close it for a process that dies while it starts.
        return self._pipe, self._process.sentinel

    def send(self, request: Any) -> None:
        """Put a request; nothing is said here if the process has ended."""
        with contextlib.suppress(OSError):  # `receive` finds the pipe closed
            self._pipe.send(request)

    def receive(self) -> Any:
        """Wait for the next answer.

        Raises:
            GoneError: there will be none.
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
        """Have the process end, whatever it is at; `receive` then raises, if no answer lies in the pipe."""
        self._process.terminate()

    def close(self) -> None:
        """End the process and wait until it has ended."""
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
            memory = ", which is how the system ends what takes too much memory" if code == -9 else ""
            return f"ended by {name}{memory}"
        if code == 1 and not self._answered:  # what a new process does first is to import the main script
            return "ended before its work: does the script start it under if __name__ == '__main__'?"
        return f"ended with code {code}"


def _serve(pipe: Connection, prepare: Callable[[], Answer], last: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that we work for
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
            found = answer(request)
        except BaseException as error:  # a library that exits, for one: whoever asked learns why
            found = Broken(error_record(error))
        try:
            pipe.send(found)
        except OSError:
            return
        except Exception as error:  # it cannot be pickled
            pipe.send(Broken(error_record(error)))


def _end_with_parent() -> None:
    """Nobody reads the answer of an orphan, and the next run wants its memory."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
