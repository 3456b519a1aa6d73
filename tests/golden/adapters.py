"""Run every golden case of InstantID or PuLID through the public session, and report the largest error.

python tests/golden/adapters.py --stack DIR --adapter DIR --out DIR

--stack is a folder with `pipe/`; --adapter a folder with the files and cases of one adapter. Prints one JSON
line for each case, and writes OUT/NAME.safetensors with `latents` [steps, 1, 4, h, w].
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastface_cli.app.events import StepFinished
from fastface_cli.app.request import GenerateRequest
from fastface_cli.app.runtime import Runtime
from fastface_cli.app.session import Session
from fastface_cli.identity.identity import Identity
from fastface_cli.recipe.schema import Recipe

SCHEDULERS: dict[str, dict[str, str]] = {
    "base": {"kind": "euler"},
    "lightning": {"kind": "euler", "spacing": "trailing"},
    "hyper": {"kind": "ddim", "spacing": "trailing"},
    "lcm": {"kind": "lcm"},
}
PULID_FILES = {"v1": "pulid_v1.bin", "v1.1": "pulid_v1.1.safetensors"}
RUNTIME = Runtime(device="cpu", dtype="float32")
ORTHOGONAL = {"off": "off", "v1": "ortho", "v2": "ortho_v2"}


@dataclass(frozen=True)
class Case:
    """One golden case."""

    name: str
    recipe: Recipe
    config: dict[str, Any]
    expected: dict[str, Tensor]


def cases(stack: Path, adapter: Path) -> Iterator[Case]:
    """The cases of an adapter folder, as recipes."""
    for path in sorted((adapter / "cases").glob("*.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        recipe = Recipe.model_validate_json(json.dumps(recipe_of(path.stem, config, stack, adapter)))
        yield Case(path.stem, recipe, config, load_file(path.with_suffix(".safetensors")))


def recipe_of(name: str, config: dict[str, Any], stack: Path, adapter: Path) -> dict[str, Any]:
    """The recipe of a case, as plain data."""
    model: dict[str, Any] = {
        "base": str(stack / "pipe"),
        "face": "pocket-face",
        "scheduler": SCHEDULERS[config["scheduler"]],
    }
    if "version" in config:
        version = config["version"]
        model["adapter"] = str(adapter / PULID_FILES[version])
        strength: dict[str, Any] = {
            "kind": f"pulid_{version}",
            "scale": config["id_scale"],
            "zero_tokens": config["num_zero"],
            "orthogonal": ORTHOGONAL[config["ortho"]],
        }
    else:
        model |= {
            "adapter": str(adapter / "ip-adapter.bin"),
            "controlnet": str(adapter / "controlnet"),
        }
        strength = {
            "kind": "instantid",
            "scale": config["ip_adapter_scale"],
            "controlnet_scale": config["controlnet_scale"],
        }
    weights = (
        {"identity": config["guidance_scale"], "text": config["guidance_scale"]}
        if config["mode"] == "cfg"
        else {"identity": config["a"], "text": config["b"]}
    )
    return {
        "name": name,
        "model": model,
        "sampling": {"steps": config["steps"], "width": config["size"], "height": config["size"]},
        "adapter": strength,
        "guidance": {
            "order": "identity_first",
            **{
                key: [float(number) for number in value] if isinstance(value, list) else float(value)
                for key, value in weights.items()
            },
        },
    }


def identity_of(adapter: Path) -> Identity:
    """The person of an adapter folder."""
    tensors = {name: tensor.numpy() for name, tensor in load_file(adapter / "identity.safetensors").items()}
    embedding = tensors["embedding"].astype(np.float32)
    norm = np.linalg.norm(embedding.astype(np.float64), axis=1)
    n = len(embedding)
    features: dict[str, np.ndarray] = {"embedding_norm": norm.astype(np.float32)}
    if "kps" in tensors:
        height, width = tensors["kps_image"].shape[:2]
        features["key_points"] = tensors["kps"][None].astype(np.float32)
        features["photo_size"] = np.array([[width, height]], np.float32)
    if "vit_embedding" in tensors:
        features["eva_embedding"] = tensors["vit_embedding"].astype(np.float32)
        hidden = [tensors[f"vit_hidden.{level}"] for level in range(5)]
        features["eva_hidden"] = np.stack(hidden, axis=1).astype(np.float32)
    unit = (embedding / norm[:, None]).astype(np.float32)
    return Identity(unit, np.zeros((n, 224, 224, 3), np.uint8), np.ones(n, np.float32), features)


def run(case: Case, identity: Identity, runtime: Runtime = RUNTIME) -> Tensor:
    """The latents after each step, [steps, 1, 4, h, w]."""
    request = GenerateRequest(
        prompts=(case.config["prompt"],),
        negative_prompt=case.config["negative_prompt"],
        seed=case.config["seed"],
        output=None,
    )
    latents: list[Tensor] = []
    with Session(case.recipe, runtime, fused_cache=False) as session:
        for event in session.run(request, identity=identity):
            if isinstance(event, StepFinished):
                latents.append(event.latents.detach().cpu().clone())
    return torch.stack(latents)


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest relative L2 error over the steps."""
    errors = [
        float((ours - other).norm() / other.norm()) for ours, other in zip(actual, expected, strict=True)
    ]
    return max(errors)


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("stack", "adapter", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    identity = identity_of(arguments.adapter)
    for case in cases(arguments.stack.absolute(), arguments.adapter.absolute()):
        latents = run(case, identity)
        save_file({"latents": latents}, arguments.out / f"{case.name}.safetensors")
        print(json.dumps({"case": case.name, "error": error(latents, case.expected["latents"])}), flush=True)


if __name__ == "__main__":
    main()
