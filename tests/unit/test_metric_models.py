"""Scorers on small random weights: published names and shapes, and numbers against plain formulas."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from fastface_cli.errors import ModelUnavailableError
from fastface_cli.evaluation.metrics.aesthetic import LAYERS, WIDTHS, Aesthetic, read_pickle, regression
from fastface_cli.evaluation.metrics.base import Context, Sample
from fastface_cli.evaluation.metrics.clip import CLIP_L14, PocketClip
from fastface_cli.evaluation.metrics.face_clip import FaceClip, crops
from fastface_cli.evaluation.metrics.image_reward import DEVIATION as IR_DEVIATION
from fastface_cli.evaluation.metrics.image_reward import MEAN as IR_MEAN
from fastface_cli.evaluation.metrics.image_reward import ImageReward, Towers, our_name, read_words
from fastface_cli.evaluation.metrics.mtcnn import SHAPES, Mtcnn, moved, squared, suppress
from fastface_cli.scorers import clip as clip_module
from fastface_cli.scorers.clip import DEVIATION, MEAN, Clip, load_clip, prepare, to_tensor
from fastface_cli.store.manifest import load_manifest


def photo(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A smooth picture of colored noise."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


# --- CLIP ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (32, 32), (20, 31)])
def test_images_are_preprocessed_as_by_transformers(size: tuple[int, int]) -> None:
    """Which rounds to whole pixel values in between: at most one level of 255 apart (more where it clips)."""
    from transformers import CLIPImageProcessorPil

    picture = photo(size)
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)(picture, return_tensors="np")
    ours = prepare(to_tensor(picture), 32).numpy()
    apart = np.abs(ours - theirs.pixel_values[0]) * np.array(DEVIATION)[:, None, None] * 255
    assert ours.shape == (3, 32, 32)
    assert np.median(apart) < 0.6
    assert apart.max() < 6


def test_the_published_fault_of_range_is_kept_where_it_is_asked_for() -> None:
    """Pixels of 0..255 come out as (x + 1) / 2, not as x / 255."""
    grey = torch.full((3, 32, 32), 100.0)
    mean, deviation = np.array(MEAN), np.array(DEVIATION)
    assert prepare(grey, 32)[:, 5, 5].numpy() == pytest.approx((50.5 - mean) / deviation, rel=1e-5)
    right = prepare(grey / 127.5 - 1, 32)[:, 5, 5].numpy()
    assert right == pytest.approx((100 / 255 - mean) / deviation, rel=1e-4)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP in the Hub's form, with the pocket's tokenizer; weights in a pickle, as B/32's."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    words = CLIPTokenizer.from_pretrained(Path(str(load_manifest()["pocket-base"].local)) / "tokenizer_2")
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": 77, "eos_token_id": words.eos_token_id}
    config = CLIPConfig(
        text_config=tower | text,
        vision_config=tower | {"image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    model = CLIPModel(config)
    config.save_pretrained(folder)
    words.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def test_clip_is_the_cosine_of_the_models_own_features(clip_folder: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    clip = load_clip(clip_folder, "cpu")
    prompts, pictures = ["a man in a hat", "a woman"], [photo((50, 40), 1), photo((40, 64), 2)]
    texts, vectors = clip.texts(prompts), clip.images(pictures)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    words = CLIPTokenizer.from_pretrained(clip_folder)
    with torch.no_grad():
        for prompt, picture, text, vector in zip(prompts, pictures, texts, vectors, strict=True):
            given = words([prompt], return_tensors="pt")  # not padded: padding changes nothing
            pixels = prepare(to_tensor(picture), 32)[None]
            output = model(input_ids=given.input_ids, pixel_values=pixels)
            assert text == pytest.approx(output.text_embeds[0].numpy(), abs=1e-5)
            assert vector == pytest.approx(output.image_embeds[0].numpy(), abs=1e-5)
    assert clip.texts(["a " * 200]).shape == (1, 12)  # longer than CLIP reads: cut, not refused


def test_a_clip_that_lacks_weights_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    del state["visual_projection.weight"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelUnavailableError, match="visual_projection"):
        load_clip(tmp_path, "cpu")


def test_clip_embeds_each_image_and_prompt_once_and_drops_the_oldest(monkeypatch) -> None:
    monkeypatch.setattr(clip_module, "CACHE_SIZE", 2)
    batches: list[int] = []
    prompts_read: list[str] = []

    def texts(prompts: list[str]) -> torch.Tensor:
        prompts_read.extend(prompts)
        return torch.ones(len(prompts), 3)

    def images(pixels: torch.Tensor) -> torch.Tensor:
        batches.append(len(pixels))
        return pixels.mean(dim=(2, 3))

    clip = Clip(texts, images, 32, "cpu")
    a, b, c, d, e = (photo((32, 32), seed) for seed in range(5))
    vectors = clip.images([a, b, a])
    assert (vectors[0] == vectors[2]).all()
    assert (vectors[0] != vectors[1]).any()
    assert (clip.images([a, c, d, e])[0] == vectors[0]).all()  # more than the cache holds, one of them cached
    clip.images([e, a])
    assert batches == [2, 3, 1]
    clip.texts(["x", "y", "x"])
    clip.texts(["y", "z", "x"])
    assert prompts_read == ["x", "y", "z", "x"]


def test_the_pockets_clip_scores_offline_and_the_same_in_any_batch() -> None:
    metric = PocketClip()
    paths = {name: Path(str(load_manifest()[name].local)) for name in metric.needs.artifacts}
    metric.load(Context(paths=paths))
    samples = [Sample(str(n), photo((128, 128), n), None, f"a photo of number {n}") for n in range(3)]
    together = [each["clip_pocket"] for each in metric.score(samples)]
    again = PocketClip()
    again.load(Context(paths=paths))
    alone = [again.score([each])[0]["clip_pocket"] for each in samples]
    assert together == pytest.approx(alone, abs=1e-5)
    prompts = [f"a photo of number {n}" for n in range(7)]
    whole = again.clip.texts(prompts)
    assert (np.concatenate([metric.clip.texts([each]) for each in prompts]) == whole).all()
    assert all(-1 <= value <= 1 for value in together)
    assert len(set(together)) == 3


# --- aesthetic ----------------------------------------------------------------------------------------------


def head_state(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    state = {}
    for layer, inward, outward in zip(LAYERS, WIDTHS[:-1], WIDTHS[1:], strict=True):
        state[f"layers.{layer}.weight"] = torch.randn(outward, inward) / inward**0.5
        state[f"layers.{layer}.bias"] = torch.randn(outward)
    return state


def test_the_aesthetic_score_is_the_chain_of_its_linear_maps(tmp_path: Path) -> None:
    state = head_state()
    torch.save(state, tmp_path / "head.pth")
    vector = F.normalize(torch.randn(1, 768))

    class One(Clip):
        def images(self, pictures) -> np.ndarray:
            return np.repeat(vector.numpy(), len(pictures), axis=0)

    clip = One(lambda prompts: vector, lambda pixels: vector, 8, "cpu")
    metric = Aesthetic()
    metric.load(Context(paths={"aesthetic-ava-logos": tmp_path / "head.pth"}, shared={CLIP_L14: clip}))
    actual = metric.score([Sample("a", photo((9, 9)), None, "")] * 2)
    x = vector
    for layer in LAYERS:
        x = x @ state[f"layers.{layer}.weight"].T + state[f"layers.{layer}.bias"]
    assert [each["aesthetic"] for each in actual] == pytest.approx([float(x)] * 2, rel=1e-4)


def test_the_aesthetic_head_has_the_published_size() -> None:
    """927,969 numbers of four bytes, and 2,883 bytes of container: the published 3,714,759."""
    numbers = sum(tensor.numel() for tensor in head_state().values())
    published = load_manifest()["aesthetic-ava-logos"].bytes
    assert (4 * numbers, published - 4 * numbers) == (3711876, 2883)


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    state = head_state()
    state["layers.0.weight"] = torch.zeros(1024, 512)
    with pytest.raises(ValueError, match=r"layers.0 is \[1024, 512\], not \[1024, 768\]"):
        regression(state, "cpu")
    with pytest.raises(ValueError, match="not those of a predictor"):
        regression({"fc.weight": torch.zeros(1)}, "cpu")
    (tmp_path / "x.pth").write_bytes(b"nonsense")
    with pytest.raises(ModelUnavailableError, match="does not load"):
        read_pickle(tmp_path / "x.pth", "the predictor")


# --- ImageReward --------------------------------------------------------------------------------------------

SEEING = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SEEING |= {"image_size": 32, "patch_size": 8}
READING = {"vocab_size": 50, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
READING |= {"max_position_embeddings": 40}


def published_names(depth: int, layers: int) -> list[str]:
    """Names in ImageReward.pt, after its architecture: BLIP's ViT, its MED and the head."""
    names = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    ends = ("weight", "bias")
    for block in range(depth):
        parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        names += [f"blocks.{block}.{part}.{end}" for part in parts for end in ends]
    names = [f"blip.visual_encoder.{name}" for name in [*names, "norm.weight", "norm.bias"]]
    text = ["embeddings.position_ids", "embeddings.word_embeddings.weight"]
    text += [
        "embeddings.position_embeddings.weight",
        "embeddings.LayerNorm.weight",
        "embeddings.LayerNorm.bias",
    ]
    attention = ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")
    for layer in range(layers):
        parts = [f"{kind}.{part}" for kind in ("attention", "crossattention") for part in attention]
        parts += ["intermediate.dense", "output.dense", "output.LayerNorm"]
        text += [f"encoder.layer.{layer}.{part}.{end}" for part in parts for end in ends]
    names += [f"blip.text_encoder.{name}" for name in text]
    names += [f"blip.{part}_proj.{end}" for part in ("vision", "text") for end in ends]
    return names + [f"mlp.layers.{layer}.{end}" for layer in LAYERS for end in ends]


def our_shapes(towers: Towers) -> dict[str, torch.Size]:
    parts = {"vision": towers.vision, "text": towers.text}
    actual = {
        f"{part}.{name}": each.shape
        for part, model in parts.items()
        for name, each in model.state_dict().items()
    }
    return actual | {f"mlp.{name}": tensor.shape for name, tensor in head_state().items()}


def random_state(towers: Towers, depth: int, layers: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    shapes = our_shapes(towers)
    skipped = re.compile(r"blip\.(vision_proj|text_proj)\.|.*position_ids")
    state = {
        name: torch.zeros(1) if skipped.match(name) else 0.3 * torch.randn(shapes[our_name(name)])
        for name in published_names(depth, layers)
    }
    return state | {f"mlp.{name}": tensor for name, tensor in head_state(1).items()}


def test_every_published_name_has_its_place_at_full_size() -> None:
    """On the meta device: 24 + 12 layers, one place for each name, 1.79 GB with what is unused."""
    towers = Towers()
    used = [n for n in published_names(24, 12) if not re.match(r"blip\.(vision|text)_proj|.*position_ids", n)]
    shapes = our_shapes(towers)
    placed = [our_name(name) for name in used]
    ours = {name for name in shapes if not name.endswith("position_ids")}
    assert len(set(placed)) == len(placed)
    assert set(placed) == ours
    assert shapes["vision.embeddings.position_embedding"] == (1, 197, 1024)
    assert shapes["vision.encoder.layers.0.self_attn.qkv.weight"] == (3072, 1024)
    assert shapes["text.encoder.layer.0.crossattention.self.key.weight"] == (768, 1024)
    numbers = sum(shapes[name].numel() for name in ours) + 256 * (1024 + 768 + 2)
    assert 4 * numbers == pytest.approx(1_786_880_927, rel=2e-4)


def reference_reward(state: dict[str, torch.Tensor], ids, mask, pixels) -> torch.Tensor:
    """BLIP's towers and the head, plainly, under the published names."""

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attend(q, k, v, heads, kept=None):
        def split(x):
            return x.unflatten(-1, (heads, -1)).transpose(1, 2)

        scores = split(q) @ split(k).transpose(-1, -2) / (q.shape[-1] // heads) ** 0.5
        if kept is not None:
            scores = scores.masked_fill(kept[:, None, None] == 0, -1e4)
        return (scores.softmax(-1) @ split(v)).transpose(1, 2).flatten(2)

    eye = "blip.visual_encoder."
    weight, bias = state[f"{eye}patch_embed.proj.weight"], state[f"{eye}patch_embed.proj.bias"]
    x = F.conv2d(pixels, weight, bias, stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([state[f"{eye}cls_token"].expand(len(x), -1, -1), x], 1) + state[f"{eye}pos_embed"]
    for block in (f"{eye}blocks.0.", f"{eye}blocks.1."):
        q, k, v = linear(norm(x, f"{block}norm1", 1e-6), f"{block}attn.qkv").chunk(3, -1)
        x = x + linear(attend(q, k, v, 4), f"{block}attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}norm2", 1e-6), f"{block}mlp.fc1")), f"{block}mlp.fc2")
    seen = norm(x, f"{eye}norm", 1e-6)
    text = "blip.text_encoder."
    x = state[f"{text}embeddings.word_embeddings.weight"][ids]
    x = x + state[f"{text}embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(x, f"{text}embeddings.LayerNorm", 1e-12)
    for layer in (f"{text}encoder.layer.0.", f"{text}encoder.layer.1."):
        for kind, source, kept in (("attention", None, mask), ("crossattention", seen, None)):
            name, given = f"{layer}{kind}", x if source is None else source
            q, k, v = linear(x, f"{name}.self.query"), linear(given, f"{name}.self.key"), None
            v = linear(given, f"{name}.self.value")
            mixed = linear(attend(q, k, v, 4, kept), f"{name}.output.dense")
            x = norm(mixed + x, f"{name}.output.LayerNorm", 1e-12)
        wide = F.gelu(linear(x, f"{layer}intermediate.dense"))
        x = norm(linear(wide, f"{layer}output.dense") + x, f"{layer}output.LayerNorm", 1e-12)
    x = x[:, 0]
    for layer in LAYERS:
        x = linear(x, f"mlp.layers.{layer}")
    return (x[:, 0] - IR_MEAN) / IR_DEVIATION


def test_rewards_are_those_of_the_plain_formulas() -> None:
    towers = Towers(SEEING, READING)
    state = random_state(towers, 2, 2)
    towers.load(state, "cpu")
    ids = torch.randint(1, 50, (3, 9))
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = 0
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        first = towers.read(ids, mask, pixels)
        ours = (towers.head(first)[:, 0] - IR_MEAN) / IR_DEVIATION
        theirs = reference_reward(state, ids, mask, pixels)
    assert ours.numpy() == pytest.approx(theirs.numpy(), abs=1e-4)
    assert ours.std() > 1e-3


def test_imagereward_as_a_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File to score, tiny: the metric gives what its towers give, and refuses other files."""
    from fastface_cli.evaluation.metrics import image_reward

    towers = Towers(SEEING, READING)
    state = random_state(towers, 2, 2)
    torch.save(state, tmp_path / "ImageReward.pt")
    vocabulary = tmp_path / "vocab.txt"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary.write_text("\n".join([*special, "a", "man", "hat", "##s"]) + "\n", encoding="utf-8")
    monkeypatch.setattr(image_reward, "Towers", lambda: Towers(SEEING, READING))
    monkeypatch.setattr(image_reward, "SIDE", 32)
    metric = ImageReward()
    metric.load(Context(paths={"image-reward": tmp_path, "bert-base-uncased-vocabulary": vocabulary}))
    pictures = [photo((40, 30), 1), photo((32, 64), 2)]
    prompts = ["A man hats", "zebra"]
    scores = metric.score([Sample("a", p, None, t) for p, t in zip(pictures, prompts, strict=True)])
    words = read_words(vocabulary)
    assert words(["A man hats"])["input_ids"][0] == [2, 5, 6, 7, 8, 3]
    ids = torch.tensor([[2, 5, 6, 7, 8, 3], [2, 1, 3, 0, 0, 0]])
    ids = F.pad(ids, (0, 29))
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    pixels = processor(pictures, return_tensors="pt").pixel_values
    expected = reference_reward(state, ids, (ids > 0).long(), pixels)
    assert [each["image_reward"] for each in scores] == pytest.approx(expected.tolist(), abs=1e-4)
    state["blip.text_encoder.stranger"] = torch.zeros(1)
    torch.save(state, tmp_path / "ImageReward.pt")
    with pytest.raises(ModelUnavailableError, match=r"ImageReward in .* does not load"):
        ImageReward().load(
            Context(paths={"image-reward": tmp_path, "bert-base-uncased-vocabulary": vocabulary})
        )


# --- MTCNN and the Face-CLIP score --------------------------------------------------------------------------


def networks(seed: int = 0) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    actual = []
    for shapes in SHAPES.values():
        state = {}
        for name, shape in shapes.items():
            state[f"{name}.weight"] = torch.randn(shape) / np.prod(shape[1:]) ** 0.5
            state[f"{name}.bias"] = torch.zeros(shape[0])
            if "_" not in name:
                state[f"prelu{name[-1]}.weight"] = torch.full((shape[0],), 0.25)
        actual.append(state)
    return actual


def test_mtcnns_networks_have_the_published_sizes() -> None:
    """The published files are the weights and a few kB of container."""
    for state, name in zip(networks(), ("pnet", "rnet", "onet"), strict=True):
        numbers = 4 * sum(tensor.numel() for tensor in state.values())
        container = load_manifest()[f"mtcnn-{name}"].bytes - numbers
        assert 0 < container < 4000


def test_overlapping_boxes_fall_to_the_likelier_one() -> None:
    boxes = np.array(
        [[0, 0, 10, 10, 0.7], [1, 1, 11, 11, 0.9], [20, 20, 30, 30, 0.8], [2, 2, 6, 6, 0.6]], np.float32
    )
    assert suppress(boxes, 0.5).tolist() == [1, 2, 3]  # 81 of 119 is above a half; 16 of 100 is not
    assert suppress(boxes, 0.7).tolist() == [1, 2, 0, 3]
    assert suppress(boxes, 0.7, over="smaller").tolist() == [1, 2]  # 100 of 121; all of the small one
    ties = np.array([[0, 0, 9, 9, 0.5], [0, 0, 9, 9, 0.5]], np.float32)
    assert (suppress(ties, 0.5).tolist(), suppress(ties, 0.5, over="smaller").tolist()) == ([0], [1])


def test_boxes_move_by_shares_of_their_sides_and_become_square() -> None:
    box = np.array([[10, 20, 30, 30, 0.9]], np.float32)
    moves = np.array([[0.1, 0.2, -0.1, 0.5]], np.float32)
    assert moved(box, moves, 0)[0, :4] == pytest.approx([12, 22, 28, 35])
    assert moved(box, moves, 1)[0, :4] == pytest.approx([12.1, 22.2, 27.9, 35.5])
    assert squared(box)[0, :4] == pytest.approx([10, 15, 30, 35])


def test_detector_scores_decide_what_is_detected() -> None:
    states = networks()
    for state, name in zip(states, ("conv4_1", "dense5_1", "dense6_1"), strict=True):
        state[f"{name}.bias"] = torch.tensor([50.0, -50.0])
    picture = photo((60, 48))
    assert Mtcnn(*states).largest(picture) is None
    for state, name in zip(states, ("conv4_1", "dense5_1", "dense6_1"), strict=True):
        state[f"{name}.bias"] = torch.tensor([-50.0, 50.0])
    for state, name in zip(states, ("conv4_2", "dense5_2", "dense6_2"), strict=True):
        state[f"{name}.weight"] = torch.zeros_like(
            state[f"{name}.weight"]
        )  # boxes stay where they are proposed
    detector = Mtcnn(*states)
    # Scales shrink by 0.709 from 0.6 while 48 pixels still make 12; a box spans 11 pixels of its scale.
    assert [round(0.6 * 0.709**n * 48, 1) >= 12 for n in (2, 3)] == [True, False]
    left, top, right, bottom = detector.largest(picture)
    assert right - left == bottom - top == pytest.approx(11 / (0.6 * 0.709**2), abs=1)
    assert (detector.find(picture)[:, 4] > 0.99).all()
    assert Mtcnn(*states).largest(photo((19, 19))) is None  # smaller than any face looked for
    states[1]["dense4.weight"] = torch.zeros(128, 500)
    with pytest.raises(ValueError, match=r"rnet has no weight dense4 of shape \[128, 576\]"):
        Mtcnn(*states)


def test_crops_beyond_the_edge() -> None:
    picture = photo((100, 80))
    inside = crops(picture, (10.9, 20.2, 30.8, 60.9))
    assert inside["fcs"].shape == inside["fcs_published"].shape == (40, 20, 3)
    over = crops(picture, (-5.5, 10.0, 40.0, 200.0))
    assert over["fcs"].shape == (70, 40, 3)
    assert over["fcs_published"].size == 0  # from the fifth column from the right to the 40th: nothing


def test_the_face_clip_score_and_its_published_fault() -> None:
    """A vision tower that gives the mean color, a text tower that gives a fixed direction."""

    class Found:
        def largest(self, picture: Image.Image):
            return None if picture.size == (50, 50) else (10.0, 10.0, 42.0, 42.0)

    asked: list[str] = []

    def texts(prompts: list[str]) -> torch.Tensor:
        asked.extend(prompts)
        return torch.tensor([[1.0, 2.0, 2.0]] * len(prompts))

    clip = Clip(texts, lambda pixels: pixels.mean(dim=(2, 3)), 32, "cpu")
    metric = FaceClip()
    metric.clip, metric.mtcnn = clip, Found()
    picture = Image.new("RGB", (64, 64), (200, 100, 50))
    picture.paste((10, 150, 220), (10, 10, 42, 42))
    face, empty = photo((64, 64)), photo((50, 50))
    both, no_photo, no_picture, none = metric.score(
        [
            Sample("a", picture, face, "in oil ; a man walks"),
            Sample("b", picture, empty, "in oil"),
            Sample("c", empty, face, "in oil"),
            Sample("d", picture, None, "in oil"),
        ]
    )

    def cosine(values: np.ndarray) -> float:
        vector = (values - np.array(MEAN)) / np.array(DEVIATION)
        return float(vector @ [1, 2, 2] / 3 / np.linalg.norm(vector))

    color = np.array([10, 150, 220])
    assert both["fcs"] == pytest.approx(cosine(color / 255), abs=1e-5)
    assert both["fcs_published"] == pytest.approx(cosine((color + 1) / 2), abs=1e-5)
    assert asked == ["in oil "]
    for missing in (no_photo, no_picture, none):
        assert missing == {"fcs": None, "fcs_published": None}
