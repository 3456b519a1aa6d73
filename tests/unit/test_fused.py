"""Fused models kept between runs: the same numbers, trusted only while nothing has changed, and removable."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastface_cli.adapters.registry import ADAPTERS
from fastface_cli.app.pipeline import Pipeline, Request
from fastface_cli.models import fused, loading
from fastface_cli.recipe.files import load_recipe
from fastface_cli.recipe.schema import Recipe
from fastface_cli.store import fused_cache as store
from fastface_cli.store.fused_cache import FusedCache, fused_inputs, fused_key

CPU = torch.device("cpu")
LIMIT = 1 << 30


def recipe_of(lora_scale: float = 0.6, loras: tuple[float, ...] = ()) -> Recipe:
    model = {
        "base": "base",
        "distillation": "hyper",
        "adapter": "adapter",
        "image_encoder": "encoder",
        "face": "face",
        "scheduler": {"kind": "ddim", "spacing": "trailing"},
        "loras": [{"file": "style", "scale": scale} for scale in loras],
    }
    return Recipe.model_validate(
        {
            "name": "test",
            "model": model,
            "sampling": {"width": 128, "height": 128},
            "adapter": {"lora_scale": lora_scale},
        }
    )


@pytest.fixture
def paths(miniature, tmp_path) -> dict[str, Path]:
    """Copies, so that a test may change them."""
    actual = {}
    for role, part in (
        ("base", "base"),
        ("distillation", "hyper"),
        ("adapter", "adapter"),
        ("image_encoder", "image_encoder"),
    ):
        source = miniature[part]
        actual[role] = tmp_path / "stack" / source.name
        copy = shutil.copytree if source.is_dir() else shutil.copyfile
        actual[role].parent.mkdir(exist_ok=True)
        copy(source, actual[role])
    return actual


@pytest.fixture
def cache(tmp_path) -> FusedCache:
    return FusedCache(tmp_path / "fused", LIMIT, least=0)


@pytest.fixture
def builds(monkeypatch):
    """How often LoRAs were fused."""
    counted = []
    kind = ADAPTERS["faceid_plusv2"]

    def counting(*args, **options):
        counted.append(args)
        return kind.load(*args, **options)

    monkeypatch.setitem(ADAPTERS, "faceid_plusv2", replace(kind, load=counting))
    return counted


def load(recipe, paths, cache):
    return Pipeline.load(recipe, paths, device="cpu", dtype="float32", fused=cache)


def test_second_start_gives_the_same_image_without_fusing(paths, cache, builds, person):
    request = Request("a cat", 3, person)
    first = load(recipe_of(), paths, cache)
    second = load(recipe_of(), paths, cache)
    assert len(builds) == 1
    for name, tensor in first.unet.state_dict().items():
        assert torch.equal(tensor, second.unet.state_dict()[name]), name
    configs = [
        {name: value for name, value in each.unet.config.items() if name[0] != "_"}
        for each in (first, second)
    ]
    assert configs[0] == configs[1]
    assert [type(each) for each in first.unet.attn_processors.values()] == [
        type(each) for each in second.unet.attn_processors.values()
    ]
    latents = [next(each.generate([request])).latents for each in (first, second)]
    assert float((latents[1] - latents[0]).norm() / latents[0].norm()) <= 1e-5
    assert not any(parameter.requires_grad for parameter in second.unet.parameters())
    (entry,) = cache.entries()
    assert (entry.recipe, entry.name) == ("test", f"fused-{entry.key[:12]}")
    assert "lora_scale 0.6" in entry.inputs
    assert entry.bytes == cache.file(entry.key).stat().st_size


def test_what_enters_the_key(paths):
    def key(recipe=None, device="cpu", dtype="torch.float16"):
        recipe = recipe or recipe_of()
        return fused_key(recipe, fused_inputs(recipe, paths), device, dtype)

    first = key()
    assert key() == first
    renamed = recipe_of().model_copy(update={"name": "other"})
    assert key(renamed) == first
    changed = [key(recipe_of(0.5)), key(device="cuda"), key(dtype="torch.bfloat16")]
    os.utime(paths["adapter"], ns=(1, 1))
    changed.append(key())
    weights = next((paths["base"] / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes() + b"\0")
    changed.append(key())
    assert len({first, *changed}) == 6


@pytest.mark.parametrize("part", ["vae/config.json", "scheduler/scheduler_config.json"])
def test_what_does_not_enter_the_key(paths, part):
    first = fused_key(recipe_of(), fused_inputs(recipe_of(), paths), "cpu", "x")
    os.utime(paths["base"] / part, ns=(1, 1))
    assert fused_key(recipe_of(), fused_inputs(recipe_of(), paths), "cpu", "x") == first


def put(cache: FusedCache, key: str, size: int = 1000) -> Path | None:
    """Keep `size` bytes under a key of one letter."""
    data = key.encode() * size

    def write(file):
        file.write(data)
        return hashlib.sha256(data).hexdigest()

    return cache.keep(key * 64, f"recipe {key}", ["adapter x"], size, write)


def _flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        byte = file.read(1)
        file.seek(-100, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


@pytest.mark.parametrize("harm", [_flip, _cut, Path.unlink])
def test_a_harmed_file_is_never_used(harm, cache, caplog):
    path = put(cache, "a")
    assert cache.find("a" * 64) == path
    harm(path)
    assert cache.find("a" * 64) is None
    assert (harm is Path.unlink) or "changed since it was written" in caplog.text
    assert not path.exists()
    assert put(cache, "a") == path == cache.find("a" * 64)


def test_a_file_that_was_only_touched_is_hashed_once(cache, monkeypatch):
    os.utime(put(cache, "a"), ns=(7, 7))
    hashed = []
    own = store.file_sha256
    monkeypatch.setattr(store, "file_sha256", lambda path: hashed.append(path) or own(path))
    assert cache.find("a" * 64)
    assert cache.find("a" * 64)
    assert len(hashed) == 1


def test_file_of_another_form_is_fused_again(paths, cache, builds, caplog):
    recipe = recipe_of()
    key = fused_key(recipe, fused_inputs(recipe, paths), "cpu", "torch.float32")
    cache.keep(key, "test", [], 10, lambda file: file.write(b"\x02\0\0\0\0\0\0\0{}") and "x")
    load(recipe, paths, cache)
    assert len(builds) == 1
    assert "cannot read the fused models" in caplog.text
    assert fused.build(fused.read(cache.find(key), CPU)).unet is not None


def test_full_disk_is_reported_and_the_run_continues(cache, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    assert put(cache, "a") is None
    assert "not cached for the next start: No space left on device" in caplog.text
    assert list(cache.folder.iterdir()) == []


def test_missing_disk_space_is_reported_before_writing(cache, monkeypatch, caplog):
    usage = shutil.disk_usage(cache.folder.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert put(cache, "a") is None
    assert "are needed in" in caplog.text
    assert list(cache.folder.iterdir()) == []


def test_a_sweep_stays_within_its_limit(tmp_path, caplog):
    caplog.set_level("INFO", "fastface_cli")
    cache = FusedCache(tmp_path / "fused", 2500, least=0)
    for age, key in ((50, "a"), (100, "b")):
        put(cache, key)
        os.utime(cache.folder / f"{key * 64}.json", (time.time() - age, time.time() - age))
    put(cache, "c")
    assert {entry.key[0] for entry in cache.entries()} == {"a", "c"}
    assert "fused-bbbbbbbbbbbb (recipe b) is removed to make room" in caplog.text
    assert cache.find("a" * 64)  # used: now the youngest
    os.utime(cache.folder / f"{'c' * 64}.json", (time.time() - 10, time.time() - 10))
    put(cache, "d")
    assert {entry.key[0] for entry in cache.entries()} == {"a", "d"}
    assert put(cache, "e", 2501) is None
    assert "fused_cache allows" in caplog.text
    assert len(cache.entries()) == 2


def test_small_models_and_a_limit_of_nothing_keep_nothing(paths, tmp_path):
    inputs = fused_inputs(recipe_of(), paths)
    assert FusedCache(tmp_path, LIMIT, least=0).worthwhile(inputs)
    assert not FusedCache(tmp_path, LIMIT).worthwhile(inputs)
    assert not FusedCache(tmp_path, 0, least=0).worthwhile(inputs)


def test_without_a_lora_nothing_is_kept(paths, cache, monkeypatch):
    monkeypatch.setitem(ADAPTERS, "plus_face", ADAPTERS["faceid_plusv2"])
    data = recipe_of().canonical()
    data["model"]["distillation"] = None
    data["adapter"]["kind"] = "plus_face"
    paths.pop("distillation")
    load(Recipe.model_validate(data), paths, cache)
    assert not cache.entries()


@pytest.mark.parametrize(
    ("recipe", "fuses"),
    [
        ("hyper-fastface", True),
        ("lightning-fastface", True),
        ("hyper-pulid", True),
        ("lightning-pulid", False),
        ("lightning-plusface-dcg", False),
    ],
)
def test_recipes_without_a_lora(recipe, fuses):
    assert load_recipe(recipe).recipe.fuses_loras() is fuses


def test_what_dead_processes_left_is_swept(cache):
    cache.folder.mkdir()
    left = [cache.folder / ".abc.tmp", cache.folder / "orphan.safetensors"]
    fresh = cache.folder / ".def.tmp"
    for path in (*left, fresh):
        path.write_bytes(b"x")
    for path in left:
        os.utime(path, (1, 1))
    put(cache, "a")
    assert not any(path.exists() for path in left)
    assert fresh.exists()
    assert cache.clear() > 1000
    assert list(cache.folder.iterdir()) == []


def test_lora_for_the_text_encoders_is_cached_too(paths, cache, builds, tmp_path):
    from safetensors.torch import save_file

    paths["lora.0"] = tmp_path / "style.safetensors"
    name = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    save_file(
        {
            f"{name}.alpha": torch.tensor(2.0),
            f"{name}.lora_down.weight": torch.randn(2, 16),
            f"{name}.lora_up.weight": torch.randn(64, 2),
        },
        paths["lora.0"],
    )
    recipe = recipe_of(loras=(0.8,))
    first, second = load(recipe, paths, cache), load(recipe, paths, cache)
    assert len(builds) == 1
    own, *_ = loading.load_text_encoders(paths["base"], torch.float32)
    states = [each.state_dict() for each in (own, first.parts.text_encoder, second.parts.text_encoder)]
    changed = [key for key in states[0] if not torch.equal(states[0][key], states[1][key])]
    assert changed == ["encoder.layers.0.mlp.fc1.weight"]
    assert all(torch.equal(states[1][key], states[2][key]) for key in states[0])
