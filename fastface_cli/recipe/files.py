"""Recipes as files: look up, extend, override, validate, and say where each value came from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml

from ..errors import RecipeError, UsageError, nearest
from .tree import Key, Mark, Node, Plain, mapping, mark_tree, merge, read_json, read_text, read_yaml

if TYPE_CHECKING:
    from .schema import Recipe

Flag: TypeAlias = tuple[Any, str]
"""A value from the command line and the flag that gave it: `(8, "--steps")`."""

DEFAULT = "default"
"""Origin of a value that nobody wrote."""

MODELS = ("hyper", "lightning", "lcm", "turbo", "base", "pocket")
"""Rows of the stack table: the files of `recipes/models`."""

SHORT_NAMES = {model: f"{model}-fastface" for model in MODELS if model != "base"}
"""A bare model name means its published method."""

_YAML, _JSON = (".yaml", ".yml"), (".json",)
_NAME = re.compile(r"[A-Za-z0-9][\w-]*(/[A-Za-z0-9][\w-]*)*")
_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".onnx", ".zip")
_BARE = re.compile(r"[A-Za-z][\w/.-]*")
_RESERVED = ("yes", "no", "on", "off", "true", "false", "null", "y", "n")
_BASE, _BASE_UNET = "sdxl-base", "sdxl-base-unet"
_SECTIONS = ("model", "sampling", "adapter", "guidance", "attention")
_LISTS = (("attention", "transforms"), ("model", "loras"))
_MAX_CHAIN = 16


@dataclass(frozen=True, slots=True)
class Resolved:
    """A recipe, and for each of its dotted fields where the value came from."""

    recipe: Recipe
    origins: dict[str, str]
    """`recipes/models/hyper.yaml:12`, `--set`, `--steps`, `--stack` or `default`."""


@dataclass(frozen=True, slots=True)
class RecipeInfo:
    """One line of `fastface recipes list`."""

    name: str
    summary: str
    short: str | None
    """The short name, where there is one."""
    path: Path


def recipes_folder() -> Path:
    """The shipped recipes: inside the package when installed, else at the top of the checkout."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the shipped recipes and their short names; reads no file (for shell completion)."""
    found = {path.stem for path in recipes_folder().glob("*.yaml")}
    return sorted(found | {short for short, name in SHORT_NAMES.items() if name in found})


def list_recipes() -> list[RecipeInfo]:
    """The shipped recipes, sorted by name."""
    shorts = {name: short for short, name in SHORT_NAMES.items()}
    found = []
    for path in sorted(recipes_folder().glob("*.yaml")):
        tree = _read(path)
        summary = mapping(tree).get("summary")
        found.append(
            RecipeInfo(path.stem, str(summary.value) if summary else "", shorts.get(path.stem), path)
        )
    return found


def find_recipe(name_or_path: str | Path) -> Path:
    """The file of a shipped recipe, by name, or of the user's own, by path.

    Raises:
        RecipeError: there is none; the hint names the nearest recipe.
    """
    name_or_path = str(name_or_path)
    if name_or_path.endswith((*_YAML, *_JSON)):
        return Path(os.path.expanduser(name_or_path))
    shipped = _shipped(name_or_path)
    if shipped is not None:
        return shipped
    path = Path(os.path.expanduser(name_or_path))
    if _is_file(path):
        return path
    near = nearest(name_or_path, recipe_names())
    raise RecipeError(
        f"there is no recipe '{name_or_path[:200]}'",
        f"did you mean '{near}'?" if near else "`fastface recipes list` names them all",
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _shipped(name: str) -> Path | None:
    if not _NAME.fullmatch(name):
        return None
    path = recipes_folder() / f"{SHORT_NAMES.get(name, name)}.yaml"
    return path if _is_file(path) else None


def load_recipe(
    name_or_path: str | Path,
    *,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Flag] | None = None,
    stack: Path | None = None,
) -> Resolved:
    """Read, merge and validate a recipe.

    Later wins: what the file extends, the file, `stack`, `flags`, `overrides` in their order.

    Args:
        name_or_path: a shipped recipe (`hyper-fastface`, short `hyper`), a YAML file, or a JSON
            configuration of the published code.
        overrides: `--set` arguments, `field=VALUE` with VALUE in YAML.
        flags: dotted field -> value and the flag it came from, as `{"sampling.steps": (8, "--steps")}`.
        stack: folder with a local stack (`pipe/`, `clip/`, `faceid_plusv2.bin`) in place of the recipe's.

    Raises:
        RecipeError: anything wrong with the recipe, naming file, line and field.
        UsageError: `stack` lacks a part.
    """
    path = find_recipe(name_or_path)
    return _resolve(_load(path, (), {}), path.stem, overrides, flags, stack)


def load_recipe_data(
    data: Mapping[str, Any],
    source: str,
    *,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Flag] | None = None,
    stack: Path | None = None,
) -> Resolved:
    """Like `load_recipe`, from the plain data of `Recipe.canonical` (the metadata of a picture).

    Args:
        data: a recipe as plain data.
        source: how origins and errors name it.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(f"{source}: a recipe must be a mapping")
    return _resolve(mark_tree(dict(data), Mark.at(source)), source, overrides, flags, stack)


def _resolve(
    tree: Node,
    name: str,
    overrides: Sequence[str],
    flags: Mapping[str, Flag] | None,
    stack: Path | None,
) -> Resolved:
    if mapping(tree).get("name") is None:
        tree = merge(tree, Node({"name": Node(name, tree.mark)}, tree.mark))
    if stack is not None:
        tree = merge(tree, stack_layer(stack))
    for field, (value, flag) in (flags or {}).items():
        tree = _set(tree, field.split("."), mark_tree(value, Mark(flag, flag)))
    for override in overrides:
        tree = _override(tree, override)
    tree = _with_own_unet(tree)
    recipe = validate(tree)
    return Resolved(recipe, dict(_origins(recipe.canonical(), tree, "")))


def _with_own_unet(tree: Node) -> Node:
    """Another base brings its own UNet, where a shipped recipe names the one of SDXL 1.0 as a file apart."""
    base, unet = (tree.child("model") or tree).child("base"), (tree.child("model") or tree).child("unet")
    if base is None or unet is None or base.value == _BASE or unet.value != _BASE_UNET:
        return tree
    if not unet.mark.origin.startswith("recipes/models/"):
        return tree
    return merge(tree, Node({"model": Node({"unet": Node(None, base.mark)}, base.mark)}, tree.mark))


def validate(tree: Node) -> Recipe:
    """A merged tree -> the recipe.

    Raises:
        RecipeError: the first few problems, one a line, each with file, line and field.
    """
    from pydantic import ValidationError

    from .problems import problems_of, to_error
    from .schema import Recipe

    tree = _counts_as_numbers(tree)
    try:
        return Recipe.model_validate(tree.plain())
    except ValidationError as error:
        raise to_error(problems_of(error, tree)) from error


def _load(path: Path, chain: tuple[str, ...], known: dict[str, Node]) -> Node:
    """The merged tree of a file and of all that it extends, without `extends`.

    Args:
        path: the file.
        chain: real paths of the files that extend it, outermost first.
        known: merged trees by real path, so that no file is read twice.
    """
    tree = _read(path)
    entries = dict(mapping(tree))
    extends = entries.pop("extends", None)
    for name in _SECTIONS:
        # A section whose every line is commented out reads as null; it says nothing.
        if name in entries and entries[name].value is None:
            del entries[name]
    own = _local_paths(Node(entries, tree.mark), path.parent)
    chain = (*chain, os.path.realpath(path))
    merged: Node | None = None
    for mark, parent in _parents(extends, path):
        real = os.path.realpath(parent)
        if real in chain:
            raise RecipeError(f"{mark.where}: field extends: {_shown(parent)} extends this file in turn")
        if len(chain) > _MAX_CHAIN:
            raise RecipeError(f"{mark.where}: field extends: too many files, one after the other")
        if real not in known:
            known[real] = _load(parent, chain, known)
        inherited = dict(mapping(known[real]))
        for own_alone in ("name", "summary"):
            inherited.pop(own_alone, None)
        merged = merge(merged, Node(inherited, tree.mark))
    return merge(merged, own)


def _read(path: Path) -> Node:
    shown = _shown(path)
    text = read_text(path, shown)
    if path.suffix.lower() not in _JSON:
        tree = read_yaml(text, shown)
        if tree.value is None:
            raise RecipeError(f"{shown}: is empty")
        if not isinstance(tree.value, dict):
            raise RecipeError(f"{tree.mark.where}: a recipe must be a mapping of 'name: value' entries")
        return tree
    tree = read_json(text, shown)
    if not isinstance(tree.value, dict):
        raise RecipeError(f"{tree.mark.where}: a configuration must be a JSON object")
    if "model" in tree.value or "extends" in tree.value:
        return tree
    from .published import convert

    return convert(tree)


def _shown(path: Path) -> str:
    """Shipped files by their place among the recipes, others as the user wrote them."""
    folder = recipes_folder()
    if path.is_relative_to(folder):
        return f"recipes/{path.relative_to(folder).as_posix()}"
    return str(path)


def _parents(extends: Node | None, path: Path) -> Iterator[tuple[Mark, Path]]:
    if extends is None or extends.value is None:
        return
    for item in extends.value if isinstance(extends.value, list) else [extends]:
        name = item.value
        if not isinstance(name, str) or not name.isprintable() or not name:
            raise RecipeError(
                f"{item.mark.where}: field extends: must be a recipe's name or path, or a list of them"
            )
        if name.endswith((*_YAML, *_JSON)):
            parent = path.parent / os.path.expanduser(name)
            if not _is_file(parent):
                raise RecipeError(f"{item.mark.where}: field extends: there is no recipe file {parent}")
            yield item.mark, parent
            continue
        shipped = _shipped(name)
        if shipped is None:
            parts = [f"{part}/{file.stem}" for part in ("models", "methods") for file in _part(part)]
            near = nearest(name, [*recipe_names(), *parts])
            hint = (
                f"did you mean '{near}'?"
                if near
                else "a path ends in .yaml; `fastface recipes list` has names"
            )
            raise RecipeError(f"{item.mark.where}: field extends: there is no recipe '{name}'", hint)
        yield item.mark, shipped


def _part(name: str) -> list[Path]:
    return sorted((recipes_folder() / name).glob("*.yaml"))


def stack_layer(folder: Path) -> Node:
    """The model parts of a local stack as a layer over a recipe.

    Args:
        folder: holds `pipe/` (a diffusers SDXL folder), `clip/` (image encoder), `faceid_plusv2.bin`,
            and `face/` where there is an own face pack.

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
            "a stack holds pipe/ (diffusers SDXL), clip/ (image encoder) and faceid_plusv2.bin",
        )
    if (folder / "face").is_dir():
        parts["face"] = folder / "face"
    model: dict[Key, Plain] = {role: str(part) for role, part in parts.items()}
    model |= {"unet": None, "distillation": None, "loras": [], "vae": None, "scheduler": {"config": None}}
    return mark_tree({"model": model}, mark)


def _override(tree: Node, override: str) -> Node:
    """Apply one `--set field=VALUE`."""
    field, equals, text = override.partition("=")
    field = field.strip()
    mark = Mark("--set", f"--set {override if len(override) <= 80 else override[:77] + '...'}")
    if not equals or not all(field.split(".")):
        raise RecipeError(f"{mark.where}: must be field=VALUE", "for example --set guidance.text=[1,2,2,1]")
    if field == "extends":
        raise RecipeError(f"{mark.where}: 'extends' stands in a file only")
    return _set(tree, field.split("."), read_yaml(text, "--set", mark))


def _set(tree: Node, path: Sequence[str], value: Node, done: tuple[str, ...] = ()) -> Node:
    """`value` merged into `tree` at `path`; an index reaches into a list."""
    if not path:
        return merge(tree, value)
    part, rest = path[0], path[1:]
    here = (*done, part)
    if isinstance(tree.value, str) and done[:-1] == ("attention", "transforms"):
        tree = Node({"kind": tree}, tree.mark)  # `power` is short for `{kind: power}`
    if isinstance(tree.value, list) and (part.isdecimal() or done in _LISTS):
        index = int(part) if part.isdecimal() and len(part) < 6 else -1
        item = tree.child(index)
        if item is None:
            raise RecipeError(
                f"{value.mark.where}: field {'.'.join(here)}: {'.'.join(done)} has {len(tree.value)} entries",
                "entries are counted from 0; set the whole list to add one",
            )
        items = list(tree.value)
        items[index] = _set(item, rest, value, here)
        return Node(items, tree.mark)
    entries = dict(tree.value) if isinstance(tree.value, dict) else {}
    key: Key = int(part) if _is_by_step(done) and part.isdecimal() and len(part) < 6 else part
    below = entries.get(key, Node(None, value.mark))
    entries[key] = _set(below, rest, value, here)
    return Node(entries, tree.mark if isinstance(tree.value, dict) else value.mark)


def _is_by_step(path: Sequence[Key]) -> bool:
    return tuple(path) in (("model", "unet"), ("model", "distillation"))


def _counts_as_numbers(tree: Node) -> Node:
    """Step counts that came as text (JSON keys, quoted YAML keys) as numbers."""
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


def _local_paths(tree: Node, folder: Path) -> Node:
    """A path of a model part, written in a file, is relative to that file."""
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
        # Absolute, so that no store can take it for the name of an artifact.
        return Node(os.path.abspath(folder / os.path.expanduser(value)), node.mark)
    return node


def _is_path(reference: str) -> bool:
    if reference.startswith("hub:"):
        return False
    return reference.startswith(("./", "../", "~", "/")) or reference.lower().endswith(_WEIGHTS)


def _origins(value: Any, node: Node | None, prefix: str) -> Iterator[tuple[str, str]]:
    """Dotted field -> origin for every value of a canonical recipe."""
    if isinstance(value, dict) and value:
        children: list[tuple[str, Any]] = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        children = [(str(index), item) for index, item in enumerate(value)]
    else:
        yield prefix, DEFAULT if node is None else node.mark.origin
        return
    for key, child in children:
        inner: Node | None = None
        if node is not None:
            inner = node.child(key) or (node.child(int(key)) if key.isdecimal() else None)
            if inner is None and key == "kind" and isinstance(node.value, str):
                inner = node
        yield from _origins(child, inner, f"{prefix}.{key}" if prefix else key)


def to_yaml(resolved: Resolved, *, origins: bool) -> str:
    """A resolved recipe as YAML that loads back to the same recipe.

    Args:
        origins: end each line with a comment that says where its value came from.
    """
    lines = list(_lines(resolved.recipe.canonical(), "", 0))
    if not origins:
        return "".join(f"{text}\n" for text, _ in lines)
    width = min(48, max(len(text) for text, _ in lines))
    found = resolved.origins
    return "".join(
        f"{text:<{width}}  # {found[field]}\n" if field in found else f"{text}\n" for text, field in lines
    )


def _lines(value: dict[str, Any], prefix: str, depth: int) -> Iterator[tuple[str, str]]:
    """Lines of YAML, each with the dotted field whose value it holds ("" for a heading)."""
    indent = "  " * depth
    for key, child in value.items():
        field = f"{prefix}.{key}" if prefix else key
        if isinstance(child, dict) and child:
            yield f"{indent}{key}:", ""
            yield from _lines(child, field, depth + 1)
        elif isinstance(child, list) and any(isinstance(item, dict) for item in child):
            yield f"{indent}{key}:", ""
            for index, item in enumerate(child):
                for number, (text, inner) in enumerate(_lines(item, f"{field}.{index}", depth + 2)):
                    dash = f"{indent}  - {text.lstrip()}" if number == 0 else text
                    yield dash, inner
        else:
            yield f"{indent}{key}: {_flow(child)}", field


def _flow(value: Any) -> str:
    """A scalar or a list of scalars on one line."""
    if isinstance(value, list):
        return f"[{', '.join(_flow(item) for item in value)}]"
    if isinstance(value, dict):
        return "{}"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        text = repr(value)
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    if isinstance(value, int):
        return str(value)
    if _BARE.fullmatch(value) and value.lower() not in _RESERVED:
        return str(value)
    return yaml.safe_dump(value, default_style='"', allow_unicode=True, width=float("inf")).strip()
