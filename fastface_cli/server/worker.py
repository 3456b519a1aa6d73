"""The worker: takes runs from the queue and runs them, one at a time, on one session."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from ..app.events import Event, IdentityReady, ImageFinished, ModelsReady, RunStarted, StepFinished
from ..app.session import RunCancelledError, Session
from ..errors import FastFaceError, unexpected
from ..output.images import encode_png
from ..output.metadata import describe
from ..store.progress import DownloadProgress
from .fair_queue import FairQueue
from .runs import ServedImage, ServedRun

if TYPE_CHECKING:
    from ..identity.identity import Identity
    from .previews import PreviewMap

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 0.25
"""Time between two events of a download."""


class Worker:
    """Runs everything on one session, and unloads its models when they are idle.

    Args:
        session: owned by the worker.
        queue: of waiting runs.
        idle_seconds: after which the models are unloaded; None is never.
    """

    def __init__(self, session: Session, queue: FairQueue, idle_seconds: float | None = None) -> None:
        self.session = session
        self.queue = queue
        self.idle_seconds = idle_seconds
        self.current: ServedRun | None = None
        self.loaded: str | None = None
        """Recipe of the last run whose models are loaded."""
        self._preview_map: PreviewMap | None = None
        self._next_progress = 0.0
        self._thread = threading.Thread(target=self._loop, name="fastface-worker", daemon=True)

    def start(self) -> None:
        """Start to take runs."""
        self._thread.start()

    def stop(self) -> None:
        """Cancel the current run, refuse the waiting ones, and free the models."""
        for run in self.queue.close():
            run.cancelled = True
            run.end("cancelled", "cancelled", {"images": 0})
        current = self.current
        if current is not None:
            self.cancel(current)
        if self._thread.is_alive():
            self._thread.join()

    def cancel(self, run: ServedRun) -> None:
        """Cancel a run: at once while it waits, between two steps while it runs."""
        run.cancelled = True
        if self.queue.remove(run):
            run.end("cancelled", "cancelled", {"images": 0})
        elif run is self.current:
            self.session.cancel()

    def _loop(self) -> None:
        while True:
            run = self.queue.take(self.idle_seconds)
            if run is None:
                self._unload()
                if self.queue.closed:
                    return
                run = self.queue.take(None)  # nothing is loaded, so there is nothing to unload again
                if run is None:
                    return
            self.current = run
            began = time.monotonic()
            try:
                self._execute(run)
            finally:
                self.current = None
            self.queue.took(time.monotonic() - began)

    def _unload(self) -> None:
        if self.loaded is not None:
            log.info("models unloaded")
        self._preview_map = self.loaded = None
        self.session.close()

    def _execute(self, run: ServedRun) -> None:
        """Run to one of the final states; nothing that fails here reaches the next run."""
        run.begin()
        try:
            self._run(run)
            run.end("finished", "finished", {"images": len(run.images), "seconds": _seconds_since(run)})
        except RunCancelledError:
            run.end("cancelled", "cancelled", {"images": len(run.images)})
        except FastFaceError as error:
            run.fail(error)
        except Exception as error:
            log.exception("a run failed unexpectedly")
            run.fail(unexpected(error))

    def _run(self, run: ServedRun) -> None:
        stack = self.session.stack
        if not stack.fits(run.recipe):
            self._unload()
        self.session.recipe = run.recipe
        events = self.session.run(run.request, identity=self._identity(run))
        try:
            for event in events:
                self._publish(run, event)
        finally:
            events.close()

    def _identity(self, run: ServedRun) -> Identity:
        stack, person = self.session.stack, run.person
        identity = person.identity
        if identity is None or person.pose is not None:
            stack.face_models(run.recipe, lambda event: self._publish(run, event))
        if identity is None:
            # `stack` keeps no identity of photos without a hash: they are gone with the run.
            identity = stack.identity(
                run.recipe, person.photos, face_index=run.body.face_index, face_box=run.body.face_box
            )
        if person.pose is not None:
            identity = stack.posed(run.recipe, identity, person.pose)
        return identity

    def _publish(self, run: ServedRun, event: Event) -> None:
        """Publish what clients need of an event.

        Raises:
            RunCancelledError: the client cancelled the run.
        """
        if run.cancelled and not isinstance(event, ImageFinished):
            raise RunCancelledError("the run was cancelled")
        match event:
            case RunStarted():
                data: dict[str, Any] = {"recipe": event.recipe.name, "seeds": event.seeds}
                run.publish("started", {**data, "images": event.images})
            case DownloadProgress() if self._is_due(event):
                run.publish("download", {"file": event.name, "done": event.done, "total": event.total})
            case IdentityReady():
                run.publish("identity", {})
            case ModelsReady():
                self.loaded = run.recipe.name
                data = {"seconds": event.seconds, "device": event.device, "dtype": event.dtype}
                run.publish("models", data)
            case StepFinished():
                self._publish_step(run, event)
            case ImageFinished():
                image = _served(run, event)
                run.images.append(image)
                run.publish("image", image.record)

    def _is_due(self, event: DownloadProgress) -> bool:
        """Whether enough time has passed since the last progress that was published."""
        now = time.monotonic()
        if event.done < event.total and now < self._next_progress:
            return False
        self._next_progress = now + PROGRESS_SECONDS
        return True

    def _publish_step(self, run: ServedRun, event: StepFinished) -> None:
        previews: list[str] = []
        if run.body.previews:
            previews = self._previews(run).previews(event.latents)
        data = {"step": event.step, "steps": run.recipe.sampling.steps, "previews": previews}
        run.publish("step", {**data, "done": event.done, "total": event.total})

    def _previews(self, run: ServedRun) -> PreviewMap:
        if self._preview_map is None:
            from .previews import PreviewMap

            self._preview_map = PreviewMap(self.session.stack.pipeline(run.recipe))
        return self._preview_map


def _seconds_since(run: ServedRun) -> float:
    return round(time.time() - (run.started or run.created), 3)


def _served(run: ServedRun, event: ImageFinished) -> ServedImage:
    """Encode an image that was not written; a written one stays in its file."""
    provenance = event.provenance
    png = None if event.path else encode_png(event.image, describe(provenance, ".png"))
    size = len(png) if png is not None else event.path.stat().st_size if event.path else 0
    index = len(run.images)
    record = {
        "index": index,
        "seed": provenance.seed,
        "prompt": provenance.prompt,
        "negative_prompt": provenance.negative_prompt,
        "adapter_scale": provenance.adapter_scale,
        "recipe": provenance.recipe.name,
        "width": event.image.width,
        "height": event.image.height,
        "unet_samples": provenance.unet_samples,
        "seconds": round(event.seconds, 3),
        "bytes": size,
        "url": f"/api/runs/{run.id}/images/{index}",
    }
    return ServedImage(record, provenance, png, event.path)
