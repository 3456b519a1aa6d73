"""Photos and outputs as people have them: HEIC, photos on their side, JPEG and WebP, aspect ratios."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from fastface_cli import FastFace, cli
from fastface_cli.app.plan import plan_run
from fastface_cli.app.request import GenerateRequest, OutputPlan
from fastface_cli.errors import UsageError
from fastface_cli.identity.photos import open_photo
from fastface_cli.output.replay import read

PORTRAIT = Path(__file__).parents[2] / "examples" / "portrait.png"
RUN = ("generate", "--recipe", "pocket", "--prompt", "a smiling woman", "--seed", "3")


def fastface(*arguments: object) -> int:
    return cli.run([*map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp"])
def test_a_lossy_format_replays_to_the_same_pixels(folder: Path, suffix: str) -> None:
    first, again, original = folder / f"a{suffix}", folder / f"b{suffix}.png", folder / "original.png"
    assert fastface(*RUN, "--face", PORTRAIT, "-o", first) == 0
    assert Image.open(first).format == {".webp": "WEBP"}.get(suffix, "JPEG")
    assert read(first).prompt == "a smiling woman"
    assert b"trainedAlgorithmicMedia" in Image.open(first).info["xmp"]
    assert fastface("generate", "--from", first, "--face", PORTRAIT, "-o", again) == 0
    assert fastface(*RUN, "--face", PORTRAIT, "-o", original, "--force") == 0
    assert np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(original)))


def test_a_jpeg_without_metadata_cannot_be_replayed(folder: Path) -> None:
    assert fastface(*RUN, "--face", PORTRAIT, "-o", folder / "bare.jpg", "--no-metadata") == 0
    with pytest.raises(UsageError, match="does not say how it was made"):
        read(folder / "bare.jpg")


def test_metadata_that_a_jpeg_cannot_hold(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "a woman " * 12_000
    path = folder / "long.jpg"
    code = fastface("generate", "--recipe", "pocket", "--face", PORTRAIT, "-p", long, "-o", path)
    assert code == 2
    assert "write a PNG" in capsys.readouterr().err
    assert not path.exists()


def test_heic_is_read_upright(tmp_path: Path) -> None:
    pillow_heif.register_heif_opener()
    image = Image.open(PORTRAIT).convert("RGB")
    image.save(tmp_path / "me.heic", quality=95)
    photo = open_photo(tmp_path / "me.heic")
    assert (photo.image.mode, photo.image.size) == ("RGB", image.size)
    assert np.abs(np.asarray(photo.image, np.float32) - np.asarray(image, np.float32)).mean() < 6


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_photo_on_its_side_gives_the_same_person(turns: int, caplog: pytest.LogCaptureFixture) -> None:
    face = FastFace("pocket", device="cpu")
    upright = Image.open(PORTRAIT).convert("RGB")
    turned = upright.rotate(90 * turns, expand=True)
    similarity = face.identity(turned).mean() @ face.identity(upright).mean()
    assert similarity > 0.95
    assert f"rotated by {360 - 90 * turns} degrees" in caplog.text


@pytest.mark.parametrize(
    ("recipe", "aspect", "size"),
    [
        ("hyper", (3, 4), (896, 1152)),
        ("hyper", (16, 9), (1344, 768)),
        ("hyper", (1, 1), (1024, 1024)),
        ("pocket", (3, 4), (112, 144)),
    ],
)
def test_aspect_ratios_keep_the_area(recipe: str, aspect: tuple[int, int], size: tuple[int, int]) -> None:
    plan = plan_run(GenerateRequest(prompts=("a",), aspect=aspect, output=None), recipe, {})
    assert (plan.recipe.sampling.width, plan.recipe.sampling.height) == size


def test_too_long_aspect_ratios_are_refused() -> None:
    with pytest.raises(UsageError, match="too long"):
        plan_run(GenerateRequest(prompts=("a",), aspect=(9, 1), output=None), "hyper", {})


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(UsageError, match="a prompt is empty"):
        plan_run(GenerateRequest(prompts=("a", " "), output=None), "pocket", {})


def test_sweeps_are_named_by_what_varies(tmp_path: Path) -> None:
    request = GenerateRequest(
        prompts=("a",), seed=1, adapter_scales=(0.4, 0.8), output=OutputPlan(path=str(tmp_path / "new"))
    )
    names = plan_run(request, "pocket", {}).names
    assert names is not None
    assert [path.relative_to(tmp_path).as_posix() for path in names.first] == [
        "new/pocket-baseline-1-scale0.4.png",
        "new/pocket-baseline-1-scale0.8.png",
    ]


def test_an_identity_can_be_saved_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastface_cli.app.stack import ModelStack

    monkeypatch.setattr(ModelStack, "pipeline", None)  # no diffusion model is needed
    path = tmp_path / "me.safetensors"
    assert fastface("generate", "--recipe", "pocket", "--face", PORTRAIT, "--save-identity", path) == 0
    assert capsys.readouterr().out == f"{path}\n"
    assert path.exists()


def test_quiet_prints_paths_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "{seed}-{index}.png"
    assert fastface(*RUN, "--prompt", "a zebra", "--face", PORTRAIT, "-o", output, "-q") == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (f"{tmp_path / '3-1.png'}\n{tmp_path / '3-2.png'}\n", "")


@pytest.mark.parametrize("source", ["https://example.org/a.jpg", Path("https://example.org/a.jpg")])
def test_addresses_are_no_photos(source: str | Path) -> None:
    with pytest.raises(UsageError, match="an address on the web"):
        open_photo(source)


def test_adapter_scale_by_step(tmp_path: Path) -> None:
    """Zeros at every step equal a scale of 0; zeros at one step equal neither 0 nor the constant."""

    def pixels(value: str) -> np.ndarray:
        path = tmp_path / "x.png"
        code = fastface(*RUN, "--face", PORTRAIT, "-o", path, "--force", "--set", f"adapter.scale={value}")
        assert code == 0
        assert json.loads(Image.open(path).info["fastface"])["adapter_scale"] == json.loads(value)
        return np.asarray(Image.open(path))

    constant, none = pixels("0.8"), pixels("0")
    assert np.array_equal(pixels("[0.8, 0.8, 0.8, 0.8]"), constant)
    assert np.array_equal(pixels("[0, 0, 0, 0]"), none)
    late = pixels("[0, 0.8, 0.8, 0.8]")
    assert not np.array_equal(late, constant)
    assert not np.array_equal(late, none)


def test_identities_have_a_short_repr_and_an_image() -> None:
    from fastface_cli.identity.identity import random_identity

    identity = random_identity()
    assert repr(identity) == f"Identity(1 photo, {identity.digest()[:12]})"
    assert identity._repr_png_().startswith(b"\x89PNG")


def test_pocket_warns_about_unfamiliar_photos(caplog: pytest.LogCaptureFixture) -> None:
    import skimage.data

    face = FastFace("pocket", device="cpu")
    face.generate(face.identity(PORTRAIT), "a smiling woman", seed=1)
    assert "not trained with photos like this one" not in caplog.text
    stranger = face.identity(Image.fromarray(skimage.data.astronaut()))
    for _ in range(2):
        face.generate(stranger, "a smiling woman", seed=1)
    assert caplog.text.count("not trained with photos like this one") == 1
