"""Checks of every request (host, origin, token, size, time) as ASGI middleware, and headers of responses."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from uvicorn.protocols.http.h11_impl import H11Protocol

from .limits import Limits

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

PUBLIC = ("/", "/static/")
"""What needs no token: the page, which contains nothing about the user."""

HEADERS = {
    "content-security-policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self' blob: data:",
            "connect-src 'self'",
            "media-src 'self' blob:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "cache-control": "no-store",
}
"""Set on every response that does not set them itself."""


def is_loopback(host: str) -> bool:
    """Whether an address or name is this machine alone."""
    name = host.strip("[]").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class Guard:
    """Refuses requests before the application reads them.

    Args:
        app: the application.
        limits: of sizes and times.
        token: that clients must send; None is none.
        check_host: accept only `Host` headers that name this machine. Without a token, a page of another site
            could otherwise reach the server through a DNS name that resolves to it (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, limits: Limits, token: str | None, *, check_host: bool) -> None:
        self.app = app
        self.limits = limits
        self.token = token
        self.check_host = check_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request and pass it on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        refused = self._refused(scope, headers)
        if refused is not None:
            await _refuse(scope, send, *refused)
            return
        body = _LimitedBody(receive, self.limits)
        answered = False

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal answered
            if body.refused is None:
                await send(_with_headers(message))
            elif not answered:  # frameworks turn errors of `receive` into answers of their own
                await _refuse(scope, send, *body.refused)
            answered = True

        try:
            await self.app(scope, body.receive, sending)
        except _RefusedError as error:
            if not answered:
                await _refuse(scope, send, *error.args)

    def _refused(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str, str] | None:
        host = headers.get("host", "")
        if self.check_host and not is_loopback(_without_port(host)):
            return 403, "host", "this host name is not allowed; use localhost or 127.0.0.1"
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return 403, "origin", "requests from other sites are not allowed"
        length = headers.get("content-length")
        if length is not None and not (length.isdecimal() and len(length) < 16):
            return 400, "usage", "Content-Length is not a number"
        if length is not None and int(length) > self.limits.body_bytes:
            return 413, "too_large", f"the request is larger than {self.limits.body_bytes} bytes"
        public = scope["path"] == PUBLIC[0] or scope["path"].startswith(PUBLIC[1])
        if self.token is not None and not public:
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self.token.encode()):
                return (
                    401,
                    "token",
                    "send the header Authorization: Bearer TOKEN; the server printed the token",
                )
        return None


class _RefusedError(Exception):
    """Status, kind and message."""


class _LimitedBody:
    """The body of a request, up to a size and a time."""

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self._receive = receive
        self._limits = limits
        self._until = asyncio.get_running_loop().time() + limits.body_seconds
        self._bytes = 0
        self._complete = False
        self.refused: tuple[int, str, str] | None = None
        """Status, kind and message, once a limit was exceeded."""

    async def receive(self) -> MutableMapping[str, Any]:
        """The next message."""
        if self._complete:  # what follows is the disconnect, at any time
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            raise self._refusal(408, "timeout", "the request did not arrive in time") from None
        self._bytes += len(message.get("body", b""))
        if self._bytes > self._limits.body_bytes:
            limit = self._limits.body_bytes
            raise self._refusal(413, "too_large", f"the request is larger than {limit} bytes")
        self._complete = not message.get("more_body", False)
        return message

    def _refusal(self, status: int, kind: str, message: str) -> _RefusedError:
        self.refused = status, kind, message
        return _RefusedError(*self.refused)


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def _with_headers(message: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if message["type"] != "http.response.start":
        return message
    headers = list(message.get("headers", []))
    present = {name.lower() for name, _ in headers}
    headers += [(n.encode(), v.encode()) for n, v in HEADERS.items() if n.encode() not in present]
    return {**message, "headers": headers}


async def _refuse(scope: Scope, send: Send, status: int, kind: str, message: str) -> None:
    error: dict[str, Any] = {"kind": kind, "code": 2, "message": message, "hint": None}
    if scope["path"].startswith("/v1/"):
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": kind}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    # The rest of a refused body is not read: the connection cannot be used again.
    headers.append((b"connection", b"close"))
    start = {"type": "http.response.start", "status": status, "headers": headers}
    await send(_with_headers(start))
    await send({"type": "http.response.body", "body": body})


def timed_protocol(seconds: float) -> type[H11Protocol]:
    """An HTTP protocol of uvicorn that closes connections whose first request does not arrive in time."""

    class TimedProtocol(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._timer = self.loop.call_later(seconds, self._close_if_silent)

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            super().connection_lost(exc)

        def _close_if_silent(self) -> None:
            if self.cycle is None and not self.transport.is_closing():
                self.transport.close()

    return TimedProtocol
