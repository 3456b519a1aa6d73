"""Write the shipped files, load them with the public loaders, then move them to their folder.

With ``--draft``, parts without a checkpoint are written with untrained weights, to test the layout before
training.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionModelWithProjection

from benchmarks.published_files import LORA_TARGETS
from fastface_cli.benchmark.sdxl import PUBLISHED, config_text
from training import (
    adapter,
    captions,
    clip,
    data,
    decoder,
    detector,
    lora,
    low_rank,
    recognizer,
    tokenizer,
    unet,
    vae,
)
from training.common import Options, load_part, options

TARGET = Path(__file__).resolve().parent.parent / "fastface_cli" / "pocket" / "weights"
LORA = "Pocket-4steps-lora.safetensors"
ADAPTER = "ip-adapter-faceid-plusv2_pocket.bin"
HEAD_RANK = 64
"""Rank of the exported last layer of the recognizer: saves 0.8 MB, held-out cosine 0.9058, not 0.9064."""
LIMIT = 30_000_000
"""Maximum size of all files together, in bytes."""


def halve_onnx(path: Path) -> None:
    """Store the weights as float16, each followed by a cast: inputs and outputs stay float32."""
    model = onnx.load(str(path))
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < 64:
            continue
        name = tensor.name
        values = numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(values, f"{name}_half"))
        casts.append(
            helper.make_node("Cast", [f"{name}_half"], [name], name=f"Cast_{name}", to=TensorProto.FLOAT)
        )
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*casts, *nodes])
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def to_onnx(network: nn.Module, example: torch.Tensor, path: Path, outputs: list[str], free: bool) -> None:
    """Export to ONNX; ``free`` makes height and width dynamic."""
    axes: dict[str, dict[int, str]] = {}
    if free:
        axes = {"input": {2: "height", 3: "width"}} | {name: {0: f"{name}_rows"} for name in outputs}
    else:
        axes = {"input": {0: "count"}} | {name: {0: "count"} for name in outputs}
    with warnings.catch_warnings():
        # The newer exporter requires an additional package.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.cpu().eval(),
            (example,),
            str(path),
            input_names=["input"],
            output_names=outputs,
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )
    halve_onnx(path)


def factorised(layer: Any, rank: int) -> nn.Sequential:
    """Factorize a linear layer into two layers of a given rank, by singular value decomposition."""
    u, s, v = torch.linalg.svd(layer.weight.data, full_matrices=False)
    first = nn.Linear(layer.in_features, rank, bias=False)
    second = nn.Linear(rank, layer.out_features)
    first.weight.data = v[:rank].contiguous()
    second.weight.data = (u[:, :rank] * s[:rank]).contiguous()
    second.bias.data = layer.bias.data
    return nn.Sequential(first, second)


def export_face(settings: Options, folder: Path, draft: bool) -> None:
    """Export detector and recognizer in the layout of InsightFace's packs."""
    folder.mkdir(parents=True, exist_ok=True)
    if not _keep_shipped(settings.work / "recognizer.pt", folder / "rec_pocket.onnx", draft):
        have = (settings.work / "recognizer.pt").exists()
        network = recognizer.trained(settings.work) if have else recognizer.Recognizer()
        network.add_module("head", factorised(network.head, HEAD_RANK))
        to_onnx(network, torch.zeros(1, 3, 112, 112), folder / "rec_pocket.onnx", ["embedding"], free=False)
    if not _keep_shipped(settings.work / "detector.pt", folder / "det_pocket.onnx", draft):
        have = (settings.work / "detector.pt").exists()
        finder = detector.trained(settings) if have else detector.Detector()
        names = [f"{kind}_{stride}" for kind in ("score", "box", "points") for stride in detector.STRIDES]
        to_onnx(finder, torch.zeros(1, 3, 320, 320), folder / "det_pocket.onnx", names, free=True)


def _keep_shipped(checkpoint: Path, file: Path, draft: bool) -> bool:
    """Return whether to keep the shipped file, because there is no checkpoint or it is one of ``shipped``.

    A second export would not give the same bytes: batch normalizations are fused and the head is factorized.
    """
    trained = checkpoint.exists() and load_part(checkpoint, "step")
    if draft or trained:
        return False
    shutil.copyfile(TARGET / "face" / file.name, file)
    return True


def export_pipe(settings: Options, folder: Path, draft: bool) -> None:
    """Export UNet, text towers, tokenizers, VAE and scheduler as an SDXL pipeline, and the vision tower."""
    work, size = settings.work, settings.size
    if (work / "clip.pt").exists() or not draft:
        towers, words = clip.trained(work)
    else:
        facts = captions.all_facts(data.load(settings))
        words = tokenizer.build(facts, settings.seed)
        towers = clip.Clip(len(words))
    if (work / "latent_statistics.pt").exists() or not draft:
        autoencoder = decoder.trained(work, size)
    else:
        autoencoder = vae.build(size)
    base = unet.trained(work, size) if (work / "unet.pt").exists() or not draft else unet.build(size)
    scheduler = EulerDiscreteScheduler.from_config(PUBLISHED.scheduler)
    pipe = StableDiffusionXLPipeline(
        vae=autoencoder.cpu(),
        text_encoder=towers.text_1.cpu(),
        text_encoder_2=towers.text_2.cpu(),
        tokenizer=words,
        tokenizer_2=words,
        unet=base.cpu(),
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipe.to(dtype=torch.float16).save_pretrained(folder / "pipe", variant="fp16")
    (folder / "pipe" / "scheduler" / "scheduler_config.json").write_text(config_text(PUBLISHED.scheduler))
    towers.vision.cpu().half().save_pretrained(folder / "clip")


def export_additions(settings: Options, folder: Path, draft: bool) -> None:
    """Export the distillation LoRA and the adapter."""
    work, size = settings.work, settings.size
    if (work / "lora.pt").exists() or not draft:
        low = lora.trained(work, size)
    else:
        low = low_rank.Additions(low_rank.inject(unet.build(size), LORA_TARGETS, lora.RANK))
    save_file(lora.file_layout(low), folder / LORA)
    if (work / "adapter.pt").exists() or not draft:
        identity = adapter.trained(work, size)
    else:
        identity = adapter.Adapter(unet.build(size))
    torch.save(identity.file_layout(), folder / ADAPTER)


def check(folder: Path) -> None:
    """Load every file as a user would; raise an AssertionError if a file is wrong."""
    from insightface.app import FaceAnalysis

    pipe: Any = StableDiffusionXLPipeline.from_pretrained(
        folder / "pipe", variant="fp16", torch_dtype=torch.float32
    )
    before = pipe.unet.conv_in.weight.clone()
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    plain = attention.weight.detach().clone()
    pipe.load_lora_weights(str(folder / LORA))
    pipe.fuse_lora(lora_scale=0.8)
    pipe.unload_lora_weights()
    low = load_file(folder / LORA)
    name = lora.kohya_name("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    change = low[f"{name}.lora_up.weight"].float() @ low[f"{name}.lora_down.weight"].float()
    fused = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    assert torch.allclose(fused, plain + 0.8 * change, atol=1e-5), "the LoRA does not fuse as W + s B A"
    assert torch.equal(before, pipe.unet.conv_in.weight)
    pipe.load_ip_adapter(str(folder), subfolder="", weight_name=ADAPTER, image_encoder_folder=None)
    assert "faceid_0" in pipe.get_list_adapters().get("unet", []), "the adapter has no LoRA"
    projection = pipe.unet.encoder_hid_proj.image_projection_layers[0]
    projection.shortcut = True
    encoder = CLIPVisionModelWithProjection.from_pretrained(folder / "clip", dtype=torch.float32)
    projection.clip_embeds = adapter_states(encoder)
    with torch.no_grad():
        result = pipe(
            "a woman, smiling",
            num_inference_steps=1,
            guidance_scale=1.0,
            height=pipe.unet.config.sample_size * 8,
            width=pipe.unet.config.sample_size * 8,
            ip_adapter_image_embeds=[torch.zeros(1, 1, 512)],
            output_type="np",
        ).images
    assert np.isfinite(result).all()
    with tempfile.TemporaryDirectory() as root:
        pack = Path(root) / "models" / "pocket"
        shutil.copytree(folder / "face", pack)
        app = FaceAnalysis(
            name="pocket",
            root=root,
            allowed_modules=["detection", "recognition"],
            providers=["CPUExecutionProvider"],
        )
        app.prepare(ctx_id=-1, det_size=(320, 320))
        recognition = app.models["recognition"]
        assert (recognition.input_mean, recognition.input_std) == (127.5, 127.5)
        app.get(np.zeros((200, 300, 3), np.uint8))
        assert app.models["recognition"].get_feat(np.zeros((112, 112, 3), np.uint8)).shape == (1, 512)


def adapter_states(encoder: Any) -> torch.Tensor:
    """Return the states of an all-zero image in the shape that the projection requires, [1, 1, 65, 96]."""
    pixels = torch.zeros(1, 3, clip.VISION_SIDE, clip.VISION_SIDE)
    states: torch.Tensor = encoder(pixels, output_hidden_states=True).hidden_states[-2]
    return states[:, None].detach()


def main() -> None:
    """Export and check the files, then move them to their folder."""
    draft = "--draft" in sys.argv
    settings = options("export", 0, [argument for argument in sys.argv[1:] if argument != "--draft"])
    folder = settings.work / "export"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    export_pipe(settings, folder, draft)
    export_additions(settings, folder, draft)
    export_face(settings, folder / "face", draft)
    check(folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    for path in sorted(files):
        print(f"{path.stat().st_size:>10,}  {path.relative_to(folder)}")
    print(f"{total:>10,}  in total")
    assert total <= LIMIT or draft, f"{total:,} bytes exceed the limit of {LIMIT:,}"
    for path in files:
        place = TARGET / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh = place.with_name(place.name + ".new")
        shutil.copyfile(path, fresh)
        fresh.replace(place)
    print(f"in place: {TARGET}")


if __name__ == "__main__":
    main()
