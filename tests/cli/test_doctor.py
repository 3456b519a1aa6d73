"""`fastface doctor` in broken environments: each names what is wrong and the command that mends it."""

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
from fastface_cli.doctor import packages as runtimes

Capture = pytest.CaptureFixture[str]
FACE = Path(runtimes.__file__).parents[1] / "pocket" / "weights" / "face"
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

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tells of a machine without a GPU")


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return str(path)


def examined(capsys: Capture, *arguments: str) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    """Exit code, and the findings by what was looked at."""
    capsys.readouterr()
    code = run(["doctor", *arguments, "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] is (code == 0)
    assert (printed["error"] is None) is (code == 0)
    found: dict[str, list[dict[str, Any]]] = {}
    for finding in printed["findings"]:
        found.setdefault(finding["check"], []).append(finding)
    failed = [one for ones in found.values() for one in ones if one["level"] == "failure"]
    assert bool(failed) is (code != 0)
    assert all(one["mend"] for ones in found.values() for one in ones if one["level"] != "ok")
    return code, found


def test_a_whole_environment(shop: Shop, recipe: str, capsys: Capture) -> None:
    assert run(["download", recipe]) == 0
    code, found = examined(capsys, "--recipe", recipe)
    assert code == 0
    assert {one["level"] for name, ones in found.items() for one in ones if name != "Terminal"} == {"ok"}
    assert "all 7 here and whole" in found["Models"][0]["message"]
    assert shop.hub.url in found["Network"][0]["message"]
    assert "runs on CPU" in found["ONNX Runtime"][0]["message"]


def test_the_report_for_people(shop: Shop, recipe: str, capsys: Capture) -> None:
    assert run(["doctor", "--recipe", recipe]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == "tiny can run here"
    where = next(index for index, line in enumerate(told) if line.startswith("warning  Models"))
    assert "to fetch: tiny-base" in told[where]
    assert told[where + 1].strip() == f"fastface download {recipe}"


def test_two_runtimes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    info = tmp_path / "site" / "onnxruntime_gpu-1.31.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.31.1\n")
    (info / "RECORD").write_text("onnxruntime/__init__.py,,\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(info.parent)])
    code, found = examined(capsys, "--recipe", "pocket")
    assert code == 0  # they run, though on the CPU
    (finding,) = found["ONNX Runtime"]
    assert finding["level"] == "warning"
    assert finding["mend"] == "fastface doctor --fix"
    assert "onnxruntime-gpu 1.31.1" in finding["message"]
    assert "both packages write one folder, and onnxruntime won" in finding["message"]
    swaps: list[runtimes.Swap] = []
    monkeypatch.setattr(runtimes, "apply", lambda swap, log: swaps.append(swap))
    assert run(["doctor", "--recipe", "pocket", "--fix"]) == 0
    assert swaps == [runtimes.Swap(("onnxruntime", "onnxruntime-gpu"), "onnxruntime")]


def test_nothing_to_fix(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(runtimes, "apply", lambda *_: pytest.fail("there was nothing to mend"))
    code, _ = examined(capsys, "--recipe", "pocket", "--fix")
    assert code == 0
    assert run(["doctor", "--recipe", "pocket", "--fix"]) == 0
    assert "--fix has nothing to replace" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written(
    shop: Shop, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FASTFACE_HOME", str(tmp_path / "file" / "home"))
    code, found = examined(capsys, "--recipe", recipe)
    assert code == 3
    (finding,) = found["Cache"]
    assert str(tmp_path / "file" / "home") in finding["message"]
    assert finding["level"] == "failure"
    assert finding["mend"] == "export FASTFACE_HOME=~/fastface"


def test_a_cache_that_nothing_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FASTFACE_HOME", str(tmp_path / "file" / "home"))
    code, found = examined(capsys, "--recipe", "pocket")
    assert code == 0
    assert found["Cache"][0]["level"] == "warning"


def test_a_full_disk(shop: Shop, recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 4096, 4096))
    code, found = examined(capsys, "--recipe", recipe)
    assert code == 3
    (finding,) = found["Disk"]
    assert finding["level"] == "failure"
    assert "4 kB free" in finding["message"]
    assert finding["mend"] == "fastface cache list"


@pytest.mark.parametrize("harm", ["cut", "changed"])
def test_a_broken_model(shop: Shop, recipe: str, capsys: Capture, harm: str) -> None:
    assert run(["download", recipe]) == 0
    file = shop.store().path(shop["lora"]).resolve()
    if harm == "cut":
        file.write_bytes(BIG[:-1000])
    else:
        file.write_bytes(BIG[::-1])
    code, found = examined(capsys, "--recipe", recipe)
    (finding,) = found["Models"]
    if harm == "cut":
        assert code == 3
        assert f"{len(BIG) - 1000:,} bytes instead of {len(BIG):,}" in finding["message"]
        assert finding["mend"] == f"fastface download {recipe}"
    else:  # only hashing can tell, which takes long with real models: the mend does it
        assert code == 0
        assert finding["message"] == "all 7 here, not yet verified: tiny-lora"
        assert finding["mend"] == f"fastface download {recipe} --verify"
        assert run(["download", recipe, "--verify"]) == 3
    assert run(["download", recipe]) == 0
    assert examined(capsys, "--recipe", recipe)[1]["Models"][0]["level"] == "ok"


def test_a_torn_local_file(shop: Shop, recipe: str, tmp_path: Path, capsys: Capture) -> None:
    torn = tmp_path / "lora.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    torn.write_bytes(len(header).to_bytes(8, "little") + header + bytes(7))
    Path(recipe).write_text(RECIPE.replace("tiny-lora", str(torn)), encoding="utf-8")
    code, found = examined(capsys, "--recipe", recipe)
    assert code == 3
    assert f"{torn} is torn" in found["Models"][0]["message"]
    torn.write_bytes(torn.read_bytes() + bytes(1))
    assert examined(capsys, "--recipe", recipe)[0] == 0


def test_offline(shop: Shop, recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, found = examined(capsys, "--recipe", recipe)
    assert code == 3
    (finding,) = found["Models"]
    assert "offline mode is on" in finding["message"]
    assert finding["mend"] == f"env -u HF_HUB_OFFLINE -u TRANSFORMERS_OFFLINE fastface download {recipe}"
    assert found["Network"][0]["level"] == "ok"
    assert shop.hub.log == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert run(["download", recipe]) == 0
    assert examined(capsys, "--recipe", recipe, "--offline")[0] == 0


@pytest.mark.parametrize(("status", "mend"), [(401, "hf auth login"), (503, "export HTTPS_PROXY=")])
def test_a_hub_that_refuses(shop: Shop, recipe: str, capsys: Capture, status: int, mend: str) -> None:
    shop.hub.status["tiny/base"] = status
    code, found = examined(capsys, "--recipe", recipe)
    assert code == 3
    assert f"HTTP {status}" in found["Network"][0]["message"]
    assert found["Network"][0]["mend"].startswith(mend)


def test_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, found = examined(capsys)  # the default recipe
    assert code == 4
    (finding,) = found["GPU"]
    assert finding["level"] == "failure"
    assert "no CUDA device" in finding["message"]
    assert "--recipe pocket" in finding["mend"]
    code, found = examined(capsys, "--recipe", "pocket")
    assert code == 0
    assert found["GPU"][0]["level"] == "ok"


def test_a_recipe_that_is_none(capsys: Capture) -> None:
    assert run(["doctor", "--recipe", "no-such-recipe", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "recipe"
