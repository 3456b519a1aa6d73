"""Processes of this machine that answer: a request in, an answer out, until the other end closes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

from ..errors import FastFaceError

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
        self.pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(theirs, prepare, last), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, request: Any) -> None:
        """Put a request; nothing is said here if the process has ended."""
        with contextlib.suppress(OSError):  # `receive` finds the pipe closed
            self.pipe.send(request)

    def receive(self) -> Any:
        """Wait for the next answer.

        Raises:
            GoneError: there will be none.
        """
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            raise GoneError(self._cause()) from None

    def terminate(self) -> None:
        """Have the process end, whatever it is at; `receive` then raises."""
        self._process.terminate()

    def close(self) -> None:
        """End the process and wait until it has ended."""
        self.pipe.close()
        self._process.terminate()
        self._process.join()

    def _cause(self) -> str:
        self._process.join(5)
        code = self._process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            memory = ", which is how the system ends what takes too much memory" if code == -9 else ""
            return f"ended by {name}{memory}"
        if code == 1:  # answering raises nothing; what a new process does first is to import the main script
            return "ended before its work: does the script start it under if __name__ == '__main__'?"
        return f"ended with code {code}"


def _serve(pipe: Connection, prepare: Callable[[], Answer], last: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that we work for
    if last and sys.platform != "win32":
        os.nice(10)
    answer = prepare()
    try:
        while True:
            pipe.send(answer(pipe.recv()))
    except (EOFError, OSError):
        return
