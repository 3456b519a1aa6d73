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
from ..adapters.pulid_encoder import LEVELS
from ..adapters.registry import ADAPTERS
from ..app.pipeline import Pipeline
from ..identity.analyzer import EMBEDDING
from ..models.acceleration import DEFAULT, Acceleration, arrange, check
from ..models.device import memory_errors
from ..models.loading import Homes
from ..models.offload import OFF, Level, check_level
from ..models.schedulers import SCHEDULERS
from ..quiet import quiet_libraries
from ..recipe.schema import AdapterName, Recipe
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
        extras: dict[str, torch.nn.Module] = {}
        if recipe.adapter.kind == "faceid_plusv2":
            parts = random_parts(recipe, device, dtype, stack)
            projection = settle_adapter(parts, recipe.adapter.lora_scale, fuse=acceleration.fuse_lora)
            projection.to(device, dtype).requires_grad_(False)
        else:
            parts = random_models(recipe, device, dtype, stack)
            projection = random_adapter(recipe.adapter.kind, parts.unet, stack)
            if recipe.adapter.kind == "instantid":
                extras["controlnet"] = random_controlnet(parts.unet)
        arrange(parts.unet, parts.vae, acceleration)
        homes = Homes.of(device, level)
        parts.unet.to(homes.unet)
        parts.vae.to(homes.vae)
        encoders = (parts.text_encoder, parts.text_encoder_2, parts.image_encoder, projection)
        for encoder in (*encoders, *extras.values()):
            encoder.to(homes.encoders)
        steps = scheduler(recipe, stack)
        return Pipeline(
            recipe,
            parts,
            projection,
            steps,
            extras=extras,
            acceleration=acceleration,
            level=level,
            device=device,
        )


def random_reference(
    recipe: Recipe, device: torch.device, dtype: torch.dtype, stack: Stack = PUBLISHED
) -> PublishedPipeline:
    """Create the published pipeline with the same random weights as `random_pipeline`."""
    with quiet_libraries(), memory_errors(device), torch.no_grad():
        return PublishedPipeline(recipe, random_parts(recipe, device, dtype, stack), scheduler(recipe, stack))


def random_parts(recipe: Recipe, device: torch.device, dtype: torch.dtype, stack: Stack) -> Any:
    """Create a diffusers pipeline with an image encoder, the FaceID adapter and its unfused LoRA."""
    parts = random_models(recipe, device, dtype, stack)
    parts.load_ip_adapter(
        _adapter(stack, device, dtype), subfolder="", weight_name="", image_encoder_folder=None
    )
    parts.unet.to(device, dtype).requires_grad_(False)  # the LoRA is in float32
    return parts


def random_models(recipe: Recipe, device: torch.device, dtype: torch.dtype, stack: Stack) -> Any:
    """Create a diffusers pipeline with an image encoder, without an adapter."""
    from diffusers import StableDiffusionXLPipeline

    with _default_tensor(device, dtype):
        models = make_models(recipe, stack)
    vae = models["vae"]
    for index, model in enumerate(models.values()):
        fill(model.named_parameters(), index)
        model.to(device, dtype).eval().requires_grad_(False)
    if vae.config.force_upcast and dtype is torch.float16:
        vae.to(torch.float32)  # as when real weights are loaded
    return StableDiffusionXLPipeline(
        **models, **tokenizers(stack), scheduler=scheduler(recipe, stack), add_watermarker=False
    )


def random_adapter(kind: AdapterName, unet: Any, stack: Stack) -> torch.nn.Module:
    """Put random keys and values for the identity into a UNet, and create the adapter's projection."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    device, dtype, width = unet.device, unet.dtype, unet.config.cross_attention_dim
    shapes = _projection_shapes(kind, width, stack.image_encoder["hidden_size"])
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    projection = ADAPTERS[kind].empty_projection(meta).to(dtype).to_empty(device=device)
    fill(projection.named_parameters(), 97)
    processors = dict(unet.attn_processors)
    with _default_tensor(device, dtype):
        for name in list(processors):
            layer = unet.get_submodule(name.removesuffix(".processor"))
            if layer.is_cross_attention:
                own = IPAdapterAttnProcessor2_0(layer.inner_dim, width, num_tokens=[1])
                fill(((f"{name}.{key}", value) for key, value in own.named_parameters()), 98)
                processors[name] = own
    unet.set_attn_processor(processors)
    unet.requires_grad_(False)
    return projection.eval().requires_grad_(False)


def _projection_shapes(kind: AdapterName, width: int, features: int) -> dict[str, tuple[int, ...]]:
    """The tensors from which an adapter's projection reads its size, as published except for both widths.

    Args:
        kind: an adapter other than FaceID.
        width: of an identity token.
        features: of the image encoder's hidden states.
    """
    if kind in ("plus_face", "instantid"):
        return {
            "latents": (1, 16, 1280),
            "proj_in.weight": (1280, features if kind == "plus_face" else EMBEDDING),
            "proj_out.weight": (width, 1280),
            **{f"layers.{layer}.attn.to_q.weight": (1280, 1280) for layer in range(4)},
        }
    levels: dict[str, tuple[int, ...]] = {
        f"{name}_{level}.0.weight": (1024, 1024)
        for name in ("mapping", "mapping_patch")
        for level in range(LEVELS)
    }
    if kind == "pulid_v1":
        body = {"body.0.weight": (1024, EMBEDDING + 768), "body.3.weight": (1024, 1024)}
        return {**levels, **body, "mapping_0.6.weight": (width, 1024)}
    parts = {"0.to_q.weight": 1024, "1.1.weight": 4096}
    layers = {f"layers.{layer}.{part}": (out, 1024) for layer in range(10) for part, out in parts.items()}
    return {
        **levels,
        **layers,
        "latents": (1, 32, 1024),
        "proj_out": (1024, width),
        "id_embedding_mapping.0.weight": (1024, EMBEDDING + 768),
    }


def random_controlnet(unet: Any) -> torch.nn.Module:
    """Create InstantID's ControlNet for a UNet, with random weights."""
    from diffusers import ControlNetModel

    with _default_tensor(unet.device, unet.dtype):
        controlnet = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    fill(controlnet.named_parameters(), 96)
    model: torch.nn.Module = controlnet.eval().requires_grad_(False)
    return model


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
