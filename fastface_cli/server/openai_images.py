"""The images API of OpenAI under /v1, as its clients speak it: a thin layer over the same runs.

Source: https://platform.openai.com/docs/api-reference/images. The model is a recipe. Extension fields:
`identity` (name of a saved identity), `photo` (data URL), `seed`, `negative_prompt`, `adapter_scale`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import json
import re
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sse_starlette import EventSourceResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.responses import Response

from ..errors import FastFaceError, UsageError
from .identities import read_photos
from .native import client_of, first_problem
from .runs import Person, ServedImage, ServedRun
from .schema import RunBody
from .studio import Studio

_SIZE = re.compile(r"(\d{2,5})x(\d{2,5})")
_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]{1,20};base64,", re.IGNORECASE)
IGNORED = ("quality", "background", "moderation", "style", "user", "output_compression", "input_fidelity")
"""Fields of the API that have no meaning here; they are accepted, because clients send them."""


class ImageCall(BaseModel):
    """The fields of generations and edits that have a meaning here."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    model: str | None = None
    n: int = Field(default=1, ge=1, le=64)
    size: str = "auto"
    response_format: str = "b64_json"
    output_format: str = "png"
    stream: bool = False
    partial_images: int = Field(default=0, ge=0, le=3)
    identity: str | None = None
    photo: str | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    negative_prompt: str | None = None
    adapter_scale: float | None = None

    def body(self) -> RunBody:
        """The run that this call describes.

        Raises:
            UsageError: a value has no meaning here.
        """
        if self.response_format not in ("b64_json", "url"):
            raise UsageError(f"response_format '{self.response_format[:40]}' is not b64_json or url")
        if self.output_format not in ("png", "jpeg", "webp"):
            raise UsageError(f"output_format '{self.output_format[:40]}' is not png, jpeg or webp")
        changes: dict[str, float | int | list[float] | None] = {}
        if self.size != "auto":
            match = _SIZE.fullmatch(self.size)
            if match is None:
                raise UsageError(f"size '{self.size[:40]}' is not WIDTHxHEIGHT or auto")
            changes = {"sampling.width": int(match[1]), "sampling.height": int(match[2])}
        return RunBody(
            recipe=self.model,
            prompts=(self.prompt,),
            negative_prompt=self.negative_prompt,
            seed=self.seed,
            count=self.n,
            adapter_scales=() if self.adapter_scale is None else (self.adapter_scale,),
            identity=self.identity,
            changes=changes,
            previews=self.stream and self.partial_images > 0,
        )


def openai_api(studio: Studio) -> APIRouter:
    """The routes of the images API."""
    api = APIRouter(prefix="/v1", include_in_schema=False)

    @api.get("/models")
    def models() -> Any:
        """All recipes as models."""
        return {"object": "list", "data": [_model(each["name"]) for each in studio.recipes()]}

    @api.get("/models/{name}")
    def model(name: str) -> Any:
        """A recipe as a model."""
        studio.recipe(name)
        return _model(name)

    @api.post("/images/generations")
    async def generations(http: Request) -> Response:
        """Generate images of a saved identity, or of the person in a photo given as a data URL."""
        try:
            call = ImageCall.model_validate(_without_ignored(await _json(http)))
        except ValidationError as error:
            raise first_problem(error) from error
        photos = [] if call.photo is None else [_data(call.photo)]
        return await _answer(studio, call, photos, http, "image_generation")

    @api.post("/images/edits")
    async def edits(http: Request) -> Response:
        """Generate images of the person in the given photos."""
        async with http.form(max_files=2 * studio.limits.photos, max_fields=64) as form:
            call, photos = await _edit(form)
            return await _answer(studio, call, photos, http, "image_edit")

    return api


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "fastface"}


async def _json(http: Request) -> dict[str, Any]:
    try:
        content = json.loads(await http.body())
    except (ValueError, RecursionError) as error:
        raise UsageError("the body is not JSON") from error
    if not isinstance(content, dict):
        raise UsageError("the body is not a JSON object")
    return content


def _without_ignored(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in IGNORED and value is not None}


async def _edit(form: FormData) -> tuple[ImageCall, list[bytes]]:
    """The fields and photos of a multipart call."""
    fields: dict[str, Any] = {}
    photos = []
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name not in ("image", "image[]"):
                raise UsageError(f"the file '{name[:40]}' has no meaning here", "send photos as image[]")
            photos.append(await value.read())
        else:
            fields[name] = value
    try:
        return ImageCall.model_validate(_without_ignored(fields)), photos
    except ValidationError as error:
        raise first_problem(error) from error


def _data(url: str) -> bytes:
    match = _DATA_URL.match(url)
    if match is None:
        raise UsageError("photo is not a data URL of an image", "addresses on the web are not fetched")
    try:
        return base64.b64decode(url[match.end() :], validate=True)
    except binascii.Error as error:
        raise UsageError("photo is not valid base64") from error


async def _answer(studio: Studio, call: ImageCall, photos: list[bytes], http: Request, kind: str) -> Response:
    def submit() -> ServedRun:
        person = Person(photos=read_photos(photos, studio.limits))
        key = http.headers.get("idempotency-key")
        return studio.submit(call.body(), person, client_of(http), key)[0]

    run = await run_in_threadpool(submit)
    if call.stream:
        return EventSourceResponse(_events(studio, run, call, kind))
    await _until_ended(studio, run, http)
    _check(run)
    base = str(http.base_url).rstrip("/")
    images = [_image(image, call, base) for image in run.images]
    content = {"created": int(time.time()), "data": images, "output_format": call.output_format}
    return JSONResponse(content, headers={"x-fastface-run": run.id})


async def _until_ended(studio: Studio, run: ServedRun, http: Request) -> None:
    """Wait for a run; cancel it if the client goes away and could not ask for it again."""

    async def ended() -> None:
        async for _ in run.events():
            pass

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    waiting, leaving = asyncio.create_task(ended()), asyncio.create_task(gone())
    await asyncio.wait((waiting, leaving), return_when=asyncio.FIRST_COMPLETED)
    leaving.cancel()
    if not waiting.done():
        if "idempotency-key" not in http.headers:
            studio.cancel(run)
        await waiting


def _check(run: ServedRun) -> None:
    """Raise the error of a run that did not finish."""
    if run.error is not None:
        raise run.error
    if run.state != "finished":
        raise FastFaceError("the run was cancelled")


def _image(image: ServedImage, call: ImageCall, base: str) -> dict[str, Any]:
    if call.response_format == "url":
        return {"url": f"{base}{image.record['url']}?format={call.output_format}"}
    return {"b64_json": _encoded(image, call.output_format), "seed": image.record["seed"]}


def _encoded(image: ServedImage, output_format: str) -> str:
    return base64.b64encode(image.encoded(output_format)).decode()


async def _events(
    studio: Studio, run: ServedRun, call: ImageCall, kind: str
) -> AsyncIterator[dict[str, str]]:
    """Partial images and finished images in the format of the API."""
    sent = 0
    size = f"{run.recipe.sampling.width}x{run.recipe.sampling.height}"
    common = {"background": "opaque", "quality": "auto", "output_format": call.output_format}
    preview_steps = _partial_steps(run.recipe.sampling.steps, call.partial_images)
    try:
        async for event in run.events():
            properties = {"created_at": int(time.time()), "size": size, **common}
            if event.name == "step" and event.data["step"] in preview_steps and event.data["previews"]:
                for preview in event.data["previews"]:
                    partial = _partial(preview, call.output_format)
                    data = {"b64_json": partial, "partial_image_index": sent, **properties}
                    yield _event(f"{kind}.partial_image", data)
                    sent += 1
            elif event.name == "image":
                image = _encoded(run.images[event.data["index"]], call.output_format)
                data = {"b64_json": image, "usage": USAGE, **properties}
                yield _event(f"{kind}.completed", data)
            elif event.name == "failed":
                yield _event("error", {"error": as_openai(event.data["error"])})
    except asyncio.CancelledError:
        studio.cancel(run)
        raise


USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
"""Nothing is counted in tokens here."""


def _partial_steps(steps: int, partial_images: int) -> set[int]:
    """The steps after which a partial image is sent, evenly spread, without the last step."""
    count = min(partial_images, steps - 1)
    return {round(steps * (index + 1) / (count + 1)) for index in range(count)}


def _partial(preview: str, output_format: str) -> str:
    webp = base64.b64decode(preview.partition(",")[2])
    encoded = io.BytesIO()
    with Image.open(io.BytesIO(webp)) as image:
        image.save(encoded, format=output_format.upper())
    return base64.b64encode(encoded.getvalue()).decode()


def _event(name: str, data: Mapping[str, Any]) -> dict[str, str]:
    return {"event": name, "data": json.dumps({"type": name, **data})}


def as_openai(error: Mapping[str, Any]) -> dict[str, Any]:
    """An error record in the format of the API."""
    message = error["message"] + (f"; {error['hint']}" if error["hint"] else "")
    kind = "invalid_request_error" if error["code"] in (2, 5) else "server_error"
    return {"message": message, "type": kind, "param": None, "code": error["kind"]}
