"""`fastface download` and `fastface cache`, through the command line, against a loopback Hub."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.hub_server import COMMIT
from support.tiny_manifest import BIG, CONFIG, MODEL, Shop, sha256

from fastface_cli.cli import run

Capture = pytest.CaptureFixture[str]

RECIPE = """
extends: hyper-fastface
model:
  base: tiny-base
  unet: tiny-unet
  distillation: {1: tiny-url, 4: tiny-lora}
  vae: tiny-open
  adapter: tiny-url
  image_encoder: tiny-package
  face: tiny-face
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return str(path)


def run_json(capsys: Capture, *arguments: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = run([*arguments, "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["schema"] == 1
    assert printed["ok"] is (code == 0)
    return code, printed


def test_the_models_of_a_recipe(shop: Shop, recipe: str, capsys: Capture) -> None:
    code, before = run_json(capsys, "download", recipe, "--dry-run")
    assert code == 0
    assert shop.hub.log == []
    assert {artifact["name"] for artifact in before["artefacts"]} == {
        f"tiny-{name}" for name in ("base", "unet", "lora", "open", "url", "package", "face")
    }
    assert before["missing_bytes"] > len(BIG)
    assert run(["download", recipe]) == 0
    printed = capsys.readouterr()
    assert f"tiny-lora: {shop.store().path(shop['lora'])}" in printed.out.splitlines()
    assert "no commercial use" in printed.err
    code, after = run_json(capsys, "download", recipe, "--dry-run")
    assert after["missing_bytes"] == 0
    assert {file["state"] for artifact in after["artefacts"] for file in artifact["files"]} == {"present"}


def test_the_checkpoint_for_a_step_count(shop: Shop, recipe: str, capsys: Capture) -> None:
    _, printed = run_json(capsys, "download", recipe, "--steps", "1", "--dry-run")
    assert "tiny-lora" not in {artifact["name"] for artifact in printed["artefacts"]}
    code, printed = run_json(capsys, "download", recipe, "--steps", "3", "--dry-run")
    assert code == 2
    assert "3" in printed["error"]["message"]


def test_the_table_of_a_dry_run(shop: Shop, capsys: Capture) -> None:
    assert run(["download", "tiny-base"]) == 0
    shop.hub.cuts = [2_000_000, *[0] * 40]
    assert run(["download", "tiny-base", "tiny-lora"]) == 3
    assert "resumes where it stopped" in capsys.readouterr().err
    assert run(["download", "tiny-base", "tiny-lora", "tiny-open", "--dry-run"]) == 0
    table = capsys.readouterr().out
    base, lora, free = (next(row for row in table.splitlines() if name in row) for name in shop_names())
    assert "2 of 2" in base
    assert "0 of 1, 1 partial" in lora
    assert "research only" in free
    assert "4 MB in total, 2 MB to fetch; stored in" in table
    assert "tiny-open: for non-commercial research" in table


def shop_names() -> tuple[str, str, str]:
    return "tiny-base", "tiny-lora", "tiny-open"


def test_json_of_a_download(shop: Shop, capsys: Capture) -> None:
    code, printed = run_json(capsys, "download", "tiny-lora")
    assert code == 0
    assert printed["artefacts"] == [{"name": "tiny-lora", "path": str(shop.store().path(shop["lora"]))}]


@pytest.mark.parametrize(
    ("status", "words"), [(401, "HTTP 401"), (404, "HTTP 404"), (429, "too many requests")]
)
def test_a_refusal_is_exit_code_3(shop: Shop, capsys: Capture, status: int, words: str) -> None:
    shop.hub.status["tiny/lora"] = status
    code, printed = run_json(capsys, "download", "tiny-lora")
    assert code == 3
    assert printed["error"]["kind"] == "models"
    assert words in printed["error"]["message"]


@pytest.mark.parametrize("way", ["flag", "environment"])
def test_offline(shop: Shop, capsys: Capture, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    if way == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(["download", "tiny-lora", *(["--offline"] if way == "flag" else [])]) == 3
    printed = capsys.readouterr()
    assert "1 model is missing and offline mode is on: tiny-lora (4 MB)" in printed.err
    assert "Traceback" not in printed.err
    assert shop.hub.log == []


def test_verify(shop: Shop, capsys: Capture) -> None:
    assert run(["download", "tiny-base", "tiny-lora"]) == 0
    code, printed = run_json(capsys, "download", "--verify")
    assert code == 0
    assert [file["state"] for file in printed["files"]] == ["present"] * 3
    path = shop.store().path(shop["lora"])
    path.write_bytes(BIG[::-1])
    code, printed = run_json(capsys, "download", "tiny-lora", "--verify")
    assert code == 3
    assert [file["state"] for file in printed["files"]] == ["bad"]
    assert "lora.safetensors has the wrong bytes" in printed["error"]["message"]
    assert not path.exists()
    assert run(["download", "tiny-lora", "--verify"]) == 0
    assert "missing" in capsys.readouterr().out


def test_names_that_nothing_has(shop: Shop, capsys: Capture) -> None:
    code, printed = run_json(capsys, "download", "tiny-lroa")
    assert code == 2
    assert printed["error"]["hint"] == "did you mean 'tiny-lora'?"
    code, printed = run_json(capsys, "download", "hyper-fastfaec")
    assert code == 2
    assert "hyper-fastface" in printed["error"]["hint"]
    code, printed = run_json(capsys, "cache", "remove", "tiny-lroa", "--yes")
    assert code == 2
    assert printed["error"]["hint"] == "did you mean 'tiny-lora'?"


def test_a_hub_reference(shop: Shop, capsys: Capture) -> None:
    name = f"hub:tiny/base@{COMMIT}:vae/model.safetensors"
    code, printed = run_json(capsys, "download", name)
    assert code == 0
    assert Path(printed["artefacts"][0]["path"]).read_bytes() == MODEL


def test_cache_list_and_remove(shop: Shop, capsys: Capture) -> None:
    assert run(["cache", "list"]) == 0
    assert "nothing is downloaded" in capsys.readouterr().out
    assert run(["download", "tiny-base", "tiny-lora", "tiny-url"]) == 0
    code, printed = run_json(capsys, "cache", "list")
    assert code == 0
    assert {
        artifact["name"]: (artifact["bytes"], artifact["complete"]) for artifact in printed["artefacts"]
    } == {
        "tiny-base": (len(CONFIG) + len(MODEL), True),
        "tiny-lora": (len(BIG), True),
        "tiny-url": (len(MODEL), True),
    }
    assert printed["bytes"] == len(CONFIG) + 2 * len(MODEL) + len(BIG)
    assert run(["cache", "list"]) == 0
    assert "4 MB in" in capsys.readouterr().out
    code, printed = run_json(capsys, "cache", "remove", "tiny-lora", "--yes")
    assert (code, printed["freed_bytes"]) == (0, len(BIG))
    assert run(["cache", "remove", "--all", "--yes"]) == 0
    assert "5 kB freed" not in capsys.readouterr().out
    code, printed = run_json(capsys, "cache", "list")
    assert printed["artefacts"] == []
    assert list((shop.home / "hub").glob("models--*")) == []


def test_cache_remove_wants_a_yes(shop: Shop, capsys: Capture) -> None:
    assert run(["cache", "remove"]) == 2
    assert run(["cache", "remove", "--all", "tiny-lora"]) == 2
    assert run(["cache", "remove", "tiny-lora"]) == 2
    assert "--yes" in capsys.readouterr().err


def test_quarantined_files_are_shown_and_cleared(shop: Shop, capsys: Capture) -> None:
    shop.hub.served["tiny/lora/lora.safetensors"] = bytes(len(BIG))
    assert run(["download", "tiny-lora"]) == 3
    assert sha256(BIG) in capsys.readouterr().err
    assert run(["cache", "list"]) == 0
    assert "4 MB with wrong bytes in" in capsys.readouterr().out
    code, printed = run_json(capsys, "cache", "remove", "--all", "--yes")
    assert (code, printed["freed_bytes"]) == (0, len(BIG))
    assert list((shop.home / "quarantine").iterdir()) == []


def test_hub_cache_of_the_environment(
    shop: Shop, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "shared"))
    code, printed = run_json(capsys, "download", "tiny-lora")
    assert code == 0
    assert Path(printed["artefacts"][0]["path"]).is_relative_to(tmp_path / "shared")


def test_help_and_commands_import_nothing_heavy() -> None:
    heavy = [
        "torch",
        "diffusers",
        "transformers",
        "huggingface_hub",
        "numpy",
        "pooch",
        "requests",
        "insightface",
    ]
    code = (
        "import sys; from fastface_cli.cli import run; run(['download', '--help']); "
        "run(['cache', 'list']); run(['download', '--dry-run']); "
        f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    )
    actual = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert actual.stderr.strip() == "[]"
    assert "Example: fastface download hyper-fastface --dry-run" in actual.stdout


def test_file_names_are_not_markup_in_the_progress_bars(
    shop: Shop, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # bars are drawn although stderr is captured
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "xterm")
    name = "x[/y]/[red]z.safetensors"
    shop.hub.files[f"tiny/base/{name}"] = BIG
    assert run(["download", f"hub:tiny/base@{COMMIT}:{name}"]) == 0
    assert "x[/y]/[red]z" in capsys.readouterr().err


def test_every_file_has_a_progress_bar(shop: Shop, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    shop.hub.rate = 8_000_000
    assert run(["download", "tiny-base", "tiny-lora", "tiny-url", "tiny-open"]) == 0
    shown = capsys.readouterr().err
    assert "all files" in shown
    for label in ("lora.safetensors", "a+b.pth", "unet/config.json", "vae/model.safetensors"):
        assert label in shown, label


def test_ctrl_c_ends_a_download_soon_and_keeps_its_bytes(shop: Shop, tmp_path: Path) -> None:
    shop.hub.rate = 50_000
    shop.hub.files["tiny/base/big.safetensors"] = BIG
    command = [
        sys.executable,
        "-c",
        "import sys; from fastface_cli.cli import main; sys.argv[0] = 'fastface'; main()",
        "download",
        f"hub:tiny/base@{COMMIT}:big.safetensors",
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0"}
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    folder = shop.home / "hub/models--tiny--base/blobs"
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in folder.glob("*.incomplete")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    sent = time.monotonic()
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert child.returncode == 130, errors
    assert time.monotonic() - sent < 10
    assert "Traceback" not in errors
    assert any(path.stat().st_size for path in folder.glob("*.incomplete"))
