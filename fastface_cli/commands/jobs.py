"""`fastface generate --jobs`: one image and one JSON record per line, with models that stay loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from .. import console

if TYPE_CHECKING:
    from ..app.request import GenerateRequest
    from ..app.session import Session


def run_jobs(session: Session, defaults: GenerateRequest, source: str) -> None:
    """Run every line of a jobs file and print its record.

    Raises:
        UsageError: the file cannot be read.
        ModelUnavailableError, DeviceError: no line can be run.
        typer.Exit: with code 1 if a line failed.
    """
    from ..app.job_runner import job_records

    failed = 0
    for record in job_records(session, defaults, source):
        failed += not record["ok"]
        console.print_json(record)
    if failed:
        console.note(f"{failed} line{'s' * (failed > 1)} failed")
        raise typer.Exit(1)
