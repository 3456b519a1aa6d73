"""What a run needs before it starts: models, metrics, workers, and what `run.json` says of it all."""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..app.api import artifacts_of, check_device, fetch
from ..errors import UsageError
from ..output.metadata import content_mark, installed_versions
from ..settings import Settings
from ..store.manifest import resolve
from .engines import LocalPool, Pool, RayPool, local_devices
from .maker import MakerFactory
from .metrics.base import Context, Metric, Rules, make_metrics, missing_modules, registry
from .people import People
from .runner import Plan, Scoring

if TYPE_CHECKING:
    from ..identity.analyzer import FaceAnalyzer
    from ..recipe.schema import Recipe

POCKET = ("id", "dlib", "clip-pocket", "cost")
"""Metrics of runs in which every model is the packaged miniature: none of them needs the network."""
FULL = ("id", "adaface", "dlib", "clip-b32", "clip-l14", "face-clip", "image-reward", "aesthetic", "cost")
PUBLISHED = ("id", "clip-b32", "clip-l14", "image-reward", "aesthetic", "face-clip")
Engine = Literal["local", "ray"]


@dataclass(frozen=True)
class Machine:
    """Where and how a run's pictures are made."""

    engine: Engine = "local"
    address: str | None = None
    workers: int | None = None
    threads: int = 1
    device: str = "auto"
    dtype: str | None = None
    offline: bool | None = None


def describe(
    plan: Plan, machine: Machine, *, rules: Rules, split: str, metrics: Sequence[str]
) -> dict[str, Any]:
    """What `run.json` says; all but `hardware`, `metrics` and `started` must stay for a run to go on."""
    from ..models.device import pick_device, pick_dtype

    device = pick_device(machine.device)
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
            "dtype": str(pick_dtype(machine.dtype, device)).removeprefix("torch."),
            "threads": machine.threads,
        },
        "versions": dict(installed_versions()),
        "metrics": list(metrics),
        "hardware": hardware() | {"engine": machine.engine},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _marks(recipe: Recipe) -> dict[str, str | None]:
    """A mark of the content of every model that is a file of this machine, by role."""
    return {
        role: content_mark(artifact.local)
        for role, artifact in artifacts_of(recipe).items()
        if artifact.local is not None
    }


def hardware() -> dict[str, Any]:
    """What the machine is."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(terse=True),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpus": gpus,
    }


def default_metrics(recipes: Mapping[str, Recipe], rules: Rules) -> list[str]:
    """The metrics of a run that names none: what is installed of the set that fits its models."""
    packaged = all(
        artifact.packaged for recipe in recipes.values() for artifact in artifacts_of(recipe).values()
    )
    chosen = POCKET if packaged else PUBLISHED if rules == "published" else FULL
    known = registry()
    return [name for name in chosen if name in known and not missing_modules(known[name])]


def check_machine(recipes: Mapping[str, Recipe], machine: Machine) -> None:
    """Refuse what this machine cannot do; asked before any model is fetched. A cluster speaks for itself.

    Raises:
        DeviceError: no such device, or a full-size stack and no GPU.
        UsageError: no such dtype.
    """
    from ..models.device import pick_device, pick_dtype

    if machine.engine == "local":
        for recipe in recipes.values():
            check_device(recipe, machine.device)
    pick_dtype(machine.dtype, pick_device("auto" if machine.engine == "ray" else machine.device))


def people(
    folder: Path,
    recipes: Mapping[str, Recipe],
    machine: Machine,
    settings: Settings,
    log: Callable[[str], None],
) -> People:
    """What makes identities, the models of all recipes fetched."""
    packs: dict[str, Path] = {}
    for recipe in recipes.values():
        packs[str(recipe.model.face)] = fetch(recipe, settings, offline=machine.offline)["face"]

    def analyzer(pack: Path) -> FaceAnalyzer:
        from ..identity.analyzer import load_face_models

        found = load_face_models(pack, device=_beside(machine))
        if found.note:
            log(found.note)
        return found

    return People(folder, {face: functools.partial(analyzer, pack) for face, pack in packs.items()}, log)


def pool(plan: Plan, machine: Machine) -> Pool:
    """The workers of a run."""
    factory = MakerFactory(plan.recipes, machine.dtype, machine.offline, machine.threads)
    if machine.engine == "ray":
        return RayPool(factory, address=machine.address, workers=machine.workers, device=machine.device)
    if machine.address is not None:
        raise UsageError("--address belongs to --engine ray", "leave it out, or add --engine ray")
    return LocalPool(factory, local_devices(machine.device, machine.workers))


def scoring(
    names: Sequence[str], recipes: Mapping[str, Recipe], machine: Machine, rules: Rules, settings: Settings
) -> Scoring:
    """Metrics by name, their files fetched now and their models loaded beside the first pictures.

    Raises:
        UsageError: there is no such metric.
        ModelUnavailableError: what one needs cannot be had.
    """
    from ..store import Store

    metrics = make_metrics(names)
    roles = {role for metric in metrics for role in metric.needs.roles}
    by_role = _roles(roles, recipes)
    wanted = {name: resolve(name) for metric in metrics for name in metric.needs.artifacts} | by_role
    found = Store(settings, offline=machine.offline).ensure(list(wanted.values()))
    context = Context({name: found[one.name] for name, one in wanted.items()}, _beside(machine), rules)
    return Scoring(metrics, functools.partial(_load, list(names), context, machine.threads))


def _roles(roles: set[str], recipes: Mapping[str, Recipe]) -> dict[str, Any]:
    """The artifacts that recipes agree on, by role: a metric judges all of them with one model."""
    found = {}
    for role in sorted(roles):
        choices = {
            artifact.name: artifact
            for recipe in recipes.values()
            for name, artifact in artifacts_of(recipe).items()
            if name == role
        }
        if len(choices) != 1:
            raise UsageError(
                f"the recipes have {len(choices)} different models for '{role}' ({', '.join(choices)}), "
                "and a metric judges all pictures with one",
                "run them apart, or choose other metrics",
            )
        found[role] = next(iter(choices.values()))
    return found


def _load(names: Sequence[str], context: Context, threads: int) -> list[Metric]:
    """Metrics with their models, in the process that scores."""
    import torch

    torch.set_num_threads(threads)
    metrics = make_metrics(names)
    for metric in metrics:
        metric.load(context)
    return metrics


def _beside(machine: Machine) -> str:
    """The device of what is not generation: scoring and faces."""
    from ..models.device import pick_device

    return str(pick_device(machine.device if machine.engine == "local" else "auto"))
