"""The layout of every published checkpoint file, and files with that layout to load and to time.

Names and shapes come from the classes that load the files, created on the meta device. A layout determines
the exact length of the published file. It also allows writing a sparse file that loads like the published one
(a real header without data), and a file with random weights, for tests and for the loading benchmark.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from torch import Tensor
from torch.serialization import skip_data

from fastface_cli.benchmark.sdxl import (
    BEGIN,
    END,
    PADS,
    PUBLISHED,
    TURBO_SCHEDULER,
    ConfigFile,
    Stack,
    config_text,
)
from fastface_cli.benchmark.structure import adapter_layout, byte_vocabulary, empty_unet, layout_of
from fastface_cli.models.tensor_file import (
    Shape,
    TensorLayout,
    numel,
    safetensors_header,
    safetensors_length,
    safetensors_pieces,
)

Fill = Literal["sparse", "random"]


PT = {"format": "pt"}
"""The metadata that diffusers and transformers write."""

MODEL_INDEX: ConfigFile = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": "0.19.0.dev0",
    "force_zeros_for_empty_prompt": True,
    "add_watermarker": None,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
"""`model_index.json` of the base."""


def unet_layout(
    config: ConfigFile, dtype: torch.dtype = torch.float16, metadata: Mapping[str, str] | None = PT
) -> TensorLayout:
    """Return the layout of a UNet file.

    With metadata: the base and SDXL-Turbo. Without metadata: a single-file UNet of SDXL-Lightning.
    """
    return layout_of(empty_unet(config), dtype, metadata)


def vae_layout(config: ConfigFile, dtype: torch.dtype = torch.float16) -> TensorLayout:
    """Return the layout of a VAE file: the base in float16, sdxl-vae-fp16-fix in float32."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        return layout_of(AutoencoderKL.from_config(config), dtype, PT)


def text_encoder_layout(config: ConfigFile, dtype: torch.dtype = torch.float16) -> TensorLayout:
    """Return the layout of a text encoder file, with a projection if `architectures` names one.

    Published files prefix every name with `text_model.`; CLIPTextModel in transformers 5 omits it.
    """
    import transformers

    kind = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        layout = layout_of(kind(transformers.CLIPTextConfig(**config)), dtype, PT)
    heads = ("text_model.", "text_projection.")
    return replace(
        layout,
        tensors={
            name if name.startswith(heads) else f"text_model.{name}": spec
            for name, spec in layout.tensors.items()
        },
    )


def image_encoder_layout(config: ConfigFile, dtype: torch.dtype = torch.float32) -> TensorLayout:
    """Return the layout of the CLIP vision tower, with the `position_ids` that older transformers stored."""
    import transformers

    with torch.device("meta"):
        model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**config))
    layout = layout_of(model, dtype, PT)
    positions = (config["image_size"] // config["patch_size"]) ** 2 + 1
    extra = {"vision_model.embeddings.position_ids": ((1, positions), torch.int64)}
    return replace(layout, tensors={**layout.tensors, **extra})


LORA_TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)
"""Name endings of the UNet modules that the distillation LoRAs change."""


def lora_targets(unet: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the UNet modules that a distillation LoRA changes, by name; 788 in SDXL."""
    return {name: module for name, module in unet.named_modules() if name.endswith(LORA_TARGETS)}


def lora_layout(
    config: ConfigFile,
    rank: int,
    dtype: torch.dtype = torch.float16,
    metadata: Mapping[str, str] | None = None,
) -> TensorLayout:
    """Return the layout of a distillation LoRA for the UNet, with the names of kohya.

    float16 without metadata: SDXL-Lightning, DMD2; float32 with `PT`: Hyper-SD; float16 with a longer
    metadata: LCM.
    """
    tensors: dict[str, tuple[Shape, torch.dtype]] = {}
    for name, module in lora_targets(empty_unet(config)).items():
        out, into, *kernel = module.weight.shape  # type: ignore[union-attr, misc]
        stem = "lora_unet_" + name.replace(".", "_")
        tensors[f"{stem}.alpha"] = ((), dtype)
        tensors[f"{stem}.lora_down.weight"] = ((rank, into, *kernel), dtype)
        tensors[f"{stem}.lora_up.weight"] = ((out, rank, *(1 for _ in kernel)), dtype)
    return TensorLayout(tensors, metadata)


def _write_safetensors(file: BinaryIO, layout: TensorLayout, fill: Fill, seed: int, scale: float) -> None:
    if fill == "sparse":
        file.write(safetensors_header(layout))
        file.truncate(safetensors_length(layout))
        return
    specs = layout.tensors
    for piece in safetensors_pieces(layout, lambda name: random_tensor(name, *specs[name], seed, scale)):
        file.write(piece)


def _write_pickle(path: Path, layout: TensorLayout, fill: Fill, seed: int, scale: float) -> None:
    """Write two dicts of views of one storage, like the published adapter."""
    (dtype,) = {dtype for _, dtype in layout.tensors.values()}
    # torch.empty touches no memory page, and skip_data omits the data.
    storage = torch.empty(layout.nbytes // dtype.itemsize, dtype=dtype)
    parts: dict[str, dict[str, Tensor]] = {}
    offset = 0
    for name, (shape, _) in layout.tensors.items():
        view = storage[offset : offset + numel(shape)].view(shape)
        offset += numel(shape)
        if fill == "random":
            view.copy_(random_tensor(name, shape, dtype, seed, scale))
        part, _, key = name.partition(".")
        parts.setdefault(part, {})[key] = view
    with skip_data() if fill == "sparse" else nullcontext():
        torch.save(parts, path)


def random_tensor(name: str, shape: Shape, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    """Create random weights that keep activations near one; they depend on name, shape and seed only.

    Matrices and kernels are normal with variance 1 / fan-in, norm weights are near one, biases and embeddings
    are small. The product of a LoRA's two matrices is a tenth of a full matrix. Its alpha differs from its
    rank, which exposes a loader that omits alpha / rank. `scale` multiplies the matrices.
    """
    if not dtype.is_floating_point:
        return torch.arange(numel(shape), dtype=dtype).reshape(shape)
    if name.endswith(".alpha"):
        return torch.full(shape, 2.0, dtype=dtype)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        gain = name.endswith(("norm.weight", ".weight"))
        noise = noise.mul_(0.02).add_(float(gain))
    elif name.endswith(("token_embedding.weight", "position_embedding.weight")):
        noise = noise.mul_(0.02)
    else:
        is_up = name.endswith(("lora_up.weight", "lora.up.weight"))
        noise = noise.mul_((0.1 if is_up else 1.0) * scale * numel(shape[1:]) ** -0.5)
    return noise.to(dtype)


def write(path: Path, layout: TensorLayout, fill: Fill = "sparse", seed: int = 0, scale: float = 1.0) -> Path:
    """Write a checkpoint file with this layout, and create its folder.

    Args:
        path: `.safetensors`, or `.bin` for a PyTorch file of two dicts (the adapter).
        fill: `sparse` writes a header without data, which reads as zeros; `random` writes random weights.
        seed: seed of the random weights.
        scale: multiplies the random matrices.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".bin":
        _write_pickle(path, layout, fill, seed, scale)
    else:
        with path.open("wb") as file:
            _write_safetensors(file, layout, fill, seed, scale)
    return path


def _special(content: str) -> ConfigFile:
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def special_tokens(pad: str) -> ConfigFile:
    """Return `special_tokens_map.json` of a CLIP tokenizer that pads with `pad`."""
    return {
        "bos_token": _special(BEGIN),
        "eos_token": _special(END),
        "pad_token": pad,
        "unk_token": _special(END),
    }


def tokenizer_config(pad: str) -> ConfigFile:
    """Return `tokenizer_config.json` of a CLIP tokenizer that pads with `pad`."""
    return {
        "add_prefix_space": False,
        "bos_token": {"__type": "AddedToken", **_special(BEGIN)},
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "eos_token": {"__type": "AddedToken", **_special(END)},
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": pad,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": {"__type": "AddedToken", **_special(END)},
    }


def write_tokenizer(folder: Path, vocabulary: int, pad: str) -> None:
    """Write the four files of a CLIP tokenizer with single bytes and no merges.

    Args:
        folder: output folder.
        vocabulary: number of tokens, at least 514.
        pad: the padding token.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(byte_vocabulary(vocabulary)))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "special_tokens_map.json").write_text(config_text(special_tokens(pad)))
    (folder / "tokenizer_config.json").write_text(config_text(tokenizer_config(pad)))


PARTS = {
    "base": "pipe",
    "image_encoder": "clip",
    "adapter": "ip-adapter-faceid-plusv2_sdxl.bin",
    "vae": "vae-fp16-fix",
    "hyper": "Hyper-SDXL-4steps-lora.safetensors",
    "lcm": "lcm-lora-sdxl/pytorch_lora_weights.safetensors",
    "lightning": "sdxl_lightning_4step_unet.safetensors",
    "turbo": "turbo",
}
"""Parts that `write_stack` can write, with their folder or file."""


def part_layouts(
    part: str, stack: Stack = PUBLISHED, dtype: torch.dtype = torch.float16
) -> dict[str, TensorLayout]:
    """Return the layouts of one part by path inside its folder (empty: the part is one file).

    Args:
        part: one of `PARTS`.
        stack: the model configurations.
        dtype: data type of files published in float16; in float32, file names have no `fp16`.
    """
    variant = ".fp16" if dtype is torch.float16 else ""
    weights = f"diffusion_pytorch_model{variant}.safetensors"
    match part:
        case "base":
            return {
                f"unet/{weights}": unet_layout(stack.unet, dtype),
                f"vae/{weights}": vae_layout(stack.vae, dtype),
                f"text_encoder/model{variant}.safetensors": text_encoder_layout(stack.text_encoder, dtype),
                f"text_encoder_2/model{variant}.safetensors": text_encoder_layout(
                    stack.text_encoder_2, dtype
                ),
            }
        case "image_encoder":
            return {"model.safetensors": image_encoder_layout(stack.image_encoder)}
        case "adapter":
            return {"": adapter_layout(stack, dtype)}
        case "vae":
            return {"diffusion_pytorch_model.safetensors": vae_layout(stack.vae, torch.float32)}
        case "hyper":
            return {"": lora_layout(stack.unet, stack.lora_rank, torch.float32, PT)}
        case "lcm":
            return {"": lora_layout(stack.unet, stack.lora_rank, dtype, PT)}
        case "lightning":
            return {"": unet_layout(stack.unet, dtype, None)}
        case "turbo":
            return {f"unet/{weights}": unet_layout(stack.unet, dtype)}
    raise ValueError(f"no part {part!r}; there are {', '.join(PARTS)}")


def base_configs(stack: Stack) -> dict[str, ConfigFile]:
    """Return the configuration files of the base folder by path, including those of the tokenizers."""
    return {
        "model_index.json": MODEL_INDEX,
        "scheduler/scheduler_config.json": stack.scheduler,
        "text_encoder/config.json": stack.text_encoder,
        "text_encoder_2/config.json": stack.text_encoder_2,
        "unet/config.json": stack.unet,
        "vae/config.json": stack.vae,
        **{f"{name}/special_tokens_map.json": special_tokens(pad) for name, pad in PADS.items()},
        **{f"{name}/tokenizer_config.json": tokenizer_config(pad) for name, pad in PADS.items()},
    }


def part_configs(part: str, stack: Stack = PUBLISHED) -> dict[str, ConfigFile]:
    """Return the configuration files of one part by path inside its folder."""
    return {
        "base": base_configs(stack),
        "image_encoder": {"config.json": stack.image_encoder},
        "vae": {"config.json": {**stack.vae, "force_upcast": False}},
        "turbo": {"unet/config.json": stack.unet, "scheduler/scheduler_config.json": TURBO_SCHEDULER},
    }.get(part, {})


def write_stack(
    folder: Path,
    stack: Stack = PUBLISHED,
    *,
    fill: Fill = "sparse",
    parts: Iterable[str] = tuple(PARTS),
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
    tokenizers: Path | None = None,
) -> dict[str, Path]:
    """Write a complete set of models in the published file layout.

    Args:
        folder: output folder; `PARTS` has the paths inside it.
        stack: the model configurations, `PUBLISHED` (full size) or `MINIATURE`.
        fill: sparse files or random weights.
        parts: some of `PARTS`.
        dtype: data type of files published in float16; in float32, file names have no `fp16`.
        seed: seed of the random weights; each part differs.
        tokenizers: a base folder whose tokenizers are copied; None writes tokenizers with single bytes.

    Returns:
        The path of each part: a folder for `base`, `image_encoder`, `vae` and `turbo`, otherwise a file.
    """
    written = {}
    for part in parts:
        path = written[part] = folder / PARTS[part]
        for name, layout in part_layouts(part, stack, dtype).items():
            write(path / name, layout, fill, seed + list(PARTS).index(part))
        for name, config in part_configs(part, stack).items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(config_text(config))
    if "base" in written:
        for name, pad in PADS.items():
            target = written["base"] / name
            if tokenizers is not None:
                shutil.copytree(tokenizers / name, target, dirs_exist_ok=True)
            else:
                encoder = stack.text_encoder if name == "tokenizer" else stack.text_encoder_2
                write_tokenizer(target, encoder["vocab_size"], pad)
    return written
