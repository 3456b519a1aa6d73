"""Metadata of PNGs, and reading it back."""

from __future__ import annotations

import json
import re
import struct
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from fastface_cli.errors import UsageError
from fastface_cli.files import content_mark
from fastface_cli.output import metadata
from fastface_cli.output.images import write_image
from fastface_cli.output.metadata import Provenance, describe, installed_versions
from fastface_cli.output.replay import parse, read
from fastface_cli.recipe.files import load_recipe
from fastface_cli.recipe.schema import Recipe

DIGEST = "ab" * 32
HUB = {"repo": "someone/sdxl", "commit": "0" * 40, "file": "unet/x.safetensors"}


def recipe(**model: Any) -> Recipe:
    data = {
        "name": "hyper-fastface",
        "model": {
            "base": "sdxl-base",
            "unet": "sdxl-base-unet",
            "distillation": {4: "hyper-sdxl-4-step-lora", 8: "hyper-sdxl-8-step-lora"},
            "vae": HUB,
            "adapter": "ip-adapter-faceid-plusv2-sdxl",
            "image_encoder": "ip-adapter-image-encoder",
            "face": "buffalo_l",
            "scheduler": {"kind": "ddim", "spacing": "trailing"},
            **model,
        },
        "guidance": {"identity": [1.0, 1.5, 1.5, 1.0], "text": [1.0, 3.0, 3.0, 1.0], "rescale": 0.75},
        "attention": {
            "transforms": ["scale", {"kind": "power", "p": {"down": [1.3, 1.0], "up": 1e-6}}],
            "blend": {},
        },
    }
    return Recipe.model_validate(data)


def run(original: Recipe | None = None, **changes: Any) -> dict[str, str]:
    arguments: dict[str, Any] = {
        "prompt": "an astronaut",
        "negative_prompt": None,
        "seed": 7,
        "adapter_scale": 0.8,
        "identity_digest": DIGEST,
        "unet_samples": 10,
        "versions": installed_versions(),
    }
    return describe(Provenance(recipe=original or recipe(), **{**arguments, **changes}))


def written(tmp_path: Path, text: dict[str, str] | None) -> Path:
    return write_image(Image.new("RGB", (8, 8)), tmp_path / "x.png", text=text, force=True)


def again(tmp_path: Path, text: dict[str, str] | None) -> Provenance:
    return read(written(tmp_path, text))


def stored(**changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(run()["fastface"])
    return {**data, **changes}


# What stable-diffusion-webui and its viewers do with `parameters`: the last line holds the pairs.
PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def as_viewers_read(text: str) -> tuple[str, str, dict[str, str]]:
    *lines, last = text.strip().split("\n")
    assert len(PAIR.findall(last)) >= 3
    split = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    negative = "\n".join(lines[split:]).removeprefix("Negative prompt:").strip()
    pairs = {k: json.loads(v) if v.startswith('"') else v for k, v in PAIR.findall(last)}
    return "\n".join(lines[:split]), negative, pairs


class TestRoundTrip:
    def test_everything_comes_back(self, tmp_path: Path) -> None:
        original = recipe()
        actual = again(tmp_path, run(original, negative_prompt="blurry", adapter_scale=0.55, seed=2**63 - 1))
        assert actual == Provenance(
            recipe=original,
            prompt="an astronaut",
            negative_prompt="blurry",
            seed=2**63 - 1,
            adapter_scale=0.55,
            identity_digest=DIGEST,
            unet_samples=10,
            versions=installed_versions(),
        )
        assert actual.recipe.digest() == original.digest()

    def test_as_run(self, tmp_path: Path) -> None:
        original = recipe().model_copy(update={"negative_prompt": "from the recipe", "seed": 1})
        actual = again(tmp_path, run(original, adapter_scale=0.3)).as_run()
        assert (actual.prompt, actual.negative_prompt, actual.seed) == ("an astronaut", None, 7)
        assert actual.adapter.scale == 0.3
        assert actual.adapter.lora_scale == original.adapter.lora_scale

    @pytest.mark.parametrize(
        "prompt", ["", "ein Mädchen", "東京 🦊", 'a "b", c: d\nNegative prompt: x\\', "\0\r\t\x7f"]
    )
    def test_prompts(self, tmp_path: Path, prompt: str) -> None:
        actual = again(tmp_path, run(prompt=prompt, negative_prompt=prompt))
        assert actual.prompt == actual.negative_prompt == prompt

    def test_bytes_that_are_no_text(self, tmp_path: Path) -> None:
        assert again(tmp_path, run(prompt="a\udcffb")).prompt == "a?b"

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 2**63 - 1), st.floats(-5, 5))
    def test_any_prompt_seed_and_scale(self, tmp_path: Path, prompt: str, seed: int, scale: float) -> None:
        actual = again(tmp_path, run(prompt=prompt, seed=seed, adapter_scale=scale))
        assert (actual.prompt, actual.seed, actual.adapter_scale) == (prompt, seed, scale)

    def test_text_behind_the_pixels(self, tmp_path: Path) -> None:
        data = written(tmp_path, None).read_bytes()
        body = b"fastface\0" + run()["fastface"].encode()
        moved = tmp_path / "moved.png"
        moved.write_bytes(data[:-12] + png_chunk(b"tEXt", body) + data[-12:])
        assert read(moved).seed == 7

    def test_the_shipped_recipes(self, tmp_path: Path) -> None:
        for name in ("hyper-fastface", "lightning-fastface-am2", "turbo-am2", "lcm-dcg", "pocket-fastface"):
            original = load_recipe(name).recipe
            actual = again(tmp_path, run(original))
            assert actual.recipe == original
            assert actual.local_parts == ()


class TestParameters:
    def test_as_viewers_read_it(self) -> None:
        text = run(prompt='a "cat", sat: there\non two lines', negative_prompt="blurry, ugly")["parameters"]
        prompt, negative, pairs = as_viewers_read(text)
        assert prompt == 'a "cat", sat: there\non two lines'
        assert negative == "blurry, ugly"
        assert pairs == {
            "Steps": "4",
            "Sampler": "DDIM trailing",
            "Seed": "7",
            "Size": "1024x1024",
            "Model": "hyper-fastface",
            "Identity guidance": "1, 1.5, 1.5, 1",
            "Text guidance": "1, 3, 3, 1",
            "Adapter scale": "0.8",
            "Identity": "abababababab",
            "Version": f"fastface {metadata.__version__}",
        }

    def test_ordinary_guidance_has_its_number(self) -> None:
        def guided(**guidance: Any) -> str:
            data = {**recipe().canonical(), "guidance": guidance}
            return run(Recipe.model_validate_json(json.dumps(data)))["parameters"]

        assert as_viewers_read(guided(identity=5.0, text=5.0))[2]["CFG scale"] == "5"
        pairs = as_viewers_read(guided(identity={"function": "cosine", "scale": 2.0, "inverse": True}))[2]
        assert pairs["Identity guidance"] == "inverse cosine 2"
        assert "CFG scale" not in pairs

    def test_control_characters_stay_out(self) -> None:
        text = run(prompt="a\0b\rc\x1bd")["parameters"]
        assert all(c == "\n" or ord(c) >= 32 for c in text)

    def test_chunk_types(self, tmp_path: Path) -> None:
        with Image.open(written(tmp_path, run(prompt="東京"))) as image:
            assert isinstance(image.info["parameters"], PngImagePlugin.iTXt)
            assert image.info["parameters"].startswith("東京\n")
            assert not isinstance(image.info["fastface"], PngImagePlugin.iTXt)
        with Image.open(written(tmp_path, run())) as image:
            assert not isinstance(image.info["parameters"], PngImagePlugin.iTXt)

    def test_marked_as_generated(self, tmp_path: Path) -> None:
        with Image.open(written(tmp_path, run(versions={"fastface": '1 "<&'}))) as image:
            packet = image.info["xmp"].decode()
        root = ET.fromstring(re.sub(r"<\?xpacket[^>]*\?>", "", packet))
        attributes = {
            key.rsplit("}", 1)[-1]: value for node in root.iter() for key, value in node.attrib.items()
        }
        assert attributes["DigitalSourceType"].endswith("/trainedAlgorithmicMedia")
        assert attributes["CreatorTool"] == 'fastface 1 "<&'


class TestPrivacy:
    def test_no_path_leaves(self, tmp_path: Path) -> None:
        folder = tmp_path / "secret-folder"
        folder.mkdir()
        (folder / "mine.safetensors").write_bytes(b"weights")
        original = recipe(
            base=str(folder),
            unet={4: str(folder / "mine.safetensors"), 8: "~/secret-folder/eight.safetensors"},
            adapter="C:\\secret-folder\\adapter.bin",
            loras=[{"file": "../secret-folder/style.safetensors"}, {"file": "./secret-folder/b.safetensors"}],
            scheduler={"kind": "ddim", "config": str(folder / "scheduler")},
        )
        text = run(original.model_copy(update={"name": f"{folder}/my.yaml"}))
        whole = "".join(text.values())
        assert str(tmp_path) not in whole
        assert "secret-folder/" not in whole
        assert "secret-folder\\" not in whole

        actual = again(tmp_path, text)
        assert actual.recipe.name == "my.yaml"
        parts = {part.field: part for part in actual.local_parts}
        assert {field: part.name for field, part in parts.items()} == {
            "model.base": "secret-folder",
            "model.unet.4": "mine.safetensors",
            "model.adapter": "adapter.bin",
            "model.loras.0.file": "style.safetensors",
            "model.loras.1.file": "b.safetensors",
            "model.scheduler.config": "scheduler",
        }
        assert parts["model.unet.4"].mark == content_mark(folder / "mine.safetensors")
        assert parts["model.adapter"].mark is None
        assert actual.recipe.model.base == "local:secret-folder"

    def test_local_parts_must_be_given_again(self, tmp_path: Path) -> None:
        original = recipe(base="./dreams.safetensors", loras=[{"file": "./ink.safetensors", "scale": 0.5}])
        actual = again(tmp_path, run(original))
        with pytest.raises(UsageError, match=r"'dreams\.safetensors' as model\.base, 'ink") as caught:
            actual.require_local_parts(["model.vae"])
        assert caught.value.hint == "add --set model.base=PATH --set model.loras.0.file=PATH"
        with pytest.raises(UsageError, match=r"\('ink\.safetensors' as model\.loras\.0\.file\)"):
            actual.require_local_parts(["model.base"])
        actual.require_local_parts(["model.base", "model.loras"])
        actual.require_local_parts(["model"])

    def test_other_content_under_the_same_name_is_noticed(self, tmp_path: Path) -> None:
        base, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
        base.write_bytes(b"one")
        other.write_bytes(b"one")
        actual = again(tmp_path, run(recipe(base=str(base), vae="./never-seen.safetensors")))
        renewed = recipe(base=str(other), vae="./never-seen.safetensors")
        assert actual.changed_local_parts(renewed) == []
        other.write_bytes(b"two")
        assert [part.field for part in actual.changed_local_parts(renewed)] == ["model.base"]
        assert [part.field for part in actual.changed_local_parts(recipe())] == ["model.base"]

    def test_names_of_the_manifest_and_pinned_hub_files_stay(self, tmp_path: Path) -> None:
        original = recipe(base=f"hub:someone/sdxl@{'1' * 40}:x.safetensors")
        actual = again(tmp_path, run(original))
        assert actual.recipe == original
        assert actual.local_parts == ()


class TestContentMark:
    def test_tells_apart(self, tmp_path: Path) -> None:
        file = tmp_path / "a"
        marks = []
        for data in (b"", b"a", b"b", bytes(3_000_000), bytes(3_000_001), bytes(2_999_999) + b"x"):
            file.write_bytes(data)
            marks.append(content_mark(file))
        assert len(set(marks)) == 6
        assert None not in marks

    def test_does_not_depend_on_the_place(self, tmp_path: Path) -> None:
        for name in ("one", "two"):
            (tmp_path / name / "unet").mkdir(parents=True)
            (tmp_path / name / "unet" / "x").write_bytes(b"x")
        assert content_mark(tmp_path / "one") == content_mark(tmp_path / "two")
        (tmp_path / "two" / "unet" / "x").rename(tmp_path / "two" / "x")
        assert content_mark(tmp_path / "one") != content_mark(tmp_path / "two")

    def test_nothing_there(self, tmp_path: Path) -> None:
        assert content_mark(tmp_path / "nothing") is None
        assert content_mark(tmp_path) is None


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


class TestRefusals:
    def test_no_metadata(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="does not say how it was made") as caught:
            again(tmp_path, None)
        assert caught.value.exit_code == 2
        assert "--no-metadata" in (caught.value.hint or "")

    def test_other_files(self, tmp_path: Path) -> None:
        (tmp_path / "text.png").write_text("no picture")
        Image.new("RGB", (8, 8)).save(tmp_path / "gif.png", format="GIF")
        (tmp_path / "empty.png").touch()
        for name, words in (
            ("text.png", "not a PNG, JPEG or WebP"),
            ("gif.png", "not a PNG, JPEG or WebP"),
            ("empty.png", "not a PNG, JPEG or WebP"),
            ("missing.png", "there is no image"),
            ("", "is not a file"),
        ):
            with pytest.raises(UsageError, match=words):
                read(tmp_path / name)

    def test_cut_file(self, tmp_path: Path) -> None:
        data = written(tmp_path, None).read_bytes()
        for length in range(len(data)):
            (tmp_path / "cut.png").write_bytes(data[:length])
            with pytest.raises(UsageError):
                read(tmp_path / "cut.png")

    def test_newer_schema(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"newer fastface \(metadata schema 2") as caught:
            again(tmp_path, {"fastface": json.dumps(stored(schema=2, more="x"))})
        assert caught.value.hint == "upgrade fastface"

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"schema": None}, "schema"),
            ({"schema": True}, "schema"),
            ({"seed": -1}, "seed"),
            ({"seed": 2**70}, "seed"),
            ({"seed": "7"}, "seed"),
            ({"identity": "../x"}, "identity"),
            ({"other": 1}, "other"),
            ({"recipe": {}}, "model"),
            ({"recipe": []}, "recipe"),
            ({"adapter_scale": 1e999}, "adapter_scale"),
            ({"prompt": None}, "prompt"),
            ({"local_parts": []}, "local_parts"),
        ],
    )
    def test_malformed(self, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
        with pytest.raises(UsageError, match="is malformed") as caught:
            again(tmp_path, {"fastface": json.dumps(stored(**changes))})
        assert words in caught.value.message

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "null", "1", '"x"', "[" * 200_000, '{"a":' * 200_000, "9" * 5000]
    )
    def test_not_our_json(self, tmp_path: Path, text: str) -> None:
        with pytest.raises(UsageError, match=r"is malformed|does not say"):
            again(tmp_path, {"fastface": text})

    def test_a_image_cannot_name_a_local_file(self, tmp_path: Path) -> None:
        for reference in ("/etc/passwd", "~/.ssh/id_rsa", "x.safetensors", "C:\\x"):
            data = stored()
            data["recipe"]["model"]["adapter"] = reference
            with pytest.raises(UsageError, match="there is no model called"):
                again(tmp_path, {"fastface": json.dumps(data)})
        for hidden in (
            {"local": "/etc/passwd"},
            {"local": "..\\x"},
            {"local": ""},
            {"local": 3},
            {"local": ".."},
        ):
            data["recipe"]["model"]["adapter"] = hidden
            with pytest.raises(UsageError, match="without a plain name"):
                again(tmp_path, {"fastface": json.dumps(data)})

    def test_long_text(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="longer than the limit"):
            again(tmp_path, {"fastface": " " * (metadata.MAX_TEXT + 1)})
        with pytest.raises(UsageError, match="more than the limit"):
            run(prompt="x" * metadata.MAX_TEXT)

    def test_text_that_inflates(self, tmp_path: Path) -> None:
        data = written(tmp_path, None).read_bytes()
        bomb = zlib.compress(bytes(64 * 1024 * 1024), 9)
        for kind, body in ((b"zTXt", b"fastface\0\0" + bomb), (b"iTXt", b"fastface\0\1\0\0\0" + bomb)):
            for at in (33, len(data) - 12):
                (tmp_path / "bomb.png").write_bytes(data[:at] + png_chunk(kind, body) + data[at:])
                with pytest.raises(UsageError):
                    read(tmp_path / "bomb.png")

    def test_huge_canvas(self, tmp_path: Path) -> None:
        data = written(tmp_path, None).read_bytes()
        header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
        (tmp_path / "huge.png").write_bytes(data[:8] + png_chunk(b"IHDR", header) + data[33:])
        with pytest.raises(UsageError, match="cannot read"):
            read(tmp_path / "huge.png")


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["local", "mark", "repo", "kind", "4", "file", "x"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [at, *(place for key, child in items for place in places(child, (*at, key)))]


PLACES = places(stored())


class TestFuzz:
    @settings(max_examples=400, deadline=None)
    @given(st.sampled_from(PLACES), JUNK, st.sampled_from(["replace", "drop", "add"]))
    def test_changed_json(self, place: tuple[Any, ...], junk: Any, how: str) -> None:
        data: Any = stored()
        if not place:
            data = junk
        else:
            inner = data
            for key in place[:-1]:
                inner = inner[key]
            if how == "drop":
                del inner[place[-1]]
            elif how == "add" and isinstance(inner, dict):
                inner[f"{place[-1]}x"] = junk
            else:
                inner[place[-1]] = junk
        self.only_our_errors(json.dumps(data))

    @settings(max_examples=200, deadline=None)
    @given(st.text())
    def test_any_text(self, text: str) -> None:
        self.only_our_errors(text)

    @staticmethod
    def only_our_errors(text: str) -> None:
        message = refusal(lambda: parse(text, Path("x.png")))
        assert message is None or len(message) < 500

    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.data())
    def test_changed_bytes(self, tmp_path: Path, data: st.DataObject) -> None:
        path = tmp_path / "fuzz.png"
        good = written(tmp_path, run()).read_bytes()
        at = data.draw(st.integers(0, len(good) - 1))
        new = data.draw(st.binary(max_size=8))
        path.write_bytes(good[:at] + new + good[at + data.draw(st.integers(0, 8)) :])
        message = refusal(lambda: read(path))
        assert message is None or str(path) in message


def refusal(reading: Callable[[], Provenance]) -> str | None:
    """The message of a refusal, None if the image is accepted; any other exception fails the test."""
    try:
        reading()
    except UsageError as error:
        return error.message
    return None
