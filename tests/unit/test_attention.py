"""Attention manipulation against the formulas written out plainly, one image and one token at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastface_cli.recipe.schema import Attention, Blend
from fastface_cli.sampling import attention as am
from fastface_cli.sampling.processor import block_of


def maps(seed: int, rows: int = 3, heads: int = 2, positions: int = 16) -> torch.Tensor:
    logits = torch.randn(rows, heads, positions, 4, generator=torch.Generator().manual_seed(seed))
    return torch.softmax(3 * logits, dim=-1)


def chain(attention: Attention, block="down", step=0, steps=4) -> am.Chain:
    actual = am.resolve(attention, block, step, steps)
    assert actual is not None
    return actual


def minmax(x: torch.Tensor) -> torch.Tensor:
    return (x - x.min()) / (x.max() - x.min())


def test_scale_power():
    a = maps(0)
    actual = am.manipulate(a, chain(Attention(transforms=["power", "scale"])), 1)
    torch.testing.assert_close(actual, (1.55 * a**1.3).clamp(max=10))
    up = am.manipulate(a, chain(Attention(transforms=["power", "scale"]), "up"), 1)
    torch.testing.assert_close(up, 1.45 * a**1.3)


def test_scale_is_capped():
    actual = am.manipulate(maps(0), chain(Attention(transforms=[{"kind": "scale", "g": 100.0}])), 1)
    assert actual.max() == 10.0


@pytest.mark.parametrize("adaptive", [False, True])
def test_softmask_joint(adaptive):
    a = maps(1)
    kind = "adaptive_softmask" if adaptive else "softmask"
    actual = am.manipulate(a, chain(Attention(transforms=[kind])), 1)
    for token in range(4):
        column = a[..., token]
        threshold = 0.5
        if adaptive:
            threshold = torch.quantile(column, 0.6, dim=-1, keepdim=True).half().float().clamp(min=1e-6)
        expected = minmax(1 / (1 + torch.exp(-12.5 * (minmax(column) - threshold))))
        torch.testing.assert_close(actual[..., token], expected, rtol=1e-4, atol=1e-5)


def test_softmask_by_branch_sees_one_branch():
    a = maps(2)
    attention = Attention(transforms=["softmask"], normalisation="branch")
    together = am.manipulate(a, chain(attention), 1)
    for row in range(3):
        torch.testing.assert_close(
            together[row : row + 1], am.manipulate(a[row : row + 1], chain(attention), 1)
        )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 4), st.sampled_from(["joint", "branch"]))
def test_images_of_a_batch_never_see_each_other(seed, images, normalisation):
    attention = Attention(
        transforms=["adaptive_softmask", "scale"],
        invert_token_0=True,
        normalisation=normalisation,
        blend=Blend(),
    )
    rows = torch.stack([maps(seed + image) for image in range(images)], dim=1)

    together = am.manipulate(rows.flatten(0, 1), chain(attention), images).unflatten(0, (3, images))

    for image in range(images):
        alone = am.manipulate(rows[:, image], chain(attention), 1)
        torch.testing.assert_close(together[:, image], alone)


def test_only_chosen_tokens_change():
    a = maps(3)
    actual = am.manipulate(a, chain(Attention(transforms=["power"], tokens=[1, 3])), 1)
    assert torch.equal(actual[..., [0, 2]], a[..., [0, 2]])
    torch.testing.assert_close(actual[..., [1, 3]], a[..., [1, 3]] ** 1.3)


def test_token_0_is_inverted_and_turned_back():
    a = maps(4)
    actual = am.manipulate(a, chain(Attention(transforms=["power"], invert_token_0=True)), 1)
    changed = (1 - a[..., 0]) ** 1.3
    torch.testing.assert_close(actual[..., 0], changed.amax(-1, keepdim=True) - changed)
    torch.testing.assert_close(actual[..., 1:], a[..., 1:] ** 1.3)
    without_0 = am.manipulate(
        a, chain(Attention(transforms=["power"], invert_token_0=True, tokens=[1, 2])), 1
    )
    torch.testing.assert_close(without_0[..., 1:3], a[..., 1:3] ** 1.3)


def test_manipulation_leaves_its_input_alone():
    a = maps(5)
    before = a.clone()
    am.manipulate(a, chain(Attention(transforms=["power"], invert_token_0=True)), 1)
    assert torch.equal(a, before)


def test_blend_keeps_mean_and_spread_of_the_original():
    x, y = torch.rand(2, 3, 8), torch.rand(2, 3, 8)
    moved = am.blend(x, y, 0.0, 1e-6)
    torch.testing.assert_close(moved.mean(-1), y.mean(-1))
    torch.testing.assert_close(moved.std(-1), y.std(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(am.blend(x, y, 1.0, 1e-6), x)


def test_blend_that_breaks_is_skipped_for_that_image_only():
    images, d = 2, 6
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 2, 5, d, generator=generator)
    key, value = (torch.randn(2, 2, 4, d, generator=generator) for _ in range(2))
    attention = Attention(transforms=["power"], blend=Blend())
    whole = am.identity_attention(query, key, value, chain(attention), images)
    broken_value = value.clone()
    broken_value[1, 0, 0, 0] = torch.inf
    actual = am.identity_attention(query, key, broken_value, chain(attention), images)
    torch.testing.assert_close(actual[0], whole[0])
    assert actual[1].isfinite().any()


def test_plain_attention_where_nothing_is_chosen():
    attention = Attention(transforms=["power"], blocks=["up"], steps=[2])
    assert am.resolve(attention, "down", 2, 4) is None
    assert am.resolve(attention, "up", 1, 4) is None
    assert am.resolve(attention, "up", 2, 4) is not None
    assert am.resolve(Attention(), "up", 0, 4) is None


def test_schedules_by_step():
    attention = Attention(
        transforms=[{"kind": "adaptive_softmask", "k": [7.5, 5.0, 5.0, 5.0], "level": 0.65}],
    )
    slopes = [chain(attention, step=step).transforms[0][1]["k"] for step in range(4)]
    assert slopes == [7.5, 5.0, 5.0, 5.0]
    assert chain(attention, step=1, steps=7).transforms[0][1]["k"] == pytest.approx(6.25)


@pytest.mark.parametrize("positions", [1, 2, 16, 17])
@pytest.mark.parametrize("level", [0.0, 0.35, 0.6, 0.65, 1.0])
def test_the_quantile_is_torchs_rounded_to_half(positions, level):
    # Down to where halves grow coarse, and below.
    a = maps(6, heads=4, positions=positions) * 10 ** torch.linspace(-8, 0, 3)[:, None, None, None]
    expected = torch.quantile(a, level, dim=-2, keepdim=True).half().clamp_min(1e-6).float()
    assert torch.equal(am.quantile(a, level), expected)
    assert torch.equal(am.quantile(a, torch.tensor(level)), expected)


def test_large_maps_are_not_too_much_for_the_quantile():
    a = torch.rand(1, 1, 5_000_000, 4)  # torch.quantile takes 16 million numbers at most
    assert am.quantile(a, 0.5).shape == (1, 1, 1, 4)


def test_constant_maps_stay_finite():
    a = torch.full((3, 2, 16, 4), 0.25)
    actual = am.manipulate(a, chain(Attention(transforms=["softmask", "adaptive_softmask"])), 1)
    assert actual.isfinite().all()


@pytest.mark.parametrize(
    ("name", "block"),
    [("down_blocks.1.x", "down"), ("mid_block.attentions.0", "mid"), ("up_blocks.0.attentions.1", "up")],
)
def test_block_of(name, block):
    assert block_of(name) == block
