"""Jobs as JSON lines, one image per line, and prompts as plain lines.

A job is a JSON object. All keys are optional; the command line sets the defaults:

    {"face": "me.jpg", "prompt": "an astronaut", "seed": 7, "output": "out/{seed}.png"}
    {"face": ["a.jpg", "b.jpg"], "set": {"guidance.text": [1, 2, 2, 1]}, "adapter_scale": 0.6}
    {"identity": "me.safetensors", "negative_prompt": "blurry", "set": ["sampling.steps=8"]}
    {"prompt": "a sailor", "best_of": 8}

Blank lines and lines that start with # are skipped. Paths are relative to the current folder. An invalid line
does not affect the other lines. Each job prints one JSON object (`record`) to stdout, in the order of the
lines:

    {"line": 1, "ok": true, "path": "out/7.png", "prompt": ..., "seed": 7, ..., "error": null}
    {"line": 2, "ok": false, "error": {"kind": "usage", "code": 2, "message": ..., "hint": ...}}
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors import FastFaceError, UsageError, nearest
from ..recipe.schema import AdapterScale

MAX_LINE = 1024 * 1024
"""Bytes of one line."""
MAX_PROMPTS = 64 * 1024 * 1024
"""Bytes of a file of prompts, which is read at once."""

_Name = Annotated[str, Field(min_length=1, max_length=65536, pattern=r"^[^\x00]*$")]


class Job(BaseModel):
    """One line of a jobs file; None and empty mean that the line does not set the field."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    line: Annotated[int, Field(exclude=True)] = 0
    """Line number in the file, counted from 1; set by the reader."""
    id: Annotated[str, Field(max_length=200)] | int | None = None
    """Chosen by the caller; repeated in the record."""
    face: Annotated[list[_Name], Field(max_length=1000)] = []
    """Photos of one person."""
    identity: _Name | None = None
    """A saved identity, in place of photos."""
    prompt: str | None = None
    negative_prompt: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    output: _Name | None = None
    """File, folder or template, as `-o`."""
    set: list[_Name] = []
    """Changes to the recipe, `field=VALUE`, as `--set`; a JSON object of fields is turned into these."""
    adapter_scale: AdapterScale | None = None
    best_of: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Candidates per image, as `--best-of`."""

    @field_validator("face", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("set", mode="before")
    @classmethod
    def _fields_or_texts(cls, value: Any) -> Any:
        """JSON is YAML, so a value's JSON text is what `--set` takes."""
        if isinstance(value, dict):
            return [f"{field}={json.dumps(item, ensure_ascii=False)}" for field, item in value.items()]
        return value

    @field_validator("set")
    @classmethod
    def _has_equals(cls, value: list[str]) -> list[str]:
        for text in value:
            if not text.partition("=")[1] or not text.partition("=")[0].strip():
                raise ValueError(f"'{text[:80]}' is not of the form field=VALUE")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> Job:
        if self.face and self.identity is not None:
            raise ValueError("gives both face and identity; leave one out")
        return self


FIELDS = tuple(name for name in Job.model_fields if name != "line")


@dataclass(frozen=True)
class JobError:
    """An invalid line."""

    line: int
    error: UsageError


def read_jobs(source: str) -> Iterator[Job | JobError]:
    """Read the jobs of a file or of standard input, line by line.

    Args:
        source: path of a file of JSON lines (UTF-8), or `-` for standard input.

    Returns:
        A lazy iterator; an invalid line gives a `JobError`.

    Raises:
        UsageError: the file cannot be opened; raised at once.
    """
    if source == "-":
        if sys.stdin is None:  # the parent process closed it
            raise UsageError("cannot read jobs from stdin: it is closed", "pipe them in, or name a file")
        return read_stream(sys.stdin.buffer, "stdin")
    try:
        stream = open(source, "rb")  # noqa: SIM115  closed by read_stream, which outlives this call
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot read the jobs file {source}: {_reason(error)}",
            "give a file of JSON lines, or - for stdin",
        ) from error
    return read_stream(stream, source)


def read_stream(stream: IO[bytes], source: str) -> Iterator[Job | JobError]:
    """Like `read_jobs`, from an open file. It is closed at the end unless it is stdin."""
    number = 0
    try:
        while data := stream.readline(MAX_LINE + 1):
            number += 1
            where = f"{source}:{number}"
            too_long = len(data) > MAX_LINE and not data.endswith(b"\n")
            while len(data) > MAX_LINE and not data.endswith(b"\n"):
                data = stream.readline(MAX_LINE + 1)
            try:
                if too_long:
                    raise UsageError(
                        f"{where}: the line is longer than {MAX_LINE} bytes", "a job is one line"
                    )
                job = _job(data, number, where)
            except UsageError as error:
                yield JobError(number, error)
                continue
            if job is not None:
                yield job
    except OSError as error:
        raise UsageError(f"cannot read the jobs file {source}: {_reason(error)}") from error
    finally:
        if stream is not getattr(sys.stdin, "buffer", None):
            stream.close()


def _job(data: bytes, number: int, where: str) -> Job | None:
    try:
        text = data.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: is not UTF-8 text", "save the file as UTF-8") from error
    if not text or text.startswith("#"):
        return None
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise UsageError(f"{where}: is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{where}: is not valid JSON: {error.msg} at character {error.pos + 1}",
            'a job is one JSON object on one line: {"prompt": "..."}',
        ) from error
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: contains half of a surrogate pair") from error
    except ValueError as error:
        raise UsageError(f"{where}: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{where}: is not a JSON object", 'a job looks like {"prompt": "..."}')
    for name in value:
        if name not in FIELDS:
            near = nearest(name, FIELDS)
            raise UsageError(
                f"{where}: '{name[:80]}' is not a field of a job",
                f"did you mean '{near}'?" if near else f"fields are {', '.join(FIELDS)}",
            )
    try:
        return Job(**{name: item for name, item in value.items() if item is not None}, line=number)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        # Without the names that pydantic gives to the branches of a union.
        field = ".".join(str(part) for part in first["loc"] if not re.search(r"[\[-]", str(part)))
        message = first["msg"].removeprefix("Value error, ")[:200]
        raise UsageError(f"{where}: {field}: {message}" if field else f"{where}: {message}") from error
    except RecursionError as error:
        raise UsageError(f"{where}: is nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"'{duplicate}' is given twice")
    return fields


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def record(
    line: int, result: Mapping[str, Any] | FastFaceError, job_id: str | int | None = None
) -> dict[str, Any]:
    """Return the JSON object that is printed for a job.

    Args:
        line: its line number.
        result: the record of the image (path, prompt, seed, ...), or the error.
        job_id: of the job, if it has one.
    """
    start = {"line": line} if job_id is None else {"line": line, "id": job_id}
    if isinstance(result, FastFaceError):
        return {**start, "ok": False, "error": result.record()}
    return {**start, "ok": True, **result, "error": None}


def prompts_file(path: Path, *, comments: bool = False) -> list[str]:
    """Read prompts, one per line. Blank lines, and spaces around a prompt, are ignored.

    Args:
        path: UTF-8 text, with or without a byte order mark.
        comments: ignore lines that start with #, as in a jobs file.

    Raises:
        UsageError: the file cannot be read, is not UTF-8, or contains no prompt.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PROMPTS + 1)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot read the prompts file {path}: {_reason(error)}", "give a file with one prompt per line"
        ) from error
    if len(data) > MAX_PROMPTS:
        raise UsageError(f"the prompts file {path} is larger than {MAX_PROMPTS >> 20} MB", "split it")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}:{number}: is not UTF-8 text", "save the file as UTF-8") from error
    # Not splitlines(): it also splits at characters that a prompt may contain, such as U+2028.
    prompts = [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
    if comments:
        prompts = [prompt for prompt in prompts if not prompt.startswith("#")]
    if not prompts:
        raise UsageError(f"the prompts file {path} contains no prompt", "write one prompt per line")
    for prompt in prompts:
        if "\0" in prompt:
            raise UsageError(f"the prompts file {path} is not a text file", "write one prompt per line")
    return prompts
