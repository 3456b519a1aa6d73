"""The models of a session: downloaded and loaded when they are first needed, and kept."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import NoFaceError
from ..recipe.schema import Recipe
from ..settings import Settings
from ..store import ProgressObserver, Store
from ..store.manifest import resolve
from ..store.progress import ignore
from .licensing import artifacts_of
from .runtime import ResolvedRuntime, Runtime

if TYPE_CHECKING:
    from PIL import Image

    from ..identity.analyzer import Box, InsightFaceAnalyzer
    from ..identity.identity import Identity
    from ..identity.parsing import GrayFaceEncoder
    from ..identity.photos import Photo
    from ..identity.yunet import YuNetAnalyzer
    from ..scorers.clip import Clip
    from .best_of import Judge, Scorer
    from .pipeline import Pipeline

log = logging.getLogger(__name__)

MAX_IDENTITIES, MAX_IDENTITY_BYTES = 32, 512 * 2**20
"""Identities kept in memory: about 150 kB per photo, or 12 MB with the features of PuLID."""


class ModelStack:
    """The loaded models of one session.

    Args:
        runtime: device, dtype, offload and acceleration.
        settings: of this machine.
        offline: download nothing; None follows HF_HUB_OFFLINE.
        fused_cache: keep fused models on disk, so that the next start is faster.
        remember: keep identities on disk, by the hash of their photos.
    """

    def __init__(
        self,
        runtime: Runtime,
        settings: Settings,
        *,
        offline: bool | None = None,
        fused_cache: bool = True,
        remember: bool = False,
    ) -> None:
        self.runtime = runtime
        self.settings = settings
        self.offline = offline
        self.fused_cache = fused_cache
        self.remember = remember
        self._pipeline: Pipeline | None = None
        self._judge: Judge | None = None
        self._scorer: Scorer | None = None
        self._analyzer: tuple[str, InsightFaceAnalyzer | YuNetAnalyzer] | None = None
        self._face_encoder: tuple[Path, GrayFaceEncoder] | None = None
        self._paths: dict[str, Path] = {}
        self._identities: OrderedDict[str, Identity] = OrderedDict()

    def clear(self) -> None:
        """Free the memory of all models and identities."""
        self._pipeline = self._judge = self._scorer = self._analyzer = self._face_encoder = None
        self._identities.clear()
        _free_device_memory()

    @property
    def has_models(self) -> bool:
        """Whether the diffusion models are loaded."""
        return self._pipeline is not None

    def fits(self, recipe: Recipe) -> bool:
        """Whether `pipeline` accepts a recipe without unloading the models first."""
        return self._pipeline is None or self._pipeline.fits(recipe)

    def face_models(self, recipe: Recipe, progress: ProgressObserver = ignore) -> Path:
        """The folder of a recipe's face models; all models that read photos are downloaded if missing.

        Raises:
            ModelUnavailableError: a file is missing and cannot be downloaded.
        """
        return self._ensure(recipe, recipe.photo_roles(), progress)["face"]

    def model_files(self, recipe: Recipe, progress: ProgressObserver = ignore) -> dict[str, Path]:
        """The files of all other models of a recipe by role, downloaded if missing.

        Raises:
            ModelUnavailableError: a file is missing and cannot be downloaded.
        """
        return self._ensure(recipe, recipe.references().keys() - recipe.photo_roles(), progress)

    def _ensure(self, recipe: Recipe, roles: Iterable[str], progress: ProgressObserver) -> dict[str, Path]:
        references = {role: str(reference) for role, reference in recipe.references().items()}
        missing = {role for role in roles if references[role] not in self._paths}
        if missing:
            paths = fetch(recipe, self.settings, missing, offline=self.offline, progress=progress)
            self._paths |= {references[role]: path for role, path in paths.items()}
        return {role: self._paths[references[role]] for role in roles}

    def pipeline(self, recipe: Recipe, runtime: ResolvedRuntime | None = None) -> Pipeline:
        """The diffusion models under a recipe.

        Args:
            recipe: differs from the recipe of loaded models only where `Pipeline.with_recipe` allows it.
            runtime: as resolved for the recipe; None resolves it now.

        Raises:
            RecipeError: models are loaded, and the recipe needs others.
            ModelUnavailableError, DeviceError: they cannot be loaded.
        """
        if self._pipeline is None:
            self._pipeline = self._load(recipe, runtime or self.runtime.resolve(recipe, self.settings))
        loaded = self._pipeline.recipe
        if loaded == recipe:
            return self._pipeline
        same_files = loaded.model.scheduler.config == recipe.model.scheduler.config
        self._pipeline = self._pipeline.with_recipe(
            recipe, self.model_files(loaded if same_files else recipe)
        )
        return self._pipeline

    def _load(self, recipe: Recipe, runtime: ResolvedRuntime) -> Pipeline:
        from ..quiet import quiet_libraries

        with quiet_libraries():  # importing diffusers logs advice about packages that are not needed
            from .pipeline import Pipeline

        if runtime.acceleration.compile:
            from ..models.compilation import keep_graphs

            keep_graphs(self.settings.home / "graphs")
        return Pipeline.load(
            recipe,
            self.model_files(recipe),
            device=str(runtime.device),
            dtype=str(runtime.dtype).removeprefix("torch."),
            fused=Store(self.settings).fused if self.fused_cache else None,
            acceleration=runtime.acceleration,
            level=runtime.level(recipe),
        )

    def analyzer(self, recipe: Recipe) -> InsightFaceAnalyzer | YuNetAnalyzer:
        """The face models of a recipe.

        Raises:
            ModelUnavailableError: they cannot be loaded.
        """
        from ..models.device import pick_device

        name = str(recipe.model.face)
        if self._analyzer is None or self._analyzer[0] != name:
            device = str(pick_device(self.runtime.device or self.settings.device))
            analyzer = load_analyzer(self.face_models(recipe), device)
            if analyzer.note:
                log.debug("%s", analyzer.note)  # `fastface doctor` reports it
            self._analyzer, self._judge, self._scorer = (name, analyzer), None, None
        return self._analyzer[1]

    def face_encoder(self, recipe: Recipe) -> GrayFaceEncoder:
        """The face parser and image tower of PuLID.

        Raises:
            NoFaceError: the recipe names none, so that it reads only identities that hold their features.
            ModelUnavailableError: they cannot be loaded.
        """
        if recipe.model.face_parsing is None:
            raise NoFaceError(
                f"recipe '{recipe.name}' cannot read photos: it names no image encoder and no face parser",
                "set model.image_encoder and model.face_parsing, or use --identity",
            )
        paths = self._ensure(recipe, recipe.photo_roles(), ignore)
        tower = paths["image_encoder"]
        if self._face_encoder is None or self._face_encoder[0] != tower:
            from ..models.device import pick_device

            device = str(pick_device(self.runtime.device or self.settings.device))
            self._face_encoder = tower, load_face_encoder(paths, device)
        return self._face_encoder[1]

    def judge(self, recipe: Recipe) -> Judge:
        """What scores the likeness of candidates; logs a warning if it is not independent.

        Raises:
            ModelUnavailableError: there is none.
        """
        from .best_of import pick_judge

        analyzer = self.analyzer(recipe)
        if self._judge is None:
            self._judge = pick_judge(analyzer, recipe.adapter.kind)
        return self._judge

    def scorer(self, recipe: Recipe) -> Scorer:
        """The scorer of candidates; logs a warning for each score that is unavailable.

        Raises:
            ModelUnavailableError: nothing can score the likeness.
        """
        from .best_of import Scorer

        analyzer, judge = self.analyzer(recipe), self.judge(recipe)
        if self._scorer is None:
            self._scorer = Scorer(analyzer, judge, self._clip(recipe, self.pipeline(recipe)))
        return self._scorer

    def _clip(self, recipe: Recipe, pipeline: Pipeline) -> Clip | None:
        from ..scorers.clip import load_clip, load_pocket_clip
        from .best_of import PROMPT_SCORER, has_own_clip

        # With offloading there is no room for it on the GPU.
        device = "cpu" if pipeline.level.encoders else str(pipeline.device)
        if has_own_clip(recipe):
            files = self.model_files(recipe)
            return load_pocket_clip(files["base"], files["image_encoder"], device)
        store, artifact = Store(self.settings, offline=self.offline), resolve(PROMPT_SCORER)
        if not store.missing([artifact]):
            return load_clip(store.path(artifact), device, None if device == "cpu" else pipeline.dtype)
        log.warning(
            "prompts are not scored, because no CLIP model is installed; "
            "`fastface download %s` downloads one",
            PROMPT_SCORER,
        )
        return None

    def identity(
        self,
        recipe: Recipe,
        sources: Sequence[Path | str | Image.Image | Photo],
        *,
        face_index: int | None = None,
        face_box: Box | None = None,
    ) -> Identity:
        """The identity of one person. Identities from files are kept, by the content of the files.

        Args:
            recipe: whose face models.
            sources: photos of the person.
            face_index, face_box: see `make_identity`.

        Raises:
            UsageError: a photo cannot be read.
            NoFaceError: the photos show no usable face.
        """
        from ..identity.cache import Remembered, key_of
        from ..identity.features import NEEDED
        from ..identity.identity import make_identity
        from ..identity.photos import open_photos

        photos = open_photos(sources)
        features, artifacts = NEEDED[recipe.adapter.kind], artifacts_of(recipe)
        encoders = [artifacts[role] for role in sorted(recipe.photo_roles() - {"face"})]
        key = key_of(photos, artifacts["face"], face_index, face_box, features, encoders)
        if key is not None and key in self._identities:
            self._identities.move_to_end(key)
            return self._identities[key]
        on_disk = Remembered(self.settings.home) if self.remember else None
        identity = on_disk.find(key) if on_disk and key is not None else None
        if identity is None:
            identity = make_identity(
                photos,
                self.analyzer(recipe),
                face_index=face_index,
                face_box=face_box,
                features=features,
                encoder=self.face_encoder(recipe) if "eva_hidden" in features else None,
                log=log.warning,
            )
            if on_disk and key is not None:
                on_disk.keep(key, identity)
        if key is not None:
            self._identities[key] = identity
            self._forget_old_identities()
        return identity

    def _forget_old_identities(self) -> None:
        """Keep the newest identities, up to both limits."""
        kept = self._identities
        while len(kept) > MAX_IDENTITIES or (
            len(kept) > 1 and sum(each.nbytes for each in kept.values()) > MAX_IDENTITY_BYTES
        ):
            kept.popitem(last=False)

    def posed(self, recipe: Recipe, identity: Identity, pose: Path | Photo) -> Identity:
        """The identity in the pose of the largest face of another photo.

        Raises:
            UsageError: the photo cannot be read.
            NoFaceError: it shows no face.
        """
        from ..identity.identity import key_points_of
        from ..identity.photos import open_photo

        points, size = key_points_of(open_photo(pose), self.analyzer(recipe))
        return identity.posed(points, size)


def load_analyzer(path: Path, device: str) -> InsightFaceAnalyzer | YuNetAnalyzer:
    """Load face models: an InsightFace pack from its folder, or YuNet from its file.

    Raises:
        ModelUnavailableError: they cannot be loaded.
    """
    from ..identity.analyzer import is_detector, load_face_models

    if is_detector(path):
        from ..identity.yunet import YuNetAnalyzer

        return YuNetAnalyzer(path)
    return load_face_models(path, device=device)


def load_face_encoder(paths: Mapping[str, Path], device: str) -> GrayFaceEncoder:
    """Load the face parser and image tower of PuLID from their paths by role.

    Raises:
        ModelUnavailableError: they cannot be loaded.
    """
    from ..identity.eva import FaceEncoder
    from ..identity.parsing import FaceParser, GrayFaceEncoder

    return GrayFaceEncoder(FaceParser(paths["face_parsing"]), FaceEncoder(paths["image_encoder"], device))


def fetch(
    recipe: Recipe,
    settings: Settings,
    roles: Iterable[str] | None = None,
    *,
    offline: bool | None = None,
    progress: ProgressObserver = ignore,
) -> Mapping[str, Path]:
    """Download the missing model files of a recipe.

    Args:
        recipe: whose models.
        settings: where the cache is.
        roles: of `Recipe.references`; None is all.
        offline: download nothing; None follows HF_HUB_OFFLINE.
        progress: observes the downloads.

    Returns:
        The path of each role.

    Raises:
        ModelUnavailableError: a file is missing and cannot be downloaded.
    """
    artifacts = artifacts_of(recipe)
    if roles is not None:
        artifacts = {role: artifacts[role] for role in roles}
    distinct = {artifact.name: artifact for artifact in artifacts.values()}
    paths = Store(settings, offline=offline).ensure(list(distinct.values()), progress=progress)
    return {role: paths[artifact.name] for role, artifact in artifacts.items()}


def _free_device_memory() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
