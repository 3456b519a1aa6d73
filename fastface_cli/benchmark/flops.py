"""Count floating-point operations from shapes, and measure the device's rate on a matrix product.

A multiplication and an addition count as two. Attention is counted; norms, activations and softmax are not.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .timing import synchronize

ModelConfig = Mapping[str, Any]

TOKENS = 77
"""Tokens of a prompt, in both text encoders."""


def unet_sample(config: ModelConfig, height: int, width: int, rank: int = 0) -> int:
    """Count the operations of one UNet sample.

    Args:
        config: configuration of the UNet.
        height, width: size of the latents.
        rank: rank of an unfused LoRA on the attention projections; 0 for none.
    """
    return _unet_sample(_key(config), height, width) + (
        _lora(_key(config), height, width, rank) if rank else 0
    )


def vae_decode(config: ModelConfig, height: int, width: int) -> int:
    """Count the operations of decoding one image from latents of this size."""
    return _vae_decode(_key(config), height, width)


def transformer(width: int, inner: int, layers: int, tokens: int) -> int:
    """Count the operations of a CLIP tower on one sequence: linear layers and attention."""
    linears = 2 * tokens * (4 * width * width + 2 * width * inner)
    attention = 2 * 2 * tokens * tokens * width
    total: int = layers * (linears + attention)
    return total


def text_encoder(config: Any) -> int:
    """Count the operations of one prompt in a CLIP text encoder."""
    return transformer(config.hidden_size, config.intermediate_size, config.num_hidden_layers, TOKENS)


def image_encoder(config: Any) -> int:
    """Count the operations of one face crop in the CLIP vision tower."""
    patches: int = (config.image_size // config.patch_size) ** 2
    tower = transformer(config.hidden_size, config.intermediate_size, config.num_hidden_layers, patches + 1)
    into: int = 3 * config.patch_size**2 * config.hidden_size
    return tower + 2 * patches * into


def _key(config: ModelConfig) -> str:
    return json.dumps({k: v for k, v in config.items() if not k.startswith("_")}, sort_keys=True, default=str)


@lru_cache(maxsize=16)
def _unet_sample(config: str, height: int, width: int) -> int:
    unet = _meta_unet(config)
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        _call(unet, height, width)
    return int(counter.get_total_flops())


@lru_cache(maxsize=16)
def _lora(config: str, height: int, width: int, rank: int) -> int:
    """Count the two low-rank products of each attention projection, for its number of rows."""
    unet, operations = _meta_unet(config), 0

    def count(module: torch.nn.Linear, args: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        nonlocal operations
        rows = args[0].numel() // module.in_features
        operations += 2 * rows * rank * (module.in_features + module.out_features)

    for name, module in unet.named_modules():
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            module.register_forward_hook(count)
    with torch.device("meta"), torch.no_grad():
        _call(unet, height, width)
    return operations


def _meta_unet(config: str) -> Any:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config({**json.loads(config), "encoder_hid_dim_type": None})


def _call(unet: Any, height: int, width: int) -> None:
    c = unet.config
    pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
    unet(
        torch.empty(1, c.in_channels, height, width),
        torch.tensor(1.0),
        encoder_hidden_states=torch.empty(1, TOKENS, c.cross_attention_dim),
        added_cond_kwargs={"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)},
    )


@lru_cache(maxsize=16)
def _vae_decode(config: str, height: int, width: int) -> int:
    from diffusers import AutoencoderKL, AutoencoderTiny

    read = json.loads(config)
    kind = AutoencoderTiny if "num_encoder_blocks" in read else AutoencoderKL
    with torch.device("meta"):
        vae = kind.from_config(read)
        latents = torch.empty(1, read["latent_channels"], height, width)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            vae.decode(latents)
    return int(counter.get_total_flops())


def image(
    parts: Any, *, height: int, width: int, unet_samples: float, texts: int, people: int
) -> dict[str, int]:
    """Count the operations of one image by stage.

    Args:
        parts: a loaded diffusers pipeline with its image encoder.
        height, width: size of the latents.
        unet_samples: UNet samples of the image.
        texts: number of encoded prompts.
        people: number of face crops, including the empty one for no identity.
    """
    texts_each = text_encoder(parts.text_encoder.config) + text_encoder(parts.text_encoder_2.config)
    return {
        "text": texts * texts_each,
        "identity": people * image_encoder(parts.image_encoder.config),
        "unet": round(unet_samples * unet_sample(parts.unet.config, height, width)),
        "vae": vae_decode(parts.vae.config, height, width),
    }


def matrix_rate(device: torch.device, dtype: torch.dtype) -> tuple[float, int]:
    """Measure the operations per second of a product of square random matrices, and return their size too.

    Zeros would be too fast: with them a GPU draws less power and clocks higher.
    """
    side = 8192 if device.type == "cuda" else 1024 if dtype is torch.float32 else 512
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    seconds: list[float] = []
    # The first products warm up. A CPU without half precision is so slow that it runs only a few.
    while len(seconds) < 5 or (len(seconds) < 13 and sum(seconds) < 1):
        synchronize(device)
        began = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / statistics.median(seconds[3:]), side
