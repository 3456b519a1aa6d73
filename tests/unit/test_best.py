"""Best of several: the choice by hand-made scores, the judges on faces, the record in a picture."""

from __future__ import annotations

import builtins
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
    ConditioningJudge,
    DlibJudge,
    Score,
    Scorer,
    choose,
    clip_prompt_scorer,
    own_prompt_scorer,
    pick_judge,
    standing,
)
from fastface_cli.errors import ModelUnavailableError, UsageError
from fastface_cli.models.offload import OFF

EXAMPLE = Path(__file__).parents[2] / "examples" / "portrait.png"


def scores(*pairs: tuple[float | None, float | None]) -> list[Score]:
    return [Score(seed, likeness, prompt) for seed, (likeness, prompt) in enumerate(pairs)]


@pytest.fixture(scope="module")
def pocket():
    from fastface_cli import FastFace

    return FastFace("pocket", device="cpu")


class TestChoice:
    def test_the_likest_of_those_that_follow_the_prompt(self) -> None:
        found = scores((0.9, 0.1), (0.5, 0.3), (0.6, 0.2))
        assert standing(found) == [1, 2]
        assert choose(found) == 2

    def test_of_two_none_is_left_out(self) -> None:
        assert choose(scores((0.9, 0.1), (0.5, 0.9))) == 0

    def test_without_prompt_scores_the_likest(self) -> None:
        found = scores((0.2, None), (0.9, None), (0.5, None))
        assert standing(found) == [0, 1, 2]
        assert choose(found) == 1

    def test_a_picture_without_a_face_is_out_however_well_it_follows(self) -> None:
        assert choose(scores((None, 1.0), (0.1, 0.0))) == 1

    def test_faceless_pictures_do_not_count_among_the_third(self) -> None:
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
    def test_always_one_that_stands(self, pairs: list[tuple[float | None, float | None]]) -> None:
        found = scores(*pairs)
        kept, stands = choose(found), standing(found)
        assert kept in stands
        shown = [score for score in found if score.likeness is not None]
        assert len(stands) >= (len(shown) - len(shown) // 3 if shown else len(found))
        most = max(
            (score.likeness for score in (found[index] for index in stands) if score.likeness is not None),
            default=None,
        )
        assert found[kept].likeness == most

    def test_the_summary_is_of_the_kept_one(self) -> None:
        found = Candidates((), tuple(scores((0.12345, None), (0.98765, None))), "dlib")
        assert found.summary() == {
            "count": 2,
            "first_seed": 0,
            "judge": "dlib",
            "likeness": 0.9877,
            "prompt": None,
        }


class TestJudges:
    def test_the_conditioning_recognizer_gives_cosines(self, person) -> None:
        judge = ConditioningJudge(SquareAnalyzer())
        mean = judge.reference(person)
        assert judge.likeness(mean, mean) == pytest.approx(1)
        assert judge.likeness(-mean, mean) == pytest.approx(-1)

    def test_without_dlib_the_dependence_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = builtins.__import__

        def without(name: str, *rest: object, **more: object) -> object:
            if name == "dlib":
                raise ImportError(name)
            return real(name, *rest, **more)

        monkeypatch.setattr(builtins, "__import__", without)
        said: list[str] = []
        judge = pick_judge(SquareAnalyzer(), said.append)
        assert judge.name == "the conditioning recognizer"
        assert len(said) == 1
        assert "fastface-cli[dlib]" in said[0]

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

    def test_a_picture_without_a_face_has_no_likeness(self, person) -> None:
        scorer = Scorer(SquareAnalyzer(), ConditioningJudge(SquareAnalyzer()), lambda *_: 0.25)
        blank = Image.new("RGB", (64, 64), "grey")
        assert scorer.score(blank, identity=person, prompt="x", seed=4) == Score(4, None, 0.25)


class TestPrompts:
    def test_the_pockets_own_encoders_tell_a_man_from_a_woman(self, pocket) -> None:
        scorer = own_prompt_scorer(pocket.pipeline)
        assert scorer is not None
        portrait = Image.open(EXAMPLE).convert("RGB")
        right = scorer("a smiling young woman with long dark hair", portrait)
        assert right > scorer("pencil drawing of an old man", portrait)
        assert right == scorer("a smiling young woman with long dark hair", portrait)

    def test_encoders_that_are_no_pair_score_nothing(self) -> None:
        class Other:
            class recipe:  # noqa: N801
                class model:  # noqa: N801
                    base, image_encoder = "sdxl-base", "ip-adapter-image-encoder"

        assert own_prompt_scorer(Other) is None  # type: ignore[arg-type]

    def test_a_clip_of_its_own_from_a_folder(self, tmp_path: Path) -> None:
        from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

        weights = Path(__file__).parents[2] / "fastface_cli" / "pocket" / "weights" / "pipe" / "tokenizer_2"
        words = CLIPTokenizer.from_pretrained(weights)
        torch.manual_seed(0)
        text = CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            eos_token_id=words.eos_token_id,
            bos_token_id=words.bos_token_id,
            pad_token_id=words.pad_token_id,
        )
        vision = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
        model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).eval()
        model.save_pretrained(tmp_path)
        words.save_pretrained(tmp_path)

        class Beside:
            device, dtype, level = torch.device("cpu"), torch.float32, OFF

        scorer = clip_prompt_scorer(tmp_path, Beside)  # type: ignore[arg-type]
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
        from transformers import CLIPImageProcessorPil

        pixels = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)(picture, return_tensors="pt")
        ids = words("a woman", padding="max_length", max_length=77, return_tensors="pt").input_ids
        with torch.inference_mode():
            seen = model(input_ids=ids, pixel_values=pixels.pixel_values)
        wanted = float(torch.nn.functional.cosine_similarity(seen.text_embeds, seen.image_embeds))
        assert scorer("a woman", picture) == pytest.approx(wanted, abs=1e-5)

    def test_a_folder_without_a_clip(self, tmp_path: Path) -> None:
        class Beside:
            device, dtype, level = torch.device("cpu"), None, OFF

        with pytest.raises(ModelUnavailableError, match="does not load"):
            clip_prompt_scorer(tmp_path, Beside)  # type: ignore[arg-type]


class TestLibrary:
    def test_the_kept_picture_is_the_one_its_seed_makes(self, pocket) -> None:
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
