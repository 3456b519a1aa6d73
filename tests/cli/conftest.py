"""Fixtures of command tests: a local stack, two people, a loopback Hub, and calls of `generate`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from support.hub_server import hub_server
from support.tiny_manifest import Shop, fill, use_hub

from fastface_cli import cli
from fastface_cli.store import manifest as manifest_module


class Ended(NamedTuple):
    """Result of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout; anything more is an error."""
        data: dict[str, Any] = json.loads(self.out)
        return data


@pytest.fixture(scope="session")
def layout(miniature: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the random miniature in the layout of `--stack`."""
    folder = tmp_path_factory.mktemp("layout")
    for name, part in (("pipe", "base"), ("clip", "image_encoder"), ("faceid_plusv2.bin", "adapter")):
        (folder / name).symlink_to(miniature[part])
    return folder


@pytest.fixture(scope="session")
def me(person, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an identity file."""
    return person.save(tmp_path_factory.mktemp("me") / "me.safetensors")


@pytest.fixture(scope="session")
def somebody(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the identity file of another person."""
    from fastface_cli.identity.identity import Identity

    embedding = np.zeros((1, 512), np.float32)
    embedding[0, 7] = 1
    other = Identity(embedding, np.full((1, 224, 224, 3), 90, np.uint8), np.ones(1, np.float32))
    return other.save(tmp_path_factory.mktemp("somebody") / "somebody.safetensors")


@pytest.fixture(scope="session")
def stack(layout: Path) -> list[str]:
    """Return flags that run the miniature quickly."""
    return ["--stack", str(layout), "--device", "cpu", "--size", "64"]


Call = Callable[..., Ended]


@pytest.fixture
def generate(capfd: pytest.CaptureFixture[str]) -> Call:
    """`fastface generate ...` in this process."""

    def generate(*arguments: object) -> Ended:
        capfd.readouterr()
        code = cli.run(["generate", *map(str, arguments)])
        return Ended(code, *capfd.readouterr())

    return generate


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    """Start a loopback Hub, and replace the manifest by one with its files."""
    with hub_server() as hub:
        fill(hub)
        use_hub(monkeypatch, hub, tmp_path / "home")
        actual = Shop(hub, tmp_path / "home")
        text = tmp_path / "manifest.yaml"
        text.write_text(actual.text, encoding="utf-8")
        monkeypatch.setattr(manifest_module, "MANIFEST", text)
        manifest_module.load_manifest.cache_clear()
        yield actual
    manifest_module.load_manifest.cache_clear()
