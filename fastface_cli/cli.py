"""The Typer app: flags in, one function call out. Nothing heavy is imported here."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Annotated, Any

import typer

from . import __version__, console
from .commands import cache, download, generate, recipes
from .errors import FastFaceError, UsageError

app = typer.Typer(
    name="fastface",
    help="Put a person into a picture in four diffusion steps.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes take longer to import than all the rest of --help
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(name="generate", short_help="Put a person into a picture.")(generate.generate)
app.command(name="download", short_help="Fetch and check models.")(download.download)
app.add_typer(recipes.app, name="recipes")
app.add_typer(cache.app, name="cache")


class _Interrupted(BaseException):
    """Ctrl-C; not KeyboardInterrupt, which Typer would turn into exit code 1."""


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise _Interrupted


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
        app(args=arguments, prog_name="fastface")
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        if code == UsageError.exit_code and "--json" in arguments:
            # Typer has said on stderr what is wrong with the arguments.
            console.print_json({"ok": False, **_failure(UsageError("the arguments are not valid"))})
        return code
    except _Interrupted:
        console.note("interrupted")
        return 130
    except FastFaceError as error:
        if os.environ.get("FASTFACE_DEBUG") == "1":
            raise
        if "--json" in arguments:
            console.print_json({"ok": False, **_failure(error)})
        console.print_error(error)
        return error.exit_code
    return 0


def _failure(error: FastFaceError) -> dict[str, Any]:
    return {
        **error.partial,
        "error": {"kind": error.kind, "code": error.exit_code, "message": error.message, "hint": error.hint},
    }


def main() -> None:
    """Entry point of the `fastface` command."""
    signal.signal(signal.SIGINT, _interrupt)
    # Libraries say while they are imported what only a developer wants to know.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    sys.exit(run())
