"""Data sets in their three forms, degraded references, people, and pictures of other programs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import eval_stand_ins as stand_in
from support.face_stand_ins import SquareAnalyzer, drawn

from fastface_cli import FastFace
from fastface_cli.errors import NoFaceError, UsageError
from fastface_cli.evaluation.dataset import Subject, load_dataset
from fastface_cli.evaluation.foreign import adopt, read_order
from fastface_cli.evaluation.people import (
    Features,
    People,
    degraded_path,
    held_out_path,
    identity_key,
    reference_path,
)
from fastface_cli.evaluation.runner import joined, score
from fastface_cli.evaluation.runs import Run
from fastface_cli.evaluation.stress import SMALL, STRESSES, degrade, parse_stresses
from fastface_cli.recipe.files import load_recipe

PORTRAIT = Path(__file__).parents[2] / "examples" / "portrait.png"


@pytest.fixture
def published(tmp_path):
    folder = tmp_path / "published"
    (folder / "id_photos").mkdir(parents=True)
    for name in ("b", "a", "C"):
        drawn((64, 64), (16, 16, 32, ord(name))).save(folder / "id_photos" / f"{name}.png")
    (folder / "prompts.txt").write_text("Line drawing; a Man\n\n a Woman \n")
    (folder / "prompts_nostyle.txt").write_text("a Woman\n")
    (folder / "prompts_style.txt").write_text("Line drawing; a Man\n")
    return folder


def test_the_published_layout(published):
    actual = load_dataset(published)
    assert (actual.name, [subject.name for subject in actual.subjects]) == ("published", ["C", "a", "b"])
    assert actual.subjects[1].photos == (published / "id_photos" / "a.png",)
    assert actual.prompts == ("Line drawing; a Man", "a Woman")
    assert load_dataset(published, split="realistic").prompts == ("a Woman",)
    assert load_dataset(published, split="style", lower=True).prompts == ("line drawing; a man",)


def test_a_folder_of_photos_and_a_prompts_file(published, tmp_path):
    (tmp_path / "mine.txt").write_text("one\ntwo\n")
    (published / "id_photos" / "notes.md").write_text("no photo")
    actual = load_dataset(published / "id_photos", prompts=tmp_path / "mine.txt")
    assert ([subject.name for subject in actual.subjects], actual.prompts) == (
        ["C", "a", "b"],
        ("one", "two"),
    )


def test_a_manifest(tmp_path):
    lines = [
        {"identity": "zoe", "photos": ["z1.png", "z2.png"], "held_out": "z3.png", "age": 31, "glasses": True},
        {"photos": "x/ann.jpg", "light": "dim"},
    ]
    path = tmp_path / "people.jsonl"
    path.write_text("# people\n\n" + "\n".join(map(json.dumps, lines)))
    (tmp_path / "prompts.txt").write_text("p\n")
    actual = load_dataset(path)
    assert actual.subjects == (
        Subject("ann", (tmp_path / "x/ann.jpg",), None, {"light": "dim"}),
        Subject(
            "zoe",
            (tmp_path / "z1.png", tmp_path / "z2.png"),
            tmp_path / "z3.png",
            {"age": "31", "glasses": "true"},
        ),
    )


def test_the_hash_is_of_everything_that_decides_a_number(published):
    before = load_dataset(published).hash
    assert load_dataset(published).hash == before
    assert load_dataset(published, split="style").hash != before
    assert load_dataset(published, lower=True).hash != before
    with (published / "id_photos" / "a.png").open("ab") as photo:
        photo.write(b" ")
    changed = load_dataset(published).hash
    (published / "id_photos" / "a.png").rename(published / "id_photos" / "d.png")
    assert len({before, changed, load_dataset(published).hash}) == 3


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "has no people"),
        ("{", "people.jsonl:1: invalid JSON"),
        ("[]", "people.jsonl:1: not a JSON object"),
        ('{"identity": "a"}', "'photos' must be one or several paths"),
        ('{"photos": []}', "'photos' must be one or several paths"),
        ('{"photos": ["a.png"], "identity": 3}', "'identity' and 'held_out' must be strings"),
        ('{"photos": ["a.png"], "light": ["x"]}', "the attribute 'light' must be a string or a number"),
        ('{"photos": "a.png"}\n{"photos": "b/A.png"}', "two people are called 'a' or 'A'|'A' or 'a'"),
        ('{"photos": "a.png", "identity": "../x"}', "'../x' is not a valid name"),
        ('{"photos": "a.png", "identity": ".."}', "is not a valid name"),
        ('{"photos": "a.png", "identity": "ann."}', "'ann.' is not a valid name"),
        ('{"photos": "a.png", "identity": "ann "}', "'ann ' is not a valid name"),
        ('{"photos": "a.png", "identity": "\\udcff"}', "is not a valid name"),
        ('{"photos": "ann+blur.png"}', r"'ann\+blur' is not a valid name"),
        ('{"photos": "ann+held-out.png"}', "is not a valid name"),
        ('{"photos": "caf\\u00e9.png"}\n{"photos": "cafe\\u0301.png"}', "two people are called"),
    ],
)
def test_manifest_errors_name_the_line(tmp_path, lines, message):
    (tmp_path / "people.jsonl").write_text(lines)
    (tmp_path / "prompts.txt").write_text("p\n")
    with pytest.raises(UsageError, match=message):
        load_dataset(tmp_path / "people.jsonl")


def test_photos_of_phones_are_found_in_a_folder(tmp_path):
    for name in ("ann.heic", "ben.HEIF", "cai.avif", "notes.txt"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "prompts.txt").write_text("p\n")
    assert [subject.name for subject in load_dataset(tmp_path).subjects] == ["ann", "ben", "cai"]


def test_names_of_any_language_are_names(published):
    for name in ("Ω mega", "李雷", "a+b", "o'Neil #1"):
        (published / "id_photos" / "a.png").replace(published / "id_photos" / f"{name}.png")
        assert name in [subject.name for subject in load_dataset(published).subjects]
        (published / "id_photos" / f"{name}.png").replace(published / "id_photos" / "a.png")


def test_a_changed_photo_changes_its_own_persons_mark(published):
    before = load_dataset(published).marks
    drawn((64, 64), (16, 16, 32, 7)).save(published / "id_photos" / "b.png")
    after = load_dataset(published).marks
    assert [name for name in before if before[name] != after[name]] == ["b"]


def test_missing_parts_are_named(published, tmp_path):
    with pytest.raises(UsageError, match="data set not found"):
        load_dataset(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no photos in"):
        load_dataset(tmp_path / "empty")
    with pytest.raises(UsageError, match=r"has no prompts\.txt"):
        load_dataset(published / "id_photos")
    with pytest.raises(UsageError, match="--split selects"):
        load_dataset(published, prompts=published / "prompts.txt", split="style")


# ---------------------------------------------------------------------------------------------- stress

FACE = (20.0, 20.0, 84.0, 84.0)


@pytest.fixture(scope="module")
def noisy():
    pixels = np.random.default_rng(0).integers(0, 256, (104, 104, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((104, 104))


@pytest.mark.parametrize("stress", STRESSES)
def test_stress_is_the_same_every_time(noisy, stress):
    before = noisy.tobytes()
    result = degrade(noisy, stress, "anna", FACE)
    assert result.tobytes() == degrade(noisy, stress, "anna", FACE).tobytes() != before
    assert noisy.tobytes() == before
    assert result.mode == "RGB"
    assert result.size == ((52, 52) if stress == "small" else noisy.size)


def test_what_stress_does(noisy):
    grey = np.asarray(Image.new("RGB", (104, 104), (128, 128, 128)))
    dark = np.asarray(degrade(Image.fromarray(grey), "lowlight", "anna", FACE), np.float32)
    assert abs(dark.mean() - 128 * 0.15 ** (1 / 2.2)) < 0.5
    assert abs(dark.std() - 6) < 0.3
    flat = np.asarray(degrade(noisy, "blur", "anna", FACE), np.float32)
    assert flat.std() < np.asarray(noisy, np.float32).std() / 5
    changed = np.asarray(degrade(noisy, "occlusion", "anna", FACE)) != np.asarray(noisy)
    rows, columns = np.nonzero(changed.any(axis=2))
    assert (columns.min(), columns.max()) == (20, 83)
    assert 24 <= rows.max() - rows.min() + 1 <= 26  # two fifths of 64
    places = {
        np.asarray(degrade(noisy, "occlusion", name, FACE))[45].tobytes()
        for name in ("a", "b", "c", "d", "e")
    }
    assert len(places) == 2  # the eyes of some, the mouth of others
    assert degrade(noisy, "small", "anna", (0, 0, 64, 64)).width / 104 == SMALL / 64
    assert degrade(noisy, "small", "anna", (0, 0, 20, 20)).size == noisy.size


def test_stresses_are_read_from_a_list():
    assert parse_stresses(" jpeg,blur, jpeg") == ("blur", "jpeg")
    assert parse_stresses("") == ()
    with pytest.raises(UsageError, match="unknown stress 'blurr'") as caught:
        parse_stresses("blurr")
    assert caught.value.hint == "did you mean 'blur'?"


# ---------------------------------------------------------------------------------------------- people


@pytest.fixture
def people(tmp_path):
    analyzer, messages = SquareAnalyzer(), []
    run_people = People(tmp_path / "run", {"pack": lambda: analyzer}, messages.append)
    return run_people, analyzer, messages


def test_a_person_is_measured_once_in_the_life_of_a_run(published, tmp_path, people):
    run_people, analyzer, _ = people
    subject = load_dataset(published).subjects[1]
    first = run_people.identity(subject, None, "pack")
    looked = len(analyzer.asked)
    assert looked > 0
    again = People(tmp_path / "run", {"pack": lambda: analyzer}, print).identity(subject, None, "pack")
    assert again.digest() == first.digest()
    assert len(analyzer.asked) == looked


def test_identities_hold_what_the_adapters_of_the_run_read(published, tmp_path, people):
    """A file of an earlier run that lacks the features is computed again."""
    plain, analyzer, messages = people
    subject = load_dataset(published).subjects[1]
    assert plain.identity(subject, None, "pack").features == {}
    names = ("key_points", "photo_size")
    richer = People(tmp_path / "run", {"pack": lambda: analyzer}, messages.append, {"pack": Features(names)})
    assert set(richer.identity(subject, None, "pack").features) == set(names)


def test_identities_belong_to_all_models_that_read_photos():
    assert identity_key(load_recipe("hyper-fastface").recipe) == "buffalo_l"
    assert identity_key(load_recipe("hyper-instantid").recipe) == "antelopev2"
    parts = identity_key(load_recipe("hyper-pulid").recipe)
    assert parts == "antelopev2+face-parsing-resnet18+eva02-clip-l-336"


def test_degraded_person_is_a_separate_person(published, tmp_path, people):
    run_people, _, _ = people
    subject = load_dataset(published).subjects[1]
    clean, degraded = (run_people.identity(subject, stress, "pack") for stress in (None, "occlusion"))
    assert clean.digest() != degraded.digest()
    kept = Image.open(tmp_path / "run" / degraded_path(subject, "occlusion"))
    assert (kept.size, kept.tobytes() == Image.open(subject.photos[0]).tobytes()) == ((64, 64), False)
    with pytest.raises(NoFaceError, match="no face found in the photo"):
        run_people.identity(subject, "lowlight", "pack")


def test_a_photo_on_its_side_is_degraded_upright(tmp_path):
    upright = Image.open(PORTRAIT).convert("RGB")
    upright.rotate(90, expand=True).save(tmp_path / "side.png")
    run_people = People(tmp_path / "run", {"pack": lambda: FastFace("pocket", device="cpu").analyzer}, print)
    run_people.identity(Subject("me", (tmp_path / "side.png",)), "occlusion", "pack")
    degraded = Image.open(tmp_path / "run" / degraded_path(Subject("me", ()), "occlusion"))
    changed = np.abs(np.asarray(degraded, float) - np.asarray(upright, float)).sum(2) > 0
    rows, columns = np.nonzero(changed)
    assert np.ptp(columns) > np.ptp(rows), "the band lies across the upright face"
    assert changed.mean() < 0.2


def test_photos_are_unchanged_and_broken_photos_are_reported(published, tmp_path, people):
    run_people, _, messages = people
    dataset = load_dataset(published)
    bitmap = tmp_path / "held.bmp"
    drawn((32, 32), (8, 8, 16, 9)).save(bitmap)
    subject = replace(dataset.subjects[0], held_out=bitmap)
    run_people.keep_photos(subject)
    run = tmp_path / "run"
    copy = Image.open(run / reference_path(subject))
    assert copy.tobytes() == Image.open(subject.photos[0]).convert("RGB").tobytes()
    assert held_out_path(subject) == "references/C+held-out.png"
    assert Image.open(run / "references/C+held-out.png").tobytes() == Image.open(bitmap).tobytes()
    assert messages == []
    broken = Subject("d", (tmp_path / "d.png",))
    run_people.keep_photos(broken)
    assert len(messages) == 1
    assert "there is no photo" in messages[0]
    with pytest.raises(UsageError, match="there is no photo"):
        run_people.identity(broken, None, "pack")


def test_a_refused_photo_is_looked_at_once_and_not_kept(tmp_path, people):
    run_people, analyzer, _ = people
    Image.new("RGB", (64, 64)).save(tmp_path / "grey.png")
    subject, messages, looked = Subject("grey", (tmp_path / "grey.png",)), set(), set()
    for _ in range(3):
        with pytest.raises(NoFaceError) as caught:
            run_people.identity(subject, None, "pack")
        messages.add((caught.value.message, caught.value.hint))
        looked.add(len(analyzer.asked))
    assert (len(messages), len(looked)) == (1, 1)
    assert len(caught.traceback) == 2  # this test and the asking: not the frames that hold the picture


# --------------------------------------------------------------------------------------------- foreign


@pytest.fixture
def theirs(published, tmp_path):
    """Pictures in the order b, C, a; the third person's second one is missing."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for index in range(5):
        Image.new("RGB", (8, 8), (index * 10, 0, 0)).save(folder / f"{index}.png")
    (tmp_path / "order.txt").write_text("b.png\nC.png\nid_photos/a.png\n")
    return folder


def take(theirs, published, folder):
    adopt(
        theirs,
        folder,
        load_dataset(published),
        theirs.parent / "order.txt",
        name="upstream",
        recipe=load_recipe("pocket").recipe,
        rules="published",
        split="full",
    )


def test_images_of_other_programs_are_matched_to_person_and_prompt(theirs, published, tmp_path):
    metric = stand_in.Brightness()
    for _ in range(2):  # the second time nothing changes
        take(theirs, published, tmp_path / "run")
    with Run.reopen(tmp_path / "run") as run:
        score(run, stand_in.scoring(metric))
        rows = joined(run, [metric])
    assert [(row.key, row.scores.get("brightness")) for row in rows] == [
        ("upstream/C/0000-0", 20.0),
        ("upstream/C/0001-0", 30.0),
        ("upstream/a/0000-0", 40.0),
        ("upstream/a/0001-0", None),
        ("upstream/b/0000-0", 0.0),
        ("upstream/b/0001-0", 10.0),
    ]
    assert rows[3].error is not None
    assert rows[3].error["message"] == "cannot read 5.png: No such file or directory"
    assert rows[1].prompt == "a Woman"
    assert (tmp_path / "run" / rows[0].reference).is_file()


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("b\nC\nannie\n", "'annie' in .* is not in the data set"),
        ("b\nC\n", "does not list a"),
        ("b\nC\na\nb\n", "lists 'b' twice"),
    ],
)
def test_invalid_identity_order_is_refused(published, tmp_path, order, message):
    (tmp_path / "order.txt").write_text(order)
    with pytest.raises(UsageError, match=message):
        read_order(tmp_path / "order.txt", load_dataset(published))


def test_folder_without_images_is_refused(published, theirs, tmp_path):
    for file in theirs.iterdir():
        file.unlink()
    with pytest.raises(UsageError, match=r"contains no INDEX\.png"):
        take(theirs, published, tmp_path / "run")
    assert not (tmp_path / "run").exists()
