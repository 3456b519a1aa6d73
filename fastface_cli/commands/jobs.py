"""`fastface generate --jobs`: the models stay loaded, one picture a line, a bad line spoils only itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .. import console
from ..errors import DeviceError, FastFaceError, ModelUnavailableError, UsageError, unexpected
from .generate import Options, Report, Work, make, people, prepare, ready

if TYPE_CHECKING:
    from ..app.api import FastFace
    from ..app.jobs import Job
    from ..app.pipeline import Pipeline
    from ..identity.identity import Identity


def run_jobs(options: Options) -> None:
    """Run every line of a jobs file and print one JSON record a line.

    Raises:
        UsageError: the file cannot be read, or a flag makes no sense for many lines.
        ModelUnavailableError, DeviceError: no line can be run.
        typer.Exit: with code 1 when a line failed.
    """
    from ..app.jobs import JobError, read_jobs, record

    _check(options)
    bench = _Bench(options)
    failed = 0
    for job in read_jobs(options.jobs or "-"):
        if isinstance(job, JobError):
            result = record(job.line, job.error)
        else:
            try:
                result = record(job.line, bench.run(job))
            except Exception as error:
                failure = error if isinstance(error, FastFaceError) else unexpected(error)
                own = bool(job.set or job.face)
                if (
                    bench.pipeline is None
                    and not own
                    and isinstance(error, ModelUnavailableError | DeviceError)
                ):
                    raise  # no line could be run
                result = record(job.line, failure)
        failed += not result["ok"]
        console.print_json(result)
    if failed:
        console.note(f"{failed} line{'s' * (failed > 1)} failed")
        raise typer.Exit(1)


def _check(options: Options) -> None:
    given = {
        "--grid": options.grid,
        "--save-latents": options.save_latents is not None,
        "--save-identity": options.save_identity is not None,
        "--from": options.replay is not None,
        "--count": options.count != 1,
        "--prompts-file": options.prompts_file is not None,
        "a list in --adapter-scale": len(options.scales) > 1,
        "a repeated --prompt": len(options.prompts) > 1,
    }
    for name, is_given in given.items():
        if is_given:
            raise UsageError(f"{name} does not go with --jobs", "a line of the jobs file makes one picture")


class _Bench:
    """Models and identities that outlive a line."""

    def __init__(self, options: Options) -> None:
        from ..settings import load_settings

        self.options = options
        self.settings = load_settings()
        self.face: FastFace | None = None
        self.pipeline: Pipeline | None = None
        self.identities: dict[tuple[Path, ...], Identity] = {}
        """By photos: which face of them is taken is the same for all lines."""

    def run(self, job: Job) -> dict[str, object]:
        """Make the picture of one line: its JSON record."""
        options = self._options(job)
        work = prepare(options, self.settings.recipe)
        identity = self._identity(options, work)
        report = Report()
        pipeline = self._pipeline(work)
        scorer = self._face(work).scorer if work.best_of > 1 else None
        make(options, work, pipeline, identity, report, scorer)
        return report.images[0]

    def _options(self, job: Job) -> Options:
        given = self.options
        own = bool(job.face or job.identity)
        return replace(
            given,
            faces=[Path(face) for face in job.face] if own else given.faces,
            identity=(Path(job.identity) if job.identity else None) if own else given.identity,
            prompts=[job.prompt] if job.prompt is not None else given.prompts,
            negative_prompt=given.negative_prompt if job.negative_prompt is None else job.negative_prompt,
            seed=given.seed if job.seed is None else job.seed,
            output=job.output or given.output,
            overrides=[*given.overrides, *job.set],
            best_of=job.best_of or given.best_of,
            scales=given.scales if job.adapter_scale is None else [job.adapter_scale],
            as_json=True,
        )

    def _face(self, work: Work) -> FastFace:
        if self.face is None:
            self.face = ready(self.options, work.recipe, self.settings)
        return self.face

    def _identity(self, options: Options, work: Work) -> Identity:
        loaded, photos = people(options)
        if loaded is not None:
            return loaded
        key = tuple(photos)
        if key not in self.identities:
            face = self._face(work)
            self.identities[key] = face.identity(
                *photos, face_index=options.face_index, face_box=options.face_box
            )
        return self.identities[key]

    def _pipeline(self, work: Work) -> Pipeline:
        face = self._face(work)
        if self.pipeline is None:
            try:
                self.pipeline = face.pipeline
            except FastFaceError:
                self.face = None  # the next line may ask for other models
                raise
        return self.pipeline.with_recipe(work.recipe, face.paths(faces=False))
