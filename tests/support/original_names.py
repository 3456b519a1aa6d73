"""Diffusers' SDXL weights under the names of the original single-file checkpoint, for tests.

The inverse of `from_single_file`. It is written from the two sets of names of the architecture, so that the
loader is not tested against its own table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor

State = dict[str, Tensor]

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def unet_name(name: str, layers: int) -> str:
    """Return the original name of a UNet tensor, without `model.diffusion_model.`."""
    stem, kind = name.rsplit(".", 1)
    if stem in UNET:
        return f"{UNET[stem]}.{kind}"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", stem):
        part, index, rest = match.groups()
        place = 1 if part == "attentions" else 2 * int(index)
        return f"middle_block.{place}.{RESNET.get(rest, rest)}.{kind}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", stem)
    assert match is not None, name
    side, block, part, index, rest = match.groups()
    if part == "downsamplers":
        return f"input_blocks.{(int(block) + 1) * (layers + 1)}.0.op.{kind}"
    if part == "upsamplers":
        return f"output_blocks.{int(block) * (layers + 1) + layers}.2.conv.{kind}"
    first = 1 if side == "down" else 0
    place = first + int(block) * (layers + 1) + int(index)
    slot = 0 if part == "resnets" else 1
    kept = RESNET[rest] if part == "resnets" else rest
    return f"{'input' if side == 'down' else 'output'}_blocks.{place}.{slot}.{kept}.{kind}"


def vae_name(name: str, blocks: int) -> str:
    """Return the original name of a VAE tensor, without `first_stage_model.`."""
    stem, kind = name.rsplit(".", 1)
    if match := re.fullmatch(r"(\w+)\.mid_block\.resnets\.(\d)\.(.+)", stem):
        stem = f"{match[1]}.mid.block_{int(match[2]) + 1}.{match[3]}"
    elif match := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)", stem):
        stem = f"{match[1]}.mid.attn_1.{VAE_ATTENTION[match[2]]}"
    elif match := re.fullmatch(r"encoder\.down_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", stem):
        part = f"block.{match[3]}" if match[2] == "resnets" else "downsample"
        stem = f"encoder.down.{match[1]}.{part}.{match[4]}"
    elif match := re.fullmatch(r"decoder\.up_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", stem):
        part = f"block.{match[3]}" if match[2] == "resnets" else "upsample"
        stem = f"decoder.up.{blocks - 1 - int(match[1])}.{part}.{match[4]}"
    return stem.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out") + f".{kind}"


def open_clip(state: State) -> Iterator[tuple[str, Tensor]]:
    """Yield the second text encoder with OpenCLIP names: q, k and v in one matrix, projection transposed."""
    for name, tensor in state.items():
        match = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if match is None:
            continue
        layer, part, kind = match.groups()
        stem = f"transformer.resblocks.{layer}"
        if part == "self_attn.q_proj":
            rows = [state[name.replace("q_proj", role)] for role in ("q_proj", "k_proj", "v_proj")]
            yield f"{stem}.attn.in_proj_{kind}", torch.cat(rows)
        elif part in OPEN_CLIP:
            yield f"{stem}.{OPEN_CLIP[part]}.{kind}", tensor
    yield "token_embedding.weight", state["text_model.embeddings.token_embedding.weight"]
    yield "positional_embedding", state["text_model.embeddings.position_embedding.weight"]
    yield "ln_final.weight", state["text_model.final_layer_norm.weight"]
    yield "ln_final.bias", state["text_model.final_layer_norm.bias"]
    yield "text_projection", state["text_projection.weight"].T.contiguous()
    yield "logit_scale", torch.tensor(4.6, dtype=state["text_projection.weight"].dtype)


def original(unet: State, vae: State, text_encoder: State, text_encoder_2: State, layers: int = 2) -> State:
    """Return a complete checkpoint in the original layout.

    Args:
        unet: UNet weights in diffusers' names.
        vae: VAE weights in diffusers' names.
        text_encoder: weights in published names (prefix `text_model.`).
        text_encoder_2: weights of the second encoder, named likewise.
        layers: residual blocks in each UNet block.
    """
    state = {f"model.diffusion_model.{unet_name(name, layers)}": tensor for name, tensor in unet.items()}
    blocks = 1 + max(int(name.split(".")[2]) for name in vae if name.startswith("decoder.up_blocks."))
    for name, tensor in vae.items():
        key = vae_name(name, blocks)
        is_kernel = ".mid.attn_1." in key and tensor.ndim == 2
        state[f"first_stage_model.{key}"] = tensor[:, :, None, None] if is_kernel else tensor
    state |= {f"conditioner.embedders.0.transformer.{name}": t for name, t in text_encoder.items()}
    length = len(text_encoder["text_model.embeddings.position_embedding.weight"])
    positions = torch.arange(length, device=next(iter(unet.values())).device).unsqueeze(0)
    state["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = positions
    state |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in open_clip(text_encoder_2)}
    return state
