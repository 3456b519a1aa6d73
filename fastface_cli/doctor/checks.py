"""Check whether a recipe can run on this machine; every problem has one command that fixes it."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Iterator

from ..app.licensing import artifacts_of
from ..app.runtime import check_device, is_full_size
from ..errors import DeviceError
from ..recipe.files import load_recipe, recipe_names
from ..recipe.schema import Recipe
from ..settings import Settings
from ..store import Store, human_bytes
from .face_libraries import check_face_libraries
from .finding import Finding
from .machine import Gpu, Machine, explain_missing_gpu, supports_gpu, torch_install_command
from .storage import FUSED_BYTES, check_cache, check_disk, check_models, check_network

POCKET_EXAMPLE = 'fastface generate --recipe pocket --face me.jpg --prompt "a portrait"'


def examine(
    recipe: Recipe, recipe_name: str, settings: Settings, machine: Machine, *, offline: bool | None = None
) -> list[Finding]:
    """Run every check, in the order in which `generate` would meet the problems.

    Args:
        recipe: the recipe to run.
        recipe_name: its name or path, as the user wrote it.
        settings: folders and device.
        machine: the result of `inspect_machine`.
        offline: do not use the network; None follows HF_HUB_OFFLINE.
    """
    store = Store(settings, offline=offline)
    by_role = artifacts_of(recipe)
    artifacts = list({artifact.name: artifact for artifact in by_role.values()}.values())
    download_bytes = sum(entry.bytes for entry in store.missing(artifacts))
    fuses = download_bytes > 0 and is_full_size(recipe) and recipe.fuses_loras()
    return [
        check_python(),
        check_torch(machine),
        check_gpu(machine, recipe, settings.device),
        *check_memory(machine, recipe),
        *check_face_libraries(machine, store, by_role["face"], recipe_name),
        check_cache(settings, download_bytes),
        check_disk(settings, download_bytes, FUSED_BYTES if fuses else 0),
        *check_models(store, recipe_name, artifacts),
        check_network(store, artifacts, download_bytes),
        check_terminal(),
    ]


def check_python() -> Finding:
    """Report the interpreter; the package does not install on one that is too old."""
    return Finding("Python", "ok", f"{platform.python_version()} in {sys.prefix}")


def check_torch(machine: Machine) -> Finding:
    """Check that the PyTorch build suits the machine."""
    if machine.cuda is None and machine.driver is not None:
        return Finding(
            "PyTorch",
            "warning",
            f"{machine.torch} is built without CUDA, but NVIDIA driver {machine.driver} is installed",
            torch_install_command(machine.driver_cuda),
        )
    build = f"for CUDA {machine.cuda}" if machine.cuda else "for the CPU" + (" and MPS" * machine.mps)
    return Finding("PyTorch", "ok", f"{machine.torch}, built {build}")


def check_gpu(machine: Machine, recipe: Recipe, device: str) -> Finding:
    """Check the device that the recipe would run on, and its driver."""
    try:
        selected = check_device(recipe, device)
    except DeviceError as error:
        reason, command = explain_missing_gpu(machine)
        return Finding("GPU", "failure", reason or error.message, command or POCKET_EXAMPLE, DeviceError)
    if not selected.startswith("cuda"):
        return Finding("GPU", "ok", f"not used: {recipe.name} runs on {selected}")
    gpu = machine.gpus[int(selected.partition(":")[2] or 0)] if machine.gpus else None
    if gpu is not None and not supports_gpu(gpu.capability, machine.architectures):
        return Finding(
            "GPU",
            "failure",
            f"this PyTorch build does not support {gpu.name} (compute {gpu.capability}), only "
            + ", ".join(machine.architectures),
            torch_install_command("12.6"),
            DeviceError,
        )
    name = gpu.name if gpu else selected
    return Finding("GPU", "ok", f"{name}, driver {machine.driver or 'unknown'}, CUDA {machine.cuda}")


def check_memory(machine: Machine, recipe: Recipe) -> Iterator[Finding]:
    """Check the memory of each GPU, and report how a full-size recipe fits into it."""
    for index, gpu in enumerate(machine.gpus):
        memory = f"{human_bytes(gpu.total)} on cuda:{index}, {human_bytes(gpu.free)} free"
        if is_full_size(recipe):
            yield _check_full_size_memory(gpu, recipe, memory)
        else:
            yield Finding("Memory", "ok", f"{memory}; {recipe.name} is small")


def _check_full_size_memory(gpu: Gpu, recipe: Recipe, memory: str) -> Finding:
    from ..models.offload import LEVELS, OFF, choose, need

    pixels = recipe.sampling.width * recipe.sampling.height
    level = choose(gpu.free, pixels)
    requirement = f"{recipe.name} takes about {human_bytes(need(level, pixels))}"
    if need(level, pixels) <= gpu.free:
        mode = "with all models on the GPU" if level is OFF else f"with --low-memory {level.name}"
        return Finding("Memory", "ok", f"{memory}; {requirement} {mode}; {_fitting(gpu.total)}")
    requirement += " with --low-memory 6"
    if need(LEVELS["6"], pixels) <= gpu.total:
        message = f"{memory}, the rest is used by other programs; {requirement}"
        return Finding("Memory", "warning", message, "nvidia-smi")
    return Finding("Memory", "warning", f"{memory}; {requirement}; {_fitting(gpu.total)}", POCKET_EXAMPLE)


def _fitting(total: int) -> str:
    """Name the built-in recipes that fit into this much memory with any `--low-memory` level."""
    from ..models.offload import LEVELS, need

    recipes = [load_recipe(name).recipe for name in recipe_names()]
    fitting = sorted(
        recipe.name
        for recipe in recipes
        if not is_full_size(recipe)
        or need(LEVELS["6"], recipe.sampling.width * recipe.sampling.height) <= total
    )
    if len(fitting) == len(recipes):
        return f"all {len(recipes)} recipes fit"
    return f"recipes that fit: {', '.join(fitting)}"


def check_terminal() -> Finding:
    """Check that the terminal can show every character."""
    encoding = (getattr(sys.stdout, "encoding", None) or "none").lower()
    kind = "a terminal" if sys.stdout.isatty() else "not a terminal: no colors, no progress bars"
    if encoding.replace("-", "") != "utf8":
        message = f"{kind}, {encoding}: some characters will be replaced"
        return Finding("Terminal", "warning", message, "export PYTHONUTF8=1")
    return Finding("Terminal", "ok", f"{kind}, UTF-8, {shutil.get_terminal_size().columns} columns")
