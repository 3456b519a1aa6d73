"""Worker pools: processes of this machine, or Ray actors of a cluster. Images are assigned one by one.

The image of a crashed worker is requeued. An image that crashes `ATTEMPTS` workers is recorded as failed.
"""

from __future__ import annotations

import functools
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any, Protocol, TypeAlias

from ..errors import FastFaceError, ModelUnavailableError, UsageError
from .maker import Factory, ImageOutcome, ImageTask, error_record, failed
from .processes import Answerer, Broken, GoneError

ATTEMPTS = 3
"""Worker crashes after which an image is recorded as failed."""
LOSSES = 6
"""Consecutive worker crashes after which the run stops."""


@dataclass(frozen=True)
class Lost:
    """A worker crashed during its task."""

    reason: str


Outcome: TypeAlias = ImageOutcome | Lost | Broken


class Pool(Protocol):
    """Workers, addressed by slot number."""

    size: int

    def start(self, slot: int) -> None:
        """Start a worker, or replace a crashed one."""
        ...

    def send(self, slot: int, task: ImageTask) -> None:
        """Send a task to an idle worker."""
        ...

    def wait(self) -> list[tuple[int, Outcome]]:
        """Wait until at least one busy worker has finished or crashed."""
        ...

    def close(self) -> None:
        """Stop all workers."""
        ...


def make_all(
    pool: Pool, tasks: Iterable[ImageTask], log: Callable[[str], None] = lambda _: None
) -> Iterator[ImageOutcome]:
    """Run all tasks in the pool and yield outcomes in the order of completion.

    Args:
        pool: closed at the end, also after errors.
        tasks: consumed one by one, whenever a worker is idle.
        log: receives messages about crashed workers.

    Raises:
        FastFaceError: workers cannot generate images at all.
    """
    source = iter(tasks)
    requeued: deque[ImageTask] = deque()
    attempts: Counter[str] = Counter()
    losses = 0
    idle, busy = deque(range(pool.size)), dict[int, ImageTask]()
    finished: list[ImageOutcome] = []
    try:
        for slot in range(pool.size):
            pool.start(slot)
        while True:
            while idle and (task := requeued.popleft() if requeued else next(source, None)) is not None:
                busy[idle[0]] = task
                pool.send(idle.popleft(), task)
            yield from finished  # after sending, so that writing them keeps no worker waiting
            finished.clear()
            if not busy:
                return
            for slot, outcome in pool.wait():
                task = busy.pop(slot)
                idle.append(slot)
                if isinstance(outcome, Broken):
                    raise outcome.raised()
                if isinstance(outcome, ImageOutcome):
                    losses = 0
                    finished.append(outcome)
                    continue
                attempts[task.row.key] += 1
                losses += 1
                log(f"a worker crashed while generating {task.row.key}: {outcome.reason}")
                if losses >= LOSSES:
                    raise FastFaceError(
                        f"{losses} workers in a row crashed ({outcome.reason})",
                        "if memory is short, use fewer --workers",
                    )
                pool.start(slot)
                if attempts[task.row.key] < ATTEMPTS:
                    requeued.append(task)
                else:
                    lost = FastFaceError(f"{ATTEMPTS} workers crashed while generating it: {outcome.reason}")
                    finished.append(failed(task.row, lost))
    finally:
        pool.close()


def work(factory: Factory, device: str) -> Callable[[ImageTask], Outcome]:
    """Return the function that runs a task in a worker; the first task loads the models."""
    make = None

    def answer(task: ImageTask) -> Outcome:
        nonlocal make
        try:
            make = make or factory(device)
            return make(task)
        except Exception as error:
            return Broken(error_record(error))

    return answer


# ------------------------------------------------------------------------------------------------- local


class LocalPool:
    """Processes of this machine.

    Args:
        factory: creates the image maker; called in each process.
        devices: the device of each worker.
    """

    def __init__(self, factory: Factory, devices: Sequence[str]) -> None:
        self.size = len(devices)
        self._factory = factory
        self._devices = devices
        self._workers: dict[int, Answerer] = {}
        self._busy: set[int] = set()

    def start(self, slot: int) -> None:
        """See `Pool`."""
        if slot in self._workers:
            self._workers.pop(slot).close()
        self._workers[slot] = Answerer(functools.partial(work, self._factory, self._devices[slot]))

    def send(self, slot: int, task: ImageTask) -> None:
        """See `Pool`."""
        self._busy.add(slot)
        self._workers[slot].send(task)

    def wait(self) -> list[tuple[int, Outcome]]:
        """See `Pool`."""
        slots = {end: slot for slot in self._busy for end in self._workers[slot].ends}
        outcomes: list[tuple[int, Outcome]] = []
        for slot in dict.fromkeys(slots[end] for end in connection.wait(list(slots))):
            self._busy.discard(slot)
            try:
                outcomes.append((slot, self._workers[slot].receive()))
            except GoneError as gone:
                outcomes.append((slot, Lost(str(gone))))
        return outcomes

    def close(self) -> None:
        """See `Pool`."""
        for worker in self._workers.values():
            worker.terminate()
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()


def local_devices(device: str, workers: int | None) -> list[str]:
    """Return a device for each worker: the GPUs in turn, or the CPU.

    Args:
        device: `auto`, or one device for all workers.
        workers: number of workers; None: one per GPU, or one on the CPU.
    """
    import torch

    from ..models.device import pick_device

    chosen = pick_device(device)
    if device in ("auto", "cuda") and chosen.type == "cuda":
        every = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        return [every[index % len(every)] for index in range(workers or len(every))]
    return [str(chosen)] * (workers or 1)


# --------------------------------------------------------------------------------------------------- ray


class _Actor:
    """Code of a Ray actor; `RayPool` turns it into an actor, because Ray is optional."""

    def __init__(self, factory: Factory, device: str) -> None:
        self._answer = work(factory, device)

    def make(self, task: ImageTask) -> Outcome:
        return self._answer(task)

    def pid(self) -> int:
        return os.getpid()


class RayPool:
    """Ray actors, one per GPU or CPU slot of the cluster.

    Args:
        factory: creates the image maker; called in each actor.
        address: address of a running cluster; None starts one on this machine.
        workers: number of actors; None: one per GPU, or one per CPU in a cluster without GPUs.
        device: `auto`, or the device of every actor; `cpu` requests no GPU.

    Raises:
        ModelUnavailableError: Ray is not installed.
        UsageError: no such cluster, or a cluster that is too small.
    """

    def __init__(
        self,
        factory: Factory,
        *,
        address: str | None = None,
        workers: int | None = None,
        device: str = "auto",
    ) -> None:
        try:
            import ray
        except ImportError as error:
            raise ModelUnavailableError(
                "--engine ray needs ray, which is not installed", "pip install 'fastface-cli[ray]'"
            ) from error
        self._ray = ray
        self._own = not ray.is_initialized()
        if self._own:
            slots = {} if address else {"num_cpus": max(workers or 0, os.cpu_count() or 1)}
            try:
                ray.init(
                    address=address or "local",
                    log_to_driver=False,
                    logging_level="error",
                    include_dashboard=False,
                    **slots,
                )
            except Exception as error:
                raise UsageError(
                    f"cannot connect to the Ray cluster {address or 'of this machine'}: {error}",
                    "check --address",
                ) from error
        resources = ray.cluster_resources()
        gpus = 0 if device == "cpu" else int(resources.get("GPU", 0))
        cpus = max(1, int(resources.get("CPU", 1)))
        self.size = workers or gpus or cpus
        if not gpus and self.size > cpus:  # Ray would silently keep the rest waiting forever
            if self._own:
                ray.shutdown()
            raise UsageError(
                f"the Ray cluster has {cpus} CPUs for {self.size} workers",
                f"use at most --workers {cpus}",
            )
        # An actor must fit on one GPU: five actors on two GPUs get a third each, or one would wait forever.
        share = {"num_gpus": 1 / math.ceil(self.size / gpus)} if gpus else {"num_cpus": 1}
        # Each actor only sees its own GPU, as cuda:0.
        self._device = "cuda" if gpus and device == "auto" else "cpu" if device == "auto" else device
        self._kind = ray.remote(**share)(_Actor)
        self._factory = factory
        self._actors: dict[int, Any] = {}
        self._busy: dict[Any, int] = {}

    def start(self, slot: int) -> None:
        """See `Pool`."""
        self._actors[slot] = self._kind.remote(self._factory, self._device)

    def send(self, slot: int, task: ImageTask) -> None:
        """See `Pool`."""
        self._busy[self._actors[slot].make.remote(task)] = slot

    def wait(self) -> list[tuple[int, Outcome]]:
        """See `Pool`."""
        ready, _ = self._ray.wait(list(self._busy), num_returns=1)
        outcomes: list[tuple[int, Outcome]] = []
        for reference in ready:
            slot = self._busy.pop(reference)
            try:
                outcomes.append((slot, self._ray.get(reference)))
            except self._ray.exceptions.RayTaskError as error:
                outcomes.append((slot, Broken(error_record(error))))
            except self._ray.exceptions.RayError as error:  # the actor or its machine has crashed
                outcomes.append((slot, Lost((str(error) or type(error).__name__).splitlines()[0])))
        return outcomes

    def close(self) -> None:
        """See `Pool`."""
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._actors.clear()
        if self._own:
            self._ray.shutdown()
