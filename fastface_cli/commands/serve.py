"""`fastface serve`: a page in the browser and APIs over HTTP, with models that stay loaded."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import console
from ..errors import FastFaceError, UsageError
from . import options

if TYPE_CHECKING:
    import socket

    from ..server.studio import Studio

EXTRA = ("fastapi", "uvicorn", "sse_starlette", "python_multipart")
"""Packages of the extra `serve`."""


def serve(
    recipe: options.RecipeOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")
    ] = 8188,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="FASTFACE_TOKEN",
            help="Token that clients must send; generated if --host is not this machine alone.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for images and saved identities; without it they are kept in memory.",
            show_default=False,
        ),
    ] = None,
    max_queue: Annotated[int, typer.Option(min=1, help="Maximum number of waiting runs.")] = 32,
    keep: Annotated[
        str, typer.Option(help="How long results are kept: a number of runs, or hours such as 24h.")
    ] = "100",
    idle_unload: Annotated[
        float | None,
        typer.Option(min=0.01, metavar="MINUTES", help="Unload the models after this time without a run."),
    ] = None,
    allow_set: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD", help="Recipe field that clients may set, in addition; repeatable."),
    ] = None,
    low_memory: options.LowMemoryOption = None,
    compile_: options.CompileOption = False,
    accelerate: options.AccelerateOption = None,
    device: options.DeviceOption = None,
    dtype: options.DtypeOption = None,
    offline: options.OfflineOption = False,
) -> None:
    """Serve a page and APIs over HTTP; models stay loaded.

    The server listens on this machine alone unless --host names another address. It then requires a token.

    Examples:

      fastface serve --recipe pocket --open

      fastface serve --recipe hyper-fastface --host 0.0.0.0 -o images/
    """
    _check_packages()
    from ..app.runtime import Runtime
    from ..models.acceleration import parse
    from ..server.limits import SAFE_FIELDS, Limits, parse_keep
    from ..server.security import is_loopback
    from ..server.studio import Studio, StudioOptions
    from ..settings import load_settings

    settings = load_settings()
    runs, hours = parse_keep(keep)
    for field in allow_set or ():
        _check_field(field)
    limits = Limits(
        queue=max_queue, keep_runs=runs, keep_hours=hours, fields=(*SAFE_FIELDS, *(allow_set or ()))
    )
    changes = [*(["compile=on"] if compile_ else []), *(accelerate or [])]
    runtime = Runtime(device, dtype, options.saving(low_memory), parse(changes))
    studio = Studio(
        StudioOptions(recipe or settings.recipe, limits, output, idle_unload),
        runtime,
        settings,
        offline=True if offline else None,
    )
    local = is_loopback(host)
    if token is None and not local:
        import secrets

        token = secrets.token_urlsafe(24)
    _listen(studio, host, port, token, local=local, open_page=open_)


def _check_packages() -> None:
    """Report the missing extra.

    Raises:
        UsageError: a package is not installed.
    """
    from importlib.util import find_spec

    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"`fastface serve` needs {', '.join(missing)}", "install them: pip install 'fastface-cli[serve]'"
        )


def _check_field(field: str) -> None:
    """Refuse a field that no recipe has, or that names a model.

    Raises:
        UsageError: see above.
    """
    from ..errors import nearest
    from ..recipe.problems import fields

    known = [
        name
        for name in fields()
        if name.partition(".")[0] in ("sampling", "adapter", "guidance", "attention")
    ]
    if field not in known:
        near = nearest(field, known)
        raise UsageError(
            f"--allow-set {field}: clients cannot be allowed to set this field",
            f"did you mean '{near}'?"
            if near
            else "fields of sampling, adapter, guidance and attention can be",
        )


def _bound(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        FastFaceError: the address cannot be used.
    """
    import socket

    # Without the protocol, asyncio would not disable Nagle's algorithm, which delays answers by 40 ms.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if sys.platform != "win32":  # there, it would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise FastFaceError(
            f"cannot listen on {host} port {port}: {error.strerror or error}", "choose another --port"
        ) from error
    return listener


def _listen(studio: Studio, host: str, port: int, token: str | None, *, local: bool, open_page: bool) -> None:
    import uvicorn

    from ..server.application import make_application
    from ..server.security import timed_protocol

    listener = _bound(host, port)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/"
    if token is not None:
        address += f"#token={token}"
    application = make_application(studio, token=token, check_host=local and token is None)
    config = uvicorn.Config(
        application,
        log_level="warning",
        access_log=False,  # addresses of results, and who asked for them, are in no log
        http=timed_protocol(studio.limits.header_seconds),
        ws="none",
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=3,
        limit_concurrency=512,
    )
    console.note(f"serving {studio.options.recipe} on {address}")
    console.note("press Ctrl-C to stop")
    if open_page:
        import webbrowser

        webbrowser.open(address)
    # The server stops in order at the first signal and raises it again afterwards: then it means nothing.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
