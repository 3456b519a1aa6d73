"""Parse YAML and JSON into a tree that records where every value was written. The schema is in `schema`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from ..errors import RecipeError

MAX_BYTES = 64 * 1024
"""Maximum size of a recipe file; recipes are one page of text."""

MAX_NODES = 20_000
"""Maximum number of values in one file, with aliases expanded."""

MAX_DEPTH = 20

MAX_SCALAR = 16 * 1024
"""Maximum characters of one value; prompts are much shorter."""

Scalar: TypeAlias = str | int | float | bool | None
Key: TypeAlias = str | int
Plain: TypeAlias = "Scalar | list[Plain] | dict[Key, Plain]"


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a value was written."""

    origin: str
    """As shown next to a value: `recipes/hyper.yaml:3`, `--set`, `--steps`."""
    where: str
    """As shown in an error: like `origin`, but with the complete `--set`."""

    @classmethod
    def at(cls, source: str, line: int | None = None) -> Mark:
        """A line in a file, or the file if the line is None."""
        text = source if line is None else f"{source}:{line}"
        return cls(text, text)


@dataclass(frozen=True, slots=True)
class Node:
    """A scalar, a list or a mapping, and where it was written."""

    value: Scalar | list[Node] | dict[Key, Node]
    mark: Mark

    def plain(self) -> Plain:
        """The value without its marks."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def child(self, key: Key) -> Node | None:
        """The value under a key or an index, or None."""
        if isinstance(self.value, dict):
            return self.value.get(key)
        if isinstance(self.value, list) and isinstance(key, int) and 0 <= key < len(self.value):
            return self.value[key]
        return None


def mapping(node: Node) -> dict[Key, Node]:
    """Return the entries of a mapping; raise RecipeError for other nodes."""
    if not isinstance(node.value, dict):
        raise RecipeError(f"{node.mark.where}: must be a mapping of 'name: value' entries")
    return node.value


def mark_tree(value: Any, mark: Mark) -> Node:
    """Build a tree in which all values have the same mark."""
    if isinstance(value, dict):
        return Node({key: mark_tree(child, mark) for key, child in value.items()}, mark)
    if isinstance(value, list):
        return Node([mark_tree(child, mark) for child in value], mark)
    return Node(value, mark)


def merge(below: Node | None, above: Node) -> Node:
    """Merge two trees. `above` wins: mappings merge key by key, other values replace.

    A mapping that is a value of another kind than the one below (a Hub reference against a table by
    step count; a weight function that names its `function`; a reference that names its `repo`)
    replaces it completely: its remaining keys would not apply.
    """
    if below is None or not isinstance(below.value, dict) or not isinstance(above.value, dict):
        return above
    if "repo" in above.value or "function" in above.value:
        return above
    numbered = (_by_number(below.value), _by_number(above.value))
    if numbered == (True, False) or (numbered == (False, True) and "repo" in below.value):
        return above
    merged = dict(below.value)
    for key, child in above.value.items():
        merged[key] = merge(merged.get(key), child)
    return Node(merged, above.mark)


def _by_number(entries: dict[Key, Node]) -> bool:
    return bool(entries) and all(isinstance(key, int) for key in entries)


def read_text(path: Path, shown: str) -> str:
    """Read the text of a recipe file.

    Args:
        path: the file.
        shown: its name in errors.

    Raises:
        RecipeError: the file is missing, not a file, too large or not UTF-8.
    """
    try:
        if path.is_dir():
            raise RecipeError(f"{shown} is a folder, not a recipe file")
        if not path.is_file():
            raise RecipeError(f"there is no recipe file {shown}")
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RecipeError(
            f"cannot read the recipe file {shown}: {reason}",
            "`fastface recipes list` lists the shipped recipes",
        ) from error
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{shown} is larger than {MAX_BYTES // 1024} KiB, which no recipe is")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{shown}:{line}: is not UTF-8 text", "save the file as UTF-8") from error


class _Loader(yaml.SafeLoader):
    """PyYAML with simpler scalars: `1e-6` is a number, 1:30 and 2026-01-01 are text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  PyYAML's own


_TAG = "tag:yaml.org,2002:"
for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"(?i:yes|no|true|false|on|off)", list("yYnNtTfFoO")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), _first)  # type: ignore[no-untyped-call]


def read_yaml(text: str, source: str, mark: Mark | None = None) -> Node:
    """Parse YAML.

    Args:
        text: one YAML document.
        source: its name in errors and marks.
        mark: mark of all values (for a command-line value); None: file and line.

    Raises:
        RecipeError: invalid YAML, a repeated key, a tag, or too many aliases.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        place = error.problem_mark or error.context_mark
        problem = " ".join(str(error.problem or error.context or "cannot be read").split())
        hint = "indent with spaces" if "'\\t'" in problem else None
        if mark is not None:
            hint = "put text that contains ': ' or other YAML syntax in quotes"
        raise RecipeError(f"{_where(source, place, mark)}: is not valid YAML: {problem}", hint) from error
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise RecipeError(f"{_where(source, None, mark)}: is not valid YAML: {problem}") from error
    except RecursionError as error:
        raise RecipeError(f"{_where(source, None, mark)}: is nested too deeply") from error
    except (ValueError, OverflowError) as error:
        # PyYAML turns an escape outside Unicode ("\UFFFFFFFF") into a bare ValueError.
        raise RecipeError(f"{_where(source, None, mark)}: is not valid YAML: {error}") from error
    if root is None:
        return Node(None, mark or Mark.at(source, 1))
    return _Builder(source, mark).build(root, 0)


def _where(source: str, place: yaml.error.Mark | None, mark: Mark | None) -> str:
    if mark is not None:
        return mark.where
    return source if place is None else f"{source}:{place.line + 1}"


class _Builder:
    """Composed YAML nodes -> `Node`, within limits."""

    def __init__(self, source: str, mark: Mark | None) -> None:
        self.source = source
        self.mark = mark
        self.count = 0

    def build(self, node: yaml.Node, depth: int, at: yaml.Node | None = None) -> Node:
        mark = self.mark_of(at or node)
        self.count += 1
        if self.count > MAX_NODES:
            raise RecipeError(
                f"{mark.where}: contains too many values", "expand the aliases, or use 'extends'"
            )
        if depth > MAX_DEPTH:
            raise RecipeError(f"{mark.where}: is nested too deeply")
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return Node(self.entries(node, depth), mark)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return Node([self.build(item, depth + 1) for item in node.value], mark)
        if isinstance(node, yaml.ScalarNode):
            return Node(self.scalar(node), mark)
        raise RecipeError(f"{mark.where}: a YAML tag ({node.tag}) is not supported in a recipe")

    def entries(self, node: yaml.MappingNode, depth: int) -> dict[Key, Node]:
        entries: dict[Key, Node] = {}
        for key_node, value_node in node.value:
            where = self.mark_of(key_node).where
            if key_node.tag == _TAG + "merge":
                raise RecipeError(f"{where}: '<<' is not supported in a recipe", "use 'extends'")
            key = self.scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if isinstance(key, bool) or not isinstance(key, (str, int)):
                spelling = key_node.value if isinstance(key_node, yaml.ScalarNode) else "this"
                raise RecipeError(f"{where}: '{spelling}' is not a name", "a key is a name or a whole number")
            if key in entries:
                raise RecipeError(f"{where}: '{key}' is given twice", f"first in {entries[key].mark.where}")
            if isinstance(key, str) and not key.isprintable():
                raise RecipeError(f"{where}: {key!a} is not a name")
            entries[key] = self.build(value_node, depth + 1, key_node)
        return entries

    def scalar(self, node: yaml.ScalarNode) -> Scalar:
        text: str = node.value
        if len(text) > MAX_SCALAR:
            raise RecipeError(f"{self.mark_of(node).where}: is longer than {MAX_SCALAR} characters")
        kind = node.tag.removeprefix(_TAG)
        try:
            match kind:
                case "str":
                    text.encode("utf-8")
                    return text
                case "null":
                    return None
                case "bool" if text.lower() in ("yes", "true", "on", "no", "false", "off"):
                    return text.lower() in ("yes", "true", "on")
                case "int":
                    return int(text)
                case "float":
                    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError as error:
            raise RecipeError(f"{self.mark_of(node).where}: cannot be read as {kind}: {error}") from error
        raise RecipeError(f"{self.mark_of(node).where}: a YAML tag ({node.tag}) is not supported in a recipe")

    def mark_of(self, node: yaml.Node) -> Mark:
        return self.mark or Mark.at(self.source, node.start_mark.line + 1)


def read_json(text: str, source: str) -> Node:
    """Parse strict JSON and record the line of every value.

    Raises:
        RecipeError: invalid JSON, a repeated key, NaN or Infinity.
    """
    try:
        value = json.loads(text, object_pairs_hook=_pairs, parse_constant=_no_constant)
    except _UnusableError as error:
        raise RecipeError(f"{source}: {error}") from error
    except json.JSONDecodeError as error:
        raise RecipeError(f"{source}:{error.lineno}: is not valid JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        problem = (
            "is nested too deeply" if isinstance(error, RecursionError) else f"is not valid JSON: {error}"
        )
        raise RecipeError(f"{source}: {problem}") from error
    try:
        # JSON allows tabs between tokens, YAML does not. JSON strings cannot contain raw tabs.
        lines = yaml.compose(text.replace("\t", " "), Loader=_Loader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
        lines = None  # rare JSON that is not YAML: errors then name the file without the line
    return _with_lines(value, lines, source, Mark.at(source), 0)


class _UnusableError(ValueError):
    pass


def _pairs(pairs: list[tuple[str, Plain]]) -> dict[Key, Plain]:
    entries: dict[Key, Plain] = {}
    for key, value in pairs:
        if key in entries:
            raise _UnusableError(f"{key!a} is given twice")
        if not key.isprintable():
            raise _UnusableError(f"{key!a} is not a name")
        entries[key] = value
    return entries


def _no_constant(name: str) -> None:
    raise _UnusableError(f"{name} is not a number that a recipe supports")


def _with_lines(value: Plain, lines: yaml.Node | None, source: str, above: Mark, depth: int) -> Node:
    mark = Mark.at(source, lines.start_mark.line + 1) if lines is not None else above
    if depth > MAX_DEPTH:
        raise RecipeError(f"{mark.where}: is nested too deeply")
    if isinstance(value, dict):
        places = dict(_children(lines)) if isinstance(lines, yaml.MappingNode) else {}
        return Node(
            {
                key: _with_lines(child, places.get(key), source, mark, depth + 1)
                for key, child in value.items()
            },
            mark,
        )
    if isinstance(value, list):
        items = lines.value if isinstance(lines, yaml.SequenceNode) else []
        padded = [*items, *[None] * (len(value) - len(items))]
        return Node(
            [_with_lines(child, padded[i], source, mark, depth + 1) for i, child in enumerate(value)], mark
        )
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RecipeError(f"{mark.where}: contains half of a surrogate pair") from error
    return Node(value, mark)


def _children(node: yaml.MappingNode) -> Iterator[tuple[Key, yaml.Node]]:
    for key, value in node.value:
        yield key.value, value
