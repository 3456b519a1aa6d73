"""Create models with random weights on the device, to measure speed without a download.

Every matrix is normal with variance 1 / fan-in. Activations then keep their scale, nothing overflows in half
precision, and matrix products draw as much power as with real weights. A fused distillation LoRA does not
change the speed of the UNet, so none is created.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..adapters.faceid_plusv2 import settle_adapter
from ..app.pipeline import Pipeline
from ..models.acceleration import DEFAULT, Acceleration, arrange, check
from ..models.device import memory_errors
from ..models.loading import Homes
from ..models.offload import OFF, Level, check_level
from ..models.schedulers import SCHEDULERS
from ..quiet import quiet_libraries
from ..recipe.schema import Recipe
from .reference import PublishedPipeline
from .sdxl import PADS, PUBLISHED, TURBO_SCHEDULER, ConfigFile, Stack
from .structure import adapter_layout, byte_vocabulary


def random_pipeline(
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
    acceleration: Acceleration = DEFAULT,
    stack: Stack = PUBLISHED,
    level: Level = OFF,
) -> Pipeline:
    """Create our pipeline with random weights, which are the same at every call.

    Args:
        recipe: the recipe to run; its model files are not used.
        device: device for the weights.
        dtype: data type of the weights.
        acceleration: the optimizations.
        stack: the model configurations.
        level: which models are offloaded, after they were created on the device.
    """
    check(acceleration, device, dtype)
    check_level(level, acceleration)
    with quiet_libraries(), memory_errors(device, level), torch.no_grad():
        parts = random_parts(recipe, device, dtype, stack)
        projection = settle_adapter(parts, recipe.adapter.lora_scale, fuse=acceleration.fuse_lora)
        projection.to(device, dtype).requires_grad_(False)
        arrange(parts.unet, parts.vae, acceleration)
        homes = Homes.of(device, level)
        parts.unet.to(homes.unet)
        parts.vae.to(homes.vae)
        for encoder in (parts.text_encoder, parts.text_encoder_2, parts.image_encoder, projection):
            encoder.to(homes.encoders)
        steps = scheduler(recipe, stack)
        return Pipeline(
            recipe, parts, projection, steps, acceleration=acceleration, level=level, device=device
        )


def random_reference(
    recipe: Recipe, device: torch.device, dtype: torch.dtype, stack: Stack = PUBLISHED
) -> PublishedPipeline:
    """Create the published pipeline with the same random weights as `random_pipeline`."""
    with quiet_libraries(), memory_errors(device), torch.no_grad():
        return PublishedPipeline(recipe, random_parts(recipe, device, dtype, stack), scheduler(recipe, stack))


def random_parts(recipe: Recipe, device: torch.device, dtype: torch.dtype, stack: Stack) -> Any:
    """Create a diffusers pipeline with an image encoder, the adapter and its unfused LoRA."""
    from diffusers import StableDiffusionXLPipeline

    with _default_tensor(device, dtype):
        models = make_models(recipe, stack)
    unet, vae = models["unet"], models["vae"]
    for index, model in enumerate(models.values()):
        fill(model.named_parameters(), index)
        model.to(device, dtype).eval().requires_grad_(False)
    if vae.config.force_upcast and dtype is torch.float16:
        vae.to(torch.float32)  # as when real weights are loaded
    parts = StableDiffusionXLPipeline(
        **models, **tokenizers(stack), scheduler=scheduler(recipe, stack), add_watermarker=False
    )
    parts.load_ip_adapter(
        _adapter(stack, device, dtype), subfolder="", weight_name="", image_encoder_folder=None
    )
    unet.to(device, dtype).requires_grad_(False)  # the LoRA is in float32
    return parts


def make_models(recipe: Recipe, stack: Stack) -> dict[str, Any]:
    """Create the models without an adapter on the default device, under the names of diffusers."""
    import transformers
    from diffusers import AutoencoderKL, UNet2DConditionModel

    return {
        "unet": UNet2DConditionModel.from_config(stack.unet),
        "vae": AutoencoderKL.from_config({**stack.vae, "force_upcast": recipe.model.vae is None}),
        "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**stack.text_encoder)),
        "text_encoder_2": transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(**stack.text_encoder_2)
        ),
        "image_encoder": transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(**stack.image_encoder)
        ),
    }


@contextmanager
def _default_tensor(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Create new parameters on this device and with this data type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def fill(tensors: Iterable[tuple[str, Tensor]], seed: int) -> None:
    """Fill tensors with random numbers that depend on their name and the seed; norm weights are near one.

    The product of a LoRA's two matrices is a tenth of a full matrix.
    """
    for name, tensor in tensors:
        generator = torch.Generator(tensor.device).manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        spread, mean = 0.02, 0.0
        if tensor.ndim == 1:
            mean = float(name.endswith("weight"))
        elif not name.endswith("embedding.weight"):
            spread = (0.1 if name.endswith("lora.up.weight") else 1.0) * tensor[0].numel() ** -0.5
        tensor.normal_(mean, spread, generator=generator)


def _adapter(stack: Stack, device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    layout = adapter_layout(stack)
    tensors = {
        name: torch.empty(shape, device=device, dtype=dtype) for name, (shape, _) in layout.tensors.items()
    }
    fill(tensors.items(), 99)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, key = name.partition(".")
        parts.setdefault(part, {})[key] = tensor
    return parts


def scheduler(recipe: Recipe, stack: Stack) -> Any:
    """Create the scheduler that the recipe names."""
    settings = recipe.model.scheduler
    config: ConfigFile = TURBO_SCHEDULER if settings.kind == "euler_ancestral" else stack.scheduler
    changes = {} if settings.spacing is None else {"timestep_spacing": settings.spacing}
    return SCHEDULERS[settings.kind].scheduler.from_config(config, **changes)


def tokenizers(stack: Stack) -> dict[str, Any]:
    """Create tokenizers with the stack's vocabularies, under the names of diffusers."""
    from transformers import CLIPTokenizer

    encoders = (stack.text_encoder, stack.text_encoder_2)
    return {
        name: CLIPTokenizer(
            vocab=byte_vocabulary(encoder["vocab_size"]), merges=[], pad_token=pad, model_max_length=77
        )
        for (name, pad), encoder in zip(PADS.items(), encoders, strict=True)
    }
