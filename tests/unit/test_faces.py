"""InsightFace: face packs load from their folder, and a real photo becomes an identity."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.face_stand_ins import random_pack

import fastface_cli
from fastface_cli.errors import ModelUnavailableError, NoFaceError
from fastface_cli.identity.analyzer import InsightFaceAnalyzer, align, load_face_models
from fastface_cli.identity.identity import Identity, make_identity
from fastface_cli.identity.search import bgr, find_faces

POCKET = Path(fastface_cli.__file__).parent / "pocket" / "weights" / "face"


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_pack(tmp_path_factory.mktemp("packs") / "random pack")


@pytest.fixture(scope="module")
def analyzer(pack: Path) -> InsightFaceAnalyzer:
    return load_face_models(pack)


def picture(width: int = 320, height: int = 240) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


class TestRandomPack:
    def test_detects_and_embeds_as_insightface_does(self, pack: Path, analyzer: InsightFaceAnalyzer) -> None:
        from insightface.app import FaceAnalysis

        app = FaceAnalysis(name=str(pack), root=str(pack), providers=["CPUExecutionProvider"])
        app.prepare(ctx_id=0, det_size=(640, 640))
        expected = app.get(picture())
        actual = analyzer.detect(picture(), 640)
        assert len(actual) == len(expected) > 1
        for face, face_ in zip(actual, expected, strict=True):
            assert np.array_equal(face.box, face_.bbox)
            assert np.array_equal(face.key_points, face_.kps)
            assert face.score == face_.det_score
            embedding = analyzer.embed(picture(), face)
            assert embedding.dtype == np.float32
            assert np.array_equal(embedding, face_.normed_embedding)

    def test_other_sizes(self, analyzer: InsightFaceAnalyzer) -> None:
        assert all(analyzer.detect(picture(), size) for size in (1280, 448, 320))

    def test_crop_is_insightfaces(self, analyzer: InsightFaceAnalyzer) -> None:
        from insightface.utils.face_align import norm_crop

        face = find_faces(picture(), analyzer)[0]
        crop = align(picture(), face)
        assert (crop.shape, crop.dtype) == ((224, 224, 3), np.uint8)
        assert np.array_equal(crop, norm_crop(picture(), face.key_points, image_size=224))

    def test_identity_of_a_random_pack(self, analyzer: InsightFaceAnalyzer, tmp_path: Path) -> None:
        saved = make_identity([Image.fromarray(picture())], analyzer)
        saved.save(tmp_path / "me.safetensors")
        assert Identity.load(tmp_path / "me.safetensors").digest() == saved.digest()

    @pytest.mark.filterwarnings("error")
    def test_silent(self, pack: Path, capfd: pytest.CaptureFixture[str]) -> None:
        loaded = load_face_models(pack)
        loaded.embed(picture(), loaded.detect(picture(), 640)[0])
        align(picture(), loaded.detect(picture(), 640)[0])
        assert capfd.readouterr() == ("", "")

    def test_blind_detector(self, tmp_path: Path) -> None:
        blind = load_face_models(random_pack(tmp_path / "blind", certainty=-8.0))
        for size in ((1, 1), (10000, 10), (10, 10000)):
            with pytest.raises(NoFaceError):
                make_identity([Image.new("RGB", size)], blind)

    def test_home_and_network_stay_untouched(self, pack: Path, tmp_path: Path) -> None:
        """In a fresh process with an empty home folder and no network, nothing is written anywhere."""
        program = (
            "import socket, sys, pathlib\n"
            "def refuse(*a, **k): raise SystemExit('network')\n"
            "socket.socket.connect = refuse\n"
            "import numpy as np\n"
            "from fastface_cli.identity.analyzer import load_face_models\n"
            "analyzer = load_face_models(pathlib.Path(sys.argv[1]))\n"
            "analyzer.detect(np.zeros((99, 99, 3), np.uint8), 320)\n"
        )
        before = sorted(pack.iterdir())
        environment = {key: value for key, value in os.environ.items() if not key.startswith("XDG_")}
        environment |= {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= {"PYTHONPATH": str(Path(fastface_cli.__file__).parents[1])}
        done = subprocess.run(
            [sys.executable, "-c", program, str(pack)],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert list(tmp_path.iterdir()) == []
        assert sorted(pack.iterdir()) == before


class TestProviders:
    def test_cpu(self, analyzer: InsightFaceAnalyzer) -> None:
        assert analyzer.provider == "CPUExecutionProvider"
        assert analyzer.note is None

    def test_cuda_that_is_not_there_is_reported(self, pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import onnxruntime

        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
        loaded = load_face_models(pack, device="cuda:1")
        assert loaded.provider == "CPUExecutionProvider"
        assert "onnxruntime-gpu" in str(loaded.note)

    def test_cuda_comes_first_where_it_is_offered(self, pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import insightface.app
        import onnxruntime

        asked: list[Any] = []
        true = insightface.app.FaceAnalysis

        def recorded(*args: Any, providers: list[Any], **options: Any) -> Any:
            asked.extend(providers)
            return true(*args, providers=["CPUExecutionProvider"], **options)

        offered = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: offered)
        monkeypatch.setattr(insightface.app, "FaceAnalysis", recorded)
        loaded = load_face_models(pack, device="cuda:1")
        assert asked == [("CUDAExecutionProvider", {"device_id": 1}), "CPUExecutionProvider"]
        assert loaded.note is not None  # offered, but the session did not get it
        asked.clear()
        assert load_face_models(pack, device="mps").note is None
        assert asked == ["CPUExecutionProvider"]


class TestBrokenPacks:
    def refused(self, folder: Path) -> ModelUnavailableError:
        with pytest.raises(ModelUnavailableError) as caught:
            load_face_models(folder)
        assert caught.value.exit_code == 3
        assert str(folder) in caught.value.message
        assert "\n" not in caught.value.message
        return caught.value

    def test_missing_and_empty(self, tmp_path: Path) -> None:
        assert "no .onnx files" in self.refused(tmp_path / "none").message
        assert "no .onnx files" in self.refused(tmp_path).message

    @pytest.mark.parametrize(("name", "words"), [("det", "no face detector"), ("rec", "no face recognizer")])
    def test_half_a_pack(self, tmp_path: Path, name: str, words: str) -> None:
        (random_pack(tmp_path / "half") / f"{name}.onnx").unlink()
        assert words in self.refused(tmp_path / "half").message

    @pytest.mark.parametrize("content", [b"", b"not onnx", b"\0" * 1000])
    def test_damaged(self, tmp_path: Path, content: bytes) -> None:
        (random_pack(tmp_path / "bad") / "det.onnx").write_bytes(content)
        self.refused(tmp_path / "bad")

    def test_truncated(self, tmp_path: Path) -> None:
        path = random_pack(tmp_path / "bad") / "rec.onnx"
        path.write_bytes(path.read_bytes()[:-1000])
        self.refused(tmp_path / "bad")

    def test_embedding_of_another_length(self, tmp_path: Path) -> None:
        loaded = load_face_models(random_pack(tmp_path / "short", width=128))
        with pytest.raises(ModelUnavailableError, match="128 numbers"):
            loaded.embed(picture(), loaded.detect(picture(), 640)[0])

    def test_detector_without_key_points(self, tmp_path: Path) -> None:
        loaded = load_face_models(random_pack(tmp_path / "plain", points=False))
        with pytest.raises(ModelUnavailableError, match="key points"):
            loaded.detect(picture(), 640)


@pytest.fixture(scope="module")
def pocket() -> InsightFaceAnalyzer:
    return load_face_models(POCKET)


@pytest.fixture(scope="module")
def group() -> Image.Image:
    from insightface.data import get_image

    return Image.fromarray(np.ascontiguousarray(get_image("t1")[:, :, ::-1]))


@pytest.mark.skipif(not (POCKET / "rec_pocket.onnx").exists(), reason="the pocket's face models are not here")
class TestPocket:
    """The models that ship in the wheel on a real photograph of six people."""

    def test_several_people(self, pocket: InsightFaceAnalyzer, group: Image.Image) -> None:
        remarks: list[str] = []
        make_identity([group], pocket, log=remarks.append)
        count = len(find_faces(bgr(group), pocket))
        assert 4 <= count <= 8
        assert f"{count} faces" in remarks[0]
        people = np.stack([make_identity([group], pocket, face_index=i).mean() for i in range(4)])
        assert (people @ people.T)[np.triu_indices(4, 1)].max() < 0.9

    def test_each_of_them_cut_out_tightly(self, pocket: InsightFaceAnalyzer, group: Image.Image) -> None:
        for face in find_faces(bgr(group), pocket)[:4]:
            left, top, right, bottom = (round(side) for side in face.box)
            tight = group.crop((left, top, right, bottom))
            width, height = find_faces(bgr(tight), pocket)[0].size
            assert width * height > 0.4 * tight.width * tight.height
            assert make_identity([tight], pocket).id_embedding.shape == (1, 512)

    def test_upright_by_exif(self, pocket: InsightFaceAnalyzer, group: Image.Image) -> None:
        upright = make_identity([group], pocket).mean()
        lying = group.transpose(Image.Transpose.ROTATE_90)
        lying.getexif()[0x0112] = 6  # turn it clockwise to see it
        assert np.array_equal(make_identity([lying], pocket).mean(), upright)
