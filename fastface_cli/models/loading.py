"""Recipe to loaded models: every part from its files, LoRAs fused, the identity adapter in the UNet.

The loaders are diffusers' and transformers'; what is ours is to refuse what does not fill a model, and to say
in one sentence which file is at fault.
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
"""How the weight files of diffusers and of transformers are called."""


def _variant(folder: Path, stem: str) -> str | None:
    """`fp16` where the folder holds that variant of its weights, else None.

    In a Hub cache that other programs share, a plain file may lie beside it that was never verified.
    """
    return "fp16" if (folder / f"{stem}.fp16.safetensors").exists() else None


def _strict(report: Mapping[str, Any], what: str, allowed: tuple[str, ...] = ()) -> None:
    """Refuse weights that do not fill the model: a loader would otherwise leave random numbers in it."""
    missing = [key for key in report.get("missing_keys", ()) if not key.endswith(allowed)]
    wrong = [key if isinstance(key, str) else key[0] for key in report.get("mismatched_keys", ())]
    if missing or wrong:
        names = sorted(missing) + sorted(wrong)
        named = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        counts = f"{len(missing)} tensors are missing, {len(wrong)} have another shape"
        raise ValueError(f"{what}: {counts} ({named})")


def _from_folder(kind: Any, folder: Path, stem: str, dtype: torch.dtype, what: str) -> Any:
    """Load a model from a folder, and refuse incomplete weights; `stem` selects the library."""
    # Told to ignore mismatched sizes, transformers leaves naming them to _strict instead of writing a page.
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
    """The UNet on the CPU.

    Args:
        base: diffusers SDXL folder, for the UNet itself or for its configuration.
        unet: a folder holding `unet/`, one state-dict file (as SDXL-Lightning's), or None for the base's own.
        dtype: of the weights.
    """
    with loading_errors("UNet", unet or base):
        if unet is not None and unet.is_file():
            return load_unet_file(base, unet, dtype)
        return _from_folder(UNet2DConditionModel, (unet or base) / "unet", DIFFUSION, dtype, "UNet")


def load_unet_file(base: Path, file: Path, dtype: torch.dtype) -> UNet2DConditionModel:
    """A UNet from one state-dict file, configured like the base's."""
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
    """Both text encoders and their tokenizers."""
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
    """Refuse one whose files are not all there: it would load all the same, and make other tokens."""
    if tokenizer.model_max_length != config.max_position_embeddings:
        raise ValueError("the tokenizer does not cut prompts at the length that its encoder reads")
    if max(tokenizer("a")["input_ids"]) >= config.vocab_size:
        raise ValueError("the tokenizer makes tokens that its encoder does not know")


def load_vae(base: Path, vae: Path | None, dtype: torch.dtype) -> AutoencoderKL | AutoencoderTiny:
    """The VAE: of the base, or a folder that holds another one.

    A VAE that says `force_upcast` overflows in float16 and is kept in float32 then.
    """
    folder = vae or base / "vae"
    with loading_errors("VAE", folder):
        config = AutoencoderKL.load_config(folder, local_files_only=True)
        kind = AutoencoderTiny if config.get("_class_name") == "AutoencoderTiny" else AutoencoderKL
        if config.get("force_upcast", True) and kind is AutoencoderKL and dtype is torch.float16:
            dtype = torch.float32
        return _from_folder(kind, folder, DIFFUSION, dtype, "VAE")


def load_image_encoder(folder: Path, dtype: torch.dtype) -> CLIPVisionModelWithProjection:
    """The CLIP vision tower that sees the aligned face."""
    with loading_errors("image encoder", folder):
        return _from_folder(CLIPVisionModelWithProjection, folder, TRANSFORMER, dtype, "image encoder")


def load_scheduler(recipe: Recipe, base: Path, config: Path | None) -> Any:
    """A fresh scheduler, from a published configuration and the recipe's spacing."""
    folder = config or base
    with loading_errors("scheduler configuration", folder):
        settings = DDIMScheduler.load_config(folder, subfolder="scheduler", local_files_only=True)
        if "beta_schedule" not in settings:
            # The class's own defaults would step in, and with them other noise levels.
            raise ValueError("it does not say its beta_schedule")
        return build_scheduler(recipe.model.scheduler, settings)


def load_single_file(
    file: Path, config: Path | None, dtype: torch.dtype, **models: Any
) -> StableDiffusionXLPipeline:
    """Any SDXL checkpoint in the original one-file layout.

    Args:
        file: the .safetensors file.
        config: a diffusers SDXL folder with the configurations and tokenizers.
        dtype: of the weights.
        models: taken in place of those in the file, by name.
    """
    with loading_errors("checkpoint", file):
        pipe = StableDiffusionXLPipeline.from_single_file(
            str(file), config=str(config), dtype=dtype, local_files_only=True, add_watermarker=False, **models
        )
        if dtype is torch.float16 and pipe.vae.config.force_upcast:
            pipe.vae.to(torch.float32)
        return pipe


@dataclass(frozen=True)
class Homes:
    """The device that each part is loaded to and stays on while it is not used."""

    unet: torch.device
    encoders: torch.device
    """Text encoders, image encoder, identity projection."""
    vae: torch.device

    @classmethod
    def of(cls, device: torch.device, level: Level) -> Homes:
        """On the device, but for what visits it only while it is used."""
        away = torch.device("cpu")
        models = away if level.models else device
        return cls(models, away if level.encoders else device, models)


def load_parts(
    recipe: Recipe,
    paths: Mapping[str, Path],
    homes: Homes,
    number: torch.dtype,
    cache: FusedCache | None = None,
    *,
    fuse: bool = True,
) -> tuple[StableDiffusionXLPipeline, torch.nn.Module, Extras]:
    """Load the complete stack of a recipe, with every LoRA fused and the identity adapter in its UNet.

    Args:
        recipe: what to load.
        paths: path of each of `recipe.references()`.
        homes: where to load to.
        number: type of the weights.
        cache: keeps what was fused, and gives it back the next time; None always fuses.
        fuse: also the LoRA inside the adapter; where False it stays beside the weights, and nothing is kept.

    Returns:
        The diffusers pipeline that holds the models, the identity projection of the adapter, and further
        models of the adapter.
    """
    inputs = fused_inputs(recipe, paths)
    key = None
    if fuse and cache is not None and cache.worthwhile(inputs):
        key = fused_key(recipe, inputs, homes.unet.type, str(number))
    with _Kept(cache, key, homes.unet) as kept:
        if paths["base"].is_file():
            pipe = _single_file_models(paths, number, kept)
        else:
            pipe = _folder_models(recipe, paths, number, kept)
        if "image_encoder" in paths.keys() - recipe.photo_roles():
            encoder = load_image_encoder(paths["image_encoder"], number)
            pipe.register_modules(image_encoder=encoder.to(homes.encoders).requires_grad_(False))
        # Everything is moved before it is fused: a GPU adds the LoRA matrices in a moment.
        for name in TEXT_ENCODERS:
            getattr(pipe, name).to(homes.encoders).requires_grad_(False)
        pipe.vae.to(homes.vae).requires_grad_(False)
        models = kept.models()
    if models is None:
        models = _fused(recipe, paths, pipe, homes, number, fuse=fuse)
        if cache is not None and key is not None:
            fused.keep(cache, key, recipe, inputs, models)
    else:
        pipe.unet = models.unet
        for name, state in models.text_encoders.items():
            getattr(pipe, name).load_state_dict(state)
    extras = ADAPTERS[recipe.adapter.kind].load_extras(paths, number, pipe.unet)
    for model in extras.values():
        model.to(homes.unet)
    return pipe, models.projection.to(homes.encoders, number), extras


class _Kept:
    """What was fused before, read in a thread while the other models are built; or nothing."""

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
        """The models; None where they are missing or unreadable: then they are fused again."""
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
        """Whether there is a file to read."""
        return self._reading is not None


def _folder_models(
    recipe: Recipe, paths: Mapping[str, Path], number: torch.dtype, kept: _Kept
) -> StableDiffusionXLPipeline:
    base = paths["base"]
    encoder, encoder_2, tokenizer, tokenizer_2 = load_text_encoders(base, number)
    return StableDiffusionXLPipeline(
        vae=load_vae(base, paths.get("vae"), number),
        text_encoder=encoder,
        text_encoder_2=encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=None if kept.expected else load_unet(base, paths.get("unet"), number),
        scheduler=load_scheduler(recipe, base, paths.get("scheduler")),
        add_watermarker=False,
    )


def _single_file_models(
    paths: Mapping[str, Path], number: torch.dtype, kept: _Kept
) -> StableDiffusionXLPipeline:
    models: dict[str, Any] = {}
    fused_models = kept.models()
    if fused_models is not None:
        models["unet"] = fused_models.unet
    elif "unet" in paths:
        models["unet"] = load_unet(paths["config"], paths["unet"], number)
    if "vae" in paths:
        models["vae"] = load_vae(paths["base"], paths["vae"], number)
    return load_single_file(paths["base"], paths.get("config"), number, **models)


def _fused(
    recipe: Recipe,
    paths: Mapping[str, Path],
    pipe: StableDiffusionXLPipeline,
    homes: Homes,
    number: torch.dtype,
    *,
    fuse: bool,
) -> FusedModels:
    """Every LoRA fused into the pipeline's models, and the adapter put into its UNet."""
    if pipe.unet is None:  # what was kept could not be read
        pipe.unet = load_unet(paths["base"], paths.get("unet"), number)
    # MPS gets complete models: there, a layer that is replaced after the move keeps its old weights.
    workshop = torch.device("cpu") if homes.unet.type == "mps" else homes.unet
    pipe.unet.to(workshop).requires_grad_(False)
    touched: set[str] = set()
    if "distillation" in paths:
        touched |= fuse_lora(pipe, paths["distillation"], 1.0)
    for index, lora in enumerate(recipe.model.loras):
        touched |= fuse_lora(pipe, paths[f"lora.{index}"], lora.scale)
    load = ADAPTERS[recipe.adapter.kind].load
    projection = load(pipe, paths["adapter"], recipe.adapter.lora_scale, fuse=fuse)
    pipe.unet.to(homes.unet, number).requires_grad_(False)  # an unfused LoRA comes in float32, on the CPU
    projection = projection.to(homes.encoders, number).requires_grad_(False)
    encoders = {name: getattr(pipe, name).state_dict() for name in TEXT_ENCODERS if name in touched}
    return FusedModels(pipe.unet, projection, encoders)


def configured(paths: Mapping[str, Path]) -> Path:
    """The folder with the base's configurations."""
    return paths["base"] if paths["base"].is_dir() else paths["config"]
