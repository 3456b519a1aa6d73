"""The whole stack on a device that is not there, and in half precision on the CPU."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file
from support.pretend_device import MixedDevicesError, OnDevice, pretended

from benchmarks.published_files import write_stack
from fastface_cli.app import pipeline
from fastface_cli.app.pipeline import Pipeline, Request
from fastface_cli.benchmark.sdxl import MINIATURE
from fastface_cli.errors import DeviceError
from fastface_cli.identity.identity import Identity
from fastface_cli.models import loading
from fastface_cli.recipe.schema import Recipe

Paths = dict[str, Path]
Loaded = Callable[[str, str], Pipeline]

DCG = {"identity": [1.0, 1.5, 1.5, 1.0], "text": [1.0, 3.0, 3.0, 1.0], "rescale": 0.75}
AM1 = {"transforms": ["power", "scale"]}
AM2 = {"transforms": ["adaptive_softmask", "scale"], "invert_token_0": True, "blend": {}}
SCHEDULERS = [("ddim", "trailing"), ("euler", "trailing"), ("euler", None), ("lcm", None)]
SCHEDULERS += [("euler_ancestral", "trailing")]


def recipe_of(kind: str = "ddim", spacing: str | None = "trailing", steps: int = 2, **sections) -> Recipe:
    model = {
        "base": "base",
        "distillation": "hyper",
        "vae": "vae",
        "adapter": "adapter",
        "image_encoder": "encoder",
        "face": "face",
        "scheduler": {"kind": kind, "spacing": spacing},
    }
    return Recipe.model_validate(
        {
            "name": "test",
            "model": model,
            "sampling": {"steps": steps, "width": 128, "height": 128},
            "guidance": DCG,
            "attention": AM1,
            **sections,
        }
    )


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """The files as published: halves, but for the image encoder, the VAE and the LoRA."""
    folder = tmp_path_factory.mktemp("halves")
    actual = write_stack(folder, MINIATURE, fill="random", dtype=torch.float16)
    return {**actual, "distillation": actual["hyper"]}


@pytest.fixture(scope="module")
def loaded(parts: Paths) -> Loaded:
    """The stack on a device in a number type, loaded once."""

    @functools.cache
    def load(device: str, dtype: str) -> Pipeline:
        return Pipeline.load(recipe_of(), parts, device=device, dtype=dtype)

    return load


def run_of(recipe: Recipe, loaded: Pipeline, parts: Paths) -> Pipeline:
    return Pipeline(recipe, loaded.parts, loaded.projection, scheduler_of(recipe, parts))


def scheduler_of(recipe: Recipe, parts: Paths):
    return loading.load_scheduler(recipe, parts["base"], None)


@pytest.mark.parametrize("name", ["cuda:0", pytest.param("mps:0", marks=pytest.mark.slow)])
def test_everything_meets_on_the_device(
    parts: Paths, loaded: Loaded, person: Identity, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading, fusing, sampling and decoding; the pictures are the CPU's."""
    monkeypatch.setattr(pipeline, "pick_device", torch.device)
    requests = [Request("a cat", 3, person, "blur"), Request("a dog", 4, person, adapter_scale=0.5)]
    recipe = recipe_of(attention=AM2)
    expected = list(run_of(recipe, loaded("cpu", "float16"), parts).generate(requests, batch_size=2))
    with pretended(name) as device:
        here = loaded(name, "float16")
        modules = (here.unet, here.vae, here.projection, here.parts.text_encoder, here.parts.text_encoder_2)
        for module in (*modules, here.parts.image_encoder):
            for tensor in (*module.parameters(), *module.buffers()):
                assert isinstance(tensor, OnDevice)
                assert tensor.dtype is torch.float16 or not tensor.is_floating_point()
        actual = list(run_of(recipe, here, parts).generate(requests, batch_size=2))
        for ours, other in zip(actual, expected, strict=True):
            assert (ours.latents - other.latents).norm() < 5e-3 * other.latents.norm()
        assert torch.float64 not in device.dtypes  # MPS has no such numbers


@pytest.mark.parametrize(("kind", "spacing"), SCHEDULERS)
def test_the_loop_does_not_wait_for_the_device(
    parts: Paths,
    loaded: Loaded,
    person: Identity,
    kind: str,
    spacing: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A number read at every step would keep the device idle until the next step is queued.

    Every scheduler runs on the device here, so that a tensor left on the CPU shows too.
    """
    monkeypatch.setattr(pipeline, "pick_device", torch.device)
    with pretended("cuda:0") as device:
        stack = loaded("cuda:0", "float16")
        waits = []
        for steps in (1, 3):
            recipe = recipe_of(kind, spacing, steps)
            run = run_of(recipe, stack, parts)
            device.waits.clear()
            run.sample([Request("a cat", 3, person)], run.plan())
            waits.append(len(device.waits))
        assert waits[0] == waits[1]


def test_the_pretended_device_refuses_a_tensor_of_the_cpu() -> None:
    with pretended("cuda:0"):
        layer = torch.nn.Linear(3, 3).to("cuda:0")
        assert layer(torch.ones(3, device="cuda:0")).device == torch.device("cuda:0")
        with pytest.raises(MixedDevicesError):
            layer(torch.ones(3))
        assert (layer.weight * torch.tensor(2.0)).device.type == "cuda"  # a single number may come along


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 5e-3), ("bfloat16", 4e-2)])
@pytest.mark.parametrize("method", [AM1, AM2], ids=["am1", "am2"])
def test_half_precision_stays_close(
    parts: Paths,
    loaded: Loaded,
    person: Identity,
    dtype: str,
    tolerance: float,
    method: dict[str, object],
) -> None:
    recipe = recipe_of(steps=4, attention=method)
    request = Request("a cat", 3, person)
    actual, expected = (
        next(run_of(recipe, loaded("cpu", number), parts).generate([request]))
        for number in (dtype, "float32")
    )
    assert (actual.latents - expected.latents).norm() < tolerance * expected.latents.norm()


def test_lcm_takes_more_steps_than_it_was_distilled_on(parts: Paths, loaded: Loaded) -> None:
    stack = loaded("cpu", "float32")
    many, few = (
        [step.timestep for step in run_of(recipe_of("lcm", None, steps, guidance={}), stack, parts).plan()]
        for steps in (60, 4)
    )
    assert len(many) == len(set(many)) == 60
    assert many == sorted(many, reverse=True)
    assert few == [999, 759, 499, 259]


def test_the_verified_halves_are_loaded_where_another_program_left_a_plain_file(
    parts: Paths, tmp_path: Path
) -> None:
    """A Hub cache is shared; of the two files only the fp16 one is in the manifest."""
    base = write_stack(tmp_path, MINIATURE, fill="random", parts=["base"], dtype=torch.float16)["base"]
    expected = loading.load_unet(base, None, torch.float16).conv_in.weight
    state = {name: t * 0 for name, t in loading.load_unet(base, None, torch.float32).state_dict().items()}
    save_file(state, base / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    assert torch.equal(loading.load_unet(base, None, torch.float16).conv_in.weight, expected)


@pytest.mark.parametrize(
    "message",
    [
        "MPS backend out of memory (MPS allocated: 8.8 GB, max allowed: 9.1 GB)",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_every_out_of_memory_message_is_recognized(
    parts: Paths, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(StableDiffusionXLPipeline, "fuse_lora", full)
    with pytest.raises(DeviceError, match="out of memory"):
        Pipeline.load(recipe_of(), parts, device="cpu", dtype="float32")


def test_libraries_are_quiet_about_a_long_prompt(parts: Paths, loaded: Loaded) -> None:
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    run = run_of(recipe_of(), loaded("cpu", "float32"), parts)
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
        logger.addHandler(handler)
    try:
        run.backbone.encode_prompt("word " * 90)
        run.with_recipe(recipe_of("lcm", None), parts)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
    assert logged == []


def test_image_time_includes_the_copy_to_the_cpu(
    parts: Paths, loaded: Loaded, person: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device works on after the call that started it; only the picture on the CPU is the end."""
    to_pil = pipeline.to_pil

    def slow(image: torch.Tensor):
        time.sleep(3)
        return to_pil(image)

    run = run_of(recipe_of(steps=1), loaded("cpu", "float32"), parts)
    monkeypatch.setattr(pipeline, "to_pil", slow)
    assert next(run.generate([Request("a cat", 3, person)])).seconds >= 3
