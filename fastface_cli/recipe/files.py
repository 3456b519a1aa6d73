"""Recipe files: find, extend, override and validate them, and record the origin of each value."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import RecipeError, nearest
from .layers import (
    absolute_paths,
    apply_override,
    drop_sdxl_unet,
    numeric_step_counts,
    set_field,
    stack_layer,
)
from .tree import Mark, Node, mapping, mark_tree, merge, read_json, read_text, read_yaml

if TYPE_CHECKING:
    from .schema import Recipe

Flag: TypeAlias = tuple[Any, str]
"""A value from the command line and the flag that gave it: `(8, "--steps")`."""

DEFAULT = "default"
"""Origin of a default value."""

MODELS = (
    "hyper",
    "lightning",
    "lcm",
    "turbo",
    "dmd2",
    "tcd",
    "pcm",
    "hypercfg",
    "nitro",
    "nitrovibrant",
    "flash",
    "base",
    "pocket",
)
"""The files in `recipes/models`."""

SHORT_NAMES = {
    **{model: f"{model}-fastface" for model in MODELS if model not in ("base", "pocket")},
    "pocket": "pocket-baseline",
}
"""A model name alone means the published method, except for the pocket stack: its adapter was trained for the
distilled model, and the images of the adapter alone are better."""

_YAML, _JSON = (".yaml", ".yml"), (".json",)
_NAME = re.compile(r"[A-Za-z0-9][\w-]*(/[A-Za-z0-9][\w-]*)*")
_SECTIONS = ("model", "sampling", "adapter", "guidance", "attention")
_MAX_CHAIN = 16


@dataclass(frozen=True, slots=True)
class Resolved:
    """A recipe, and the origin of each dotted field."""

    recipe: Recipe
    origins: dict[str, str]
    """`recipes/models/hyper.yaml:12`, `--set`, `--steps`, `--stack` or `default`."""


@dataclass(frozen=True, slots=True)
class RecipeInfo:
    """One line of `fastface recipes list`."""

    name: str
    summary: str
    short: str | None
    """The short name, if any."""
    path: Path


def recipes_folder() -> Path:
    """The folder of the shipped recipes: in the installed package, or at the root of the checkout."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the shipped recipes and their short names; reads no files, for shell completion."""
    names = {path.stem for path in recipes_folder().glob("*.yaml")}
    return sorted(names | {short for short, name in SHORT_NAMES.items() if name in names})


def list_recipes() -> list[RecipeInfo]:
    """The shipped recipes, sorted by name."""
    shorts = {name: short for short, name in SHORT_NAMES.items()}
    infos = []
    for path in sorted(recipes_folder().glob("*.yaml")):
        tree = _read(path)
        summary = mapping(tree).get("summary")
        infos.append(
            RecipeInfo(path.stem, str(summary.value) if summary else "", shorts.get(path.stem), path)
        )
    return infos


def find_recipe(name_or_path: str | Path) -> Path:
    """Return the file of a shipped recipe (by name) or of the user's recipe (by path).

    Raises:
        RecipeError: there is no such recipe; the hint names the nearest one.
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
        f"did you mean '{near}'?" if near else "`fastface recipes list` lists all recipes",
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

    Later layers win: the files it extends, the file, `stack`, `flags`, `overrides` in their order.

    Args:
        name_or_path: a shipped recipe (`hyper-fastface`, short `hyper`), a YAML file, or a JSON
            configuration of the published code.
        overrides: `--set` arguments, `field=VALUE` with VALUE in YAML.
        flags: dotted field -> value and its flag, such as `{"sampling.steps": (8, "--steps")}`.
        stack: folder with a local stack (`pipe/`, `clip/`, `faceid_plusv2.bin`) that replaces the recipe's.

    Raises:
        RecipeError: the recipe is invalid; the message names file, line and field.
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
    """Like `load_recipe`, from the plain data of `Recipe.canonical` (the metadata of an image).

    Args:
        data: a recipe as plain data.
        source: its name in origins and errors.
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
        tree = set_field(tree, field.split("."), mark_tree(value, Mark(flag, flag)))
    for override in overrides:
        tree = apply_override(tree, override)
    tree = drop_sdxl_unet(tree)
    recipe = validate(tree)
    return Resolved(recipe, dict(_origins(recipe.canonical(), tree, "")))


def validate(tree: Node) -> Recipe:
    """Validate a merged tree as a recipe.

    Raises:
        RecipeError: the first few problems, one per line, each with file, line and field.
    """
    from pydantic import ValidationError

    from .problems import problems_of, to_error
    from .schema import Recipe

    tree = numeric_step_counts(tree)
    try:
        return Recipe.model_validate(tree.plain())
    except ValidationError as error:
        raise to_error(problems_of(error, tree)) from error


def _load(path: Path, chain: tuple[str, ...], known: dict[str, Node]) -> Node:
    """Merge a file and all files it extends, without `extends`.

    Args:
        path: the file.
        chain: real paths of the files that extend it, outermost first.
        known: merged trees by real path, so that each file is read once.
    """
    tree = _read(path)
    entries = dict(mapping(tree))
    extends = entries.pop("extends", None)
    for name in _SECTIONS:
        # A section whose lines are all commented out is null; ignore it.
        if name in entries and entries[name].value is None:
            del entries[name]
    own = absolute_paths(Node(entries, tree.mark), path.parent)
    chain = (*chain, os.path.realpath(path))
    merged: Node | None = None
    for mark, parent in _parents(extends, path):
        real = os.path.realpath(parent)
        if real in chain:
            raise RecipeError(f"{mark.where}: field extends: {_shown(parent)} extends this file in turn")
        if len(chain) > _MAX_CHAIN:
            raise RecipeError(f"{mark.where}: field extends: too many levels")
        if real not in known:
            known[real] = _load(parent, chain, known)
        inherited = dict(mapping(known[real]))
        for not_inherited in ("name", "summary"):
            inherited.pop(not_inherited, None)
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
    """Return shipped files as `recipes/...`, other files as the user wrote them."""
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
            layers = ("models", "methods", "adapters")
            parts = [f"{layer}/{file.stem}" for layer in layers for file in _layer_files(layer)]
            near = nearest(name, [*recipe_names(), *parts])
            hint = (
                f"did you mean '{near}'?"
                if near
                else "a path ends in .yaml; `fastface recipes list` lists names"
            )
            raise RecipeError(f"{item.mark.where}: field extends: there is no recipe '{name}'", hint)
        yield item.mark, shipped


def _layer_files(name: str) -> list[Path]:
    return sorted((recipes_folder() / name).glob("*.yaml"))


def _origins(value: Any, node: Node | None, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield the dotted field and the origin of every value of a canonical recipe."""
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
