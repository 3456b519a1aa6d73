"""The layouts have exactly the lengths of the published files.

The header of a checkpoint lists each tensor, so its length depends on every name, shape and type. Published
lengths and hashes are constants here; no file is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from support.original_names import original

import fastface_cli
from benchmarks.published_files import (
    PARTS,
    PT,
    TensorLayout,
    base_configs,
    lora_layout,
    part_layouts,
    random_tensor,
    safetensors_header,
    safetensors_length,
    write,
)
from fastface_cli.benchmark.sdxl import MINIATURE, PUBLISHED, Stack, config_text

BASE_FILES = {
    "model_index.json": (609, "6d7b93508390ab91ac5bfbe4aeb4dc2d83f7bb1b05fb069d714b5b0c75f70d44"),
    "scheduler/scheduler_config.json": (
        479,
        "af3e45a949aff8b8341ab8b811429ec03fee857a700a1d9477363e4fff9666e2",
    ),
    "text_encoder/config.json": (565, "39b8b2e4b1949e36969caa425b6c81c68bace99198dd9078ce05d16ad401fe7f"),
    "text_encoder_2/config.json": (575, "a892d1c3a69a7e9247a24de2bc1d5891e3109a54696e53be20093af671072c34"),
    "tokenizer/special_tokens_map.json": (
        472,
        "c4864a9376a8401918425bed71fc14fc0e81f9b59ec45c1cf96cccb2df508eac",
    ),
    "tokenizer/tokenizer_config.json": (
        737,
        "19d7b034cb0cc3ce9766c2231373ab8aa8991fc72e2c8f76558bfaae3de0d563",
    ),
    "tokenizer_2/special_tokens_map.json": (
        460,
        "f118ab3a983206e4f32583448de6bd6aae4ee21869135cef1f5848a753cdaab6",
    ),
    "tokenizer_2/tokenizer_config.json": (
        725,
        "c9d23941f76a41cbd50eda9290f57be7828f0a7a677939e9ef181f7e12bd1bdf",
    ),
    "unet/config.json": (1680, "30ebc70750223e59006f7f2b4e1e6c102570aa19a9c4ae3e1fbe7591332dbae6"),
    "vae/config.json": (642, "0b331c8ac22ded5f9997a144a575c1d113d6169aff262c353f39015bd24a6264"),
}


@pytest.mark.parametrize("name", BASE_FILES)
def test_base_configuration_has_the_published_hash(name: str) -> None:
    text = config_text(base_configs(PUBLISHED)[name]).encode()
    assert (len(text), hashlib.sha256(text).hexdigest()) == BASE_FILES[name]


def test_every_base_configuration_has_a_published_hash() -> None:
    assert set(base_configs(PUBLISHED)) == set(BASE_FILES)


def test_image_encoder_configuration_has_the_published_length() -> None:
    assert len(config_text(PUBLISHED.image_encoder)) == 560


@cache
def published(part: str) -> dict[str, TensorLayout]:
    return part_layouts(part)


def lengths(part: str) -> dict[str, int]:
    return {name: safetensors_length(layout) for name, layout in published(part).items()}


def test_base_lengths() -> None:
    assert lengths("base") == {
        "unet/diffusion_pytorch_model.fp16.safetensors": 5_135_149_760,
        "vae/diffusion_pytorch_model.fp16.safetensors": 167_335_342,
        "text_encoder/model.fp16.safetensors": 246_144_152,
        "text_encoder_2/model.fp16.safetensors": 1_389_382_176,
    }


def test_replacement_unet_lengths() -> None:
    assert lengths("turbo") == {"unet/diffusion_pytorch_model.fp16.safetensors": 5_135_149_760}
    assert lengths("lightning") == {"": 5_135_149_736}


def test_float32_vae_length() -> None:
    assert lengths("vae") == {"diffusion_pytorch_model.safetensors": 334_643_268}


def test_image_encoder_length() -> None:
    assert lengths("image_encoder") == {"model.safetensors": 2_528_373_448}


def test_distillation_lora_lengths() -> None:
    assert lengths("hyper") == {"": 787_359_648}
    lcm = published("lcm")[""]
    plain = replace(lcm, metadata=None)
    assert len(plain.tensors) == 3 * 788
    assert safetensors_length(plain) == 393_854_592  # SDXL-Lightning, DMD2
    assert safetensors_length(plain.cast(torch.float32)) == 787_359_616  # DMD2 in float32
    assert safetensors_length(plain) + 632 == 393_855_224  # LCM, whose metadata is longer


def _zip_length(sizes: dict[str, int], prefix: str) -> int:
    """Return the length of a PyTorch file: data aligned to 64 bytes, followed by a 16-byte descriptor."""
    position = directory = 0
    for name, size in sizes.items():
        name_length = len(f"{prefix}/{name}")
        start = -(-(position + 30 + name_length + 4) // 64) * 64
        position = start + size + 16
        directory += 46 + name_length
    return position + directory + 98  # the directory's three end records


def test_adapter_length(tmp_path: Path) -> None:
    """In the published file, 1,316 tensors share one storage, in three records."""
    adapter = published("adapter")[""]
    assert len(adapter.tensors) == 1_316
    assert adapter.nbytes == 1_487_415_296
    path = write(tmp_path / "ip-adapter-faceid-plusv2_sdxl.bin", adapter)
    with zipfile.ZipFile(path) as file:
        records = {info.filename.partition("/")[2]: info.file_size for info in file.infolist()}
    assert (
        _zip_length(records, path.stem) == path.stat().st_size
    )  # the formula is correct for files written here
    older = {name: records[name] for name in ("data.pkl", "data/0", "version")}
    assert older["data/0"] == adapter.nbytes
    assert _zip_length(older, path.stem) == 1_487_555_181


def test_single_file_length() -> None:
    """Test a complete checkpoint in the original layout without metadata, like many fine-tunes."""
    parts = {
        name.split("/")[0]: {
            key: torch.empty(shape, dtype=dtype, device="meta")
            for key, (shape, dtype) in layout.tensors.items()
        }
        for name, layout in published("base").items()
    }
    tensors = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in original(**parts).items()}
    assert len(tensors) == 2_515
    assert safetensors_length(TensorLayout(tensors)) == 6_938_041_144


DTYPES = st.sampled_from(
    [torch.uint8, torch.float16, torch.bfloat16, torch.int32, torch.float32, torch.int64]
)
SHAPES = st.lists(st.integers(1, 12), max_size=3).map(tuple)
NAMES = st.text(st.sampled_from("abcXYZ019._-é漢"), min_size=1, max_size=12)


@given(
    tensors=st.dictionaries(NAMES, st.tuples(SHAPES, DTYPES), min_size=1, max_size=8),
    metadata=st.sampled_from([None, PT, {"note": 'ünïcode, "quoted"\n'}]),
)
def test_header_equals_that_of_safetensors(
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]], metadata: dict[str, str] | None
) -> None:
    written = save(
        {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}, metadata
    )
    layout = TensorLayout(tensors, metadata)
    assert written.startswith(safetensors_header(layout))
    assert len(written) == safetensors_length(layout)


@pytest.mark.parametrize("part", PARTS)
def test_sparse_file_uses_few_disk_blocks(part: str, tmp_path: Path) -> None:
    """Full-size files have a real header and their full length, but use few disk blocks."""
    for index, layout in enumerate(published(part).values()):
        path = write(tmp_path / f"{index}{'.bin' if part == 'adapter' else '.safetensors'}", layout)
        stat = os.stat(path)
        assert stat.st_size > layout.nbytes
        assert stat.st_blocks * 512 < 16 * 2**20
        path.unlink()


def test_random_tensors_are_reproducible_and_scaled() -> None:
    first = random_tensor("a.weight", (256, 64, 3, 3), torch.float32, seed=1)
    assert torch.equal(first, random_tensor("a.weight", (256, 64, 3, 3), torch.float32, seed=1))
    assert not torch.equal(first, random_tensor("a.weight", (256, 64, 3, 3), torch.float32, seed=2))
    assert not torch.equal(first, random_tensor("b.weight", (256, 64, 3, 3), torch.float32, seed=1))
    assert first.std().item() == pytest.approx((64 * 9) ** -0.5, rel=0.02)
    assert random_tensor("norm.weight", (4096,), torch.float32, 0).mean().item() == pytest.approx(1, abs=0.01)
    assert random_tensor("norm.bias", (4096,), torch.float32, 0).mean().item() == pytest.approx(0, abs=0.01)
    positions = random_tensor("position_ids", (1, 5), torch.int64, 0)
    assert positions.tolist() == [[0, 1, 2, 3, 4]]


def _kinds(layout: TensorLayout) -> set[tuple[str, int, torch.dtype]]:
    """Return names without numbers, with ranks and types."""
    return {(re.sub(r"\d+", "#", name), len(shape), dtype) for name, (shape, dtype) in layout.tensors.items()}


@pytest.mark.parametrize("part", PARTS)
def test_miniature_has_every_kind_of_tensor(part: str) -> None:
    small, full = part_layouts(part, MINIATURE), published(part)
    assert set(small) == set(full)
    for name, layout in small.items():
        assert _kinds(layout) == _kinds(full[name])
        assert layout.metadata == full[name].metadata
        assert layout.parameters < 3e6


def _tensors(path: Path, prefix: str = "") -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {
        name if name.startswith(prefix) else prefix + name: (tuple(tensor.shape), tensor.dtype)
        for name, tensor in load_file(path).items()
    }


def _check_stack(pipe: Path, clip: Path, adapter: Path, dtype: torch.dtype) -> Stack:
    """Check that files on disk have the layouts that their configurations determine."""

    def read(folder: Path) -> dict[str, object]:
        config: dict[str, object] = json.loads((folder / "config.json").read_text())
        return config

    pickled = torch.load(adapter, weights_only=True)
    stack = Stack(
        **{name: read(pipe / name) for name in ("unet", "text_encoder", "text_encoder_2", "vae")},
        image_encoder=read(clip),
        adapter_rank=len(pickled["ip_adapter"]["0.to_q_lora.down.weight"]),
    )
    for name, layout in part_layouts("base", stack, dtype).items():
        # transformers 5 writes CLIPTextModel without the prefix, and reads both
        prefix = "text_model." if name.startswith("text_encoder/") else ""
        assert _tensors(pipe / name, prefix) == layout.tensors
    (layout,) = part_layouts("adapter", stack, dtype).values()
    assert layout.tensors == {
        f"{part}.{name}": (tuple(tensor.shape), tensor.dtype)
        for part, tensors in pickled.items()
        for name, tensor in tensors.items()
    }
    (layout,) = part_layouts("image_encoder", stack).values()
    vision = {name: shape for name, (shape, _) in _tensors(clip / "model.safetensors").items()}
    named = {name: shape for name, (shape, _) in layout.tensors.items()}
    assert vision == {name: shape for name, shape in named.items() if not name.endswith("position_ids")}
    return stack


def test_golden_models_have_the_expected_layouts(golden: Path) -> None:
    stack = _check_stack(golden / "pipe", golden / "clip", golden / "faceid_plusv2.bin", torch.float32)
    assert stack.adapter_rank == 4


def test_pocket_models_have_the_expected_layouts() -> None:
    """The pocket files have the same form as the published files."""
    weights = Path(fastface_cli.__file__).parent / "pocket" / "weights"
    adapter = weights / "ip-adapter-faceid-plusv2_pocket.bin"
    stack = _check_stack(weights / "pipe", weights / "clip", adapter, torch.float16)
    lora = _tensors(weights / "Pocket-4steps-lora.safetensors")
    rank = next(shape[0] for name, (shape, _) in lora.items() if name.endswith("lora_down.weight"))
    assert lora == lora_layout(stack.unet, rank).tensors
