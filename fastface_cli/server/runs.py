"""Runs on the server: their state, their event log, and how long they are kept."""

from __future__ import annotations

import asyncio
import io
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..errors import FastFaceError, UsageError
from ..output.images import encode_image
from ..output.metadata import Provenance, describe
from .limits import Limits
from .schema import RunBody

if TYPE_CHECKING:
    from ..app.request import GenerateRequest
    from ..identity.identity import Identity
    from ..identity.photos import Photo
    from ..recipe.schema import Recipe

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
"""Formats in which images are served."""

REPLACED = ("queued", "download")
"""Events of which only the newest is kept."""

MAX_PREVIEWS = 64
"""Newest events of a run that keep their previews."""

ENDED = ("finished", "failed", "cancelled")


@dataclass(frozen=True)
class RunEvent:
    """One entry of a run's event log."""

    number: int
    name: str
    data: Mapping[str, Any]


@dataclass
class ServedImage:
    """A finished image: its record, and its PNG in memory or in a file."""

    record: dict[str, Any]
    provenance: Provenance
    png: bytes | None
    path: Path | None

    def encoded(self, output_format: str = "png") -> bytes:
        """The file in a format, with its metadata.

        Raises:
            UsageError: the format is not supported.
            MissingError: the file of the image was removed.
        """
        if output_format not in MEDIA_TYPES:
            raise UsageError(
                f"the format '{output_format[:40]}' is not supported", f"use {', '.join(MEDIA_TYPES)}"
            )
        content = self._content()
        if output_format == "png":
            return content
        with Image.open(io.BytesIO(content)) as image:
            return encode_image(image, output_format, describe(self.provenance, f".{output_format}"))

    def _content(self) -> bytes:
        if self.png is not None:
            return self.png
        assert self.path is not None
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise MissingError("the file of this image was removed") from error


@dataclass(frozen=True)
class Person:
    """Who a run shows: photos, which are dropped when the run ends, or an identity."""

    photos: Sequence[Photo] = ()
    identity: Identity | None = None
    pose: Photo | None = None


@dataclass(eq=False)
class ServedRun:
    """One run, from its submission until it is forgotten. Methods may be called from any thread."""

    body: RunBody
    request: GenerateRequest
    """Without recipe, changes and aspect: they are resolved in `recipe`."""
    recipe: Recipe
    client: str
    """Runs of different clients take turns."""
    person: Person
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    state: str = "queued"
    created: float = field(default_factory=time.time)
    started: float | None = None
    ended: float | None = None
    error: FastFaceError | None = None
    images: list[ServedImage] = field(default_factory=list)
    cancelled: bool = False
    """The client asked to cancel; the worker stops at the next step."""
    _events: list[RunEvent] = field(default_factory=list)
    _published: int = 0
    _listeners: set[Callable[[], None]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def publish(self, name: str, data: Mapping[str, Any]) -> None:
        """Append an event to the log and wake all listeners."""
        with self._lock:
            if name == "step" and len(self._events) >= MAX_PREVIEWS:
                self._events[-MAX_PREVIEWS] = _without_previews(self._events[-MAX_PREVIEWS])
            elif name in REPLACED:
                self._events = [event for event in self._events if event.name != name]
            self._published += 1
            self._events.append(RunEvent(self._published, name, data))
            listeners = list(self._listeners)
        for wake in listeners:
            wake()

    def begin(self) -> None:
        """The worker has taken the run."""
        self.state, self.started = "running", time.time()

    def end(self, state: str, name: str, data: Mapping[str, Any]) -> None:
        """Set the final state, drop the photos, and publish the last event."""
        self.person = Person()
        self.state, self.ended = state, time.time()
        self.publish(name, data)

    def fail(self, error: FastFaceError) -> None:
        """End with an error."""
        self.error = error
        self.end("failed", "failed", {"error": error.record()})

    async def events(self, after: int = 0) -> AsyncIterator[RunEvent]:
        """The events after number `after`, as they come; ends with the run."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(changed.set)

        with self._lock:
            self._listeners.add(wake)
        try:
            while True:
                changed.clear()
                with self._lock:
                    fresh = [event for event in self._events if event.number > after]
                for event in fresh:
                    after = event.number
                    yield event
                    if event.name in ENDED:
                        return
                if self.state in ENDED and not fresh:
                    return
                await changed.wait()
        finally:
            with self._lock:
                self._listeners.discard(wake)

    def notices(self) -> list[str]:
        """Messages so far, each once."""
        with self._lock:
            messages = [event.data["message"] for event in self._events if event.name == "notice"]
        return list(dict.fromkeys(messages))

    def record(self, position: int | None = None) -> dict[str, Any]:
        """The run as the API describes it."""
        return {
            "id": self.id,
            "state": self.state,
            "position": position,
            "request": self.body.model_dump(mode="json"),
            "recipe": self.recipe.name,
            "width": self.recipe.sampling.width,
            "height": self.recipe.sampling.height,
            "notices": self.notices(),
            "created": self.created,
            "started": self.started,
            "ended": self.ended,
            "error": None if self.error is None else self.error.record(),
            "images": [image.record for image in self.images],
        }


def _without_previews(event: RunEvent) -> RunEvent:
    if event.name != "step" or not event.data.get("previews"):
        return event
    return RunEvent(event.number, event.name, {**event.data, "previews": []})


class Registry:
    """All runs that are kept, and the idempotency keys of their submissions."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._runs: dict[str, ServedRun] = {}
        self._keys: dict[str, tuple[str, str]] = {}
        self._lock = threading.Lock()

    def add(self, run: ServedRun, key: str | None = None, digest: str = "") -> None:
        """Keep a run, under an idempotency key with the digest of its content."""
        with self._lock:
            self._runs[run.id] = run
            if key is not None:
                self._keys[key] = (digest, run.id)
        self.prune()

    def repeated(self, key: str, digest: str) -> ServedRun | None:
        """The run submitted earlier under an idempotency key; None if there is none.

        Raises:
            ConflictError: it was submitted with other content.
        """
        with self._lock:
            known = self._keys.get(key)
            if known is None or known[1] not in self._runs:
                return None
            if known[0] != digest:
                raise ConflictError(
                    "this idempotency key belongs to a request with other content", "send a new key"
                )
            return self._runs[known[1]]

    def find(self, run_id: str) -> ServedRun:
        """A run by its id.

        Raises:
            MissingError: it does not exist, or is no longer kept.
        """
        self.prune()
        with self._lock:
            run = self._runs.get(run_id)
        if run is None:
            raise MissingError("there is no such run", "results are kept for a limited time, see --keep")
        return run

    def forget(self, run: ServedRun) -> None:
        """Remove a run and its results from memory; files under -o stay."""
        with self._lock:
            self._runs.pop(run.id, None)
            self._keys = {key: value for key, value in self._keys.items() if value[1] != run.id}

    def all(self) -> list[ServedRun]:
        """All runs, the newest first."""
        self.prune()
        with self._lock:
            return list(reversed(self._runs.values()))

    def prune(self) -> None:
        """Forget the runs that exceed the limits."""
        with self._lock:
            done = [run for run in self._runs.values() if run.state in ENDED]
        keep = self._limits.keep_runs
        old = [] if keep is None else done[: max(0, len(done) - keep)]
        if self._limits.keep_hours is not None:
            since = time.time() - 3600 * self._limits.keep_hours
            old += [run for run in done if run.ended is not None and run.ended < since]
        for run in old:
            self.forget(run)


class ConflictError(UsageError):
    """The request contradicts an earlier one."""

    kind = "conflict"


class MissingError(UsageError):
    """The thing that the address names does not exist."""

    kind = "missing"


class BusyError(FastFaceError):
    """The queue is full.

    Args:
        seconds: after which a slot may be free.
    """

    kind = "busy"

    def __init__(self, seconds: int) -> None:
        super().__init__("the queue is full", f"try again in {seconds} s")
        self.seconds = seconds
