"""The ASGI application: APIs, page, and errors as JSON."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartParser
from starlette.staticfiles import StaticFiles

from .. import __version__
from ..errors import (
    DeviceError,
    FastFaceError,
    ModelUnavailableError,
    NoFaceError,
    UsageError,
    unexpected,
)
from .native import native_api
from .notices import routed
from .openai_images import as_openai, openai_api
from .runs import BusyError, ConflictError, MissingError
from .security import ASGIApp, Guard
from .studio import Studio

log = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"

STATUS: tuple[tuple[type[FastFaceError], int], ...] = (
    (BusyError, 429),
    (ConflictError, 409),
    (MissingError, 404),
    (NoFaceError, 422),
    (UsageError, 400),
    (ModelUnavailableError, 503),
    (DeviceError, 503),
)
"""The HTTP status of each kind of error; others are 500."""


def make_application(studio: Studio, *, token: str | None = None, check_host: bool = True) -> ASGIApp:
    """The guarded application.

    Args:
        studio: started and stopped with the application.
        token: that clients must send; None is none.
        check_host: see `Guard`.
    """
    return Guard(_application(studio), studio.limits, token, check_host=check_host)


def openapi_schema(studio: Studio) -> dict[str, Any]:
    """The OpenAPI schema of the native API, as served at /openapi.json."""
    return _application(studio).openapi()


def _application(studio: Studio) -> FastAPI:
    # Uploads stay in memory, where they are gone with the request; by default, Starlette writes larger ones
    # to temporary files.
    MultiPartParser.spool_max_size = studio.limits.body_bytes + 1

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with routed(studio.worker):
            studio.start()
            try:
                yield
            finally:
                studio.stop()

    # The interactive documentation of FastAPI loads scripts from the web.
    app = FastAPI(
        title="fastface",
        version=__version__,
        description="Put a person into an image in four diffusion steps.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.include_router(native_api(studio))
    app.include_router(openai_api(studio))
    _add_page(app)
    _add_errors(app)
    return app


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    app.mount("/static", StaticFiles(directory=PAGE), name="static")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(FastFaceError)
    def failed(http: Request, error: FastFaceError) -> JSONResponse:
        return _failure(http, error)

    @app.exception_handler(RequestValidationError)
    def invalid(http: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part)[:60] for part in first["loc"][1:]) or "the request"
        return _failure(http, UsageError(f"{where}: {first['msg']}", "see /openapi.json for all fields"))

    @app.exception_handler(HTTPException)
    def refused(http: Request, error: HTTPException) -> JSONResponse:
        failure = UsageError(str(error.detail).lower())
        return _failure(http, failure, error.status_code)

    @app.exception_handler(Exception)
    def broken(http: Request, error: Exception) -> JSONResponse:
        log.error("a request failed unexpectedly", exc_info=error)
        hidden = FastFaceError(f"unexpected {type(unexpected(error)).__name__}", "see the server's log")
        return _failure(http, hidden)


def _failure(http: Request, error: FastFaceError, status: int | None = None) -> JSONResponse:
    record = error.record()
    if http.url.path.startswith("/v1/"):
        record = as_openai(record)
    code = status or next((code for kind, code in STATUS if isinstance(error, kind)), 500)
    headers = {"Retry-After": str(error.seconds)} if isinstance(error, BusyError) else None
    return JSONResponse({"error": record}, code, headers)
