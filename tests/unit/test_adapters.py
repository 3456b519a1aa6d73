"""An adapter written against the public interface alone runs in the same sampling loop."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from support.methods import AM1, DCG, recipe_of

from fastface_cli.app.pipeline import Pipeline, Request
from fastface_cli.sampling.processor import identity_layers, identity_processors


@dataclass
class ToyAdapter:
    """Two identity tokens, which are a slice of the face embedding."""

    width: int
    num_tokens = 2
    calls: list[int] = field(default_factory=list)

    def configured(self, settings):
        return self

    def tokens(self, identity, on_device):
        values = torch.from_numpy(identity.mean())[: 2 * self.width].float()
        person = values.repeat(2 * self.width)[: 2 * self.width].reshape(2, self.width)
        return torch.zeros_like(person), person

    def attention(self, unet):
        layers = identity_layers(unet)
        return layers, identity_processors(layers)

    def extra_conditioning(self, identities, size, on_device):
        def extra(latents, time, rows):
            self.calls.append(len(latents))
            return {}

        return extra


@pytest.fixture(scope="module")
def pipeline(miniature) -> Pipeline:
    parts = {role: miniature[role] for role in ("base", "adapter", "image_encoder")}
    loaded = Pipeline.load(recipe_of(), parts, device="cpu", dtype="float32")
    recipe = recipe_of(guidance=DCG, attention={**AM1, "tokens": [0, 1]})
    return loaded.with_recipe(recipe, parts)


def test_toy_adapter_conditions_every_step(pipeline: Pipeline, person) -> None:
    plain = next(pipeline.generate([Request("a cat", 3, person)]))
    toy = ToyAdapter(pipeline.unet.config.cross_attention_dim)
    pipeline.use(toy)
    other = replace(person, id_embedding=-person.id_embedding)
    first, second = (next(pipeline.generate([Request("a cat", 3, who)])) for who in (person, other))
    assert not torch.equal(first.latents, plain.latents)
    assert not torch.equal(first.latents, second.latents)
    assert toy.calls == 2 * [len(step.branches) for step in pipeline.plan()]


def test_toy_adapter_at_scale_zero_is_no_adapter(pipeline: Pipeline, person) -> None:
    pipeline.use(ToyAdapter(pipeline.unet.config.cross_attention_dim))
    other = replace(person, id_embedding=-person.id_embedding)
    first, second = (
        next(pipeline.generate([Request("a cat", 3, who, adapter_scale=0.0)])) for who in (person, other)
    )
    assert torch.equal(first.latents, second.latents)
