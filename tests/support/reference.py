"""A second implementation of the method, as plain and slow as it can be written.

One picture, all three branches at every step, the adapter's LoRA unfused, keys and values recomputed at
every call, one token at a time: it shares no code with the package but the recipe and the guidance weight
functions, so that agreement means something.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from fastface_cli.recipe.schema import Attention, Blocks, Recipe

BRANCHES = {
    "identity_first": [(0, 0), (1, 0), (1, 1)],
    "text_first": [(0, 0), (0, 1), (1, 1)],
    "independent": [(0, 0), (0, 1), (1, 0)],
}


def at(value, block: str, step: int, steps: int) -> float:
    if isinstance(value, Blocks):
        value = getattr(value, block)
    if not isinstance(value, list):
        return value
    if len(value) == steps:
        return value[step]
    if steps == 1:
        return value[0]
    return float(np.interp(step / (steps - 1), np.linspace(0, 1, len(value)), value))


def minmax(x: torch.Tensor, joint: bool) -> torch.Tensor:
    """[branches, heads, positions]"""
    if joint:
        return (x - x.min()) / (x.max() - x.min())
    return torch.stack([(row - row.min()) / (row.max() - row.min()) for row in x])


def transformed(a: torch.Tensor, spec: Attention, block: str, step: int, steps: int) -> torch.Tensor:
    a = a.clone()
    joint = spec.normalisation == "joint"
    for token in spec.tokens:
        x = a[..., token]
        if spec.invert_token_0 and token == 0:
            x = 1 - x
        for t in spec.transforms:
            if t.kind == "power":
                x = x ** at(t.p, block, step, steps)
            elif t.kind == "scale":
                x = torch.minimum(x * at(t.g, block, step, steps), torch.tensor(t.cap))
            else:
                threshold = 0.5
                if t.kind == "adaptive_softmask":
                    level = at(t.level, block, step, steps)
                    threshold = torch.quantile(x, level, dim=-1, keepdim=True).half().clamp(min=1e-6).float()
                else:
                    threshold = t.threshold
                x = 1 / (1 + torch.exp(-at(t.k, block, step, steps) * (minmax(x, joint) - threshold)))
                x = minmax(x, joint)
        if spec.invert_token_0 and token == 0:
            x = x.max(dim=-1, keepdim=True).values - x
        a[..., token] = x
    return a


def blended(new, old, weight, eps):
    shift = (new - new.mean(-1, keepdim=True)) / (new.std(-1, keepdim=True) + eps)
    return weight * new + (1 - weight) * (shift * old.std(-1, keepdim=True) + old.mean(-1, keepdim=True))


class Processor:
    def __init__(self, name: str, adapter, recipe: Recipe, state: dict):
        self.block = name.split("_", maxsplit=1)[0]
        self.adapter, self.recipe, self.state = adapter, recipe, state

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        def heads(x):
            return x.view(x.shape[0], x.shape[1], attn.heads, -1).transpose(1, 2)

        text, identity = encoder_hidden_states
        q = heads(attn.to_q(hidden_states))
        root = q.shape[-1] ** 0.5
        weights = torch.softmax(q @ heads(attn.to_k(text)).transpose(-1, -2) / root, -1)
        out = weights @ heads(attn.to_v(text))
        a = torch.softmax(q @ heads(self.adapter.to_k_ip[0](identity)).transpose(-1, -2) / root, -1)
        v = heads(self.adapter.to_v_ip[0](identity))
        spec, step, steps = self.recipe.attention, self.state["step"], self.recipe.sampling.steps
        acts = spec.active and self.block in spec.blocks and (spec.steps == "all" or step in spec.steps)
        if not acts:
            half = a @ v
        else:
            changed = transformed(a, spec, self.block, step, steps)
            if spec.blend is None:
                half = changed @ v
            else:
                changed = blended(changed, a, spec.blend.weight, spec.blend.eps)
                half = blended(changed @ v, a @ v, spec.blend.weight, spec.blend.eps)
        out = out + self.state["scale"] * half
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def weight_of(weight, step, steps, t):
    from fastface_cli.recipe.schema import WeightFunction
    from fastface_cli.sampling.guidance import weight_at

    return weight_at(weight, t) if isinstance(weight, WeightFunction) else at(weight, "down", step, steps)


@torch.no_grad()
def latents(recipe: Recipe, scheduler, paths: dict[str, Path], identity, prompt: str, negative, seed: int):
    """Latents after every step: [steps, 4, h, w] float32."""
    pipe = StableDiffusionXLPipeline.from_pretrained(paths["base"], dtype=torch.float32)
    pipe.load_ip_adapter(
        str(paths["adapter"].parent),
        subfolder="",
        weight_name=paths["adapter"].name,
        image_encoder_folder=None,
    )
    pipe.set_adapters(["faceid_0"], [recipe.adapter.lora_scale])
    encoder = CLIPVisionModelWithProjection.from_pretrained(paths["image_encoder"], dtype=torch.float32)
    size = encoder.config.image_size
    crop = identity.crop() if recipe.adapter.crop_order == "bgr" else identity.crop()[..., ::-1].copy()
    pixels = CLIPImageProcessorPil(size=size, crop_size=size)(Image.fromarray(crop), return_tensors="pt")
    tokens = []
    for person in (False, True):
        layer = pipe.unet.encoder_hid_proj.image_projection_layers[0]
        picture = pixels.pixel_values * person
        layer.clip_embeds = encoder(picture, output_hidden_states=True).hidden_states[-2][None]
        layer.shortcut = True
        tokens.append(layer(torch.from_numpy(identity.mean())[None, None] * person))
    texts = [pipe.encode_prompt(prompt, negative_prompt=negative)]
    embeds, negative_embeds, pooled, negative_pooled = texts[0]
    conditions = [(negative_embeds, negative_pooled), (embeds, pooled)]
    state = {"step": 0, "scale": recipe.adapter.scale}
    before = pipe.unet.attn_processors
    pipe.unet.encoder_hid_proj = None
    pipe.unet.set_attn_processor(
        {
            name: Processor(name, processor, recipe, state) if hasattr(processor, "to_k_ip") else processor
            for name, processor in before.items()
            if not name.startswith("encoder_hid_proj")
        }
    )
    s, g = recipe.sampling, recipe.guidance
    scheduler.set_timesteps(s.steps)
    generator = torch.Generator().manual_seed(seed)
    factor = pipe.vae_scale_factor
    x = torch.randn(1, 4, s.height // factor, s.width // factor, generator=generator)
    x = x * scheduler.init_noise_sigma
    time_ids = torch.tensor([[s.height, s.width, 0, 0, s.height, s.width]], dtype=torch.float32)
    actual = []
    for index, t in enumerate(scheduler.timesteps):
        state["step"] = index
        rows = BRANCHES[g.order]
        text = torch.cat([conditions[prompt_][0] for _, prompt_ in rows])
        person = torch.cat([tokens[identity_] for identity_, _ in rows])
        e0, e1, e2 = pipe.unet(
            scheduler.scale_model_input(x, t).repeat(3, 1, 1, 1),
            t,
            encoder_hidden_states=(text, person),
            added_cond_kwargs={
                "text_embeds": torch.cat([conditions[prompt_][1] for _, prompt_ in rows]),
                "time_ids": time_ids.repeat(3, 1),
            },
        ).sample.chunk(3)
        identity_weight = weight_of(g.identity, index, s.steps, float(t))
        text_weight = weight_of(g.text, index, s.steps, float(t))
        a, b = (
            (identity_weight, text_weight) if g.order == "identity_first" else (text_weight, identity_weight)
        )
        term1, term2 = e1 - e0, e2 - (e0 if g.order == "independent" else e1)
        if g.renorm:
            term2 = term2 * torch.norm(term1) / torch.norm(term2)
        guided = e0 + a * term1 + b * term2
        if g.rescale:
            guided = guided * (g.rescale * (e1.std() + e2.std()) / (2 * guided.std()) + 1 - g.rescale)
        kwargs = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
        x = scheduler.step(guided, t, x, **kwargs).prev_sample
        actual.append(x)
    return torch.cat(actual)
