"""Find packages that overwrite each other's files, and the commands that install the right package.

`onnxruntime` and `onnxruntime-gpu` both write the folder `onnxruntime/`; the last one installed overwrites
the other. insightface requires the CPU package, so on a GPU machine the face models can end up on the CPU.
`opencv-python` requires desktop libraries, `opencv-python-headless` does not; both write `cv2/`.
docs/install.md describes the experiments.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import FastFaceError
from .shell import shell_line

CPU_RUNTIME, GPU_RUNTIME = "onnxruntime", "onnxruntime-gpu"
DESKTOP_CV, HEADLESS_CV = "opencv-python", "opencv-python-headless"
FIRST_CUDA_13 = "1.27"
"""From this version on, PyPI's onnxruntime-gpu is built for CUDA 13; earlier versions for CUDA 12."""


@dataclass(frozen=True)
class Replacement:
    """One package that replaces every package that writes the same folder.

    Args:
        remove: distributions to uninstall.
        install: requirement to install.
    """

    remove: tuple[str, ...]
    install: str

    @property
    def name(self) -> str:
        """Name of the package to install."""
        return re.split(r"[\[<>=!~ ]", self.install, maxsplit=1)[0]

    def commands(self) -> list[list[str]]:
        """Return the uninstall command and the install command for this environment.

        Raises:
            FastFaceError: neither pip nor uv is available.
        """
        tool = installer()
        is_pip = tool[-2:] == ["-m", "pip"]
        target = [] if is_pip else ["--python", sys.executable]
        confirm = ["--yes"] if is_pip else []
        return [
            [*tool, "uninstall", *target, *confirm, *self.remove],
            [*tool, "install", *target, self.install],
        ]

    def command_line(self) -> str:
        """Return both commands as one line for a shell."""
        try:
            return shell_line(*self.commands())
        except FastFaceError as error:
            return error.hint or error.message


def installed_owners(module: str, names: Sequence[str]) -> dict[str, str]:
    """Return which of the named distributions install files into a module's folder, as name to version."""
    owners = {}
    for name in names:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if any(file.parts[:1] == (module,) for file in distribution.files or ()):
            owners[name] = distribution.version
    return owners


def onnx_owners() -> dict[str, str]:
    """Return the installed ONNX Runtime packages; more than one is a conflict."""
    return installed_owners("onnxruntime", (CPU_RUNTIME, GPU_RUNTIME))


def onnx_active() -> str:
    """Return the package whose files are in `onnxruntime/`, without importing it; empty if there is none."""
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        return ""
    build_info = Path(spec.origin).parent / "capi" / "build_and_package_info.py"
    try:
        match = re.search(r"package_name\s*=\s*'([^']+)'", build_info.read_text(encoding="utf-8"))
    except OSError:
        return ""
    return match[1] if match else ""


def onnx_replacement(cuda: str | None, *, works: bool | None = None) -> Replacement | None:
    """Return the replacement that fixes ONNX Runtime here, or None if nothing is wrong.

    Args:
        cuda: CUDA version that PyTorch uses with a GPU here, such as "13.0"; None: no GPU.
        works: whether a session ran on the GPU; None: not tried, the installed packages decide.
    """
    owners = onnx_owners()
    expected = CPU_RUNTIME if cuda is None else GPU_RUNTIME
    if list(owners) == [expected] and onnx_active() == expected and works is not False:
        return None
    if cuda is None:
        return None if len(owners) == 1 else Replacement((CPU_RUNTIME, GPU_RUNTIME), CPU_RUNTIME)
    comparison = ">=" if int(cuda.split(".")[0]) >= 13 else "<"
    return Replacement((CPU_RUNTIME, GPU_RUNTIME), f"{GPU_RUNTIME}[cuda]{comparison}{FIRST_CUDA_13}")


def opencv_replacement() -> Replacement:
    """Return the replacement for an OpenCV whose desktop libraries are missing."""
    return Replacement((DESKTOP_CV, HEADLESS_CV), HEADLESS_CV)


def apply(
    replacement: Replacement, log: Callable[[str], None], run: Callable[[list[str]], None] | None = None
) -> None:
    """Run the commands of a replacement in the environment of this process.

    Raises:
        FastFaceError: neither pip nor uv is available, or a command failed.
    """
    commands = replacement.commands()
    for index, command in enumerate(commands):
        log("$ " + shell_line(command))
        try:
            (run or _run)(command)
        except FastFaceError as error:
            remaining = shell_line(*commands[index:])
            raise FastFaceError(error.message, f"check the network, then run: {remaining}") from error
    importlib.invalidate_caches()


def installer() -> list[str]:
    """Return the command that changes this environment: pip if it is installed in it, otherwise uv.

    Raises:
        FastFaceError: neither is available.
    """
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    uv = shutil.which("uv")
    if uv is None:
        raise FastFaceError(
            f"the environment {sys.prefix} has no pip, and uv is not installed",
            "reinstall fastface with the tool that installed it (see docs/install.md)",
        )
    return [uv, "pip"]


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        output = (result.stderr or result.stdout).strip().splitlines()
        reason = output[-1] if output else f"exit code {result.returncode}"
        raise FastFaceError(f"'{shell_line(command)}' failed: {reason}")
