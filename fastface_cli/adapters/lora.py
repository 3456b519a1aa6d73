"""Fuse LoRA files into loaded models."""

from __future__ import annotations

from pathlib import Path

from diffusers import StableDiffusionXLPipeline

from ..quiet import loading_errors

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


def fuse_lora(pipe: StableDiffusionXLPipeline, file: Path, scale: float) -> set[str]:
    """Load a LoRA file and fuse it into the UNet (and text encoders, if it has parts for them).

    Returns:
        Names of the models that it changed.
    """
    with loading_errors("LoRA", file):
        pipe.load_lora_weights(
            file.parent, weight_name=file.name, adapter_name="fastface", local_files_only=True
        )
        return fuse_loaded(pipe, "fastface", scale)


def fuse_loaded(pipe: StableDiffusionXLPipeline, adapter: str, scale: float) -> set[str]:
    """Fuse a LoRA that diffusers has loaded as `adapter`; return the names of the changed models."""
    changed = [
        name
        for name in ("unet", *TEXT_ENCODERS)
        if adapter in getattr(getattr(pipe, name), "peft_config", {})
    ]
    if not changed:
        raise ValueError("no tensor of it fits this model")
    pipe.fuse_lora(components=changed, lora_scale=scale, adapter_names=[adapter])
    pipe.unload_lora_weights()
    return set(changed)
