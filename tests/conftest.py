"""Shared fixtures: a small random stack, a random identity, the golden tensors."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("NO_COLOR", "1")
os.environ["HF_HOME"] = str(
    Path(__file__).parent / "no-huggingface"
)  # the user's Hub cache is used otherwise

GOLDEN = Path(__file__).parent / "data" / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Return the folder of the golden stack, cases and identity."""
    return GOLDEN


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a random stack in the published file layout, float32, with the names of `write_stack`."""
    import torch

    from benchmarks.published_files import write_stack
    from fastface_cli.benchmark.sdxl import MINIATURE

    folder = tmp_path_factory.mktemp("stack")
    return write_stack(folder, MINIATURE, fill="random", dtype=torch.float32, seed=5)


@pytest.fixture(scope="session")
def person():
    """Return an identity of random numbers."""
    from fastface_cli.identity.identity import Identity

    rng = np.random.default_rng(3)
    embedding = rng.standard_normal((1, 512)).astype(np.float32)
    return Identity(
        id_embedding=embedding / np.linalg.norm(embedding),
        face_crop_bgr=rng.integers(0, 256, (1, 224, 224, 3), dtype=np.uint8),
        weight=np.ones(1, np.float32),
    )
