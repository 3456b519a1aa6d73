"""Measure every optimization at full size with random weights; each row is written when it is done.

    python benchmarks/ladder.py eager|compiled [--out DIR] [--seconds 480] [--small]

Each row runs in alternation with its base: the same pipeline without the optimization, or the published
structure. Rows that no longer fit into --seconds are skipped and named. Writes DIR/eager.json or
DIR/compiled.json. --small uses a miniature on the CPU, to test this script.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastface_cli.app.pipeline import Pipeline
from fastface_cli.benchmark import flops, hardware, random_stack
from fastface_cli.benchmark.reference import PublishedPipeline
from fastface_cli.benchmark.run import Round, distance, one_round
from fastface_cli.benchmark.sdxl import MINIATURE, PUBLISHED
from fastface_cli.benchmark.timing import interleaved, ratio_of_medians
from fastface_cli.models.acceleration import DEFAULT, Acceleration, arrange, parse
from fastface_cli.models.compilation import keep_graphs
from fastface_cli.recipe.files import load_recipe
from fastface_cli.recipe.schema import Recipe

WARM_UP = 2


class Ladder:
    """The rows, and what they share."""

    def __init__(self, out: Path, seconds: float, *, small: bool) -> None:
        self.out, self.small = out, small
        self.began = time.monotonic()
        self.seconds = seconds
        self.device = torch.device("cpu" if small else "cuda")
        self.stack = MINIATURE if small else PUBLISHED
        self.half = torch.float32 if small else torch.float16
        self.rounds = 2 if small else 8
        self.report: dict[str, Any] = {"machine": hardware.describe(self.device), "rows": []}

    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    def recipe(self, name: str) -> Recipe:
        """A recipe at the size that is measured."""
        size = ["sampling.width=128", "sampling.height=128"] if self.small else []
        return load_recipe(name, overrides=size).recipe

    def ours(self, recipe: Recipe, dtype: torch.dtype, faster: Acceleration = DEFAULT) -> Pipeline:
        """Our pipeline with random weights."""
        return random_stack.random_pipeline(recipe, self.device, dtype, faster, self.stack)

    def published(self, recipe: Recipe, dtype: torch.dtype) -> PublishedPipeline:
        """The published structure with the same weights."""
        return random_stack.random_reference(recipe, self.device, dtype, self.stack)

    def sharing(self, engine: Pipeline, faster: Acceleration, recipe: Recipe | None = None) -> Pipeline:
        """Another pipeline with the weights of `engine`."""
        chosen = recipe or engine.recipe
        return engine.sharing(chosen, random_stack.scheduler(chosen, self.stack), faster)

    def row(self, name: str, takes: float, make: Callable[[], Any], base: Any, rounds: int = 0) -> Any:
        """Measure the engine that `make` returns, in alternation with `base`; None if it did not work out."""
        if self.spent() + takes > self.seconds:
            self.keep({"row": name, "skipped": f"no time left after {self.spent():.0f} s"})
            return None
        try:
            engine = make()
            began = time.perf_counter()
            one_round(engine, 0, 1, None, None)
            first = time.perf_counter() - began
            for number in range(WARM_UP):
                one_round(engine, 1 + number, 1, None, None)
            hardware.device_peak(self.device, reset=True)
            sides: list[tuple[Any, list[Round]]] = [(engine, []), *([(base, [])] if base else [])]
            orders = interleaved(len(sides), rounds or self.rounds)
            for number, order in enumerate(orders, start=1 + WARM_UP):
                for index in order:
                    side, measured = sides[index]
                    measured.append(one_round(side, number, 1, None, None))
            self.keep({"row": name, "first_seconds": first, **self.compared(*[done for _, done in sides])})
        except Exception as error:
            traceback.print_exc()
            self.keep({"row": name, "error": f"{type(error).__name__}: {error}"[:500]})
            return None
        return engine

    def compared(self, ours: list[Round], base: list[Round] | None = None) -> dict[str, Any]:
        """The numbers of a row, in milliseconds."""
        numbers: dict[str, Any] = {
            "loop": statistics.median(r.loop for r in ours),
            "total": statistics.median(r.total for r in ours),
            "stages": {stage: statistics.median(r.stages[stage] for r in ours) for stage in ours[0].stages},
            "samples": ours[0].unet_samples,
            "peak": hardware.device_peak(self.device),
            "after": self.spent(),
        }
        if base:
            numbers |= {
                "base_loop": statistics.median(r.loop for r in base),
                "base_total": statistics.median(r.total for r in base),
                "loop_ratio": ratio_of_medians([r.loop for r in base], [r.loop for r in ours]).to_json(),
                "total_ratio": ratio_of_medians([r.total for r in base], [r.total for r in ours]).to_json(),
                "latents_relative_l2": distance(ours, base),
            }
        return numbers

    def keep(self, row: dict[str, Any]) -> None:
        """Write the report with one more row."""
        self.report["rows"].append(row)
        self.out.write_text(json.dumps(self.report, indent=1) + "\n")
        short = {k: v for k, v in row.items() if k not in ("stages", "peak")}
        print(json.dumps(short), flush=True)


def eager(ladder: Ladder) -> None:
    """Optimizations that need no compiler."""
    fastface = ladder.recipe("hyper-fastface")
    plain, published = ladder.ours(fastface, ladder.half), ladder.published(fastface, ladder.half)
    rate, side = flops.matrix_rate(ladder.device, ladder.half)
    ladder.report |= {"matrix_tflops": rate / 1e12, "matrix_side": side}
    ladder.row("eager / published", 20, lambda: plain, published)
    for change in ("prune=off", "cache_kv=off"):
        ladder.row(f"{change} / eager", 10, partial(ladder.sharing, plain, parse([change])), plain)
    last = parse(["channels_last=on"])
    arrange(plain.unet, plain.vae, last)
    ladder.row("channels_last / published", 20, lambda: ladder.sharing(plain, last), published)
    unfused = parse(["fuse_lora=off"])
    ladder.row(
        "fuse_lora=off / channels_last", 30, lambda: ladder.ours(fastface, ladder.half, unfused), plain
    )
    # Last, because it changes the weights of the other rows.
    arrange(plain.unet, plain.vae, Acceleration(fuse_qkv=True))
    ladder.row("channels_last, fuse_qkv / published", 20, lambda: ladder.sharing(plain, last), published)


def compiled(ladder: Ladder) -> None:
    """Compilation, and what needs it; the smallest graph first, because a graph takes minutes."""
    fast = parse(["channels_last=on", "compile=on"])
    am1, fastface = ladder.recipe("hyper-am1"), ladder.recipe("hyper-fastface")
    plain, published = ladder.ours(am1, ladder.half, fast), ladder.published(am1, ladder.half)
    base = ladder.row("am1 compile / published", 60, lambda: plain, published)
    if base is None:
        return
    ladder.row(
        "fastface compile / published",
        120,
        lambda: ladder.sharing(plain, fast, fastface),
        PublishedPipeline(fastface, published.parts, random_stack.scheduler(fastface, ladder.stack)),
    )
    if not ladder.small:
        eight = replace(fast, fp8=True)
        ladder.row(
            "am1 compile fp8 (bfloat16) / am1 compile",
            100,
            lambda: ladder.ours(am1, torch.bfloat16, eight),
            base,
        )
    for change in ("autotune=on", "fuse_qkv=on"):
        faster = parse([change], fast)
        ladder.row(
            f"am1 compile {change} / am1 compile", 150, partial(ladder.ours, am1, ladder.half, faster), base
        )


def main() -> None:
    """Measure one part of the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=("eager", "compiled"))
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    keep_graphs(Path(tempfile.mkdtemp()))
    ladder = Ladder(options.out / f"{options.part}.json", options.seconds, small=options.small)
    {"eager": eager, "compiled": compiled}[options.part](ladder)


if __name__ == "__main__":
    main()
