"""Warm up every side, measure them in alternation, and build the report."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..app.pipeline import GeneratedImage, Pipeline, Request
from ..errors import FastFaceError
from ..identity.identity import Identity
from ..output.images import encode_png
from . import flops, hardware
from .sides import WEIGHTS, BenchmarkEngine, Side, Source, build, photo_reader
from .timing import Stopwatch, interleaved, ratio_of_medians, spread, synchronize

VERSION = 1
"""Version of the report's format."""

STAGES = ("face", "identity", "text", "keys", "step", "vae", "png")
"""In the order in which they run."""

WARM_UP = 2
"""Rounds after the first image that are not measured."""

COLD_TIMEOUT = 1800
"""Time limit in seconds for the first image of a new process."""


@dataclass(frozen=True)
class BenchmarkPlan:
    """Settings of a benchmark."""

    sides: Sequence[Side]
    source: Source
    batch: int = 1
    repeats: int = 50
    cold: bool = True
    photo: Path | None = None
    """Photo of the person; None uses a random identity and skips the face stage."""


@dataclass(frozen=True)
class Round:
    """One batch of images; times are in milliseconds."""

    total: float
    """From the photo (or the identity) to the bytes of the last PNG."""
    stages: Mapping[str, float]
    """Time of each stage; steps are named `step 1`, `step 2`, ..."""
    unet_samples: int
    """UNet samples of one image."""
    latents: torch.Tensor
    """Final latents of the first image, [4, h, w]."""

    @property
    def loop(self) -> float:
        """Time of the denoising loop: all steps, and the projection of keys and values before them."""
        return sum(
            milliseconds for stage, milliseconds in self.stages.items() if stage.startswith(("step", "keys"))
        )


@dataclass
class Measured:
    """A side and its measurements."""

    side: Side
    engine: BenchmarkEngine
    first: Round | None = None
    """The first batch after loading, which includes compilation."""
    rounds: list[Round] = field(default_factory=list)
    build_seconds: float = 0.0
    cold: Mapping[str, Any] | None = None


def requests_of(number: int, batch: int, identity: Identity, negative: str | None) -> list[Request]:
    """Return the requests of one round; prompts and seeds are new in every round, so no cache helps."""
    return [
        Request(
            f"a portrait of a person, take {number}, image {index}",
            1000 * number + index,
            identity,
            negative,
        )
        for index in range(batch)
    ]


def one_round(engine: BenchmarkEngine, number: int, batch: int, read: Callable[[], Identity] | None) -> Round:
    """Generate one batch of images and measure its times.

    Args:
        engine: the models.
        number: of the round; prompts and seeds depend on it.
        batch: number of images.
        read: makes the identity from a photo; None uses an arbitrary identity and skips the face stage.

    Raises:
        FastFaceError: latents are not finite, or the noise is zero.
    """
    watch = Stopwatch(engine.device)
    engine.watch = watch
    identity = engine.example_identity()
    synchronize(engine.device)
    began = time.perf_counter()
    if read is not None:
        with watch("face"):
            identity = read()
    requests = requests_of(number, batch, identity, engine.recipe.negative_prompt)
    outputs = list(engine.generate(requests, batch_size=batch))
    with watch("png"):
        for output in outputs:
            encode_png(output.image)
    total = 1000 * (time.perf_counter() - began)
    for output in outputs:
        check(output)
    last = outputs[0].latents[-1].float()
    return Round(total, by_stage(watch.read()), outputs[0].unet_samples, last)


def by_stage(spans: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Sum milliseconds by stage, with each step as a stage of its own."""
    totals: dict[str, float] = {}
    steps = 0
    for stage, milliseconds in spans:
        name = stage
        if stage == "step":
            steps += 1
            name = f"step {steps}"
        totals[name] = totals.get(name, 0.0) + milliseconds
    return totals


def check(output: GeneratedImage) -> None:
    """Refuse an output whose time would be meaningless.

    Raises:
        FastFaceError: latents that are not finite, or noise that is zero.
    """
    if not output.latents.isfinite().all():
        raise FastFaceError("the latents are not finite", "try --dtype bfloat16 or float32")
    if not output.initial_latents.any():
        raise FastFaceError("the noise is zero, so the measured time would be too short")


def measure(plan: BenchmarkPlan, log: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Run a benchmark.

    Args:
        plan: the settings.
        log: called with each line of progress.

    Returns:
        The report, ready for JSON.

    Raises:
        FastFaceError: a side cannot be loaded or run.
    """
    cold = [cold_start(side, plan) if plan.cold else None for side in plan.sides]
    measured: list[Measured] = []
    read = photo_reader(plan.sides, plan.source, plan.photo) if plan.photo else None
    for side, started in zip(plan.sides, cold, strict=True):
        log(f"{side.label}: loading")
        began = time.perf_counter()
        engine = sharing(side, measured) or build(side, plan.source)
        synchronize(engine.device)
        result = Measured(side, engine, build_seconds=time.perf_counter() - began, cold=started)
        result.first = one_round(engine, 0, plan.batch, read)
        for number in range(WARM_UP):
            one_round(engine, 1 + number, plan.batch, read)
        measured.append(result)
    for number, order in enumerate(interleaved(len(measured), plan.repeats), start=1 + WARM_UP):
        log(f"round {number - WARM_UP} of {plan.repeats}")
        for index in order:
            result = measured[index]
            result.rounds.append(one_round(result.engine, number, plan.batch, read))
    return report(plan, measured)


def sharing(side: Side, measured: Sequence[Measured]) -> BenchmarkEngine | None:
    """Return a pipeline that shares the weights of an earlier side, or None if they differ.

    Sharing lets an ablation of full-size models fit into GPU memory.
    """
    for other in measured:
        if isinstance(other.engine, Pipeline) and side.weights_key() == other.side.weights_key():
            return other.engine.sharing(side.recipe, other.engine.scheduler, side.acceleration)
    return None


def report(plan: BenchmarkPlan, measured: Sequence[Measured]) -> dict[str, Any]:
    """Build the report."""
    engine = measured[0].engine
    rate, side = flops.matrix_rate(engine.device, engine.dtype)
    return {
        "version": VERSION,
        "weights": WEIGHTS[plan.source.weights],
        "batch": plan.batch,
        "repeats": plan.repeats,
        "photo": plan.photo is not None,
        "machine": hardware.describe(engine.device),
        "matrix_product": {
            "tflops": rate / 1e12,
            "side": side,
            "dtype": _name(engine.dtype),
        },
        "process_peak_bytes": hardware.process_peak(),
        "sides": [describe(result, plan.batch, rate) for result in measured],
        "ratios": ratios(measured),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(result: Measured, batch: int, rate: float) -> dict[str, Any]:
    """Build the report of a side: milliseconds per batch; for FaceID, operations per image."""
    engine, rounds = result.engine, result.rounds
    height, width = rounds[0].latents.shape[-2:]
    samples = rounds[0].unet_samples
    counted: Mapping[str, int] | None = None
    if engine.recipe.adapter.kind == "faceid_plusv2":
        counted = flops.image(
            engine.parts,
            height=height,
            width=width,
            unet_samples=samples,
            texts=1 if engine.recipe.negative_prompt is None else 2,
            people=2,
        )
    total = spread([r.total for r in rounds])
    loop = spread([r.loop for r in rounds])
    floor = 1000 * batch / rate
    first = result.first
    assert first is not None
    return {
        **result.side.to_json(),
        "dtype": _name(engine.dtype),
        "vae_dtype": _vae_dtype(result),
        "pixels": [engine.recipe.sampling.width, engine.recipe.sampling.height],
        "unet_samples": samples,
        "build_seconds": result.build_seconds,
        "first_ms": first.total,
        "total_ms": total.to_json(),
        "loop_ms": loop.to_json(),
        "stages_ms": {
            stage: spread([r.stages[stage] for r in rounds]).to_json() for stage in ordered(rounds[0].stages)
        },
        "tflop": counted and {stage: count / 1e12 for stage, count in counted.items()},
        "share_of_rate": counted
        and {
            "total": sum(counted.values()) * floor / total.p50,
            "loop": counted["unet"] * floor / loop.p50,
        },
        "cold": result.cold,
    }


def ordered(stages: Mapping[str, float]) -> list[str]:
    """Sort stage names in the order in which they run."""
    return sorted(stages, key=lambda stage: (STAGES.index(stage.split()[0]), len(stage), stage))


def _vae_dtype(result: Measured) -> str:
    engine = result.engine
    if result.side.engine == "reference" and engine.dtype is torch.float16:
        return "float16, decodes in float32"
    return _name(engine.parts.vae.dtype)


def compared(sides: Sequence[Side]) -> list[tuple[int, int]]:
    """Pair each side with the first side of the same recipe, otherwise with the first side."""
    return [
        (index, next((i for i in range(index) if sides[i].recipe == side.recipe), 0))
        for index, side in enumerate(sides)
        if index > 0
    ]


def ratios(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Compare each side with its partner: ratio of times, and difference of latents."""
    comparisons = []
    for index, to in compared([result.side for result in measured]):
        other, first = measured[index], measured[to]
        same = other.side.recipe == first.side.recipe
        total = ratio_of_medians([r.total for r in other.rounds], [r.total for r in first.rounds])
        loop = ratio_of_medians([r.loop for r in other.rounds], [r.loop for r in first.rounds])
        comparisons.append(
            {
                "of": other.side.label,
                "to": first.side.label,
                "total": total.to_json(),
                "loop": loop.to_json(),
                "latents_relative_l2": distance(other.rounds, first.rounds) if same else None,
            }
        )
    return comparisons


def distance(actual: Sequence[Round], expected: Sequence[Round]) -> float:
    """Return the largest relative L2 distance between the final latents of the same round."""
    errors = [
        float((a.latents - b.latents).norm() / b.latents.norm())
        for a, b in zip(actual, expected, strict=True)
    ]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


# ----------------------------------------------------------------------------------------------- cold start


def cold_start(side: Side, plan: BenchmarkPlan) -> dict[str, Any]:
    """Measure the first image of a side in a new process: seconds since its start, and peak memory.

    Raises:
        FastFaceError: the process failed.
    """
    request = {
        "side": side.to_json(),
        "source": asdict(plan.source),
        "batch": plan.batch,
        "photo": None if plan.photo is None else str(plan.photo),
        "started": time.time(),
    }
    result = subprocess.run(
        [sys.executable, "-m", "fastface_cli.benchmark.cold"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=COLD_TIMEOUT,
        check=False,
    )
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise FastFaceError(f"the cold start of {side.label} failed: {last}", "use --no-cold to skip it")
    measurements: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return measurements
