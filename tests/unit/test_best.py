"""Best of several: the choice by hand-made scores, the judges on faces, the record in a picture."""

from __future__ import annotations

import builtins
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.face_stand_ins import SquareAnalyzer

from fastface_cli.app.best_of import (
    Candidates,
    DlibJudge,
    RecipeJudge,
    Score,
    Scorer,
    choose,
    has_own_clip,
    pick_judge,
    standing,
)
from fastface_cli.errors import ModelUnavailableError, UsageError
from fastface_cli.identity.analyzer import NO_RECOGNIZER
from fastface_cli.recipe.files import load_recipe
from fastface_cli.scorers.clip import Clip

EXAMPLE = Path(__file__).parents[2] / "examples" / "portrait.png"


def scores(*pairs: tuple[float | None, float | None]) -> list[Score]:
    return [Score(seed, likeness, prompt) for seed, (likeness, prompt) in enumerate(pairs)]


@pytest.fixture(scope="module")
def pocket():
    from fastface_cli import FastFace

    return FastFace("pocket", device="cpu")


class TestChoice:
    def test_the_likest_of_those_that_follow_the_prompt(self) -> None:
        actual = scores((0.9, 0.1), (0.5, 0.3), (0.6, 0.2))
        assert standing(actual) == [1, 2]
        assert choose(actual) == 2

    def test_of_two_none_is_left_out(self) -> None:
        assert choose(scores((0.9, 0.1), (0.5, 0.9))) == 0

    def test_without_prompt_scores_the_likest(self) -> None:
        actual = scores((0.2, None), (0.9, None), (0.5, None))
        assert standing(actual) == [0, 1, 2]
        assert choose(actual) == 1

    def test_image_without_a_face_is_never_kept(self) -> None:
        assert choose(scores((None, 1.0), (0.1, 0.0))) == 1

    def test_images_without_a_face_do_not_count_among_the_best_third(self) -> None:
        assert standing(scores((None, 0.0), (0.1, 0.1), (0.1, 0.2))) == [1, 2]

    def test_without_any_face_the_one_that_follows_best(self) -> None:
        assert choose(scores((None, 0.1), (None, 0.4), (None, 0.2))) == 1
        assert choose(scores((None, None), (None, None))) == 0

    def test_of_equals_the_first(self) -> None:
        assert choose(scores((0.5, 0.5), (0.5, 0.5))) == 0

    @given(
        st.lists(
            st.tuples(
                st.none() | st.floats(-1, 1, allow_nan=False), st.none() | st.floats(-1, 1, allow_nan=False)
            ),
            min_size=1,
            max_size=30,
        )
    )
    def test_exactly_one_candidate_is_kept(self, pairs: list[tuple[float | None, float | None]]) -> None:
        actual = scores(*pairs)
        kept, stands = choose(actual), standing(actual)
        assert kept in stands
        shown = [score for score in actual if score.likeness is not None]
        assert len(stands) >= (len(shown) - len(shown) // 3 if shown else len(actual))
        most = max(
            (score.likeness for score in (actual[index] for index in stands) if score.likeness is not None),
            default=None,
        )
        assert actual[kept].likeness == most

    def test_the_summary_is_of_the_kept_one(self) -> None:
        actual = Candidates((), tuple(scores((0.12345, None), (0.98765, None))), "dlib")
        assert actual.summary() == {
            "count": 2,
            "first_seed": 0,
            "judge": "dlib",
            "likeness": 0.9877,
            "prompt": None,
        }


class TestJudges:
    def test_the_conditioning_recognizer_gives_cosines(self, person) -> None:
        judge = RecipeJudge(SquareAnalyzer(), conditions=True)
        mean = judge.reference(person)
        assert judge.likeness(mean, mean) == pytest.approx(1)
        assert judge.likeness(-mean, mean) == pytest.approx(-1)

    @pytest.fixture
    def without_dlib(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = builtins.__import__

        def without(name: str, *rest: object, **more: object) -> object:
            if name == "dlib":
                raise ImportError(name)
            return real(name, *rest, **more)

        monkeypatch.setattr(builtins, "__import__", without)

    @pytest.mark.usefixtures("without_dlib")
    def test_without_dlib_a_dependent_score_is_reported(self, caplog: pytest.LogCaptureFixture) -> None:
        judge = pick_judge(SquareAnalyzer(), "faceid_plusv2")
        assert judge.name == "the conditioning recognizer"
        (record,) = caplog.records
        assert "fastface-cli[dlib]" in record.getMessage()

    @pytest.mark.usefixtures("without_dlib")
    def test_recognizer_that_conditions_nothing_needs_no_warning(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        judge = pick_judge(SquareAnalyzer(), "plus_face")
        assert judge.name == "the recipe's recognizer"
        assert not caplog.records

    @pytest.mark.usefixtures("without_dlib")
    def test_detector_without_a_recognizer_cannot_score(self) -> None:
        class Detector(SquareAnalyzer):
            recognizer = NO_RECOGNIZER

        with pytest.raises(ModelUnavailableError, match="has no face recognizer") as refused:
            pick_judge(Detector(), "plus_face")
        assert "fastface-cli[dlib]" in str(refused.value.hint)

    def test_embedding_of_another_recognizer_is_refused(self, person) -> None:
        class Other(SquareAnalyzer):
            recognizer = "w600k_r50"

        judge = RecipeJudge(Other(), conditions=False)
        assert judge.reference(replace(person, recognizer="w600k_r50")) is not None
        with pytest.raises(UsageError, match="made with the recognizer none"):
            judge.reference(replace(person, recognizer=NO_RECOGNIZER))

    def test_dlib_knows_a_face_again_at_another_size(self, pocket) -> None:
        """The example is drawn, but a face all the same; the crop of a scaled copy stays near it."""
        pytest.importorskip("dlib")
        portrait = Image.open(EXAMPLE).convert("RGB")
        scorer = Scorer(pocket.analyzer, DlibJudge(), None)
        me = pocket.identity(portrait)
        large = portrait.resize((512, 512), Image.Resampling.LANCZOS)
        same = scorer.score(large, identity=me, prompt="", seed=1)
        mirrored = scorer.score(
            portrait.transpose(Image.Transpose.FLIP_TOP_BOTTOM), identity=me, prompt="", seed=2
        )
        assert same.likeness is not None
        assert same.likeness > 0.8
        assert mirrored.likeness is None or mirrored.likeness < same.likeness

    def test_image_without_a_face_has_no_likeness(self, person) -> None:
        scorer = Scorer(SquareAnalyzer(), RecipeJudge(SquareAnalyzer(), conditions=True), constant_clip(0.6))
        blank = Image.new("RGB", (64, 64), "grey")
        assert scorer.score(blank, identity=person, prompt="x", seed=4) == Score(4, None, pytest.approx(0.6))


def constant_clip(cosine: float) -> Clip:
    """A CLIP model in which every prompt has this cosine with every image."""
    text = torch.tensor([[cosine, (1 - cosine**2) ** 0.5]])
    image = torch.tensor([[1.0, 0.0]])
    return Clip(lambda prompts: text, lambda pixels: image, 8, "cpu")


class TestPrompts:
    def test_pocket_encoders_distinguish_descriptions(self, pocket) -> None:
        clip = pocket.scorer.clip
        assert clip is not None
        portrait = Image.open(EXAMPLE).convert("RGB")
        right = clip.similarity("a smiling young woman with long dark hair", portrait)
        assert right > clip.similarity("pencil drawing of an old man", portrait)
        assert right == clip.similarity("a smiling young woman with long dark hair", portrait)

    def test_only_a_clip_pair_is_used(self, pocket) -> None:
        assert has_own_clip(pocket.recipe)
        assert not has_own_clip(load_recipe("hyper").recipe)


class TestLibrary:
    def test_kept_image_is_that_of_its_seed(self, pocket) -> None:
        me = pocket.identity(EXAMPLE)
        best = pocket.best_of(me, "a woman", n=3, seed=11, batch_size=2)
        assert [score.seed for score in best.scores] == [11, 12, 13]
        assert best.seed == best.scores[choose(best.scores)].seed
        alone = pocket.generate(me, "a woman", seed=best.seed)[0]
        assert np.abs(np.asarray(alone, int) - np.asarray(best.image, int)).max() <= 1

    @pytest.mark.parametrize("n", [0, 1001])
    def test_numbers_that_make_no_sense(self, n: int, pocket, person) -> None:
        with pytest.raises(UsageError, match="1 to 1000"):
            pocket.best_of(person, "a woman", n=n)
