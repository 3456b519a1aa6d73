"""The files of further adapters, rebuilt from names and shapes, have exactly the published lengths."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks import adapter_files as files
from fastface_cli.models.tensor_file import TensorLayout, safetensors_length
from fastface_cli.store import load_manifest


@pytest.mark.parametrize(
    ("layout", "tensors", "artifact"),
    [
        (files.plus_face_layout, 191, "ip-adapter-plus-face-sdxl"),
        (files.pulid_v1_layout, 250, "pulid-v1"),
        (files.pulid_v11_layout, 312, "pulid-v1.1"),
        (files.controlnet_layout, None, "instantid-controlnet"),
    ],
)
def test_lengths(layout: Callable[[], TensorLayout], tensors: int | None, artifact: str) -> None:
    built = layout()
    assert tensors is None or len(built.tensors) == tensors
    (file,) = [f for f in load_manifest()[artifact].files if f.path.endswith(".safetensors")]
    assert safetensors_length(built) == file.bytes


def test_instantid_holds_its_tensors() -> None:
    """The file is a pickle, whose container of 70,845 bytes is not rebuilt."""
    built = files.instantid_layout()
    assert (len(built.tensors), built.nbytes) == (191, 1_691_063_296)
    (file,) = load_manifest()["instantid"].files
    assert file.bytes == built.nbytes + 70_845


def test_tower_and_text_encoder_are_all_tensors_of_their_file() -> None:
    """The file also holds CLIP-L's text encoder, its projection and a scale; the header is not rebuilt."""
    tower = files.eva_layout()
    text, width = 123_060_480, 768
    assert len(tower.tensors) == 512
    assert tower.nbytes + 2 * (text + width * width + 1) == 856_166_274
