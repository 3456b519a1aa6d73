"""A pipeline: requests in, images out, on loaded models."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

from ..adapters.base import IdentityAdapter
from ..adapters.registry import ADAPTERS, Extras
from ..errors import FastFaceError, RecipeError
from ..models.acceleration import DEFAULT, Acceleration, arrange, check
from ..models.backbone import SDXL, Backbone, vae_decode
from ..models.compilation import compiled
from ..models.device import memory_errors, pick_device, pick_dtype
from ..models.loading import Homes, configured, load_parts, load_scheduler
from ..models.offload import OFF, Level, check_level, in_blocks, visiting
from ..models.schedulers import is_stochastic, model_times, with_steps
from ..quiet import quiet_libraries
from ..recipe.schema import AdapterScale, Recipe, per_step
from ..sampling import attention, guidance, processor
from ..sampling.denoiser import GuidedDenoiser, denoise
from ..sampling.loop import Denoiser, OnStep, Trace, ignore_step, sample

if TYPE_CHECKING:
    from ..identity.identity import Identity
    from ..store.fused_cache import FusedCache

StageTimer = Callable[[str], AbstractContextManager[None]]
"""Entered around each `text`, `identity`, `keys`, `step` and `vae` stage; benchmarks time them with it."""

Compiler = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
"""Compiles a function of tensors."""


@dataclass(frozen=True)
class Request:
    """One image to generate."""

    prompt: str
    seed: int
    identity: Identity
    negative_prompt: str | None = None
    """None: zero embeddings, which is not the encoding of an empty text."""
    adapter_scale: AdapterScale | None = None
    """A constant, or one number per step; None: the scale of the pipeline's recipe."""


@dataclass
class GeneratedImage:
    """A generated image."""

    image: Image.Image
    request: Request
    adapter_scale: AdapterScale
    unet_samples: int
    """Number of UNet samples, over all steps."""
    seconds: float
    """Its share of the wall time of its batch."""
    initial_latents: Tensor
    """[4, h, w] float32, as scaled for the scheduler."""
    latents: Tensor
    """[steps, 4, h, w] float32, after each step."""
    timesteps: Tensor
    """[steps]"""
    lossy: Mapping[str, Any] = field(default_factory=dict)
    """The lossy optimizations that were enabled, see `Acceleration.lossy`."""


class Pipeline:
    """Loaded models under a recipe. A run leaves no trace in the next one.

    Args:
        recipe: what to run.
        parts: the loaded diffusers pipeline with the adapter in its UNet.
        projection: identity projection of the adapter.
        extras: further models of the adapter.
        scheduler: of the right class and configuration; copied for each batch.
        acceleration: optimizations.
        level: which models are offloaded.
        device: to run on; None is where the UNet is.
        compiler: compiles a step and decoding; None is `torch.compile` if the acceleration requests it.

    Raises:
        UsageError: the acceleration and the level exclude each other.
    """

    def __init__(
        self,
        recipe: Recipe,
        parts: StableDiffusionXLPipeline,
        projection: torch.nn.Module,
        scheduler: Any,
        *,
        extras: Extras | None = None,
        acceleration: Acceleration = DEFAULT,
        level: Level = OFF,
        device: torch.device | None = None,
        compiler: Compiler | None = None,
    ) -> None:
        check_level(level, acceleration)
        self.recipe = recipe
        self.level = level
        self.acceleration = acceleration
        self.parts = parts
        self.projection = projection
        self.extras: Extras = extras or {}
        self.scheduler = scheduler
        if compiler is None and acceleration.compile:
            on_cuda = (device or parts.unet.device).type == "cuda"
            graphs, autotune = acceleration.cuda_graphs and on_cuda, acceleration.autotune
            compiler = partial(compiled, cuda_graphs=graphs, autotune=autotune)
        self.compiler = compiler
        self._denoise = compiler(denoise) if compiler else denoise
        self.backbone: Backbone = SDXL(parts, level, device, compiler(vae_decode) if compiler else vae_decode)
        self.use(ADAPTERS[recipe.adapter.kind].build(parts, projection, self.extras))
        self.watch: StageTimer = lambda _: nullcontext()

    @property
    def unet(self) -> Any:
        """The UNet, with the adapter's attention weights."""
        return self.parts.unet

    @property
    def vae(self) -> Any:
        """The VAE."""
        return self.parts.vae

    @property
    def device(self) -> torch.device:
        """Where the models run."""
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights; that of the VAE may differ."""
        return self.backbone.dtype

    @classmethod
    def load(
        cls,
        recipe: Recipe,
        paths: Mapping[str, Path],
        *,
        device: str = "auto",
        dtype: str | None = None,
        fused: FusedCache | None = None,
        acceleration: Acceleration = DEFAULT,
        level: Level = OFF,
    ) -> Pipeline:
        """Load the models of a recipe.

        Args:
            recipe: what to run.
            paths: path of each of `recipe.references()`.
            device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
            dtype: `float32`, `float16`, `bfloat16`; None chooses by device.
            fused: cache of fused models; None caches nothing.
            acceleration: optimizations.
            level: which models are offloaded.

        Raises:
            ModelUnavailableError: a file is missing, damaged or has another shape.
            DeviceError: the device does not exist or does not support the acceleration, or out of memory.
            UsageError: the acceleration requires another dtype or a package, or excludes the level.
        """
        chosen = pick_device(device)
        weights = pick_dtype(dtype, chosen)
        check(acceleration, chosen, weights)
        check_level(level, acceleration)
        with quiet_libraries(), memory_errors(chosen, level):
            parts, projection, extras = load_parts(
                recipe, paths, Homes.of(chosen, level), weights, fused, fuse=acceleration.fuse_lora
            )
            arrange(parts.unet, parts.vae, acceleration)
            scheduler = load_scheduler(recipe, configured(paths), paths.get("scheduler"))
        return cls(
            recipe,
            parts,
            projection,
            scheduler,
            extras=extras,
            acceleration=acceleration,
            level=level,
            device=chosen,
        )

    def fits(self, recipe: Recipe) -> bool:
        """Whether `with_recipe` accepts a recipe: it needs the models that are loaded."""
        return self._changed_models(recipe) is None

    def _changed_models(self, recipe: Recipe) -> str | None:
        if _loaded_parts(self.recipe) != _loaded_parts(recipe):
            return "model"
        same = self.recipe.adapter.lora_scale == recipe.adapter.lora_scale
        return None if same else "adapter.lora_scale"

    def with_recipe(self, recipe: Recipe, paths: Mapping[str, Path]) -> Pipeline:
        """The same loaded models under another recipe.

        Args:
            recipe: differs in sampling, guidance, attention, adapter scale, or the scheduler.
            paths: as of `load`, for the scheduler's configuration.

        Raises:
            RecipeError: the recipe requires other models, or another weight of a fused LoRA.
        """
        changed = self._changed_models(recipe)
        if changed is not None:
            raise RecipeError(
                f"{changed} differs from that of the loaded models", "run it in a separate session"
            )
        with quiet_libraries():
            scheduler = load_scheduler(recipe, configured(paths), paths.get("scheduler"))
        pipeline = self.sharing(recipe, scheduler, self.acceleration)
        pipeline.use(self.adapter)
        return pipeline

    def sharing(self, recipe: Recipe, scheduler: Any, acceleration: Acceleration) -> Pipeline:
        """A pipeline with the same models and other settings."""
        return Pipeline(
            recipe,
            self.parts,
            self.projection,
            scheduler,
            extras=self.extras,
            acceleration=acceleration,
            level=self.level,
            device=self.device,
            compiler=self.compiler if acceleration == self.acceleration else None,
        )

    def use(self, adapter: IdentityAdapter) -> None:
        """Condition on identities through `adapter`, whose attention weights are loaded in the UNet."""
        self.adapter = adapter.configured(self.recipe.adapter)
        self.layers, self.processors = self.adapter.attention(self.unet)
        self.key_modules = {
            part
            for (_, layer), attn_processor in zip(self.layers, self.processors, strict=True)
            for module in processor.projections(layer, attn_processor)
            for part in module.modules()
            if self.level.projections
        }
        """Projections of keys and values, which are not moved with the UNet: only `project` needs them."""

    # ---------------------------------------------------------------------------------------- sampling

    def plan(self, *, prune: bool | None = None) -> list[guidance.Step]:
        """The steps of this recipe; `prune` as in `generate`."""
        prune = self.acceleration.prune if prune is None else prune
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
        on_step: OnStep = ignore_step,
    ) -> Iterator[GeneratedImage]:
        """Generate images, in order.

        Each image has its own CPU generator, so that it is the same alone or in a batch.

        Args:
            requests: the images.
            batch_size: number of images per UNet call.
            prune: skip branches that cannot change the result; None: as the acceleration says.
            on_step: called after each step of a batch.

        Raises:
            DeviceError: out of memory.
        """
        for start in range(0, len(requests), batch_size):
            group = requests[start : start + batch_size]
            began = time.perf_counter()
            with torch.inference_mode(), memory_errors(self.device, self.level):
                steps = self.plan(prune=prune)
                trace, timesteps = self.sample(group, steps, on_step=on_step)
                # Copying the images to the CPU waits for the device, which the time below must contain.
                with self.watch("vae"), self.backbone.on_device(self.vae, offloaded=self.level.models):
                    images = [to_pil(self.backbone.decode(latents)) for latents in trace.latents[-1]]
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
                    lossy=self.acceleration.lossy(),
                )

    def _scale(self, request: Request) -> AdapterScale:
        return self.recipe.adapter.scale if request.adapter_scale is None else request.adapter_scale

    def sample(
        self,
        requests: Sequence[Request],
        steps: Sequence[guidance.Step],
        *,
        on_step: OnStep = ignore_step,
    ) -> tuple[Trace, Tensor]:
        """Sample one batch: the latents of every step, and the timesteps."""
        sampling = self.recipe.sampling
        scheduler = with_steps(self.scheduler, sampling.steps)
        generators = [torch.Generator("cpu").manual_seed(request.seed) for request in requests]
        # In float32 whatever the dtype of the models, so that a seed always gives the same noise.
        scale = self.backbone.latent_scale
        shape = (1, self.backbone.latent_channels, sampling.height // scale, sampling.width // scale)
        noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
        chains = [self._chains(step.index, len(steps)) for step in steps]
        denoiser = GuidedDenoiser(
            self.unet,
            self._conditions(requests),
            self.recipe.guidance,
            self.recipe.attention,
            # For the UNet, in one transfer; the scheduler reads its own on the CPU.
            times=model_times(scheduler).to(self.device),
            chains=attention.as_tensors(chains, self.device) if self.acceleration.compile else chains,
            call=self._denoise,
            one_branch=self.level.one_branch,
            tensor_numbers=self.acceleration.compile,
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

    def _unet_on_device(self) -> AbstractContextManager[None]:
        """Move the UNet, or each of its blocks in turn, to the device inside the context."""
        if self.level.blocks:
            return in_blocks(self.device, self.unet, without=self.key_modules)
        return (
            visiting(self.device, self.unet, without=self.key_modules) if self.level.models else nullcontext()
        )

    def _chains(self, step: int, steps: int) -> attention.Chains:
        blocks = self.backbone.blocks
        settings, count = self.recipe.attention, self.adapter.num_tokens
        return {block: attention.resolve(settings, block, step, steps, count) for block in blocks}

    def _conditions(self, requests: Sequence[Request]) -> processor.Conditions:
        """Conditions of a batch."""
        prompts = dict.fromkeys(text for r in requests for text in (r.prompt, r.negative_prompt))
        identities = {id(r.identity): r.identity for r in requests}
        with self.watch("text"):
            texts = {text: self.backbone.encode_prompt(text) for text in prompts}
        with self.watch("identity"):
            on_device = partial(self.backbone.on_device, offloaded=self.level.encoders)
            encoded = {key: self.adapter.tokens(identity, on_device) for key, identity in identities.items()}
        embeddings = [texts[r.negative_prompt] for r in requests] + [texts[r.prompt] for r in requests]
        tokens = [encoded[id(r.identity)] for r in requests]
        text = torch.stack([embedding for embedding, _ in embeddings])
        identity = torch.stack([absent for absent, _ in tokens] + [person for _, person in tokens])
        projected: processor.Projected = ()
        if self.acceleration.cache_kv:
            with self.watch("keys"):
                projected = self.project(text, identity)
        sampling = self.recipe.sampling
        by_image = [per_step(self._scale(r), sampling.steps) for r in requests]
        scales = list(zip(*by_image, strict=True))
        return processor.Conditions(
            text=text,
            pooled=torch.stack([pooled for _, pooled in embeddings]),
            time_ids=self.backbone.time_ids(sampling.width, sampling.height),
            identity=identity,
            scale=torch.tensor(scales, device=self.device),
            images=len(requests),
            # A compiled step accepts any scale; without identity attention it would be another graph.
            has_identity=[any(step) or self.acceleration.compile for step in scales],
            projected=projected,
            extra=self.adapter.extra_conditioning(
                [r.identity for r in requests],
                (sampling.width, sampling.height),
                partial(self.backbone.on_device, offloaded=self.level.models),
            ),
        )

    def example_identity(self) -> Identity:
        """An arbitrary identity with everything that the adapter reads."""
        return self.adapter.example()

    def warm_up(self, *, batch_size: int = 1) -> float:
        """Generate images of anyone until everything is compiled and recorded; return the seconds.

        Args:
            batch_size: number of images per UNet call.
        """
        began = time.perf_counter()
        request = Request("a person", 0, self.example_identity())
        # A CUDA graph is compiled at its first call, recorded at its second, and replayed from its third on.
        for _ in range(3 if self.acceleration.compile and self.acceleration.cuda_graphs else 1):
            for _ in self.generate([request] * batch_size, batch_size=batch_size):
                pass
        return time.perf_counter() - began

    def project(self, text: Tensor, identity: Tensor) -> processor.Projected:
        """Keys and values of every layer, from [rows, tokens, width] each."""
        on_device = partial(self.backbone.on_device, offloaded=self.level.projections)
        return processor.project(self.layers, self.processors, text, identity, on_device)


def _loaded_parts(recipe: Recipe) -> tuple[Any, ...]:
    """All parts of a recipe that determine which weights are loaded."""
    model, steps = recipe.model, recipe.sampling.steps
    return (
        model.base,
        model.unet_for(steps),
        model.distillation_for(steps),
        model.vae,
        model.adapter,
        recipe.adapter.kind,
        model.controlnet,
        model.image_encoder,
        tuple((lora.file, lora.scale) for lora in model.loras),
    )


def to_pil(image: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] to an 8-bit RGB image.

    Raises:
        FastFaceError: the image contains numbers that are not finite.
    """
    if not image.isfinite().all():
        raise FastFaceError(
            "the image contains numbers that are not finite", "try --dtype float32 or bfloat16"
        )
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy())
