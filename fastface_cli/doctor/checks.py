"""What is right and what is wrong on this machine, each with the one command that mends it.

`machine.look` asks the machine once; every check is a function of what it saw, the recipe and the store.
Nothing here changes anything but `mend`, which puts the right package where two share a folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..app.api import artifacts_of, check_device, is_full_size
from ..errors import DeviceError, FastFaceError, ModelUnavailableError
from ..recipe.files import load_recipe, recipe_names
from ..recipe.schema import Recipe
from ..settings import Settings
from ..store import Store, human_bytes
from ..store.layout import MARGIN
from ..store.manifest import Artifact
from ..store.transfer import announce, endpoint
from . import packages as runtimes
from .machine import Machine, first_line, reinstall, served, torch_for, why_no_gpu

Severity = Literal["ok", "warning", "failure"]

FIX = "fastface doctor --fix"
PICTURE_ROOM = 1_000_000_000
"""Free bytes below which even pictures may not fit for long."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        check: what was looked at.
        level: a failure is what keeps the recipe from running.
        message: what was found.
        mend: the one command that mends it, where there is something to mend.
        error: how `generate` would fail over it.
    """

    check: str
    level: Severity
    message: str
    mend: str | None = None
    error: type[FastFaceError] = FastFaceError

    def record(self) -> dict[str, str | None]:
        """As JSON output tells it."""
        return {"check": self.check, "level": self.level, "message": self.message, "mend": self.mend}


def examine(
    recipe: Recipe, named: str, settings: Settings, machine: Machine, *, offline: bool | None = None
) -> list[Finding]:
    """Every check, in the order in which `generate` would meet the trouble.

    Args:
        recipe: what is to run here.
        named: how the user calls it: a name or a path.
        settings: folders and device.
        machine: what `look` saw.
        offline: leave the network alone; None asks HF_HUB_OFFLINE.
    """
    store = Store(settings, offline=offline)
    artifacts = list({one.name: one for one in artifacts_of(recipe).values()}.values())
    to_fetch = sum(one.bytes for one in store.missing(artifacts))
    return [
        check_python(),
        check_torch(machine),
        check_gpu(machine, recipe, settings.device),
        *check_memory(machine, recipe),
        *check_faces(machine, store, artifacts_of(recipe)["face"], named),
        check_cache(settings, to_fetch),
        check_room(settings, to_fetch),
        *check_models(store, named, artifacts),
        check_network(store, artifacts, to_fetch),
        check_terminal(),
    ]


def check_python() -> Finding:
    """The interpreter; what is too old could not have come this far."""
    return Finding("Python", "ok", f"{platform.python_version()} in {sys.prefix}")


def check_torch(machine: Machine) -> Finding:
    """PyTorch, and whether its build suits the machine."""
    if machine.cuda is None and machine.driver is not None:
        return Finding(
            "PyTorch",
            "warning",
            f"{machine.torch} is built without CUDA, and there is an NVIDIA driver {machine.driver}",
            torch_for(machine.driver_cuda),
        )
    build = f"for CUDA {machine.cuda}" if machine.cuda else "for the CPU" + (" and MPS" * machine.mps)
    return Finding("PyTorch", "ok", f"{machine.torch}, built {build}")


def check_gpu(machine: Machine, recipe: Recipe, device: str) -> Finding:
    """The device that the recipe would run on, and the driver under it."""
    try:
        found = check_device(recipe, device)
    except DeviceError as error:
        reason, mend = why_no_gpu(machine)
        return Finding("GPU", "failure", reason or error.message, mend or POCKET, DeviceError)
    if not found.startswith("cuda"):
        return Finding("GPU", "ok", f"none in use: {recipe.name} runs on {found}")
    gpu = machine.gpus[int(found.partition(":")[2] or 0)] if machine.gpus else None
    if gpu is not None and not served(gpu.capability, machine.architectures):
        return Finding(
            "GPU",
            "failure",
            f"{gpu.name} (compute {gpu.capability}) is not among those that this PyTorch was built for: "
            + ", ".join(machine.architectures),
            torch_for("12.6"),
            DeviceError,
        )
    name = gpu.name if gpu else found
    return Finding("GPU", "ok", f"{name}, driver {machine.driver or 'unknown'}, serves CUDA {machine.cuda}")


POCKET = 'fastface generate --recipe pocket --face me.jpg --prompt "a portrait"'


def check_memory(machine: Machine, recipe: Recipe) -> Iterator[Finding]:
    """The memory of each GPU, and how a recipe of the published size is fitted into it."""
    from ..models.offload import LEVELS, OFF, choose, need

    pixels = recipe.sampling.width * recipe.sampling.height
    smallest = need(LEVELS["6"], pixels)
    for index, gpu in enumerate(machine.gpus):
        told = f"{human_bytes(gpu.total)} on cuda:{index}, {human_bytes(gpu.free)} free"
        if not is_full_size(recipe):
            yield Finding("Memory", "ok", f"{told}; {recipe.name} is small")
            continue
        level = choose(gpu.free, pixels)
        takes = f"takes about {human_bytes(need(level, pixels))}"
        if need(level, pixels) <= gpu.free:
            how = "with all models on the card" if level is OFF else f"with --low-memory {level.name}"
            yield Finding("Memory", "ok", f"{told}; {recipe.name} {takes} {how}; {_fitting(gpu.total)}")
        elif smallest <= gpu.total:
            yield Finding(
                "Memory",
                "warning",
                f"{told}, and other programs hold the rest; {recipe.name} {takes} with --low-memory 6",
                "nvidia-smi",
            )
        else:
            lacks = f"{recipe.name} {takes} with --low-memory 6"
            yield Finding("Memory", "warning", f"{told}; {lacks}; {_fitting(gpu.total)}", POCKET)


def _fitting(total: int) -> str:
    """Which of the recipes that ship fit into so much memory, at whatever level of saving."""
    from ..models.offload import LEVELS, need

    recipes = [load_recipe(name).recipe for name in recipe_names()]
    fitting = sorted(
        one.name
        for one in recipes
        if not is_full_size(one) or need(LEVELS["6"], one.sampling.width * one.sampling.height) <= total
    )
    return (
        f"all {len(recipes)} recipes fit" if len(fitting) == len(recipes) else f"fits: {', '.join(fitting)}"
    )


def check_faces(machine: Machine, store: Store, artifact: Artifact, named: str) -> Iterator[Finding]:
    """The face libraries load, and a session on real models runs where it should."""
    failed = _import_cv()
    if failed is not None:
        yield failed
        return
    claimed = runtimes.onnx_owners()
    if not claimed:
        yield Finding("ONNX Runtime", "failure", "no ONNX Runtime is installed", FIX)
        return
    pack = store.path(artifact)
    if artifact.local is None and store.missing([artifact]):
        from ..store.manifest import load_manifest

        pack = store.path(load_manifest()["pocket-face"])
    yield from _session(machine, pack, claimed, named)


def _import_cv() -> Finding | None:
    try:
        import cv2  # noqa: F401
    except ImportError as error:
        return Finding(
            "Face libraries",
            "failure",
            f"OpenCV does not load: {first_line(error)}",
            FIX if "lib" in str(error) and ".so" in str(error) else reinstall(runtimes.DESKTOP_CV),
        )
    return None


def _session(machine: Machine, pack: Path, claimed: Mapping[str, str], named: str) -> Iterator[Finding]:
    from ..identity.analyzer import load_face_models

    wants = "cuda" if machine.gpus else "cpu"
    try:
        analyzer = load_face_models(pack, device=wants)
    except ModelUnavailableError as error:
        yield Finding("Face models", "failure", error.message, _download(named), ModelUnavailableError)
        return
    packages = " and ".join(f"{name} {version}" for name, version in claimed.items())
    swap = runtimes.onnx_swap(
        machine.cuda_in_use, works=analyzer.provider.startswith("CUDA") if machine.gpus else None
    )
    told = (
        f"{packages}: a session on {pack.name} runs on {analyzer.provider.removesuffix('ExecutionProvider')}"
    )
    if swap is None:
        yield Finding("ONNX Runtime", "ok", told)
        return
    if len(claimed) > 1:
        told += f"; both packages write one folder, and {runtimes.onnx_winner()} won"
    elif machine.gpus:
        told += ", though there is a GPU"
    yield Finding("ONNX Runtime", "warning", told, FIX)


def check_cache(settings: Settings, to_fetch: int) -> Finding:
    """Whether models can be kept where they should be; tried, since a permission bit says little to root."""
    for folder in (settings.home, settings.hub_folder):
        there = _nearest(folder)
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            return Finding(
                "Cache",
                "failure" if to_fetch else "warning",
                f"{folder} cannot be written: {error.strerror or error}",
                "export FASTFACE_HOME=~/fastface"
                + ("; unset HF_HUB_CACHE" if settings.hub_cache is not None else ""),
                ModelUnavailableError,
            )
    return Finding("Cache", "ok", f"{settings.home} can be written")


def check_room(settings: Settings, to_fetch: int) -> Finding:
    """Room on the disk for what is still to be fetched, and for pictures."""
    folder = settings.hub_folder
    there = _nearest(folder)
    free = shutil.disk_usage(there if there.is_dir() else there.parent).free
    told = f"{human_bytes(free)} free for {folder}"
    if to_fetch and free < to_fetch + MARGIN:
        return Finding(
            "Disk",
            "failure",
            f"{told}, and {human_bytes(to_fetch + MARGIN)} are needed",
            "fastface cache list",
            ModelUnavailableError,
        )
    if free < PICTURE_ROOM:
        return Finding("Disk", "warning", told, "fastface cache list")
    return Finding("Disk", "ok", told)


def _nearest(folder: Path) -> Path:
    """The folder itself, or the nearest thing above it that exists, as far as can be seen."""
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def check_models(store: Store, named: str, artifacts: Sequence[Artifact]) -> Iterator[Finding]:
    """Which models are here, whole and verified."""
    broken = [told for one in artifacts for told in _broken(store, one)]
    for told in broken:
        yield Finding("Models", "failure", told, _download(named), ModelUnavailableError)
    gone = [one for one in artifacts if one.local is not None and not one.local.exists()]
    for one in gone:
        mend = reinstall("fastface-cli") if one.packaged else f"fastface recipes show {named} --resolved"
        yield Finding("Models", "failure", f"{one.local} does not exist", mend, ModelUnavailableError)
    missing = [one for one in store.missing(artifacts) if one.artifact.local is None]
    unsure = [one.name for one in artifacts if any(file.state == "unverified" for file in store.status(one))]
    if missing:
        names = ", ".join(one.artifact.name for one in missing)
        size = human_bytes(sum(one.bytes for one in missing))
        here = len(artifacts) - len(missing) - len(gone)
        yield Finding(
            "Models",
            "failure" if store.offline else "warning",
            f"{here} of {len(artifacts)} here; {size} to fetch: {names}"
            + ("; and the network is off" if store.offline else ""),
            f"{ONLINE if store.offline else ''}{_download(named)}",
            ModelUnavailableError,
        )
    elif unsure and not broken:
        told = f"all {len(artifacts)} here, not yet verified: {', '.join(unsure)}"
        yield Finding("Models", "warning", told, f"{_download(named)} --verify")
    elif not broken and not gone:
        yield Finding("Models", "ok", f"all {len(artifacts)} here and whole")


ONLINE = "env -u HF_HUB_OFFLINE -u TRANSFORMERS_OFFLINE "


def _download(named: str) -> str:
    return f"fastface download {shlex.quote(named)}"


def _broken(store: Store, artifact: Artifact) -> Iterator[str]:
    """What is wrong with an artifact's files: bytes seen to be wrong, another size, a torn safetensors."""
    sizes = {file.path: file.bytes for file in artifact.files}
    for status in store.status(artifact):
        if status.state in ("missing", "partial"):
            continue
        expected = sizes.get(status.path)
        if status.state == "bad":
            yield f"{artifact.name}: {status.path} has wrong bytes"
        elif expected is not None and status.here != expected:
            yield f"{artifact.name}: {status.path} has {status.here:,} bytes instead of {expected:,}"
    if artifact.local is not None:  # no size and no hash is known of it
        yield from (f"{path} is torn: its header tells of another length" for path in _torn(artifact.local))


def _torn(place: Path) -> Iterator[Path]:
    """The safetensors files at a place whose length is not what their header says."""
    files = sorted(place.rglob("*.safetensors")) if place.is_dir() else [place]
    for file in files:
        if file.suffix != ".safetensors":
            continue
        try:
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length) if length < 100_000_000 else b"")
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            whole = file.stat().st_size == 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            yield file


def check_network(store: Store, artifacts: Sequence[Artifact], to_fetch: int) -> Finding:
    """Whether the Hub answers as a download would ask it."""
    where = endpoint()
    if store.offline:
        return Finding("Network", "ok", f"not tried: the network is off; {where} is where models come from")
    known = [*artifacts, *store.known.values()]
    artifact, file = next((one, file) for one in known if one.repo for file in one.files)
    try:
        announce(artifact, file)
    except ModelUnavailableError as error:
        level: Severity = "failure" if to_fetch else "warning"
        refused = re.search(r"HTTP 40[13]", error.message)
        mend = (
            "hf auth login" if refused else "export HTTPS_PROXY=http://HOST:PORT HF_ENDPOINT=https://MIRROR"
        )
        return Finding("Network", level, error.message, mend, ModelUnavailableError)
    return Finding("Network", "ok", f"{where} answers")


def check_terminal() -> Finding:
    """Whether what is printed can be read."""
    encoding = (getattr(sys.stdout, "encoding", None) or "none").lower()
    kind = "a terminal" if sys.stdout.isatty() else "not a terminal: no colors, no progress"
    if encoding.replace("-", "") != "utf8":
        told = f"{kind}, {encoding}: some letters will be replaced"
        return Finding("Terminal", "warning", told, "export PYTHONUTF8=1")
    return Finding("Terminal", "ok", f"{kind}, UTF-8, {shutil.get_terminal_size().columns} columns")


def mend(machine: Machine, log: Callable[[str], None]) -> list[str]:
    """Put the right packages in place where two share a folder.

    Call it before anything imports them. Returns what was put in place.

    Raises:
        FastFaceError: no installer, or it failed.
    """
    swaps = []
    if (swap := runtimes.onnx_swap(machine.cuda_in_use, works=None)) is not None:
        swaps.append(swap)
    elif machine.gpus and not _runs_on_cuda():
        swaps += [one for one in (runtimes.onnx_swap(machine.cuda_in_use, works=False),) if one]
    failed = _import_cv()
    if failed is not None and failed.mend == FIX:
        swaps.append(runtimes.cv_swap())
    for swap in swaps:
        runtimes.apply(swap, log)
    return [swap.name for swap in swaps]


def _runs_on_cuda() -> bool:
    """Whether a session gets the GPU, tried in another process: an imported library cannot be replaced."""
    code = (
        "from fastface_cli.identity.analyzer import load_face_models; "
        "from fastface_cli.store.manifest import load_manifest; "
        "import sys; found = load_face_models(load_manifest()['pocket-face'].local, device='cuda'); "
        "sys.exit(found.note is not None)"
    )
    with contextlib.suppress(OSError):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        return done.returncode == 0
    return False
