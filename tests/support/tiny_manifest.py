"""A manifest of small files that the loopback Hub serves, and settings that keep them in a test's folder."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fastface_cli.settings import Settings
from fastface_cli.store import Artifact, Store, parse_manifest
from support.hub_server import COMMIT, Hub, sha256

BIG = random.Random(7).randbytes(3_500_000)
DETECTOR = random.Random(8).randbytes(40_000)
RECOGNISER = random.Random(9).randbytes(60_000)
CONFIG = b'{"sample_size": 4}'
MODEL = random.Random(10).randbytes(5_000)


def manifest_text(hub: Hub) -> str:
    """A manifest with an artifact of each kind, in JSON, which is YAML too."""
    return json.dumps(
        {
            "licenses": {
                "free": ["MIT", "https://example.org/mit", "yes", ""],
                "research": [
                    "research only",
                    "https://example.org/terms",
                    "no",
                    "for non-commercial research",
                ],
            },
            "artifacts": [
                _on_hub("lora", "lora", None, "free", [_pinned("lora.safetensors", BIG)]),
                _on_hub(
                    "base",
                    "base",
                    "",
                    "free",
                    [_pinned("unet/config.json", CONFIG), _pinned("vae/model.safetensors", MODEL)],
                ),
                _on_hub(
                    "unet",
                    "unet",
                    "",
                    "free",
                    [_pinned("unet/config.json", CONFIG), ["unet/model.safetensors", str(len(MODEL)), "-"]],
                    repo="base",
                ),
                _on_hub(
                    "open",
                    "vae",
                    "",
                    "research",
                    [["config.json", "~20", "-"], ["model.safetensors", "~5000", "-"]],
                ),
                _on_hub(
                    "face",
                    "face",
                    "models/tiny_l",
                    "research",
                    [
                        _pinned("models/tiny_l/det.onnx", DETECTOR),
                        _pinned("models/tiny_l/rec.onnx", RECOGNISER),
                    ],
                )
                | {"archive": f"{hub.url}/release/tiny_l.zip"},
                {
                    "name": "tiny-url",
                    "kind": "scorer",
                    "summary": "not on the Hub",
                    "url": f"{hub.url}/release/a%2Bb.pth",
                    "license": "free",
                    "files": [_pinned("a+b.pth", MODEL)],
                },
                {
                    "name": "tiny-package",
                    "kind": "base",
                    "summary": "in the package",
                    "package": "errors.py",
                    "license": "free",
                },
            ],
        }
    )


def _on_hub(
    name: str, kind: str, root: str | None, license: str, files: list[list[str]], repo: str | None = None
) -> dict[str, Any]:
    entry = {
        "name": f"tiny-{name}",
        "kind": kind,
        "summary": f"a {kind}",
        "repo": f"tiny/{repo or name}",
        "commit": COMMIT,
        "license": license,
        "files": files,
    }
    return entry if root is None else entry | {"root": root}


def _pinned(path: str, content: bytes) -> list[str]:
    return [path, str(len(content)), sha256(content)]


def fill(hub: Hub) -> None:
    """Let the Hub serve what the manifest names."""
    hub.files |= {
        "tiny/lora/lora.safetensors": BIG,
        "tiny/base/unet/config.json": CONFIG,
        "tiny/base/vae/model.safetensors": MODEL,
        "tiny/base/unet/model.safetensors": MODEL,
        "tiny/open/config.json": CONFIG,
        "tiny/open/model.safetensors": MODEL,
        "tiny/face/models/tiny_l/det.onnx": DETECTOR,
        "tiny/face/models/tiny_l/rec.onnx": RECOGNISER,
    }
    hub.plain["/release/a+b.pth"] = MODEL


class Shop:
    """A Hub, a manifest and a home folder that belong together."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.hub = hub
        self.home = home
        self.text = manifest_text(hub)
        self.known: Mapping[str, Artifact] = parse_manifest(self.text)

    def store(self, *, offline: bool = False, hub_cache: Path | None = None) -> Store:
        """A store on the home folder, as a new process would open it."""
        return Store(Settings(home=self.home, hub_cache=hub_cache), offline=offline, known=self.known)

    def __getitem__(self, name: str) -> Artifact:
        return self.known["tiny-" + name]


def use_hub(monkeypatch: pytest.MonkeyPatch, hub: Hub, home: Path) -> None:
    """Point the environment at a loopback Hub."""
    for name in (
        "HF_TOKEN",
        "HF_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "http_proxy",
        "HTTP_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("FASTFACE_HOME", str(home))
    monkeypatch.setenv("HF_HOME", str(home.parent / "huggingface"))
    monkeypatch.setattr("fastface_cli.store.transfer.pause", lambda _seconds, _stopped: None)
