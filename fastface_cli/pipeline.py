"""Recipe to loaded models; the sampling loop; images out.

Loading is diffusers' and transformers' work; sampling is ours, because a step calls the UNet once over
exactly the branches that decoupled guidance needs.
"""

from __future__ import annotations

import copy
import gc
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)
from transformers.utils import logging as transformers_logging

from . import attention, guidance
from .errors import DeviceError, FastFaceError, ModelUnavailableError, RecipeError, UsageError
from .recipe import Block, Recipe

if TYPE_CHECKING:
    from .identity import Identity

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "lcm": LCMScheduler,
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NO_MEMORY = "out of memory|ALLOC_FAILED|can't allocate memory"
"""How MPS, the CUDA libraries and the CPU's allocator say in a plain RuntimeError that memory lacks."""
BLOCKS: tuple[Block, ...] = ("down", "mid", "up")


def pick_device(wanted: str) -> torch.device:
    """The device to run on.

    Args:
        wanted: `auto` (CUDA, then MPS, then the CPU) or a torch device name.

    Raises:
        DeviceError: no such device here.
    """
    if wanted == "auto":
        wanted = (
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise UsageError(f"'{wanted}' is not a device", "use auto, cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise DeviceError("there is no CUDA device here", "try --device cpu, or --recipe pocket")
        if (device.index or 0) >= torch.cuda.device_count():
            raise DeviceError(
                f"there is no {device}; this machine has {torch.cuda.device_count()} CUDA devices"
            )
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("there is no MPS device here", "try --device cpu, or --recipe pocket")
    elif device.type not in ("cpu", "mps"):
        raise UsageError(f"device '{wanted}' is not supported", "use auto, cpu, cuda, cuda:1 or mps")
    return device


def pick_dtype(wanted: str | None, device: torch.device) -> torch.dtype:
    """float16 on a GPU, float32 on a CPU, unless one is named."""
    if wanted is None:
        return torch.float32 if device.type == "cpu" else torch.float16
    if wanted not in DTYPES:
        raise UsageError(f"dtype '{wanted}' is not supported", f"use one of {', '.join(DTYPES)}")
    return DTYPES[wanted]


# ---------------------------------------------------------------------------------------------- loading


def _variant(folder: Path, stem: str) -> str | None:
    """`fp16` where the folder holds that variant of its weights, else None.

    In a Hub cache that other programs share, a plain file may lie beside it that was never verified.
    """
    return "fp16" if (folder / f"{stem}.fp16.safetensors").exists() else None


@contextmanager
def _loading(what: str, path: Path) -> Iterator[None]:
    """Turn whatever a loader raises over a broken file into one sentence that names it."""
    try:
        yield
    except (ModelUnavailableError, MemoryError):
        raise
    except Exception as error:
        if _is_out_of_memory(error):
            raise
        raise ModelUnavailableError(
            f"cannot load the {what} from {path}: {_reason(error)}",
            "is it whole, and of the right kind? `fastface download --verify` checks what was fetched",
        ) from error


def _reason(error: Exception) -> str:
    """What a loader says, without its advice to programmers."""
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    if isinstance(error, AttributeError | TypeError):
        return "its content has another form"
    lines = [line.strip() for line in str(error).strip().splitlines()]
    said = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    sentence = re.split(r"\.\s", said, maxsplit=1)[0]
    return sentence[:300].rstrip(".") or type(error).__name__


def _strict(report: Mapping[str, Any], what: str, allowed: tuple[str, ...] = ()) -> None:
    """Refuse weights that do not fill the model: a loader would otherwise leave random numbers in it."""
    missing = [key for key in report.get("missing_keys", ()) if not key.endswith(allowed)]
    wrong = [key if isinstance(key, str) else key[0] for key in report.get("mismatched_keys", ())]
    if missing or wrong:
        found = sorted(missing) + sorted(wrong)
        named = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        counts = f"{len(missing)} tensors are missing, {len(wrong)} have another shape"
        raise ValueError(f"{what}: {counts} ({named})")


def load_unet(base: Path, unet: Path | None, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet on the CPU.

    Args:
        base: diffusers SDXL folder, for the UNet itself or for its configuration.
        unet: a folder holding `unet/`, one state-dict file (as SDXL-Lightning's), or None for the base's own.
        dtype: of the weights.
    """
    with _loading("UNet", unet or base):
        if unet is not None and unet.is_file():
            return load_unet_file(base, unet, dtype)
        folder = unet or base
        model, report = UNet2DConditionModel.from_pretrained(
            folder,
            subfolder="unet",
            variant=_variant(folder / "unet", "diffusion_pytorch_model"),
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        _strict(report, "UNet")
        return model.eval()


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
    with _loading("text encoders", base):
        models = []
        for subfolder, kind in (
            ("text_encoder", CLIPTextModel),
            ("text_encoder_2", CLIPTextModelWithProjection),
        ):
            model, report = kind.from_pretrained(
                base,
                subfolder=subfolder,
                variant=_variant(base / subfolder, "model"),
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # _strict names them
            )
            _strict(report, subfolder, ("position_ids",))
            models.append(model.eval())
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
    with _loading("VAE", folder):
        config = AutoencoderKL.load_config(folder, local_files_only=True)
        kind = AutoencoderTiny if config.get("_class_name") == "AutoencoderTiny" else AutoencoderKL
        if config.get("force_upcast", True) and kind is AutoencoderKL and dtype is torch.float16:
            dtype = torch.float32
        model, report = kind.from_pretrained(
            folder,
            variant=_variant(folder, "diffusion_pytorch_model"),
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        _strict(report, "VAE")
        return model.eval()


def load_image_encoder(folder: Path, dtype: torch.dtype) -> CLIPVisionModelWithProjection:
    """The CLIP vision tower that sees the aligned face."""
    with _loading("image encoder", folder):
        model, report = CLIPVisionModelWithProjection.from_pretrained(
            folder,
            variant=_variant(folder, "model"),
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # _strict names them
        )
        _strict(report, "image encoder", ("position_ids",))
        return model.eval()


def load_scheduler(recipe: Recipe, base: Path, config: Path | None) -> Any:
    """A fresh scheduler, from a published configuration and the recipe's spacing."""
    folder = config or base
    with _loading("scheduler configuration", folder):
        settings = DDIMScheduler.load_config(folder, subfolder="scheduler", local_files_only=True)
        if "beta_schedule" not in settings:
            # The class's own defaults would step in, and with them other noise levels.
            raise ValueError("it does not say its beta_schedule")
        spacing = recipe.model.scheduler.spacing
        changes = {} if spacing is None else {"timestep_spacing": spacing}
        return SCHEDULERS[recipe.model.scheduler.kind].from_config(settings, **changes)


def fuse_lora(pipe: StableDiffusionXLPipeline, file: Path, scale: float) -> None:
    """Load a LoRA file and melt it into the UNet (and text encoders, if it has parts for them)."""
    with _loading("LoRA", file):
        pipe.load_lora_weights(
            file.parent, weight_name=file.name, adapter_name="fastface", local_files_only=True
        )
        _fuse(pipe, "fastface", scale)


def _fuse(pipe: StableDiffusionXLPipeline, adapter: str, scale: float) -> None:
    touched = [
        name
        for name in ("unet", "text_encoder", "text_encoder_2")
        if adapter in getattr(getattr(pipe, name), "peft_config", {})
    ]
    if not touched:
        raise ValueError("no tensor of it fits this model")
    pipe.fuse_lora(components=touched, lora_scale=scale, adapter_names=[adapter])
    pipe.unload_lora_weights()


def load_adapter(pipe: StableDiffusionXLPipeline, file: Path, lora_scale: float) -> torch.nn.Module:
    """Put the FaceID-PlusV2 adapter into the pipeline's UNet, its LoRA fused.

    The projection is taken off the UNet: it runs once an image and not once a step.

    Returns:
        The projection from (embedding, image features) to identity tokens.
    """
    with _loading("identity adapter", file):
        pipe.load_ip_adapter(
            str(file.parent),
            subfolder="",
            weight_name=file.name,
            image_encoder_folder=None,
            local_files_only=True,
        )
        unet = pipe.unet
        if "faceid_0" in getattr(unet, "peft_config", {}):
            if lora_scale:
                _fuse(pipe, "faceid_0", lora_scale)
            else:
                pipe.unload_lora_weights()
        projection = unet.encoder_hid_proj.image_projection_layers[0]
        if not hasattr(projection, "shortcut"):
            raise ValueError("it is not a FaceID-PlusV2 file")
        unet.encoder_hid_proj = None
        # With the shortcut the projection is PlusV2; without, it would be Plus.
        projection.shortcut = True
        module: torch.nn.Module = projection.eval()
        return module


# ------------------------------------------------------------------------------------------------ running


@dataclass(frozen=True)
class Request:
    """One picture to make."""

    prompt: str
    seed: int
    identity: Identity
    negative_prompt: str | None = None
    adapter_scale: float | None = None
    """None: the recipe's."""


@dataclass
class Picture:
    """One picture made."""

    image: Image.Image
    request: Request
    adapter_scale: float
    unet_samples: int
    """UNet samples that this picture took, over all steps."""
    seconds: float
    """Its share of the wall time of its batch."""
    initial_latents: Tensor
    """[4, h, w] float32, as scaled for the scheduler."""
    latents: Tensor
    """[steps, 4, h, w] float32, after each step."""
    timesteps: Tensor
    """[steps]"""


@dataclass
class Trace:
    """What the loop of a batch left behind."""

    initial_latents: Tensor
    """[images, 4, h, w]"""
    latents: list[Tensor] = field(default_factory=list)
    """After each step, [images, 4, h, w]."""


class Pipeline:
    """A loaded stack. One run never leaves a trace in the next.

    Args:
        recipe: what to run.
        parts: the loaded diffusers pipeline with the adapter in its UNet.
        projection: identity projection of the adapter.
        scheduler: a scheduler of the right class and configuration; copied for every run.
        log: takes one line of notice (a prompt cut short).
    """

    def __init__(
        self,
        recipe: Recipe,
        parts: StableDiffusionXLPipeline,
        projection: torch.nn.Module,
        scheduler: Any,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.recipe = recipe
        self.parts = parts
        self.unet, self.vae = parts.unet, parts.vae
        self.layers = attention.identity_layers(parts.unet)
        self.projection = projection
        self.scheduler = scheduler
        self.log = log
        size = parts.image_encoder.config.image_size
        # The PIL one by name: with torchvision installed the plain class would resize differently.
        self.processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size)
        self.device = self.unet.device
        self.dtype = self.unet.dtype
        self.latent_scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self._warned: set[str] = set()

    @classmethod
    def load(
        cls,
        recipe: Recipe,
        paths: Mapping[str, Path],
        *,
        device: str = "auto",
        dtype: str | None = None,
        log: Callable[[str], None] = lambda _: None,
    ) -> Pipeline:
        """Build the stack of a recipe.

        Args:
            recipe: what to run.
            paths: where each of `recipe.references()` lies.
            device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
            dtype: `float32`, `float16`, `bfloat16`; None chooses by device.
            log: takes one line of notice.

        Raises:
            ModelUnavailableError: a file is missing, broken or of another shape.
            DeviceError: no such device, or out of memory.
        """
        where = pick_device(device)
        number = pick_dtype(dtype, where)
        with _quiet_libraries(), _memory_errors(where):
            base = paths["base"]
            if base.is_file():
                pipe = load_single_file(base, paths.get("config"), number)
                if "unet" in paths:
                    pipe.unet = load_unet(paths["config"], paths["unet"], number)
                if "vae" in paths:
                    pipe.vae = load_vae(base, paths["vae"], number)
            else:
                encoder, encoder_2, tokenizer, tokenizer_2 = load_text_encoders(base, number)
                pipe = StableDiffusionXLPipeline(
                    vae=load_vae(base, paths.get("vae"), number),
                    text_encoder=encoder,
                    text_encoder_2=encoder_2,
                    tokenizer=tokenizer,
                    tokenizer_2=tokenizer_2,
                    unet=load_unet(base, paths.get("unet"), number),
                    scheduler=load_scheduler(recipe, base, paths.get("scheduler")),
                    add_watermarker=False,
                )
            pipe.register_modules(image_encoder=load_image_encoder(paths["image_encoder"], number))
            # Everything is moved before it is fused: a GPU adds the LoRA matrices in a moment.
            for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.image_encoder):
                part.to(where).requires_grad_(False)
            if "distillation" in paths:
                fuse_lora(pipe, paths["distillation"], 1.0)
            for index, lora in enumerate(recipe.model.loras):
                fuse_lora(pipe, paths[f"lora.{index}"], lora.scale)
            projection = load_adapter(pipe, paths["adapter"], recipe.adapter.lora_scale).to(where, number)
            scheduler = load_scheduler(recipe, _configured(paths), paths.get("scheduler"))
        return cls(recipe, pipe, projection, scheduler, log)

    def with_recipe(self, recipe: Recipe, paths: Mapping[str, Path]) -> Pipeline:
        """The same loaded models under another recipe.

        Args:
            recipe: differs in sampling, guidance, attention, adapter scale, or the scheduler.
            paths: as of `load`, for the scheduler's configuration.

        Raises:
            RecipeError: it asks for other models, or for another weight of a LoRA that is fused already.
        """
        for name, mine, other in (
            ("model", _loaded_parts(self.recipe), _loaded_parts(recipe)),
            ("adapter.lora_scale", self.recipe.adapter.lora_scale, recipe.adapter.lora_scale),
        ):
            if mine != other:
                raise RecipeError(
                    f"{name} differs from that of the models that are loaded", "run it by itself"
                )
        with _quiet_libraries():
            scheduler = load_scheduler(recipe, _configured(paths), paths.get("scheduler"))
        return Pipeline(recipe, self.parts, self.projection, scheduler, self.log)

    # -------------------------------------------------------------------------------------- conditions

    def encode_prompt(self, text: str | None) -> tuple[Tensor, Tensor]:
        """Text conditioning: [tokens, width] and pooled [width]; None gives zeros (no negative prompt)."""
        if text is None:
            first, second = self.parts.text_encoder.config, self.parts.text_encoder_2.config
            width = first.hidden_size + second.hidden_size
            zeros = torch.zeros(
                self.parts.tokenizer.model_max_length, width, device=self.device, dtype=self.dtype
            )
            return zeros, zeros.new_zeros(second.projection_dim)
        with _quiet_libraries():  # they would say at length what we say in a line
            self._warn_if_cut(text)
            embeds, _, pooled, _ = self.parts.encode_prompt(
                text, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        return embeds[0], pooled[0]

    def _warn_if_cut(self, text: str) -> None:
        tokenizer = self.parts.tokenizer
        ids = tokenizer(text, verbose=False)["input_ids"]
        limit = tokenizer.model_max_length
        if len(ids) > limit and text not in self._warned:
            self._warned.add(text)
            lost = tokenizer.decode(ids[limit - 1 : -1], skip_special_tokens=True).strip()
            self.log(f"the text encoders read {limit - 2} tokens; this part of the prompt is ignored: {lost}")

    def encode_identity(self, identity: Identity) -> tuple[Tensor, Tensor]:
        """Identity tokens [4, width] of nobody, and of the person."""
        crop = identity.crop()
        if self.recipe.adapter.crop_order == "rgb":
            crop = np.ascontiguousarray(crop[..., ::-1])
        # The published pipeline hands the crop over in BGR order as if it were RGB.
        pixels = self.processor(Image.fromarray(crop), return_tensors="pt").pixel_values
        pixels = pixels.to(self.device, self.dtype)
        images = torch.cat([torch.zeros_like(pixels), pixels])
        features = self.parts.image_encoder(images, output_hidden_states=True).hidden_states[-2]
        embedding = torch.from_numpy(identity.mean()).to(self.device, self.dtype)
        embeddings = torch.stack([torch.zeros_like(embedding), embedding])
        projection: Any = self.projection
        try:
            projection.clip_embeds = features[:, None]
            tokens = projection(embeddings[:, None])
        finally:
            projection.clip_embeds = None
        return tokens[0], tokens[1]

    # ---------------------------------------------------------------------------------------- sampling

    def plan(self, *, prune: bool = True) -> list[guidance.Step]:
        """What every step of this recipe does."""
        return guidance.plan(self.recipe.guidance, self.recipe.attention, self._timesteps(), prune=prune)

    def _timesteps(self) -> list[float]:
        scheduler = self._fresh_scheduler()
        return [float(t) for t in scheduler.timesteps]

    def _fresh_scheduler(self) -> Any:
        scheduler = copy.deepcopy(self.scheduler)
        steps, extra = self.recipe.sampling.steps, {}
        if isinstance(scheduler, LCMScheduler):
            # It picks its steps among those that it was distilled on, and refuses to make more of them.
            extra = {"original_inference_steps": max(steps, scheduler.config.original_inference_steps)}
        # On the CPU: schedulers read single timesteps, and each of them would wait for the device.
        scheduler.set_timesteps(steps, **extra)
        return scheduler

    def generate(
        self,
        requests: Sequence[Request],
        *,
        batch_size: int = 1,
        prune: bool = True,
        on_step: Callable[[int], None] = lambda _: None,
    ) -> Iterator[Picture]:
        """Make pictures, in order.

        Every picture has its own CPU generator, so that it comes out the same alone or in a batch.

        Args:
            requests: what to make.
            batch_size: how many pictures share a UNet call.
            prune: leave out branches that cannot change the result.
            on_step: called with the number of pictures that have just finished a step.

        Raises:
            DeviceError: out of memory.
        """
        for start in range(0, len(requests), batch_size):
            group = requests[start : start + batch_size]
            began = time.perf_counter()
            with torch.inference_mode(), _memory_errors(self.device):
                steps = self.plan(prune=prune)
                trace, timesteps = self.sample(group, steps, on_step=on_step)
                # Pictures on the CPU end the wait for the device, which the time below must contain.
                images = [to_pil(self.decode(latents)) for latents in trace.latents[-1]]
            seconds = (time.perf_counter() - began) / len(group)
            for index, (request, image) in enumerate(zip(group, images, strict=True)):
                yield Picture(
                    image=image,
                    request=request,
                    adapter_scale=self._scale(request),
                    unet_samples=sum(len(step.branches) for step in steps),
                    seconds=seconds,
                    initial_latents=trace.initial_latents[index].cpu(),
                    latents=torch.stack([latents[index] for latents in trace.latents]).cpu(),
                    timesteps=timesteps.cpu(),
                )

    def _scale(self, request: Request) -> float:
        return self.recipe.adapter.scale if request.adapter_scale is None else request.adapter_scale

    def sample(
        self,
        requests: Sequence[Request],
        steps: Sequence[guidance.Step],
        *,
        on_step: Callable[[int], None] = lambda _: None,
    ) -> tuple[Trace, Tensor]:
        """The sampling loop over one batch: the latents of every step, and the timesteps.

        Algorithm: FastFace (arXiv 2505.21144), section 3, around any SDXL scheduler.
        """
        sampling, images = self.recipe.sampling, len(requests)
        scheduler = self._fresh_scheduler()
        generators = [torch.Generator("cpu").manual_seed(request.seed) for request in requests]
        # Drawn in float32 whatever the dtype of the models, so that a seed means one noise.
        shape = (1, 4, sampling.height // self.latent_scale, sampling.width // self.latent_scale)
        noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
        latents = noise.to(self.device) * scheduler.init_noise_sigma
        conditions, pooled = self._conditions(requests)
        size = [sampling.height, sampling.width, 0, 0, sampling.height, sampling.width]
        time_ids = torch.tensor([size], device=self.device, dtype=self.dtype)
        extra = {"generator": generators} if _is_stochastic(scheduler) else {}
        branches = guidance.BRANCHES[self.recipe.guidance.order]
        trace = Trace(latents.clone())
        with attention.installed(self.layers, conditions):
            for step, t in zip(steps, scheduler.timesteps, strict=True):
                chosen = [branches[index] for index in step.branches]
                conditions.select(chosen, self._chains(step.index, len(steps)))
                rows = len(chosen) * images
                sample = scheduler.scale_model_input(latents, t).to(self.dtype).repeat(len(chosen), 1, 1, 1)
                predicted: Tensor = self.unet(
                    sample,
                    t,
                    encoder_hidden_states=conditions.text[conditions.text_rows],
                    added_cond_kwargs={
                        "text_embeds": pooled[conditions.text_rows],
                        "time_ids": time_ids.expand(rows, -1),
                    },
                    return_dict=False,
                )[0]
                predicted = predicted.reshape(len(chosen), images, *predicted.shape[1:])
                guided = guidance.combine(predicted, step, self.recipe.guidance)
                latents = scheduler.step(guided, t, latents, **extra, return_dict=False)[0]
                trace.latents.append(latents)
                on_step(images)
        return trace, scheduler.timesteps

    def _chains(self, step: int, steps: int) -> dict[Block, attention.Chain | None]:
        return {block: attention.resolve(self.recipe.attention, block, step, steps) for block in BLOCKS}

    def _conditions(self, requests: Sequence[Request]) -> tuple[attention.Conditions, Tensor]:
        """Conditions of a batch; pooled text embeddings [2 x images, width] in the same order."""
        texts = {text: self.encode_prompt(text) for r in requests for text in (r.prompt, r.negative_prompt)}
        people = {id(r.identity): r.identity for r in requests}
        tokens = {key: self.encode_identity(identity) for key, identity in people.items()}
        negative = [texts[r.negative_prompt] for r in requests]
        positive = [texts[r.prompt] for r in requests]
        found = [tokens[id(r.identity)] for r in requests]
        conditions = attention.Conditions(
            text=torch.stack([embeds for embeds, _ in negative + positive]),
            identity=torch.stack([nobody for nobody, _ in found] + [person for _, person in found]),
            scale=torch.tensor([self._scale(r) for r in requests], device=self.device),
            images=len(requests),
        )
        return conditions, torch.stack([pooled for _, pooled in negative + positive])

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [4, h, w] to a picture [3, H, W] float32 in [0, 1]."""
        config = self.vae.config
        scaled = latents[None].to(self.vae.dtype) / config.scaling_factor
        decoded: Tensor = self.vae.decode(scaled, return_dict=False)[0][0]
        return (decoded.float() / 2 + 0.5).clamp(0, 1)


def _configured(paths: Mapping[str, Path]) -> Path:
    """The folder with the base's configurations."""
    return paths["base"] if paths["base"].is_dir() else paths["config"]


def _loaded_parts(recipe: Recipe) -> tuple[Any, ...]:
    """Everything of a recipe that decides which weights are in memory."""
    model, steps = recipe.model, recipe.sampling.steps
    parts = (model.base, model.unet_for(steps), model.distillation_for(steps), model.vae, model.adapter)
    return (*parts, model.image_encoder, tuple((lora.file, lora.scale) for lora in model.loras))


def load_single_file(file: Path, config: Path | None, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    """Any SDXL checkpoint in the original one-file layout.

    Args:
        file: the .safetensors file.
        config: a diffusers SDXL folder with the configurations and tokenizers.
        dtype: of the weights.
    """
    with _loading("checkpoint", file):
        pipe = StableDiffusionXLPipeline.from_single_file(
            str(file), config=str(config), dtype=dtype, local_files_only=True, add_watermarker=False
        )
        if dtype is torch.float16 and pipe.vae.config.force_upcast:
            pipe.vae.to(torch.float32)
        return pipe


def to_pil(image: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] to an 8-bit RGB picture.

    Raises:
        FastFaceError: the picture holds numbers that are not finite.
    """
    if not image.isfinite().all():
        raise FastFaceError(
            "the picture holds numbers that are not finite", "try --dtype float32 or bfloat16"
        )
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def _is_stochastic(scheduler: Any) -> bool:
    """Whether a scheduler's step draws noise from a generator."""
    return isinstance(scheduler, EulerAncestralDiscreteScheduler | LCMScheduler)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory is what lacks."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and re.search(NO_MEMORY, str(error)) is not None
    )


@contextmanager
def _memory_errors(device: torch.device) -> Iterator[None]:
    """Out of memory becomes one sentence and exit code 4."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        raise DeviceError(
            f"out of memory on {device}", "try a smaller --size, --batch-size 1 or --dtype float16"
        ) from error


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Loaders warn about what we do on purpose (no image encoder folder), and repeat what they raise."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    bars = transformers_logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
