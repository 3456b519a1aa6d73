"""Workers: processes of this machine, or Ray actors on many. Images are handed out one by one.

A worker that dies takes no image with it: what it was making goes to another one. Only when an image has cost
`ATTEMPTS` workers is it recorded as failed.
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
from .maker import Factory, Job, Made, error_record, failed
from .processes import Answerer, Broken, GoneError

ATTEMPTS = 3
"""Workers that one image may cost."""
LOSSES = 6
"""Workers lost in a row, without an image between them, after which the run stops."""


@dataclass(frozen=True)
class Lost:
    """A worker died over its job."""

    reason: str


Outcome: TypeAlias = Made | Lost | Broken


class Pool(Protocol):
    """Workers by number."""

    size: int

    def start(self, slot: int) -> None:
        """Start a worker, or another one in place of a lost one."""
        ...

    def send(self, slot: int, job: Job) -> None:
        """Give an idle worker its job."""
        ...

    def wait(self) -> list[tuple[int, Outcome]]:
        """Wait until at least one busy worker is done, or lost."""
        ...

    def close(self) -> None:
        """End all workers."""
        ...


def make_all(pool: Pool, jobs: Iterable[Job], log: Callable[[str], None] = lambda _: None) -> Iterator[Made]:
    """Every job through the pool, in the order in which they get done.

    Args:
        pool: closed at the end, whatever the end is.
        jobs: taken one by one, as workers come free.
        log: told of lost workers.

    Raises:
        FastFaceError: workers cannot make images at all.
    """
    source = iter(jobs)
    again: deque[Job] = deque()
    attempts: Counter[str] = Counter()
    losses = 0
    idle, busy = deque(range(pool.size)), dict[int, Job]()
    made: list[Made] = []
    try:
        for slot in range(pool.size):
            pool.start(slot)
        while True:
            while idle and (job := again.popleft() if again else next(source, None)) is not None:
                busy[idle[0]] = job
                pool.send(idle.popleft(), job)
            yield from made  # only now: whoever writes them keeps no worker waiting
            made.clear()
            if not busy:
                return
            for slot, outcome in pool.wait():
                job = busy.pop(slot)
                idle.append(slot)
                if isinstance(outcome, Broken):
                    raise outcome.raised()
                if isinstance(outcome, Made):
                    losses = 0
                    made.append(outcome)
                    continue
                attempts[job.row.key] += 1
                losses += 1
                log(f"a worker was lost over {job.row.key}: {outcome.reason}")
                if losses >= LOSSES:
                    raise FastFaceError(
                        f"{losses} workers in a row were lost ({outcome.reason})",
                        "is there memory for so many? --workers takes fewer",
                    )
                pool.start(slot)
                if attempts[job.row.key] < ATTEMPTS:
                    again.append(job)
                else:
                    lost = FastFaceError(f"{ATTEMPTS} workers were lost over it: {outcome.reason}")
                    made.append(failed(job.row, lost))
    finally:
        pool.close()


def work(factory: Factory, device: str) -> Callable[[Job], Outcome]:
    """What a worker of any engine does with a job; models come with the first one."""
    make = None

    def one(job: Job) -> Outcome:
        nonlocal make
        try:
            make = make or factory(device)
            return make(job)
        except Exception as error:
            return Broken(error_record(error))

    return one


# ------------------------------------------------------------------------------------------------- local


class LocalPool:
    """Processes of this machine.

    Args:
        factory: makes what makes images; called in each process.
        devices: one a worker.
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

    def send(self, slot: int, job: Job) -> None:
        """See `Pool`."""
        self._busy.add(slot)
        self._workers[slot].send(job)

    def wait(self) -> list[tuple[int, Outcome]]:
        """See `Pool`."""
        slots = {end: slot for slot in self._busy for end in self._workers[slot].ends}
        found: list[tuple[int, Outcome]] = []
        for slot in dict.fromkeys(slots[end] for end in connection.wait(list(slots))):
            self._busy.discard(slot)
            try:
                found.append((slot, self._workers[slot].receive()))
            except GoneError as gone:
                found.append((slot, Lost(str(gone))))
        return found

    def close(self) -> None:
        """See `Pool`."""
        for worker in self._workers.values():
            worker.terminate()
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()


def local_devices(device: str, workers: int | None) -> list[str]:
    """A device for each worker: every GPU of this machine once, or the CPU for as many as are asked for.

    Args:
        device: `auto`, or one device for all workers.
        workers: how many; None: one a GPU, one on a CPU.
    """
    import torch

    from ..models.device import pick_device

    found = pick_device(device)
    if device in ("auto", "cuda") and found.type == "cuda":
        every = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        return [every[index % len(every)] for index in range(workers or len(every))]
    return [str(found)] * (workers or 1)


# --------------------------------------------------------------------------------------------------- ray


class _Actor:
    """A Ray actor's code; the actor itself is made where Ray is there."""

    def __init__(self, factory: Factory, device: str) -> None:
        self._one = work(factory, device)

    def make(self, job: Job) -> Outcome:
        return self._one(job)

    def pid(self) -> int:
        return os.getpid()


class RayPool:
    """Ray actors, one a GPU or a CPU slot of the cluster.

    Args:
        factory: makes what makes images; called in each actor.
        address: of a running cluster; None starts one on this machine.
        workers: how many; None: one a GPU, or one a CPU where the cluster has no GPU.
        device: `auto`, or what every actor uses; `cpu` asks the cluster for no GPU.

    Raises:
        ModelUnavailableError: Ray is not installed.
        UsageError: no such cluster, or too small a one.
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
                    f"cannot reach the Ray cluster {address or 'of this machine'}: {error}", "check --address"
                ) from error
        there = ray.cluster_resources()
        gpus = 0 if device == "cpu" else int(there.get("GPU", 0))
        cpus = max(1, int(there.get("CPU", 1)))
        self.size = workers or gpus or cpus
        if not gpus and self.size > cpus:  # Ray would keep the rest waiting for ever, and say nothing
            if self._own:
                ray.shutdown()
            raise UsageError(
                f"the Ray cluster has {cpus} CPUs for {self.size} workers",
                f"give at most --workers {cpus}",
            )
        # An actor fits on one GPU: of five on two GPUs each takes a third, or one would wait for ever.
        share = {"num_gpus": 1 / math.ceil(self.size / gpus)} if gpus else {"num_cpus": 1}
        # Ray shows each actor its own GPU alone, as cuda:0.
        self._device = "cuda" if gpus and device == "auto" else "cpu" if device == "auto" else device
        self._kind = ray.remote(**share)(_Actor)
        self._factory = factory
        self._actors: dict[int, Any] = {}
        self._busy: dict[Any, int] = {}

    def start(self, slot: int) -> None:
        """See `Pool`."""
        self._actors[slot] = self._kind.remote(self._factory, self._device)

    def send(self, slot: int, job: Job) -> None:
        """See `Pool`."""
        self._busy[self._actors[slot].make.remote(job)] = slot

    def wait(self) -> list[tuple[int, Outcome]]:
        """See `Pool`."""
        ready, _ = self._ray.wait(list(self._busy), num_returns=1)
        found: list[tuple[int, Outcome]] = []
        for reference in ready:
            slot = self._busy.pop(reference)
            try:
                found.append((slot, self._ray.get(reference)))
            except self._ray.exceptions.RayTaskError as error:
                found.append((slot, Broken(error_record(error))))
            except self._ray.exceptions.RayError as error:  # the actor or its machine is gone
                found.append((slot, Lost((str(error) or type(error).__name__).splitlines()[0])))
        return found

    def close(self) -> None:
        """See `Pool`."""
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._actors.clear()
        if self._own:
            self._ray.shutdown()
