"""The server without HTTP: submissions, runs, identities and status."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..app.licensing import artifacts_of
from ..app.plan import check_pose, plan_run
from ..app.runtime import Runtime
from ..app.session import Session
from ..app.stack import ModelStack
from ..errors import UsageError
from ..files import remove_abandoned
from ..recipe.files import list_recipes, load_recipe
from ..recipe.schema import Recipe
from ..settings import Settings
from ..store import Store
from .fair_queue import FairQueue
from .identities import FaceService, IdentityBook
from .limits import Limits
from .runs import ENDED, Person, Registry, ServedRun
from .schema import RunBody, registered
from .worker import Worker

METHODS = ("fastface-am2", "fastface", "am1", "am2", "dcg", "baseline")
"""Endings of recipe names."""


@dataclass(frozen=True)
class StudioOptions:
    """Settings of a server."""

    recipe: str
    """Default of requests that name none."""
    limits: Limits = field(default_factory=Limits)
    output: Path | None = None
    """Folder of the images and identities; None keeps them in memory."""
    idle_minutes: float | None = None
    """After which the models are unloaded; None is never."""


class Studio:
    """Everything the APIs share.

    Args:
        options: of the server.
        runtime: device, dtype, offload and acceleration.
        settings: of this machine.
        offline: download nothing; None follows HF_HUB_OFFLINE.

    Raises:
        UsageError: the default recipe does not exist, or two choices exclude each other.
        DeviceError: the default recipe cannot run on this machine.
    """

    def __init__(
        self, options: StudioOptions, runtime: Runtime, settings: Settings, *, offline: bool | None = None
    ) -> None:
        self.options = options
        self.limits = options.limits
        self.settings = settings
        self.runtime = runtime
        self.offline = offline
        recipe = load_recipe(registered(options.recipe)).recipe
        self.device = str(runtime.resolve(recipe, settings).device)
        """Where the default recipe runs."""
        session = Session(options.recipe, runtime, settings=settings, offline=offline)
        idle = None if options.idle_minutes is None else 60 * options.idle_minutes
        self.queue = FairQueue(self.limits.queue)
        self.worker = Worker(session, self.queue, idle)
        self.registry = Registry(self.limits)
        self.faces = FaceService(ModelStack(runtime, settings, offline=offline))
        folder = None if options.output is None else options.output / "identities"
        if options.output is not None:
            remove_abandoned(options.output)
        self.identities = IdentityBook(folder, self.limits.identities)
        self._findings: list[dict[str, Any]] | None = None

    def start(self) -> None:
        """Start to work."""
        self.worker.start()

    def stop(self) -> None:
        """Cancel all runs and free the models."""
        self.worker.stop()

    def submit(
        self, body: RunBody, person: Person, client: str, key: str | None = None
    ) -> tuple[ServedRun, bool]:
        """Check a run and append it to the queue.

        Args:
            body: the run.
            person: who it shows; a name in `body.identity` wins.
            client: whose line it joins.
            key: idempotency key; the same key and content give the same run.

        Returns:
            The run, and whether it is new.

        Raises:
            UsageError: the run is not valid.
            BusyError: the queue is full.
            ConflictError: the key belongs to other content.
        """
        digest = _digest(body, person)
        if key is not None:
            earlier = self.registry.repeated(key, digest)
            if earlier is not None:
                return earlier, False
        request = body.request(self.limits, self.options.recipe, self.options.output)
        plan = plan_run(request, self.options.recipe, self.runtime.acceleration.lossy())
        if person.pose is not None:
            check_pose(plan.recipe)
        sampling = plan.recipe.sampling
        if sampling.width * sampling.height > self.limits.pixels:
            raise UsageError(
                f"{sampling.width}x{sampling.height} is too large",
                f"the limit is {self.limits.pixels} pixels",
            )
        # Resolved once: the worker runs `plan.recipe`.
        resolved = request.model_copy(update={"recipe": None, "changes": {}, "aspect": None})
        run = ServedRun(body, resolved, plan.recipe, client, self._person(body, person))
        self.queue.put(run)
        self.registry.add(run, key, digest)
        return run, True

    def _person(self, body: RunBody, person: Person) -> Person:
        if body.identity is not None:
            if person.photos or person.identity is not None:
                raise UsageError("photos and a saved identity both name a person", "send only one of them")
            return Person(identity=self.identities.find(body.identity), pose=person.pose)
        if not person.photos and person.identity is None:
            raise UsageError("there is no person", "send a photo, or the name of a saved identity")
        return person

    def cancel(self, run: ServedRun) -> None:
        """Cancel a run, or forget it if it has ended."""
        if run.state in ENDED:
            self.registry.forget(run)
        else:
            self.worker.cancel(run)

    def record(self, run: ServedRun) -> dict[str, Any]:
        """A run as the API describes it."""
        return run.record(self.queue.position(run) if run.state == "queued" else None)

    def recipe(self, name: str | None = None) -> Recipe:
        """A registered recipe by name; None is the default."""
        return load_recipe(registered(name or self.options.recipe)).recipe

    def status(self) -> dict[str, Any]:
        """The state of the server."""
        limits = self.limits
        return {
            "version": __version__,
            "recipe": self.options.recipe,
            "loaded": self.worker.loaded,
            "device": self.device,
            "queue": {
                "waiting": len(self.queue),
                "running": int(self.worker.current is not None),
                "limit": limits.queue,
            },
            "findings": self.findings(),
            "limits": {
                "photos": limits.photos,
                "photo_bytes": limits.photo_bytes,
                "body_bytes": limits.body_bytes,
                "images": limits.images,
                "pixels": limits.pixels,
            },
            "adjustable": list(limits.fields),
        }

    def findings(self) -> list[dict[str, Any]]:
        """What `fastface doctor` reports for the default recipe, examined once, without paths."""
        if self._findings is None:
            from ..doctor.checks import examine
            from ..doctor.machine import inspect_machine

            name = self.options.recipe
            # Without the network: a page must not wait for a server that does not answer.
            findings = examine(self.recipe(), name, self.settings, inspect_machine(), offline=True)
            self._findings = [finding.record() for finding in findings if finding.level != "ok"]
        return self._findings

    def recipes(self) -> list[dict[str, Any]]:
        """All recipes, with what they would download."""
        store = Store(self.settings, offline=True)
        return [self._recipe_record(info.name, info.short, info.summary, store) for info in list_recipes()]

    def _recipe_record(self, name: str, short: str | None, summary: str, store: Store) -> dict[str, Any]:
        recipe = load_recipe(name).recipe
        parts = list({part.name: part for part in artifacts_of(recipe).values()}.values())
        uses = {part.commercial for part in parts}
        family, method = family_of(name)
        return {
            "name": name,
            "short": short,
            "summary": summary,
            "model": family,
            "adapter": recipe.adapter.kind,
            "method": method,
            "width": recipe.sampling.width,
            "height": recipe.sampling.height,
            "steps": recipe.sampling.steps,
            "default": self.options.recipe in (name, short),
            "adapter_scale": recipe.adapter.scale,
            "download_bytes": sum(part.bytes for part in parts if not part.packaged),
            "missing_bytes": sum(entry.bytes for entry in store.missing(parts)),
            "commercial": "no" if "no" in uses else "unclear" if "unclear" in uses else "yes",
        }

    def licenses(self, name: str) -> dict[str, Any]:
        """The licenses of a recipe's parts."""
        parts = [
            {
                "role": role,
                "name": part.name,
                "license": part.license,
                "commercial": part.commercial,
                "page": part.page,
                "note": part.commercial_note or None,
            }
            for role, part in artifacts_of(self.recipe(name)).items()
        ]
        return {"recipe": name, "parts": parts}


def family_of(name: str) -> tuple[str, str | None]:
    """The family of a recipe and its method, from its name; None for the base models without a person."""
    for method in METHODS:
        if name.endswith(f"-{method}"):
            return name.removesuffix(f"-{method}"), method
    # An adapter's recipe without a method, such as hyper-instantid, is its baseline.
    return name, None if name.rpartition("-")[2] == "base" else "baseline"


def _digest(body: RunBody, person: Person) -> str:
    """A hash of everything that determines a run."""
    content = hashlib.sha256(body.model_dump_json().encode())
    photos: Sequence[Any] = (*person.photos, *([person.pose] if person.pose else []))
    for photo in photos:
        content.update(hashlib.sha256(photo.image.tobytes()).digest())
    if person.identity is not None:
        content.update(person.identity.digest().encode())
    return content.hexdigest()
