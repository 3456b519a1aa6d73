"""Small random checkpoints with published key formats, loaded by the product's loaders.

Every tensor of a file must be loaded exactly, and nothing else may change.
"""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from support.original_names import original
from torch import Tensor

from benchmarks.published_files import base_configs, lora_targets, write_stack, write_tokenizer
from fastface_cli.adapters.faceid_plusv2 import load_adapter
from fastface_cli.app.pipeline import Pipeline, Request
from fastface_cli.benchmark.sdxl import MINIATURE, PADS, config_text
from fastface_cli.errors import ModelUnavailableError
from fastface_cli.identity.identity import Identity
from fastface_cli.models import loading
from fastface_cli.quiet import quiet_libraries
from fastface_cli.recipe.schema import Recipe
from fastface_cli.store.fused_cache import FusedCache

State = dict[str, Tensor]
Paths = dict[str, Path]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def stock(miniature: Paths) -> StableDiffusionXLPipeline:
    """Return the base as loaded by diffusers; never modified."""
    return StableDiffusionXLPipeline.from_pretrained(
        miniature["base"], dtype=torch.float32, add_watermarker=False
    )


@pytest.fixture
def pipe(stock: StableDiffusionXLPipeline) -> StableDiffusionXLPipeline:
    """Return a copy of the base that a test may modify."""
    return StableDiffusionXLPipeline(**{name: copy.deepcopy(part) for name, part in stock.components.items()})


def snapshot(module: torch.nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(actual: State, expected: State) -> bool:
    return actual.keys() == expected.keys() and all(
        torch.equal(actual[name], expected[name]) for name in expected
    )


def delta(lora: State, module: str) -> Tensor:
    """Compute alpha / rank * B A from a kohya file."""
    stem = "lora_unet_" + module.replace(".", "_")
    down, up = lora[f"{stem}.lora_down.weight"].double(), lora[f"{stem}.lora_up.weight"].double()
    if down.ndim == 4:  # a 1x1 convolution after a larger one
        product = torch.nn.functional.conv2d(down.transpose(0, 1).flip(2, 3), up).flip(2, 3).transpose(0, 1)
    else:
        product = up @ down
    return product * (float(lora[f"{stem}.alpha"]) / len(down))


# -------------------------------------------------------------------------------------- distillation LoRAs


def test_fused_loras_add_scaled_ba_to_every_module(pipe: StableDiffusionXLPipeline, miniature: Paths) -> None:
    """Two LoRAs in sequence, like a distillation and a style LoRA."""
    targets = lora_targets(pipe.unet)
    assert {type(module).__name__ for module in targets.values()} == {"Linear", "Conv2d"}
    expected = {name: tensor.double() for name, tensor in snapshot(pipe.unet).items()}
    for part, scale in (("hyper", 1.0), ("lcm", -0.35)):
        lora = load_file(miniature[part])
        assert len(lora) == 3 * len(targets)
        for name in targets:
            expected[f"{name}.weight"] += scale * delta(lora, name)
        loading.fuse_lora(pipe, miniature[part], scale)
        actual = snapshot(pipe.unet)
        assert actual.keys() == expected.keys()
        for name, tensor in actual.items():
            assert torch.allclose(tensor.double(), expected[name], rtol=0, atol=1e-6)


def test_lora_at_scale_zero_changes_nothing(pipe: StableDiffusionXLPipeline, miniature: Paths) -> None:
    before = snapshot(pipe.unet)
    loading.fuse_lora(pipe, miniature["hyper"], 0.0)
    assert same(snapshot(pipe.unet), before)


def test_float32_lora_is_rounded_once_in_a_float16_unet(
    pipe: StableDiffusionXLPipeline, miniature: Paths
) -> None:
    """Hyper-SD is stored in float32; converting it to float16 before the product would lose precision."""
    pipe.unet.to(torch.float16)
    before, lora = snapshot(pipe.unet), load_file(miniature["hyper"])
    loading.fuse_lora(pipe, miniature["hyper"], 1.0)
    for name in lora_targets(pipe.unet):
        actual = pipe.unet.get_submodule(name).weight
        assert actual.dtype is torch.float16
        expected = before[f"{name}.weight"].double() + delta(lora, name)
        rounding = (expected.half() - expected).norm()
        assert (actual - expected).norm() < 1.1 * rounding


def test_style_lora_changes_unet_and_text_encoders(pipe: StableDiffusionXLPipeline, tmp_path: Path) -> None:
    """Trainers of style LoRAs use kohya names, with original block names for the UNet."""
    generator = torch.Generator().manual_seed(0)
    spots = {
        ("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"): (
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
        )
    }
    for role in ("q_proj", "k_proj", "v_proj", "out_proj"):
        module = f"encoder.layers.1.self_attn.{role}"
        stem = f"text_model_encoder_layers_1_self_attn_{role}"
        spots["text_encoder", module] = f"lora_te1_{stem}"
        spots["text_encoder_2", f"text_model.{module}"] = f"lora_te2_{stem}"
    state: State = {}
    expected = {part: snapshot(getattr(pipe, part)) for part in ("unet", "text_encoder", "text_encoder_2")}
    for (part, module), stem in spots.items():
        out, into = getattr(pipe, part).get_submodule(module).weight.shape
        down, up = torch.randn(4, into, generator=generator), torch.randn(out, 4, generator=generator)
        state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        state[f"{stem}.alpha"] = torch.tensor(1.0)
        expected[part][f"{module}.weight"] += 0.8 / 4 * up @ down
    save_file(state, tmp_path / "style.safetensors")
    loading.fuse_lora(pipe, tmp_path / "style.safetensors", 0.8)
    for part, tensors in expected.items():
        actual = snapshot(getattr(pipe, part))
        assert actual.keys() == tensors.keys()
        assert all(torch.allclose(actual[name], tensors[name], atol=1e-6) for name in tensors)


# ------------------------------------------------------------------------------------------------ adapter


def attention_layers(unet: torch.nn.Module) -> Iterator[tuple[int, str, torch.nn.Module]]:
    """Yield index in the adapter file, name and module of every attention layer: down, up, mid."""
    names = [name for name, _ in unet.named_modules() if re.search(r"\.attn[12]$", name)]
    order = {"down_blocks": 0, "up_blocks": 1, "mid_block": 2}
    for index, name in enumerate(sorted(names, key=lambda name: order[name.split(".")[0]])):
        yield index, name, unet.get_submodule(name)


@pytest.mark.parametrize("scale", [0.6, 0.0])
def test_adapter_lora_is_fused_at_its_scale(
    pipe: StableDiffusionXLPipeline, miniature: Paths, scale: float
) -> None:
    before = snapshot(pipe.unet)
    file = torch.load(miniature["adapter"], weights_only=True)["ip_adapter"]
    load_adapter(pipe, miniature["adapter"], scale)
    after = snapshot(pipe.unet)
    for index, name, _ in attention_layers(pipe.unet):
        for role, module in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0")):
            weight = f"{name}.{module}.weight"
            up = file.pop(f"{index}.to_{role}_lora.up.weight")
            down = file.pop(f"{index}.to_{role}_lora.down.weight")
            expected = before.pop(weight) + scale * (up @ down)
            assert torch.allclose(after.pop(weight), expected, rtol=0, atol=0 if scale == 0 else 1e-6)
        for role in ("k", "v") if name.endswith("attn2") else ():
            own = after.pop(f"{name}.processor.to_{role}_ip.0.weight")
            assert torch.equal(own, file.pop(f"{index}.to_{role}_ip.weight"))
    assert not file  # every tensor of the file is loaded
    assert same(after, before)  # and nothing else has changed
    assert not hasattr(pipe.unet, "peft_config")


def test_projection_equals_the_file(pipe: StableDiffusionXLPipeline, miniature: Paths) -> None:
    file = torch.load(miniature["adapter"], weights_only=True)["image_proj"]
    module = load_adapter(pipe, miniature["adapter"], 1.0)
    actual = snapshot(module)
    both = {name: tensor.double().sum().item() for name, tensor in actual.items()}
    assert sum(both.values()) == pytest.approx(sum(t.double().sum().item() for t in file.values()), abs=1e-6)
    assert torch.equal(actual["proj.net.2.weight"], file["proj.2.weight"])
    assert torch.equal(actual["layers.3.ln1.weight"], file["perceiver_resampler.layers.3.0.norm2.weight"])
    keys_values = torch.cat([actual["layers.2.attn.to_k.weight"], actual["layers.2.attn.to_v.weight"]])
    assert torch.equal(keys_values, file["perceiver_resampler.layers.2.0.to_kv.weight"])
    assert torch.equal(actual["layers.1.ff.1.net.2.weight"], file["perceiver_resampler.layers.1.1.3.weight"])
    assert module.shortcut is True


def recipe(adapter_scale: float, lora_scale: float) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test",
            "model": {
                "base": "base",
                "adapter": "adapter",
                "image_encoder": "encoder",
                "face": "face",
                "scheduler": {"kind": "ddim", "spacing": "trailing"},
            },
            "adapter": {"scale": adapter_scale, "lora_scale": lora_scale},
            "sampling": {"steps": 4, "width": 128, "height": 128},
        }
    )


def latents(loaded: Pipeline, person: Identity, adapter_scale: float | None = None) -> Tensor:
    (output,) = loaded.generate([Request("a cat on the moon", 3, person, adapter_scale=adapter_scale)])
    return output.latents[-1]


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def test_disabled_adapter_equals_no_adapter(
    pipe: StableDiffusionXLPipeline, miniature: Paths, person: Identity
) -> None:
    """Scale 0 and LoRA scale 0 give the result of the diffusers pipeline without an adapter."""
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        "a cat on the moon",
        width=128,
        height=128,
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images[0]
    bare = Pipeline.load(recipe(0.8, 0.0), miniature, device="cpu", dtype="float32")
    assert distance(latents(bare, person, 0.0), expected) < 1e-5
    assert distance(latents(bare, person), expected) > 1e-3
    fused = Pipeline.load(recipe(0.0, 0.8), miniature, device="cpu", dtype="float32")
    assert distance(latents(fused, person), expected) > 1e-3


# ------------------------------------------------------------------------------------- files of the base


def test_base_parts_are_loaded_exactly(miniature: Paths) -> None:
    base = miniature["base"]
    unet = loading.load_unet(base, None, torch.float32)
    assert same(snapshot(unet), load_file(base / "unet" / WEIGHTS))
    vae = loading.load_vae(base, None, torch.float32)
    assert same(snapshot(vae), load_file(base / "vae" / WEIGHTS))
    encoder, encoder_2, tokenizer, tokenizer_2 = loading.load_text_encoders(base, torch.float32)
    first = load_file(base / "text_encoder" / "model.safetensors")
    assert same(
        {f"text_model.{name.removeprefix('text_model.')}": t for name, t in snapshot(encoder).items()}, first
    )
    assert same(snapshot(encoder_2), load_file(base / "text_encoder_2" / "model.safetensors"))
    assert tokenizer("A").input_ids == [512, 256 + ord("a") - 33, 513]
    assert (tokenizer.pad_token_id, tokenizer_2.pad_token_id) == (513, 0)


def test_image_encoder_is_loaded_exactly(miniature: Paths) -> None:
    encoder = loading.load_image_encoder(miniature["image_encoder"], torch.float32)
    file = load_file(miniature["image_encoder"] / "model.safetensors")
    assert file.pop("vision_model.embeddings.position_ids").shape == (1, 17)
    assert same(snapshot(encoder), file)


def test_replaced_unets_are_loaded_exactly(miniature: Paths) -> None:
    lightning = loading.load_unet(miniature["base"], miniature["lightning"], torch.float32)
    assert same(snapshot(lightning), load_file(miniature["lightning"]))
    turbo = loading.load_unet(miniature["base"], miniature["turbo"], torch.float32)
    assert same(snapshot(turbo), load_file(miniature["turbo"] / "unet" / WEIGHTS))
    assert not same(snapshot(lightning), snapshot(turbo))


def test_replaced_vae_is_loaded_exactly_and_stays_in_float16(miniature: Paths) -> None:
    vae = loading.load_vae(miniature["base"], miniature["vae"], torch.float32)
    assert same(snapshot(vae), load_file(miniature["vae"] / WEIGHTS))
    assert loading.load_vae(miniature["base"], miniature["vae"], torch.float16).dtype is torch.float16
    assert loading.load_vae(miniature["base"], None, torch.float16).dtype is torch.float32  # it overflows


def test_half_precision_files_are_found_by_their_variant(tmp_path: Path) -> None:
    base = write_stack(tmp_path, MINIATURE, fill="random", parts=["base"], dtype=torch.float16)["base"]
    assert not list(base.rglob(WEIGHTS))
    unet = loading.load_unet(base, None, torch.float16)
    file = load_file(base / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert same(snapshot(unet), file)
    wide = loading.load_unet(base, None, torch.float32)
    assert same(snapshot(wide), {name: tensor.float() for name, tensor in file.items()})
    encoder, encoder_2, *_ = loading.load_text_encoders(base, torch.float16)
    assert {encoder.dtype, encoder_2.dtype} == {torch.float16}


@pytest.fixture(scope="module")
def single_file(miniature: Paths, tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """Write the miniature as one checkpoint in the original layout, and a folder of configurations."""
    base, folder = miniature["base"], tmp_path_factory.mktemp("single")
    state = original(
        unet=load_file(base / "unet" / WEIGHTS),
        vae=load_file(base / "vae" / WEIGHTS),
        text_encoder=load_file(base / "text_encoder" / "model.safetensors"),
        text_encoder_2=load_file(base / "text_encoder_2" / "model.safetensors"),
    )
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    for name, config in base_configs(MINIATURE).items():
        (folder / "config" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "config" / name).write_text(config_text(config))
    for name, pad in PADS.items():
        write_tokenizer(folder / "config" / name, 514, pad)
    return {"base": folder / "model.safetensors", "config": folder / "config"}


def test_single_file_checkpoint_is_loaded_exactly(
    stock: StableDiffusionXLPipeline, single_file: Paths, capfd: pytest.CaptureFixture[str]
) -> None:
    with quiet_libraries():
        loaded = loading.load_single_file(single_file["base"], single_file["config"], torch.float32)
    assert capfd.readouterr().err == ""
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        assert same(snapshot(getattr(loaded, part)), snapshot(getattr(stock, part)))
    assert loaded.tokenizer_2.pad_token_id == stock.tokenizer_2.pad_token_id


def test_single_file_base_is_fused_once(
    miniature: Paths, single_file: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, cache = {**miniature, **single_file}, FusedCache(tmp_path, 1 << 30, least=0)
    first = Pipeline.load(recipe(0.8, 0.6), paths, device="cpu", dtype="float32", fused=cache)
    monkeypatch.delattr(loading, "fuse_lora")
    monkeypatch.delattr(loading, "_fused")
    second = Pipeline.load(recipe(0.8, 0.6), paths, device="cpu", dtype="float32", fused=cache)
    assert same(snapshot(first.unet), snapshot(second.unet))
    assert same(snapshot(first.vae), snapshot(second.vae))


def test_single_file_base_gives_the_same_latents_as_a_folder(
    miniature: Paths, single_file: Paths, person: Identity
) -> None:
    folder, file = (
        Pipeline.load(recipe(0.8, 0.6), paths, device="cpu", dtype="float32")
        for paths in (miniature, {**miniature, **single_file})
    )
    assert distance(latents(file, person), latents(folder, person)) < 1e-5


# ------------------------------------------------------------------------------------------ broken files


def without(path: Path, pattern: str, target: Path) -> Path:
    """Copy a checkpoint without the first tensor whose name matches."""
    state = load_file(path)
    state.pop(next(name for name in sorted(state) if re.search(pattern, name)))
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, target, {"format": "pt"})
    return target


BREAKS: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "unet": (f"unet/{WEIGHTS}", r"mid_block", lambda base: loading.load_unet(base, None, torch.float32)),
    "vae": (f"vae/{WEIGHTS}", r"decoder\.conv_in", lambda base: loading.load_vae(base, None, torch.float32)),
    "text_encoder": (
        "text_encoder/model.safetensors",
        r"layers\.1.*fc2",
        lambda base: loading.load_text_encoders(base, torch.float32),
    ),
    "text_encoder_2": (
        "text_encoder_2/model.safetensors",
        r"text_projection",
        lambda base: loading.load_text_encoders(base, torch.float32),
    ),
}


@pytest.mark.parametrize("part", BREAKS)
def test_file_that_lacks_a_tensor_is_refused(miniature: Paths, tmp_path: Path, part: str) -> None:
    """Diffusers would log a warning and use random weights."""
    name, pattern, load = BREAKS[part]
    base = Path(shutil.copytree(miniature["base"], tmp_path / "base"))
    without(miniature["base"] / name, pattern, base / name)
    with pytest.raises(ModelUnavailableError):
        load(base)


def test_replacements_that_lack_a_tensor_are_refused(
    pipe: StableDiffusionXLPipeline, miniature: Paths, single_file: Paths, tmp_path: Path
) -> None:
    broken = without(miniature["lightning"], r"up_blocks", tmp_path / "lightning.safetensors")
    with pytest.raises(ModelUnavailableError):
        loading.load_unet(miniature["base"], broken, torch.float32)
    for lacking in ("middle_block", r"embedders\.1\.model\.text_projection"):
        broken = without(single_file["base"], lacking, tmp_path / "single.safetensors")
        with pytest.raises(ModelUnavailableError):
            loading.load_single_file(broken, single_file["config"], torch.float32)
    adapter = torch.load(miniature["adapter"], weights_only=True)
    del adapter["ip_adapter"]["1.to_v_ip.weight"]
    torch.save(adapter, tmp_path / "adapter.bin")
    with pytest.raises(ModelUnavailableError):
        load_adapter(pipe, tmp_path / "adapter.bin", 0.6)


def test_lora_of_another_model_is_refused(
    pipe: StableDiffusionXLPipeline, miniature: Paths, tmp_path: Path
) -> None:
    lora = load_file(miniature["hyper"])
    strange = {name.replace("attn1", "attn9"): tensor for name, tensor in lora.items() if "attn1" in name}
    save_file(strange, tmp_path / "names.safetensors")
    wide = {
        name: torch.zeros(*tensor.shape[:1], tensor.shape[1] + 1) if "down.weight" in name else tensor
        for name, tensor in lora.items()
        if "to_q" in name
    }
    save_file(wide, tmp_path / "shapes.safetensors")
    before = snapshot(pipe.unet)
    for name in ("names", "shapes"):
        with pytest.raises(ModelUnavailableError):
            loading.fuse_lora(pipe, tmp_path / f"{name}.safetensors", 1.0)
    assert same(
        {n.replace(".base_layer", ""): t for n, t in snapshot(pipe.unet).items() if "lora_" not in n}, before
    )
