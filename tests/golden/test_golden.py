"""Every golden case, run with the command of a user."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fastface_cli.cli import run

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "cases"
CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))
SOFTMASK = ("softmask", "am2")


@pytest.mark.parametrize("case", CASES)
def test_golden_case(case: str, golden: Path, tmp_path: Path) -> None:
    source = golden / "cases" / f"{case}.json"
    latents = tmp_path / "latents.safetensors"
    code = run(
        [
            "generate",
            *("--recipe", str(source), "--stack", str(golden)),
            *("--identity", str(golden / "identity.safetensors")),
            *("--device", "cpu", "--dtype", "float32"),
            *("--save-latents", str(latents), "-o", str(tmp_path / "x.png")),
        ]
    )
    assert code == 0
    actual, expected = load_file(latents), load_file(source.with_suffix(".safetensors"))
    limit = 2e-4 if any(word in case for word in SOFTMASK) else 1e-5
    assert actual["initial_latents"].equal(expected["initial_latents"])
    assert actual["timesteps"].tolist() == pytest.approx(expected["timesteps"].tolist())
    for step, (ours, other) in enumerate(zip(actual["latents"], expected["latents"], strict=True)):
        error = float((ours - other).norm() / other.norm())
        assert error <= limit, f"step {step}: {error:.2e}"
    assert_picture(tmp_path / "x.png", expected["image"][0])


def assert_picture(path: Path, expected) -> None:
    import numpy as np
    from PIL import Image

    with Image.open(path) as picture:
        actual = np.asarray(picture.convert("RGB"), np.float32) / 255
    # One level of 8 bits, and the little that the latents' tolerance leaves.
    assert np.abs(actual - expected.permute(1, 2, 0).numpy()).max() <= 1.5 / 255


def test_replay_of_a_golden_image(golden: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    identity = ["--identity", str(golden / "identity.safetensors"), "--device", "cpu", "--dtype", "float32"]
    first, again = tmp_path / "a.png", tmp_path / "b.png"
    stack = ["--stack", str(golden)]
    case = golden / "cases" / "am_only-scalepow-hyper.json"
    assert run(["generate", "--recipe", str(case), *stack, *identity, "-o", str(first), "--json"]) == 0
    record = json.loads(capfd.readouterr().out)
    assert record["ok"]
    assert record["images"][0]["unet_samples"] == 4
    assert run(["generate", "--from", str(first), *stack, *identity, "-o", str(again)]) == 0
    from PIL import Image

    with Image.open(first) as ours, Image.open(again) as other:
        assert ours.tobytes() == other.tobytes()
