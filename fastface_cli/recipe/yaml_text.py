"""Write a resolved recipe as YAML."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from .files import Resolved

_NAME = re.compile(r"(?!(yes|no|on|off|true|false|null|y|n)$)[A-Za-z][\w/.-]*", re.IGNORECASE | re.ASCII)
"""Text that every YAML parser reads as text without quotes."""

_COLUMN = 48
"""Maximum column of the comments, unless a line is longer."""


def to_yaml(resolved: Resolved, *, origins: bool) -> str:
    """Write a resolved recipe as YAML that loads back to the same recipe.

    Args:
        resolved: the recipe.
        origins: add a comment with the origin of its value to each line.
    """
    text: str = yaml.dump(
        resolved.recipe.canonical(),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=float("inf"),
    )
    if not origins:
        return text
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert root is not None  # a recipe is never empty
    fields = dict(_fields_by_line(root, ""))
    lines = text.rstrip("\n").split("\n")
    width = min(_COLUMN, max(map(len, lines)))
    for number, field in fields.items():
        lines[number] = f"{lines[number]:<{width}}  # {resolved.origins[field]}"
    return "\n".join(lines) + "\n"


def _fields_by_line(node: yaml.Node, field: str) -> Iterator[tuple[int, str]]:
    """Yield the line number and the dotted field of each value that has an origin."""
    children: list[tuple[str, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(key.value, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode) and any(isinstance(n, yaml.MappingNode) for n in node.value):
        children = [(str(index), item) for index, item in enumerate(node.value)]
    if not children:
        yield node.start_mark.line, field
    for key, child in children:
        yield from _fields_by_line(child, f"{field}.{key}" if field else key)


class _Dumper(yaml.SafeDumper):
    """PyYAML with lists of scalars on one line and unusual text in double quotes."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    style = None if _NAME.fullmatch(value) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


def _list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.Node:
    nested = any(isinstance(item, dict) for item in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=not nested)


def _mapping(dumper: yaml.SafeDumper, value: dict[str, Any]) -> yaml.Node:
    # JSON turns step counts into text.
    entries = {int(key) if key.isdecimal() else key: child for key, child in value.items()}
    return dumper.represent_mapping("tag:yaml.org,2002:map", entries, flow_style=False)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(list, _list)
_Dumper.add_representer(dict, _mapping)
