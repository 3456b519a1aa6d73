"""Check the cache folder, the disk, the downloaded models and the connection to the Hugging Face Hub."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import ModelUnavailableError
from ..settings import Settings
from ..store import Store, human_bytes
from ..store.layout import MARGIN
from ..store.manifest import Artifact
from ..store.transfer import endpoint, transfer_client
from .finding import Finding, Severity, download_command
from .machine import reinstall_command

FUSED_BYTES = 6_000_000_000
"""Size of the fused models of a full-size recipe, which are cached after the first start."""
MIN_FREE_BYTES = 1_000_000_000
"""Free disk space below which new images may soon fill the disk."""

ONLINE = "env -u HF_HUB_OFFLINE -u TRANSFORMERS_OFFLINE "


def check_cache(settings: Settings, download_bytes: int) -> Finding:
    """Check that the cache can be written, by writing: root ignores permission bits."""
    for folder in (settings.home, settings.hub_folder):
        try:
            with tempfile.TemporaryFile(dir=_existing_parent(folder)):
                pass
        except OSError as error:
            return Finding(
                "Cache",
                "failure" if download_bytes else "warning",
                f"{folder} cannot be written: {error.strerror or error}",
                "export FASTFACE_HOME=~/fastface"
                + ("; unset HF_HUB_CACHE" if settings.hub_cache is not None else ""),
                ModelUnavailableError,
            )
    return Finding("Cache", "ok", f"{settings.home} can be written")


def check_disk(settings: Settings, download_bytes: int, fused_bytes: int = 0) -> Finding:
    """Check the free space for the missing models, the cache of fused models, and for images."""
    folder = settings.hub_folder
    existing = _existing_parent(folder)
    free = shutil.disk_usage(existing if existing.is_dir() else existing.parent).free
    message = f"{human_bytes(free)} free for {folder}"
    if download_bytes and free < download_bytes + MARGIN:
        return Finding(
            "Disk",
            "failure",
            f"{message}, but {human_bytes(download_bytes + MARGIN)} are needed",
            "fastface cache list",
            ModelUnavailableError,
        )
    if free < download_bytes + fused_bytes + MARGIN and fused_bytes:
        return Finding(
            "Disk",
            "warning",
            f"{message}: the models fit, but not their fused form ({human_bytes(fused_bytes)}), "
            "which makes later starts faster",
            "fastface cache list",
        )
    if free < MIN_FREE_BYTES:
        return Finding("Disk", "warning", message, "fastface cache list")
    return Finding("Disk", "ok", message)


def _existing_parent(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def check_models(store: Store, recipe_name: str, artifacts: Sequence[Artifact]) -> Iterator[Finding]:
    """Check that the models are downloaded, complete and verified."""
    download = download_command(recipe_name)
    damaged = [message for artifact in artifacts for message in _damages(store, artifact)]
    for message in damaged:
        yield Finding("Models", "failure", message, download, ModelUnavailableError)
    absent = [
        artifact for artifact in artifacts if artifact.local is not None and not artifact.local.exists()
    ]
    for artifact in absent:
        command = (
            reinstall_command("fastface-cli")
            if artifact.packaged
            else f"fastface recipes show {recipe_name} --resolved"
        )
        yield Finding("Models", "failure", f"{artifact.local} does not exist", command, ModelUnavailableError)
    missing = [entry for entry in store.missing(artifacts) if entry.artifact.local is None]
    unverified = [
        artifact.name
        for artifact in artifacts
        if any(file.state == "unverified" for file in store.status(artifact))
    ]
    if missing:
        names = ", ".join(entry.artifact.name for entry in missing)
        size = human_bytes(sum(entry.bytes for entry in missing))
        present = len(artifacts) - len(missing) - len(absent)
        yield Finding(
            "Models",
            "failure" if store.offline else "warning",
            f"{present} of {len(artifacts)} downloaded; {size} to download: {names}"
            + ("; the network is disabled" if store.offline else ""),
            f"{ONLINE if store.offline else ''}{download}",
            ModelUnavailableError,
        )
    elif unverified and not damaged:
        message = f"all {len(artifacts)} downloaded, not yet verified: {', '.join(unverified)}"
        yield Finding("Models", "warning", message, f"{download} --verify")
    elif not damaged and not absent:
        yield Finding("Models", "ok", f"all {len(artifacts)} downloaded and complete")


def _damages(store: Store, artifact: Artifact) -> Iterator[str]:
    """Describe an artifact's damaged files: a wrong hash, a wrong size, a truncated safetensors file."""
    sizes = {file.path: file.bytes for file in artifact.files}
    for status in store.status(artifact):
        if status.state in ("missing", "partial"):
            continue
        expected = sizes.get(status.path)
        if status.state == "bad":
            yield f"{artifact.name}: {status.path} does not match its hash"
        elif expected is not None and status.here != expected:
            yield f"{artifact.name}: {status.path} has {status.here:,} bytes instead of {expected:,}"
    if artifact.local is not None:  # the manifest has no size or hash of a local file
        yield from (
            f"{path} is damaged: its length does not match its header" for path in _truncated(artifact.local)
        )


def _truncated(path: Path) -> Iterator[Path]:
    """Yield the safetensors files under a path whose header is invalid or does not match their length."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
        if file.suffix != ".safetensors":
            continue
        try:
            with safe_open(file, framework="numpy"):
                pass
        except SafetensorError:
            yield file


def check_network(store: Store, artifacts: Sequence[Artifact], download_bytes: int) -> Finding:
    """Check that the Hub answers the request that a download would send."""
    hub = endpoint()
    if store.offline:
        return Finding("Network", "ok", f"not checked: the network is disabled; models come from {hub}")
    candidates = [*artifacts, *store.known.values()]
    artifact, file = next(
        (candidate, file) for candidate in candidates if candidate.repo for file in candidate.files
    )
    try:
        with transfer_client(retries=1) as client:  # a report must not wait for a network that is down
            client.announce(artifact, file)
    except ModelUnavailableError as error:
        level: Severity = "failure" if download_bytes else "warning"
        refused = re.search(r"HTTP 40[13]", error.message)
        command = (
            "hf auth login" if refused else "export HTTPS_PROXY=http://HOST:PORT HF_ENDPOINT=https://MIRROR"
        )
        return Finding("Network", level, error.message, command, ModelUnavailableError)
    return Finding("Network", "ok", f"{hub} answers")
