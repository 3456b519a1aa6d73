"""Jobs and prompts from files."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastface_cli.app import jobs
from fastface_cli.app.jobs import Job, JobError, prompts_file, read_jobs, record
from fastface_cli.errors import NoFaceError, UsageError
from fastface_cli.recipe.files import load_recipe


def from_lines(tmp_path: Path, *lines: str | bytes) -> list[Job | JobError]:
    file = tmp_path / "jobs.jsonl"
    file.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return list(read_jobs(str(file)))


def only_job(tmp_path: Path, **fields: Any) -> Job:
    (actual,) = from_lines(tmp_path, json.dumps(fields))
    assert isinstance(actual, Job), actual
    return actual


def refused(tmp_path: Path, line: str | bytes) -> UsageError:
    (actual,) = from_lines(tmp_path, line)
    assert isinstance(actual, JobError), actual
    assert actual.line == 1
    assert actual.error.message.startswith(f"{tmp_path / 'jobs.jsonl'}:1: ")
    assert "\n" not in actual.error.message
    return actual.error


class TestJobs:
    def test_all_fields(self, tmp_path: Path) -> None:
        actual = only_job(
            tmp_path,
            face=["a.jpg", "b.jpg"],
            prompt="東京",
            negative_prompt="blurry",
            seed=2**63 - 1,
            output="out/{seed}.png",
            set={"guidance.text": [1, 2], "model.base": "./x.safetensors"},
            adapter_scale=1,
        )
        assert actual == Job(
            line=1,
            face=["a.jpg", "b.jpg"],
            prompt="東京",
            negative_prompt="blurry",
            seed=2**63 - 1,
            output="out/{seed}.png",
            set=["guidance.text=[1, 2]", 'model.base="./x.safetensors"'],
            adapter_scale=1.0,
        )

    def test_short_forms_and_nothing(self, tmp_path: Path) -> None:
        assert only_job(tmp_path, face="me.jpg").face == ["me.jpg"]
        assert only_job(tmp_path, set=["a.b=1"]).set == ["a.b=1"]
        assert only_job(tmp_path) == only_job(tmp_path, face=[]) == Job(line=1)
        assert only_job(tmp_path, seed=None, face=None, set=None) == Job(line=1)
        assert only_job(tmp_path, identity="me.safetensors").identity == "me.safetensors"

    def test_overrides_mean_what_they_say(self, tmp_path: Path) -> None:
        changes = {
            "guidance.text": [1, 2.5, 2.5, 1],
            "guidance.identity": {"function": "cosine", "scale": 1e-07},
            "attention.blend": None,
            "attention.invert_token_0": True,
            "negative_prompt": 'a: "b" #c \\ 漢🦊\n',
        }
        recipe = load_recipe("hyper", overrides=only_job(tmp_path, set=changes).set).recipe
        assert recipe.guidance.text == [1, 2.5, 2.5, 1]
        assert recipe.guidance.model_dump()["identity"]["scale"] == 1e-07
        assert recipe.attention.blend is None
        assert recipe.attention.invert_token_0 is True
        assert recipe.negative_prompt == changes["negative_prompt"]

    def test_lines_that_are_skipped_still_count(self, tmp_path: Path) -> None:
        actual = from_lines(
            tmp_path, b"\xef\xbb\xbf# comment", "", "  \r", '{"seed": 1}\r', "  # more", '{"seed": 2}'
        )
        assert [(job.line, job.seed) for job in actual if isinstance(job, Job)] == [(4, 1), (6, 2)]
        assert len(actual) == 2

    def test_wrong_lines_spoil_only_themselves(self, tmp_path: Path) -> None:
        actual = from_lines(tmp_path, "{", '{"seed": 1}', b"\xff", '{"sed": 1}', '{"seed": 2}')
        assert [(type(item).__name__, item.line) for item in actual] == [
            ("JobError", 1),
            ("Job", 2),
            ("JobError", 3),
            ("JobError", 4),
            ("Job", 5),
        ]

    @pytest.mark.parametrize(
        ("line", "words", "hint"),
        [
            ("{", "is not valid JSON", "one JSON object"),
            ('{"seed": 1} x', "is not valid JSON", "one JSON object"),
            ("[]", "not a JSON object", ""),
            ('"x"', "not a JSON object", ""),
            ('{"promt": "x"}', "'promt' is not a field", "'prompt'"),
            ('{"line": 3}', "'line' is not a field", ""),
            ('{"zzz": 3}', "'zzz' is not a field", "fields are id, face, identity"),
            ('{"seed": "1"}', "seed: ", ""),
            ('{"seed": 1.0}', "seed: ", ""),
            ('{"seed": true}', "seed: ", ""),
            ('{"seed": -1}', "seed: ", ""),
            ('{"seed": 9223372036854775808}', "seed: ", ""),
            ('{"face": [1]}', "face.0: ", ""),
            ('{"face": {}}', "face: ", ""),
            ('{"face": ""}', "face.0: ", ""),
            ('{"face": "a\\u0000b"}', "face.0: ", ""),
            ('{"prompt": "\\ud800"}', "surrogate", ""),
            ('{"face": "a", "identity": "b"}', "both face and identity", ""),
            ('{"seed": 1, "seed": 2}', "'seed' is given twice", ""),
            ('{"set": {"a": 1, "a": 2}}', "'a' is given twice", ""),
            ('{"set": ["a"]}', "set: 'a' is not of the form", ""),
            ('{"set": ["=1"]}', "set: '=1' is not of the form", ""),
            ('{"set": "a=1"}', "set: ", ""),
            ('{"adapter_scale": 7}', "adapter_scale: ", ""),
            ('{"adapter_scale": NaN}', "NaN is not a number", ""),
            ('{"adapter_scale": 1e999}', "adapter_scale: ", ""),
            ("[" * 100_000, "nested too deeply", ""),
            ('{"set": {"a": ' + "[" * 100_000, "nested too deeply", ""),
            (b'{"prompt": "\xff"}', "not UTF-8", "UTF-8"),
            ("9" * 5000, "", ""),
        ],
    )
    def test_refused(self, tmp_path: Path, line: str | bytes, words: str, hint: str) -> None:
        error = refused(tmp_path, line)
        assert words in error.message
        assert hint in (error.hint or "")
        assert len(error.message) < 400

    def test_long_lines(self, tmp_path: Path) -> None:
        fits = json.dumps({"prompt": "x" * (jobs.MAX_LINE - 20)})
        actual = from_lines(tmp_path, fits, " " * (3 * jobs.MAX_LINE), '{"seed": 5}', "x" * jobs.MAX_LINE * 2)
        assert [(type(item).__name__, item.line) for item in actual] == [
            ("Job", 1),
            ("JobError", 2),
            ("Job", 3),
            ("JobError", 4),
        ]
        assert isinstance(actual[1], JobError)
        assert "longer than" in actual[1].error.message

    def test_line_of_exactly_the_limit(self, tmp_path: Path) -> None:
        head, tail = b'{"prompt": "', b'"}'
        exact = head + b"x" * (jobs.MAX_LINE - len(head) - len(tail)) + tail
        actual = from_lines(tmp_path, exact, exact + b" ", b'{"seed": 1}')
        assert [type(item).__name__ for item in actual] == ["Job", "JobError", "Job"]

    def test_files_that_cannot_be_read_are_refused_at_once(self, tmp_path: Path) -> None:
        for name in ("missing.jsonl", "", "a\0b"):
            with pytest.raises(UsageError, match="cannot read the jobs file") as caught:
                read_jobs(str(tmp_path / name))
            assert caught.value.exit_code == 2

    def test_standard_input_is_read_as_it_comes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        reading, writing = os.pipe()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(os.fdopen(reading, "rb")))
        actual: Iterator[Job | JobError] = read_jobs("-")
        os.write(writing, b'{"seed": 1}\n')
        first = next(actual)
        assert isinstance(first, Job)
        assert first.seed == 1
        threading.Timer(0.05, lambda: (os.write(writing, b"{}x\n"), os.close(writing))).start()
        second = next(actual)
        assert isinstance(second, JobError)
        assert second.error.message.startswith("stdin:2: ")
        assert list(actual) == []
        assert not sys.stdin.buffer.closed

    def test_file_is_closed(self, tmp_path: Path) -> None:
        file = tmp_path / "jobs.jsonl"
        file.write_text('{"seed": 1}\n{"seed": 2}\n')
        stream = file.open("rb")
        reader = jobs.read_stream(stream, "x")
        next(reader)
        reader.close()  # type: ignore[attr-defined]
        assert stream.closed

    @settings(max_examples=300, deadline=None)
    @given(
        st.binary(max_size=80)
        | st.text(alphabet='{}[]":,\\ud8 01e-"facesetprompt', max_size=80).map(str.encode)
    )
    def test_any_bytes(self, data: bytes) -> None:
        for item in jobs.read_stream(io.BytesIO(data), "x"):
            assert isinstance(item, Job | JobError)

    @settings(max_examples=200, deadline=None)
    @given(
        st.dictionaries(
            st.sampled_from([*jobs.FIELDS, "x"]),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
                lambda inner: (
                    st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
                ),
                max_leaves=4,
            ),
        )
    )
    def test_any_object(self, value: dict[str, Any]) -> None:
        (actual,) = jobs.read_stream(io.BytesIO(json.dumps(value).encode()), "x")
        assert isinstance(actual, Job | JobError)
        if isinstance(actual, Job):
            assert "x" not in value


class TestRecord:
    def test_success(self) -> None:
        assert record(3, {"path": "x.png", "seed": 1}) == {
            "line": 3,
            "ok": True,
            "path": "x.png",
            "seed": 1,
            "error": None,
        }

    def test_failure(self) -> None:
        assert record(4, NoFaceError("no face in me.jpg", "crop it")) == {
            "line": 4,
            "ok": False,
            "error": {"kind": "no_face", "code": 5, "message": "no face in me.jpg", "hint": "crop it"},
        }


class TestPromptsFile:
    def test_lines(self, tmp_path: Path) -> None:
        file = tmp_path / "prompts.txt"
        file.write_bytes("\ufeff a cat \r\n\r\n\t\n# not a comment\nin\u2028side\x0b漢\rlast".encode())
        assert prompts_file(file) == ["a cat", "# not a comment", "in\u2028side\x0b漢", "last"]

    @pytest.mark.parametrize(
        ("data", "words"),
        [
            (b"", "contains no prompt"),
            (b"\n \r\n", "contains no prompt"),
            (b"\xef\xbb\xbf", "contains no prompt"),
            (b"fine\nalso\n\xff\n", ":3: is not UTF-8"),
            (b"a\0b", "not a text file"),
        ],
    )
    def test_refused(self, tmp_path: Path, data: bytes, words: str) -> None:
        file = tmp_path / "prompts.txt"
        file.write_bytes(data)
        with pytest.raises(UsageError, match=words):
            prompts_file(file)

    def test_cannot_be_read(self, tmp_path: Path) -> None:
        for path in (tmp_path, tmp_path / "missing"):
            with pytest.raises(UsageError, match="cannot read the prompts file"):
                prompts_file(path)


def test_comments_in_a_prompts_file_are_ignored_on_request(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# styles\ncomic\n\n  # more\npencil #1\n")
    assert prompts_file(file, comments=True) == ["comic", "pencil #1"]
    assert prompts_file(file) == ["# styles", "comic", "# more", "pencil #1"]


@pytest.mark.parametrize("job_id", ["a-1", 7])
def test_the_id_of_a_job_is_repeated_in_its_record(job_id: str | int) -> None:
    (job,) = jobs.read_stream(io.BytesIO(json.dumps({"id": job_id, "seed": 1}).encode()), "x")
    assert isinstance(job, Job)
    assert record(job.line, {"path": "x.png"}, job.id) == {
        "line": 1,
        "id": job_id,
        "ok": True,
        "path": "x.png",
        "error": None,
    }
