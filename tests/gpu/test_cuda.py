"""CUDA gives the same latents as the CPU with every scheduler, and reports errors clearly.

Run with `pytest -m gpu tests/gpu`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden import adapters

from fastface_cli.app.pipeline import Pipeline, Request
from fastface_cli.app.runtime import Runtime
from fastface_cli.errors import DeviceError
from fastface_cli.models.acceleration import Acceleration, parse
from fastface_cli.models.offload import LEVELS
from fastface_cli.recipe.schema import Recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

KINDS = [("ddim", "trailing"), ("euler", "trailing"), ("euler_ancestral", "trailing"), ("lcm", None)]


def recipe_of(kind: str, spacing: str | None, size: int = 128) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "gpu",
            "model": {
                "base": "base",
                "adapter": "adapter",
                "image_encoder": "encoder",
                "face": "face",
                "scheduler": {"kind": kind, "spacing": spacing},
            },
            "sampling": {"steps": 4, "width": size, "height": size},
            "guidance": {"identity": [1.0, 1.5, 1.5, 1.0], "text": [1.0, 3.0, 3.0, 1.0], "rescale": 0.75},
            "attention": {
                "transforms": ["power", "adaptive_softmask", "scale"],
                "invert_token_0": True,
                "blend": {},
            },
        }
    )


@pytest.fixture(scope="module")
def parts(miniature):
    return {role: miniature[role] for role in ("base", "adapter", "image_encoder")}


@pytest.fixture
def exact():
    """Disable TF32, so that float32 results can be compared with the CPU."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize(("kind", "spacing"), KINDS)
def test_cuda_latents_equal_cpu_latents(kind, spacing, parts, person, exact):
    recipe = recipe_of(kind, spacing)
    requests = [Request("a person", 5, person), Request("a dog", 6, person, "blur", 0.4)]
    cpu = list(Pipeline.load(recipe, parts, device="cpu", dtype="float32").generate(requests))
    cuda = list(Pipeline.load(recipe, parts, device="cuda", dtype="float32").generate(requests, batch_size=2))
    for expected, actual in zip(cpu, cuda, strict=True):
        error = float((expected.latents - actual.latents).norm() / expected.latents.norm())
        assert error <= 2e-3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_finite_and_close(dtype, parts, person):
    recipe = recipe_of("ddim", "trailing")
    request = Request("a person", 5, person)
    exact = next(Pipeline.load(recipe, parts, device="cuda", dtype="float32").generate([request]))
    half = next(Pipeline.load(recipe, parts, device="cuda", dtype=dtype).generate([request]))
    assert half.latents.isfinite().all()
    assert float((half.latents - exact.latents).norm() / exact.latents.norm()) <= 0.2


@pytest.mark.parametrize("level", ["12", "8", "6"])
def test_low_memory_gives_the_same_latents_and_frees_the_gpu(level, parts, person, exact):
    recipe, request = recipe_of("ddim", "trailing"), Request("a person", 5, person)
    plain = next(Pipeline.load(recipe, parts, device="cuda", dtype="float32").generate([request]))
    saving = Pipeline.load(recipe, parts, device="cuda", dtype="float32", level=LEVELS[level])
    before = torch.cuda.memory_allocated()
    output = next(saving.generate([request]))
    assert float((output.latents - plain.latents).norm() / plain.latents.norm()) <= 2e-4
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + 2**20, "offloaded models are freed"


def test_compiled_pipeline_gives_the_same_latents(parts, person, exact):
    recipe, request = recipe_of("ddim", "trailing"), Request("a person", 5, person)
    plain = next(Pipeline.load(recipe, parts, device="cuda", dtype="float32").generate([request]))
    faster = Acceleration(compile=True, channels_last=True)
    quick = Pipeline.load(recipe, parts, device="cuda", dtype="float32", acceleration=faster)
    quick.warm_up()
    output = next(quick.generate([request]))
    assert float((output.latents - plain.latents).norm() / plain.latents.norm()) <= 2e-3


GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CASES = [
    (case, GOLDEN / folder)
    for folder in ("instantid", "pulid")
    for case in adapters.cases(GOLDEN, GOLDEN / folder)
]


@pytest.mark.parametrize(("case", "folder"), CASES, ids=[case.name for case, _ in CASES])
def test_other_adapters_equal_their_goldens(case, folder, exact):
    runtime = Runtime(device="cuda", dtype="float32")
    actual = adapters.run(case, adapters.identity_of(folder), runtime)
    assert adapters.error(actual, case.expected["latents"]) <= 2e-3


@pytest.mark.parametrize("name", ["dcg-lightning", "v1-fidelity-dcg-hyper"])
def test_other_adapters_can_be_compiled_and_offloaded(name, exact):
    case, folder = next((case, folder) for case, folder in CASES if case.name == name)
    fast = Runtime(device="cuda", dtype="float32", acceleration=Acceleration(compile=True))
    small = replace(fast, acceleration=Acceleration(), offload="8")
    for runtime in (small, fast):
        actual = adapters.run(case, adapters.identity_of(folder), runtime)
        assert adapters.error(actual, case.expected["latents"]) <= 2e-3


@pytest.mark.parametrize(
    "changes",
    [["fuse_qkv=on"], ["fuse_qkv=on", "autotune=on", "compile=on"]],
    ids=" ".join,
)
def test_further_optimizations_are_exact(changes, parts, person):
    recipe, request = recipe_of("ddim", "trailing"), Request("a person", 5, person)
    plain = next(Pipeline.load(recipe, parts, device="cuda", dtype="float16").generate([request]))
    quick = Pipeline.load(recipe, parts, device="cuda", dtype="float16", acceleration=parse(changes))
    output = next(quick.generate([request]))
    assert float((output.latents - plain.latents).norm() / plain.latents.norm()) <= 0.05


def test_out_of_memory_is_a_device_error(parts, person):
    pipeline = Pipeline.load(recipe_of("ddim", "trailing", 4096), parts, device="cuda", dtype="float32")
    torch.cuda.set_per_process_memory_fraction(0.001)
    try:
        with pytest.raises(DeviceError, match="out of memory"):
            next(pipeline.generate([Request("a person", 5, person)]))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
