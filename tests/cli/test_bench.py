"""`fastface bench` on a random miniature."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastface_cli.cli import run

SMALL = ["--set", "sampling.width=64", "--set", "sampling.height=64", "--device", "cpu", "--dtype", "float32"]
QUICK = ["bench", "--weights", "random-small", *SMALL, "--repeats", "2"]


def test_recipe_against_reference(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = [*QUICK, "--recipe", "hyper-am1", "--against", "reference", "--no-cold", "--json"]
    assert run([*command, "-o", str(tmp_path / "out")]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["weights"] == "random weights, miniature"
    ours, theirs = report["sides"]
    assert (ours["unet_samples"], theirs["unet_samples"]) == (4, 12)
    for side in (ours, theirs):
        stages = side["stages_ms"]
        assert [name for name in stages if name.startswith("step")] == [f"step {i}" for i in range(1, 5)]
        assert {"identity", "text", "vae", "png"} <= set(stages)
        assert "face" not in stages
        total = side["total_ms"]
        assert 0 < total["p50"] <= total["p90"] <= total["p99"]
        assert sum(stage["p50"] for stage in stages.values()) <= 1.5 * total["p99"]
        assert side["share_of_rate"]["loop"] > 0
        assert side["first_ms"] > 0
    (ratio,) = report["ratios"]
    assert (ratio["of"], ratio["to"]) == ("reference", "ours")
    assert ratio["loop"]["low"] <= ratio["loop"]["value"] <= ratio["loop"]["high"]
    assert ratio["latents_relative_l2"] < 1e-5
    machine = report["machine"]
    assert machine["versions"]["torch"]
    assert machine["cpu"]
    assert "commit" in machine
    written = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert written["sides"] == report["sides"]
    text = (tmp_path / "out" / "bench.md").read_text()
    assert "random weights, miniature" in text
    assert "| reference / ours |" in text


def test_low_memory_level_is_reported(capfd: pytest.CaptureFixture[str]) -> None:
    command = [*QUICK, "--recipe", "hyper-fastface", "--no-cold", "--json"]
    measured = []
    for level in ("off", "6"):
        assert run([*command, "--low-memory", level]) == 0
        (side,) = json.loads(capfd.readouterr().out)["sides"]
        measured.append((side["low_memory"], side["unet_samples"]))
    assert measured == [("off", 10), ("6", 10)]
    assert run([*command, "--low-memory", "8", "--compile"]) == 2


def test_ablation_keeps_latents(capfd: pytest.CaptureFixture[str]) -> None:
    assert run([*QUICK, "--recipe", "hyper-am1", "--ablation", "--no-cold", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    labels = [side["label"] for side in report["sides"]]
    assert labels[0] == "everything"
    assert labels[-1] == "nothing"
    assert "without prune" in labels
    assert report["sides"][labels.index("without prune")]["unet_samples"] == 12
    # Optimizations do not change the result.
    assert all(ratio["latents_relative_l2"] < 1e-5 for ratio in report["ratios"])


@pytest.mark.slow
def test_cold_start_runs_in_a_new_process(capfd: pytest.CaptureFixture[str]) -> None:
    assert run([*QUICK, "--recipe", "hyper-am1", "--cold", "--json"]) == 0
    (side,) = json.loads(capfd.readouterr().out)["sides"]
    seconds = side["cold"]["seconds"]
    assert 0 < seconds["imported"] < seconds["built"] < seconds["first_picture"]
    assert side["cold"]["process_peak_bytes"] > 100e6
    assert side["cold"]["device_peak_bytes"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "nothing"], "the only choice is: reference"),
        (["--weights", "some"], "choose one of real, random, random-small"),
        (["--accelerate", "warp=on"], "unknown item"),
        (["--accelerate", "prune=maybe"], "prune is one of on, off"),
        (["--weights", "random-small", "--face", "x.png"], "random weights have no face models"),
    ],
)
def test_invalid_arguments_are_refused(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "--recipe", "pocket", *arguments]) == 2
    assert message in capfd.readouterr().err


def test_random_full_size_model_needs_a_gpu(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert run(["bench", "--recipe", "hyper-fastface", "--weights", "random"]) == 4
    assert "needs a GPU" in capfd.readouterr().err
