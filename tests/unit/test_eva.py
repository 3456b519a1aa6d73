"""The image tower of PuLID against timm and against its published size, and the face that it sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from golden import adapters
from safetensors.torch import save_file
from support.face_stand_ins import write_parser
from support.golden_files import GOLDEN, random_tower, write_tower

from fastface_cli.app.events import IdentityReady, ImageFinished
from fastface_cli.app.request import GenerateRequest
from fastface_cli.app.session import Session
from fastface_cli.errors import ModelUnavailableError, NoFaceError, RecipeError
from fastface_cli.identity.cache import key_of
from fastface_cli.identity.eva import PREFIX, EvaConfig, EvaTower, FaceEncoder, rotary_table
from fastface_cli.identity.parsing import TEMPLATE, FaceParser, aligned, gray_face
from fastface_cli.identity.photos import open_photos
from fastface_cli.recipe.files import load_recipe_data
from fastface_cli.recipe.schema import Recipe
from fastface_cli.store.manifest import resolve

PHOTO = Path(__file__).parents[2] / "examples" / "portrait.png"
SMALL = EvaConfig(side=56, width=128, depth=6, heads=2, hidden=341, output=24, taps=(1, 2, 3, 4, 5))


def plain_tower(state: dict[str, torch.Tensor], config: EvaConfig, image: torch.Tensor) -> list[torch.Tensor]:
    """The published tower once more, from its description: one image, loops over heads, no shared code."""
    width, heads, grid = config.width, config.heads, config.side // config.patch
    head = width // heads

    def layer_norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centered = x - x.mean(-1, keepdim=True)
        scaled = centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        out = x.clone()
        for patch in range(grid * grid):
            row, column = divmod(patch, grid)
            for pair in range(head // 2):
                place = row if pair < head // 4 else column
                angle = place / grid * 16 / 10000 ** (pair % (head // 4) / (head // 4))
                sine, cosine = np.sin(angle), np.cos(angle)
                a, b = x[1 + patch, 2 * pair], x[1 + patch, 2 * pair + 1]
                out[1 + patch, 2 * pair] = a * cosine - b * sine
                out[1 + patch, 2 * pair + 1] = b * cosine + a * sine
        return out

    patches = image.unfold(1, config.patch, config.patch).unfold(2, config.patch, config.patch)
    patches = patches.permute(1, 2, 0, 3, 4).reshape(grid * grid, -1)
    x = patches @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    x = torch.cat([state["cls_token"][0], x]) + state["pos_embed"][0]
    results = []
    for number in range(config.depth):
        name = f"blocks.{number}"
        normed = layer_norm(x, f"{name}.norm1")
        query, key, value = (linear(normed, f"{name}.attn.{kind}_proj") for kind in "qkv")
        parts = []
        for index in range(heads):
            own = slice(index * head, (index + 1) * head)
            scores = rotated(query[:, own]) @ rotated(key[:, own]).T / head**0.5
            parts.append(scores.softmax(-1) @ value[:, own])
        x = x + linear(layer_norm(torch.cat(parts, -1), f"{name}.attn.norm"), f"{name}.attn.proj")
        normed = layer_norm(x, f"{name}.norm2")
        gate = linear(normed, f"{name}.mlp.fc1_g")
        gated = gate * torch.sigmoid(gate) * linear(normed, f"{name}.mlp.fc1_x")
        x = x + linear(layer_norm(gated, f"{name}.mlp.norm"), f"{name}.mlp.fc2")
        if number + 1 in config.taps:
            results.append(x)
    return [linear(layer_norm(x, "norm")[0], "head"), *results]


def test_tower_equals_a_plain_second_implementation():
    tower = random_tower(SMALL)
    image = torch.randn(1, 3, SMALL.side, SMALL.side)
    with torch.no_grad():
        embedding, hidden = tower(image)
    expected = plain_tower(dict(tower.state_dict()), SMALL, image[0])
    for actual, required in zip([embedding[0], *hidden[0]], expected, strict=True):
        assert float((actual - required).norm() / required.norm()) < 1e-5


def test_tower_equals_timm():
    timm = pytest.importorskip("timm", reason="pip install timm", exc_type=ImportError)
    module = timm.create_model(
        "eva02_large_patch14_clip_336",
        pretrained=False,
        num_classes=SMALL.output,
        img_size=SMALL.side,
        embed_dim=SMALL.width,
        depth=SMALL.depth,
        num_heads=SMALL.heads,
    ).eval()
    tower = random_tower(SMALL)
    module.load_state_dict(tower.state_dict(), strict=True)
    image = torch.randn(2, 3, SMALL.side, SMALL.side)
    with torch.no_grad():
        final, states = module.forward_intermediates(
            image, indices=[0, 1, 2, 3, 4], return_prefix_tokens=True, norm=False, output_fmt="NLC"
        )
        expected = [torch.cat((prefix, patches), 1) for patches, prefix in states]
        expected_embedding = module.forward_head(final)
        embedding, hidden = tower(image)
    for actual, required in zip([embedding, *hidden.unbind(1)], [expected_embedding, *expected], strict=True):
        assert float((actual - required).norm() / required.norm()) < 1e-5


def test_the_published_tower_has_512_tensors():
    with torch.device("meta"):
        tower = EvaTower()
    assert len(tower.state_dict()) == 512
    assert EvaConfig.of(tower.state_dict()) == EvaConfig()
    assert rotary_table(EvaConfig(), torch.device("cpu"))[0].shape == (576, 64)


def test_weights_are_read_from_an_open_clip_file(tmp_path: Path):
    tower = random_tower(SMALL)
    state = {f"{PREFIX}{name}": tensor.half() for name, tensor in tower.state_dict().items()}
    path = tmp_path / "open_clip_model.safetensors"
    save_file({**state, "logit_scale": torch.ones(1)}, path)
    encoder = FaceEncoder(path)
    face = np.random.default_rng(0).random((512, 512, 3), np.float32)
    embedding, hidden = encoder.encode(face)
    assert embedding.shape == (24,)
    assert hidden.shape == (5, 17, 128)
    assert encoder.tower.config == SMALL
    assert hidden.dtype == np.float32
    del state[f"{PREFIX}norm.bias"]
    save_file(state, path)
    with pytest.raises(ModelUnavailableError, match="cannot load the image tower"):
        FaceEncoder(path)


def test_key_points_are_aligned_to_the_template():
    image = np.zeros((900, 700, 3), np.uint8)
    places = (TEMPLATE * 0.7 + np.array([150.0, 60.0])).astype(np.float32)
    for x, y in places:
        image[round(y) - 2 : round(y) + 3, round(x) - 2 : round(x) + 3] = 255
    face = aligned(image, places)
    for x, y in TEMPLATE:
        assert face[round(y), round(x)].min() > 200
    outside = aligned(np.zeros((100, 100, 3), np.uint8), TEMPLATE - 300)
    assert tuple(outside[-1, -1]) == (135, 133, 132)


def test_everything_but_face_and_hair_becomes_white():
    face = np.zeros((1, 4, 3), np.uint8)
    face[0, :, 2] = 255  # red
    result = gray_face(face, np.array([[0, 1, 17, 16]]))
    assert np.allclose(result[0, :, 0], [1, 0.299, 0.299, 1])
    assert result.dtype == np.float32


def test_a_parser_is_an_onnx_file_with_the_scores_first(tmp_path: Path):
    path = tmp_path / "parser.onnx"
    write_parser(path)
    face = np.zeros((512, 512, 3), np.uint8)
    face[:, :256] = (0, 0, 255)
    classes = FaceParser(path).classes(face)
    assert set(np.unique(classes[:, :256])) == {1}
    assert set(np.unique(classes[:, 256:])) == {0}
    with pytest.raises(ModelUnavailableError, match="face parser"):
        FaceParser(tmp_path / "missing.onnx")


def pulid_recipe(tmp_path: Path, **parts: str) -> Recipe:
    """PuLID's golden stack, which reads photos through a miniature tower and a stand-in for the parser."""
    write_parser(tmp_path / "parser.onnx")
    write_tower(tmp_path / "tower.safetensors")
    (case,) = [case for case in adapters.cases(GOLDEN, GOLDEN / "pulid") if case.name == "v1-plain-hyper"]
    data = case.recipe.canonical()
    data["model"] |= {
        "image_encoder": str(tmp_path / "tower.safetensors"),
        "face_parsing": str(tmp_path / "parser.onnx"),
        **parts,
    }
    return load_recipe_data(data, "x").recipe


def test_a_photo_becomes_an_image_with_pulid(tmp_path: Path):
    request = GenerateRequest(photos=(PHOTO,), prompts=("a portrait",), seed=1, output=None)
    with Session(pulid_recipe(tmp_path), adapters.RUNTIME, fused_cache=False) as session:
        events = list(session.run(request))
    (identity,) = [event.identity for event in events if isinstance(event, IdentityReady)]
    assert set(identity.features) == {"embedding_norm", "eva_embedding", "eva_hidden"}
    assert identity.features["eva_hidden"].shape == (1, 5, 17, 32)
    (image,) = [event.image for event in events if isinstance(event, ImageFinished)]
    assert np.asarray(image).std() > 1
    saved = identity.save(tmp_path / "me.safetensors")
    again = GenerateRequest(identity=saved, prompts=("a portrait",), seed=1, output=None)
    with Session(pulid_recipe(tmp_path), adapters.RUNTIME, fused_cache=False) as session:
        (repeated,) = [event.image for event in session.run(again) if isinstance(event, ImageFinished)]
    assert np.array_equal(np.asarray(repeated), np.asarray(image))


def test_remembered_identities_depend_on_the_encoders(tmp_path: Path):
    artifacts = {name: resolve(name) for name in ("antelopev2", "eva02-clip-l-336", "face-parsing-resnet18")}
    pack, tower, parser = artifacts.values()
    photo = open_photos([PHOTO])
    keys = {
        key_of(photo, pack, None, None, ("eva_hidden",), encoders)
        for encoders in ((tower, parser), (tower,), ())
    }
    assert len(keys) == 3


def test_a_recipe_without_an_encoder_reads_no_photos(tmp_path: Path):
    recipe = pulid_recipe(tmp_path)
    data = recipe.canonical()
    data["model"] |= {"image_encoder": None, "face_parsing": None}
    without = load_recipe_data(data, "x").recipe
    request = GenerateRequest(photos=(PHOTO,), prompts=("a portrait",), output=None)
    with (
        Session(without, adapters.RUNTIME, fused_cache=False) as session,
        pytest.raises(NoFaceError, match="cannot read photos"),
    ):
        list(session.run(request))
    data["model"]["face_parsing"] = "face-parsing-resnet18"
    with pytest.raises(RecipeError, match="belong together"):
        load_recipe_data(data, "x")


def test_an_identity_without_the_features_names_the_step(tmp_path: Path, person):
    path = person.save(tmp_path / "me.safetensors")
    request = GenerateRequest(identity=path, prompts=("a portrait",), output=None)
    with (
        Session(pulid_recipe(tmp_path), adapters.RUNTIME, fused_cache=False) as session,
        pytest.raises(NoFaceError, match="lacks embedding_norm, eva_embedding, eva_hidden") as caught,
    ):
        list(session.run(request))
    assert "--save-identity" in caught.value.hint
