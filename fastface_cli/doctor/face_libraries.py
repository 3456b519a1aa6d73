"""Check OpenCV and ONNX Runtime, and replace their packages when two of them write the same folder."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ..errors import ModelUnavailableError
from ..identity.analyzer import is_detector
from ..store import Store
from ..store.manifest import Artifact
from . import packages
from .finding import Finding, download_command
from .machine import Machine, first_line, reinstall_command


def check_face_libraries(
    machine: Machine, store: Store, artifact: Artifact, recipe_name: str
) -> Iterator[Finding]:
    """Check that the face libraries can be imported and that the face models run on the right device."""
    failure = check_opencv()
    if failure is not None:
        yield failure
        return
    face_models = store.path(artifact)
    missing = artifact.local is None and bool(store.missing([artifact]))
    if is_detector(face_models):
        yield check_detector(None if missing else face_models, recipe_name)
        return
    owners = packages.onnx_owners()
    if not owners:
        replacement = packages.onnx_replacement(machine.cuda_in_use)
        yield Finding(
            "ONNX Runtime",
            "failure",
            "no ONNX Runtime is installed",
            replacement.command_line() if replacement else None,
            fixable=True,
        )
        return
    if missing:
        from ..store.manifest import load_manifest

        artifact = load_manifest()["pocket-face"]
    yield check_onnx_session(machine, store.path(artifact), artifact.name, owners, recipe_name)


def check_opencv() -> Finding | None:
    """Return the problem with OpenCV; None if it can be imported."""
    try:
        import cv2  # noqa: F401
    except ImportError as error:
        lacks_desktop = "lib" in str(error) and ".so" in str(error)
        return Finding(
            "Face libraries",
            "failure",
            f"OpenCV cannot be imported: {first_line(error)}",
            packages.opencv_replacement().command_line()
            if lacks_desktop
            else reinstall_command(packages.DESKTOP_CV),
            fixable=lacks_desktop,
        )
    return None


def check_detector(file: Path | None, recipe_name: str) -> Finding:
    """Load a detector that OpenCV runs, without ONNX Runtime; None: it is not downloaded yet."""
    import cv2

    from ..identity.yunet import YuNetAnalyzer

    if file is not None:
        try:
            YuNetAnalyzer(file)
        except ModelUnavailableError as error:
            return _do_not_load(error, recipe_name)
    name = "the face detector" if file is None else file.name
    return Finding("Face models", "ok", f"{name} runs on the CPU, with OpenCV {cv2.__version__}")


def check_onnx_session(
    machine: Machine, face_models: Path, name: str, owners: Mapping[str, str], recipe_name: str
) -> Finding:
    """Load the face models and check which device they run on."""
    from ..identity.analyzer import load_face_models

    try:
        analyzer = load_face_models(face_models, device="cuda" if machine.gpus else "cpu")
    except ModelUnavailableError as error:
        return _do_not_load(error, recipe_name)
    versions = " and ".join(f"{owner} {version}" for owner, version in owners.items())
    provider = analyzer.provider.removesuffix("ExecutionProvider")
    message = f"{versions}: {name} runs on {provider}"
    replacement = packages.onnx_replacement(
        machine.cuda_in_use, works=provider == "CUDA" if machine.gpus else None
    )
    if replacement is None:
        return Finding("ONNX Runtime", "ok", message)
    if len(owners) > 1:
        message += f"; both packages write the same folder, and {packages.onnx_active()} is active"
    elif machine.gpus:
        message += " although there is a GPU"
    return Finding("ONNX Runtime", "warning", message, replacement.command_line(), fixable=True)


def _do_not_load(error: ModelUnavailableError, recipe_name: str) -> Finding:
    command = download_command(recipe_name)
    return Finding("Face models", "failure", error.message, command, ModelUnavailableError)


def repair_packages(machine: Machine, log: Callable[[str], None]) -> list[str]:
    """Replace packages that write the same folder, and return the names of the installed packages.

    Call it before anything imports these packages: an imported library cannot be replaced.

    Raises:
        FastFaceError: neither pip nor uv is available, or a command failed.
    """
    replacement = packages.onnx_replacement(machine.cuda_in_use)
    if replacement is None and machine.gpus and not _runs_on_cuda():
        replacement = packages.onnx_replacement(machine.cuda_in_use, works=False)
    replacements = [] if replacement is None else [replacement]
    failure = check_opencv()
    if failure is not None and failure.fixable:
        replacements.append(packages.opencv_replacement())
    for replacement in replacements:
        packages.apply(replacement, log)
    return [replacement.name for replacement in replacements]


def _runs_on_cuda() -> bool:
    """Return whether the face models run on the GPU, tried in another process to import nothing here."""
    code = (
        "from fastface_cli.identity.analyzer import load_face_models; "
        "from fastface_cli.store.manifest import load_manifest; "
        "import sys; models = load_face_models(load_manifest()['pocket-face'].local, device='cuda'); "
        "sys.exit(models.note is not None)"
    )
    with contextlib.suppress(OSError):
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        return result.returncode == 0
    return False
