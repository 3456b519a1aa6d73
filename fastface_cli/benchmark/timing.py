"""Measure times, and compute percentiles and ratios from them."""

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
"""Stages that run on the CPU while the device is idle: they are timed with the CPU clock."""

RESAMPLES = 2000
"""Bootstrap resamples for every confidence interval."""


class Stopwatch:
    """Measure the time of every stage of a run; passed to a pipeline as its `watch`.

    On a CUDA device, events mark the start and end of a stage, so that nothing waits for the device.

    Args:
        device: the device that the stages run on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Measure the time of the block."""
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
        """Return stages with milliseconds in the order in which they ended, and start from scratch."""
        synchronize(self.device)
        spans, self._spans = self._spans, []
        return [
            (stage, 1000 * (end - began) if isinstance(end, float) else began.elapsed_time(end))
            for stage, began, end in spans
        ]


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished all queued work."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@dataclass(frozen=True)
class Spread:
    """Percentiles of repeated measurements."""

    p50: float
    p90: float
    p99: float
    n: int

    def to_json(self) -> dict[str, float]:
        """Return the values for the report."""
        return asdict(self)


def spread(values: Sequence[float]) -> Spread:
    """Compute percentiles by linear interpolation between the sorted values.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("there is nothing to summarize")
    p50, p90, p99 = (float(x) for x in np.percentile(np.asarray(values, np.float64), (50, 90, 99)))
    return Spread(p50, p90, p99, len(values))


def interleaved(sides: int, rounds: int) -> list[list[int]]:
    """Return the order of the sides in each round; every second round is reversed.

    A machine that slows down or speeds up during the run then affects all sides equally.
    """
    forward = list(range(sides))
    return [forward if index % 2 == 0 else forward[::-1] for index in range(rounds)]


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians with its 95% confidence interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """Return the values for the report."""
        return asdict(self)


def ratio_of_medians(slow: Sequence[float], fast: Sequence[float], seed: int = 0) -> Ratio:
    """Return how many times as long `slow` takes, with a percentile bootstrap over the rounds.

    Args:
        slow, fast: one number per round; the bootstrap draws the same rounds for both.
        seed: seed of the bootstrap.

    Raises:
        ValueError: the numbers of rounds differ, or there are no rounds.
    """
    if len(slow) != len(fast) or not slow:
        raise ValueError(f"{len(slow)} and {len(fast)} rounds cannot be compared")
    a, b = np.asarray(slow, np.float64), np.asarray(fast, np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(a), (RESAMPLES, len(a)))
    ratios = np.median(a[drawn], axis=1) / np.median(b[drawn], axis=1)
    low, high = (float(x) for x in np.percentile(ratios, (2.5, 97.5)))
    return Ratio(statistics.median(slow) / statistics.median(fast), low, high)
