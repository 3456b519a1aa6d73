"""Windows, macOS and uv, with the platform pretended."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from fastface_cli.benchmark import hardware
from fastface_cli.doctor import machine, packages, shell
from fastface_cli.models.offload import visiting
from fastface_cli.sampling import attention

SPACES = r"C:\Program Files\python.exe"


def test_commands_are_quoted_for_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shell.shell_line(["a b", "c"], ["d>=1"]) == "'a b' c && 'd>=1'"
    monkeypatch.setattr(os, "name", "nt")
    assert shell.shell_line([SPACES, "-m", "pip"], ["d"]) == f'"{SPACES}" -m pip && d'


def test_uv_installs_into_this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "installer", lambda: ["/bin/uv", "pip"])
    assert machine.install_command("torch") == f"/bin/uv pip install --python {sys.executable} torch"
    monkeypatch.setattr(packages, "installer", lambda: [sys.executable, "-m", "pip"])
    assert machine.install_command("torch") == f"{sys.executable} -m pip install torch"


def test_windows_without_cuda_gets_the_index_url(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's build for Windows has no CUDA, although there are a driver and a GPU."""
    actual = machine.Machine("2.13.0+cpu", None, driver="580.10", driver_cuda="13.0")
    reason, command = machine.explain_missing_gpu(actual)
    assert "built for the CPU" in (reason or "")
    assert (command or "").endswith("--index-url https://download.pytorch.org/whl/cu130")


def test_peak_memory_without_the_resource_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "name", "nt")
    monkeypatch.setitem(sys.modules, "resource", None)
    peak = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=123))
    monkeypatch.setattr(psutil, "Process", lambda: peak)
    assert hardware.process_peak() == 123


def test_only_cuda_copies_without_blocking(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def to(tensor: torch.Tensor, device: torch.device, *, non_blocking: bool) -> torch.Tensor:
        asked.append((device.type, non_blocking))
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "to", to)
    layer = torch.nn.Linear(2, 2, bias=False)
    for name in ("mps", "cuda"):
        with visiting(torch.device(name), layer):
            pass
    assert asked == [("mps", False), ("cuda", True)]


def test_rounding_without_frexp(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(1000) * 2 - 1
    expected = attention.round_to_half(x)

    class OnMps(torch.Tensor):
        @property
        def device(self) -> torch.device:
            return torch.device("mps")

    monkeypatch.setattr(torch, "frexp", None)
    assert torch.equal(attention.round_to_half(x.as_subclass(OnMps)).as_subclass(torch.Tensor), expected)
