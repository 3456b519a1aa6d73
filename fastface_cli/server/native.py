"""The native API under /api: runs, events, faces, identities, recipes, status."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import PurePath
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, Header, Request, Response, UploadFile
from pydantic import TypeAdapter, ValidationError
from sse_starlette import EventSourceResponse

from ..errors import UsageError
from ..identity.analyzer import Box
from .identities import crop_png, read_identity, read_photos, record
from .runs import MEDIA_TYPES, MissingError, Person, ServedRun
from .schema import (
    ErrorBody,
    FaceList,
    IdentityList,
    IdentityRecord,
    LicenseList,
    RecipeList,
    RunBody,
    RunList,
    RunRecord,
    StatusRecord,
)
from .studio import Studio

PING_SECONDS = 15

FAILURES: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
IMAGE: dict[int | str, dict[str, Any]] = {200: {"content": {"image/png": {}}, "description": "the image"}}


def native_api(studio: Studio) -> APIRouter:
    """The routes of the native API."""
    api = APIRouter(prefix="/api", responses=FAILURES)
    _add_information(api, studio)
    _add_identities(api, studio)
    _add_runs(api, studio)
    return api


def _add_information(api: APIRouter, studio: Studio) -> None:
    @api.get("/status", response_model=StatusRecord)
    def status() -> Any:
        """The state of the server."""
        return studio.status()

    @api.get("/recipes", response_model=RecipeList)
    def recipes() -> Any:
        """All recipes."""
        return {"recipes": studio.recipes()}

    @api.get("/recipes/{name}/licenses", response_model=LicenseList)
    def licenses(name: str) -> Any:
        """The licenses of a recipe's parts."""
        return studio.licenses(name)

    @api.post("/faces", response_model=FaceList)
    def faces(photo: Annotated[UploadFile, File()]) -> Any:
        """Detect the faces of a photo."""
        (opened,) = read_photos([photo.file.read()], studio.limits)
        width, height = opened.image.size
        detected = [
            {"box": face.box, "score": face.score} for face in studio.faces.faces(opened, studio.recipe())
        ]
        size = {"width": round(width / opened.scale), "height": round(height / opened.scale)}
        return {**size, "faces": detected}


def _add_identities(api: APIRouter, studio: Studio) -> None:
    @api.get("/identities", response_model=IdentityList)
    def identities() -> Any:
        """Saved identities."""
        return {"identities": studio.identities.records()}

    @api.post("/identities", response_model=IdentityRecord)
    def save(
        *,
        name: Annotated[str, Form()],
        photos: Annotated[list[UploadFile] | None, File()] = None,
        file: Annotated[UploadFile | None, File()] = None,
        recipe: Annotated[str | None, Form()] = None,
        face_index: Annotated[int | None, Form()] = None,
        face_box: Annotated[str | None, Form()] = None,
    ) -> Any:
        """Save an identity under a name, from photos of one person or from an identity file."""
        if file is not None:
            identity = read_identity(file.file.read())
        else:
            opened = read_photos([photo.file.read() for photo in photos or ()], studio.limits)
            box = None if face_box is None else _box(face_box)
            identity = studio.faces.identity(opened, studio.recipe(recipe), face_index, box)
        studio.identities.add(name, identity)
        return record(name, identity)

    @api.get("/identities/{name}", responses={200: {"content": {"application/octet-stream": {}}}})
    def download(name: str) -> Response:
        """An identity file."""
        content = studio.identities.find(name).encoded()
        disposition = {"Content-Disposition": f'attachment; filename="{name}.safetensors"'}
        return Response(content, media_type="application/octet-stream", headers=disposition)

    @api.get("/identities/{name}/preview", responses=IMAGE)
    def preview(name: str) -> Response:
        """The face crop of an identity."""
        return Response(crop_png(studio.identities.find(name)), media_type="image/png")

    @api.delete("/identities/{name}", status_code=204)
    def delete(name: str) -> None:
        """Delete an identity."""
        studio.identities.remove(name)


def _add_runs(api: APIRouter, studio: Studio) -> None:
    @api.post("/runs", status_code=202, response_model=RunRecord)
    def submit(
        *,
        request: Annotated[str, Form(description="A RunBody as JSON.")],
        photos: Annotated[list[UploadFile] | None, File()] = None,
        pose: Annotated[UploadFile | None, File()] = None,
        idempotency_key: Annotated[str | None, Header(max_length=200)] = None,
        http: Request,
        response: Response,
    ) -> Any:
        """Append a run to the queue. Photos of the person are files; they are dropped when the run ends."""
        body = parse_body(request)
        opened = read_photos([photo.file.read() for photo in photos or ()], studio.limits)
        posed = read_photos([pose.file.read()], studio.limits)[0] if pose is not None else None
        person = Person(photos=opened, pose=posed)
        run, is_new = studio.submit(body, person, client_of(http), idempotency_key)
        response.status_code = 202 if is_new else 200
        response.headers["Location"] = f"/api/runs/{run.id}"
        return studio.record(run)

    @api.get("/runs", response_model=RunList)
    def runs() -> Any:
        """All runs that are kept, the newest first."""
        return {"runs": [studio.record(run) for run in studio.registry.all()]}

    @api.get("/runs/{run_id}", response_model=RunRecord)
    def run_record(run_id: str) -> Any:
        """A run and its results so far."""
        return studio.record(studio.registry.find(run_id))

    @api.delete("/runs/{run_id}", status_code=202, response_model=RunRecord)
    def cancel(run_id: str) -> Any:
        """Cancel a run between two steps; a run that has ended is forgotten."""
        run = studio.registry.find(run_id)
        studio.cancel(run)
        return studio.record(run)

    @api.get("/runs/{run_id}/events", responses={200: {"content": {"text/event-stream": {}}}})
    async def events(run_id: str, last_event_id: Annotated[int, Header(ge=0)] = 0) -> EventSourceResponse:
        """The events of a run as they come; `Last-Event-ID` resumes after an interruption."""
        run = studio.registry.find(run_id)
        return EventSourceResponse(_stream(run, last_event_id), ping=PING_SECONDS)

    @api.get("/runs/{run_id}/images/{index}", responses=IMAGE)
    def image(run_id: str, index: int, format: str = "png") -> Response:
        """An image of a run, with its metadata."""
        run = studio.registry.find(run_id)
        if not 0 <= index < len(run.images):
            raise MissingError(f"the run has no image {index}")
        served = run.images[index]
        content = served.encoded(format)
        name = served.path.stem if served.path else f"{run.recipe.name}-{served.record['seed']}"
        disposition = {"Content-Disposition": f'inline; filename="{ascii_name(name)}.{format}"'}
        return Response(content, media_type=MEDIA_TYPES[format], headers=disposition)


async def _stream(run: ServedRun, after: int) -> AsyncIterator[dict[str, str]]:
    async for event in run.events(after):
        yield {"id": str(event.number), "event": event.name, "data": json.dumps(event.data)}


def parse_body(text: str) -> RunBody:
    """The JSON of a run.

    Raises:
        UsageError: it is not valid; the message names the field.
    """
    try:
        return RunBody.model_validate_json(text)
    except ValidationError as error:
        raise first_problem(error) from error


def first_problem(error: ValidationError) -> UsageError:
    """The first problem of a body in one sentence; its content is not repeated."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part)[:60] for part in first["loc"]) or "the request"
    return UsageError(f"{where}: {first['msg']}", "see /openapi.json for all fields")


def _box(text: str) -> Box:
    try:
        return TypeAdapter(Box).validate_python(tuple(text.split(",")))
    except ValidationError as error:
        raise UsageError("face_box is not left,top,right,bottom", "for example 10,20,110,140") from error


def client_of(http: Request) -> str:
    """Whose line in the queue a request joins: a name that the client gives itself, and its address."""
    address = http.client.host if http.client else ""
    return f"{address} {http.headers.get('x-fastface-client', '')[:64]}"


def ascii_name(name: str) -> str:
    """A file name that is safe inside a header."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in PurePath(name).name)
