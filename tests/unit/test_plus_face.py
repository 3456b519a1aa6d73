"""plus-face with YuNet: no face recognizer, and no part that forbids commercial use."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.face_stand_ins import CELL, write_yunet
from support.golden_files import write_plus_face
from support.methods import recipe_of

from fastface_cli.app.licensing import artifacts_of, check_commercial
from fastface_cli.app.pipeline import Pipeline, Request
from fastface_cli.cli import run
from fastface_cli.errors import ModelUnavailableError, NoFaceError, UsageError
from fastface_cli.evaluation import setup
from fastface_cli.evaluation.metrics.base import Context
from fastface_cli.evaluation.metrics.faces import faces_of
from fastface_cli.identity.features import check_features
from fastface_cli.identity.identity import Identity, make_identity
from fastface_cli.identity.photos import open_photo
from fastface_cli.identity.yunet import YuNetAnalyzer
from fastface_cli.recipe.files import load_recipe, load_recipe_data
from fastface_cli.recipe.schema import Recipe
from fastface_cli.settings import load_settings

PORTRAIT = Path(__file__).parents[2] / "examples" / "portrait.png"
STRIDE, COLUMN, ROW = CELL


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in for YuNet."""
    path = tmp_path_factory.mktemp("yunet") / "face_detection_yunet_2023mar.onnx"
    write_yunet(path)
    return path


def test_opencv_prints_nothing(detector: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    YuNetAnalyzer(detector)
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(ModelUnavailableError, match="does not load"):
        YuNetAnalyzer(tmp_path / "broken.onnx")
    assert capfd.readouterr().err == ""


def test_faces_are_found_in_pixels_of_the_image(detector: Path) -> None:
    (face,) = YuNetAnalyzer(detector).detect(np.zeros((1280, 640, 3), np.uint8), 640)
    center = (COLUMN * STRIDE * 2, ROW * STRIDE * 2)  # scaled to half
    left, top, right, bottom = face.box
    assert ((left + right) / 2, (top + bottom) / 2) == pytest.approx(center, abs=2)
    assert face.size == pytest.approx((384, 384), rel=0.02)
    assert face.key_points[2] == pytest.approx(center, abs=2)
    assert face.key_points[0][0] < face.key_points[1][0]  # the left one of the image comes first
    assert face.score == pytest.approx(0.95, abs=0.01)


def test_file_that_is_not_a_detector_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "face_detection_yunet_2023mar.onnx"
    path.write_bytes(b"nothing")
    with pytest.raises(ModelUnavailableError, match="does not load"):
        YuNetAnalyzer(path)


def test_an_identity_without_a_recognizer(detector: Path, tmp_path: Path) -> None:
    identity = make_identity([open_photo(PORTRAIT)], YuNetAnalyzer(detector))
    assert identity.recognizer == "none"
    again = Identity.load(identity.save(tmp_path / "me.safetensors"))
    assert again.recognizer == "none"
    check_features(again, "plus_face")
    with pytest.raises(NoFaceError, match="not trained with"):
        check_features(again, "faceid_plusv2")


class TestEvaluation:
    """Without a recognizer, similarity by the recipe's own face models would be 1 for everyone."""

    RECIPES: Mapping[str, Recipe] = {
        name: load_recipe(name).recipe for name in ("lightning-plusface", "lightning-plusface-dcg")
    }

    def test_default_metrics_need_no_recognizer(self) -> None:
        defaults = setup.default_metrics(self.RECIPES, "fastface")
        assert "id" not in defaults
        assert {"adaface", "clip-l14", "cost"} <= set(defaults)

    def test_other_adapters_are_compared_by_an_independent_recognizer(self) -> None:
        """The conditioning recognizers of FaceID and InstantID are different models."""
        recipes = {name: load_recipe(name).recipe for name in ("hyper-fastface", "hyper-instantid-fastface")}
        defaults = setup.default_metrics(recipes, "fastface")
        assert "id" not in defaults
        assert "adaface" in defaults

    def test_similarity_by_a_detector_is_refused(self) -> None:
        with pytest.raises(UsageError, match="yunet detects faces but cannot compare them"):
            setup.scoring(
                ["id"], self.RECIPES, setup.WorkerSetup(), "fastface", load_settings(), lambda _: None
            )

    def test_run_without_a_recognizer(
        self, detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        recipe = tmp_path / "yunet.yaml"
        recipe.write_text(f"extends: pocket-plusface\nmodel: {{face: {detector}}}\n")
        people = tmp_path / "people"
        people.mkdir()
        for name in ("ann", "ben"):
            shutil.copyfile(PORTRAIT, people / f"{name}.png")
        (people / "prompts.txt").write_text("a photo of a woman\n")
        command = ["eval", "--recipe", str(recipe), "--dataset", str(people), "--json"]
        assert run([*command, "--metrics", "clip-pocket,cost", "-o", str(tmp_path / "run")]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["ok"]
        rows = [json.loads(line) for line in (tmp_path / "run" / "images.jsonl").read_text().splitlines()]
        assert [row["error"] for row in rows] == [None, None]
        assert run([*command, "--metrics", "id", "-o", str(tmp_path / "other")]) == 2

    def test_detector_finds_the_faces_that_other_metrics_align(self, detector: Path) -> None:
        faces = faces_of(Context({"face": detector}))
        face = faces.find(Image.open(PORTRAIT).convert("RGB"))
        assert face is not None
        assert face.score == pytest.approx(0.95, abs=0.01)


def test_no_part_of_the_stack_forbids_commercial_use() -> None:
    for method in ("", "-dcg", "-am1", "-fastface"):
        recipe = load_recipe(f"lightning-plusface{method}").recipe
        parts = artifacts_of(recipe)
        check_commercial(parts.values(), recipe.name)
        assert {part.commercial for part in parts.values()} == {"yes"}


@pytest.fixture(scope="module")
def pipeline(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """A small plus-face stack: InstantID's random file, with a projection for the golden image encoder."""
    file = tmp_path_factory.mktemp("plus") / "plus.safetensors"
    write_plus_face(file)
    data = recipe_of().canonical()
    data["model"] |= {
        "base": str(golden / "pipe"),
        "adapter": str(file),
        "image_encoder": str(golden / "clip"),
    }
    data["adapter"]["kind"] = "plus_face"
    recipe = load_recipe_data(
        data, "plus", overrides=["guidance.identity=[1,2,2,1]", "guidance.text=[1,3,3,1]"]
    ).recipe
    paths = {role: Path(str(part)) for role, part in recipe.references().items() if role != "face"}
    return Pipeline.load(recipe, paths, device="cpu", dtype="float32")


def test_sixteen_tokens_of_the_crop(pipeline: Pipeline, person: Identity) -> None:
    from contextlib import nullcontext
    from dataclasses import replace

    with torch.no_grad():
        absent, tokens = pipeline.adapter.tokens(person, lambda *_: nullcontext())
        other = replace(person, id_embedding=-person.id_embedding)
        _, same = pipeline.adapter.tokens(other, lambda *_: nullcontext())
    assert tokens.shape == absent.shape == (16, 64)
    assert not torch.allclose(tokens, absent)
    assert torch.equal(tokens, same)  # the embedding has no influence


def test_batches_and_pruning_change_nothing(pipeline: Pipeline, person: Identity) -> None:
    requests = [Request("a cat", seed, person, "blurry") for seed in (1, 2)]
    alone = [image for each in requests for image in pipeline.generate([each])]
    together = list(pipeline.generate(requests, batch_size=2))
    complete = list(pipeline.generate(requests[:1], prune=False))
    for ours, other in [*zip(alone, together, strict=True), (alone[0], complete[0])]:
        assert float((ours.latents - other.latents).norm() / other.latents.norm()) < 1e-5
