"""The Typer app. No heavy package is imported here."""

from __future__ import annotations

import io
import os
import signal
import sys
from types import FrameType
from typing import Annotated, Any

import typer

from . import __version__, console
from .commands import bench, cache, doctor, download, evaluate, generate, licenses, recipes, serve
from .commands.panels import PanelledCommand, SuggestingGroup
from .errors import FastFaceError, UsageError, unexpected

app = typer.Typer(
    name="fastface",
    cls=SuggestingGroup,
    help="Put a person into an image in four diffusion steps.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes take longer to import than all the rest of --help
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(name="generate", cls=PanelledCommand, short_help="Put a person into an image.")(generate.generate)
app.command(name="download", short_help="Download and verify models.")(download.download)
app.command(name="serve", short_help="Serve a page and APIs over HTTP.")(serve.serve)
app.command(name="bench", short_help="Measure the time per image.")(bench.bench)
app.command(name="doctor", short_help="Check this machine and print the command that fixes each problem.")(
    doctor.doctor
)
app.command(name="licenses", short_help="Show the licenses of a recipe's models.")(licenses.licenses)
app.command(name="licences", hidden=True)(licenses.licenses)
app.add_typer(evaluate.app, name="eval")
app.add_typer(recipes.app, name="recipes")
app.add_typer(cache.app, name="cache")


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM; not KeyboardInterrupt, which Typer would turn into exit code 1."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        self.exit_code = 128 + number


class _StoppedError(FastFaceError):
    """How an interrupted command is reported."""

    kind = "interrupted"

    def __init__(self, exit_code: int) -> None:
        super().__init__("interrupted")
        self.exit_code = exit_code


def _interrupt(number: int, _frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one ends the process immediately
    raise Interrupted(number)


def _version(value: bool) -> None:
    if value:
        console.line(f"fastface {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def run(argv: list[str] | None = None) -> int:
    """Run the command line in this process and return the exit code.

    Args:
        argv: arguments without the program's name; None takes them from `sys.argv`.
    """
    arguments = sys.argv[1:] if argv is None else argv
    try:
        with console.log_notes():
            app(args=arguments, prog_name="fastface")
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        if code == UsageError.exit_code and "--json" in arguments:
            _print_failure(arguments, UsageError(_typer_message(exit_)), {})
        return code
    except BrokenPipeError:
        return _closed_pipe()
    except (Interrupted, Exception) as error:
        if os.environ.get("FASTFACE_DEBUG") == "1" and not isinstance(error, Interrupted):
            raise
        failure = _failure(error)
        try:
            if "--json" in arguments:
                _print_failure(arguments, failure, getattr(error, "partial", {}))
            if isinstance(error, Interrupted):
                console.note("interrupted")
            else:
                console.print_error(failure)
        except OSError:  # stdout is closed or the disk is full: nothing can be reported
            _closed_pipe()
        return failure.exit_code
    return 0


def _failure(error: BaseException) -> FastFaceError:
    """Return any exception as the error to report."""
    if isinstance(error, FastFaceError):
        return error
    if isinstance(error, Interrupted):
        return _StoppedError(error.exit_code)
    return unexpected(error)


def _print_failure(arguments: list[str], error: FastFaceError, partial: dict[str, Any]) -> None:
    """Print the JSON object of a failed command; for `generate` it always lists the images."""
    empty: dict[str, Any] = {"images": []} if arguments[:1] == ["generate"] else {}
    console.print_json({"ok": False, **empty, **partial, "error": error.record()})


def _typer_message(exit_: SystemExit) -> str:
    """Return Typer's message about the arguments, in one line."""
    format_message = getattr(exit_.__context__, "format_message", None)
    return " ".join(str(format_message()).split()) if format_message else "the arguments are not valid"


def _closed_pipe() -> int:
    """Exit without a message because stdout is closed, as `head` expects."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def main() -> None:
    """Entry point of the `fastface` command."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  for the rest of the process
    if sys.stdout.errors == "strict" and isinstance(sys.stdout, io.TextIOWrapper):
        # An image is written before its name is printed: a name that is not text must not end the run.
        utf8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
        sys.stdout.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    # Libraries print messages for developers while they are imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    sys.exit(run())
