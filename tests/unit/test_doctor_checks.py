"""The checks of `fastface doctor` on machines that are not here."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastface_cli.doctor import checks as doctor
from fastface_cli.doctor import machine
from fastface_cli.doctor import packages as runtimes
from fastface_cli.doctor.machine import Gpu, Machine
from fastface_cli.errors import DeviceError, FastFaceError
from fastface_cli.recipe.files import load_recipe
from fastface_cli.recipe.schema import Recipe
from fastface_cli.settings import Settings
from fastface_cli.store import Store
from fastface_cli.store.manifest import load_manifest

H100 = Gpu("NVIDIA H100", 80 * 10**9, 79 * 10**9, "9.0")
BUILT = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
GOOD = Machine("2.13.0+cu130", "13.0", BUILT, (H100,), "580.95", "13.0")


@pytest.fixture(scope="module")
def hyper() -> Recipe:
    return load_recipe("hyper-fastface").recipe


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """What asking for the device gives; None: there is no GPU."""

    def answers(found: str | None) -> None:
        def check(recipe: Recipe, wanted: str) -> str:
            if found is None:
                raise DeviceError("there is no CUDA device here")
            return found

        monkeypatch.setattr(doctor, "check_device", check)

    return answers


def test_a_gpu_that_serves(device, hyper: Recipe) -> None:
    device("cuda")
    assert doctor.check_torch(GOOD).level == "ok"
    found = doctor.check_gpu(GOOD, hyper, "auto")
    assert (found.level, found.message) == ("ok", "NVIDIA H100, driver 580.95, serves CUDA 13.0")


@pytest.mark.parametrize(
    ("seen", "words", "mend"),
    [
        (Machine("2.13.0+cpu", driver="580.95", driver_cuda="13.0"), "built for the CPU", "whl/cu130"),
        (Machine("2.13.0+cpu", driver="550.54", driver_cuda="12.4"), "built for the CPU", "whl/cu126"),
        (
            Machine("2.13.0", "13.0", driver="570.10", driver_cuda="12.8"),
            "driver 570.10 serves CUDA 12.8, PyTorch 2.13.0 needs CUDA 13.0 (driver 580 or later)",
            "whl/cu128",
        ),
        (Machine("2.13.0", "13.0", driver="580.95", driver_cuda="13.0"), "sees no GPU", "nvidia-smi"),
        (Machine("2.13.0", "13.0"), "no CUDA device", "--recipe pocket"),
    ],
)
def test_why_there_is_no_gpu(device, hyper: Recipe, seen: Machine, words: str, mend: str) -> None:
    device(None)
    found = doctor.check_gpu(seen, hyper, "auto")
    assert found.level == "failure"
    assert found.error is DeviceError
    assert words in found.message
    assert mend in (found.mend or "")


def test_a_gpu_that_this_build_does_not_serve(device, hyper: Recipe) -> None:
    device("cuda:0")
    old = Machine("2.13.0", "13.0", BUILT, (Gpu("GTX 1080", 8 * 10**9, 8 * 10**9, "6.1"),), "580.95", "13.0")
    found = doctor.check_gpu(old, hyper, "auto")
    assert found.level == "failure"
    assert "GTX 1080 (compute 6.1)" in found.message


@pytest.mark.parametrize(
    ("total", "free", "level", "words", "mend"),
    [
        (80, 79, "ok", "about 12.13 GB with all models on the card", ""),
        (12, 11.5, "ok", "about 8.91 GB with --low-memory 12", ""),
        (8, 7.5, "ok", "about 6.01 GB with --low-memory 8", ""),
        (6, 5.5, "ok", "about 3.87 GB with --low-memory 6", ""),
        (80, 3, "warning", "other programs hold the rest", "nvidia-smi"),
        (3, 3, "warning", "fits: pocket-am1, pocket-am2", "--recipe pocket"),
    ],
)
def test_memory_and_what_fits(
    hyper: Recipe, total: int, free: float, level: str, words: str, mend: str
) -> None:
    gpu = Gpu("a card", total * 10**9, int(free * 10**9), "9.0")
    (found,) = doctor.check_memory(Machine("2.13.0", "13.0", BUILT, (gpu,)), hyper)
    assert found.level == level
    assert f"{total}.00 GB on cuda:0, {free:.2f} GB free" in found.message
    assert "hyper-fastface takes about" in found.message
    assert words in found.message
    assert ("recipes fit" in found.message) == (level == "ok")
    assert mend in (found.mend or "")


@pytest.mark.parametrize(
    ("capability", "architectures", "served"),
    [
        ("9.0", ("sm_90",), True),
        ("8.9", ("sm_80", "sm_86"), True),
        ("8.0", ("sm_86",), False),
        ("12.0", ("sm_90", "compute_90"), True),
        ("12.0", ("sm_90",), False),
        ("10.3", ("sm_100a",), True),
        ("7.5", (), True),
    ],
)
def test_which_gpus_a_build_serves(capability: str, architectures: tuple[str, ...], served: bool) -> None:
    assert machine.served(capability, architectures) is served


@pytest.mark.parametrize(
    ("said", "versions"),
    [
        (
            "| NVIDIA-SMI 580.95.05     Driver Version: 580.95.05     CUDA Version: 13.0     |",
            ("580.95.05", "13.0"),
        ),
        (
            "| NVIDIA-SMI 610.10  KMD Version: 610.10 Driver Version: 610.10  CUDA UMD Version: 13.3 |",
            ("610.10", "13.3"),
        ),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", (None, None)),
    ],
)
def test_what_the_driver_says(
    monkeypatch: pytest.MonkeyPatch, said: str, versions: tuple[str | None, str | None]
) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/bin/nvidia-smi")
    monkeypatch.setattr(
        machine.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, said, "")
    )
    seen = machine.look()
    assert (seen.driver, seen.driver_cuda) == versions


def test_without_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(FastFaceError, match="PyTorch does not load") as caught:
        machine.look()
    assert "install --force-reinstall torch" in (caught.value.hint or "")


def test_a_gpu_and_a_runtime_for_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "onnx_owners", lambda: {"onnxruntime": "1.32.0"})
    monkeypatch.setattr(runtimes, "onnx_winner", lambda: "onnxruntime")
    store = Store(Settings(home=tmp_path), offline=True)
    # Its own pack is not here: any real one shows what a session gets.
    (found,) = doctor.check_faces(GOOD, store, load_manifest()["buffalo_l"], "hyper-fastface")
    assert found.level == "warning"
    assert found.message.endswith("runs on CPU, though there is a GPU")
    assert found.mend == "fastface doctor --fix"


def test_a_desktop_library_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cv2.py").write_text(
        "raise ImportError('libGL.so.1: cannot open shared object file: No such file or directory')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cv2", raising=False)
    store = Store(Settings(home=tmp_path), offline=True)
    (found,) = doctor.check_faces(Machine("2.13.0"), store, load_manifest()["pocket-face"], "pocket")
    assert found.level == "failure"
    assert "libGL.so.1" in found.message
    assert found.mend == "fastface doctor --fix"
    swaps: list[runtimes.Swap] = []
    monkeypatch.setattr(runtimes, "apply", lambda swap, log: swaps.append(swap))
    assert doctor.mend(Machine("2.13.0"), lambda _: None) == ["opencv-python-headless"]
    assert [swap.stand_in for swap in swaps] == ["opencv-python"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a session may get the GPU here")
def test_a_runtime_that_does_not_reach_the_gpu_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "onnx_owners", lambda: {"onnxruntime-gpu": "1.31.1"})
    monkeypatch.setattr(runtimes, "onnx_winner", lambda: "onnxruntime-gpu")
    swaps: list[runtimes.Swap] = []
    monkeypatch.setattr(runtimes, "apply", lambda swap, log: swaps.append(swap))
    twelve = Machine("2.11.0", "12.8", BUILT, (H100,), "570.10", "12.8")
    # Here a session opened in another process gets no GPU: the runtime is for another CUDA.
    assert doctor.mend(twelve, lambda _: None) == ["onnxruntime-gpu"]
    assert swaps[0].install == "onnxruntime-gpu[cuda]<1.27"


def test_a_terminal_of_few_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    found = doctor.check_terminal()
    assert (found.level, found.mend) == ("warning", "export PYTHONUTF8=1")
