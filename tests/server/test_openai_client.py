"""The unmodified `openai` client drives the pocket stack."""

from __future__ import annotations

import base64
import io

import openai
import pytest
from PIL import Image
from support.served import PHOTO


@pytest.fixture
def images(server):
    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="unused", max_retries=0)
    yield client
    client.close()


def opened(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_models_are_recipes(images):
    names = [model.id for model in images.models.list()]
    assert "pocket-fastface" in names
    assert images.models.retrieve("pocket-fastface").owned_by == "fastface"


def test_edit_puts_the_person_into_an_image(images):
    with PHOTO.open("rb") as photo:
        answer = images.images.edit(model="pocket-fastface", image=photo, prompt="a woman smiling", n=2)
    assert [opened(image.b64_json).size for image in answer.data] == [(128, 128)] * 2
    assert '"pocket-fastface"' in opened(answer.data[0].b64_json).text["fastface"]


def test_edit_takes_several_photos(images):
    photos = [("a.png", PHOTO.read_bytes()), ("b.png", PHOTO.read_bytes())]
    answer = images.images.edit(model="pocket", image=photos, prompt="a portrait", size="64x64")
    assert opened(answer.data[0].b64_json).size == (64, 64)


def test_generate_with_a_saved_identity_or_a_photo(images):
    saved = images.images.generate(
        model="pocket", prompt="a portrait", extra_body={"identity": "me", "seed": 5}
    )
    url = "data:image/png;base64," + base64.b64encode(PHOTO.read_bytes()).decode()
    photo = images.images.generate(model="pocket", prompt="a portrait", extra_body={"photo": url, "seed": 5})
    assert opened(saved.data[0].b64_json).tobytes() == opened(photo.data[0].b64_json).tobytes()


def test_formats_and_urls(images):
    jpeg = images.images.generate(
        model="pocket", prompt="a portrait", output_format="jpeg", extra_body={"identity": "me"}
    )
    assert opened(jpeg.data[0].b64_json).format == "JPEG"
    link = images.images.generate(
        model="pocket", prompt="a portrait", response_format="url", extra_body={"identity": "me"}
    )
    assert link.data[0].url.startswith(str(images.base_url).removesuffix("/v1/"))


@pytest.mark.parametrize("partial", [0, 2])
def test_streaming_sends_partial_images(images, partial):
    stream = images.images.generate(
        model="pocket",
        prompt="a portrait",
        stream=True,
        partial_images=partial,
        extra_body={"identity": "me"},
    )
    events = list(stream)
    assert [event.type for event in events] == [
        *["image_generation.partial_image"] * partial,
        "image_generation.completed",
    ]
    assert [opened(event.b64_json).format for event in events] == ["PNG"] * (partial + 1)
    assert events[-1].size == "128x128"


def test_streaming_edits(images):
    with PHOTO.open("rb") as photo:
        events = list(images.images.edit(image=photo, prompt="a portrait", stream=True, partial_images=1))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_errors_have_the_format_of_the_api(images):
    with pytest.raises(openai.BadRequestError, match="there is no recipe 'dall-e-3'"):
        images.images.generate(model="dall-e-3", prompt="x", extra_body={"identity": "me"})
    with pytest.raises(openai.BadRequestError, match="there is no person"):
        images.images.generate(model="pocket", prompt="x")
    with pytest.raises(openai.NotFoundError):
        images.models.retrieve("nothing/else")
    with pytest.raises(openai.BadRequestError, match="addresses on the web are not fetched"):
        images.images.generate(model="pocket", prompt="x", extra_body={"photo": "http://localhost/a.png"})
    blank = io.BytesIO()
    Image.new("RGB", (128, 128), "white").save(blank, "PNG")
    with pytest.raises(openai.UnprocessableEntityError, match="no face found"):
        images.images.edit(model="pocket", prompt="x", image=("a.png", blank.getvalue()))
