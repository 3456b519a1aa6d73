"""A session: models stay loaded between runs, and a run is a stream of typed events.

from fastface_cli.app.request import GenerateRequest
from fastface_cli.app.session import Session

with Session("pocket") as session:
    request = GenerateRequest(photos=("me.jpg",), prompts=("a woman smiling, watercolour",), seed=1)
    for event in session.run(request):
        print(event)
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .. import pocket
from ..errors import FastFaceError, UsageError
from ..identity.features import check_features
from ..recipe.schema import Recipe
from ..settings import Settings, load_settings
from .events import Event, IdentityReady, ImageFinished, ModelsReady, RunFinished, RunStarted
from .plan import RunPlan, plan_run
from .request import GenerateRequest
from .runtime import Runtime
from .stack import ModelStack

if TYPE_CHECKING:
    from ..identity.identity import Identity
    from ..identity.photos import Photo
    from .pipeline import Pipeline


log = logging.getLogger(__name__)


class RunCancelledError(FastFaceError):
    """The run was cancelled between two sampling steps; finished images are kept."""

    exit_code = 130
    kind = "interrupted"


class Session:
    """Loaded models and the runs on them.

    A session runs one request at a time. Models are downloaded and loaded when a run first needs them.

    Args:
        recipe: default of requests that name none: a name, a file, or a `Recipe`; None is the setting.
        runtime: device, dtype, offload and acceleration.
        settings: of this machine; None reads the settings file and the environment.
        offline: download nothing; None follows HF_HUB_OFFLINE.
        fused_cache: keep fused models on disk, so that the next start is faster.
        remember: keep identities on disk, by the hash of their photos.
    """

    def __init__(
        self,
        recipe: str | Recipe | None = None,
        runtime: Runtime | None = None,
        *,
        settings: Settings | None = None,
        offline: bool | None = None,
        fused_cache: bool = True,
        remember: bool = False,
    ) -> None:
        self.settings = settings or load_settings()
        self.recipe = recipe or self.settings.recipe
        self.runtime = runtime or Runtime()
        self.stack = ModelStack(
            self.runtime, self.settings, offline=offline, fused_cache=fused_cache, remember=remember
        )
        self.finished: list[dict[str, object]] = []
        """Records of the images of the last run, complete even if it was interrupted between two events."""
        self._running = threading.Lock()
        self._cancelled = threading.Event()
        self._reported: set[str] = set()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the memory of all models and forget identities. The session can be used again.

        Raises:
            FastFaceError: a run is in progress.
        """
        with self._exclusive():
            self.stack.clear()

    def cancel(self) -> None:
        """Cancel the current run at its next step or download event; no effect without a run."""
        self._cancelled.set()

    def run(self, request: GenerateRequest, *, identity: Identity | None = None) -> Generator[Event]:
        """Run a request.

        Closing the iterator cancels the run, as `cancel` does from another thread.

        Args:
            request: the run.
            identity: of the person, if the request names neither photos nor an identity file.

        Raises:
            FastFaceError: a run is in progress; out of memory; a file cannot be written.
            UsageError: the request is incomplete or contradictory, or a file exists already.
            ModelUnavailableError, DeviceError, NoFaceError: see there.
            RunCancelledError: `cancel` was called.
        """
        with self._exclusive():
            self.finished = []
            plan = plan_run(request, self.recipe, self.runtime.acceleration.lossy())
            photos: Sequence[Photo] = ()
            if identity is None or request.photos or request.identity:
                identity, photos = _read_person(request)
            reference = photos[0].image if photos else None
            runtime = self.runtime.resolve(plan.recipe, self.settings)
            self._warn_about_pocket(plan)
            yield RunStarted(plan.recipe, plan.seeds, len(plan.cells) * request.best_of)
            stack = self.stack
            if identity is None:
                # The face models come first: a photo without a face fails before the large downloads.
                yield from self._stream(lambda emit: stack.face_models(plan.recipe, emit))
                identity = stack.identity(
                    plan.recipe, photos, face_index=request.face_index, face_box=request.face_box
                )
            if request.pose is not None:
                yield from self._stream(lambda emit: stack.face_models(plan.recipe, emit))
                identity = stack.posed(plan.recipe, identity, request.pose)
            if plan.cells:
                check_features(identity, plan.recipe.adapter.kind)
            if request.best_of > 1:
                yield from self._stream(lambda emit: stack.face_models(plan.recipe, emit))
                stack.judge(plan.recipe).check(identity)
            saved = None
            if request.output is not None and request.output.save_identity is not None:
                saved = identity.save(request.output.save_identity, force=request.output.force)
            yield IdentityReady(identity, plan.expected_identity in (None, identity.digest()), saved)
            if not plan.cells:
                yield RunFinished(0, None)
                return
            yield from self._stream(lambda emit: stack.model_files(plan.recipe, emit))
            began = time.perf_counter()
            pipeline = stack.pipeline(plan.recipe, runtime)
            took = time.perf_counter() - began
            yield ModelsReady(took, str(runtime.device), str(pipeline.dtype), tuple(pipeline.plan()))
            self._warn_if_far(plan, pipeline, identity)
            scorer = stack.scorer(plan.recipe) if request.best_of > 1 else None
            from .generation import Generation

            yield from self._stream(
                lambda emit: Generation(request, plan, pipeline, identity, scorer, emit, reference).run()
            )

    def _warn_about_pocket(self, plan: RunPlan) -> None:
        """Log once which words of the prompts the pocket stack ignores."""
        if plan.recipe.model.base != pocket.BASE:
            return
        words = dict.fromkeys(word for cell in plan.cells for word in pocket.ignored_words(cell.prompt))
        ignored = [word for word in words if word not in self._reported]
        if ignored:
            self._reported.update(ignored)
            more = f" and {len(ignored) - 8} more" if len(ignored) > 8 else ""
            log.warning(
                "the pocket stack ignores these words: %s%s; "
                "it generates portraits of one person in these styles: %s",
                ", ".join(ignored[:8]),
                more,
                ", ".join(pocket.STYLES),
            )

    def _warn_if_far(self, plan: RunPlan, pipeline: Pipeline, identity: Identity) -> None:
        """Log once if the pocket stack was not trained with photos like that of this person."""
        from .best_of import has_own_clip

        if not has_own_clip(plan.recipe):
            return
        digest = identity.digest()
        if digest in self._reported:
            return
        self._reported.add(digest)
        from .pocket_world import FAR, distance

        far = distance(pipeline.parts.image_encoder, identity)
        if far > FAR:
            log.warning(
                "the pocket stack was not trained with photos like this one (distance %.0f, known up to "
                "%.0f): the face may be wrong; a frontal, evenly lit face fits best",
                far,
                FAR,
            )

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        if not self._running.acquire(blocking=False):
            raise FastFaceError(
                "this session is already running a request", "wait for it to finish, or open another session"
            )
        self._cancelled.clear()
        try:
            yield
        finally:
            self._running.release()

    def _stream(self, work: Callable[[Callable[[Event], None]], object]) -> Iterator[Event]:
        """Yield the events that `work` emits. It runs on a thread, because it reports through callbacks."""
        events: queue.SimpleQueue[Event | _Ended] = queue.SimpleQueue()

        def emit(event: Event) -> None:
            if isinstance(event, ImageFinished):  # it is written: never dropped
                self.finished.append(event.record())
            elif self._cancelled.is_set():
                raise RunCancelledError("the run was cancelled", "finished images are kept")
            events.put(event)

        def target() -> None:
            try:
                work(emit)
                events.put(_Ended(None))
            except BaseException as error:
                events.put(_Ended(error))

        worker = threading.Thread(target=target, name="fastface-run", daemon=True)
        try:
            worker.start()
            while not isinstance(event := events.get(), _Ended):
                yield event
            if event.error is not None:
                raise event.error
        except BaseException:
            self._cancelled.set()
            raise
        finally:
            if worker.ident is not None:
                worker.join()


class _Ended:
    """The last item of a stream of events."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def _read_person(request: GenerateRequest) -> tuple[Identity | None, Sequence[Photo]]:
    """Read the saved identity or the photos of a request.

    Raises:
        UsageError: neither or both are given, or a file cannot be read.
    """
    from ..identity.identity import Identity
    from ..identity.photos import open_photos
    from ..identity.search import check_choice

    if request.identity is not None and request.photos:
        raise UsageError("--face and --identity both name a person", "leave one of them out")
    if request.identity is not None:
        return Identity.load(request.identity), ()
    if not request.photos:
        raise UsageError(
            "there is no person", "give a photo with --face me.jpg, or --identity me.safetensors"
        )
    check_choice(request.face_index, request.face_box)
    return None, open_photos(request.photos)
