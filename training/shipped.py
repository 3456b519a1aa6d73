"""Convert the shipped weights to checkpoints, to continue their training.

``python -m training.shipped --work DIR --portraits ...`` writes the checkpoints of all stages to an empty
work folder, so that one stage can be continued with its usual command. The files have half precision and no
optimizer state, so the time budget and the learning rate of the stage start from the beginning. The detector
has no checkpoint: export keeps its file.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from benchmarks.published_files import LORA_TARGETS
from training import adapter, clip, lora, low_rank, recognizer, unet, vae
from training.common import Ema, options
from training.export import ADAPTER, LORA, TARGET


def keep(path: Path, module: nn.Module) -> None:
    """Write a module as a checkpoint at step 0, unless the checkpoint exists."""
    if path.exists():
        print(f"{path.name} exists and is kept")
        return
    state = {"model": module.state_dict(), "ema": Ema(module).state_dict(), "step": 0, "seconds": 0.0}
    torch.save(state, path)
    print(f"{path.name}: written")


def floats(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file in float32."""
    return {name: value.float() for name, value in load_file(path).items()}


def module_name(output: str) -> str:
    """Return ``stages.0.1.body.2`` for ``/stages.0/stages.0.1/body/body.2/Conv_output_0``."""
    name = previous = ""
    for scope in output.strip("/").split("/")[:-1]:
        name += scope[len(previous) :] if previous and scope.startswith(previous + ".") else f".{scope}"
        previous = scope
    return name.strip(".")


def read_recognizer(path: Path) -> recognizer.Recognizer:
    """Return the network of an exported recognizer, for use with frozen weights.

    Export fused each batch normalization into its convolution and factorized the last layer; here the
    normalizations contain only the biases, and the last layer is multiplied out again.
    """
    graph = onnx.load(str(path)).graph
    tensors = {
        tensor.name.removesuffix("_half"): torch.from_numpy(
            np.array(numpy_helper.to_array(tensor), np.float32)
        )
        for tensor in graph.initializer
    }
    network = recognizer.Recognizer()
    state: dict[str, Tensor] = {"frame": network.frame}
    narrow = torch.zeros(0)
    for node in graph.node:
        values = [tensors[name] for name in node.input if name in tensors]
        name = module_name(node.output[0])
        if node.op_type == "Conv":
            stem, _, number = name.rpartition(".")
            norm = f"{stem}.{int(number) + 1}"
            weight, bias = values
            state[f"{name}.weight"] = weight
            state[f"{norm}.bias"] = bias
            state[f"{norm}.weight"] = torch.ones_like(bias)
            state[f"{norm}.running_mean"] = torch.zeros_like(bias)
            state[f"{norm}.running_var"] = torch.full_like(bias, 1 - nn.BatchNorm2d(1).eps)
            state[f"{norm}.num_batches_tracked"] = torch.tensor(0)
        elif node.op_type == "PRelu":
            state[f"{name}.weight"] = values[0].flatten()
        elif name == "head.0":
            narrow = values[0]
        elif name == "head.1" and node.op_type == "Gemm":
            state["head.weight"], state["head.bias"] = values[0] @ narrow.T, values[1]
    network.load_state_dict(state, strict=True)
    return network.eval()


def read_lora(path: Path, size: int) -> low_rank.Additions:
    """Return the distillation LoRA of a file."""
    tensors = floats(path)
    additions = low_rank.Additions(low_rank.inject(unet.build(size), LORA_TARGETS, lora.RANK))
    for name, down, up in zip(additions.names, additions.downs, additions.ups, strict=True):
        for half, key in ((down, "lora_down"), (up, "lora_up")):
            weight: Any = half.weight
            weight.data.copy_(tensors[f"{lora.kohya_name(name)}.{key}.weight"])
    return additions


def read_adapter(path: Path, size: int) -> adapter.Adapter:
    """Return the identity adapter of a file."""
    published = torch.load(path, map_location="cpu", weights_only=True)
    identity = adapter.Adapter(unet.build(size))
    for part, table in identity.parameters_by_key().items():
        for key, parameters in table.items():
            rows = [len(parameter) for parameter in parameters]
            for parameter, value in zip(parameters, published[part][key].float().split(rows), strict=True):
                parameter.data.copy_(value)
    return identity


def main() -> None:
    """Write all missing checkpoints."""
    settings = options("shipped", 0)
    work, size = settings.work, settings.size
    words = CLIPTokenizer.from_pretrained(TARGET / "pipe" / "tokenizer")
    if not (work / "tokenizer").exists():
        shutil.copytree(TARGET / "pipe" / "tokenizer", work / "tokenizer")
    towers = clip.Clip(len(words))
    for tower, file in (
        (towers.text_1, "pipe/text_encoder/model.fp16.safetensors"),
        (towers.text_2, "pipe/text_encoder_2/model.fp16.safetensors"),
        (towers.vision, "clip/model.safetensors"),
    ):
        tower.load_state_dict(floats(TARGET / file), strict=True)
    keep(work / "clip.pt", towers)
    keep(work / "recognizer.pt", read_recognizer(TARGET / "face" / "rec_pocket.onnx"))
    autoencoder = vae.build(size)
    autoencoder.load_state_dict(
        floats(TARGET / "pipe/vae/diffusion_pytorch_model.fp16.safetensors"), strict=True
    )
    keep(work / "vae.pt", autoencoder)
    # The shipped latents are already whitened.
    torch.save({"mean": torch.zeros(4), "std": torch.ones(4)}, work / "latent_statistics.pt")
    base = unet.build(size)
    base.load_state_dict(floats(TARGET / "pipe/unet/diffusion_pytorch_model.fp16.safetensors"), strict=True)
    keep(work / "unet.pt", base)
    keep(work / "lora.pt", read_lora(TARGET / LORA, size))
    keep(work / "adapter.pt", read_adapter(TARGET / ADAPTER, size))


if __name__ == "__main__":
    main()
