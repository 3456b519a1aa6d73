"""Shell completion, called as bash calls it: correct names, and no heavy imports."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from support.heavy import HEAVY

ASK = """
import atexit, os, sys
def tell():
    os.write(2, ("MODULES " + " ".join({name.partition(".")[0] for name in sys.modules})).encode())
atexit.register(tell)
sys.argv = ["fastface"]
from fastface_cli.cli import main
main()
"""


def offered(line: str) -> tuple[list[str], set[str], float]:
    """What is offered at the end of a line, the modules imported, and the seconds it took."""
    words = line.split()
    place = len(words) if line.endswith(" ") else len(words) - 1
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "_FASTFACE_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(place),
        },
    )
    took = time.perf_counter() - began
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), set(done.stderr.rpartition("MODULES")[2].split()), took


@pytest.mark.parametrize(
    ("line", "some", "none"),
    [
        ("fastface gen", ["generate"], ["download"]),
        ("fastface generate --recipe pocket-f", ["pocket-fastface", "pocket-fastface-am2"], ["pocket-dcg"]),
        ("fastface generate --best", ["--best-of"], ["--batch-size"]),
        ("fastface generate --set guidance.t", ["guidance.text="], ["guidance.order="]),
        ("fastface generate --device c", ["cpu", "cuda"], ["mps"]),
        ("fastface generate --dtype b", ["bfloat16"], ["float16"]),
        ("fastface recipes show lcm-", ["lcm-fastface", "lcm-dcg"], ["hyper-dcg"]),
        ("fastface recipes validate tur", ["turbo", "turbo-am1"], ["lcm"]),
        ("fastface download clip-", ["clip-vit-large-patch14"], ["hyper"]),
        ("fastface licenses --recipe hy", ["hyper", "hyper-fastface"], ["lcm"]),
        ("fastface eval --recipe pocket-b", ["pocket-baseline"], ["pocket-fastface", "lcm"]),
        ("fastface eval --metrics id,cl", ["id,clip-l14", "id,clip-pocket"], ["clip-l14", "id"]),
        ("fastface eval --device c", ["cpu", "cuda"], ["mps"]),
        ("fastface eval --set guidance.t", ["guidance.text="], ["guidance.order="]),
        ("fastface bench --recipe pocket-b", ["pocket-baseline"], ["pocket-fastface", "lcm"]),
        ("fastface bench --dtype b", ["bfloat16"], ["float16"]),
        ("fastface doctor --recipe po", ["pocket", "pocket-am1"], ["lcm"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_offers_names_without_heavy_imports(line: str, some: list[str], none: list[str]) -> None:
    words, modules, _ = offered(line)
    assert set(some) <= set(words)
    assert not set(none) & set(words)
    assert "typer" in modules
    assert modules.isdisjoint(HEAVY)


def test_takes_hardly_longer_than_an_empty_typer_app() -> None:
    """Measured against the same interpreter importing what any such command must."""
    base = min(_seconds("import typer, yaml, pydantic") for _ in range(3))
    fastest = min(offered("fastface generate --recipe pocket-f")[2] for _ in range(3))
    assert fastest < 2 * base + 0.3


def _seconds(code: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began
