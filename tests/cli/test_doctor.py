"""`fastface doctor` in broken environments: every problem has a command that fixes it."""

from __future__ import annotations

import json
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_manifest import BIG, Shop

from fastface_cli.cli import run
from fastface_cli.doctor import packages

Capture = pytest.CaptureFixture[str]
FACE = Path(packages.__file__).parents[1] / "pocket" / "weights" / "face"
RECIPE = f"""
extends: hyper-fastface
model:
  base: tiny-base
  unet: tiny-unet
  distillation: {{4: tiny-lora}}
  vae: tiny-open
  adapter: tiny-url
  image_encoder: tiny-package
  face: {FACE}
"""

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return str(path)


def examined(capsys: Capture, *arguments: str) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    """Return the exit code, and the findings by check."""
    capsys.readouterr()
    code = run(["doctor", *arguments, "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] is (code == 0)
    assert (printed["error"] is None) is (code == 0)
    findings: dict[str, list[dict[str, Any]]] = {}
    for finding in printed["findings"]:
        findings.setdefault(finding["check"], []).append(finding)
    failed = [finding for group in findings.values() for finding in group if finding["level"] == "failure"]
    assert bool(failed) is (code != 0)
    assert all(
        finding["mend"] for group in findings.values() for finding in group if finding["level"] != "ok"
    )
    return code, findings


def test_complete_environment_is_ok(shop: Shop, recipe: str, capsys: Capture) -> None:
    assert run(["download", recipe]) == 0
    code, findings = examined(capsys, "--recipe", recipe)
    assert code == 0
    assert {
        finding["level"] for name, group in findings.items() for finding in group if name != "Terminal"
    } == {"ok"}
    assert "all 7 downloaded and complete" in findings["Models"][0]["message"]
    assert shop.hub.url in findings["Network"][0]["message"]
    assert "runs on CPU" in findings["ONNX Runtime"][0]["message"]


def test_text_report_prints_the_command_below_its_finding(shop: Shop, recipe: str, capsys: Capture) -> None:
    assert run(["doctor", "--recipe", recipe]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "tiny can run here"
    where = next(index for index, line in enumerate(lines) if line.startswith("warning  Models"))
    assert "to download: tiny-base" in lines[where]
    assert lines[where + 1].strip() == f"fastface download {recipe}"


def test_two_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    info = tmp_path / "site" / "onnxruntime_gpu-1.31.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.31.1\n")
    (info / "RECORD").write_text("onnxruntime/__init__.py,,\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(info.parent)])
    code, findings = examined(capsys, "--recipe", "pocket")
    assert code == 0  # the face models run, but on the CPU
    (finding,) = findings["ONNX Runtime"]
    assert finding["level"] == "warning"
    assert "pip uninstall --yes onnxruntime onnxruntime-gpu && " in finding["mend"]
    assert finding["mend"].endswith("pip install onnxruntime")
    assert "onnxruntime-gpu 1.31.1" in finding["message"]
    assert "both packages write the same folder, and onnxruntime is active" in finding["message"]
    replacements: list[packages.Replacement] = []
    monkeypatch.setattr(packages, "apply", lambda replacement, log: replacements.append(replacement))
    capsys.readouterr()
    assert run(["doctor", "--recipe", "pocket", "--fix"]) == 0
    assert "`fastface doctor --fix` runs the commands" in capsys.readouterr().out
    assert replacements == [packages.Replacement(("onnxruntime", "onnxruntime-gpu"), "onnxruntime")]


def test_fix_with_nothing_to_replace(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(packages, "apply", lambda *_: pytest.fail("there was nothing to replace"))
    code, _ = examined(capsys, "--recipe", "pocket", "--fix")
    assert code == 0
    assert run(["doctor", "--recipe", "pocket", "--fix"]) == 0
    assert "--fix has nothing to replace" in capsys.readouterr().err


def test_read_only_cache_is_a_failure(
    shop: Shop, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FASTFACE_HOME", str(tmp_path / "file" / "home"))
    code, findings = examined(capsys, "--recipe", recipe)
    assert code == 3
    (finding,) = findings["Cache"]
    assert str(tmp_path / "file" / "home") in finding["message"]
    assert finding["level"] == "failure"
    assert finding["mend"] == "export FASTFACE_HOME=~/fastface"


def test_read_only_cache_that_nothing_needs_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FASTFACE_HOME", str(tmp_path / "file" / "home"))
    code, findings = examined(capsys, "--recipe", "pocket")
    assert code == 0
    assert findings["Cache"][0]["level"] == "warning"


def test_full_disk(shop: Shop, recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 4096, 4096))
    code, findings = examined(capsys, "--recipe", recipe)
    assert code == 3
    (finding,) = findings["Disk"]
    assert finding["level"] == "failure"
    assert "4 kB free" in finding["message"]
    assert finding["mend"] == "fastface cache list"


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damaged_model(shop: Shop, recipe: str, capsys: Capture, damage: str) -> None:
    assert run(["download", recipe]) == 0
    file = shop.store().path(shop["lora"]).resolve()
    if damage == "cut":
        file.write_bytes(BIG[:-1000])
    else:
        file.write_bytes(BIG[::-1])
    code, findings = examined(capsys, "--recipe", recipe)
    (finding,) = findings["Models"]
    if damage == "cut":
        assert code == 3
        assert f"{len(BIG) - 1000:,} bytes instead of {len(BIG):,}" in finding["message"]
        assert finding["mend"] == f"fastface download {recipe}"
    else:  # only a hash shows it, which is slow for real models: the command computes it
        assert code == 0
        assert finding["message"] == "all 7 downloaded, not yet verified: tiny-lora"
        assert finding["mend"] == f"fastface download {recipe} --verify"
        assert run(["download", recipe, "--verify"]) == 3
    assert run(["download", recipe]) == 0
    assert examined(capsys, "--recipe", recipe)[1]["Models"][0]["level"] == "ok"


def test_truncated_local_file(shop: Shop, recipe: str, tmp_path: Path, capsys: Capture) -> None:
    truncated = tmp_path / "lora.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    truncated.write_bytes(len(header).to_bytes(8, "little") + header + bytes(7))
    Path(recipe).write_text(RECIPE.replace("tiny-lora", str(truncated)), encoding="utf-8")
    code, findings = examined(capsys, "--recipe", recipe)
    assert code == 3
    assert f"{truncated} is damaged" in findings["Models"][0]["message"]
    truncated.write_bytes(truncated.read_bytes() + bytes(1))
    assert examined(capsys, "--recipe", recipe)[0] == 0


def test_offline(shop: Shop, recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, findings = examined(capsys, "--recipe", recipe)
    assert code == 3
    (finding,) = findings["Models"]
    assert "the network is disabled" in finding["message"]
    assert finding["mend"] == f"env -u HF_HUB_OFFLINE -u TRANSFORMERS_OFFLINE fastface download {recipe}"
    assert findings["Network"][0]["level"] == "ok"
    assert shop.hub.log == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert run(["download", recipe]) == 0
    assert examined(capsys, "--recipe", recipe, "--offline")[0] == 0


@pytest.mark.parametrize(("status", "mend"), [(401, "hf auth login"), (503, "export HTTPS_PROXY=")])
def test_hub_error(shop: Shop, recipe: str, capsys: Capture, status: int, mend: str) -> None:
    shop.hub.status["tiny/base"] = status
    code, findings = examined(capsys, "--recipe", recipe)
    assert code == 3
    assert f"HTTP {status}" in findings["Network"][0]["message"]
    assert findings["Network"][0]["mend"].startswith(mend)
    assert len(shop.hub.asked("HEAD", "tiny/base")) <= 2, "a report does not wait for a server that is down"


def test_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, findings = examined(capsys)  # the default recipe
    assert code == 4
    (finding,) = findings["GPU"]
    assert finding["level"] == "failure"
    assert "no CUDA device" in finding["message"]
    assert "--recipe pocket" in finding["mend"]
    code, findings = examined(capsys, "--recipe", "pocket")
    assert code == 0
    assert findings["GPU"][0]["level"] == "ok"


def test_unknown_recipe(capsys: Capture) -> None:
    assert run(["doctor", "--recipe", "no-such-recipe", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "recipe"


def test_online_names_every_pin_that_differs(shop: Shop, capsys: Capture) -> None:
    def pins() -> tuple[int, list[dict[str, Any]]]:
        capsys.readouterr()
        code = run(["doctor", "--online", "--json"])
        return code, json.loads(capsys.readouterr().out)["pins"]

    code, answers = pins()
    assert (code, [answer["problem"] for answer in answers if answer["problem"]]) == (0, [])
    expected = {name for name, artifact in shop.known.items() if artifact.repo or artifact.url}
    assert {answer["name"] for answer in answers} == {name for name in expected if shop.known[name].files}
    shop.hub.files["tiny/lora/lora.safetensors"] += b"more"
    code, answers = pins()
    assert code == 3
    (bad,) = [answer for answer in answers if not answer["ok"]]
    assert bad["name"] == "tiny-lora"
    assert "pinned" in bad["problem"]
    assert not shop.hub.asked("GET")
