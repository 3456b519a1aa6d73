"""The installed wheel works in a clean environment, outside the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def call(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FASTFACE"))}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**clean, **env},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_wheel_generates_with_the_pocket_recipe(tmp_path: Path, person) -> None:
    if not (ROOT / "fastface_cli" / "pocket" / "weights").is_dir():
        pytest.skip("the pocket weights are not present")
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = venv / "bin" / "python"
    installed = call(
        *(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", ROOT),
        cwd=tmp_path,
    )
    assert installed.returncode == 0, installed.stderr[-2000:]
    fastface = venv / "bin" / "fastface"
    person.save(tmp_path / "me.safetensors")
    home = {"FASTFACE_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    listed = call(fastface, "recipes", "list", "--json", cwd=tmp_path, **home)
    assert listed.returncode == 0, listed.stderr
    assert "pocket-fastface" in listed.stdout
    result = call(
        *(fastface, "generate", "--recipe", "pocket-fastface", "--identity", "me.safetensors"),
        *("--prompt", "a woman smiling", "--seed", "1", "-o", "x.png", "--json"),
        cwd=tmp_path,
        **home,
    )
    assert result.returncode == 0, result.stderr
    image = json.loads(result.stdout)["images"][0]
    assert image["unet_samples"] == 10
    assert (tmp_path / image["path"]).stat().st_size > 1000
