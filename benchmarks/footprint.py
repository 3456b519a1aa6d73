"""Count the GPU memory of each `--low-memory` level at the published size; no GPU is needed.

    python benchmarks/footprint.py [--recipe hyper-fastface] [--size 1024]

GiB in half precision, one image, by stage. The models are created on torch's meta device, which represents
the GPU. Offloaded models are on the CPU, in memory that is never touched. The pipeline then runs as usual,
and every live storage on the meta device is counted. Not counted: the CUDA context, convolution workspaces
and fragmentation. Attention counts only its output, as in the fused kernels.
"""

from __future__ import annotations

import argparse
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

from fastface_cli.adapters.faceid_plusv2 import HEAD_WIDTH
from fastface_cli.app.pipeline import Pipeline, Request
from fastface_cli.benchmark.random_stack import make_models, scheduler, tokenizers
from fastface_cli.benchmark.sdxl import PUBLISHED, Stack
from fastface_cli.identity.identity import random_identity
from fastface_cli.models.loading import Homes
from fastface_cli.models.offload import GIB, LEVELS, Level
from fastface_cli.quiet import quiet_libraries
from fastface_cli.recipe.files import load_recipe
from fastface_cli.recipe.schema import Recipe

GPU = torch.device("meta")
STAGES = ("text", "identity", "keys", "step", "vae")


@dataclass
class Footprint:
    """Bytes of tensors on the GPU."""

    resident: int
    """Before the first image."""
    stages: Mapping[str, int] = field(default_factory=dict)
    """Peak of each stage."""

    @property
    def peak(self) -> int:
        """Return the overall peak."""
        return max(self.resident, *self.stages.values())


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of all live storages on the GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def track(self, tensor: torch.Tensor) -> None:
        """Count a tensor until its storage is freed."""
        if tensor.device != GPU:
            return
        storage = tensor.untyped_storage()
        if storage not in self._known:
            size = storage.nbytes()
            self._known[storage] = size
            self.current += size
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.current -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.track(leaf)
        return result


def count(recipe: Recipe, level: Level, stack: Stack = PUBLISHED) -> Footprint:
    """Count the memory of one image in half precision.

    Args:
        recipe: the recipe to run; its model files are not used.
        level: which models are offloaded.
        stack: the model configurations.
    """
    with quiet_libraries():
        pipeline = _pipeline(recipe, level, stack)
    memory = LiveMemory()
    parts = pipeline.parts
    encoders = (parts.text_encoder, parts.text_encoder_2, parts.image_encoder, pipeline.projection)
    for module in (pipeline.unet, pipeline.vae, *encoders):
        for tensor in (*module.parameters(), *module.buffers()):
            memory.track(tensor)
    footprint, stages = Footprint(memory.current), dict[str, int]()

    @contextmanager
    def watch(stage: str) -> Iterator[None]:
        memory.peak = memory.current
        yield
        stages[stage] = max(stages.get(stage, 0), memory.peak)

    pipeline.watch = watch
    request = Request("a portrait of a person", 0, random_identity())
    fused = patch("torch.nn.functional.scaled_dot_product_attention", _fused_attention)
    with torch.no_grad(), memory, fused:
        trace, _ = pipeline.sample([request], pipeline.plan())
        with watch("vae"), pipeline.backbone.on_device(pipeline.vae, offloaded=level.models):
            pipeline.backbone.decode(trace.latents[-1][0])
    footprint.stages = stages
    return footprint


def _fused_attention(query: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.empty_like(query)


def _pipeline(recipe: Recipe, level: Level, stack: Stack) -> Pipeline:
    """Create the pipeline with its adapter, every model on the device that the level assigns."""
    homes = Homes.of(GPU, level)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with GPU:
            models = make_models(recipe, stack)
            _put_adapter(models["unet"])
            projection = _make_projection(stack)
    finally:
        torch.set_default_dtype(before)
    places = {"unet": homes.unet, "vae": homes.vae}
    for name, model in (*models.items(), ("projection", projection)):
        home = places.get(name, homes.encoders)
        if home != GPU:
            model.to_empty(device=home)
        model.eval().requires_grad_(False)
    parts = StableDiffusionXLPipeline(
        **models, **tokenizers(stack), scheduler=scheduler(recipe, stack), add_watermarker=False
    )
    return Pipeline(recipe, parts, projection, scheduler(recipe, stack), level=level, device=GPU)


def _put_adapter(unet: Any) -> None:
    """Install the same attention processors as `load_ip_adapter`."""
    processors = {}
    for name, processor in unet.attn_processors.items():
        layer = unet.get_submodule(name.removesuffix(".processor"))
        processors[name] = (
            IPAdapterAttnProcessor2_0(layer.inner_dim, layer.cross_attention_dim, num_tokens=(4,))
            if layer.is_cross_attention
            else processor
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipe", default="hyper-fastface")
    parser.add_argument("--size", type=int, default=1024)
    options = parser.parse_args()
    size = [f"sampling.width={options.size}", f"sampling.height={options.size}"]
    recipe = load_recipe(options.recipe, overrides=size).recipe
    print(f"| --low-memory | between images | {' | '.join(STAGES)} | peak |")
    print("|---|---|" + "---|" * len(STAGES) + "---|")
    for name, level in LEVELS.items():
        footprint = count(recipe, level)
        cells = [footprint.resident, *(footprint.stages.get(stage, 0) for stage in STAGES), footprint.peak]
        print(
            f"| {name} | {' | '.join(f'{cell / GIB:.2f}' if cell else '-' for cell in cells)} |", flush=True
        )


if __name__ == "__main__":
    main()
