"""The Python use: a recipe, a person, pictures. The command line stands on the same functions.

from fastface_cli import FastFace

face = FastFace("pocket")
me = face.identity("me.jpg")
face.generate(me, "a woman smiling, watercolor", seed=1)[0].save("out.png")
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DeviceError, LicenseError, UsageError
from ..models.acceleration import DEFAULT, Acceleration
from ..recipe.schema import Recipe
from ..settings import Saving, Settings, load_settings
from ..store.manifest import Artifact, resolve

if TYPE_CHECKING:
    from PIL import Image

    from ..identity.analyzer import InsightFaceAnalyzer
    from ..identity.identity import Identity
    from ..models.offload import Level
    from .best_of import Best, Scorer
    from .pipeline import Pipeline

Log = Callable[[str], None]

GPU_BYTES = 1_000_000_000
"""A stack that weighs more is not run on a CPU unless the CPU is asked for by name."""


def artifacts_of(recipe: Recipe) -> dict[str, Artifact]:
    """Every model part of a recipe, by role.

    Raises:
        RecipeError: a reference that is neither a known name, a path nor a pinned repository.
    """
    return {role: resolve(reference) for role, reference in recipe.references().items()}


def is_full_size(recipe: Recipe) -> bool:
    """Whether a recipe's stack weighs as much as SDXL, and not as little as the pocket."""
    return sum(artifact.bytes for artifact in artifacts_of(recipe).values()) > GPU_BYTES


def check_device(recipe: Recipe, device: str) -> str:
    """The device to run on, asked before any model is looked at.

    Raises:
        DeviceError: no such device, or a full-size stack and no GPU.
    """
    from ..models.device import pick_device

    found = pick_device(device)
    if device == "auto" and found.type == "cpu" and is_full_size(recipe):
        raise DeviceError(
            f"recipe '{recipe.name}' needs a GPU, and there is no CUDA device here",
            "--recipe pocket runs on any machine; --device cpu tries all the same (slow, 24 GB of memory)",
        )
    return str(found)


def check_commercial(artifacts: Iterable[Artifact], what: str, log: Log = lambda _: None) -> None:
    """Refuse what a license keeps from commercial use. A lawyer's answer it is not.

    A saved identity changes nothing: its embedding came out of the face models.

    Args:
        artifacts: the model parts that are to be used.
        what: what they belong to, as "recipe 'pocket'".
        log: told of the parts whose license leaves it unclear.

    Raises:
        LicenseError: names every part that forbids it.
    """
    parts = {artifact.name: artifact for artifact in artifacts}.values()
    for part in parts:
        if part.commercial == "unclear":
            note = part.commercial_note or "its license is not known here"
            log(f"commercial use of {part.name} is unclear: {note} {part.page}".rstrip())
    forbidden = [f"{part.name} ({part.license})" for part in parts if part.commercial == "no"]
    if forbidden:
        raise LicenseError(
            f"{what} may not be used commercially: {', '.join(forbidden)}",
            "`fastface licenses` tells each part's terms; recipe 'pocket' is free, and --set model.PART=... "
            "names another part",
        )


def fetch(
    recipe: Recipe,
    settings: Settings,
    *,
    faces: bool = True,
    offline: bool | None = None,
    progress: bool = True,
) -> dict[str, Path]:
    """Make the files of a recipe present: where each role lies on disk.

    Args:
        recipe: whose parts.
        settings: where the cache is.
        faces: also the face models, which a saved identity makes needless.
        offline: fetch nothing; None asks HF_HUB_OFFLINE.
        progress: show it.

    Raises:
        ModelUnavailableError: something is missing and cannot be had.
    """
    from ..store import Store

    artifacts = artifacts_of(recipe)
    if not faces:
        artifacts.pop("face")
    store = Store(settings, offline=offline)
    distinct = {artifact.name: artifact for artifact in artifacts.values()}
    paths = store.ensure(list(distinct.values()), progress=progress)
    return {role: paths[artifact.name] for role, artifact in artifacts.items()}


def random_seed() -> int:
    """A seed short enough to type again."""
    return secrets.randbelow(2**32)


class FastFace:
    """A recipe made ready to run.

    Models are fetched and loaded when they are first needed, and stay loaded.

    Args:
        recipe: name of a recipe, path of a recipe file, or a `Recipe`.
        overrides: `--set` style changes, as "guidance.text=[1, 2, 2, 1]".
        stack: a folder of local weights instead of the recipe's models.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`; None takes the machine's setting.
        dtype: `float32`, `float16` or `bfloat16`; None chooses by device.
        offline: fetch nothing; None asks HF_HUB_OFFLINE.
        fused_cache: keep the fused models on the disk, so that the next start is quicker.
        low_memory: `off`, `12`, `8` or `6` (GB of the card), or `auto`; None takes the machine's setting.
        acceleration: what is done for speed; None is `Acceleration()`.
        remember: keep identities by the hash of their photos, and take them from there.
        progress: show progress on stderr when it is a terminal.
        log: takes one line of notice.

    Raises:
        RecipeError: the recipe is not valid.
    """

    def __init__(
        self,
        recipe: str | Recipe = "hyper-fastface",
        *,
        overrides: Sequence[str] = (),
        stack: Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        offline: bool | None = None,
        fused_cache: bool = True,
        low_memory: Saving | None = None,
        acceleration: Acceleration = DEFAULT,
        remember: bool = False,
        progress: bool = False,
        log: Log = lambda _: None,
    ) -> None:
        from ..recipe.files import load_recipe

        self.settings = load_settings()
        self.recipe = (
            recipe
            if isinstance(recipe, Recipe)
            else load_recipe(recipe, overrides=overrides, stack=stack).recipe
        )
        self.device = device or self.settings.device
        self.dtype = dtype
        self.offline = offline
        self.fused_cache = fused_cache
        self.low_memory: Saving = low_memory or self.settings.low_memory
        self.acceleration = acceleration
        self.remember = remember
        self.progress = progress
        self.log = log
        self._paths: dict[str, Path] = {}
        self._analyzer: InsightFaceAnalyzer | None = None
        self._pipeline: Pipeline | None = None
        self._scorer: Scorer | None = None

    def paths(self, *, faces: bool) -> Mapping[str, Path]:
        """Where the model files lie, by role; fetched if need be, face models only when asked for."""
        if not self._paths or (faces and "face" not in self._paths):
            self._paths = fetch(
                self.recipe, self.settings, faces=faces, offline=self.offline, progress=self.progress
            )
        return self._paths

    @property
    def pipeline(self) -> Pipeline:
        """The loaded stack."""
        if self._pipeline is None:
            from ..store import Store
            from .pipeline import Pipeline

            device = check_device(self.recipe, self.device)
            if self.acceleration.compile:
                from ..models.compilation import keep_graphs

                keep_graphs(self.settings.home / "graphs")
            self._pipeline = Pipeline.load(
                self.recipe,
                self.paths(faces=False),
                device=device,
                dtype=self.dtype,
                log=self.log,
                fused=Store(self.settings).fused if self.fused_cache else None,
                acceleration=self.acceleration,
                level=self._level(device),
            )
        return self._pipeline

    def _level(self, device: str) -> Level:
        """How the stack is fitted into the device's memory; `auto` looks at what is free on a card."""
        import torch

        from ..models.device import pick_dtype
        from ..models.offload import GIB, LEVELS, OFF, choose

        where = torch.device(device)
        if self.low_memory != "auto":
            return LEVELS[self.low_memory]
        if where.type != "cuda" or not is_full_size(self.recipe):
            return OFF
        free, _ = torch.cuda.mem_get_info(where)
        sampling, half = self.recipe.sampling, pick_dtype(self.dtype, where).itemsize == 2
        level = choose(free, sampling.width * sampling.height, half=half)
        if level.moves_unet and self.acceleration.compile:
            level = LEVELS["12"]  # the smallest that leaves the UNet in its place
        if level is not OFF:
            self.log(
                f"{free / GIB:.1f} GiB of the card are free: --low-memory {level.name}, the same picture "
                "more slowly; --low-memory off keeps all models there"
            )
        return level

    @property
    def analyzer(self) -> InsightFaceAnalyzer:
        """The loaded face models."""
        from ..identity.analyzer import load_face_models
        from ..models.device import pick_device

        if self._analyzer is None:
            device = str(pick_device(self.device))
            self._analyzer = load_face_models(self.paths(faces=True)["face"], device=device)
            if self._analyzer.note:
                self.log(self._analyzer.note)
        return self._analyzer

    @property
    def scorer(self) -> Scorer:
        """What measures candidates for the best of several; says through `log` what it cannot measure."""
        from ..store import Store
        from .best_of import PROMPT_SCORER, Scorer, clip_prompt_scorer, own_prompt_scorer, pick_judge

        if self._scorer is None:
            judge = pick_judge(self.analyzer, self.log)
            prompt = own_prompt_scorer(self.pipeline)
            if prompt is None:
                store, artifact = Store(self.settings, offline=self.offline), resolve(PROMPT_SCORER)
                if not store.missing([artifact]):
                    prompt = clip_prompt_scorer(store.path(artifact), self.pipeline)
                else:
                    self.log(
                        "whether pictures follow the prompt is not scored: no CLIP is here; "
                        f"`fastface download {PROMPT_SCORER}` fetches it"
                    )
            self._scorer = Scorer(self.analyzer, judge, prompt)
        return self._scorer

    def identity(
        self,
        *photos: str | Path | Image.Image,
        face_index: int | None = None,
        face_box: tuple[float, float, float, float] | None = None,
    ) -> Identity:
        """A person from one or several photos.

        Raises:
            UsageError: a photo cannot be read.
            NoFaceError: no usable face in them.
        """
        from ..identity.cache import Remembered, key_of
        from ..identity.identity import make_identity

        given = [Path(photo) if isinstance(photo, str) else photo for photo in photos]
        files, kept = [photo for photo in given if isinstance(photo, Path)], Remembered(self.settings.home)
        key = None
        if self.remember and len(files) == len(given):
            key = key_of(files, artifacts_of(self.recipe)["face"], face_index, face_box)
            if key is not None and (known := kept.find(key)) is not None:
                return known
        found = make_identity(given, self.analyzer, face_index=face_index, face_box=face_box, log=self.log)
        if key is not None:
            kept.keep(key, found)
        return found

    def generate(
        self,
        identity: Identity,
        prompt: str,
        *,
        seed: int | None = None,
        count: int = 1,
        negative_prompt: str | None = None,
        adapter_scale: float | None = None,
        **options: Any,
    ) -> list[Image.Image]:
        """Pictures of a person.

        Args:
            identity: who.
            prompt: what.
            seed: of the first picture; the next ones follow. None: random.
            count: how many.
            negative_prompt: None is the recipe's.
            adapter_scale: None is the recipe's.
            options: of `Pipeline.generate`: `batch_size`, `on_step`.

        Returns:
            8-bit RGB pictures of the recipe's size.

        Raises:
            DeviceError: out of memory.
            ModelUnavailableError: a model cannot be had or loaded.
        """
        from .pipeline import Request

        first = random_seed() if seed is None else seed
        negative = self.recipe.negative_prompt if negative_prompt is None else negative_prompt
        requests = [
            Request(prompt, first + index, identity, negative, adapter_scale) for index in range(count)
        ]
        return [picture.image for picture in self.pipeline.generate(requests, **options)]

    def best_of(
        self,
        identity: Identity,
        prompt: str,
        *,
        n: int = 8,
        seed: int | None = None,
        negative_prompt: str | None = None,
        adapter_scale: float | None = None,
        **options: Any,
    ) -> Best:
        """The picture most like the person among `n`, of those that follow the prompt: see `best.choose`.

        Args:
            identity: who.
            prompt: what.
            n: how many pictures are made.
            seed: of the first one; the next ones follow. None: random.
            negative_prompt: None is the recipe's.
            adapter_scale: None is the recipe's.
            options: of `Pipeline.generate`: `batch_size`, `on_step`.

        Raises:
            UsageError: fewer than one picture is asked for, or more than a thousand.
            DeviceError: out of memory.
            ModelUnavailableError: a model cannot be had or loaded.
        """
        from .best_of import MOST, Best, make_candidates
        from .pipeline import Request

        if not 1 <= n <= MOST:
            raise UsageError(f"best of {n}: it takes 1 to {MOST} pictures")
        first = random_seed() if seed is None else seed
        negative = self.recipe.negative_prompt if negative_prompt is None else negative_prompt
        requests = [Request(prompt, first + index, identity, negative, adapter_scale) for index in range(n)]
        found = make_candidates(self.pipeline, self.scorer, requests, **options)
        kept = found.pictures[found.kept]
        return Best(kept.image, kept.request.seed, found.scores, found.judge)
