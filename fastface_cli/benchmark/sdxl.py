"""The configurations of the published SDXL stack, as data.

`config_text` formats a configuration as its authors' tools did. The SHA-256 of the text equals that of the
published file, which proves that these values are the published ones. Nothing heavy is imported here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

ConfigFile = dict[str, Any]

_UNET: ConfigFile = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.19.0.dev0",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 2048,
    "cross_attention_norm": None,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}

_TEXT_ENCODER: ConfigFile = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float16",
    "transformers_version": "4.32.0.dev0",
    "vocab_size": 49408,
}

_TEXT_ENCODER_2: ConfigFile = {
    **_TEXT_ENCODER,
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}

_VAE: ConfigFile = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.20.0.dev0",
    "_name_or_path": "../sdxl-vae/",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}

_IMAGE_ENCODER: ConfigFile = {
    "_name_or_path": "./image_encoder",
    "architectures": ["CLIPVisionModelWithProjection"],
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "image_size": 224,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 5120,
    "layer_norm_eps": 1e-05,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 32,
    "patch_size": 14,
    "projection_dim": 1024,
    "torch_dtype": "float16",
    "transformers_version": "4.28.0.dev0",
}

_SCHEDULER: ConfigFile = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}

TURBO_SCHEDULER: ConfigFile = {
    **{key: value for key, value in _SCHEDULER.items() if key != "use_karras_sigmas"},
    "_class_name": "EulerAncestralDiscreteScheduler",
    "_diffusers_version": "0.24.0.dev0",
    "timestep_spacing": "linspace",
}
"""Copied from one copy of the repository; its published hash is not known."""

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
PADS = {"tokenizer": END, "tokenizer_2": "!"}
"""The padding token of each tokenizer folder."""


@dataclass(frozen=True)
class Stack:
    """The configurations of all models, and the two LoRA ranks, which no configuration contains."""

    unet: ConfigFile
    text_encoder: ConfigFile
    text_encoder_2: ConfigFile
    vae: ConfigFile
    image_encoder: ConfigFile
    scheduler: ConfigFile = field(default_factory=lambda: _SCHEDULER)
    lora_rank: int = 64
    """Rank of the distillation LoRAs."""
    adapter_rank: int = 128
    """Rank of the LoRA inside the adapter file."""


PUBLISHED = Stack(_UNET, _TEXT_ENCODER, _TEXT_ENCODER_2, _VAE, _IMAGE_ENCODER)
"""stabilityai/stable-diffusion-xl-base-1.0 at 4621659, and h94/IP-Adapter's image encoder."""

_SMALL_TEXT: ConfigFile = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "projection_dim": 32,
    "vocab_size": 514,
}

MINIATURE = replace(
    PUBLISHED,
    unet={
        **_UNET,
        "addition_time_embed_dim": 8,
        "attention_head_dim": [1, 2, 4],
        "block_out_channels": [16, 32, 64],
        "cross_attention_dim": 64,
        "norm_num_groups": 8,
        "projection_class_embeddings_input_dim": 48 + 6 * 8,
        "sample_size": 16,
        "transformer_layers_per_block": [1, 1, 2],
    },
    text_encoder={**_TEXT_ENCODER, **_SMALL_TEXT, "hidden_size": 16, "projection_dim": 16},
    text_encoder_2={**_TEXT_ENCODER_2, **_SMALL_TEXT, "hidden_size": 48, "projection_dim": 48},
    vae={**_VAE, "block_out_channels": [16, 16, 32, 32], "norm_num_groups": 8, "sample_size": 128},
    image_encoder={
        **_IMAGE_ENCODER,
        "hidden_size": 32,
        "image_size": 56,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "projection_dim": 16,
    },
    lora_rank=4,
    adapter_rank=4,
)
"""The same architecture in miniature: every kind of layer and name, in a few megabytes."""


def config_text(config: ConfigFile) -> str:
    """Format a configuration file as diffusers and transformers write it."""
    return json.dumps(config, indent=2) + "\n"
