"""Load one part at its published size; run as a program, so that its memory is freed afterwards.

Most files are sparse: a header without data, which reads as zeros. If every weight of the loaded model is
zero, every weight came from the file: a loader that misses a tensor would leave the ones of a norm or random
numbers. The LoRAs and the adapter contain random weights, so that their effect on zeros is visible.

    python full_size.py PART FOLDER    prints one JSON object
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from benchmarks import adapter_files
from benchmarks.published_files import (
    PT,
    TensorLayout,
    base_configs,
    lora_targets,
    part_layouts,
    safetensors_length,
    write,
    write_stack,
    write_tokenizer,
)
from fastface_cli.adapters.faceid_plusv2 import load_adapter
from fastface_cli.adapters.instantid import load_controlnet
from fastface_cli.adapters.plus_projection import load_plus
from fastface_cli.adapters.pulid import load_pulid
from fastface_cli.app import pipeline
from fastface_cli.benchmark.sdxl import PADS, PUBLISHED, config_text
from fastface_cli.identity.eva import FaceEncoder
from fastface_cli.models import loading
from fastface_cli.recipe.schema import Recipe
from support.original_names import original

HALF = torch.float16


def check(module: torch.nn.Module, layout: TensorLayout, dtype: torch.dtype) -> int:
    """Check that every parameter is loaded, on the CPU, of the right type and zero; return their number."""
    state = module.state_dict()
    published = {name.removeprefix("text_model."): shape for name, (shape, _) in layout.tensors.items()}
    published.pop("vision_model.embeddings.position_ids", None)
    loaded = {name.removeprefix("text_model."): tuple(tensor.shape) for name, tensor in state.items()}
    assert loaded == published
    for name, tensor in state.items():
        assert tensor.device.type == "cpu", name
        assert tensor.dtype is dtype, name
        assert not tensor.any(), f"{name} is not from the file"
    return sum(tensor.numel() for tensor in state.values())


def base(folder: Path) -> Path:
    return write_stack(folder, parts=["base"])["base"]


def shell(unet: torch.nn.Module) -> StableDiffusionXLPipeline:
    """A pipeline with a UNet and nothing else."""
    others = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    return StableDiffusionXLPipeline(**dict.fromkeys(others), unet=unet, add_watermarker=False)


def layout(part: str, name: str = "") -> TensorLayout:
    return next(layout for key, layout in part_layouts(part).items() if key.startswith(name))


def base_unet(folder: Path) -> dict[str, Any]:
    unet = loading.load_unet(base(folder), None, HALF)
    return {"parameters": check(unet, layout("base", "unet"), HALF)}


def turbo(folder: Path) -> dict[str, Any]:
    unet = loading.load_unet(base(folder), write_stack(folder, parts=["turbo"])["turbo"], HALF)
    return {"parameters": check(unet, layout("turbo"), HALF)}


def lightning(folder: Path) -> dict[str, Any]:
    unet = loading.load_unet(base(folder), write_stack(folder, parts=["lightning"])["lightning"], HALF)
    return {"parameters": check(unet, layout("lightning"), HALF)}


def text_encoders(folder: Path) -> dict[str, Any]:
    first, second, tokenizer, tokenizer_2 = loading.load_text_encoders(base(folder), HALF)
    assert len(tokenizer) == len(tokenizer_2) == 49408
    assert tokenizer("").input_ids == [49406, 49407]
    return {
        "parameters": check(first, layout("base", "text_encoder/"), HALF),
        "parameters_2": check(second, layout("base", "text_encoder_2"), HALF),
    }


def vaes(folder: Path) -> dict[str, Any]:
    paths = write_stack(folder, parts=["base", "vae"])
    own = loading.load_vae(paths["base"], None, HALF)
    check(own, layout("base", "vae"), torch.float32)  # it overflows in float16
    return {"parameters": check(loading.load_vae(paths["base"], paths["vae"], HALF), layout("vae"), HALF)}


def image_encoder(folder: Path) -> dict[str, Any]:
    path = write_stack(folder, parts=["image_encoder"])["image_encoder"]
    return {"parameters": check(loading.load_image_encoder(path, HALF), layout("image_encoder"), HALF)}


def distillation(part: str) -> Callable[[Path], dict[str, Any]]:
    def run(folder: Path) -> dict[str, Any]:
        path = write_stack(folder, parts=[part], fill="random")[part]
        pipe = shell(loading.load_unet(base(folder), None, HALF))
        loading.fuse_lora(pipe, path, 1.0)
        lora, state = load_file(path), pipe.unet.state_dict()
        targets = lora_targets(pipe.unet)
        assert len(lora) == 3 * len(targets)
        for name in targets:
            stem, weight = "lora_unet_" + name.replace(".", "_"), state.pop(f"{name}.weight")
            down, up = (lora[f"{stem}.lora_{half}.weight"].float() for half in ("down", "up"))
            expected = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
            expected *= float(lora[f"{stem}.alpha"]) / len(down)
            assert weight.dtype is HALF
            assert (weight.float() - expected).norm() < 2e-3 * expected.norm(), name
        assert not any(tensor.any() for tensor in state.values())
        return {"modules": len(targets)}

    return run


def adapter(folder: Path) -> dict[str, Any]:
    path = write_stack(folder, parts=["adapter"], fill="random")["adapter"]
    pipe = shell(loading.load_unet(base(folder), None, HALF))
    projection = load_adapter(pipe, path, 0.8)
    file = torch.load(path, weights_only=True, mmap=True)
    state = pipe.unet.state_dict()
    layers = [name.removesuffix(".processor") for name in pipe.unet.attn_processors]
    fused = own = 0
    for index, layer in enumerate(layers):
        for role, module in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0")):
            weight = state.pop(f"{layer}.{module}.weight")
            up, down = (
                file["ip_adapter"].pop(f"{index}.to_{role}_lora.{half}.weight") for half in ("up", "down")
            )
            expected = 0.8 * (up.float() @ down.float())
            assert (weight.float() - expected).norm() < 2e-3 * expected.norm(), layer
            fused += 1
        for role in ("k", "v"):
            published = file["ip_adapter"].pop(f"{index}.to_{role}_ip.weight", None)
            if published is not None:
                assert torch.equal(state.pop(f"{layer}.processor.to_{role}_ip.0.weight"), published)
                own += 1
    assert not file["ip_adapter"]
    assert not any(tensor.any() for tensor in state.values())
    numbers = sum(tensor.numel() for tensor in file["image_proj"].values())
    assert sum(tensor.numel() for tensor in projection.state_dict().values()) == numbers
    assert {tensor.dtype for tensor in projection.state_dict().values()} == {HALF}
    return {"fused": fused, "own": own}


def single_file(folder: Path) -> dict[str, Any]:
    """Load a complete checkpoint in the original layout, configured by a folder without weights."""
    parts = part_layouts("base")
    state = {
        name.split("/")[0]: {
            key: torch.empty(shape, dtype=dtype, device="meta")
            for key, (shape, dtype) in layout.tensors.items()
        }
        for name, layout in parts.items()
    }
    names = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in original(**state).items()}
    path = write(folder / "model.safetensors", TensorLayout(names, PT))
    for name, config in base_configs(PUBLISHED).items():
        (folder / "config" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "config" / name).write_text(config_text(config))
    for name, pad in PADS.items():
        write_tokenizer(folder / "config" / name, 49408, pad)
    pipe = loading.load_single_file(path, folder / "config", HALF)
    vae = pipe.vae.dtype
    return {
        "bytes": safetensors_length(TensorLayout(names)),
        "parameters": check(pipe.unet, layout("base", "unet"), HALF),
        "text_encoder": check(pipe.text_encoder, layout("base", "text_encoder/"), HALF),
        "text_encoder_2": check(pipe.text_encoder_2, layout("base", "text_encoder_2"), HALF),
        "vae": check(pipe.vae, layout("base", "vae"), vae),
    }


def complete(folder: Path) -> dict[str, Any]:
    """Load everything that `hyper` with four steps requires; only the sampling loop is not run."""
    recipe = Recipe.model_validate(
        {
            "name": "test",
            "model": {
                **{
                    role: role for role in ("base", "distillation", "vae", "adapter", "image_encoder", "face")
                },
                "scheduler": {"kind": "ddim", "spacing": "trailing"},
            },
        }
    )
    paths = write_stack(folder, parts=["base", "hyper", "vae", "adapter", "image_encoder"])
    paths["distillation"] = paths.pop("hyper")
    loaded = pipeline.Pipeline.load(recipe, paths, device="cpu", dtype="float16")
    text, pooled = loaded.backbone.encode_prompt("an astronaut")
    assert text.shape == (77, 2048)
    assert pooled.shape == (1280,)
    assert loaded.backbone.latent_scale == 8
    models = (loaded.unet, loaded.vae, loaded.projection, loaded.parts.image_encoder)
    assert {parameter.dtype for model in models for parameter in model.parameters()} == {HALF}
    own = sum(".processor.to_" in name for name, _ in loaded.unet.named_parameters())
    return {"own": own, "branches": [len(step.branches) for step in loaded.plan()]}


def plus_face(folder: Path) -> dict[str, Any]:
    """plus-face through diffusers' reader: projection and keys and values come from the file."""
    path = write(folder / "plus-face.safetensors", adapter_files.plus_face_layout())
    pipe = shell(loading.load_unet(base(folder), None, HALF))
    projection = load_plus(pipe, path, 0.0)
    return {"projection": zeros(projection), "own": zeros_of_processors(pipe.unet)}


def pulid(version: str, layout: TensorLayout) -> Callable[[Path], dict[str, Any]]:
    def run(folder: Path) -> dict[str, Any]:
        path = write(folder / f"pulid_{version}.safetensors", layout)
        pipe = shell(loading.load_unet(base(folder), None, HALF))
        encoder = load_pulid(pipe, path, 0.0)
        return {"projection": zeros(encoder), "own": zeros_of_processors(pipe.unet)}

    return run


def controlnet(folder: Path) -> dict[str, Any]:
    unet = loading.load_unet(base(folder), None, HALF)
    layout = adapter_files.controlnet_layout()
    write(folder / "controlnet" / "diffusion_pytorch_model.safetensors", layout)
    config = {"_class_name": "ControlNetModel", **adapter_files.CONTROLNET}
    (folder / "controlnet" / "config.json").write_text(json.dumps(config))
    loaded = load_controlnet({"controlnet": folder / "controlnet"}, HALF, unet)["controlnet"]
    return {"parameters": check(loaded, layout, HALF)}


def eva(folder: Path) -> dict[str, Any]:
    """The image tower in float32, and one forward pass: of zeros, but of the right shapes."""
    path = write(folder / "open_clip_model.safetensors", adapter_files.eva_layout())
    encoder = FaceEncoder(path)
    embedding, hidden = encoder.encode(np.zeros((512, 512, 3), np.float32))
    return {
        "parameters": zeros(encoder.tower),
        "embedding": list(embedding.shape),
        "hidden": list(hidden.shape),
    }


def zeros(module: torch.nn.Module) -> int:
    """Check that every parameter of a module is from the sparse file; return their number."""
    for name, tensor in module.state_dict().items():
        assert not tensor.any(), f"{name} is not from the file"
    return sum(tensor.numel() for tensor in module.state_dict().values())


def zeros_of_processors(unet: Any) -> int:
    """The number of projections of the identity in the UNet, all from the file."""
    own = [tensor for name, tensor in unet.named_parameters() if ".processor.to_" in name]
    assert not any(tensor.any() for tensor in own)
    return len(own)


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "base_unet": base_unet,
    "turbo": turbo,
    "lightning": lightning,
    "text_encoders": text_encoders,
    "vaes": vaes,
    "image_encoder": image_encoder,
    "hyper": distillation("hyper"),
    "lcm": distillation("lcm"),
    "adapter": adapter,
    "single_file": single_file,
    "complete": complete,
    "plus_face": plus_face,
    "controlnet": controlnet,
    "pulid_v1": pulid("v1", adapter_files.pulid_v1_layout()),
    "pulid_v1.1": pulid("v1.1", adapter_files.pulid_v11_layout()),
    "eva": eva,
}


if __name__ == "__main__":
    measured = CASES[sys.argv[1]](Path(sys.argv[2]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({**measured, "peak_gib": round(peak, 2)}))
