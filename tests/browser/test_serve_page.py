"""The page of `fastface serve` in Chromium: the complete story, on a desktop and on a phone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.served import PHOTO, Server, serving

SIZES = {"desktop": (1440, 900), "phone": (390, 844)}
FINISHED = ".tile .frame:not([disabled])"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("page")) as running:
        yield running


@pytest.fixture(params=SIZES)
def page(request: pytest.FixtureRequest, browser: Any, server: Server) -> Iterator[Any]:
    width, height = SIZES[request.param]
    page = browser.new_page(viewport={"width": width, "height": height})
    problems: list[str] = []
    page.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(server.address)
    page.locator("#methods input").first.wait_for(state="attached")
    yield page
    assert not [text for text in problems if "status of 4" not in text]
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is wider than the screen"
    wider = "(panel => panel.scrollWidth > panel.clientWidth)(document.querySelector('.panel'))"
    assert not page.evaluate(wider), "nothing is wider than the form"
    page.close()


def accessibility_problems(page: Any) -> list[str]:
    """Serious and critical findings of axe-core."""
    axe = pytest.importorskip("axe_playwright_python", reason="pip install axe-playwright-python")
    source = next(Path(axe.__file__).parent.rglob("axe.min.js")).read_text(encoding="utf-8")
    findings = page.evaluate(f"{source}; axe.run()")["violations"]
    return [
        f"{finding['id']}: {finding['nodes'][0]['html'][:200]}"
        for finding in findings
        if finding["impact"] in ("serious", "critical")
    ]


def two_people(tmp_path: Path) -> Path:
    photo = Image.open(PHOTO).convert("RGB")
    both = Image.new("RGB", (2 * photo.width, photo.height))
    both.paste(photo, (0, 0))
    both.paste(photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT), (photo.width, 0))
    path = tmp_path / "two.png"
    both.save(path)
    return path


def drop(page: Any, path: Path) -> None:
    """Drop a file onto the page, as a user drags it from a folder."""
    content = list(path.read_bytes())
    transfer = page.evaluate_handle(
        """content => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(content)], "me.png", {type: "image/png"}));
            return transfer;
        }""",
        content,
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})


def test_photo_to_compared_images(page, server, tmp_path):
    assert accessibility_problems(page) == []
    page.click("#generate")
    if page.locator("#prompt").evaluate("e => e.validity.valueMissing"):
        page.fill("#prompt", "a portrait")
        page.click("#generate")
    assert page.locator("#form-message").inner_text() == "Add a photo or choose a saved identity first."

    drop(page, two_people(tmp_path))
    page.locator(".face").nth(1).click()
    assert page.locator(".face").nth(1).get_attribute("aria-pressed") == "true"
    assert accessibility_problems(page) == []

    page.fill("#prompt", "a person smiling, comic")
    page.fill("#seed", "7")
    page.click("#generate")
    page.locator(FINISHED).first.wait_for(timeout=60000)

    page.check("#compare")
    page.click("#generate")
    page.locator(f".group {FINISHED}").nth(5).wait_for(timeout=60000)
    with server.client() as client:
        runs = client.get("/api/runs").json()["runs"]
    assert {run["images"][0]["seed"] for run in runs[:6]} == {7}
    assert len({run["recipe"] for run in runs[:6]}) == 6
    assert runs[0]["request"]["face_box"] is not None
    assert accessibility_problems(page) == []

    page.locator(f".group {FINISHED}").first.click()
    page.select_option("#viewer-compare", index=2)
    slider = page.locator(".compare input")
    slider.focus()
    slider.press("ArrowRight")
    assert slider.input_value() == "50.5"
    assert accessibility_problems(page) == []
    with page.expect_download() as downloading:
        page.click("#viewer-save")
    metadata = json.loads(Image.open(downloading.value.path()).text["fastface"])
    assert metadata["seed"] == 7
    page.click("#viewer-reuse")
    assert page.input_value("#seed") == "7"


def test_cancel_save_the_identity_and_come_back(page):
    page.set_input_files("#file", str(PHOTO))
    page.locator(".face").first.wait_for()
    page.fill("#prompt", "a portrait, cancelled")
    page.fill("#count", "16")
    page.click("#generate")
    page.get_by_role("button", name="Cancel").first.click()
    page.get_by_text("cancelled", exact=True).first.wait_for(timeout=60000)

    page.click("#identity-save")
    page.fill("#ask-value", "../bad")
    page.get_by_role("button", name="OK").click()
    page.get_by_text("is not a name for an identity").wait_for()
    page.fill("#ask-value", "my friend")
    page.get_by_role("button", name="OK").click()
    page.get_by_text("Saved as my friend").wait_for()

    page.click("#licenses-open")
    page.locator("#licenses-rows tr").first.wait_for()
    assert accessibility_problems(page) == []
    page.click("#licenses-close")

    page.reload()
    page.get_by_text("a portrait, cancelled").first.wait_for()
    assert page.locator("#identity option").all_inner_texts() == ["none", "my friend"]
    page.select_option("#identity", "my friend")
    page.fill("#prompt", "a portrait")
    page.click("#generate")
    page.locator(f".run:first-child {FINISHED}").first.wait_for(timeout=60000)


def test_comparing_leaves_connections_for_cancel(page, server):
    """A browser opens six connections to a server, a comparison has six runs, each with events."""
    streams: set[Any] = set()
    most = 0

    def opened(request: Any) -> None:
        nonlocal most
        if request.url.endswith("/events"):
            streams.add(request)
            most = max(most, len(streams))

    def closed(request: Any) -> None:
        streams.discard(request)

    page.on("request", opened)
    page.on("requestfinished", closed)
    page.on("requestfailed", closed)
    page.set_input_files("#file", str(PHOTO))
    page.locator(".face").first.wait_for()
    page.fill("#prompt", "a portrait, compared")
    page.fill("#count", "8")
    page.check("#compare")
    page.click("#generate")
    page.locator(".run:first-child .tile").nth(47).wait_for(state="attached", timeout=60000)
    page.locator(f".run:first-child {FINISHED}").first.wait_for(timeout=60000)
    page.get_by_role("button", name="Cancel").first.click()
    page.get_by_role("button", name="Remove").first.wait_for(timeout=60000)
    with server.client() as client:
        runs = [run for run in client.get("/api/runs").json()["runs"] if run["request"]["count"] == 8]
    assert len(runs) >= 6
    assert "cancelled" in {run["state"] for run in runs}
    assert 1 <= most < 6, "two, and those whose end was not reported yet"


def test_a_pose_is_sent_with_instantid_alone(page):
    page.set_input_files("#file", str(PHOTO))
    page.locator(".face").first.wait_for()
    page.fill("#prompt", "a portrait")
    assert page.locator("#pose").is_hidden()
    page.select_option("#family", "hyper-instantid")
    page.set_input_files("#pose", str(PHOTO))
    assert page.locator("#pose").is_visible()
    assert accessibility_problems(page) == []
    bodies: list[bytes] = []

    def refused(route: Any) -> None:
        if route.request.method != "POST":
            route.continue_()
            return
        bodies.append(route.request.post_data_buffer)
        route.fulfill(status=429, json={"error": {"message": "the queue is full", "hint": None}})

    page.route("**/api/runs", refused)
    page.click("#generate")
    page.get_by_text("the queue is full").wait_for()
    page.select_option("#family", "hyper-pulid")
    with page.expect_response(lambda response: response.request.method == "POST"):
        page.click("#generate")
    page.select_option("#family", "hyper-instantid")
    page.click("#pose-clear")
    assert page.locator("#pose-clear").is_hidden()
    with page.expect_response(lambda response: response.request.method == "POST"):
        page.click("#generate")
    assert [b'name="pose"' in body for body in bodies] == [True, False, False]


def test_an_identity_is_saved_for_the_chosen_recipe(page):
    page.set_input_files("#file", str(PHOTO))
    page.locator(".face").first.wait_for()
    page.select_option("#family", "hyper-instantid")
    page.route(
        "**/api/identities", lambda route: route.fulfill(status=400, json={"error": {"message": "no"}})
    )
    page.click("#identity-save")
    page.fill("#ask-value", "me")
    with page.expect_request(lambda request: request.method == "POST") as sent:
        page.get_by_role("button", name="OK").click()
    assert b"hyper-instantid-fastface" in sent.value.post_data_buffer


def test_a_photo_without_a_face_is_reported(page, tmp_path):
    blank = tmp_path / "blank.png"
    Image.new("RGB", (200, 200), "white").save(blank)
    page.set_input_files("#file", str(blank))
    page.get_by_text("No face was found in blank.png").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_color_schemes_are_readable(browser, server, scheme):
    page = browser.new_page(color_scheme=scheme)
    page.goto(server.address)
    page.locator("#methods input").first.wait_for(state="attached")
    assert accessibility_problems(page) == []
    page.close()


def test_a_token_opens_the_page(browser, tmp_path):
    with serving(tmp_path, "--token", "secret-token") as server:
        address, _, _ = server.address.partition("/#")
        page = browser.new_page()
        page.goto(server.address)
        page.locator("#methods input").first.wait_for(state="attached")
        assert "secret" not in page.url
        page.close()
        page = browser.new_page()
        page.goto(address)
        page.fill("#ask-value", "wrong")
        page.get_by_role("button", name="OK").click()
        page.get_by_text("send the header Authorization").wait_for()
        page.fill("#ask-value", "secret-token")
        page.get_by_role("button", name="OK").click()
        page.locator("#methods input").first.wait_for(state="attached")
        page.close()


def test_camera_paste_and_identity_files(browser, server, tmp_path):
    with server.client() as client, PHOTO.open("rb") as photo:
        client.post("/api/identities", data={"name": "first"}, files={"photos": photo}).raise_for_status()
        (tmp_path / "me.safetensors").write_bytes(client.get("/api/identities/first").content)
    page = browser.new_page()
    page.goto(server.address)
    page.locator("#methods input").first.wait_for(state="attached")
    page.click("#camera-open")
    page.locator("#camera[open]").wait_for()
    page.click("#camera-take")
    page.get_by_text("No face was found in camera.png").wait_for()

    pasted = page.evaluate_handle(
        """content => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(content)], "p.png", {type: "image/png"}));
            return new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true});
        }""",
        list(PHOTO.read_bytes()),
    )
    page.evaluate("event => document.dispatchEvent(event)", pasted)
    page.locator(".face").first.wait_for()

    page.set_input_files("#identity-file", str(tmp_path / "me.safetensors"))
    page.fill("#ask-value", "from a file")
    page.get_by_role("button", name="OK").click()
    page.locator("#identity option", has_text="from a file").wait_for(state="attached")
    page.close()
