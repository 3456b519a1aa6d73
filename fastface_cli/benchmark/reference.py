"""The published implementation, for speed comparisons with ours. Both produce the same latents.

It repeats the steps of the authors' code with the same diffusers components and is no slower than that code.
Unlike ours, every run does the following:

- all three branches run at every step, even if the guided prediction does not depend on them;
- the adapter's LoRA is not fused (PEFT): two more small matrix products in each attention projection of the
  UNet;
- text and identity keys and values are projected again at every step, and the identity projection itself
  runs inside every UNet call;
- the image encoder runs twice, for no identity and for the person;
- timesteps are on the device, so every scheduler step waits for it;
- the VAE is stored in float16, converted to float32 for decoding, and converted back: the base's VAE, the
  only one that it supports, overflows in float16. This happens here with every VAE;
- nothing is compiled.

Omitted, which makes it faster than the published code: in every manipulated layer, the published attention
copies an empty bias from the CPU to the device and checks on the device whether the result is finite. The
noise is ours, so that latents can be compared.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLPipeline
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil

from ..adapters.faceid_plusv2 import LORA, read_adapter
from ..adapters.lora import fuse_lora
from ..app.pipeline import GeneratedImage, Request, StageTimer, to_pil
from ..errors import UsageError
from ..identity.identity import Identity, random_identity
from ..models.backbone import SDXL
from ..models.device import memory_errors, pick_device, pick_dtype
from ..models.loading import load_image_encoder, load_scheduler, load_text_encoders, load_unet, load_vae
from ..models.schedulers import is_stochastic, with_steps
from ..quiet import quiet_libraries
from ..recipe.schema import Block, Recipe
from ..sampling import attention, guidance
from ..sampling.loop import Trace
from ..sampling.processor import identity_layers


@dataclass
class _State:
    """The state of the current step that the manipulated layers need."""

    images: int = 1
    chains: dict[Block, attention.Chain | None] = field(default_factory=dict)


class ManipulatedProcessor(IPAdapterAttnProcessor2_0):  # type: ignore[misc]
    """The diffusers processor with an explicit identity attention map, as in the published patch."""

    def __init__(self, loaded: IPAdapterAttnProcessor2_0, block: Block, state: _State) -> None:
        torch.nn.Module.__init__(self)
        self.hidden_size, self.cross_attention_dim = loaded.hidden_size, loaded.cross_attention_dim
        self.num_tokens, self.scale = loaded.num_tokens, loaded.scale
        self.to_k_ip, self.to_v_ip = loaded.to_k_ip, loaded.to_v_ip
        self.block: Block = block
        self.state = state

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, *_: Any, **__: Any
    ) -> Tensor:
        """Attend to text and identity; `encoder_hidden_states` is the pair that the UNet creates."""
        text, (identity,) = encoder_hidden_states

        def heads(x: Tensor) -> Tensor:
            return x.reshape(*x.shape[:-1], attn.heads, -1).transpose(1, 2)

        query = heads(attn.to_q(hidden_states))
        out = F.scaled_dot_product_attention(query, heads(attn.to_k(text)), heads(attn.to_v(text)))
        # One identity: [rows, images of it, tokens, width].
        key, value = (
            heads(self.to_k_ip[0](identity.flatten(1, 2))),
            heads(self.to_v_ip[0](identity.flatten(1, 2))),
        )
        chain = self.state.chains.get(self.block)
        from_identity = attention.identity_attention(query, key, value, chain, self.state.images)
        out = (out + self.scale[0] * from_identity).transpose(1, 2).flatten(2)
        result: Tensor = attn.to_out[0](out)
        return result


class PublishedPipeline:
    """The published implementation with loaded models; used like `Pipeline`.

    Args:
        recipe: the recipe to run.
        parts: a diffusers pipeline with an image encoder; its UNet contains the adapter and its unfused LoRA,
            as after `load_ip_adapter`.
        scheduler: the scheduler of the recipe.
    """

    def __init__(self, recipe: Recipe, parts: StableDiffusionXLPipeline, scheduler: Any) -> None:
        self.recipe, self.parts, self.scheduler = recipe, parts, scheduler
        self.unet, self.vae = parts.unet, parts.vae
        self.device, self.dtype = self.unet.device, self.unet.dtype
        _cast(self.vae, self.dtype)
        self.watch: StageTimer = lambda _: nullcontext()
        size = parts.image_encoder.config.image_size
        self.processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size)
        self.projection = self.unet.encoder_hid_proj.image_projection_layers[0]
        self.projection.shortcut = True
        parts.set_adapters([LORA], [recipe.adapter.lora_scale])
        self._state = _State()
        if recipe.attention.active:
            self._patch()

    def _patch(self) -> None:
        for block, layer in identity_layers(self.unet):
            if block in self.recipe.attention.blocks:
                layer.processor = ManipulatedProcessor(layer.processor, block, self._state)

    @classmethod
    def load(
        cls,
        recipe: Recipe,
        paths: Mapping[str, Path],
        *,
        device: str = "auto",
        dtype: str | None = None,
    ) -> PublishedPipeline:
        """Load the models of a recipe; see `Pipeline.load` for arguments and errors.

        Raises:
            UsageError: the base is a single checkpoint file, which the published code does not support.
        """
        base = paths["base"]
        if base.is_file():
            raise UsageError(
                "the reference does not support single-file checkpoints",
                "omit --against, or use another recipe",
            )
        where = pick_device(device)
        number = pick_dtype(dtype, where)
        with quiet_libraries(), memory_errors(where):
            encoder, encoder_2, tokenizer, tokenizer_2 = load_text_encoders(base, number)
            scheduler = load_scheduler(recipe, base, paths.get("scheduler"))
            parts = StableDiffusionXLPipeline(
                vae=load_vae(base, paths.get("vae"), number),
                text_encoder=encoder,
                text_encoder_2=encoder_2,
                tokenizer=tokenizer,
                tokenizer_2=tokenizer_2,
                unet=load_unet(base, paths.get("unet"), number),
                scheduler=scheduler,
                add_watermarker=False,
            )
            parts.register_modules(image_encoder=load_image_encoder(paths["image_encoder"], number))
            parts.to(where)
            if "distillation" in paths:  # the published code fuses it too
                fuse_lora(parts, paths["distillation"], 1.0)
            for index, lora in enumerate(recipe.model.loras):
                fuse_lora(parts, paths[f"lora.{index}"], lora.scale)
            read_adapter(parts, paths["adapter"])
            parts.unet.to(where, number)
            return cls(recipe, parts, scheduler)

    def generate(self, requests: Sequence[Request], *, batch_size: int = 1) -> Iterator[GeneratedImage]:
        """Generate images in order, like `Pipeline.generate`."""
        for start in range(0, len(requests), batch_size):
            group = requests[start : start + batch_size]
            began = time.perf_counter()
            with torch.no_grad(), memory_errors(self.device):
                trace, timesteps = self.sample(group)
                with self.watch("vae"):
                    images = [to_pil(self.decode(latents)) for latents in trace.latents[-1]]
            seconds = (time.perf_counter() - began) / len(group)
            for index, (request, image) in enumerate(zip(group, images, strict=True)):
                yield GeneratedImage(
                    image=image,
                    request=request,
                    adapter_scale=self._scale(request),
                    unet_samples=3 * len(timesteps),
                    seconds=seconds,
                    initial_latents=trace.initial_latents[index].float().cpu(),
                    latents=torch.stack([latents[index] for latents in trace.latents]).float().cpu(),
                    timesteps=timesteps.cpu(),
                )

    def _scale(self, request: Request) -> float:
        scale = self.recipe.adapter.scale if request.adapter_scale is None else request.adapter_scale
        if isinstance(scale, list):
            raise ValueError("the published code supports only one adapter scale for all steps")
        return scale

    def sample(self, requests: Sequence[Request]) -> tuple[Trace, Tensor]:
        """Run the sampling loop for one batch; return the latents of every step, and the timesteps."""
        sampling, images = self.recipe.sampling, len(requests)
        scales = {self._scale(request) for request in requests}
        if len(scales) > 1:
            raise ValueError("the published code supports only one adapter scale per batch")
        self.parts.set_ip_adapter_scale(scales.pop())
        text, pooled, embeddings = self._conditions(requests)
        scheduler = with_steps(self.scheduler, sampling.steps, self.device)
        steps = guidance.plan(
            self.recipe.guidance, self.recipe.attention, scheduler.timesteps.tolist(), prune=False
        )
        generators = [torch.Generator("cpu").manual_seed(request.seed) for request in requests]
        factor = self.parts.vae_scale_factor
        shape = (1, 4, sampling.height // factor, sampling.width // factor)
        noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
        latents = noise.to(self.device, self.dtype) * scheduler.init_noise_sigma
        size = [sampling.height, sampling.width, 0, 0, sampling.height, sampling.width]
        time_ids = torch.tensor([size], device=self.device, dtype=self.dtype).repeat(3 * images, 1)
        extra = {"generator": generators} if is_stochastic(scheduler) else {}
        trace = Trace(latents.clone())
        for step, t in zip(steps, scheduler.timesteps, strict=True):
            with self.watch("step"):
                self._state.chains = {
                    block: attention.resolve(self.recipe.attention, block, step.index, len(steps))
                    for block in SDXL.blocks
                }
                predicted = self.unet(
                    scheduler.scale_model_input(torch.cat([latents] * 3), t),
                    t,
                    encoder_hidden_states=text,
                    added_cond_kwargs={
                        "text_embeds": pooled,
                        "time_ids": time_ids,
                        "image_embeds": [embeddings],
                    },
                    return_dict=False,
                )[0]
                guided = guide(predicted, step, self.recipe.guidance)
            latents = scheduler.step(guided, t, latents, **extra, return_dict=False)[0].to(self.dtype)
            trace.latents.append(latents)
        return trace, scheduler.timesteps

    def _conditions(self, requests: Sequence[Request]) -> tuple[Tensor, Tensor, Tensor]:
        """Return text [3 x images, tokens, width], pooled [3 x images, width] and face embeddings.

        Embeddings are [3 x images, 1, 512]. Image features go to the projection, as diffusers expects.
        """
        branches = guidance.BRANCHES[self.recipe.guidance.order]
        with self.watch("text"):
            texts = [
                self.parts.encode_prompt(
                    request.prompt,
                    device=self.device,
                    num_images_per_prompt=1,
                    do_classifier_free_guidance=True,
                    negative_prompt=request.negative_prompt,
                )
                for request in requests
            ]
        with self.watch("identity"):
            people = [self.encode_identity(request.identity) for request in requests]
        embeds = torch.cat([torch.cat([t[0] if b.prompt else t[1] for t in texts]) for b in branches])
        pooled = torch.cat([torch.cat([t[2] if b.prompt else t[3] for t in texts]) for b in branches])
        features = torch.cat([torch.stack([f[int(b.identity)] for f, _ in people]) for b in branches])
        embeddings = torch.cat([torch.stack([e * b.identity for _, e in people]) for b in branches])
        self.projection.clip_embeds = features[:, None]
        self._state.images = len(requests)
        return embeds, pooled, embeddings[:, None]

    def example_identity(self) -> Identity:
        """An arbitrary identity with everything that the adapter reads."""
        return random_identity()

    def encode_identity(self, identity: Identity) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Return image features [patches, width] without and with identity, and the face embedding [512]."""
        crop = identity.crop()
        if self.recipe.adapter.crop_order == "rgb":
            crop = np.ascontiguousarray(crop[..., ::-1])
        pixels = self.processor(Image.fromarray(crop), return_tensors="pt").pixel_values
        pixels = pixels.to(self.device, self.dtype)
        encoder = self.parts.image_encoder
        person = encoder(pixels, output_hidden_states=True).hidden_states[-2][0]
        unconditional = encoder(torch.zeros_like(pixels), output_hidden_states=True).hidden_states[-2][0]
        embedding = torch.from_numpy(identity.mean()).to(self.device, self.dtype)
        return (unconditional, person), embedding

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [4, h, w] to an image [3, H, W], float32 in [0, 1]."""
        upcast = self.dtype == torch.float16
        if upcast:
            _cast(self.vae, torch.float32)
        scaled = latents[None].to(self.vae.dtype) / self.vae.config.scaling_factor
        decoded: Tensor = self.vae.decode(scaled, return_dict=False)[0][0]
        if upcast:
            _cast(self.vae, torch.float16)
        return (decoded.float() / 2 + 0.5).clamp(0, 1)


def _cast(vae: torch.nn.Module, dtype: torch.dtype) -> None:
    torch.nn.Module.to(vae, dtype)  # diffusers' own `to` would log a warning for every image


def guide(predicted: Tensor, step: guidance.Step, weights: Any) -> Tensor:
    """Compute the guided prediction, from [3 x images, C, H, W] to [images, C, H, W]."""
    e0, e1, e2 = predicted.chunk(3)
    a, b = (step.identity, step.text) if weights.order == "identity_first" else (step.text, step.identity)
    term1, term2 = e1 - e0, e2 - (e0 if weights.order == "independent" else e1)
    if weights.renorm and b != 0:
        norms = [term.flatten(1).norm(dim=1)[:, None, None, None] for term in (term1, term2)]
        term2 = term2 * norms[0] / norms[1].clamp_min(1e-12)
    guided: Tensor = e0 + a * term1 + b * term2
    if weights.rescale > 0:
        std1, std2, std = (x.std([1, 2, 3], keepdim=True) for x in (e1, e2, guided))
        guided = guided * (weights.rescale * (std1 + std2) / (2 * std) + (1 - weights.rescale))
    return guided
