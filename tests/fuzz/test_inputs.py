"""Whatever a file of somebody else holds, it is read, or refused in our words; nothing else happens."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fastface_cli.app.jobs import Job, JobError, prompts_file, read_jobs
from fastface_cli.errors import FastFaceError, UsageError
from fastface_cli.identity.identity import Identity
from fastface_cli.identity.photos import MAX_SIDE, open_photo
from fastface_cli.output import metadata, replay
from fastface_cli.output.images import plan_paths
from fastface_cli.recipe.files import load_recipe, recipes_folder
from fastface_cli.recipe.schema import Recipe
from fastface_cli.store.manifest import resolve

FUZZ = settings(
    max_examples=int(os.environ.get("FASTFACE_FUZZ", "20")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
"""Few examples in the suite; `make fuzz` asks for a thousand of each.

Where the environment names `CI`, Hypothesis draws the same examples every time.
"""

RECIPES = sorted(recipes_folder().glob("*.yaml"))
TEXT = st.text(max_size=30)
ANY_TEXT = st.text(st.characters(), max_size=30)
"""With lone surrogates, as JSON can hold them."""
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | ANY_TEXT
    | st.sampled_from(
        ["../../x", "/etc/passwd", "~", "hub:a/b", "\0", "9" * 5000, 10**400, "1e999", "!!python/none"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def ours(read: Callable[[], Any]) -> Any:
    """What was read, or None where it was refused in one of our errors; anything else fails the test."""
    try:
        return read()
    except FastFaceError as error:
        refused = error
    assert refused.message
    assert len(refused.message) < 20_000
    return None


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """A file with some bytes changed, inserted or lost, or cut short."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        data[at : at + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@st.composite
def grafted(draw: st.DrawFn, tree: Any) -> Any:
    """A copy of plain data with one value somewhere replaced, dropped or added."""
    tree = json.loads(json.dumps(tree))
    inner, depth = tree, draw(st.integers(0, 4))
    while isinstance(inner, dict | list) and inner:
        keys = sorted(inner) if isinstance(inner, dict) else list(range(len(inner)))
        key = draw(st.sampled_from(keys))
        if depth == 0 or not isinstance(inner[key], dict | list) or not inner[key]:
            if draw(st.booleans()):
                inner[key] = draw(VALUES)
            elif isinstance(inner, dict):
                inner[draw(TEXT)] = inner.pop(key)
            break
        inner, depth = inner[key], depth - 1
    return tree


class TestRecipes:
    @FUZZ
    @given(st.binary(max_size=400), st.sampled_from([".yaml", ".json"]))
    def test_bytes(self, place: Path, data: bytes, suffix: str) -> None:
        path = place / f"x{suffix}"
        path.write_bytes(data)
        ours(lambda: load_recipe(path))

    @FUZZ
    @given(st.data(), st.sampled_from(RECIPES))
    def test_damaged(self, place: Path, data: st.DataObject, recipe: Path) -> None:
        path = place / "x.yaml"
        path.write_bytes(data.draw(damaged(recipe.read_bytes())))
        self.sound(path)

    @FUZZ
    @given(st.data(), st.sampled_from(["hyper", "pocket-am1", "lcm-fastface-am2"]))
    def test_other_values(self, place: Path, data: st.DataObject, name: str) -> None:
        tree = data.draw(grafted(load_recipe(name).recipe.canonical()))
        path = place / "x.json"
        path.write_text(json.dumps(tree), encoding="utf-8")
        self.sound(path)

    @FUZZ
    @given(ANY_TEXT, ANY_TEXT)
    def test_overrides(self, field: str, value: str) -> None:
        ours(lambda: load_recipe("pocket", overrides=[f"{field}={value}"]))

    @FUZZ
    @given(st.data())
    def test_overrides_of_real_fields(self, data: st.DataObject) -> None:
        from fastface_cli.commands.completion import complete_field

        field = data.draw(st.sampled_from(complete_field("")))
        value = data.draw(VALUES.map(yaml.safe_dump) | ANY_TEXT)
        ours(lambda: load_recipe("pocket", overrides=[field + value]))

    @staticmethod
    def sound(path: Path) -> None:
        actual = ours(lambda: load_recipe(path))
        if actual is not None:
            again = Recipe.model_validate_json(json.dumps(actual.recipe.canonical()))
            assert again.digest() == actual.recipe.digest()

    @pytest.mark.parametrize(
        "tag",
        [
            "!!python/object/apply:os.system ['touch ran']",
            "!!python/object/new:os.system ['touch ran']",
            "!!python/name:os.system ''",
            "!!python/module:os ''",
            "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch ran']",
        ],
    )
    def test_no_code(self, tag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        path = tmp_path / "x.yaml"
        path.write_text(f"extends: pocket-fastface\nsummary: {tag}\n")
        with pytest.raises(FastFaceError, match="YAML tag"):
            load_recipe(path)
        with pytest.raises(FastFaceError, match="YAML tag"):
            load_recipe("pocket", overrides=[f"guidance.text={tag}"])
        assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def good(person: Identity, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An identity file."""
    return person.save(tmp_path_factory.mktemp("good") / "x.safetensors").read_bytes()


class TestIdentities:
    @FUZZ
    @given(st.binary(max_size=300))
    def test_bytes(self, place: Path, data: bytes) -> None:
        path = place / "x.safetensors"
        path.write_bytes(data)
        assert ours(lambda: Identity.load(path)) is None

    @FUZZ
    @given(st.data())
    def test_damaged(self, place: Path, good: bytes, data: st.DataObject) -> None:
        path = place / "x.safetensors"
        head = int.from_bytes(good[:8], "little") + 8
        # Damage to the header is what matters; most bytes are pixels.
        path.write_bytes(data.draw(damaged(good[:head])) + good[head:])
        actual = ours(lambda: Identity.load(path))
        if actual is not None:
            assert abs(float(np.linalg.norm(actual.mean())) - 1) < 1e-5

    @FUZZ
    @given(st.data())
    def test_headers(self, place: Path, good: bytes, data: st.DataObject) -> None:
        """Shapes, types and offsets that somebody made up."""
        size = int.from_bytes(good[:8], "little")
        header = json.loads(good[8 : 8 + size])
        changed = json.dumps(data.draw(grafted(header))).encode()
        length = data.draw(st.just(len(changed)) | st.integers(0, 2**64 - 1))
        path = place / "x.safetensors"
        path.write_bytes(length.to_bytes(8, "little") + changed + good[8 + size :])
        ours(lambda: Identity.load(path))


class TestLines:
    @FUZZ
    @given(st.lists(st.binary(max_size=60) | VALUES.map(lambda v: json.dumps(v).encode()), max_size=5))
    def test_jobs(self, place: Path, lines: list[bytes]) -> None:
        path = place / "jobs.jsonl"
        path.write_bytes(b"\n".join(lines))
        for job in read_jobs(str(path)):
            assert isinstance(job, Job | JobError)

    @FUZZ
    @given(st.dictionaries(st.sampled_from(sorted(Job.model_fields)), VALUES, max_size=4))
    def test_jobs_of_real_fields(self, place: Path, fields: dict[str, Any]) -> None:
        path = place / "jobs.jsonl"
        path.write_text(json.dumps(fields), encoding="utf-8")
        for job in read_jobs(str(path)):
            if isinstance(job, Job):
                ours(lambda overrides=job.set: load_recipe("pocket", overrides=overrides))

    @FUZZ
    @given(st.binary(max_size=200))
    def test_prompts(self, place: Path, data: bytes) -> None:
        path = place / "prompts.txt"
        path.write_bytes(data)
        actual = ours(lambda: prompts_file(path))
        assert actual is None or all(prompt.strip() == prompt != "" for prompt in actual)


class TestManifests:
    @FUZZ
    @given(st.lists(st.binary(max_size=60) | VALUES.map(lambda v: json.dumps(v).encode()), max_size=4))
    def test_lines(self, place: Path, lines: list[bytes]) -> None:
        self.read(place, b"\n".join(lines))

    @FUZZ
    @given(
        st.dictionaries(st.sampled_from(["identity", "photos", "held_out", "light"]), VALUES, max_size=4),
        st.booleans(),
    )
    def test_real_fields(self, place: Path, fields: dict[str, Any], whole: bool) -> None:
        if whole:
            fields = {"photos": ["a.jpg"], **fields}
        self.read(place, json.dumps(fields).encode())

    @staticmethod
    def read(place: Path, data: bytes) -> None:
        from fastface_cli.evaluation.dataset import load_dataset

        path = place / "people.jsonl"
        path.write_bytes(data)
        (place / "prompts.txt").write_text("a prompt\n")
        actual = ours(lambda: load_dataset(path))
        for subject in actual.subjects if actual is not None else ():
            folder = (place / "run" / subject.name).resolve()
            assert folder.parent == (place / "run").resolve(), "a person's folder lies in the run"


class TestPictures:
    @staticmethod
    def encoded(kind: str) -> bytes:
        pixels = np.random.default_rng(1).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        stream = io.BytesIO()
        image = Image.fromarray(pixels)
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(stream, kind, exif=exif) if kind != "GIF" else image.save(stream, kind)
        return stream.getvalue()

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF"])
    @FUZZ
    @given(data=st.data())
    def test_damaged(self, kind: str, data: st.DataObject) -> None:
        content = data.draw(damaged(self.encoded(kind)))
        photo = ours(lambda: open_photo(content))
        assert photo is None or (photo.image.mode == "RGB" and max(photo.image.size) <= MAX_SIDE)

    @FUZZ
    @given(st.binary(max_size=300))
    def test_bytes(self, data: bytes) -> None:
        ours(lambda: open_photo(data))


class TestReplay:
    @staticmethod
    def picture(text: dict[str, str]) -> bytes:
        info = PngInfo()
        for keyword, value in text.items():
            info.add_itxt(keyword, value, zip=True)
        stream = io.BytesIO()
        Image.new("RGB", (8, 8)).save(stream, "PNG", pnginfo=info)
        return stream.getvalue()

    @staticmethod
    def stored() -> dict[str, Any]:
        text = metadata.describe(
            metadata.Provenance(
                recipe=load_recipe("pocket").recipe,
                prompt="a woman",
                negative_prompt=None,
                seed=1,
                adapter_scale=0.8,
                identity_digest="ab" * 32,
                unet_samples=4,
                versions=metadata.installed_versions(),
                best_of=metadata.BestOf(count=2, first_seed=1, judge="dlib", likeness=0.4, prompt=None),
            )
        )
        data: dict[str, Any] = json.loads(text[metadata.KEYWORD])
        return data

    @FUZZ
    @given(st.data())
    def test_other_values(self, place: Path, data: st.DataObject) -> None:
        path = place / "x.png"
        changed = json.dumps(data.draw(grafted(self.stored())))
        path.write_bytes(self.picture({metadata.KEYWORD: changed}))
        actual = ours(lambda: replay.read(path))
        if actual is not None:
            for role, reference in actual.recipe.references().items():
                # A file of this machine is never named by a picture.
                if isinstance(reference, str) and reference.startswith("hub:"):
                    artifact = ours(partial(resolve, reference))
                    assert artifact is None or artifact.local is None, role
                else:
                    assert not isinstance(reference, str) or os.path.sep not in reference, role

    @FUZZ
    @given(st.data())
    def test_damaged(self, place: Path, data: st.DataObject) -> None:
        path = place / "x.png"
        path.write_bytes(data.draw(damaged(self.picture({metadata.KEYWORD: json.dumps(self.stored())}))))
        ours(lambda: replay.read(path))


class TestNames:
    """What ends up in a file name: prompts, recipe names, templates."""

    @FUZZ
    @given(
        ANY_TEXT | st.sampled_from(["../x", "/etc/x", "..", ".", "a/b", "a\\b", "C:\\x", "con", "\0"]), TEXT
    )
    def test_fields_stay_in_the_folder(self, place: Path, prompt: str, recipe: str) -> None:
        folder = place / "out"
        for template in ("{prompt}.png", "{recipe}/{prompt}.png", "{prompt}{recipe}", "{recipe}-{seed}.png"):
            fields = [{"prompt": prompt, "recipe": recipe, "seed": 1, "scale": 0.8}]
            paths = ours(
                lambda output=f"{folder}/{template}", fields=fields: plan_paths(
                    output, count=1, fields=fields, force=False
                )
            )
            for path in paths or ():
                assert Path(os.path.abspath(path)).is_relative_to(folder)

    @FUZZ
    @given(TEXT)
    def test_templates(self, place: Path, template: str) -> None:
        fields = [{"prompt": "a", "recipe": "r", "seed": seed, "scale": 0.8} for seed in (1, 2)]
        try:
            paths = plan_paths(f"{place}/out/{template}", count=2, fields=fields, force=False)
        except UsageError:
            return
        assert len({os.path.abspath(path) for path in paths}) == 2
