"""Layers over a recipe: overrides, a local stack, and the paths and keys of model parts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import RecipeError, UsageError
from .tree import MAX_DEPTH, Key, Mark, Node, Plain, mapping, mark_tree, merge, read_yaml

_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".onnx", ".zip")
_BASE, _BASE_UNET = "sdxl-base", "sdxl-base-unet"
_LISTS = (("attention", "transforms"), ("model", "loras"))


def stack_layer(folder: Path) -> Node:
    """Return the model parts of a local stack as a layer over a recipe.

    Args:
        folder: contains `pipe/` (a diffusers SDXL folder), `clip/` (image encoder), `faceid_plusv2.bin`,
            and optionally `face/`, a face pack.

    Raises:
        UsageError: a part is missing.
    """
    mark = Mark("--stack", f"--stack {folder}")
    if not folder.is_dir():
        raise UsageError(f"{mark.where}: there is no such folder")
    folder = Path(os.path.abspath(folder))
    parts = {
        "base": folder / "pipe",
        "image_encoder": folder / "clip",
        "adapter": folder / "faceid_plusv2.bin",
    }
    missing = [
        part.name
        for role, part in parts.items()
        if not (part.is_file() if role == "adapter" else part.is_dir())
    ]
    if missing:
        raise UsageError(
            f"{mark.where}: lacks {' and '.join(missing)}",
            "a stack contains pipe/ (diffusers SDXL), clip/ (image encoder) and faceid_plusv2.bin",
        )
    if (folder / "face").is_dir():
        parts["face"] = folder / "face"
    model: dict[Key, Plain] = {role: str(part) for role, part in parts.items()}
    model |= {"unet": None, "distillation": None, "loras": [], "vae": None, "scheduler": {"config": None}}
    return mark_tree({"model": model}, mark)


def apply_override(tree: Node, override: str) -> Node:
    """Apply one `--set field=VALUE`."""
    field, equals, text = override.partition("=")
    field = field.strip()
    mark = Mark("--set", f"--set {override if len(override) <= 80 else override[:77] + '...'}")
    if not equals or not all(field.split(".")):
        raise RecipeError(f"{mark.where}: must be field=VALUE", "for example --set guidance.text=[1,2,2,1]")
    if field.count(".") > MAX_DEPTH:
        raise RecipeError(f"{mark.where}: is nested too deeply")
    if field == "extends":
        raise RecipeError(f"{mark.where}: 'extends' is only supported in a file")
    return set_field(tree, field.split("."), read_yaml(text, "--set", mark))


def set_field(tree: Node, path: Sequence[str], value: Node, parents: tuple[str, ...] = ()) -> Node:
    """Merge `value` into `tree` at `path`, which may contain list indices."""
    if not path:
        return merge(tree, value)
    part, rest = path[0], path[1:]
    position = (*parents, part)
    if isinstance(tree.value, str) and parents[:-1] == ("attention", "transforms"):
        tree = Node({"kind": tree}, tree.mark)  # `power` is short for `{kind: power}`
    if isinstance(tree.value, list) and (part.isdecimal() or parents in _LISTS):
        index = int(part) if part.isdecimal() and len(part) < 6 else -1
        item = tree.child(index)
        if item is None:
            raise RecipeError(
                f"{value.mark.where}: field {'.'.join(position)}: "
                f"{'.'.join(parents)} has {len(tree.value)} entries",
                "entries are counted from 0; set the complete list to add one",
            )
        items = list(tree.value)
        items[index] = set_field(item, rest, value, position)
        return Node(items, tree.mark)
    entries = dict(tree.value) if isinstance(tree.value, dict) else {}
    key: Key = int(part) if _is_by_step(parents) and part.isdecimal() and len(part) < 6 else part
    below = entries.get(key, Node(None, value.mark))
    entries[key] = set_field(below, rest, value, position)
    return Node(entries, tree.mark if isinstance(tree.value, dict) else value.mark)


def _is_by_step(path: Sequence[Key]) -> bool:
    return tuple(path) in (("model", "unet"), ("model", "distillation"))


def numeric_step_counts(tree: Node) -> Node:
    """Convert step counts that are text (JSON keys, quoted YAML keys) to numbers."""
    model = tree.child("model")
    if model is None or not isinstance(model.value, dict):
        return tree
    entries = dict(model.value)
    for name in ("unet", "distillation"):
        part = entries.get(name)
        if part is not None and isinstance(part.value, dict):
            counts = {
                int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 6 else key: value
                for key, value in part.value.items()
            }
            entries[name] = Node(counts, part.mark)
    return Node({**mapping(tree), "model": Node(entries, model.mark)}, tree.mark)


def drop_sdxl_unet(tree: Node) -> Node:
    """Remove the separate SDXL 1.0 UNet of a shipped recipe if the base is another model."""
    base, unet = (tree.child("model") or tree).child("base"), (tree.child("model") or tree).child("unet")
    if base is None or unet is None or base.value == _BASE or unet.value != _BASE_UNET:
        return tree
    if not unet.mark.origin.startswith("recipes/models/"):
        return tree
    return merge(tree, Node({"model": Node({"unet": Node(None, base.mark)}, base.mark)}, tree.mark))


def absolute_paths(tree: Node, folder: Path) -> Node:
    """Make the paths of model parts absolute; in a file they are relative to that file."""
    model = tree.child("model")
    if model is None or not isinstance(model.value, dict):
        return tree
    return Node({**mapping(tree), "model": _anchored(model, folder)}, tree.mark)


def _anchored(node: Node, folder: Path) -> Node:
    value = node.value
    if isinstance(value, dict):
        if "repo" in value:
            return node
        return Node({key: _anchored(child, folder) for key, child in value.items()}, node.mark)
    if isinstance(value, list):
        return Node([_anchored(child, folder) for child in value], node.mark)
    if isinstance(value, str) and _is_path(value):
        # Absolute, so that it cannot be mistaken for the name of an artifact.
        return Node(os.path.abspath(folder / os.path.expanduser(value)), node.mark)
    return node


def _is_path(reference: str) -> bool:
    if reference.startswith("hub:"):
        return False
    return reference.startswith(("./", "../", "~", "/")) or reference.lower().endswith(_WEIGHTS)
