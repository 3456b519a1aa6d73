"""Decoupled guidance against the formulas written out plainly."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastface_cli.recipe.schema import Attention, Guidance, WeightFunction
from fastface_cli.sampling import guidance

TIMESTEPS = [999.0, 749.0, 499.0, 249.0]
PUBLISHED = Guidance(identity=[1.0, 1.5, 1.5, 1.0], text=[1.0, 3.0, 3.0, 1.0], rescale=0.75)
AM1 = Attention(transforms=["power", "scale"])
AM2 = Attention(transforms=["adaptive_softmask", "scale"], invert_token_0=True)
OFF = Attention()
numbers = st.sampled_from([0.0, 0.5, 1.0, 1.5, 3.0, -1.0])
orders = st.sampled_from(["identity_first", "text_first", "independent"])


def plainly(e0, e1, e2, g: Guidance, identity: float, text: float):
    """METHOD, decoupled guidance, for one image [C, H, W]."""
    a, b = (identity, text) if g.order == "identity_first" else (text, identity)
    term1 = e1 - e0
    term2 = e2 - (e0 if g.order == "independent" else e1)
    if g.renorm:
        term2 = term2 * torch.linalg.norm(term1) / torch.linalg.norm(term2)
    guided = e0 + a * term1 + b * term2
    if g.rescale:
        guided = guided * (g.rescale * (e1.std() + e2.std()) / (2 * guided.std()) + 1 - g.rescale)
    return guided


@pytest.mark.parametrize(
    ("plan_of", "attention", "samples"),
    [
        (PUBLISHED, AM1, [2, 3, 3, 2]),
        (PUBLISHED, OFF, [2, 3, 3, 2]),
        (PUBLISHED, AM2, [3, 3, 3, 3]),
        (Guidance(), AM1, [1, 1, 1, 1]),
        (Guidance(), AM2, [3, 3, 3, 3]),
        (Guidance(identity=1.5, text=1.5), AM1, [2, 2, 2, 2]),
        (Guidance(), AM2.model_copy(update={"normalisation": "branch"}), [1, 1, 1, 1]),
        (Guidance(), AM2.model_copy(update={"steps": [1]}), [1, 3, 1, 1]),
        (Guidance(renorm=True), OFF, [3, 3, 3, 3]),
        (Guidance(renorm=True, text=0.0, identity=2.0), OFF, [2, 2, 2, 2]),
    ],
)
def test_plan_computes_only_what_counts(plan_of, attention, samples):
    steps = guidance.plan(plan_of, attention, TIMESTEPS)
    assert [len(step.branches) for step in steps] == samples


def test_unpruned_plan_computes_everything():
    steps = guidance.plan(Guidance(), OFF, TIMESTEPS, prune=False)
    assert {step.branches for step in steps} == {(0, 1, 2)}


@settings(max_examples=150, deadline=None)
@given(orders, numbers, numbers, st.booleans(), st.sampled_from([0.0, 0.75]), st.integers(0, 2**31))
def test_pruned_combination_is_the_formula(order, identity, text, renorm, rescale, seed):
    g = Guidance(order=order, identity=identity, text=text, renorm=renorm, rescale=rescale)
    generator = torch.Generator().manual_seed(seed)
    e = torch.randn(3, 2, 4, 8, 8, generator=generator, dtype=torch.float32)
    step = guidance.plan(g, OFF, [500.0])[0]
    actual = guidance.mix(
        e[list(step.branches)],
        guidance.mixing(step, g),
        g.order,
        g.rescale,
        renorm=guidance.is_renormed(step, g),
    )
    for image in range(2):
        expected = plainly(*e[:, image].double(), g, identity, text).float()
        torch.testing.assert_close(actual[image], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("weight", "formula"),
    [
        (WeightFunction(function="constant", scale=2.0), lambda t: 2.0),
        (WeightFunction(function="linear", scale=2.0), lambda t: 2 * (1 - t / 1000)),
        (WeightFunction(function="linear", scale=2.0, inverse=True), lambda t: 2 * t / 1000),
        (WeightFunction(function="cosine", scale=3.0), lambda t: 3 * (math.cos(math.pi * t / 1000) + 1)),
        (
            WeightFunction(function="power_cosine", scale=3.0, power=2.0),
            lambda t: 1.5 * (1 - math.cos(math.pi * ((1000 - t) / 1000) ** 2)),
        ),
        (
            WeightFunction(function="power_cosine", scale=3.0, power=0.5, inverse=True),
            lambda t: 1.5 * (1 - math.cos(math.pi * (t / 1000) ** 0.5)),
        ),
        (
            WeightFunction(function="cap", scale=4.0),
            lambda t: 4 * (1 - t / 1000) if t > 500 else 4 * t / 1000,
        ),
        (WeightFunction(function="linear", scale=2.0, floor=0.7), lambda t: max(0.7, 2 * (1 - t / 1000))),
    ],
)
def test_weight_functions(weight, formula):
    for t in (0.0, 1.0, 249.0, 500.0, 501.0, 999.0, 1000.0):
        assert guidance.weight_at(weight, t) == pytest.approx(formula(t), abs=1e-12)


def test_lists_are_interpolated_over_the_normalised_step():
    steps = guidance.plan(PUBLISHED, OFF, [float(t) for t in range(7, 0, -1)])
    assert [step.text for step in steps] == pytest.approx([1, 2, 3, 3, 3, 2, 1])
    assert guidance.plan(PUBLISHED, OFF, [999.0])[0].text == 1.0
