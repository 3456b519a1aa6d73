"""Measuring: warm up every side, then run them in turn, and put together what was seen."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..app.pipeline import Picture, Pipeline, Request
from ..errors import FastFaceError
from ..identity.identity import Identity, make_identity
from ..output.images import encode_png
from . import flops, hardware
from .sides import WEIGHTS, BenchmarkEngine, Side, Source, analyzer, build
from .timing import Stopwatch, interleaved, ratio_of_medians, spread, synchronize

if TYPE_CHECKING:
    from ..identity.analyzer import FaceAnalyzer

VERSION = 1
"""Of the report's form."""

STAGES = ("face", "identity", "text", "keys", "step", "vae", "png")
"""In the order in which a picture meets them."""

WARM_UP = 2
"""Rounds after the first picture whose times are thrown away."""

COLD_TIMEOUT = 1800
"""Seconds that a process may take to its first picture."""


@dataclass(frozen=True)
class BenchmarkPlan:
    """What to measure."""

    sides: Sequence[Side]
    source: Source
    batch: int = 1
    repeats: int = 50
    cold: bool = True
    photo: Path | None = None
    """The person's photo; None takes an identity of random numbers, and no face stage."""


@dataclass(frozen=True)
class Round:
    """One batch of pictures, milliseconds."""

    total: float
    """From the photo (or the identity) to the bytes of the last PNG."""
    stages: Mapping[str, float]
    """By stage, steps as `step 1`, `step 2`, ..."""
    unet_samples: int
    """Of one picture."""
    latents: torch.Tensor
    """[4, h, w] of the first picture, after the last step."""

    @property
    def loop(self) -> float:
        """The denoising loop: all steps, and the keys and values that are projected once for them."""
        return sum(taken for stage, taken in self.stages.items() if stage.startswith(("step", "keys")))


@dataclass
class Measured:
    """A side and what was seen of it."""

    side: Side
    engine: BenchmarkEngine
    first: Round | None = None
    """The first pictures after loading, which compile what is compiled."""
    rounds: list[Round] = field(default_factory=list)
    build_seconds: float = 0.0
    cold: Mapping[str, Any] | None = None


def synthetic_person() -> Identity:
    """An identity of random numbers: a unit embedding and a crop of noise."""
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((1, 512)).astype(np.float32)
    crop = rng.integers(0, 256, (1, 224, 224, 3), dtype=np.uint8)
    return Identity(embedding / np.linalg.norm(embedding), crop, np.ones(1, np.float32))


def requests_of(number: int, batch: int, identity: Identity, negative: str | None) -> list[Request]:
    """The pictures of one round: other prompts and seeds in every round, so that nothing is remembered."""
    return [
        Request(
            f"a portrait of a person, take {number}, picture {index}",
            1000 * number + index,
            identity,
            negative,
        )
        for index in range(batch)
    ]


def one_round(
    engine: BenchmarkEngine, number: int, batch: int, photo: Path | None, faces: FaceAnalyzer | None
) -> Round:
    """Make one batch of pictures and take its times.

    Raises:
        FastFaceError: a picture or its latents are not finite, or the inputs are zero.
    """
    watch = Stopwatch(engine.device)
    engine.watch = watch
    identity = None if faces else synthetic_person()
    synchronize(engine.device)
    began = time.perf_counter()
    if identity is None:
        assert faces is not None
        assert photo is not None
        with watch("face"):
            identity = make_identity([photo], faces)
    requests = requests_of(number, batch, identity, engine.recipe.negative_prompt)
    pictures = list(engine.generate(requests, batch_size=batch))
    with watch("png"):
        for picture in pictures:
            encode_png(picture.image)
    total = 1000 * (time.perf_counter() - began)
    for picture in pictures:
        check(picture)
    last = pictures[0].latents[-1].float()
    return Round(total, by_stage(watch.read()), pictures[0].unet_samples, last)


def by_stage(spans: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Milliseconds by stage; steps are numbered, what else comes twice is added up."""
    found: dict[str, float] = {}
    steps = 0
    for stage, taken in spans:
        name = stage
        if stage == "step":
            steps += 1
            name = f"step {steps}"
        found[name] = found.get(name, 0.0) + taken
    return found


def check(picture: Picture) -> None:
    """Refuse numbers that would make a time worthless.

    Raises:
        FastFaceError: latents that are not finite, or noise that is zero.
    """
    if not picture.latents.isfinite().all():
        raise FastFaceError("the latents hold numbers that are not finite", "try --dtype bfloat16 or float32")
    if not picture.initial_latents.any():
        raise FastFaceError("the noise is zero: such a run would be measured too fast")


def measure(plan: BenchmarkPlan, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Run a plan.

    Args:
        plan: what to measure.
        say: takes a line of progress.

    Returns:
        The report, ready for JSON.

    Raises:
        FastFaceError: a side cannot be built or run.
    """
    cold = [cold_start(side, plan) if plan.cold else None for side in plan.sides]
    measured: list[Measured] = []
    faces = analyzer(plan.sides[0], plan.source) if plan.photo else None
    for side, started in zip(plan.sides, cold, strict=True):
        say(f"{side.label}: building")
        began = time.perf_counter()
        engine = sharing(side, measured) or build(side, plan.source)
        synchronize(engine.device)
        found = Measured(side, engine, build_seconds=time.perf_counter() - began, cold=started)
        found.first = one_round(engine, 0, plan.batch, plan.photo, faces)
        for number in range(WARM_UP):
            one_round(engine, 1 + number, plan.batch, plan.photo, faces)
        measured.append(found)
    for number, order in enumerate(interleaved(len(measured), plan.repeats), start=1 + WARM_UP):
        say(f"round {number - WARM_UP} of {plan.repeats}")
        for index in order:
            one = measured[index]
            one.rounds.append(one_round(one.engine, number, plan.batch, plan.photo, faces))
    return report(plan, measured)


def sharing(side: Side, measured: Sequence[Measured]) -> BenchmarkEngine | None:
    """Our engine for a side on the weights of an earlier one, where they are the same; else None.

    So an ablation of a full-size stack fits onto a card.
    """
    for other in measured:
        if isinstance(other.engine, Pipeline) and side.weights_key() == other.side.weights_key():
            mine = other.engine
            return Pipeline(
                side.recipe,
                mine.parts,
                mine.projection,
                mine.scheduler,
                mine.log,
                side.acceleration,
                mine.level,
                mine.device,
            )
    return None


def report(plan: BenchmarkPlan, measured: Sequence[Measured]) -> dict[str, Any]:
    """What is told of a run."""
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
        "sides": [describe(one, plan.batch, rate) for one in measured],
        "ratios": ratios(measured),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(one: Measured, batch: int, rate: float) -> dict[str, Any]:
    """What is told of a side; times are milliseconds a batch, operations are of one picture."""
    engine, rounds = one.engine, one.rounds
    height, width = rounds[0].latents.shape[-2:]
    samples = rounds[0].unet_samples
    counted = flops.picture(
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
    first = one.first
    assert first is not None
    return {
        **one.side.to_json(),
        "dtype": _name(engine.dtype),
        "vae_dtype": _vae_dtype(one),
        "pixels": [engine.recipe.sampling.width, engine.recipe.sampling.height],
        "unet_samples": samples,
        "build_seconds": one.build_seconds,
        "first_ms": first.total,
        "total_ms": total.to_json(),
        "loop_ms": loop.to_json(),
        "stages_ms": {
            stage: spread([r.stages[stage] for r in rounds]).to_json() for stage in ordered(rounds[0].stages)
        },
        "tflop": {stage: count / 1e12 for stage, count in counted.items()},
        "share_of_rate": {
            "total": sum(counted.values()) * floor / total.p50,
            "loop": counted["unet"] * floor / loop.p50,
        },
        "cold": one.cold,
    }


def ordered(stages: Mapping[str, float]) -> list[str]:
    """Stage names in the order in which a picture meets them."""
    return sorted(stages, key=lambda stage: (STAGES.index(stage.split()[0]), len(stage), stage))


def _vae_dtype(one: Measured) -> str:
    engine = one.engine
    if one.side.engine == "reference" and engine.dtype is torch.float16:
        return "float16, decodes in float32"
    return _name(engine.parts.vae.dtype)


def compared(sides: Sequence[Side]) -> list[tuple[int, int]]:
    """Which side is set against which: the first one of the same recipe, else the very first one."""
    return [
        (index, next((i for i in range(index) if sides[i].recipe == side.recipe), 0))
        for index, side in enumerate(sides)
        if index > 0
    ]


def ratios(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """How many times as long a side takes as the one it is set against, and how far its latents are off."""
    found = []
    for index, to in compared([one.side for one in measured]):
        other, first = measured[index], measured[to]
        same = other.side.recipe == first.side.recipe
        total = ratio_of_medians([r.total for r in other.rounds], [r.total for r in first.rounds])
        loop = ratio_of_medians([r.loop for r in other.rounds], [r.loop for r in first.rounds])
        found.append(
            {
                "of": other.side.label,
                "to": first.side.label,
                "total": total.to_json(),
                "loop": loop.to_json(),
                "latents_relative_l2": distance(other.rounds, first.rounds) if same else None,
            }
        )
    return found


def distance(found: Sequence[Round], wanted: Sequence[Round]) -> float:
    """The largest relative L2 distance between final latents of the same round."""
    errors = [
        float((a.latents - b.latents).norm() / b.latents.norm()) for a, b in zip(found, wanted, strict=True)
    ]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


# ----------------------------------------------------------------------------------------------- cold start


def cold_start(side: Side, plan: BenchmarkPlan) -> dict[str, Any]:
    """A side's first picture in a process of its own: seconds since the process was started, and peaks.

    Raises:
        FastFaceError: the process failed.
    """
    source = plan.source
    asked = {
        "side": side.to_json(),
        "source": {
            "weights": source.weights,
            "device": source.device,
            "dtype": source.dtype,
            "offline": source.offline,
        },
        "batch": plan.batch,
        "photo": None if plan.photo is None else str(plan.photo),
        "started": time.time(),
    }
    done = subprocess.run(
        [sys.executable, "-m", "fastface_cli.benchmark.cold"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=COLD_TIMEOUT,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise FastFaceError(f"the cold start of {side.label} failed: {last}", "--no-cold leaves it out")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
