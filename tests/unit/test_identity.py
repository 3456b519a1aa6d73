"""Identities: their arithmetic, files, and choice of the face."""

from __future__ import annotations

import os
import pickle
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file, save, save_file
from support.face_stand_ins import SquareAnalyzer, drawn, person

from fastface_cli.errors import FastFaceError, NoFaceError, UsageError
from fastface_cli.identity.identity import MAX_PHOTOS, Identity, make_identity, outliers


def identity(*people: np.ndarray, weight: list[float] | None = None) -> Identity:
    n = len(people)
    crops = np.random.default_rng(0).integers(0, 256, (n, 224, 224, 3), np.uint8)
    return Identity(np.stack(people), crops, np.array(weight or [1.0] * n, np.float32))


def tensors(n: int = 2) -> dict[str, np.ndarray]:
    me = identity(*(person(i) for i in range(n)))
    return {
        "id_embedding": me.id_embedding,
        "face_crop_bgr": me.face_crop_bgr,
        "weight": np.arange(1, n + 1, dtype=np.float32),
    }


def same(first: Identity, other: Identity) -> bool:
    names = ("id_embedding", "face_crop_bgr", "weight")
    return all(
        getattr(first, name).dtype == getattr(other, name).dtype
        and np.array_equal(getattr(first, name), getattr(other, name))
        for name in names
    )


class TestArithmetic:
    def test_mean_of_one_photo_is_its_embedding(self) -> None:
        assert np.abs(identity(person(1)).mean() - person(1)).max() < 1e-7

    def test_mean_is_weighted_and_of_unit_norm(self) -> None:
        first, second = person(1), person(2)
        mean = identity(first, second, weight=[3.0, 1.0]).mean()
        expected = 3 * first.astype(np.float64) + second
        assert mean.dtype == np.float32
        assert np.abs(mean - expected / np.linalg.norm(expected)).max() < 1e-6
        assert abs(np.linalg.norm(mean.astype(np.float64)) - 1) < 1e-6

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=5), st.floats(1e-3, 1e3))
    def test_mean_knows_only_relative_weights_and_no_order(self, weight: list[float], factor: float) -> None:
        people = [person(i) for i in range(len(weight))]
        mean = identity(*people, weight=weight).mean()
        scaled = identity(*people[::-1], weight=[factor * each for each in weight[::-1]]).mean()
        assert np.abs(mean - scaled).max() < 1e-6

    def test_crop_nearest_to_the_mean(self) -> None:
        people = [person(0), person(1, 0.9), person(2, 0.3)]
        me = identity(*people)
        assert np.array_equal(me.crop(), me.face_crop_bgr[int(np.argmax(np.stack(people) @ me.mean()))])
        heavy = identity(*people, weight=[0.01, 0.01, 1.0])
        assert np.array_equal(heavy.crop(), heavy.face_crop_bgr[2])

    def test_digest(self) -> None:
        me = identity(person(0), person(1))
        assert me.digest() == identity(person(0), person(1), weight=[0.5, 0.5]).digest()
        others = [
            identity(person(0), person(2)),
            identity(person(1), person(0)),
            identity(person(0), person(1), weight=[1.0, 0.5]),
            identity(person(0)),
            Identity(me.id_embedding, me.face_crop_bgr ^ 1, me.weight),
        ]
        assert len({me.digest(), *(other.digest() for other in others)}) == 6
        assert len(me.digest()) == 64

    @pytest.mark.parametrize(
        ("name", "value", "words"),
        [
            ("id_embedding", np.zeros((0, 512), np.float32), "1 to 64 photos"),
            ("id_embedding", np.ones(512, np.float32), "id_embedding"),
            ("id_embedding", np.float32(1.0), "id_embedding"),
            ("id_embedding", np.ones((2, 256), np.float32), "id_embedding"),
            ("id_embedding", np.ones((2, 512)), "float64"),
            ("id_embedding", np.ones((2, 512), np.float32), "norm 1"),
            ("id_embedding", np.zeros((2, 512), np.float32), "norm 1"),
            ("id_embedding", np.full((2, 512), np.nan, np.float32), "norm 1"),
            ("id_embedding", np.full((2, 512), 3e38, np.float32), "norm 1"),
            ("id_embedding", np.stack([person(1), -person(1)]), "cancel"),
            ("face_crop_bgr", np.zeros((2, 112, 112, 3), np.uint8), "face_crop_bgr"),
            ("face_crop_bgr", np.zeros((1, 224, 224, 3), np.uint8), "face_crop_bgr"),
            ("face_crop_bgr", np.zeros((2, 224, 224, 3), np.float32), "float32"),
            ("weight", np.ones(3, np.float32), "weight"),
            ("weight", np.array([1, 0], np.float32), "above 0"),
            ("weight", np.array([1, -1], np.float32), "above 0"),
            ("weight", np.array([1, np.nan], np.float32), "above 0"),
            ("weight", np.array([1, np.inf], np.float32), "above 0"),
            ("weight", np.ones(2, np.int64), "int64"),
        ],
    )
    def test_impossible_arrays(self, tmp_path: Path, name: str, value: np.ndarray, words: str) -> None:
        arrays = tensors() | {"weight": np.ones(2, np.float32)} | {name: value}
        if name == "id_embedding" and value.shape == (0, 512):
            arrays |= {
                "face_crop_bgr": np.zeros((0, 224, 224, 3), np.uint8),
                "weight": np.zeros(0, np.float32),
            }
        with pytest.raises(UsageError, match=words):
            Identity(**arrays)
        path = tmp_path / "bad.safetensors"
        save_file({key: np.asarray(array) for key, array in arrays.items()}, path)
        with pytest.raises(UsageError, match=r"bad\.safetensors"):
            Identity.load(path)


class TestFiles:
    def test_round_trip_is_exact(self, tmp_path: Path) -> None:
        for number, me in enumerate((identity(person(3)), identity(person(0), person(1), weight=[0.3, 0.9]))):
            path = tmp_path / f"{number}.safetensors"
            assert me.save(str(path)) == path
            assert same(Identity.load(str(path)), me)
            assert Identity.load(path).digest() == me.digest()
        assert sorted(load_file(path)) == ["face_crop_bgr", "id_embedding", "weight"]
        assert len(list(tmp_path.iterdir())) == 2

    def test_golden_file(self, golden: Path) -> None:
        me = Identity.load(golden / "identity.safetensors")
        stored = load_file(golden / "identity.safetensors")
        assert np.array_equal(me.id_embedding, stored["id_embedding"])
        assert np.array_equal(me.crop(), stored["face_crop_bgr"])
        assert me.weight.tolist() == [1.0]
        assert np.abs(me.mean() - stored["id_embedding"][0]).max() < 1e-7

    def test_absent_weight_is_equal_and_three_dimensions_are_one_photo(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        arrays = tensors(2)
        save_file({name: arrays[name] for name in ("id_embedding", "face_crop_bgr")}, path)
        assert Identity.load(path).weight.tolist() == [1.0, 1.0]
        stored = tensors(1)
        save_file({"id_embedding": stored["id_embedding"], "face_crop_bgr": stored["face_crop_bgr"][0]}, path)
        assert Identity.load(path).face_crop_bgr.shape == (1, 224, 224, 3)
        save_file({"id_embedding": arrays["id_embedding"], "face_crop_bgr": arrays["face_crop_bgr"][0]}, path)
        with pytest.raises(UsageError, match="face_crop_bgr"):
            Identity.load(path)

    def test_rounded_norms_are_normalized_and_wrong_norms_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        arrays = tensors(2)
        save_file(
            arrays | {"id_embedding": arrays["id_embedding"].astype(np.float16).astype(np.float32)}, path
        )
        norms = np.linalg.norm(Identity.load(path).id_embedding.astype(np.float64), axis=1)
        assert np.abs(norms - 1).max() < 1e-6
        save_file(arrays | {"id_embedding": arrays["id_embedding"] * np.float32(1.01)}, path)
        with pytest.raises(UsageError, match="norm 1"):
            Identity.load(path)

    def test_an_existing_file_is_kept_without_force(self, tmp_path: Path) -> None:
        path = tmp_path / "me.safetensors"
        path.write_bytes(b"precious")
        with pytest.raises(UsageError, match="already exists"):
            identity(person(1)).save(path)
        assert path.read_bytes() == b"precious"
        assert identity(person(1)).save(path, force=True) == path
        assert same(Identity.load(path), identity(person(1)))
        assert [each.name for each in tmp_path.iterdir()] == ["me.safetensors"]

    def test_impossible_targets(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        for path in (tmp_path, tmp_path / "file" / "me.safetensors"):
            with pytest.raises(UsageError):
                identity(person(1)).save(path, force=True)

    def refused(self, path: Path) -> UsageError:
        with pytest.raises(UsageError) as caught:
            Identity.load(path)
        assert caught.value.exit_code == 2
        assert "\n" not in caught.value.message
        return caught.value

    def test_what_is_not_an_identity_file(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        assert "no identity file" in self.refused(path).message
        assert "folder" in self.refused(tmp_path).message
        assert self.refused(Path("a\0b")).exit_code == 2
        arrays = tensors()
        Image.new("RGB", (9, 9)).save(tmp_path / "me.png")
        for content in (
            b"",
            b"hello",
            b"\xff" * 100,
            (tmp_path / "me.png").read_bytes(),
            pickle.dumps(arrays),
            save(arrays)[:-1],
            save(arrays) + b"\0",
            save(arrays)[:40],
        ):
            path.write_bytes(content)
            assert str(path) in self.refused(path).message

    def test_unknown_missing_and_wrong_tensors(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        arrays = tensors()
        save_file(arrays | {"weights": arrays["weight"]}, path)
        assert self.refused(path).hint == "did you mean 'weight'?"
        for name in ("id_embedding", "face_crop_bgr"):
            save_file({key: array for key, array in arrays.items() if key != name}, path)
            assert name in self.refused(path).message
        save_file(arrays | {"id_embedding": arrays["id_embedding"].astype(np.float16)}, path)
        assert "F16" in self.refused(path).message
        save_file({}, path)
        assert "id_embedding" in self.refused(path).message

    def test_too_large(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        with path.open("wb") as file:
            file.truncate(801 * 2**20)
        assert "800 MB" in self.refused(path).message
        arrays = tensors(1)
        n = MAX_PHOTOS + 1
        arrays = {name: np.repeat(array, n, axis=0) for name, array in arrays.items()}
        save_file(arrays, path)
        assert "64 photos" in self.refused(path).message

    @settings(max_examples=300, deadline=None)
    @given(st.binary(max_size=200))
    def test_random_bytes(self, tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
        path = tmp_path_factory.getbasetemp() / "random.safetensors"
        path.write_bytes(data)
        with pytest.raises(UsageError):
            Identity.load(path)

    @settings(max_examples=300, deadline=None)
    @given(st.data())
    def test_damaged_files(self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
        path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
        content = bytearray(SAVED)
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, 600))
            content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        path.write_bytes(content)
        assert loaded(path) in ("Identity", "UsageError")


SAVED = save(tensors(1))


def loaded(path: Path) -> str:
    """What loading gave; any error but a FastFaceError fails the test."""
    try:
        return type(Identity.load(path)).__name__
    except FastFaceError as error:
        return type(error).__name__


class Heard(list[str]):
    """Collects the remarks."""

    def __call__(self, remark: str) -> None:
        assert "\n" not in remark
        self.append(remark)


def save_photos(folder: Path, **photos: Image.Image) -> list[Path]:
    for name, photo in photos.items():
        photo.save(folder / f"{name}.png")
    return [folder / f"{name}.png" for name in photos]


ONE = drawn((300, 200), (100, 50, 90, 7))
EMPTY = drawn((300, 200))
GROUP = drawn((400, 200), (10, 20, 60, 1), (150, 20, 120, 2), (300, 20, 80, 3))


def taken(me: Identity) -> int:
    """Which person of `drawn` an identity of one photo is."""
    return next(number for number in range(20) if np.array_equal(me.id_embedding[0], person(number)))


def boxes_in(text: str) -> list[int]:
    """The numbers of all (left, top, right, bottom) in a message."""
    return [int(number) for box in re.findall(r"\((-?\d+, .*?)\)", text) for number in box.split(",")]


class TestOnePhoto:
    def test_a_photo_becomes_an_identity(self, tmp_path: Path) -> None:
        heard = Heard()
        analyzer = SquareAnalyzer(score={7: 0.75})
        (path,) = save_photos(tmp_path, me=ONE)
        me = make_identity([path], analyzer, log=heard)
        assert np.array_equal(me.id_embedding[0], person(7))
        assert me.weight.tolist() == [0.75]
        assert heard == []
        # The crop is BGR and shows the drawn face where ArcFace puts it: everywhere but at the margin.
        assert me.face_crop_bgr.shape == (1, 224, 224, 3)
        assert me.crop()[40:190, 60:170].reshape(-1, 3).tolist() == [[200, 255, 7]] * (150 * 110)
        assert same(make_identity([ONE], analyzer), me)
        assert sorted(each.name for each in tmp_path.iterdir()) == ["me.png"]

    def test_nothing_is_written_or_asked_twice(self) -> None:
        analyzer = SquareAnalyzer()
        make_identity([ONE], analyzer)
        assert analyzer.asked == [(640, (200, 300))]

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
    def test_modes_reach_the_analyzer_as_bgr(self, mode: str) -> None:
        white = Image.new("RGB", (50, 40), "white").convert(mode)
        with pytest.raises(NoFaceError):
            make_identity([white], SquareAnalyzer(sees=lambda size, shape, share: False))

    def test_the_largest_of_several_and_how_to_choose(self) -> None:
        heard = Heard()
        assert taken(make_identity([GROUP], SquareAnalyzer(), log=heard)) == 2
        assert len(heard) == 1
        assert "3 faces" in heard[0]
        assert "--face-index 0 to 2" in heard[0]
        assert "(150, 20, 270, 140)" in heard[0]

    @pytest.mark.parametrize(("index", "number"), [(0, 2), (1, 3), (2, 1)])
    def test_index_counts_by_size(self, index: int, number: int) -> None:
        heard = Heard()
        assert taken(make_identity([GROUP], SquareAnalyzer(), face_index=index, log=heard)) == number
        assert heard == []

    def test_index_out_of_range(self) -> None:
        with pytest.raises(NoFaceError, match="no face number 3: 3 faces found") as caught:
            make_identity([GROUP], SquareAnalyzer(), face_index=3)
        assert caught.value.exit_code == 5
        assert "2 at (10, 20, 70, 80)" in str(caught.value.hint)

    @pytest.mark.parametrize(
        ("box", "number"),
        [
            ((12, 22, 68, 78), 1),  # inside the face
            ((290, 0, 400, 200), 3),  # around it
            ((0, 0, 160, 200), 1),  # touches its neighbour
            ((140, 10, 330, 150), 2),
            ((330, 40, 345, 50), 3),  # a spot on it
        ],
    )
    def test_box(self, box: tuple[float, float, float, float], number: int) -> None:
        assert taken(make_identity([GROUP], SquareAnalyzer(), face_box=box)) == number

    def test_a_box_is_searched_separately_if_the_photo_shows_no_face(self) -> None:
        small = drawn((1000, 1000), (700, 700, 40, 5), (100, 100, 300, 6))
        analyzer = SquareAnalyzer(sees=lambda size, shape, share: share > 0.1)
        assert taken(make_identity([small], analyzer, face_box=(690, 690, 750, 750))) == 5
        with pytest.raises(NoFaceError, match=r"no face in the box \(690, 100, 750, 200\)") as caught:
            make_identity([small], analyzer, face_box=(690, 100, 750, 200))
        assert "0 at (100, 100, 400, 400)" in str(caught.value.hint)
        with pytest.raises(NoFaceError, match="no face in the box"):
            make_identity([small], analyzer, face_box=(5000, 5000, 6000, 6000))

    def test_box_and_messages_are_in_pixels_of_the_original(self) -> None:
        huge = drawn((8192, 1000), (100, 100, 700, 4), (6000, 100, 800, 5))
        heard = Heard()
        assert taken(make_identity([huge], SquareAnalyzer(), log=heard)) == 5
        assert boxes_in(heard[0]) == pytest.approx([6000, 100, 6800, 900], abs=4)
        assert taken(make_identity([huge], SquareAnalyzer(), face_box=(100, 100, 800, 800))) == 4
        with pytest.raises(NoFaceError) as caught:
            make_identity([huge], SquareAnalyzer(), face_box=(3000, 100, 3100, 200))
        hint = boxes_in(str(caught.value.hint))
        assert hint == pytest.approx([6000, 100, 6800, 900, 100, 100, 800, 800], abs=4)

    @pytest.mark.parametrize(
        "choice",
        [
            {"face_index": -1},
            {"face_index": 0, "face_box": (0, 0, 9, 9)},
            {"face_box": (9, 0, 9, 9)},
            {"face_box": (0, 9, 9, 0)},
            {"face_box": (0, 0, float("nan"), 9)},
            {"face_box": (0, 0, float("inf"), 9)},
        ],
    )
    def test_senseless_choices(self, choice: dict[str, Any]) -> None:
        with pytest.raises(UsageError):
            make_identity([GROUP], SquareAnalyzer(), **choice)

    def test_a_small_face_is_reported(self) -> None:
        heard = Heard()
        make_identity([drawn((300, 200), (10, 10, 30, 7))], SquareAnalyzer(), log=heard)
        assert "only 30 pixels wide" in heard[0]

    def test_a_face_that_cannot_be_measured(self) -> None:
        analyzer = SquareAnalyzer(people={7: np.full(512, np.nan, np.float32)})
        with pytest.raises(NoFaceError, match="cannot be recognized"):
            make_identity([ONE], analyzer)


class TestRetries:
    def test_smaller_sizes(self) -> None:
        analyzer = SquareAnalyzer(sees=lambda size, shape, share: size <= 384)
        assert taken(make_identity([ONE], analyzer)) == 7
        assert [size for size, _ in analyzer.asked] == [640, 576, 512, 448, 384]

    @pytest.mark.parametrize(("limit", "border"), [(0.7, 0.25), (0.6, 0.5), (0.4, 1.0)])
    def test_padding_for_tight_crops(self, limit: float, border: float) -> None:
        tight = drawn((200, 200), (2, 4, 190, 9))
        analyzer = SquareAnalyzer(sees=lambda size, shape, share: share < limit)
        me = make_identity([tight], analyzer)
        side = round(200 * (1 + 2 * border))
        assert analyzer.asked[-1] == (640, (side, side))
        # The face is cut from the photo itself: as if it had been seen at once.
        assert same(me, make_identity([tight], SquareAnalyzer()))

    def test_padding_of_a_large_image_takes_little_memory(self) -> None:
        tight = drawn((4000, 3000), (200, 100, 2800, 9))
        analyzer = SquareAnalyzer(sees=lambda size, shape, share: share < 0.4)
        assert taken(make_identity([tight], analyzer)) == 9
        assert max(max(shape) for _, shape in analyzer.asked if shape != (3000, 4000)) <= 3 * 1280

    def test_larger_images_are_tried_large(self) -> None:
        analyzer = SquareAnalyzer(sees=lambda size, shape, share: size == 1280)
        assert taken(make_identity([drawn((2000, 1500), (50, 50, 60, 3))], analyzer)) == 3
        assert [size for size, _ in analyzer.asked] == [640, 576, 512, 448, 384, 320, 1280]

    def test_no_face_error_lists_the_attempts(self, tmp_path: Path) -> None:
        (path,) = save_photos(tmp_path, wall=EMPTY)
        analyzer = SquareAnalyzer()
        with pytest.raises(NoFaceError) as caught:
            make_identity([path], analyzer)
        assert caught.value.exit_code == 5
        for words in (str(path), "640, 576, 512, 448, 384 and 320", "25%, 50% and 100%"):
            assert words in caught.value.message
        assert caught.value.hint
        assert len(analyzer.asked) == 24 + 6  # and rotated, three times at two sizes

    @pytest.mark.parametrize("size", [(1, 1), (2, 1), (10000, 10), (10, 10000), (30000, 1)])
    def test_odd_sizes(self, size: tuple[int, int]) -> None:
        analyzer = SquareAnalyzer()
        with pytest.raises(NoFaceError):
            make_identity([Image.new("RGB", size)], analyzer)
        assert all(min(640 / max(shape) * min(shape), 9) >= 1 for _, shape in analyzer.asked)

    def test_a_face_cut_by_the_edge_counts_by_what_is_seen(self) -> None:
        class Beyond(SquareAnalyzer):
            def detect(self, picture: np.ndarray, size: int) -> list[Any]:
                (face,) = super().detect(picture, size)
                far = face.moved(-1000, 0)
                return [far, face.moved(0, 0, 1), type(face)((-900, 50, 60, 140), face.key_points, 0.9)]

        assert make_identity([ONE], Beyond()).weight.tolist() == pytest.approx([0.95])


class TestSeveralPhotos:
    def test_weighted_by_the_detector(self) -> None:
        people = {7: person(7), 8: person(8, 0.8, of=7)}
        analyzer = SquareAnalyzer(people=people, score={7: 0.9, 8: 0.6})
        me = make_identity([ONE, drawn((300, 200), (100, 50, 90, 8))], analyzer)
        assert me.weight.tolist() == pytest.approx([0.9, 0.6])
        expected = 0.9 * people[7].astype(np.float64) + 0.6 * people[8]
        assert np.abs(me.mean() - expected / np.linalg.norm(expected)).max() < 1e-6

    def test_a_photo_without_a_face_is_named_and_omitted(self, tmp_path: Path) -> None:
        heard = Heard()
        paths = save_photos(tmp_path, wall=EMPTY, me=ONE)
        assert len(make_identity(paths, SquareAnalyzer(), log=heard).weight) == 1
        assert heard == [f"{paths[0]} omitted: no face found in it"]

    def test_none_with_a_face(self, tmp_path: Path) -> None:
        paths = save_photos(tmp_path, wall=EMPTY, floor=EMPTY)
        with pytest.raises(NoFaceError) as caught:
            make_identity(paths, SquareAnalyzer())
        assert all(str(path) in caught.value.message for path in paths)

    def test_an_outlier_is_named_and_omitted(self, tmp_path: Path) -> None:
        people = {1: person(1), 2: person(2, 0.7, of=1), 3: person(3), 4: person(4, 0.6, of=1)}
        photos = {f"p{number}": drawn((300, 200), (100, 50, 90, number)) for number in people}
        paths = save_photos(tmp_path, **photos)
        heard = Heard()
        me = make_identity(paths, SquareAnalyzer(people=people), log=heard)
        assert len(me.weight) == 3
        assert not any(np.array_equal(row, people[3]) for row in me.id_embedding)
        assert len(heard) == 1
        assert heard[0].startswith(f"{paths[2]} omitted")

    def test_two_that_disagree_are_kept_with_a_warning(self) -> None:
        heard = Heard()
        photos = [drawn((300, 200), (100, 50, 90, number)) for number in (1, 2)]
        assert len(make_identity(photos, SquareAnalyzer(), log=heard).weight) == 2
        assert len(heard) == 1
        assert "different people" in heard[0]
        assert "photo 1, photo 2" in heard[0]

    def test_a_missing_file_stops_everything(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"none\.jpg"):
            make_identity([ONE, tmp_path / "none.jpg"], SquareAnalyzer())

    def test_limits(self) -> None:
        for photos in ([], [ONE] * (MAX_PHOTOS + 1)):
            with pytest.raises(UsageError, match="1 to 64"):
                make_identity(photos, SquareAnalyzer())
        with pytest.raises(UsageError, match="box applies to one photo"):
            make_identity([ONE, ONE], SquareAnalyzer(), face_box=(0, 0, 9, 9))

    def test_without_a_log_it_is_silent(self, capfd: pytest.CaptureFixture[str]) -> None:
        make_identity([GROUP, EMPTY], SquareAnalyzer())
        assert capfd.readouterr() == ("", "")


class TestOutliers:
    @staticmethod
    def kept_photos(*people: np.ndarray, weight: list[float] | None = None) -> list[int]:
        return list(outliers(np.stack(people), np.array(weight or [1.0] * len(people), np.float32)))

    def test_one_or_two_photos_have_no_outlier(self) -> None:
        assert self.kept_photos(person(1)) == []
        assert self.kept_photos(person(1), person(2)) == []
        assert self.kept_photos(person(1), -person(1)) == []

    def test_one_person_at_the_spread_of_real_photos(self) -> None:
        assert self.kept_photos(*(person(i, 0.55) for i in range(1, 7))) == []  # pairs at 0.3
        assert self.kept_photos(person(0), person(1, 0.7), person(2, 0.45)) == []

    def test_another_person_is_an_outlier_for_any_weights(self) -> None:
        friends = [person(0), person(1, 0.8), person(2, 0.7)]
        assert self.kept_photos(person(9), *friends) == [0]
        assert self.kept_photos(*friends, person(9), weight=[0.5, 0.5, 0.5, 1.0]) == [3]

    def test_two_outliers_worst_first(self) -> None:
        people = [person(i, 0.8) for i in range(1, 6)]
        assert sorted(self.kept_photos(person(20), *people, person(21))) == [0, 6]

    def test_a_recognizer_that_scores_different_people_as_similar(self) -> None:
        """Photos of one person at 0.9, strangers at 0.3."""
        people = [person(i, 0.95) for i in range(1, 5)]
        assert self.kept_photos(*people, person(20, 0.3)) == [4]

    def test_two_against_two_is_no_majority(self) -> None:
        people = [person(0), person(1, 0.8, of=0), person(5), person(6, 0.8, of=5)]
        assert self.kept_photos(*people) == []
        heard = Heard()
        photos = [drawn((300, 200), (100, 50, 90, number)) for number in (1, 2, 3, 4)]
        analyzer = SquareAnalyzer(people=dict(zip((1, 2, 3, 4), people, strict=True)))
        make_identity(photos, analyzer, log=heard)
        assert any("different people" in remark for remark in heard)

    def test_opposite_others_do_no_harm(self) -> None:
        assert 1 <= len(self.kept_photos(person(1), -person(1), person(2))) <= 1


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_an_identity_file_is_plain(tmp_path: Path) -> None:
    path = identity(person(1)).save(tmp_path / "me.safetensors")
    assert stat.S_ISREG(path.stat().st_mode)
    assert not path.stat().st_mode & stat.S_IXUSR
