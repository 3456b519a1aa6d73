"""Every part at its published size, each loaded in a new process by the product's loaders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
UNET, TEXT, TEXT_2, VAE = 2_567_463_684, 123_060_480, 694_659_840, 83_653_863
EXPECTED = {
    "base_unet": {"parameters": UNET},
    "turbo": {"parameters": UNET},
    "lightning": {"parameters": UNET},
    "text_encoders": {"parameters": TEXT, "parameters_2": TEXT_2},
    "vaes": {"parameters": VAE},
    "image_encoder": {"parameters": 632_076_800},
    "hyper": {"modules": 788},
    "lcm": {"modules": 788},
    "adapter": {"fused": 560, "own": 140},
    "single_file": {
        "bytes": 6_938_041_144,
        "parameters": UNET,
        "text_encoder": TEXT,
        "text_encoder_2": TEXT_2,
        "vae": VAE,
    },
    "complete": {"own": 140, "branches": [1, 1, 1, 1]},
    "plus_face": {"projection": 82_961_664, "own": 140},
    "controlnet": {"parameters": 1_251_014_160},
    "pulid_v1": {"projection": 54_886_400, "own": 140},
    "pulid_v1.1": {"projection": 151_398_400, "own": 140},
    "eva": {"parameters": 304_432_832, "embedding": [768], "hidden": [5, 577, 1024]},
}


@pytest.mark.parametrize("case", EXPECTED)
def test_loads_in_full_size(case: str, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
    }
    command = [
        sys.executable,
        str(Path(__file__).parents[1] / "support" / "full_size.py"),
        case,
        str(tmp_path),
    ]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=900, check=False
        )
    finally:
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert result.returncode == 0, result.stderr[-3000:]
    measured = json.loads(result.stdout.splitlines()[-1])
    assert measured.pop("peak_gib") < 12
    assert measured == EXPECTED[case]
