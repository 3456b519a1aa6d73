"""How times are taken, ordered and compared: one stopwatch, and pure functions over numbers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

HOST_STAGES = ("face", "png")
"""Stages that run on the CPU while the device is idle: their clock is the CPU's."""

RESAMPLES = 2000
"""Of the bootstrap behind every interval."""


class Stopwatch:
    """Takes the time of every stage of a run; given to a pipeline as its `watch`.

    On a CUDA device two events stand around a stage, so that nothing waits for the device while it works.

    Args:
        device: where the stages run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Take the time of the block."""
        host = stage in HOST_STAGES
        began = self._mark(host=host)
        yield
        self._spans.append((stage, began, self._mark(host=host)))

    def _mark(self, *, host: bool) -> Any:
        import torch

        if self.device.type == "cuda" and not host:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self.device))
            return event
        synchronize(self.device)
        return time.perf_counter()

    def read(self) -> list[tuple[str, float]]:
        """Stage and milliseconds in the order they ended; waits for the device and begins anew."""
        synchronize(self.device)
        spans, self._spans = self._spans, []
        return [
            (stage, 1000 * (end - began) if isinstance(end, float) else began.elapsed_time(end))
            for stage, began, end in spans
        ]


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all it was told."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@dataclass(frozen=True)
class Spread:
    """Where repeated measurements lie."""

    p50: float
    p90: float
    p99: float
    n: int

    def to_json(self) -> dict[str, float]:
        """For the report."""
        return asdict(self)


def spread(values: Sequence[float]) -> Spread:
    """Percentiles by linear interpolation between the sorted values.

    Raises:
        ValueError: there are none.
    """
    if not values:
        raise ValueError("there is nothing to summarize")
    p50, p90, p99 = (float(x) for x in np.percentile(np.asarray(values, np.float64), (50, 90, 99)))
    return Spread(p50, p90, p99, len(values))


def interleaved(sides: int, rounds: int) -> list[list[int]]:
    """Which side runs when: each round runs every side once, every second round in reverse.

    So a machine that slows down or speeds up meanwhile does so for all sides alike.
    """
    forward = list(range(sides))
    return [forward if index % 2 == 0 else forward[::-1] for index in range(rounds)]


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians and its 95% interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """For the report."""
        return asdict(self)


def ratio_of_medians(slow: Sequence[float], fast: Sequence[float], seed: int = 0) -> Ratio:
    """How many times as long `slow` takes, with a percentile bootstrap over the rounds.

    Args:
        slow, fast: one number a round, of the same rounds: a round is drawn for both at once.
        seed: of the bootstrap.

    Raises:
        ValueError: the rounds do not match, or there are none.
    """
    if len(slow) != len(fast) or not slow:
        raise ValueError(f"{len(slow)} and {len(fast)} rounds cannot be compared")
    a, b = np.asarray(slow, np.float64), np.asarray(fast, np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(a), (RESAMPLES, len(a)))
    ratios = np.median(a[drawn], axis=1) / np.median(b[drawn], axis=1)
    low, high = (float(x) for x in np.percentile(ratios, (2.5, 97.5)))
    return Ratio(statistics.median(slow) / statistics.median(fast), low, high)
