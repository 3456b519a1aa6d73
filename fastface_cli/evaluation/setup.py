"""Prepare a run: models, metrics, workers and the contents of `run.json`."""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..app.licensing import artifacts_of
from ..app.runtime import check_device
from ..app.stack import fetch, load_analyzer, load_face_encoder
from ..errors import UsageError
from ..files import content_mark
from ..identity.analyzer import is_detector
from ..identity.features import NEEDED
from ..output.metadata import installed_versions
from ..settings import Settings
from ..store import ProgressObserver
from ..store.manifest import Artifact, resolve
from .engines import LocalPool, Pool, RayPool, local_devices
from .maker import MakerFactory
from .metrics.base import Context, Metric, Needs, Rules, make_metrics, missing_modules, registry
from .people import Features, People, identity_key
from .runner import EvaluationPlan, Scoring

if TYPE_CHECKING:
    from ..identity.analyzer import FaceAnalyzer
    from ..recipe.schema import Recipe

POCKET = ("id", "dlib", "clip-pocket", "cost")
"""Metrics of runs that only use the packaged pocket models: none of them needs the network."""
FULL = ("id", "adaface", "dlib", "clip-b32", "clip-l14", "face-clip", "image-reward", "aesthetic", "cost")
PUBLISHED = ("id", "clip-b32", "clip-l14", "image-reward", "aesthetic", "face-clip")
PoolEngine = Literal["local", "ray"]


@dataclass(frozen=True)
class WorkerSetup:
    """Where and how images are generated."""

    engine: PoolEngine = "local"
    address: str | None = None
    workers: int | None = None
    threads: int = 1
    device: str = "auto"
    dtype: str | None = None
    offline: bool | None = None


def describe(
    plan: EvaluationPlan, worker_setup: WorkerSetup, *, rules: Rules, split: str, metrics: Sequence[str]
) -> dict[str, Any]:
    """Return the contents of `run.json`. Only `hardware`, `metrics` and `started` may change later."""
    from ..models.device import pick_device, pick_dtype

    device = pick_device(worker_setup.device)
    return {
        "recipes": {name: recipe.canonical() for name, recipe in plan.recipes.items()},
        "local_models": {name: marks for name, recipe in plan.recipes.items() if (marks := _marks(recipe))},
        "dataset": plan.dataset.record(),
        "options": {
            "protocol": rules,
            "split": split,
            "seeds": plan.seeds,
            "stress": list(plan.stresses),
            "shard": "{}/{}".format(*plan.shard),
            "device": device.type,
            "dtype": str(pick_dtype(worker_setup.dtype, device)).removeprefix("torch."),
            "threads": worker_setup.threads,
        },
        "versions": dict(installed_versions()),
        "metrics": list(metrics),
        "hardware": hardware() | {"engine": worker_setup.engine},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _marks(recipe: Recipe) -> dict[str, str | None]:
    """Return a content fingerprint of every model that is a local file, by role."""
    return {
        role: content_mark(artifact.local)
        for role, artifact in artifacts_of(recipe).items()
        if artifact.local is not None
    }


def hardware() -> dict[str, Any]:
    """Return a description of the hardware."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(terse=True),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpus": gpus,
    }


def default_metrics(recipes: Mapping[str, Recipe], rules: Rules) -> list[str]:
    """Return the default metrics: those of the set for these models that are installed and can score them."""
    packaged = all(
        artifact.packaged for recipe in recipes.values() for artifact in artifacts_of(recipe).values()
    )
    chosen = POCKET if packaged else PUBLISHED if rules == "published" else FULL
    known = registry()
    installed = [name for name in chosen if name in known and not missing_modules(known[name])]
    return [name for name in installed if _scores(known[name].needs, recipes)]


def _scores(needs: Needs, recipes: Mapping[str, Recipe]) -> bool:
    """Whether a metric can score the images of all recipes."""
    try:
        _roles(needs, recipes)
    except UsageError:
        return False
    return True


def check_machine(recipes: Mapping[str, Recipe], worker_setup: WorkerSetup) -> None:
    """Check device and dtype before any download. Devices of a Ray cluster are checked by its workers.

    Raises:
        DeviceError: no such device, or a full-size stack without a GPU.
        UsageError: unknown dtype.
    """
    from ..models.device import pick_device, pick_dtype

    if worker_setup.engine == "local":
        for recipe in recipes.values():
            check_device(recipe, worker_setup.device)
    pick_dtype(
        worker_setup.dtype, pick_device("auto" if worker_setup.engine == "ray" else worker_setup.device)
    )


def people(
    folder: Path,
    recipes: Mapping[str, Recipe],
    worker_setup: WorkerSetup,
    settings: Settings,
    log: Callable[[str], None],
    progress: ProgressObserver,
) -> People:
    """Download the models of all recipes and return what computes identities."""
    device = _beside(worker_setup)

    def analyzer(pack: Path) -> FaceAnalyzer:
        models = load_analyzer(pack, device)
        if models.note:
            log(models.note)
        return models

    analyzers: dict[str, Callable[[], FaceAnalyzer]] = {}
    features: dict[str, Features] = {}
    for recipe in recipes.values():
        paths = fetch(recipe, settings, offline=worker_setup.offline, progress=progress)
        key = identity_key(recipe)
        analyzers[key] = functools.partial(analyzer, paths["face"])
        names = {*features.get(key, Features()).names, *NEEDED[recipe.adapter.kind]}
        load = functools.partial(load_face_encoder, paths, device) if recipe.model.face_parsing else None
        features[key] = Features(tuple(sorted(names)), load)
    return People(folder, analyzers, log, features)


def pool(plan: EvaluationPlan, worker_setup: WorkerSetup) -> Pool:
    """Return the worker pool of a run."""
    factory = MakerFactory(plan.recipes, worker_setup.dtype, worker_setup.offline, worker_setup.threads)
    if worker_setup.engine == "ray":
        return RayPool(
            factory, address=worker_setup.address, workers=worker_setup.workers, device=worker_setup.device
        )
    if worker_setup.address is not None:
        raise UsageError("--address requires --engine ray", "omit it, or add --engine ray")
    return LocalPool(factory, local_devices(worker_setup.device, worker_setup.workers))


def scoring(
    names: Sequence[str],
    recipes: Mapping[str, Recipe],
    worker_setup: WorkerSetup,
    rules: Rules,
    settings: Settings,
    progress: ProgressObserver,
) -> Scoring:
    """Return metrics by name. Their files are downloaded now; their models load while images are generated.

    Raises:
        UsageError: unknown metric.
        ModelUnavailableError: a metric needs a file that is unavailable.
    """
    from ..store import Store

    metrics = make_metrics(names)
    by_role = {
        role: artifact for metric in metrics for role, artifact in _roles(metric.needs, recipes).items()
    }
    artifacts = {name: resolve(name) for metric in metrics for name in metric.needs.artifacts} | by_role
    store = Store(settings, offline=worker_setup.offline)
    paths = store.ensure(list(artifacts.values()), progress=progress)
    context = Context(
        {name: paths[artifact.name] for name, artifact in artifacts.items()}, _beside(worker_setup), rules
    )
    return Scoring(metrics, functools.partial(_load, list(names), context, worker_setup.threads))


def _roles(needs: Needs, recipes: Mapping[str, Recipe]) -> dict[str, Artifact]:
    """Return the artifacts that a metric needs of the recipes, by role. It scores all recipes with one model.

    Faces are located with the models of the first recipe.

    Raises:
        UsageError: the recipes have different models, or none that compares faces.
    """
    shared = {}
    for role in needs.roles:
        choices = {
            artifact.name: artifact
            for recipe in recipes.values()
            for name, artifact in artifacts_of(recipe).items()
            if name == role
        }
        only_located = role == "face" and not needs.recognizer
        if len(choices) != 1 and not only_located:
            raise UsageError(
                f"the recipes have {len(choices)} different models for '{role}' ({', '.join(choices)}), "
                "but a metric scores all images with one model",
                "evaluate the recipes in separate runs, or choose other metrics, such as adaface or dlib",
            )
        shared[role] = next(iter(choices.values()))
    if needs.recognizer and not _recognizes(shared["face"]):
        raise UsageError(
            f"{shared['face'].name} detects faces but cannot compare them, which a metric requires",
            "choose other metrics, such as adaface or dlib",
        )
    return shared


def _recognizes(face: Artifact) -> bool:
    """Whether face models contain a recognizer, and not only a detector."""
    files = [face.local] if face.local is not None else [Path(file.path) for file in face.files]
    return not (len(files) == 1 and is_detector(files[0]))


def _load(names: Sequence[str], context: Context, threads: int) -> list[Metric]:
    """Create metrics and load their models, in the scoring process."""
    import torch

    torch.set_num_threads(threads)
    metrics = make_metrics(names)
    for metric in metrics:
        metric.load(context)
    return metrics


def _beside(worker_setup: WorkerSetup) -> str:
    """Return the device of scoring and face detection."""
    from ..models.device import pick_device

    return str(pick_device(worker_setup.device if worker_setup.engine == "local" else "auto"))
