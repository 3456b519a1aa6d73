"""Two packages over one folder: who claims it, who won, and what is done about it."""

from __future__ import annotations

import importlib.metadata
import shlex
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fastface_cli.doctor import packages as runtimes
from fastface_cli.errors import FastFaceError

Install = Callable[..., None]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """An environment of its own: distributions that all claim `onnxruntime/`, the last one's files on top."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(folder)])
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)

    def install(name: str, version: str, *, files: bool = True) -> None:
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        rows = [f"{info.name}/METADATA,,"]
        if files:
            capi = folder / "onnxruntime" / "capi"
            capi.mkdir(parents=True, exist_ok=True)
            (folder / "onnxruntime" / "__init__.py").write_text("")
            (capi / "build_and_package_info.py").write_text(
                f"package_name = '{name}'\n__version__ = '{version}'\n"
            )
            rows += ["onnxruntime/__init__.py,,", "onnxruntime/capi/build_and_package_info.py,,"]
        (info / "RECORD").write_text("\n".join(rows) + "\n")
        importlib.invalidate_caches()

    return install


def test_the_last_one_wins(site: Install) -> None:
    site("onnxruntime-gpu", "1.31.1")
    site("onnxruntime", "1.32.0")
    assert runtimes.onnx_owners() == {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}
    assert runtimes.onnx_winner() == "onnxruntime"


def test_nothing_installed(site: Install) -> None:
    assert runtimes.onnx_owners() == {}
    assert runtimes.onnx_winner() == ""


def test_a_stand_in_claims_nothing(site: Install) -> None:
    site("onnxruntime", runtimes.STAND_IN_VERSION, files=False)
    site("onnxruntime-gpu", "1.31.1")
    assert runtimes.onnx_owners() == {"onnxruntime-gpu": "1.31.1"}
    assert runtimes.onnx_swap("13.0") is None


@pytest.mark.parametrize(
    ("installed", "cuda", "wanted"),
    [
        (["onnxruntime"], None, None),
        (["onnxruntime-gpu"], None, None),
        (["onnxruntime-gpu"], "13.0", None),
        (["onnxruntime"], "13.0", "onnxruntime-gpu[cuda]>=1.27"),
        (["onnxruntime"], "12.8", "onnxruntime-gpu[cuda]<1.27"),
        (["onnxruntime-gpu", "onnxruntime"], "13.2", "onnxruntime-gpu[cuda]>=1.27"),
        (["onnxruntime", "onnxruntime-gpu"], "13.0", "onnxruntime-gpu[cuda]>=1.27"),
        (["onnxruntime-gpu", "onnxruntime"], None, "onnxruntime"),
        ([], None, "onnxruntime"),
    ],
)
def test_what_mends(site: Install, installed: list[str], cuda: str | None, wanted: str | None) -> None:
    for name in installed:
        site(name, "1.31.1")
    swap = runtimes.onnx_swap(cuda)
    assert (swap and swap.install) == wanted
    if swap is not None:
        assert swap.remove == ("onnxruntime", "onnxruntime-gpu")
        assert swap.stand_in == ("onnxruntime" if cuda else None)


def test_the_right_package_that_does_not_work_is_replaced(site: Install) -> None:
    site("onnxruntime-gpu", "1.31.1")
    assert runtimes.onnx_swap("12.8", works=True) is None
    swap = runtimes.onnx_swap("12.8", works=False)
    assert swap is not None
    assert swap.name == "onnxruntime-gpu"


SWAP = runtimes.Swap(("onnxruntime", "onnxruntime-gpu"), "onnxruntime-gpu[cuda]>=1.27", "onnxruntime")


def _steps(swap: runtimes.Swap) -> list[list[str]]:
    steps: list[list[str]] = []
    said: list[str] = []
    runtimes.apply(swap, said.append, steps.append)
    assert [shlex.split(line)[1:] for line in said] == steps
    return steps


def test_nothing_is_removed_before_all_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "installer", lambda: [sys.executable, "-m", "pip"])
    steps = _steps(SWAP)
    pip = [sys.executable, "-m", "pip"]
    assert [step[:4] for step in steps] == [
        [*pip, "install"],
        [*pip, "download"],
        [*pip, "uninstall"],
        [*pip, "install"],
    ]
    assert steps[2][-2:] == ["onnxruntime", "onnxruntime-gpu"]
    assert "--no-index" in steps[3]
    assert steps[3][-1].endswith("onnxruntime-999+standin-py3-none-any.whl")


def test_an_environment_without_pip_is_changed_with_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    find = runtimes.importlib.util.find_spec
    monkeypatch.setattr(
        runtimes.importlib.util, "find_spec", lambda name: None if name == "pip" else find(name)
    )
    monkeypatch.setattr(runtimes.shutil, "which", lambda name: "/bin/uv" if name == "uv" else None)
    steps = _steps(SWAP)
    assert [step[:5] for step in steps] == [
        ["/bin/uv", "pip", verb, "--python", sys.executable] for verb in ("install", "uninstall", "install")
    ]
    monkeypatch.setattr(runtimes.shutil, "which", lambda name: None)
    with pytest.raises(FastFaceError, match="has no pip"):
        runtimes.apply(SWAP, lambda _: None, lambda _: None)


def test_a_failed_step_ends_it_with_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    tool = [sys.executable, "-c", "import sys; sys.exit('no route to host')", "pip"]
    monkeypatch.setattr(runtimes, "installer", lambda: tool)
    with pytest.raises(FastFaceError, match="no route to host"):
        runtimes.apply(SWAP, lambda _: None)


def test_the_stand_in_is_a_wheel_of_nothing_but_a_name(tmp_path: Path) -> None:
    path = runtimes.write_stand_in(tmp_path, "opencv-python", "opencv-python-headless")
    assert path.name == "opencv_python-999+standin-py3-none-any.whl"
    with zipfile.ZipFile(path) as wheel:
        assert all(name.startswith("opencv_python-999+standin.dist-info/") for name in wheel.namelist())
        wheel.extractall(tmp_path / "site")
    (found,) = importlib.metadata.distributions(path=[str(tmp_path / "site")])
    assert found.metadata["Name"] == "opencv-python"
    assert found.version == "999+standin"
    assert found.requires == ["opencv-python-headless"]
    assert {file.parts[0] for file in found.files or ()} == {"opencv_python-999+standin.dist-info"}
