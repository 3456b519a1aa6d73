"""The documentation in parts: fenced blocks, the commands in them, commands within a sentence, links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from fastface_cli.cli import app

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "examples" / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
    if path.name != "cli.md"  # help texts, which a test compares
}
LANGUAGES = ("sh", "console", "yaml", "python", "toml", "json", "jsonl", "bibtex", "text")
_FENCE = re.compile(r"^```(?P<language>\w*)(?: (?P<file>\S+))?\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    where: str
    """Page and line."""
    language: str
    file: str | None
    """The second word after the language: what the block is called in the commands of its page."""
    text: str

    def commands(self) -> Iterator[tuple[str, str]]:
        """Each command of a `sh` or `console` block, and what the page shows of its output."""
        text = self.text.replace("\\\n", " ")
        if self.language == "sh":
            yield from ((line, "") for line in text.splitlines() if line.strip() and line[0] != "#")
        if self.language == "console":
            _, *parts = re.split(r"^\$ ", text, flags=re.M)
            for part in parts:
                command, _, output = part.partition("\n")
                yield command, output


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = PAGES[page].read_text(encoding="utf-8")
    return [
        Block(
            f"{page}:{text.count(chr(10), 0, match.start()) + 1}",
            match["language"],
            match["file"],
            match["text"],
        )
        for match in _FENCE.finditer(text)
    ]


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", PAGES[page].read_text(encoding="utf-8"))


def code_spans(page: str) -> list[str]:
    """What stands between backticks in sentences and tables."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def links(page: str) -> list[str]:
    """Where a page's links and pictures lead."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def words(command: str) -> tuple[list[str], str | None]:
    """A command as arguments, without `time`, `NAME=value` before it and comments; and where `>` sends it."""
    actual = shlex.split(command, comments=True)
    while actual and (actual[0] == "time" or re.fullmatch(r"[A-Z_]+=\S*", actual[0])):
        actual.pop(0)
    target = None
    if ">" in actual:
        target = actual[actual.index(">") + 1]
        actual = actual[: actual.index(">")]
    return actual, target


def parse(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """A command of fastface as the command line understands it: its name, as `eval score`, and its values.

    Raises:
        Exception: an option, command or value that there is not, or a missing one.
    """
    command: Any = typer.main.get_command(app)
    context, names = command.make_context("fastface", list(arguments)), []
    while rest := [*getattr(context, "_protected_args", []), *context.args]:
        name, command, below = command.resolve_command(context, rest)
        context = command.make_context(name, list(below), parent=context)
        names.append(name)
        if not hasattr(command, "resolve_command"):
            break
    return " ".join(names), dict(context.params)


def options() -> dict[str, set[str]]:
    """The options of every command, by its name; "" is `fastface` itself."""

    def below(command: Any, name: str) -> Iterator[tuple[str, set[str]]]:
        yield (
            name,
            {
                "--help",
                "-h",
                *(word for parameter in command.params for word in parameter.opts + parameter.secondary_opts),
            },
        )
        for word, child in getattr(command, "commands", {}).items():
            yield from below(child, f"{name} {word}".strip())

    return dict(below(typer.main.get_command(app), ""))
