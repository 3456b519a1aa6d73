"""A step is one graph without breaks, one for each number of branches; it gives what the plain step gives."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from support.methods import METHODS, assert_same, latents, recipe_of, requests
from torch._dynamo.utils import counters

from benchmarks.published_files import write_stack
from fastface_cli.app.pipeline import Pipeline
from fastface_cli.benchmark.sdxl import MINIATURE
from fastface_cli.models.acceleration import Acceleration
from fastface_cli.models.compilation import Compiled, keep_graphs

LIMITS = {"am1": 1e-5, "fastface": 1e-5, "am2": 2e-4, "fastface-am2": 2e-4}
"""Golden tolerances."""


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict[str, Path]:
    """The miniature with one layer where it has two: compiling takes a while for every layer."""
    unet = {**MINIATURE.unet, "layers_per_block": 1, "transformer_layers_per_block": [1, 1, 1]}
    folder = tmp_path_factory.mktemp("small")
    parts = write_stack(folder, replace(MINIATURE, unet=unet), fill="random", dtype=torch.float32, seed=5)
    return {role: parts[role] for role in ("base", "adapter", "image_encoder")}


@pytest.fixture(scope="module")
def loaded(small):
    return Pipeline.load(METHODS["am1"], small, device="cpu", dtype="float32")


def compiled(loaded: Pipeline, recipe, parts, backend: str) -> Pipeline:
    """A pipeline whose step and decoding are compiled by `backend`."""
    torch._dynamo.reset()
    counters.clear()
    plain = loaded.with_recipe(recipe, parts)
    return Pipeline(
        recipe,
        plain.parts,
        plain.projection,
        plain.scheduler,
        acceleration=Acceleration(compile=True),
        compiler=partial(Compiled, backend=backend),
    )


def assert_one_graph_a_shape(pipeline: Pipeline) -> None:
    shapes = {len(step.branches) for step in pipeline.plan()}
    assert counters["stats"]["unique_graphs"] == len(shapes) + 1, "and one of the VAE"
    assert not counters["graph_break"]


def test_a_step_is_one_graph_for_any_number_in_it(loaded, small, person):
    """Two branches at four steps with four schedules, then another scale: nothing is compiled again."""
    recipe = recipe_of(
        guidance={"identity": [1.5, 2.0, 2.5, 3.0], "text": [1.5, 2.0, 2.5, 3.0]},
        attention={
            "transforms": [
                {"kind": "power", "p": [1.1, 1.2, 1.3, 1.4]},
                {"kind": "scale", "g": [1, 2, 3, 4.0]},
            ]
        },
    )
    plain, fast = loaded.with_recipe(recipe, small), compiled(loaded, recipe, small, "eager")
    assert_same(latents(fast, requests(person)), latents(plain, requests(person)), 1e-5)
    assert_one_graph_a_shape(fast)
    mute = [replace(request, adapter_scale=0.0) for request in requests(person)]
    assert_same(latents(fast, mute), latents(plain, mute), 1e-5)
    assert_one_graph_a_shape(fast)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_compiled_step_is_the_method(name, loaded, small, person):
    """By the compiler that users run. Torch's debugging backend `aot_eager` cannot replay the VAE's
    group norm on a CPU (torch 2.13: "Expected X.is_contiguous"), and nobody runs it."""
    fast = compiled(loaded, METHODS[name], small, "inductor")
    plain = loaded.with_recipe(METHODS[name], small)
    assert_same(latents(fast, requests(person)), latents(plain, requests(person)), LIMITS[name])
    assert_one_graph_a_shape(fast)


@pytest.mark.slow
def test_the_second_process_finds_what_the_first_compiled(small, tmp_path):
    """Hits in the compiler's cache, and less time."""
    script = """
import sys, time
from pathlib import Path
from support.methods import METHODS
from fastface_cli.models.acceleration import Acceleration
from fastface_cli.models.compilation import keep_graphs
from fastface_cli.app.pipeline import Pipeline
from torch._dynamo.utils import counters
base, adapter, encoder, folder = map(Path, sys.argv[1:])
keep_graphs(folder)
parts = {"base": base, "adapter": adapter, "image_encoder": encoder}
faster = Acceleration(compile=True)
pipeline = Pipeline.load(METHODS["am1"], parts, device="cpu", dtype="float32", acceleration=faster)
seconds = pipeline.warm_up()
print(seconds, counters["inductor"]["fxgraph_cache_hit"], counters["aot_autograd"]["autograd_cache_hit"])
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    actual = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, small.values()), str(tmp_path / "graphs")],
            capture_output=True,
            text=True,
            env=environment,
            check=True,
        )
        seconds, graphs, whole = done.stdout.split()
        actual.append((float(seconds), int(graphs) + int(whole)))
    (cold, none), (warm, hits) = actual
    assert none == 0
    assert hits >= 2, "the step and the VAE"
    assert warm < cold
    assert any((tmp_path / "graphs").iterdir())


def test_compilation_failure_is_reported():
    def breaks(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x

    from fastface_cli.errors import DeviceError

    with pytest.raises(DeviceError, match="cannot compile the models"):
        Compiled(breaks, backend="eager")(torch.ones(2))


def test_where_graphs_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    assert keep_graphs(tmp_path / "ours") == tmp_path / "mine"
    import tempfile

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "torchinductor_me"))
    assert keep_graphs(tmp_path / "ours") == tmp_path / "ours"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "ours")
