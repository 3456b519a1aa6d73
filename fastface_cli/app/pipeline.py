"""A loaded stack: requests in, images out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

from ..adapters.base import IdentityAdapter
from ..adapters.faceid_plusv2 import FaceIDPlusV2
from ..errors import FastFaceError, RecipeError, UsageError
from ..models.acceleration import DEFAULT, Acceleration, arrange, check
from ..models.compilation import compiled
from ..models.device import memory_errors, pick_device, pick_dtype
from ..models.loading import (
    Homes,
    configured,
    load_parts,
    load_scheduler,
)
from ..models.offload import OFF, Level, in_blocks, visiting
from ..models.schedulers import is_stochastic, with_steps
from ..quiet import quiet_libraries
from ..recipe.schema import Block, Recipe
from ..sampling import attention, guidance, processor
from ..sampling.denoiser import GuidedDenoiser, denoise
from ..sampling.loop import Denoiser, Trace, sample

if TYPE_CHECKING:
    from ..identity.identity import Identity
    from ..store.fused_cache import FusedCache

BLOCKS: tuple[Block, ...] = ("down", "mid", "up")

StageTimer = Callable[[str], AbstractContextManager[None]]
"""Entered around every `text`, `identity`, `keys`, `step` and `vae` stage; benchmarks time them with it."""


@dataclass(frozen=True)
class Request:
    """One image to make."""

    prompt: str
    seed: int
    identity: Identity
    negative_prompt: str | None = None
    adapter_scale: float | None = None
    """None: the recipe's."""


@dataclass
class GeneratedImage:
    """One image made."""

    image: Image.Image
    request: Request
    adapter_scale: float
    unet_samples: int
    """UNet samples that this image took, over all steps."""
    seconds: float
    """Its share of the wall time of its batch."""
    initial_latents: Tensor
    """[4, h, w] float32, as scaled for the scheduler."""
    latents: Tensor
    """[steps, 4, h, w] float32, after each step."""
    timesteps: Tensor
    """[steps]"""
    lossy: Mapping[str, Any] = field(default_factory=dict)
    """Items of speed that cost precision, as in `Acceleration.lossy`."""


class Pipeline:
    """A loaded stack. One run never leaves a trace in the next.

    Args:
        recipe: what to run.
        parts: the loaded diffusers pipeline with the adapter in its UNet.
        projection: identity projection of the adapter.
        scheduler: a scheduler of the right class and configuration; copied for every run.
        log: takes one line of notice (a prompt cut short).
        faster: what is done for speed.
        level: what of the stack is on the device only while it is used.
        device: to run on; None is where the UNet is.

    Raises:
        UsageError: what is done for speed and the level exclude each other.
    """

    def __init__(
        self,
        recipe: Recipe,
        parts: StableDiffusionXLPipeline,
        projection: torch.nn.Module,
        scheduler: Any,
        log: Callable[[str], None] = lambda _: None,
        faster: Acceleration = DEFAULT,
        level: Level = OFF,
        device: torch.device | None = None,
    ) -> None:
        check_level(level, faster)
        self.recipe = recipe
        self.level = level
        self.faster = faster
        self.parts = parts
        self.unet, self.vae = parts.unet, parts.vae
        self.projection = projection
        self.scheduler = scheduler
        self.log = log
        self.device = device or self.unet.device
        self.dtype = self.unet.dtype
        faceid = FaceIDPlusV2(parts.image_encoder, projection)
        self.processor = faceid.processor
        self.use(faceid)
        self.latent_scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self._denoise: Callable[..., Tensor] = denoise
        self._decode: Callable[..., Tensor] = vae_decode
        if faster.compile:
            graphs = faster.cuda_graphs and self.device.type == "cuda"
            self._denoise = compiled(denoise, cuda_graphs=graphs)
            self._decode = compiled(vae_decode, cuda_graphs=graphs)
        self.watch: StageTimer = lambda _: nullcontext()
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
        fused: FusedCache | None = None,
        acceleration: Acceleration = DEFAULT,
        level: Level = OFF,
    ) -> Pipeline:
        """Build the stack of a recipe.

        Args:
            recipe: what to run.
            paths: path of each of `recipe.references()`.
            device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
            dtype: `float32`, `float16`, `bfloat16`; None chooses by device.
            log: takes one line of notice.
            fused: keeps the fused models for the next time; None keeps nothing.
            acceleration: what is done for speed.
            level: what of the stack is on the device only while it is used.

        Raises:
            ModelUnavailableError: a file is missing, broken or of another shape.
            DeviceError: no such device, it cannot do what the acceleration asks for, or out of memory.
            UsageError: the acceleration needs another dtype or a package, or excludes the level.
        """
        where = pick_device(device)
        number = pick_dtype(dtype, where)
        check(acceleration, where, number)
        check_level(level, acceleration)
        with quiet_libraries(), memory_errors(where, level):
            pipe, projection = load_parts(
                recipe, paths, Homes.of(where, level), number, fused, fuse=acceleration.fuse_lora
            )
            arrange(pipe.unet, pipe.vae, acceleration)
            scheduler = load_scheduler(recipe, configured(paths), paths.get("scheduler"))
        return cls(recipe, pipe, projection, scheduler, log, acceleration, level, where)

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
                    f"{name} differs from that of the models that are loaded", "run it in a separate session"
                )
        with quiet_libraries():
            scheduler = load_scheduler(recipe, configured(paths), paths.get("scheduler"))
        pipeline = Pipeline(
            recipe,
            self.parts,
            self.projection,
            scheduler,
            self.log,
            self.faster,
            self.level,
            self.device,
        )
        pipeline.use(self.adapter)
        return pipeline

    def use(self, adapter: IdentityAdapter) -> None:
        """Condition on identities through `adapter`, whose attention weights are loaded in the UNet."""
        self.adapter = adapter.configured(self.recipe.adapter)
        self.layers, self.processors = self.adapter.attention(self.unet)
        # Weights that only `project` needs are not moved with the UNet.
        self._projections = {
            part
            for (_, layer), attn_processor in zip(self.layers, self.processors, strict=True)
            for module in processor.projections(layer, attn_processor)
            for part in module.modules()
            if self.level.projections
        }

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
        encoders = (self.parts.text_encoder, self.parts.text_encoder_2)
        with quiet_libraries(), self.on_device(*encoders, offloaded=self.level.encoders):
            self._warn_if_cut(text)  # the libraries would say at length what we say in a line
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
        """Identity tokens [tokens, width] of no identity, and of the person."""
        on_device = partial(self.on_device, offloaded=self.level.encoders)
        return self.adapter.tokens(identity, on_device)

    # ---------------------------------------------------------------------------------------- sampling

    def plan(self, *, prune: bool | None = None) -> list[guidance.Step]:
        """What every step of this recipe does; `prune` as of `generate`."""
        prune = self.faster.prune if prune is None else prune
        return guidance.plan(self.recipe.guidance, self.recipe.attention, self._timesteps, prune=prune)

    @cached_property
    def _timesteps(self) -> list[float]:
        scheduler = with_steps(self.scheduler, self.recipe.sampling.steps)
        return [float(t) for t in scheduler.timesteps]

    def generate(
        self,
        requests: Sequence[Request],
        *,
        batch_size: int = 1,
        prune: bool | None = None,
        on_step: Callable[[int], None] = lambda _: None,
    ) -> Iterator[GeneratedImage]:
        """Make images, in order.

        Every image has its own CPU generator, so that it comes out the same alone or in a batch.

        Args:
            requests: what to make.
            batch_size: how many images share a UNet call.
            prune: leave out branches that cannot change the result; None asks the acceleration.
            on_step: called with the number of images that have just finished a step.

        Raises:
            DeviceError: out of memory.
        """
        for start in range(0, len(requests), batch_size):
            group = requests[start : start + batch_size]
            began = time.perf_counter()
            with torch.inference_mode(), memory_errors(self.device, self.level):
                steps = self.plan(prune=prune)
                trace, timesteps = self.sample(group, steps, on_step=on_step)
                # Images on the CPU end the wait for the device, which the time below must contain.
                with self.watch("vae"), self.on_device(self.vae, offloaded=self.level.models):
                    images = [to_pil(self.decode(latents)) for latents in trace.latents[-1]]
            seconds = (time.perf_counter() - began) / len(group)
            for index, (request, image) in enumerate(zip(group, images, strict=True)):
                yield GeneratedImage(
                    image=image,
                    request=request,
                    adapter_scale=self._scale(request),
                    unet_samples=sum(len(step.branches) for step in steps),
                    seconds=seconds,
                    initial_latents=trace.initial_latents[index].cpu(),
                    latents=torch.stack([latents[index] for latents in trace.latents]).cpu(),
                    timesteps=timesteps.cpu(),
                    lossy=self.faster.lossy(),
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
        """Sample one batch: the latents of every step, and the timesteps."""
        sampling = self.recipe.sampling
        scheduler = with_steps(self.scheduler, sampling.steps)
        generators = [torch.Generator("cpu").manual_seed(request.seed) for request in requests]
        # Drawn in float32 whatever the dtype of the models, so that a seed always gives the same noise.
        shape = (1, 4, sampling.height // self.latent_scale, sampling.width // self.latent_scale)
        noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
        chains = [self._chains(step.index, len(steps)) for step in steps]
        denoiser = GuidedDenoiser(
            self.unet,
            self._conditions(requests),
            self.recipe.guidance,
            self.recipe.attention,
            # For the UNet, in one transfer; the scheduler reads its own on the CPU.
            times=scheduler.timesteps.to(self.device, torch.float32),
            chains=attention.as_tensors(chains, self.device) if self.faster.compile else chains,
            call=self._denoise,
            one_branch=self.level.one_branch,
            tensor_numbers=self.faster.compile,
        )
        with processor.installed(self.layers, self.processors), self._unet_on_device():
            timed = self._timed(denoiser)
            own_noise = generators if is_stochastic(scheduler) else None
            trace = sample(timed, scheduler, noise.to(self.device), steps, own_noise, on_step)
        return trace, scheduler.timesteps

    def _timed(self, denoiser: Denoiser) -> Denoiser:
        def call(latents: Tensor, step: guidance.Step) -> Tensor:
            with self.watch("step"):
                return denoiser(latents, step)

        return call

    def on_device(self, *modules: torch.nn.Module, offloaded: bool) -> AbstractContextManager[None]:
        """Move modules to the device for the time of the context, where they are `offloaded`."""
        # Checked first because traversing a large module is slower than a small step.
        return visiting(self.device, *modules) if offloaded else nullcontext()

    def _unet_on_device(self) -> AbstractContextManager[None]:
        """Move the UNet, or each of its blocks in turn, to the device for the time of the context."""
        if self.level.blocks:
            return in_blocks(self.device, self.unet, without=self._projections)
        return (
            visiting(self.device, self.unet, without=self._projections)
            if self.level.models
            else nullcontext()
        )

    def _chains(self, step: int, steps: int) -> attention.Chains:
        return {block: attention.resolve(self.recipe.attention, block, step, steps) for block in BLOCKS}

    def _conditions(self, requests: Sequence[Request]) -> processor.Conditions:
        """Conditions of a batch."""
        prompts = dict.fromkeys(text for r in requests for text in (r.prompt, r.negative_prompt))
        identities = {id(r.identity): r.identity for r in requests}
        with self.watch("text"):
            texts = {text: self.encode_prompt(text) for text in prompts}
        with self.watch("identity"):
            encoded = {key: self.encode_identity(identity) for key, identity in identities.items()}
        embeddings = [texts[r.negative_prompt] for r in requests] + [texts[r.prompt] for r in requests]
        tokens = [encoded[id(r.identity)] for r in requests]
        text = torch.stack([embedding for embedding, _ in embeddings])
        identity = torch.stack([absent for absent, _ in tokens] + [person for _, person in tokens])
        projected: processor.Projected = ()
        if self.faster.cache_kv:
            with self.watch("keys"):
                projected = self.project(text, identity)
        scales = [self._scale(r) for r in requests]
        width, height = self.recipe.sampling.width, self.recipe.sampling.height
        sizes = [height, width, 0, 0, height, width]
        return processor.Conditions(
            text=text,
            pooled=torch.stack([pooled for _, pooled in embeddings]),
            time_ids=torch.tensor([sizes], device=self.device, dtype=self.dtype),
            identity=identity,
            scale=torch.tensor(scales, device=self.device),
            images=len(requests),
            # A compiled step takes any scale; without identity attention it would be another graph.
            has_identity=any(scales) or self.faster.compile,
            projected=projected,
            extra=self.adapter.extra_conditioning([r.identity for r in requests]),
        )

    def warm_up(self, *, batch_size: int = 1) -> float:
        """Make images of nobody until nothing is compiled or recorded any more; how many seconds it took.

        Args:
            batch_size: how many images share a UNet call.
        """
        from ..identity.identity import Identity

        rng = np.random.default_rng(0)
        embedding = rng.standard_normal((1, 512)).astype(np.float32)
        nobody = Identity(
            id_embedding=embedding / np.linalg.norm(embedding),
            face_crop_bgr=rng.integers(0, 256, (1, 224, 224, 3), dtype=np.uint8),
            weight=np.ones(1, np.float32),
        )
        began = time.perf_counter()
        # A CUDA graph is compiled at its first call, recorded at its second, and replayed from its third on.
        for _ in range(3 if self.faster.compile and self.faster.cuda_graphs else 1):
            for _ in self.generate([Request("a person", 0, nobody)] * batch_size, batch_size=batch_size):
                pass
        return time.perf_counter() - began

    def project(self, text: Tensor, identity: Tensor) -> processor.Projected:
        """Keys and values of every layer, from [rows, tokens, width] each."""
        on_device = partial(self.on_device, offloaded=self.level.projections)
        return processor.project(self.layers, self.processors, text, identity, on_device)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [4, h, w] to an image [3, H, W] float32 in [0, 1]."""
        config = self.vae.config
        scaled = latents[None].to(self.vae.dtype) / config.scaling_factor
        return self._decode(self.vae, scaled)


def vae_decode(vae: Any, scaled: Tensor) -> Tensor:
    """What is compiled of the VAE: scaled latents [1, 4, h, w] to an image [3, H, W] float32 in [0, 1]."""
    decoded: Tensor = vae.decode(scaled, return_dict=False)[0][0]
    return (decoded.float() / 2 + 0.5).clamp(0, 1)


def check_level(level: Level, faster: Acceleration) -> None:
    """Refuse what excludes a level of saving memory.

    Raises:
        UsageError: it does.
    """
    if level.moves_unet and faster.compile:
        raise UsageError(
            f"--low-memory {level.name} moves the UNet, and what is compiled must stay where it is",
            "leave out --compile, or take --low-memory 12",
        )
    if level.projections and not faster.cache_kv:
        raise UsageError(
            f"--low-memory {level.name} projects keys and values once an image", "leave out cache_kv=off"
        )
    if level.moves_unet and not faster.fuse_lora:
        raise UsageError(f"--low-memory {level.name} moves a fused UNet", "leave out fuse_lora=off")


def _loaded_parts(recipe: Recipe) -> tuple[Any, ...]:
    """Everything of a recipe that decides which weights are in memory."""
    model, steps = recipe.model, recipe.sampling.steps
    parts = (model.base, model.unet_for(steps), model.distillation_for(steps), model.vae, model.adapter)
    return (*parts, model.image_encoder, tuple((lora.file, lora.scale) for lora in model.loras))


def to_pil(image: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] to an 8-bit RGB image.

    Raises:
        FastFaceError: the image holds numbers that are not finite.
    """
    if not image.isfinite().all():
        raise FastFaceError("the image holds numbers that are not finite", "try --dtype float32 or bfloat16")
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy())
