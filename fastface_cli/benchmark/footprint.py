"""How much memory tensors take on the device, counted without numbers: the published size on any machine.

The models are built on torch's meta device, which stands for the card; what a level keeps elsewhere lies on
the CPU, in memory that is never touched. The pipeline then runs as it always does, and every storage that is
alive on the card counts. Not counted: the context, workspaces of convolutions, the allocator's gaps.
Attention counts as the fused kernels have it, by its output alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterFaceIDPlusImageProjection
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..app.pipeline import Pipeline, Request
from ..models.fused import HEAD_WIDTH
from ..models.loading import Homes
from ..models.offload import Level
from ..models.quiet import quiet_libraries
from ..recipe.schema import Recipe
from .random_stack import make_models, scheduler, tokenizers
from .sdxl import PUBLISHED, Stack

CARD = torch.device("meta")


@dataclass
class Footprint:
    """Bytes of tensors on the card."""

    resident: int
    """Before the first picture."""
    stages: Mapping[str, int] = field(default_factory=dict)
    """The most within each stage."""

    @property
    def peak(self) -> int:
        """The most of all."""
        return max(self.resident, *self.stages.values())


class Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages on the card that are alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def see(self, tensor: torch.Tensor) -> None:
        """Take a tensor into account, until it is gone."""
        if tensor.device != CARD:
            return
        storage = tensor.untyped_storage()
        if storage not in self._known:
            size = storage.nbytes()
            self._known[storage] = size
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        return found


def count(recipe: Recipe, level: Level, stack: Stack = PUBLISHED) -> Footprint:
    """What one picture of a recipe takes in half precision.

    Args:
        recipe: what to run; the models that it names are not looked at.
        level: what is on the card only while it is used.
        stack: the configurations.
    """
    from .run import synthetic_person

    with quiet_libraries():
        pipeline = _pipeline(recipe, level, stack)
    living = Living()
    parts = pipeline.parts
    encoders = (parts.text_encoder, parts.text_encoder_2, parts.image_encoder, pipeline.projection)
    for module in (pipeline.unet, pipeline.vae, *encoders):
        for tensor in (*module.parameters(), *module.buffers()):
            living.see(tensor)
    found, stages = Footprint(living.now), dict[str, int]()

    @contextmanager
    def watch(stage: str) -> Iterator[None]:
        living.most = living.now
        yield
        stages[stage] = max(stages.get(stage, 0), living.most)

    pipeline.watch = watch
    request = Request("a portrait of a person", 0, synthetic_person())
    fused = patch("torch.nn.functional.scaled_dot_product_attention", _fused_attention)
    with torch.no_grad(), living, fused:
        trace, _ = pipeline.sample([request], pipeline.plan())
        with watch("vae"), pipeline.on_device(pipeline.vae, offloaded=level.models):
            pipeline.decode(trace.latents[-1][0])
    found.stages = stages
    return found


def _fused_attention(query: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.empty_like(query)


def _pipeline(recipe: Recipe, level: Level, stack: Stack) -> Pipeline:
    """The stack with its adapter, every model where the level has it."""
    homes = Homes.of(CARD, level)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with CARD:
            models = make_models(recipe, stack)
            _put_adapter(models["unet"])
            projection = _make_projection(stack)
    finally:
        torch.set_default_dtype(before)
    places = {"unet": homes.unet, "vae": homes.vae}
    for name, model in (*models.items(), ("projection", projection)):
        home = places.get(name, homes.encoders)
        if home != CARD:
            model.to_empty(device=home)
        model.eval().requires_grad_(False)
    parts = StableDiffusionXLPipeline(
        **models, **tokenizers(stack), scheduler=scheduler(recipe, stack), add_watermarker=False
    )
    return Pipeline(recipe, parts, projection, scheduler(recipe, stack), level=level, device=CARD)


def _put_adapter(unet: Any) -> None:
    """Processors as `load_ip_adapter` leaves them."""
    processors = {}
    for name, own in unet.attn_processors.items():
        layer = unet.get_submodule(name.removesuffix(".processor"))
        processors[name] = (
            IPAdapterAttnProcessor2_0(layer.inner_dim, layer.cross_attention_dim, num_tokens=(4,))
            if layer.is_cross_attention
            else own
        )
    unet.set_attn_processor(processors)


def _make_projection(stack: Stack) -> torch.nn.Module:
    width, hidden = stack.unet["cross_attention_dim"], stack.image_encoder["hidden_size"]
    projection: Any = IPAdapterFaceIDPlusImageProjection(
        embed_dims=width,
        output_dims=width,
        hidden_dims=hidden,
        heads=hidden // HEAD_WIDTH,
        id_embeddings_dim=512,
    )
    projection.shortcut = True
    module: torch.nn.Module = projection
    return module
