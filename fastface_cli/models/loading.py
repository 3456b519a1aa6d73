"""Load the models of a recipe: fuse LoRAs, and put the identity adapter into the UNet.

The loaders are those of diffusers and transformers. This module also refuses incomplete weights, and its
errors name the file.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from ..adapters.lora import TEXT_ENCODERS, fuse_lora
from ..adapters.registry import ADAPTERS, Extras
from ..quiet import is_out_of_memory, loading_errors
from ..recipe.schema import Recipe
from ..store.fused_cache import FusedCache, fused_inputs, fused_key
from . import fused
from .fused import FusedModels
from .offload import Level
from .schedulers import build_scheduler

logger = logging.getLogger(__name__)

DIFFUSION, TRANSFORMER = "diffusion_pytorch_model", "model"
"""Stems of the weight files of diffusers and of transformers."""


def _variant(folder: Path, stem: str) -> str | None:
    """`fp16` if the folder contains that variant of the weights, else None.

    A Hub cache that other programs share may also contain the plain file, which was never verified.
    """
    return "fp16" if (folder / f"{stem}.fp16.safetensors").exists() else None


def _strict(report: Mapping[str, Any], what: str, allowed: tuple[str, ...] = ()) -> None:
    """Refuse incomplete weights: the loaders would leave random numbers in the model."""
    missing = [key for key in report.get("missing_keys", ()) if not key.endswith(allowed)]
    wrong = [key if isinstance(key, str) else key[0] for key in report.get("mismatched_keys", ())]
    if missing or wrong:
        names = sorted(missing) + sorted(wrong)
        named = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        counts = f"{len(missing)} tensors are missing, {len(wrong)} have another shape"
        raise ValueError(f"{what}: {counts} ({named})")


def _from_folder(kind: Any, folder: Path, stem: str, dtype: torch.dtype, what: str) -> Any:
    """Load a model from a folder, and refuse incomplete weights; `stem` selects the library."""
    # transformers then reports mismatched sizes to _strict, instead of logging a page about them.
    ours = {"ignore_mismatched_sizes": True} if stem == TRANSFORMER else {}
    model, report = kind.from_pretrained(
        folder,
        variant=_variant(folder, stem),
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **ours,
    )
    _strict(report, what, ("position_ids",) if stem == TRANSFORMER else ())
    return model.eval()


def load_unet(base: Path, unet: Path | None, dtype: torch.dtype) -> UNet2DConditionModel:
    """Load the UNet, on the CPU.

    Args:
        base: diffusers SDXL folder, for the UNet itself or for its configuration.
        unet: a folder with `unet/`, one state-dict file (such as SDXL-Lightning's), or None for the base's.
        dtype: of the weights.
    """
    with loading_errors("UNet", unet or base):
        if unet is not None and unet.is_file():
            return load_unet_file(base, unet, dtype)
        return _from_folder(UNet2DConditionModel, (unet or base) / "unet", DIFFUSION, dtype, "UNet")


def load_unet_file(base: Path, file: Path, dtype: torch.dtype) -> UNet2DConditionModel:
    """Load a UNet from one state-dict file, with the configuration of the base."""
    from accelerate import init_empty_weights
    from safetensors.torch import load_file

    config = UNet2DConditionModel.load_config(base, subfolder="unet", local_files_only=True)
    with init_empty_weights():
        model = UNet2DConditionModel.from_config(config)
    state = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def load_text_encoders(
    base: Path, dtype: torch.dtype
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, CLIPTokenizer]:
    """Load both text encoders and their tokenizers."""
    with loading_errors("text encoders", base):
        models = [
            _from_folder(kind, base / name, TRANSFORMER, dtype, name)
            for name, kind in zip(TEXT_ENCODERS, (CLIPTextModel, CLIPTextModelWithProjection), strict=True)
        ]
        tokenizers = [
            CLIPTokenizer.from_pretrained(base, subfolder=name, local_files_only=True)
            for name in ("tokenizer", "tokenizer_2")
        ]
        for tokenizer, model in zip(tokenizers, models, strict=True):
            _check_tokenizer(tokenizer, model.config)
        return models[0], models[1], tokenizers[0], tokenizers[1]


def _check_tokenizer(tokenizer: CLIPTokenizer, config: Any) -> None:
    """Refuse an incomplete tokenizer: it would load without an error, and give other tokens."""
    if tokenizer.model_max_length != config.max_position_embeddings:
        raise ValueError("the tokenizer does not truncate prompts to the length of its text encoder")
    if max(tokenizer("a")["input_ids"]) >= config.vocab_size:
        raise ValueError("the tokenizer has tokens that its text encoder does not have")


def load_vae(base: Path, vae: Path | None, dtype: torch.dtype) -> AutoencoderKL | AutoencoderTiny:
    """Load the VAE: that of the base, or another one from its own folder.

    A VAE with `force_upcast` overflows in float16, and is loaded in float32 instead.
    """
    folder = vae or base / "vae"
    with loading_errors("VAE", folder):
        config = AutoencoderKL.load_config(folder, local_files_only=True)
        kind = AutoencoderTiny if config.get("_class_name") == "AutoencoderTiny" else AutoencoderKL
        if config.get("force_upcast", True) and kind is AutoencoderKL and dtype is torch.float16:
            dtype = torch.float32
        return _from_folder(kind, folder, DIFFUSION, dtype, "VAE")


def load_image_encoder(folder: Path, dtype: torch.dtype) -> CLIPVisionModelWithProjection:
    """Load the CLIP vision tower that encodes the aligned face."""
    with loading_errors("image encoder", folder):
        return _from_folder(CLIPVisionModelWithProjection, folder, TRANSFORMER, dtype, "image encoder")


def load_scheduler(recipe: Recipe, base: Path, config: Path | None) -> Any:
    """Create the scheduler from a published configuration and the settings of the recipe."""
    folder = config or base
    with loading_errors("scheduler configuration", folder):
        settings = DDIMScheduler.load_config(folder, subfolder="scheduler", local_files_only=True)
        if "beta_schedule" not in settings:
            # The defaults of the class would be used instead, with other noise levels.
            raise ValueError("it has no beta_schedule")
        return build_scheduler(recipe.model.scheduler, settings)


def load_single_file(
    file: Path, config: Path | None, dtype: torch.dtype, **models: Any
) -> StableDiffusionXLPipeline:
    """Load an SDXL checkpoint in the original single-file layout.

    Args:
        file: the .safetensors file.
        config: a diffusers SDXL folder with the configurations and tokenizers.
        dtype: of the weights.
        models: replace those in the file, by name.
    """
    with loading_errors("checkpoint", file):
        pipe = StableDiffusionXLPipeline.from_single_file(
            str(file), config=str(config), dtype=dtype, local_files_only=True, add_watermarker=False, **models
        )
        # diffusers leaves what the file lacks on the meta device, without a word.
        for part in ("unet", "vae", *TEXT_ENCODERS):
            for name, tensor in getattr(pipe, part).state_dict().items():
                if tensor.is_meta:
                    raise ValueError(f"it lacks {name} of the {part}")
        if dtype is torch.float16 and pipe.vae.config.force_upcast:
            pipe.vae.to(torch.float32)
        return pipe


@dataclass(frozen=True)
class Homes:
    """The device of each part while it is not in use; parts are loaded there."""

    unet: torch.device
    encoders: torch.device
    """Text encoders, image encoder, identity projection."""
    vae: torch.device

    @classmethod
    def of(cls, device: torch.device, level: Level) -> Homes:
        """Return the device for everything except the parts that a level offloads."""
        cpu = torch.device("cpu")
        models = cpu if level.models else device
        return cls(models, cpu if level.encoders else device, models)


def load_parts(
    recipe: Recipe,
    paths: Mapping[str, Path],
    homes: Homes,
    dtype: torch.dtype,
    cache: FusedCache | None = None,
    *,
    fuse: bool = True,
) -> tuple[StableDiffusionXLPipeline, torch.nn.Module, Extras]:
    """Load the complete stack of a recipe, with every LoRA fused and the identity adapter in its UNet.

    Args:
        recipe: what to load.
        paths: path of each of `recipe.references()`.
        homes: the device of each part.
        dtype: of the weights.
        cache: stores fused models for the next start; None fuses at every start.
        fuse: also fuse the LoRA inside the adapter; False keeps it as separate layers, and stores nothing.

    Returns:
        The diffusers pipeline with the models, the identity projection of the adapter, and further models of
        the adapter.
    """
    inputs = fused_inputs(recipe, paths)
    key = None
    # Without a LoRA, the cached file would be a copy of the published ones.
    if fuse and cache is not None and recipe.fuses_loras() and cache.worthwhile(inputs):
        key = fused_key(recipe, inputs, homes.unet.type, str(dtype))
    with _Kept(cache, key, homes.unet) as kept:
        if paths["base"].is_file():
            pipe = _single_file_models(paths, dtype, kept)
        else:
            pipe = _folder_models(recipe, paths, dtype, kept)
        if "image_encoder" in paths.keys() - recipe.photo_roles():
            encoder = load_image_encoder(paths["image_encoder"], dtype)
            pipe.register_modules(image_encoder=encoder.to(homes.encoders).requires_grad_(False))
        # Models are moved before LoRAs are fused, because fusing is much faster on a GPU.
        for name in TEXT_ENCODERS:
            getattr(pipe, name).to(homes.encoders).requires_grad_(False)
        pipe.vae.to(homes.vae).requires_grad_(False)
        models = kept.models()
    if models is None:
        models = _fused(recipe, paths, pipe, homes, dtype, fuse=fuse)
        if cache is not None and key is not None:
            fused.keep(cache, key, recipe, inputs, models)
    else:
        pipe.unet = models.unet
        for name, state in models.text_encoders.items():
            getattr(pipe, name).load_state_dict(state)
    extras = ADAPTERS[recipe.adapter.kind].load_extras(paths, dtype, pipe.unet)
    for model in extras.values():
        model.to(homes.unet)
    return pipe, models.projection.to(homes.encoders, dtype), extras


class _Kept:
    """Fused models of an earlier start, if any; a thread reads them while the other models load."""

    def __init__(self, cache: FusedCache | None, key: str | None, where: torch.device) -> None:
        self._cache, self._key = cache, key
        self._path = cache.find(key) if cache and key else None
        self._pool = ThreadPoolExecutor(1)
        self._reading = self._pool.submit(fused.read, self._path, where) if self._path else None
        self._models: FusedModels | None = None

    def __enter__(self) -> _Kept:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def models(self) -> FusedModels | None:
        """The models; None if they are missing or unreadable, and must be fused again."""
        if self._reading is None or self._models is not None:
            return self._models
        try:
            self._models = fused.build(self._reading.result())
            return self._models
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self._reading = None
            logger.warning("cannot read the fused models in %s; fusing them again: %s", self._path, error)
            if self._cache and self._key:
                self._cache.remove(self._key)
            return None

    @property
    def expected(self) -> bool:
        """Whether there is a readable file."""
        return self._reading is not None


def _folder_models(
    recipe: Recipe, paths: Mapping[str, Path], dtype: torch.dtype, kept: _Kept
) -> StableDiffusionXLPipeline:
    base = paths["base"]
    encoder, encoder_2, tokenizer, tokenizer_2 = load_text_encoders(base, dtype)
    return StableDiffusionXLPipeline(
        vae=load_vae(base, paths.get("vae"), dtype),
        text_encoder=encoder,
        text_encoder_2=encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=None if kept.expected else load_unet(base, paths.get("unet"), dtype),
        scheduler=load_scheduler(recipe, base, paths.get("scheduler")),
        add_watermarker=False,
    )


def _single_file_models(
    paths: Mapping[str, Path], dtype: torch.dtype, kept: _Kept
) -> StableDiffusionXLPipeline:
    models: dict[str, Any] = {}
    fused_models = kept.models()
    if fused_models is not None:
        models["unet"] = fused_models.unet
    elif "unet" in paths:
        models["unet"] = load_unet(paths["config"], paths["unet"], dtype)
    if "vae" in paths:
        models["vae"] = load_vae(paths["base"], paths["vae"], dtype)
    return load_single_file(paths["base"], paths.get("config"), dtype, **models)


def _fused(
    recipe: Recipe,
    paths: Mapping[str, Path],
    pipe: StableDiffusionXLPipeline,
    homes: Homes,
    dtype: torch.dtype,
    *,
    fuse: bool,
) -> FusedModels:
    """Fuse every LoRA into the models of the pipeline, and put the adapter into its UNet."""
    if pipe.unet is None:  # the stored models are unreadable
        pipe.unet = load_unet(paths["base"], paths.get("unet"), dtype)
    # Models are completed before they are moved to MPS: a layer replaced there keeps its old weights.
    pipe.unet.to("cpu" if homes.unet.type == "mps" else homes.unet).requires_grad_(False)
    touched: set[str] = set()
    if "distillation" in paths:
        touched |= fuse_lora(pipe, paths["distillation"], 1.0)
    for index, lora in enumerate(recipe.model.loras):
        touched |= fuse_lora(pipe, paths[f"lora.{index}"], lora.scale)
    load = ADAPTERS[recipe.adapter.kind].load
    projection = load(pipe, paths["adapter"], recipe.adapter.lora_scale, fuse=fuse)
    pipe.unet.to(homes.unet, dtype).requires_grad_(False)  # an unfused LoRA is in float32, on the CPU
    projection = projection.to(homes.encoders, dtype).requires_grad_(False)
    encoders = {name: getattr(pipe, name).state_dict() for name in TEXT_ENCODERS if name in touched}
    return FusedModels(pipe.unet, projection, encoders)


def configured(paths: Mapping[str, Path]) -> Path:
    """Return the folder with the configurations of the base."""
    return paths["base"] if paths["base"].is_dir() else paths["config"]
