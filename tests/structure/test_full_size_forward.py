"""One step of the UNet at its published size, on meta tensors."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

from fastface_cli.benchmark.sdxl import PUBLISHED
from fastface_cli.models.backbone import SDXL
from fastface_cli.recipe.schema import AdaptiveSoftmask, Attention, Blend, Power, Scale
from fastface_cli.sampling import attention, processor
from fastface_cli.sampling.guidance import BRANCHES

META = torch.device("meta")
METHODS = {
    "plain": Attention(),
    "am1": Attention(transforms=[Power(kind="power"), Scale(kind="scale")]),
    "am2": Attention(
        transforms=[AdaptiveSoftmask(kind="adaptive_softmask"), Scale(kind="scale")],
        invert_token_0=True,
        blend=Blend(),
    ),
}


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    """Return a UNet with the same attention processors as after `load_ip_adapter`."""
    with META:
        model = UNet2DConditionModel.from_config(PUBLISHED.unet).half().eval().requires_grad_(False)
        processors = {}
        for name, processor in model.attn_processors.items():
            layer = model.get_submodule(name.removesuffix(".processor"))
            width = layer.to_q.out_features
            processors[name] = (
                IPAdapterAttnProcessor2_0(width, 2048, num_tokens=(4,)).half()
                if layer.is_cross_attention
                else processor
            )
        model.set_attn_processor(processors)
    return model


@pytest.mark.parametrize(("method", "branches"), [("plain", 1), ("am1", 2), ("am2", 3)])
def test_attention_shapes_of_two_images_at_1024(
    unet: UNet2DConditionModel, method: str, branches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = 2
    calls: list[tuple[tuple[int, ...], tuple[int, ...], bool]] = []
    identity_attention = attention.identity_attention

    def spy(query, key, value, chain, count):
        calls.append((tuple(query.shape), tuple(key.shape), chain is None))
        return identity_attention(query, key, value, chain, count)

    monkeypatch.setattr(attention, "identity_attention", spy)
    layers = processor.identity_layers(unet)
    processors = processor.identity_processors(layers)
    text = torch.empty(2 * images, 77, 2048, dtype=torch.float16, device=META)
    identity = torch.empty(2 * images, 4, 2048, dtype=torch.float16, device=META)
    conditions = processor.Conditions(
        text=text,
        pooled=torch.empty(2 * images, 1280, dtype=torch.float16, device=META),
        time_ids=torch.empty(1, 6, dtype=torch.float16, device=META),
        identity=identity,
        scale=torch.empty(4, images, device=META),
        has_identity=[True] * 4,
        images=images,
        projected=processor.project(layers, processors, text, identity),
    )
    rows = branches * images
    with torch.no_grad(), processor.installed(layers, processors):
        kinds = map(type, unet.attn_processors.values())
        installed = sum(kind is processor.IdentityAttnProcessor for kind in kinds)
        attended = conditions.select(
            BRANCHES["identity_first"][3 - branches :],
            {block: attention.resolve(METHODS[method], block, 0, 4) for block in SDXL.blocks},
            0,
        )
        (predicted,) = unet(
            torch.empty(rows, 4, 128, 128, dtype=torch.float16, device=META),
            torch.tensor(999),
            encoder_hidden_states=attended,
            added_cond_kwargs={
                "text_embeds": attended.pooled,
                "time_ids": attended.time_ids,
            },
            return_dict=False,
        )
    assert (predicted.shape, predicted.dtype) == ((rows, 4, 128, 128), torch.float16)
    assert installed == len(calls) == 70
    shapes = {query for query, _, _ in calls}
    assert shapes == {(rows, 10, 4096, 64), (rows, 20, 1024, 64)}
    assert {key for _, key, _ in calls} == {(rows, 10, 4, 64), (rows, 20, 4, 64)}
    plain = sum(is_plain for _, _, is_plain in calls)
    assert plain == (70 if method == "plain" else 10)  # the mid block is not manipulated
