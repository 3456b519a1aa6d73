"""Translate pydantic's errors into messages with file, line, field and the nearest valid name."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from ..errors import RecipeError, nearest
from . import schema
from .tree import Key, Node, mapping

SHOWN = 5
"""Errors listed before 'and N more'."""

MAX_COUNTED = 100
"""Maximum number of errors that are counted."""

_SECTIONS: dict[str, type[BaseModel]] = {
    name: section
    for name, section in inspect.getmembers(schema, inspect.isclass)
    if issubclass(section, schema.Section)
}
_TRANSFORMS: dict[str, type[BaseModel]] = {
    get_args(section.model_fields["kind"].annotation)[0]: section
    for name, section in _SECTIONS.items()
    if "kind" in section.model_fields and name != "Scheduler"
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of a recipe."""

    where: str
    field: str
    text: str
    hint: str | None = None

    def __str__(self) -> str:
        return (
            f"{self.where}: field {self.field}: {self.text}" if self.field else f"{self.where}: {self.text}"
        )


def to_error(problems: Iterable[Problem]) -> RecipeError:
    """Combine problems into one error: the first few, one per line, and the first hint."""
    distinct = list(dict.fromkeys(problems))
    lines = [str(problem) for problem in distinct[:SHOWN]]
    if len(distinct) > SHOWN:
        lines.append(f"... and {len(distinct) - SHOWN if len(distinct) < MAX_COUNTED else 'many'} more")
    hint = next((problem.hint for problem in distinct if problem.hint), None)
    return RecipeError("\n".join(lines), hint)


def problems_of(error: ValidationError, tree: Node) -> list[Problem]:
    """Translate validation errors of `tree`, one for each value that is wrong."""
    problems: dict[str, Problem] = {}
    for detail in error.errors(include_url=False, include_input=False):
        problem = _problem(detail, tree)
        if problem is not None and not any(problem.field.startswith(f"{field}.") for field in problems):
            problems.setdefault(problem.field, problem)
        if len(problems) == MAX_COUNTED:
            break
    # All errors may be about union branches that were not meant; report the recipe as invalid then.
    return list(problems.values()) or [Problem(tree.mark.where, "", "is not a valid recipe")]


def _problem(detail: Any, tree: Node) -> Problem | None:
    kind, context = detail["type"], detail.get("ctx", {})
    # The last part of the location of a missing field is its name, which the tree cannot hold.
    path, node, branches = _locate(detail["loc"][: -1 if kind == "missing" else None], tree)
    for branch_path, branch_node, branch in branches:
        if branch == "[key]":
            return Problem(
                branch_node.mark.where, _dotted(branch_path), "a step count is a whole number from 1 to 1000"
            )
        if not _fits(branch, branch_node):
            return (
                None if isinstance(branch_node.value, dict | list) else _no_branch(branch_path, branch_node)
            )
        if branch == "HubReference" and not (
            set(mapping(branch_node)) & set(schema.HubReference.model_fields)
        ):
            return _no_branch(branch_path, branch_node)
    if kind == "invalid_key":
        return Problem(node.mark.where, _dotted(path), "is not a valid name")
    if kind == "missing":
        name = str(detail["loc"][-1])
        return Problem(node.mark.where, _dotted((*path, name)), "is missing")
    if kind == "extra_forbidden":
        return _unknown(path, node, detail["loc"])
    if kind == "field":
        parts = [int(part) if part.isdecimal() else part for part in context["field"].split(".")]
        _, inner, _ = _locate(parts, node)
        return Problem(inner.mark.where, _dotted((*path, *parts)), context["problem"])
    text, hint = _describe(kind, context, detail["msg"], node, path)
    return Problem(node.mark.where, _dotted(path), text, hint)


def _locate(
    loc: Iterable[Key], tree: Node
) -> tuple[tuple[Key, ...], Node, list[tuple[tuple[Key, ...], Node, str]]]:
    """Follow pydantic's location through the tree.

    Returns:
        The path in the tree, the node there, and the union branches that pydantic tried on the way:
        labels in the location that are no keys of the tree, each with the path and node that it is for.
    """
    path: tuple[Key, ...] = ()
    node = tree
    branches: list[tuple[tuple[Key, ...], Node, str]] = []
    for part in loc:
        child = node.child(part)
        if child is not None:
            path, node = (*path, part), child
        elif isinstance(part, str) and part not in _TRANSFORMS:
            branches.append((path, node, part))
    return path, node, branches


def _fits(branch: str, node: Node) -> bool:
    """Whether a value was meant for this union branch."""
    value = node.value
    if isinstance(value, dict):
        if branch.startswith("dict["):
            return any(isinstance(key, int) for key in value)
        if branch == "HubReference":
            return not any(isinstance(key, int) for key in value)
        return not branch.startswith("list[") and (branch in _SECTIONS or branch not in _LABELS)
    if isinstance(value, list):
        return branch.startswith("list[") or branch not in _LABELS
    return branch == "constrained-float" or (
        branch not in _LABELS and not branch.startswith(("list[", "dict["))
    )


_LABELS = {"str", "float", "constrained-float", "int", "literal['all']", *_SECTIONS}
"""Names that pydantic gives to union branches of this schema."""


def _no_branch(path: tuple[Key, ...], node: Node) -> Problem:
    last = path[-1] if path else ""
    if path[:1] == ("guidance",) and last in ("identity", "text"):
        expected = "a number, a list with one number per step, or a function"
    elif path == ("adapter", "scale"):
        expected = "a number, or a list with one number per step"
    elif path[:2] == ("attention", "steps"):
        expected = "'all' or a list of step indices"
    elif path[:2] == ("attention", "transforms"):
        expected = "a number, a list with one number per step, or one of these for each of down, mid, up"
        if last in ("down", "mid", "up"):
            expected = "a number or a list with one number per step"
    else:
        expected = "a name, a path, or 'repo', 'commit' and 'file' of the Hugging Face Hub"
        if path[:1] == ("model",) and last in ("unet", "distillation"):
            expected += ", or one of these for each step count"
    return Problem(node.mark.where, _dotted(path), f"must be {expected}, not {_shown(node)}", _quoting(node))


def _unknown(path: tuple[Key, ...], node: Node, loc: tuple[Key, ...]) -> Problem:
    name = str(path[-1])
    valid = list(_section_at(loc[:-1]).model_fields)
    if not path[:-1]:
        valid.append("extends")
    near = nearest(name, valid)
    elsewhere = [field for field in fields() if field.rsplit(".", 1)[-1] == name]
    if elsewhere and near and SequenceMatcher(None, name, near).ratio() < 0.8:
        near = None
    prefix = "".join(f"{part}." for part in path[:-1])
    if near:
        hint = f"did you mean '{prefix}{near}'?"
    elif elsewhere:
        hint = f"did you mean '{elsewhere[0]}'?"
    else:
        hint = f"valid here: {', '.join(valid)}"
    return Problem(node.mark.where, _dotted(path), "unknown key", hint)


def _section_at(loc: Iterable[Key]) -> type[BaseModel]:
    section: type[BaseModel] = schema.Recipe
    for part in loc:
        if isinstance(part, str) and part in section.model_fields:
            inner = list(_sections_in(section.model_fields[part].annotation))
            section = inner[0] if inner else section
        elif part in _SECTIONS:
            section = _SECTIONS[str(part)]
        elif part in _TRANSFORMS:
            section = _TRANSFORMS[str(part)]
    return section


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the sections in an annotation."""
    if get_origin(annotation) is Annotated:
        yield from _sections_in(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType, list, dict):
        for argument in get_args(annotation):
            yield from _sections_in(argument)
    elif inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation


def fields() -> list[str]:
    """List the dotted fields of a recipe that are not inside a list or a union."""
    return list(_fields(schema.Recipe, ""))


def _fields(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, info in section.model_fields.items():
        yield f"{prefix}{name}"
        inner = list(_sections_in(info.annotation))
        if len(inner) == 1 and get_origin(info.annotation) is not list:
            yield from _fields(inner[0], f"{prefix}{name}.")


_EXPECTED = {
    "float_type": "a number",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping of 'name: value' entries",
    "model_type": "a mapping of 'name: value' entries",
    "model_attributes_type": "a mapping with a 'kind', or the name of a transform",
    "finite_number": "finite",
}
_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
    "multiple_of": ("multiple_of", "a multiple of"),
}


def _describe(
    kind: str, context: dict[str, Any], message: str, node: Node, path: tuple[Key, ...]
) -> tuple[str, str | None]:
    """Return the problem with a value, and a hint."""
    spelling = _shown(node)
    if kind in _EXPECTED:
        return f"must be {_EXPECTED[kind]}, not {spelling}", _quoting(node) if kind == "string_type" else None
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        bound = context[key]
        return (
            f"must be {words} {bound:g}, not {spelling}" if bound < 2**53 else f"is too large: {spelling}",
            None,
        )
    if kind in ("literal_error", "union_tag_invalid"):
        choices = re.findall(r"'([^']*)'", context.get("expected", context.get("expected_tags", "")))
        given = str(context.get("tag", node.value))
        near = nearest(given, choices)
        shown = f"'{given}'" if kind == "union_tag_invalid" else spelling
        text = f"must be one of {', '.join(choices)}, not {shown}"
        return text, f"did you mean '{near}'?" if near else _quoting(node)
    if kind == "union_tag_not_found":
        return f"needs a 'kind': one of {', '.join(_TRANSFORMS)}", None
    if kind == "string_pattern_mismatch":
        expected = "OWNER/NAME" if path[-1:] == ("repo",) else "a full commit hash: 40 hexadecimal digits"
        return f"must be {expected}, not {spelling}", None
    if kind in ("too_short", "too_long"):
        return "must not be empty" if kind == "too_short" else "is too long", None
    if kind == "value_error":
        return str(context.get("error", message)), None
    return message, None


def _shown(node: Node) -> str:
    value = node.value
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if not isinstance(value, int) or value.bit_length() < 200 else "a huge number"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _quoting(node: Node) -> str | None:
    """A hint for text that YAML parses as a number or a truth value."""
    if isinstance(node.value, bool):
        return "YAML parses a bare yes, no, on or off as true or false; put text in quotes"
    if isinstance(node.value, int | float):
        return "put text that looks like a number in quotes"
    return None


def _dotted(path: Iterable[Key]) -> str:
    text = ".".join(str(part) for part in path)
    return text if len(text) <= 120 else f"{text[:117]}..."
