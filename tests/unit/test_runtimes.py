"""Packages that write the same folder: which one is active, and the commands that replace them."""

from __future__ import annotations

import importlib.metadata
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastface_cli.doctor import packages
from fastface_cli.errors import FastFaceError

Install = Callable[..., None]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Simulate an environment: each installed distribution overwrites the files in `onnxruntime/`."""
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


def test_last_installed_package_is_active(site: Install) -> None:
    site("onnxruntime-gpu", "1.31.1")
    site("onnxruntime", "1.32.0")
    assert packages.onnx_owners() == {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}
    assert packages.onnx_active() == "onnxruntime"


def test_no_runtime_is_installed(site: Install) -> None:
    assert packages.onnx_owners() == {}
    assert packages.onnx_active() == ""


def test_distribution_without_files_is_ignored(site: Install) -> None:
    site("onnxruntime", "1.32.0", files=False)
    site("onnxruntime-gpu", "1.31.1")
    assert packages.onnx_owners() == {"onnxruntime-gpu": "1.31.1"}
    assert packages.onnx_replacement("13.0") is None


@pytest.mark.parametrize(
    ("installed", "cuda", "expected"),
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
def test_replacement_for_installed_packages_and_cuda(
    site: Install, installed: list[str], cuda: str | None, expected: str | None
) -> None:
    for name in installed:
        site(name, "1.31.1")
    replacement = packages.onnx_replacement(cuda)
    assert (replacement and replacement.install) == expected
    if replacement is not None:
        assert replacement.remove == ("onnxruntime", "onnxruntime-gpu")


def test_correct_package_that_does_not_work_is_replaced(site: Install) -> None:
    site("onnxruntime-gpu", "1.31.1")
    assert packages.onnx_replacement("12.8", works=True) is None
    replacement = packages.onnx_replacement("12.8", works=False)
    assert replacement is not None
    assert replacement.name == "onnxruntime-gpu"


REPLACEMENT = packages.Replacement(("onnxruntime", "onnxruntime-gpu"), "onnxruntime-gpu[cuda]>=1.27")


def _commands(replacement: packages.Replacement) -> list[list[str]]:
    commands: list[list[str]] = []
    lines: list[str] = []
    packages.apply(replacement, lines.append, commands.append)
    assert [shlex.split(line)[1:] for line in lines] == commands
    assert replacement.command_line() == " && ".join(line.removeprefix("$ ") for line in lines)
    return commands


def test_replacement_uninstalls_both_packages_and_installs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pip = [sys.executable, "-m", "pip"]
    monkeypatch.setattr(packages, "installer", lambda: pip)
    assert _commands(REPLACEMENT) == [
        [*pip, "uninstall", "--yes", "onnxruntime", "onnxruntime-gpu"],
        [*pip, "install", "onnxruntime-gpu[cuda]>=1.27"],
    ]


def test_environment_without_pip_uses_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    find = packages.importlib.util.find_spec
    monkeypatch.setattr(
        packages.importlib.util, "find_spec", lambda name: None if name == "pip" else find(name)
    )
    monkeypatch.setattr(packages.shutil, "which", lambda name: "/bin/uv" if name == "uv" else None)
    assert _commands(REPLACEMENT) == [
        ["/bin/uv", "pip", "uninstall", "--python", sys.executable, "onnxruntime", "onnxruntime-gpu"],
        ["/bin/uv", "pip", "install", "--python", sys.executable, "onnxruntime-gpu[cuda]>=1.27"],
    ]
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(FastFaceError, match="has no pip"):
        packages.apply(REPLACEMENT, lambda _: None, lambda _: None)
    assert "docs/install.md" in REPLACEMENT.command_line()


def test_failed_command_reports_its_output_and_the_remaining_commands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fails_on_install = "import sys; sys.exit('no route to host' if 'install' in sys.argv else 0)"
    tool = [sys.executable, "-c", fails_on_install, "-m", "pip"]
    monkeypatch.setattr(packages, "installer", lambda: tool)
    with pytest.raises(FastFaceError, match="no route to host") as caught:
        packages.apply(REPLACEMENT, lambda _: None)
    hint = caught.value.hint or ""
    assert hint.endswith("install 'onnxruntime-gpu[cuda]>=1.27'")
    assert "uninstall" not in hint
