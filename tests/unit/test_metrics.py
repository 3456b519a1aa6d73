"""Metrics of faces, and how metrics are found and run: on drawn faces whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from support.face_stand_ins import SquareAnalyzer, drawn, person

from fastface_cli.errors import FastFaceError, ModelUnavailableError, UsageError
from fastface_cli.evaluation.metrics import base
from fastface_cli.evaluation.metrics.base import (
    Column,
    Context,
    Metric,
    Needs,
    RunMetric,
    Sample,
    columns_of,
    finish_run,
    make_metrics,
    registry,
    score_batch,
)
from fastface_cli.evaluation.metrics.cost import Cost
from fastface_cli.evaluation.metrics.faces import Faces
from fastface_cli.evaluation.metrics.identity import (
    AdaFaceIdentity,
    ConditioningIdentity,
    DlibIdentity,
    rank_first,
    verify,
)
from fastface_cli.evaluation.rows import Row
from fastface_cli.evaluation.summary import summarize
from fastface_cli.scorers.cache import image_key

BLANK = Image.new("RGB", (100, 100))


def sample(key: str, picture: Image.Image, reference: Image.Image | None, **more) -> Sample:
    return Sample(key, picture, reference, "a prompt", **more)


def row(key: str, recipe: str, identity: str, **more) -> Row:
    return Row(key, recipe, identity, "a prompt", int(key[-1]), 0, 1, file=f"{key}.png", **more)


def metric_with(analyzer: SquareAnalyzer, rules: base.Rules = "fastface") -> ConditioningIdentity:
    metric = ConditioningIdentity()
    metric.load(Context(rules=rules, shared={"faces": Faces(analyzer, rules)}))
    return metric


# --- similarity, detection, face ratio ------------------------------------------------------------------


def test_similarity_missing_faces_held_out_photos_and_copies() -> None:
    analyzer = SquareAnalyzer(people={2: person(2, 0.8, of=1), 3: person(3, 0.5, of=2)})
    photo, other = drawn((100, 100), (10, 10, 50, 1)), drawn((100, 100), (10, 10, 50, 3))
    picture = drawn((200, 100), (60, 20, 40, 2))
    metric = metric_with(analyzer)
    seen, lost, blind = metric.score(
        [
            sample("a", picture, photo, held_out=other),
            sample("b", BLANK, photo, held_out=other),
            sample("c", picture, BLANK),
        ]
    )
    assert seen["id"] == seen["id_zero"] == pytest.approx(0.8, abs=1e-6)
    held_out = float(person(2, 0.8, of=1) @ person(3, 0.5, of=2))
    assert seen["id_held_out"] == pytest.approx(held_out, abs=1e-6)
    assert seen["id_copy"] == pytest.approx(0.8 - held_out, abs=1e-6)
    assert (seen["face_found"], seen["face_ratio"]) == (1.0, pytest.approx(40 * 40 / (200 * 100)))
    assert (lost["id"], lost["id_zero"], lost["id_copy"]) == (None, 0.0, None)
    assert (lost["face_found"], lost["face_ratio"]) == (0.0, 0.0)
    assert (blind["id"], blind["id_zero"], blind["face_found"]) == (None, None, 1.0)


def test_the_largest_face_counts_but_the_surest_under_the_published_rules() -> None:
    picture = drawn((200, 100), (10, 10, 30, 1), (80, 10, 60, 2))
    photo = drawn((100, 100), (10, 10, 50, 1))
    ours = metric_with(SquareAnalyzer()).score([sample("a", picture, photo)])[0]
    published = metric_with(SquareAnalyzer(), "published").score([sample("a", picture, photo)])[0]
    assert ours["id"] == pytest.approx(float(person(1) @ person(2)), abs=1e-6)
    assert published["id"] == pytest.approx(1.0, abs=1e-6)  # the stand-in gives number 1 first
    assert published["face_ratio"] == pytest.approx(30 * 30 / (200 * 100))


def test_published_detection_goes_from_640_to_320_without_borders() -> None:
    analyzer = SquareAnalyzer(sees=lambda size, shape, share: size == 384)
    metric = metric_with(analyzer, "published")
    picture = drawn((100, 100), (10, 10, 50, 1))
    scores = metric.score([sample("a", picture, picture)])[0]
    assert scores["id"] == pytest.approx(1.0)
    assert scores["face_ratio"] == 0.0  # measured at 320 only, where this detector sees nothing
    assert [size for size, _ in analyzer.asked] == [640, 576, 512, 448, 384, 320]
    blind = SquareAnalyzer(sees=lambda size, shape, share: False)
    assert metric_with(blind, "published").score([sample("a", picture, picture)])[0]["id"] is None
    assert {size for size, _ in blind.asked} == {640, 576, 512, 448, 384, 320}
    assert {shape for _, shape in blind.asked} == {(100, 100)}


def test_the_published_protocol_reproduces_a_table_computed_by_hand() -> None:
    """Two photos x two prompts. ID over pairs with faces: (0.9 + 0.6 + 0.3) / 3, one pair dropped. Faces are
    squares of side 20, 40 and 40 in 100 x 100 pixels, and none: (0.04 + 0.16 + 0.16 + 0) / 4."""
    likeness = {11: person(11, 0.9, of=1), 12: person(12, 0.6, of=1), 13: person(13, 0.3, of=2)}
    metric = metric_with(SquareAnalyzer(people=likeness), "published")
    photos = {name: drawn((100, 100), (10, 10, 50, number)) for name, number in (("ann", 1), ("bob", 2))}
    pictures = {
        "fast/ann/0": drawn((100, 100), (30, 30, 20, 11)),
        "fast/ann/1": drawn((100, 100), (30, 30, 40, 12)),
        "fast/bob/0": drawn((100, 100), (30, 30, 40, 13)),
        "fast/bob/1": BLANK,
    }
    samples = [sample(key, picture, photos[key.split("/")[1]]) for key, picture in pictures.items()]
    scored = score_batch([metric], samples)
    rows = [
        row(key, "fast", key.split("/")[1], scores=each.scores)
        for key, each in zip(pictures, scored, strict=True)
    ]
    actual = summarize(rows, columns_of([metric]), resamples=100)
    numbers = actual["recipes"]["fast"]
    assert (numbers["id"]["mean"], numbers["id"]["n"]) == (pytest.approx(0.6, abs=1e-6), 3)
    assert actual["counts"]["fast"] == {"images": 4, "failed": 0, "no_face": 1}
    assert numbers["face_ratio"]["mean"] == pytest.approx(0.09)
    assert numbers["id_zero"]["mean"] == pytest.approx(0.45, abs=1e-6)
    assert numbers["face_found"]["mean"] == 0.75


# --- verification and rank ------------------------------------------------------------------------------


def test_verification_accepts_the_share_of_strangers_that_it_may() -> None:
    random = np.random.default_rng(0)
    own = random.integers(0, 20, 400)
    alike = random.uniform(0, 1, (400, 20))
    accepted = verify(alike, own, false_accepts=0.05)
    others = np.ones(alike.shape, bool)
    others[np.arange(400), own] = False
    strangers = alike[others]
    threshold = np.sort(strangers)[::-1][int(0.05 * strangers.size)]
    assert (strangers > threshold).mean() == pytest.approx(0.05)
    assert (accepted == (alike[np.arange(400), own] > threshold)).all()
    assert accepted.mean() == pytest.approx(0.05, abs=0.03)  # own photos are no likelier than strangers here


def test_few_comparisons_make_verification_stricter() -> None:
    alike = np.array([[0.9, 0.5], [0.6, 0.55]])
    assert verify(alike, np.array([0, 1]), 0.01).tolist() == [True, False]  # 0.55 is below stranger's 0.6
    assert rank_first(alike, np.array([0, 1])).tolist() == [True, False]


def test_a_tie_is_not_the_first_rank() -> None:
    assert rank_first(np.array([[0.5, 0.5]]), np.array([0])).tolist() == [False]


def test_run_wide_verdicts_by_recipe() -> None:
    people = {3: person(3, 0.9, of=1), 4: person(4, 0.9, of=1)}
    metric = metric_with(SquareAnalyzer(people=people))
    ann, bob = drawn((100, 100), (10, 10, 50, 1)), drawn((100, 100), (10, 10, 50, 2))
    # The second picture of bob looks like ann; his third has no face.
    samples = [
        sample("r/ann0", drawn((90, 90), (5, 5, 60, 3)), ann),
        sample("r/bob1", drawn((90, 90), (5, 5, 60, 4)), bob),
        sample("r/bob2", BLANK, bob),
    ]
    scored = score_batch([metric], samples)
    rows = [
        row("r/ann0", "r", "ann", scores=scored[0].scores),
        row("r/bob1", "r", "bob", scores=scored[1].scores),
        row("r/bob2", "r", "bob", scores=scored[2].scores),
        row("r/bob3", "r", "bob"),  # could not be scored: no verdict
    ]
    vectors = {each.key: actual.vectors for each, actual in zip(samples, scored, strict=True)}
    actual = finish_run([ConditioningIdentity()], rows, vectors)  # another process than the one that scored
    rank = {key: scores["id_rank1"] for key, scores in actual.items()}
    assert rank == {"r/ann0": 1.0, "r/bob1": 0.0, "r/bob2": 0.0}
    assert actual["r/bob2"]["id_verified"] == 0.0
    assert actual["r/bob1"]["id_verified"] == 0.0


def test_one_identity_has_no_identification_rank() -> None:
    metric = metric_with(SquareAnalyzer())
    photo = drawn((100, 100), (10, 10, 50, 1))
    scored = score_batch([metric], [sample("r/a0", photo, photo)])[0]
    rows = [row("r/a0", "r", "ann", scores=scored.scores)]
    assert finish_run([metric], rows, {"r/a0": scored.vectors}) == {}


# --- other recognizers ----------------------------------------------------------------------------------


def test_adaface_reads_the_aligned_face_in_bgr(tmp_path) -> None:
    """A network that gives back what it was shown, averaged over the crop: the color, normalized, in BGR."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["input"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["embedding"]),
        ],
        "mean",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 112, 112])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [1, 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 10
    onnx.save(model, tmp_path / "ada.onnx")
    metric = AdaFaceIdentity()
    faces = Faces(SquareAnalyzer(), "fastface")
    metric.load(Context(paths={"adaface-ir101": tmp_path / "ada.onnx"}, shared={"faces": faces}))
    # Alignment looks beyond the box of key points, so the face fills a picture of its own color.
    picture = Image.new("RGB", (112, 112), (30, 255, 200))
    actual = metric.describe(picture)
    color = (np.array([200, 255, 30]) - 127.5) / 127.5
    assert np.linalg.norm(actual) == pytest.approx(1, abs=1e-6)
    assert (actual > 0).tolist() == (color > 0).tolist() == [True, True, False]
    assert metric.describe(BLANK) is None
    (tmp_path / "bad.onnx").write_bytes(b"no")
    with pytest.raises(ModelUnavailableError, match="does not load"):
        AdaFaceIdentity().load(
            Context(paths={"adaface-ir101": tmp_path / "bad.onnx"}, shared={"faces": faces})
        )


def test_dlib_is_one_less_the_distance_and_sees_no_face_in_grey() -> None:
    actual = DlibIdentity.compare(np.array([[0.0, 0.3]]), np.array([[0.0, 0.3], [0.4, 0.0]]))
    assert actual[0] == pytest.approx([1.0, 0.5])
    metric = DlibIdentity()
    if base.missing_modules(metric):
        pytest.skip("the extra dlib is not installed")
    metric.load(Context())
    grey = Image.new("RGB", (128, 128), (127, 127, 127))
    assert metric.score([sample("a", grey, grey)])[0]["dlib"] is None


# --- finding and running --------------------------------------------------------------------------------


class Length:
    """Counts letters; a metric as another package would write it."""

    name = "length"
    summary = "letters of the prompt"
    columns = (Column("length", "length", None, "", "Letters of the prompt."),)
    needs = Needs()

    def load(self, context: Context) -> None:
        pass

    def score(self, samples) -> list[base.Scores]:
        if any(each.prompt == "bad" for each in samples):
            raise ValueError("no such word")
        return [{"length": float(len(each.prompt))} for each in samples]


def test_every_metric_is_registered_under_its_name_with_columns_of_its_own() -> None:
    actual = registry()
    assert {"id", "dlib", "adaface", "clip-b32", "clip-l14", "clip-pocket", "face-clip"} <= set(actual)
    assert {"image-reward", "aesthetic", "cost"} <= set(actual)
    from fastface_cli.store.manifest import load_manifest

    for name, kind in actual.items():
        metric = kind()
        assert isinstance(metric, Metric)
        assert metric.name == name
        assert set(metric.needs.artifacts) <= set(load_manifest())
    assert isinstance(actual["id"](), RunMetric)
    assert not isinstance(actual["clip-b32"](), RunMetric)
    assert len(make_metrics(actual)) == len(actual)  # and no two give the same column


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown metric 'clip-b23'") as caught:
        make_metrics(["clip-b23"])
    assert caught.value.hint == "did you mean 'clip-b32'?"


def test_missing_extra_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "missing_modules", lambda metric: ["dlib"])
    with pytest.raises(ModelUnavailableError, match="needs dlib") as caught:
        make_metrics(["dlib"])
    assert caught.value.hint == "pip install 'fastface-cli[dlib]'"


def test_one_sample_that_fails_costs_the_others_nothing() -> None:
    samples = [Sample(word, BLANK, None, word) for word in ("good", "bad", "fine!")]
    actual = score_batch([Length()], samples)
    assert [each.scores for each in actual] == [{"length": 4.0}, {}, {"length": 5.0}]
    assert actual[1].errors["length"]["message"] == "unexpected ValueError: no such word"
    assert actual[0].errors == {}


def test_a_metric_that_loses_count_is_refused() -> None:
    class Short(Length):
        def score(self, samples) -> list[base.Scores]:
            return []

    actual = score_batch([Short()], [Sample("a", BLANK, None, "a")])[0]
    assert "returned 0 results for 1 images" in actual.errors["length"]["message"]
    assert issubclass(UsageError, FastFaceError)


def test_cost_is_what_the_run_noted() -> None:
    rows = [row("r/a0", "r", "a", seconds=1.5, unet_samples=10), Row("r/a1", "r", "a", "p", 1, 0, 1)]
    assert finish_run([Cost()], rows, {}) == {"r/a0": {"seconds": 1.5, "unet_samples": 10}}


def test_image_key_depends_on_pixels_and_size_only() -> None:
    assert image_key(BLANK) == image_key(BLANK.copy()) != image_key(Image.new("RGB", (50, 200)))
