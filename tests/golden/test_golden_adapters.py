"""InstantID and PuLID against golden tensors of their published code, through the public session."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import adapters
from PIL import Image, ImageOps
from safetensors.torch import load_file

from benchmarks.published_files import PT, lora_layout, write
from fastface_cli.adapters.key_points import drawn, placed
from fastface_cli.adapters.pulid import along, empty_pulid
from fastface_cli.app.events import ImageFinished
from fastface_cli.app.pipeline import Pipeline, Request
from fastface_cli.app.request import GenerateRequest
from fastface_cli.app.session import Session
from fastface_cli.errors import ModelUnavailableError, NoFaceError, RecipeError, UsageError
from fastface_cli.identity.features import check_features
from fastface_cli.identity.identity import Identity
from fastface_cli.recipe.files import load_recipe_data

PORTRAIT = Path(__file__).parents[2] / "examples" / "portrait.png"
SHIPPED = Path(__file__).parents[1] / "data" / "golden"
COMPLETE = Path(__file__).parents[3] / "shared" / "golden"
"""With PuLID v1.1, whose random file is too large for the repository."""
FOLDERS = [SHIPPED / "instantid", SHIPPED / "pulid"]
if (COMPLETE / "pulid").is_dir():
    FOLDERS[1] = COMPLETE / "pulid"
CASES = {case.name: (case, folder) for folder in FOLDERS for case in adapters.cases(SHIPPED, folder)}


def loaded(name: str) -> tuple[Pipeline, Identity, Path]:
    case, folder = CASES[name]
    paths = {role: Path(str(part)) for role, part in case.recipe.references().items() if role != "face"}
    pipeline = Pipeline.load(case.recipe, paths, device="cpu", dtype="float32")
    return pipeline, adapters.identity_of(folder), folder


@pytest.fixture(scope="module")
def instantid() -> tuple[Pipeline, Identity, Path]:
    return loaded("dcg-lightning")


@pytest.fixture(scope="module")
def pulid() -> tuple[Pipeline, Identity, Path]:
    return loaded("v1-fidelity-dcg-hyper")


@pytest.mark.parametrize("name", CASES)
def test_golden_case(name: str) -> None:
    case, folder = CASES[name]
    actual = adapters.run(case, adapters.identity_of(folder))
    limit = 2e-4 if case.config.get("ortho") == "v2" else 1e-5
    assert adapters.error(actual, case.expected["latents"]) <= limit


@pytest.mark.parametrize("stack", ["instantid", "pulid"])
def test_tokens(stack: str, request: pytest.FixtureRequest) -> None:
    pipeline, identity, folder = request.getfixturevalue(stack)
    expected = load_file(folder / "tokens.safetensors")
    expected = expected.get("v1", next(iter(expected.values())))
    with torch.no_grad():
        actual = torch.stack(pipeline.adapter.tokens(identity, lambda *_: nullcontext()))
    assert float((actual - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.skipif(not (COMPLETE / "pulid").is_dir(), reason="needs the file of v1.1")
def test_two_photos_of_v11() -> None:
    folder = COMPLETE / "pulid"
    state = load_file(folder / "pulid_v1.1.safetensors")
    state = {name.removeprefix("id_adapter."): t for name, t in state.items() if "attn_layers" not in name}
    encoder = empty_pulid(state)
    encoder.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    given = load_file(folder / "identity.safetensors")
    first = torch.cat([given["embedding"], given["vit_embedding"]], dim=1)
    hidden = [given[f"vit_hidden.{level}"] for level in range(5)]
    both = [torch.cat([state, state.flip(1)]) for state in hidden]
    with torch.no_grad():
        actual = encoder(torch.cat([first, first.flip(-1)]), both)
    (expected,) = load_file(folder / "tokens_two_photos.safetensors").values()
    assert float((actual - expected).norm() / expected.norm()) < 1e-5


def test_key_points_are_drawn_as_published() -> None:
    given = load_file(SHIPPED / "instantid" / "identity.safetensors")
    assert np.array_equal(drawn(given["kps"].numpy(), (128, 128)), given["kps_image"].numpy())


def test_key_points_are_placed_in_the_middle() -> None:
    points = np.array([[50.0, 100.0]] * 5, np.float32)
    assert placed(points, (100, 200), (512, 512))[0].tolist() == [256.0, 256.0]
    assert placed(points, (100, 200), (256, 1024))[0].tolist() == [128.0, 512.0]


def test_nothing_is_along_a_direction_of_zero() -> None:
    """Without a negative prompt text attention is zero, and the published projection is 0/0."""
    some = torch.randn(1, 2, 3, 4)
    assert torch.equal(along(some, torch.zeros_like(some)), torch.zeros_like(some))


@pytest.mark.parametrize("stack", ["instantid", "pulid"])
def test_batches_and_pruning_change_nothing(stack: str, request: pytest.FixtureRequest) -> None:
    pipeline, identity, _ = request.getfixturevalue(stack)
    requests = [Request("a cat", seed, identity, "blurry") for seed in (1, 2)]
    alone = [image for each in requests for image in pipeline.generate([each])]
    together = list(pipeline.generate(requests, batch_size=2))
    complete = list(pipeline.generate(requests[:1], prune=False))
    for ours, other in [*zip(alone, together, strict=True), (alone[0], complete[0])]:
        assert float((ours.latents - other.latents).norm() / other.latents.norm()) < 1e-5
    assert alone[0].unet_samples < complete[0].unet_samples


def test_controlnet_runs_for_the_computed_branches_alone(instantid) -> None:
    pipeline, identity, _ = instantid
    rows = []
    controlnet = pipeline.extras["controlnet"]
    hook = controlnet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        next(pipeline.generate([Request("a cat", 1, identity)]))
    finally:
        hook.remove()
    assert rows == [len(step.branches) for step in pipeline.plan()]
    assert len(set(rows)) > 1  # pruned steps and complete ones


def test_another_pose_changes_the_image(instantid) -> None:
    pipeline, identity, _ = instantid
    turned = identity.posed(identity.features["key_points"][0][:, ::-1].copy(), (128, 128))
    first, second = (next(pipeline.generate([Request("a cat", 1, who)])) for who in (identity, turned))
    assert not torch.equal(first.latents, second.latents)


def test_pose_is_that_of_the_face_in_another_photo(tmp_path: Path) -> None:
    mirrored, blank = tmp_path / "mirrored.png", tmp_path / "blank.png"
    ImageOps.mirror(Image.open(PORTRAIT)).save(mirrored)
    Image.new("RGB", (200, 200), "white").save(blank)
    request = GenerateRequest(photos=(PORTRAIT,), prompts=("a cat",), seed=1, output=None)
    images = []
    with Session(CASES["dcg-lightning"][0].recipe, adapters.RUNTIME, fused_cache=False) as session:
        for pose in (None, PORTRAIT, mirrored):
            events = session.run(request.model_copy(update={"pose": pose}))
            images += [np.asarray(event.image) for event in events if isinstance(event, ImageFinished)]
        with pytest.raises(NoFaceError) as refused:
            list(session.run(request.model_copy(update={"pose": blank})))
    assert refused.value.hint == "use another photo for the pose"
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


def test_pose_for_an_adapter_without_key_points_is_refused() -> None:
    request = GenerateRequest(photos=(PORTRAIT,), pose=PORTRAIT, prompts=("a cat",), output=None)
    with pytest.raises(
        UsageError, match="a pose is for InstantID, and recipe 'v1-plain-hyper' uses pulid_v1"
    ):
        list(Session(CASES["v1-plain-hyper"][0].recipe, adapters.RUNTIME).run(request))


@pytest.mark.parametrize("stack", ["instantid", "pulid"])
def test_attention_manipulation_acts_on_the_tokens(stack: str, request: pytest.FixtureRequest) -> None:
    pipeline, identity, _ = request.getfixturevalue(stack)
    recipe = pipeline.recipe
    manipulated = load_recipe_data(
        recipe.canonical(), "x", overrides=["attention.transforms=[power]", "attention.tokens=all"]
    ).recipe
    base = next(pipeline.generate([Request("a cat", 1, identity)]))
    paths = {"base": SHIPPED / "pipe"}
    other = next(pipeline.with_recipe(manipulated, paths).generate([Request("a cat", 1, identity)]))
    assert not torch.equal(base.latents, other.latents)


def test_identity_files_keep_features(instantid, tmp_path: Path) -> None:
    _, identity, _ = instantid
    again = Identity.load(identity.save(tmp_path / "me.safetensors"))
    assert again.digest() == identity.digest()
    assert set(again.features) == {"embedding_norm", "key_points", "photo_size"}
    assert again.raw_mean() == pytest.approx(identity.raw_mean())


def test_an_identity_of_another_kind_is_refused(instantid, person: Identity) -> None:
    with pytest.raises(NoFaceError, match="lacks embedding_norm, key_points, photo_size"):
        check_features(person, "instantid")
    foreign = Identity(
        person.id_embedding, person.face_crop_bgr, person.weight, instantid[1].features, "w600k_r50"
    )
    with pytest.raises(NoFaceError, match="from the recognizer w600k_r50"):
        check_features(foreign, "instantid")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"adapter": str(SHIPPED / "pulid" / "pulid_v1.bin")}}, "cannot load the identity adapter"),
        ({"model": {"adapter": str(SHIPPED / "faceid_plusv2.bin")}}, "cannot load the identity adapter"),
        ({"model": {"controlnet": str(SHIPPED / "clip")}}, "cannot load the ControlNet"),
    ],
)
def test_wrong_files_are_reported(changes: dict, message: str) -> None:
    case, _ = CASES["dcg-lightning"]
    data = case.recipe.canonical()
    data["model"] |= changes["model"]
    recipe = load_recipe_data(data, "x").recipe
    paths = {role: Path(str(part)) for role, part in recipe.references().items() if role != "face"}
    with pytest.raises(ModelUnavailableError, match=message):
        Pipeline.load(recipe, paths, device="cpu", dtype="float32")


def test_a_controlnet_of_another_width_is_refused(tmp_path: Path) -> None:
    from diffusers import ControlNetModel

    case, _ = CASES["dcg-lightning"]
    config = json.loads((SHIPPED / "instantid" / "controlnet" / "config.json").read_text())
    config["cross_attention_dim"] = 32
    ControlNetModel.from_config(config).save_pretrained(tmp_path / "other")
    data = case.recipe.canonical()
    data["model"]["controlnet"] = str(tmp_path / "other")
    recipe = load_recipe_data(data, "x").recipe
    paths = {role: Path(str(part)) for role, part in recipe.references().items() if role != "face"}
    with pytest.raises(ModelUnavailableError, match="its cross_attention_dim is 32, but that of the UNet"):
        Pipeline.load(recipe, paths, device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("kind", "override", "message"),
    [
        ("instantid", "attention.invert_token_0=true", "instantid has no such token"),
        ("instantid", "attention.tokens=[16]", "instantid has tokens 0 to 15"),
        ("instantid", "adapter.orthogonal=ortho", "are PuLID's"),
        ("instantid", "model.controlnet=null", "is missing, and instantid needs it"),
    ],
)
def test_recipes_that_mean_nothing_are_refused(kind: str, override: str, message: str) -> None:
    case, _ = CASES["dcg-lightning"]
    with pytest.raises(RecipeError, match=message):
        load_recipe_data(case.recipe.canonical(), "x", overrides=["attention.transforms=[power]", override])


def test_fused_models_are_read_back(instantid, pulid, tmp_path: Path) -> None:
    """The cache of fused models holds the projection of every kind of adapter."""
    from fastface_cli.store.fused_cache import FusedCache

    unet = json.loads((SHIPPED / "pipe" / "unet" / "config.json").read_text())
    lora = write(tmp_path / "lora.safetensors", lora_layout(unet, 4, torch.float32, PT), "random")
    for pipeline, identity, _ in (instantid, pulid):
        data = pipeline.recipe.canonical()
        data["model"]["distillation"] = str(lora)
        recipe = load_recipe_data(data, pipeline.recipe.name).recipe
        paths = {role: Path(str(part)) for role, part in recipe.references().items() if role != "face"}
        cache = FusedCache(tmp_path / recipe.name, limit=10**9, least=0)
        images = []
        for _ in range(2):
            again = Pipeline.load(recipe, paths, device="cpu", dtype="float32", fused=cache)
            images.append(next(again.generate([Request("a cat", 1, identity)])))
        assert len(list((tmp_path / recipe.name).glob("*.safetensors"))) == 1
        assert adapters.error(images[0].latents, images[1].latents) < 1e-5
