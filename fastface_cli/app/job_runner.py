"""A jobs file through one session: a record per line, in order; an invalid line fails alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import DeviceError, FastFaceError, ModelUnavailableError, unexpected
from .events import ImageFinished
from .jobs import Job, JobError, read_jobs, record
from .request import GenerateRequest, OutputPlan
from .session import Session


def job_records(session: Session, defaults: GenerateRequest, source: str) -> Iterator[dict[str, Any]]:
    """Run the lines of a jobs file.

    Args:
        session: runs them; its models stay loaded.
        defaults: the values of fields that a line does not set.
        source: path of a file of JSON lines, or `-` for standard input.

    Raises:
        UsageError: the file cannot be read.
        ModelUnavailableError, DeviceError: the models of `defaults` cannot be loaded.
    """
    for job in read_jobs(source):
        if isinstance(job, JobError):
            yield record(job.line, job.error)
            continue
        try:
            yield record(job.line, _run(session, job_request(defaults, job)), job.id)
        except Exception as error:
            needs_own_models = bool(job.set or job.face)
            if (
                isinstance(error, ModelUnavailableError | DeviceError)
                and not session.stack.has_models
                and not needs_own_models
            ):
                raise  # all lines need these models
            yield record(job.line, error if isinstance(error, FastFaceError) else unexpected(error), job.id)


def job_request(defaults: GenerateRequest, job: Job) -> GenerateRequest:
    """The request of one line."""
    values: dict[str, Any] = {"overrides": (*defaults.overrides, *job.set)}
    if job.face or job.identity:
        values["photos"] = tuple(map(Path, job.face))
        values["identity"] = Path(job.identity) if job.identity else None
    if job.prompt is not None:
        values["prompts"] = (job.prompt,)
    if job.adapter_scale is not None:
        values["adapter_scales"] = (job.adapter_scale,)
    for name in ("negative_prompt", "seed", "best_of"):
        if getattr(job, name) is not None:
            values[name] = getattr(job, name)
    if job.output:
        output = defaults.output or OutputPlan()
        values["output"] = output.model_copy(update={"path": job.output})
    return defaults.model_copy(update=values)


def _run(session: Session, request: GenerateRequest) -> Mapping[str, Any]:
    """Run a request for one image and return the record of the image."""
    (image,) = [event for event in session.run(request) if isinstance(event, ImageFinished)]
    return image.record()
