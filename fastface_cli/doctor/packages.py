"""Packages that share a folder: which of them won, and how to put the right one in its place.

`onnxruntime` and `onnxruntime-gpu` both write the folder `onnxruntime/`, and whoever is installed last wins.
insightface asks for the plain one, so a GPU machine ends with face models on the CPU unless someone acts.
`opencv-python` needs the libraries of a desktop, `opencv-python-headless` does not; both write `cv2/`.
docs/install.md tells the experiments.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import FastFaceError

CPU_RUNTIME, GPU_RUNTIME = "onnxruntime", "onnxruntime-gpu"
DESKTOP_CV, HEADLESS_CV = "opencv-python", "opencv-python-headless"
FIRST_CUDA_13 = "1.27"
"""From this version on, PyPI's onnxruntime-gpu is built for CUDA 13; those before it for CUDA 12."""


@dataclass(frozen=True)
class Swap:
    """One package put in the place of all that claim its folder.

    Args:
        remove: distributions that go.
        install: requirement that comes.
        stand_in: name of a distribution without files that then answers for what others require by that
            name, so that no installer brings it back; None where `install` has that name itself.
    """

    remove: tuple[str, ...]
    install: str
    stand_in: str | None = None

    @property
    def name(self) -> str:
        """Name of the package that comes."""
        return re.split(r"[\[<>=!~ ]", self.install, maxsplit=1)[0]


def owners(module: str, names: Sequence[str]) -> dict[str, str]:
    """Which of some distributions claim a module's folder: name to version.

    A distribution without files, such as our own stand-in, claims nothing.
    """
    found = {}
    for name in names:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if any(file.parts[:1] == (module,) for file in distribution.files or ()):
            found[name] = distribution.version
    return found


def onnx_owners() -> dict[str, str]:
    """The ONNX Runtime packages installed here; more than one is one too many."""
    return owners("onnxruntime", (CPU_RUNTIME, GPU_RUNTIME))


def onnx_winner() -> str:
    """The package whose files lie in `onnxruntime/`, asked without importing it; empty if there is none."""
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        return ""
    said = Path(spec.origin).parent / "capi" / "build_and_package_info.py"
    try:
        match = re.search(r"package_name\s*=\s*'([^']+)'", said.read_text(encoding="utf-8"))
    except OSError:
        return ""
    return match[1] if match else ""


def onnx_swap(cuda: str | None, *, works: bool | None = None) -> Swap | None:
    """What mends the ONNX Runtime of this environment, or None where nothing is wrong.

    Args:
        cuda: version of the CUDA that PyTorch brings and that has a GPU here, as "13.0"; None: no GPU.
        works: whether a session was seen on the GPU; None: not tried, the packages decide.
    """
    claimed = onnx_owners()
    wanted = CPU_RUNTIME if cuda is None else GPU_RUNTIME
    if list(claimed) == [wanted] and onnx_winner() == wanted and works is not False:
        return None
    if cuda is None:
        return None if len(claimed) == 1 else Swap((CPU_RUNTIME, GPU_RUNTIME), CPU_RUNTIME)
    side = ">=" if int(cuda.split(".")[0]) >= 13 else "<"
    return Swap((CPU_RUNTIME, GPU_RUNTIME), f"{GPU_RUNTIME}[cuda]{side}{FIRST_CUDA_13}", CPU_RUNTIME)


def cv_swap() -> Swap:
    """What mends an OpenCV that misses the libraries of a desktop."""
    return Swap((DESKTOP_CV, HEADLESS_CV), HEADLESS_CV, DESKTOP_CV)


def apply(swap: Swap, log: Callable[[str], None], run: Callable[[list[str]], None] | None = None) -> None:
    """Put a package in its place, in the environment of this process, and touch nothing else.

    The new package is installed first, with what it needs: without a network nothing has changed yet when
    that fails. Then all claimants go, since each takes the other's files along, and it comes back alone.

    Raises:
        FastFaceError: no installer here, or it failed.
    """
    step = run or _run
    with tempfile.TemporaryDirectory(prefix="fastface-") as folder:
        tool, pip = installer(), importlib.util.find_spec("pip") is not None
        where = [] if pip else ["--python", sys.executable]
        sure = ["--yes"] if pip else []
        again = [swap.install]
        steps = [[*tool, "install", *where, swap.install]]
        if pip:  # uv keeps what it fetched, pip only where its cache is not switched off
            steps.append([*tool, "download", "--no-deps", "--dest", folder, swap.install])
            again += ["--no-index", "--find-links", folder]
        if swap.stand_in is not None:
            again.append(str(write_stand_in(Path(folder), swap.stand_in, swap.name)))
        steps.append([*tool, "uninstall", *where, *sure, *swap.remove])
        steps.append([*tool, "install", *where, "--no-deps", *again])
        for command in steps:
            log("$ " + shlex.join(command))  # quoted: it may be copied
            step(command)
    importlib.invalidate_caches()


def installer() -> list[str]:
    """The command that changes this environment: pip where it is inside, else uv.

    Raises:
        FastFaceError: neither is here.
    """
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    uv = shutil.which("uv")
    if uv is None:
        raise FastFaceError(
            f"the environment {sys.prefix} has no pip, and there is no uv to change it with",
            "install fastface again with the tool that installed it; docs/install.md says how",
        )
    return [uv, "pip"]


def write_stand_in(folder: Path, name: str, instead: str) -> Path:
    """A wheel without files, called `name`, that requires `instead`.

    Its version is far above any real one, so that no lower bound refuses it, and names itself a stand-in.
    """
    stem = f"{name.replace('-', '_')}-{STAND_IN_VERSION}"
    info = f"{stem}.dist-info"
    path = folder / f"{stem}-py3-none-any.whl"
    files = {
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {STAND_IN_VERSION}\n"
            f"Summary: Nothing but a name: {instead} provides the module\nRequires-Dist: {instead}\n"
        ),
        f"{info}/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: fastface\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }
    files[f"{info}/RECORD"] = "".join(f"{one},,\n" for one in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)
    return path


STAND_IN_VERSION = "999+standin"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise FastFaceError(
            f"'{shlex.join(command)}' failed: {said[-1] if said else f'exit code {done.returncode}'}",
            "check the network, then run `fastface doctor --fix` again",
        )
