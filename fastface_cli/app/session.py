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
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..console import download_bars
from ..errors import FastFaceError, UsageError
from ..recipe.schema import Recipe
from ..settings import Settings, load_settings
from ..store import Store
from ..store.manifest import resolve
from .events import Event, IdentityReady, ModelsReady, RunStarted
from .licensing import artifacts_of
from .plan import plan_run
from .request import GenerateRequest
from .runtime import ResolvedRuntime, Runtime

if TYPE_CHECKING:
    from PIL import Image

    from ..identity.analyzer import InsightFaceAnalyzer
    from ..identity.identity import Identity
    from .best_of import Scorer
    from .drawing import Drawing
    from .pipeline import Pipeline

log = logging.getLogger(__name__)

IDENTITIES = 32
"""Identities kept in memory, about 150 kB per photo."""


class RunCancelledError(FastFaceError):
    """The run was cancelled between two sampling steps; finished images stay."""

    exit_code = 130
    kind = "interrupted"


class Session:
    """Loaded models and the runs on them.

    A session runs one request at a time. Models are downloaded and loaded when a run first needs them.

    Args:
        recipe: default of requests that name none: a name, a file, or a `Recipe`; None takes the setting.
        runtime: device, dtype, offload and acceleration.
        settings: None reads the settings file and the environment.
        offline: download nothing; None follows HF_HUB_OFFLINE.
        fused_cache: keep fused models on disk, so that the next start is faster.
        remember: keep identities on disk, by the hash of their photos.
        progress: show download progress on stderr when it is a terminal.
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
        progress: bool = False,
    ) -> None:
        self.settings = settings or load_settings()
        self.recipe = recipe or self.settings.recipe
        self.runtime = runtime or Runtime()
        self.offline = offline
        self.fused_cache = fused_cache
        self.remember = remember
        self.progress = progress
        self._pipeline: Pipeline | None = None
        self._scorer: Scorer | None = None
        self._analyzer: tuple[str, InsightFaceAnalyzer] | None = None
        self._paths: dict[str, Path] = {}
        self._paths_of: Mapping[str, object] = {}
        self._identities: OrderedDict[str, Identity] = OrderedDict()
        self._running = threading.Lock()
        self._cancelled = threading.Event()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the memory of all models and forget identities. The session can be used again."""
        with self._exclusive():
            self._pipeline = self._scorer = self._analyzer = None
            self._identities.clear()
            _free_device_memory()

    @property
    def has_models(self) -> bool:
        """Whether the diffusion models are loaded."""
        return self._pipeline is not None

    # -------------------------------------------------------------------------------------------- runs

    def run(self, request: GenerateRequest) -> Iterator[Event]:
        """Run a request.

        Closing the iterator cancels the run between two steps, and so does `cancel` from another thread.

        Raises:
            FastFaceError: this session is running already; out of memory; the disk refuses a file.
            UsageError: the request is incomplete, contradictory, or an existing file is in the way.
            ModelUnavailableError, DeviceError, NoFaceError: as their names say.
            RunCancelledError: `cancel` was called.
        """
        with self._exclusive():
            plan = plan_run(request, self.recipe, self.runtime.acceleration.lossy())
            saved = _checked_person(request)
            runtime = self.runtime.resolve(plan.recipe, self.settings)
            images = len(plan.cells) * request.best_of
            yield RunStarted(plan.recipe, plan.seeds, images)
            identity = saved or self.identity(
                plan.recipe, request.photos, face_index=request.face_index, face_box=request.face_box
            )
            if request.output.save_identity is not None:
                identity.save(request.output.save_identity, force=request.output.force)
            yield IdentityReady(identity, plan.expected_identity in (None, identity.digest()))
            began = time.perf_counter()
            pipeline = self.pipeline(plan.recipe, runtime)
            took = time.perf_counter() - began
            steps = tuple(pipeline.plan())
            yield ModelsReady(took, str(runtime.device), str(pipeline.dtype), steps)
            scorer = self.scorer(plan.recipe) if request.best_of > 1 else None
            from .drawing import Drawing

            drawing = Drawing(
                request, plan, pipeline, identity, scorer, lambda _: None, self._check_cancelled
            )
            yield from self._stream(drawing)

    def cancel(self) -> None:
        """Cancel the current run between two steps; does nothing where none is in progress."""
        self._cancelled.set()

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

    def _check_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise RunCancelledError("the run was cancelled", "finished images are kept")

    def _stream(self, drawing: Drawing) -> Iterator[Event]:
        """The events of a drawing. It works on a thread of its own: its steps report through callbacks."""
        events: queue.SimpleQueue[Event | _Ended] = queue.SimpleQueue()
        drawing.emit = events.put

        def work() -> None:
            try:
                drawing.run()
                events.put(_Ended(None))
            except BaseException as error:
                events.put(_Ended(error))

        worker = threading.Thread(target=work, name="drawing", daemon=True)
        worker.start()
        try:
            while not isinstance(event := events.get(), _Ended):
                yield event
            if event.error is not None:
                raise event.error
        finally:
            self._cancelled.set()
            worker.join()

    # ------------------------------------------------------------------------------------------ models

    def paths(self, recipe: Recipe, *, faces: bool) -> Mapping[str, Path]:
        """Where the model files of a recipe are, by role; missing files are downloaded.

        Args:
            recipe: whose parts.
            faces: also the face models.

        Raises:
            ModelUnavailableError: a file is missing and cannot be downloaded.
        """
        references = recipe.references()
        if references != self._paths_of or (faces and "face" not in self._paths):
            self._paths = fetch(
                recipe, self.settings, faces=faces, offline=self.offline, progress=self.progress
            )
            self._paths_of = references
        return self._paths

    def pipeline(self, recipe: Recipe, runtime: ResolvedRuntime | None = None) -> Pipeline:
        """The loaded stack under a recipe.

        Raises:
            RecipeError: models are loaded, and the recipe needs others.
            ModelUnavailableError, DeviceError: they cannot be loaded.
        """
        if self._pipeline is None:
            self._pipeline = self._load(recipe, runtime or self.runtime.resolve(recipe, self.settings))
        if self._pipeline.recipe == recipe:
            return self._pipeline
        loaded = self._pipeline.recipe
        same_files = loaded.model.scheduler.config == recipe.model.scheduler.config
        return self._pipeline.with_recipe(recipe, self.paths(loaded if same_files else recipe, faces=False))

    def _load(self, recipe: Recipe, runtime: ResolvedRuntime) -> Pipeline:
        from .pipeline import Pipeline

        if runtime.acceleration.compile:
            from ..models.compilation import keep_graphs

            keep_graphs(self.settings.home / "graphs")
        return Pipeline.load(
            recipe,
            self.paths(recipe, faces=False),
            device=str(runtime.device),
            dtype=str(runtime.dtype).removeprefix("torch."),
            log=log.warning,
            fused=Store(self.settings).fused if self.fused_cache else None,
            acceleration=runtime.acceleration,
            level=runtime.level(recipe),
        )

    def analyzer(self, recipe: Recipe) -> InsightFaceAnalyzer:
        """The loaded face models of a recipe."""
        from ..identity.analyzer import load_face_models
        from ..models.device import pick_device

        name = str(recipe.model.face)
        if self._analyzer is None or self._analyzer[0] != name:
            device = str(pick_device(self.runtime.device or self.settings.device))
            analyzer = load_face_models(self.paths(recipe, faces=True)["face"], device=device)
            if analyzer.note:
                log.warning("%s", analyzer.note)
            self._analyzer = name, analyzer
        return self._analyzer[1]

    def scorer(self, recipe: Recipe) -> Scorer:
        """What scores candidates; logs what it cannot measure."""
        from .best_of import PROMPT_SCORER, Scorer, clip_prompt_scorer, own_prompt_scorer, pick_judge

        if self._scorer is None:
            analyzer, pipeline = self.analyzer(recipe), self.pipeline(recipe)
            judge = pick_judge(analyzer, log.warning)
            prompt = own_prompt_scorer(pipeline)
            if prompt is None:
                store, artifact = Store(self.settings, offline=self.offline), resolve(PROMPT_SCORER)
                if not store.missing([artifact]):
                    prompt = clip_prompt_scorer(store.path(artifact), pipeline)
                else:
                    log.warning(
                        "prompts are not scored, because no CLIP model is installed; "
                        "`fastface download %s` downloads one",
                        PROMPT_SCORER,
                    )
            self._scorer = Scorer(analyzer, judge, prompt)
        return self._scorer

    # ---------------------------------------------------------------------------------------- identity

    def identity(
        self,
        recipe: Recipe,
        photos: tuple[Path | Image.Image, ...],
        *,
        face_index: int | None = None,
        face_box: tuple[float, float, float, float] | None = None,
    ) -> Identity:
        """A person from one or several photos.

        Raises:
            UsageError: a photo cannot be read.
            NoFaceError: there is no usable face in them.
        """
        from ..identity.cache import Remembered, key_of
        from ..identity.identity import make_identity

        files = [photo for photo in photos if isinstance(photo, Path)]
        key = None
        if len(files) == len(photos):
            # By content: a replaced file is another person.
            key = key_of(files, artifacts_of(recipe)["face"], face_index, face_box)
        if key is not None and key in self._identities:
            self._identities.move_to_end(key)
            return self._identities[key]
        on_disk = Remembered(self.settings.home) if self.remember else None
        identity = on_disk.find(key) if on_disk and key is not None else None
        if identity is None:
            identity = make_identity(
                list(photos),
                self.analyzer(recipe),
                face_index=face_index,
                face_box=face_box,
                log=log.warning,
            )
            if on_disk and key is not None:
                on_disk.keep(key, identity)
        if key is not None:
            self._identities[key] = identity
            if len(self._identities) > IDENTITIES:
                self._identities.popitem(last=False)
        return identity


class _Ended:
    """The last item of a stream of events."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def fetch(
    recipe: Recipe,
    settings: Settings,
    *,
    faces: bool = True,
    offline: bool | None = None,
    progress: bool = True,
) -> dict[str, Path]:
    """Where each model part of a recipe is on disk, by role; missing files are downloaded.

    Args:
        recipe: whose parts.
        settings: where the cache is.
        faces: also the face models, which a saved identity makes unnecessary.
        offline: download nothing; None follows HF_HUB_OFFLINE.
        progress: show progress.

    Raises:
        ModelUnavailableError: a file is missing and cannot be downloaded.
    """
    artifacts = artifacts_of(recipe)
    if not faces:
        artifacts.pop("face")
    distinct = {artifact.name: artifact for artifact in artifacts.values()}
    store = Store(settings, offline=offline)
    with download_bars(quiet=not progress) as observer:
        paths = store.ensure(list(distinct.values()), progress=observer)
    return {role: paths[artifact.name] for role, artifact in artifacts.items()}


def _checked_person(request: GenerateRequest) -> Identity | None:
    """The saved identity of a request; None where it has photos, which are checked to be readable.

    Raises:
        UsageError: neither or both are given, or a file cannot be read.
    """
    from ..identity.identity import Identity
    from ..identity.photos import read_photo
    from ..identity.search import check_choice

    if request.identity is not None and request.photos:
        raise UsageError("--face and --identity both name a person", "leave one of them out")
    if request.identity is not None:
        return Identity.load(request.identity)
    if not request.photos:
        raise UsageError(
            "there is no person", "give a photo with --face me.jpg, or --identity me.safetensors"
        )
    check_choice(request.face_index, request.face_box)
    for photo in request.photos:
        read_photo(photo)
    return None


def _free_device_memory() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
