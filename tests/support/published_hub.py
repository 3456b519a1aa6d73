"""Files under the published names on the loopback Hub, with the product's manifest and other hashes."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path

import yaml

from fastface_cli.store.manifest import MANIFEST
from support.face_stand_ins import random_pack, write_parser, write_yunet
from support.hub_server import COMMIT, Hub

WriteFile = Callable[[str, str, Path, int | None], None]
"""(artifact, path in its repository, file to write, published length if it is known)."""


class Content(mmap.mmap):
    """A file on the disk that the Hub serves, hashed once."""

    @cached_property
    def sha256(self) -> str:
        """SHA-256 in hex."""
        return hashlib.sha256(self).hexdigest()


def publish(hub: Hub, artifacts: Iterable[str], folder: Path, write_file: WriteFile) -> str:
    """Write the files of artifacts unless they exist, serve them, and return a manifest that names them."""
    data = yaml.load(MANIFEST.read_text(), yaml.BaseLoader)
    names = set(artifacts)
    for entry in data["artifacts"]:
        if entry["name"] not in names or "package" in entry:
            continue
        entry.pop("archive", None)
        entry.pop("fallback", None)
        rows = []
        for path, size, _ in entry["files"]:
            target = folder / entry["name"] / path
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                if path.endswith(".onnx"):
                    write_onnx(path, target)
                else:
                    write_file(entry["name"], path, target, int(size) if size.isdigit() else None)
            with target.open("rb") as file:
                content = Content(file.fileno(), 0, access=mmap.ACCESS_READ)
            rows.append([path, str(len(content)), content.sha256])
            if "repo" in entry:
                hub.files[f"{entry['repo']}/{path}"] = content  # type: ignore[assignment]
            else:
                hub.plain[f"/{path}"] = content  # type: ignore[assignment]
                entry["url"] = f"{hub.url}/{path}"
        entry["files"] = rows
        if "repo" in entry:
            entry["commit"] = COMMIT
    return json.dumps(data)


def write_onnx(path: str, target: Path) -> None:
    """Write the stand-in for a face model."""
    if "yunet" in path:
        write_yunet(target)
    elif "resnet18" in path:
        write_parser(target)
    else:
        random_pack(target.parent)
        detects = path.endswith(("det_10g.onnx", "bnkps.onnx"))
        (target.parent / ("det.onnx" if detects else "rec.onnx")).rename(target)
