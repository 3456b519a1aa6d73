"""The checks of `fastface doctor` on simulated machines."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.face_stand_ins import write_yunet

from fastface_cli.doctor import checks, face_libraries, machine, nvidia, packages
from fastface_cli.doctor.finding import Finding
from fastface_cli.doctor.machine import Gpu, Machine
from fastface_cli.errors import DeviceError, FastFaceError
from fastface_cli.recipe.files import load_recipe
from fastface_cli.recipe.schema import Recipe
from fastface_cli.settings import Settings
from fastface_cli.store import Store
from fastface_cli.store.manifest import Artifact, load_manifest, resolve

H100 = Gpu("NVIDIA H100", 80 * 10**9, 79 * 10**9, "9.0")
BUILT = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
GOOD = Machine("2.13.0+cu130", "13.0", BUILT, (H100,), "580.95", "13.0")


@pytest.fixture(scope="module")
def hyper() -> Recipe:
    return load_recipe("hyper-fastface").recipe


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Set the device that is selected; None: there is no GPU."""

    def select(name: str | None) -> None:
        def check(recipe: Recipe, requested: str) -> str:
            if name is None:
                raise DeviceError("there is no CUDA device here")
            return name

        monkeypatch.setattr(checks, "check_device", check)

    return select


def test_supported_gpu_is_ok(device, hyper: Recipe) -> None:
    device("cuda")
    assert checks.check_torch(GOOD).level == "ok"
    finding = checks.check_gpu(GOOD, hyper, "auto")
    assert (finding.level, finding.message) == ("ok", "NVIDIA H100, driver 580.95, CUDA 13.0")


@pytest.mark.parametrize(
    ("described", "words", "command"),
    [
        (Machine("2.13.0+cpu", driver="580.95", driver_cuda="13.0"), "built for the CPU", "whl/cu130"),
        (Machine("2.13.0+cpu", driver="550.54", driver_cuda="12.4"), "built for the CPU", "whl/cu126"),
        (
            Machine("2.13.0", "13.0", driver="570.10", driver_cuda="12.8"),
            "driver 570.10 supports CUDA 12.8, PyTorch 2.13.0 requires CUDA 13.0 (driver 580 or later)",
            "whl/cu128",
        ),
        (Machine("2.13.0", "13.0", driver="580.95", driver_cuda="13.0"), "sees no GPU", "nvidia-smi"),
        (Machine("2.13.0", "13.0"), "no CUDA device", "--recipe pocket"),
    ],
)
def test_missing_gpu_is_explained(
    device, hyper: Recipe, described: Machine, words: str, command: str
) -> None:
    device(None)
    finding = checks.check_gpu(described, hyper, "auto")
    assert finding.level == "failure"
    assert finding.error is DeviceError
    assert words in finding.message
    assert command in (finding.command or "")


def test_gpu_too_old_for_the_pytorch_build(device, hyper: Recipe) -> None:
    device("cuda:0")
    old = Machine("2.13.0", "13.0", BUILT, (Gpu("GTX 1080", 8 * 10**9, 8 * 10**9, "6.1"),), "580.95", "13.0")
    finding = checks.check_gpu(old, hyper, "auto")
    assert finding.level == "failure"
    assert "does not support GTX 1080 (compute 6.1)" in finding.message


@pytest.mark.parametrize(
    ("total", "free", "level", "words", "command"),
    [
        (80, 79, "ok", "about 12.56 GB with all models on the GPU", ""),
        (12, 11.5, "ok", "about 9.34 GB with --low-memory 12", ""),
        (8, 7.5, "ok", "about 6.44 GB with --low-memory 8", ""),
        (6, 5.5, "ok", "about 4.29 GB with --low-memory 6", ""),
        (80, 3, "warning", "the rest is used by other programs", "nvidia-smi"),
        (3, 3, "warning", "recipes that fit: pocket-am1, pocket-am2", "--recipe pocket"),
    ],
)
def test_memory_check_names_what_fits(
    hyper: Recipe, total: int, free: float, level: str, words: str, command: str
) -> None:
    gpu = Gpu("a GPU", total * 10**9, int(free * 10**9), "9.0")
    (finding,) = checks.check_memory(Machine("2.13.0", "13.0", BUILT, (gpu,)), hyper)
    assert finding.level == level
    assert f"{total}.00 GB on cuda:0, {free:.2f} GB free" in finding.message
    assert "hyper-fastface takes about" in finding.message
    assert words in finding.message
    assert ("recipes fit" in finding.message) == (level == "ok")
    assert command in (finding.command or "")


@pytest.mark.parametrize(
    ("capability", "architectures", "supported"),
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
def test_gpus_that_a_pytorch_build_supports(
    capability: str, architectures: tuple[str, ...], supported: bool
) -> None:
    assert machine.supports_gpu(capability, architectures) is supported


class _NVMLError(Exception):
    pass


def _fake_nvml(
    monkeypatch: pytest.MonkeyPatch, driver: str | bytes = "", cuda: int = 0, *, fails: str = ""
) -> list[str]:
    """Install a fake `pynvml`, in which one function may fail; return the list of its calls."""
    calls: list[str] = []
    values = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlSystemGetDriverVersion": driver,
        "nvmlSystemGetCudaDriverVersion_v2": cuda,
        "nvmlDeviceGetHandleByIndex": object(),
        "nvmlDeviceGetClockInfo": 1980,
        "nvmlDeviceGetPowerManagementLimit": 700_000,
    }
    module = ModuleType("pynvml")

    def function(name: str) -> Callable[..., object]:
        def call(*_: object) -> object:
            calls.append(name)
            if name == fails:
                raise _NVMLError
            return values[name]

        return call

    for name in values:
        setattr(module, name, function(name))
    module.NVMLError = _NVMLError
    module.NVML_CLOCK_SM, module.NVML_CLOCK_MEM = 1, 2
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return calls


@pytest.mark.parametrize(
    ("driver", "cuda", "versions"),
    [
        ("580.95.05", 13000, ("580.95.05", "13.0")),
        (b"570.10", 12080, ("570.10", "12.8")),
        ("610.10", 13030, ("610.10", "13.3")),
    ],
)
def test_driver_versions_are_read_from_nvml(
    monkeypatch: pytest.MonkeyPatch, driver: str | bytes, cuda: int, versions: tuple[str, str]
) -> None:
    calls = _fake_nvml(monkeypatch, driver, cuda)
    described = machine.inspect_machine()
    assert (described.driver, described.driver_cuda) == versions
    assert calls[-1] == "nvmlShutdown"


@pytest.mark.parametrize("fails", ["nvmlInit", "nvmlSystemGetDriverVersion"])
def test_driver_is_unknown_if_nvml_fails(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    _fake_nvml(monkeypatch, fails=fails)
    assert nvidia.driver_versions() == (None, None)


def test_gpu_state_has_the_names_and_units_of_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_nvml(monkeypatch, "580.95.05", 13000)
    assert nvidia.gpu_state(0) == {
        "driver_version": "580.95.05",
        "clocks.sm": "1980 MHz",
        "clocks.mem": "1980 MHz",
        "power.limit": "700.00 W",
    }
    _fake_nvml(monkeypatch, fails="nvmlDeviceGetHandleByIndex")
    assert nvidia.gpu_state(0) == {}


def test_missing_nvidia_ml_py_is_reported(device, hyper: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvidia.driver_versions() == (None, None)
    device(None)
    finding = checks.check_gpu(Machine("2.13.0", "13.0"), hyper, "auto")
    assert "the NVIDIA driver was not checked: nvidia-ml-py is not installed" in finding.message
    assert (finding.command or "").endswith("install nvidia-ml-py")


def test_missing_pytorch_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(FastFaceError, match="PyTorch cannot be imported") as caught:
        machine.inspect_machine()
    assert "install --force-reinstall torch" in (caught.value.hint or "")


def test_cpu_runtime_on_a_gpu_machine_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "onnx_owners", lambda: {"onnxruntime": "1.32.0"})
    monkeypatch.setattr(packages, "onnx_active", lambda: "onnxruntime")
    store = Store(Settings(home=tmp_path), offline=True)
    # buffalo_l is not downloaded here: the check falls back to the pocket models.
    (finding,) = face_libraries.check_face_libraries(
        GOOD, store, load_manifest()["buffalo_l"], "hyper-fastface"
    )
    assert finding.level == "warning"
    assert finding.message.endswith("runs on CPU although there is a GPU")
    assert finding.fixable
    assert finding.command is not None
    assert "uninstall --yes onnxruntime onnxruntime-gpu && " in finding.command
    assert finding.command.endswith("install 'onnxruntime-gpu[cuda]>=1.27'")


def test_a_detector_alone_needs_no_onnx_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "onnx_owners", dict)
    store = Store(Settings(home=tmp_path), offline=True)

    def check(artifact: Artifact) -> Finding:
        (finding,) = face_libraries.check_face_libraries(GOOD, store, artifact, "lightning-plusface")
        return finding

    assert check(load_manifest()["yunet"]).message.startswith("the face detector runs on the CPU")
    write_yunet(tmp_path / "detector.onnx")
    good = check(resolve(str(tmp_path / "detector.onnx")))
    assert (good.level, good.message.split(",")[0]) == ("ok", "detector.onnx runs on the CPU")
    (tmp_path / "detector.onnx").write_bytes(b"not a model")
    broken = check(resolve(str(tmp_path / "detector.onnx")))
    assert (broken.level, broken.command) == ("failure", "fastface download lightning-plusface")


def test_missing_desktop_library_installs_headless_opencv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cv2.py").write_text(
        "raise ImportError('libGL.so.1: cannot open shared object file: No such file or directory')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cv2", raising=False)
    store = Store(Settings(home=tmp_path), offline=True)
    (finding,) = face_libraries.check_face_libraries(
        Machine("2.13.0"), store, load_manifest()["pocket-face"], "pocket"
    )
    assert finding.level == "failure"
    assert "libGL.so.1" in finding.message
    assert finding.fixable
    assert finding.command is not None
    assert finding.command.endswith("install opencv-python-headless")
    replacements: list[packages.Replacement] = []
    monkeypatch.setattr(packages, "apply", lambda replacement, log: replacements.append(replacement))
    assert face_libraries.repair_packages(Machine("2.13.0"), lambda _: None) == ["opencv-python-headless"]
    assert [replacement.remove for replacement in replacements] == [
        ("opencv-python", "opencv-python-headless")
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the face models may run on the GPU here")
def test_runtime_that_cannot_use_the_gpu_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "onnx_owners", lambda: {"onnxruntime-gpu": "1.31.1"})
    monkeypatch.setattr(packages, "onnx_active", lambda: "onnxruntime-gpu")
    replacements: list[packages.Replacement] = []
    monkeypatch.setattr(packages, "apply", lambda replacement, log: replacements.append(replacement))
    twelve = Machine("2.11.0", "12.8", BUILT, (H100,), "570.10", "12.8")
    # The face models run on the CPU here, so the installed runtime cannot use the GPU.
    assert face_libraries.repair_packages(twelve, lambda _: None) == ["onnxruntime-gpu"]
    assert replacements[0].install == "onnxruntime-gpu[cuda]<1.27"


def test_latin1_terminal_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    finding = checks.check_terminal()
    assert (finding.level, finding.command) == ("warning", "export PYTHONUTF8=1")
