"""What a run survives: power failures, full disks, changed files, damaged lines, deleted folders."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import eval_stand_ins as stand_in
from support.face_stand_ins import SquareAnalyzer, drawn

from fastface_cli.errors import FastFaceError, UsageError
from fastface_cli.evaluation.dataset import Subject
from fastface_cli.evaluation.people import People, degraded_path, reference_path
from fastface_cli.evaluation.runner import generate, joined, score
from fastface_cli.evaluation.runs import RowLog, Run
from fastface_cli.files import write_atomically


def run_all(folder: Path, plan, metric=None, *, people=None):
    metric = metric or stand_in.Brightness()
    with Run.open(folder, stand_in.info(plan)) as run:
        generate(run, plan, stand_in.Here, people or stand_in.People(), stand_in.scoring(metric))
        return joined(run, [metric])


@pytest.fixture
def disk_calls(monkeypatch):
    """The order of syncs and renames: `file`, `rename`, `folder`."""
    calls = []
    fsync, replace, link = os.fsync, os.replace, os.link

    def recorded_fsync(descriptor):
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def recorded(function):
        def call(*paths):
            calls.append("rename")
            function(*paths)

        return call

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded(replace))
    monkeypatch.setattr(os, "link", recorded(link))
    return calls


@pytest.mark.parametrize("force", [True, False])
def test_a_file_is_synced_before_its_rename_and_its_folder_after(tmp_path, disk_calls, force):
    write_atomically(tmp_path / "x.png", b"data", force=force)
    assert disk_calls == ["file", "rename", "folder"]


def test_new_folders_are_synced_into_their_parents(tmp_path, disk_calls):
    write_atomically(tmp_path / "a" / "b" / "x.png", b"data", force=True)
    assert disk_calls == ["folder", "folder", "file", "rename", "folder"]


def test_a_log_is_synced_at_an_interval_and_when_it_is_closed(tmp_path, disk_calls, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    log = RowLog(tmp_path / "log.jsonl")
    disk_calls.clear()
    log.append([{"a": 1}])
    assert disk_calls == []
    now[0] = 2.1
    log.append([{"a": 2}])
    assert disk_calls == ["file"]
    log.close()
    assert disk_calls == ["file", "file"]


def test_files_about_people_are_private(tmp_path):
    write_atomically(tmp_path / "me.safetensors", b"data", force=True, private=True)
    assert stat.S_IMODE((tmp_path / "me.safetensors").stat().st_mode) == 0o600
    path = stand_in.somebody().save(tmp_path / "person.safetensors")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.fixture
def subject(tmp_path):
    photo = tmp_path / "anna.jpg"
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    exif.get_ifd(0x8825)[2] = (52.0, 30.0, 0.0)
    drawn((64, 64), (8, 8, 32, 9)).save(photo, exif=exif, comment=b"at home", quality=100)
    return Subject("anna", (photo,))


def people_of(folder, messages=None):
    log = (messages if messages is not None else []).append
    return People(folder, {"pack": SquareAnalyzer}, log)


def test_references_have_no_metadata_and_are_private(tmp_path, subject):
    people_of(tmp_path / "run").keep_photos(subject)
    path = tmp_path / "run" / reference_path(subject)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with Image.open(path) as copy, Image.open(subject.photos[0]) as photo:
        assert not copy.info
        assert not copy.getexif()
        assert copy.tobytes() == photo.convert("RGB").tobytes()


@pytest.mark.parametrize("damage", [b"", b"torn"])
def test_damaged_references_and_identities_are_made_again(tmp_path, subject, damage):
    run, messages = tmp_path / "run", []
    first = people_of(run)
    first.keep_photos(subject)
    digest = first.identity(subject, None, "pack").digest()
    reference = run / reference_path(subject)
    pixels = reference.read_bytes()
    (identity,) = (run / "identities").rglob("*.safetensors")
    identity.write_bytes(damage)
    reference.write_bytes(damage)
    again = people_of(run, messages)
    again.keep_photos(subject)
    assert again.identity(subject, None, "pack").digest() == digest
    assert reference.read_bytes() == pixels
    assert len(messages) == 2  # and that the face is small
    assert "computed again" in messages[0]


def test_damaged_degraded_photo_is_made_again(tmp_path, subject):
    run = tmp_path / "run"
    digest = people_of(run).identity(subject, "occlusion", "pack").digest()
    photo = run / degraded_path(subject, "occlusion")
    pixels = photo.read_bytes()
    photo.write_bytes(b"")
    assert people_of(run).identity(subject, "occlusion", "pack").digest() == digest
    assert photo.read_bytes() == pixels


@pytest.mark.parametrize("damage", ["deleted", "halved", "changed"])
def test_changed_images_are_generated_and_scored_again(tmp_path, damage):
    plan, folder = stand_in.plan(), tmp_path / "run"
    before = run_all(folder, plan)
    image = folder / before[5].file
    data = image.read_bytes()
    if damage == "deleted":
        image.unlink()
    elif damage == "halved":
        image.write_bytes(data[: len(data) // 2])
    else:
        image.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    metric = stand_in.Brightness()
    assert run_all(folder, plan, metric) == before
    assert image.read_bytes() == data
    assert before[5].key in [key for batch in metric.batches for key in batch]


def test_scores_of_a_damaged_image_are_not_used(tmp_path):
    """The image changes after its row was written and before it is scored, then it is restored."""
    plan, folder = stand_in.plan(), tmp_path / "run"
    with Run.open(folder, stand_in.info(plan)) as run:
        generate(run, plan, stand_in.Here, stand_in.People(), stand_in.no_scoring())
        image = folder / run.rows()["pocket/p001/0002-0"].file
        data = image.read_bytes()
        other = (folder / run.rows()["pocket/p000/0001-0"].file).read_bytes()
        image.write_bytes(other[: len(data)].ljust(len(data), b"\0"))
        score(run, stand_in.scoring())
    image.write_bytes(data)
    rows = {row.key: row for row in run_all(folder, plan)}
    assert rows["pocket/p001/0002-0"].scores["brightness"] is not None
    assert rows == {row.key: row for row in run_all(tmp_path / "whole", plan)}


def test_damaged_vectors_are_computed_again(tmp_path):
    plan, folder = stand_in.plan(6, 5), tmp_path / "run"
    before = run_all(folder, plan)
    for file in sorted(folder.glob("vectors/*/*.npz")):
        file.write_bytes(b"")
    assert run_all(folder, plan) == before


def test_rows_of_the_wrong_type_are_skipped_and_named(tmp_path, caplog):
    plan, folder = stand_in.plan(), tmp_path / "run"
    before = run_all(folder, plan)
    for name, lines in {
        "generated.jsonl": [{"key": 3}, {"key": "pocket/p000/0000-0", "seed": "x"}, {"seed": {"a": []}}],
        "scores.jsonl": [{"key": "pocket/p000/0000-0", "scores": 5}, {"metrics": {}}, {"key": ["x"]}],
    }.items():
        with (folder / name).open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.write("[" * 100_000 + "\n")
    with caplog.at_level(logging.WARNING):
        assert run_all(folder, plan) == before
    assert f"{folder / 'generated.jsonl'}:13 is skipped" in caplog.text
    assert f"{folder / 'scores.jsonl'}:13 is skipped" in caplog.text


class FullDisk(stand_in.People):
    """The first identity cannot be written."""

    def identity(self, subject, stress, face):
        raise FastFaceError("cannot write x.safetensors: No space left on device")


def test_a_full_disk_ends_the_run_and_the_same_command_completes_it(tmp_path):
    plan, folder = stand_in.plan(), tmp_path / "run"
    with pytest.raises(FastFaceError, match="No space left"):
        run_all(folder, plan, people=FullDisk())
    assert run_all(folder, plan) == run_all(tmp_path / "whole", plan)


def test_a_full_disk_is_no_fault_of_a_photo(tmp_path, subject, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    people = people_of(tmp_path / "run")
    monkeypatch.setattr("os.fsync", full)
    for call in (lambda: people.keep_photos(subject), lambda: people.identity(subject, None, "pack")):
        with pytest.raises(FastFaceError, match="No space left") as caught:
            call()
        assert not isinstance(caught.value, UsageError)


def test_a_folder_deleted_during_the_run_is_noticed(tmp_path):
    plan, folder = stand_in.plan(), tmp_path / "run"

    class Deleting(stand_in.People):
        def identity(self, subject, stress, face):
            if subject.name == "p001":
                shutil.rmtree(folder, ignore_errors=True)
            return super().identity(subject, stress, face)

    with pytest.raises(FastFaceError, match="deleted or replaced"):
        run_all(folder, plan, people=Deleting())


def test_images_deleted_during_the_run_are_noticed(tmp_path):
    plan, folder = stand_in.plan(), tmp_path / "run"

    class Deleting(stand_in.People):
        def identity(self, subject, stress, face):
            if subject.name == "p002":
                shutil.rmtree(folder / "images" / "pocket" / "p000", ignore_errors=True)
            return super().identity(subject, stress, face)

    with pytest.raises(FastFaceError, match=r"\d of 12 images are missing"):
        run_all(folder, plan, people=Deleting())
    assert len(run_all(folder, plan)) == 12


@pytest.mark.skipif(os.name == "nt", reason="Windows folders have no write permission bit")
def test_finished_run_in_a_read_only_folder_is_reported(tmp_path, monkeypatch):
    plan, folder = stand_in.plan(), tmp_path / "run"
    run_all(folder, plan)

    def read_only(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("fastface_cli.evaluation.runs.open_log", read_only)
    with pytest.raises(FastFaceError, match=r"cannot write into the run .*Read-only") as caught:
        Run.open(folder, stand_in.info(plan))
    assert "report.html" in caught.value.hint


def test_vectors_are_never_unpickled(tmp_path):
    """A vector file of another program can contain a pickle, which runs code when it is loaded."""

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    plan, folder = stand_in.plan(), tmp_path / "run"
    before = run_all(folder, plan)
    for file in folder.glob("vectors/*/*.npz"):
        np.savez(file, x=np.array([Evil()], dtype=object))
    assert run_all(folder, plan) == before
    assert not (tmp_path / "ran").exists()


def test_temporary_files_of_a_killed_process_are_removed(tmp_path):
    plan, folder = stand_in.plan(), tmp_path / "run"
    run_all(folder, plan)
    left = folder / "images" / "pocket" / ".fastface-0123456789abcdef.tmp"
    left.write_bytes(b"half an image")
    run_all(folder, plan)
    assert not left.exists()
