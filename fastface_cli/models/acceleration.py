"""Optimizations. Each one has a name, can be disabled, and is exact or lossy.

Exact optimizations change no result beyond rounding. Lossy optimizations are off by default, and the metadata
of an image names those that were used. A tiny VAE is lossy too, but part of the recipe: `model.vae`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from ..errors import DeviceError, UsageError

if TYPE_CHECKING:
    import torch

VaePrecision: TypeAlias = Literal["auto", "half", "float32"]


@dataclass(frozen=True)
class Acceleration:
    """Which optimizations are enabled. The defaults are exact."""

    fuse_lora: bool = True
    """Fuse the LoRA inside the adapter into the UNet; False keeps it as separate layers (PEFT)."""
    prune: bool = True
    """Skip branches that cannot change the guided result."""
    cache_kv: bool = True
    """Project keys and values of text and identity once per image; False: in every step."""
    compile: bool = False
    """Compile a step, and decoding, to one static graph per shape (torch.compile)."""
    cuda_graphs: bool = True
    """Replay compiled code as CUDA graphs; CUDA only."""
    autotune: bool = False
    """Compile slowly: measure several kernels for every product and keep the fastest."""
    fuse_qkv: bool = False
    """Project query, key and value of self-attention in one product."""
    channels_last: bool = False
    """Store convolution inputs channels-last, the layout of tensor cores."""
    vae: VaePrecision = "auto"
    """`auto`: the dtype of the other models, or float32 for a VAE that overflows in float16. `half`: bfloat16
    instead of float32, which is faster and rounds colors more coarsely. `float32`: always."""
    fp8: bool = False
    """Lossy: large linear layers of the UNet multiply in 8-bit floats, scaled by row (torchao, CUDA only)."""

    @classmethod
    def none(cls) -> Acceleration:
        """Every optimization disabled: the baseline of an ablation."""
        return cls(fuse_lora=False, prune=False, cache_kv=False, cuda_graphs=False)

    def describe(self) -> Mapping[str, Any]:
        """Every optimization and its value, for benchmark records."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def lossy(self) -> Mapping[str, Any]:
        """The enabled optimizations that cost precision beyond rounding, as image metadata records them."""
        enabled: dict[str, Any] = {"fp8": True} if self.fp8 else {}
        return enabled | ({"vae": self.vae} if self.vae == "half" else {})


DEFAULT = Acceleration()
LOSSY = ("fp8", "vae")
"""Names of the optimizations that can cost precision."""


def parse(changes: Iterable[str], base: Acceleration = DEFAULT) -> Acceleration:
    """Return `base` with some items changed, such as "channels_last=on" or "vae=half".

    Raises:
        UsageError: unknown item or value.
    """
    known, changed = DEFAULT.describe(), dict[str, Any]()
    for change in changes:
        name, _, text = change.partition("=")
        if name not in known:
            raise UsageError(f"--accelerate {name}: unknown item", f"items are {', '.join(known)}")
        choices = ("on", "off") if isinstance(known[name], bool) else get_args(VaePrecision)
        if text not in choices:
            raise UsageError(
                f"--accelerate {change}: {name} is one of {', '.join(choices)}",
                f"as in --accelerate {name}={choices[-1]}",
            )
        changed[name] = text == "on" if isinstance(known[name], bool) else text
    return replace(base, **changed)


SMALL = 512
"""Narrower linear layers are unchanged: quantizing their input costs more than it saves."""
FP8_CAPABILITY = (8, 9)
"""CUDA compute capability of the first cards that multiply 8-bit floats."""


def check(acceleration: Acceleration, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse optimizations that a device does not support, before any model is loaded.

    Raises:
        DeviceError: the device does not support fp8.
        UsageError: fp8 without bfloat16 or torchao; fuse_qkv with an unfused LoRA.
    """
    import importlib.util

    import torch

    if acceleration.fuse_qkv and not acceleration.fuse_lora:
        raise UsageError("fuse_qkv=on needs fuse_lora=on", "omit one of them")
    if not acceleration.fp8:
        return
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise DeviceError(f"{device} cannot multiply 8-bit floats", "omit --accelerate fp8=on")
    if dtype is not torch.bfloat16:
        raise UsageError("fp8=on requires bfloat16", "add --dtype bfloat16")
    if importlib.util.find_spec("torchao") is None:
        raise UsageError(
            "--accelerate fp8=on needs torchao", "install it: pip install 'fastface-cli[lowbit]'"
        )


def arrange(unet: torch.nn.Module, vae: torch.nn.Module, acceleration: Acceleration) -> None:
    """Apply the optimizations that change loaded models: precision, memory layout, fused projections."""
    import torch

    if acceleration.vae == "float32":
        vae.to(torch.float32)
    elif acceleration.vae == "half" and vae.dtype == torch.float32:
        vae.to(torch.bfloat16)
    if acceleration.fuse_qkv:
        _fuse_self_attention(unet)
    if acceleration.channels_last:
        for model in (unet, vae):
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if acceleration.fp8:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

        quantize_(unet, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), _is_large)


def _fuse_self_attention(unet: torch.nn.Module) -> None:
    """Fuse the projections of every self-attention layer, and free the separate ones."""
    from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0

    for name, layer in unet.named_modules():
        if name.endswith(".attn1") and isinstance(layer, Attention):
            layer.fuse_projections()
            layer.to_q = layer.to_k = layer.to_v = None
            layer.set_processor(FusedAttnProcessor2_0())


def _is_large(layer: torch.nn.Module, name: str) -> bool:
    """Return whether a layer is multiplied in 8 bits: those that run in every step, at every position."""
    import torch

    once = name.endswith(("attn2.to_k", "attn2.to_v")) or "_ip" in name
    return (
        isinstance(layer, torch.nn.Linear)
        and ".transformer_blocks." in name
        and not once
        and min(layer.in_features, layer.out_features) >= SMALL
    )
