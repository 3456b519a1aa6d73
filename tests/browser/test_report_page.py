"""The report page in Chromium, opened from disk and used like a reader would."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.run_folder import build_run

from fastface_cli.evaluation.report import write_report

HOSTILE_PROMPT = "</script><script>window.hacked=1</script> a <b>bold</b> prompt"
HOSTILE_NAME = 'o\'Neil "50%" #1?&amp;é<img src=x onerror=window.hacked=1>'
NO_FACE, FAILED = "am1/bob/0002-0", "fastface/cai/0001-0"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a run #1")  # characters with a meaning in URLs
    build_run(
        folder,
        identities=("ann", "bob", "cai", HOSTILE_NAME),
        prompts=("a smiling woman in a garden", "watercolour; a man reading", HOSTILE_PROMPT),
        stresses=(None, "blur"),
        held_out=True,
        fail=[FAILED],
        no_face=[NO_FACE],
        resamples=200,
    )
    write_report(folder)
    return folder


class Reader:
    """An open page and its errors."""

    def __init__(self, browser: Any, run: Path, **options: Any) -> None:
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("requestfailed", lambda request: self.problems.append(f"not loaded: {request.url}"))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto((run / "report.html").as_uri())

    def lines(self) -> list[str]:
        """Name and prompt of each gallery row."""
        titles = self.page.locator(".line h3").all_text_contents()
        prompts = self.page.locator(".line .prompt").all_text_contents()
        return [f"{title}: {prompt}" for title, prompt in zip(titles, prompts, strict=True)]

    def choose(self, label: str, value: str) -> None:
        self.page.locator("#filters").get_by_label(label, exact=True).select_option(value)

    def scores(self, column: int) -> list[str]:
        """Captions of one recipe's images, top to bottom."""
        lines = self.page.locator(".line")
        return [
            lines.nth(number).locator(".score").nth(column).text_content() for number in range(lines.count())
        ]


@pytest.fixture
def reader(browser: Any, run: Path) -> Iterator[Reader]:
    opened = Reader(browser, run)
    yield opened
    opened.context.close()
    assert opened.problems == []


def test_page_opens_from_disk_without_network(reader: Reader, run: Path) -> None:
    reader.page.get_by_role("link", name="Gallery").click()
    reader.page.wait_for_function("document.querySelector('#lines img').naturalWidth > 0")
    folder = run.as_uri()
    assert reader.requests
    assert all(address.startswith(folder) for address in reader.requests)


def test_images_load_whatever_their_file_names(reader: Reader) -> None:
    loaded = """async () => {
        for (const image of document.images) image.loading = "eager";
        await Promise.all([...document.images].map((image) => image.decode()));
        return [document.images.length, [...document.images].filter((image) => !image.naturalWidth).length];
    }"""
    images, broken = reader.page.evaluate(loaded)
    assert images >= 4 * 3 * 2 * 5 - 1  # persons, prompts, clean and blurred, two photos and three recipes
    assert broken == 0


def test_hostile_text_is_text(reader: Reader) -> None:
    reader.page.get_by_role("link", name="Gallery").click()
    assert f"{HOSTILE_NAME}: {HOSTILE_PROMPT}" in reader.lines()
    reader.page.locator("#lines button").first.click()
    assert reader.page.evaluate("window.hacked") is None
    assert reader.page.locator("main b b, main script, main img[onerror]").count() == 0


def test_filters_keep_matching_rows(reader: Reader) -> None:
    whole = reader.lines()
    assert len(whole) == 24
    reader.choose("Identity", "bob")
    reader.choose("Reference", "clean")
    assert reader.lines() == [line for line in whole[:12] if line.startswith("bob: ")]
    reader.page.get_by_role("button", name="Reset").click()
    reader.choose("light", "dim")
    assert {line.split(":")[0] for line in reader.lines()} == {"bob", HOSTILE_NAME}
    reader.page.get_by_label("Words in the prompt").fill("GARDEN smiling")
    assert {line.split(": ")[1] for line in reader.lines()} == {"a smiling woman in a garden"}
    reader.page.get_by_role("button", name="Reset").click()
    assert reader.lines() == whole
    reader.choose("Prompt", HOSTILE_PROMPT)
    assert len(reader.lines()) == 8
    reader.choose("Identity", "bob")
    reader.page.get_by_label("Words in the prompt").fill("no such words")
    assert reader.page.get_by_role("status").text_content() == "No rows match the filters."


def test_unchecked_recipes_leave_the_gallery(reader: Reader) -> None:
    captions = reader.page.locator(".line").first.locator("figcaption")
    assert [text.split("0.")[0] for text in captions.all_text_contents()] == [
        "reference",
        "held-out photo",
        "baseline",
        "am1",
        "fastface",
    ]
    reader.page.get_by_role("checkbox", name="am1").uncheck()
    assert captions.count() == 4
    reader.choose("Show", "missing")  # the image without a face belongs to am1
    assert len(reader.lines()) == 1


def test_failures_are_listed_and_filterable(reader: Reader) -> None:
    failures = reader.page.locator("#failures details")
    assert failures.count() == 1
    failures.locator("summary").click()
    assert failures.get_by_text(FAILED).is_visible()
    reader.choose("Show", "failed")
    assert reader.lines() == ["cai: watercolour; a man reading"]
    assert reader.page.locator("#lines .failed").text_content() == "out of memory on cuda:0"
    reader.choose("Show", "missing")
    assert len(reader.lines()) == 2


def test_order_sorts_rows_by_the_chosen_score(reader: Reader, run: Path) -> None:
    rows = [json.loads(line) for line in (run / "images.jsonl").read_text().splitlines()]
    ids = [row["scores"].get("id") for row in rows if row["recipe"] == "fastface"]
    known = sorted(value for value in ids if value is not None)
    reader.choose("Order", "worst")
    reader.choose("Sort by", "of 2")
    assert reader.scores(2) == ["–"] + [f"{value:.3f}" for value in known]
    reader.choose("Order", "best")
    assert reader.scores(2)[0] == f"{known[-1]:.3f}"
    reader.choose("Order", "worst")
    reader.choose("Sort by", "less 2")
    places = {(row["recipe"], row["identity"], row["prompt"], row["stress"]): row["scores"] for row in rows}
    losses = {
        place: scores["id"] - places["baseline", *place[1:]]["id"]
        for place, scores in places.items()
        if place[0] == "fastface" and scores.get("id") is not None
    }
    worst = min(losses, key=lambda place: losses[place])
    assert reader.lines()[1] == f"{worst[1]}: {worst[2]}"  # after the failed image
    reader.choose("Sort by", "")
    assert reader.lines()[0].startswith(("bob", "cai"))  # a row with a missing score


def test_lower_is_better_metrics_sort_in_reverse(reader: Reader) -> None:
    reader.choose("Metric", "5")
    reader.choose("Order", "worst")
    reader.choose("Sort by", "of 0")
    seconds = [float(text.removesuffix(" s")) for text in reader.scores(0)]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > seconds[-1]


def test_viewer_works_by_keyboard(reader: Reader) -> None:
    page = reader.page
    page.locator("#filter-0").focus()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.dataset.place"):
            break
    assert page.evaluate("document.activeElement.dataset.place") == "reference"
    viewer = page.get_by_role("dialog")
    page.keyboard.press("Enter")
    assert viewer.get_by_role("heading").text_content() == "ann · reference"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert viewer.get_by_role("heading").text_content() == "ann · baseline"
    shown = viewer.locator("img")
    assert shown.count() == 2
    assert viewer.locator("dl").get_by_text("CLIP L/14").is_visible()
    page.keyboard.press("ArrowDown")
    assert viewer.locator(".prompt").text_content() == "watercolour; a man reading"
    for _ in range(3):
        page.keyboard.press("ArrowUp")  # the first row stays
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Escape")
    assert not viewer.is_visible()
    assert page.evaluate("document.activeElement.dataset") == {"line": "1", "place": "0"}


def test_breakdown_shows_the_metric_and_links_to_the_gallery(reader: Reader, run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    page = reader.page
    tables = page.locator("#tables")
    page.get_by_role("region", name="By identity").wait_for()
    page.locator("#measure").select_option("clip_l14")
    cell = tables.locator("tr", has_text="bob").locator("td").nth(1)
    mean = summary["identities"]["bob"]["am1"]["clip_l14"]["mean"]
    assert cell.locator(".mean").text_content() == f"{mean:.3f}"
    blur = summary["stress"]["blur"]["against_clean"]["am1"]["id"]
    page.locator("#measure").select_option("id")
    shown = tables.locator("tr", has_text="blur").locator("td").nth(1).locator(".difference").text_content()
    assert shown == f"−{-blur['difference']:.3f} ▼"
    region = page.get_by_role("region", name="By identity")
    region.get_by_role("button", name="am1").click()
    values = [float(text) for text in region.locator("td:nth-child(3) .mean").all_text_contents()]
    assert values == sorted(values, reverse=True)
    region.get_by_role("button", name="am1").click()
    values = [float(text) for text in region.locator("td:nth-child(3) .mean").all_text_contents()]
    assert values == sorted(values)
    region.get_by_role("button", name="bob").click()
    assert {line.split(":")[0] for line in reader.lines()} == {"bob"}


CONTRAST = """() => {
    const light = (color) => {
        const [r, g, b] = color.match(/[\\d.]+/g).map(Number).map((value) => value / 255)
            .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (element) => {
        for (let each = element; each; each = each.parentElement) {
            const color = getComputedStyle(each).backgroundColor;
            if (!/, 0\\)$/.test(color) && color !== "transparent") return color;
        }
        return "rgb(255, 255, 255)";
    };
    const found = [];
    for (const element of document.querySelectorAll("body *")) {
        const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
        if (!own || !element.checkVisibility() || element.closest("svg, script, option")) continue;
        const [one, two] = [light(getComputedStyle(element).color), light(ground(element))];
        const ratio = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
        found.push([ratio, element.outerHTML.slice(0, 80)]);
    }
    return found.sort((a, b) => a[0] - b[0]);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_contrast_in_light_and_dark(browser: Any, run: Path, scheme: str) -> None:
    reader = Reader(browser, run, color_scheme=scheme)
    reader.page.locator("#lines button").first.click()
    actual = reader.page.evaluate(CONTRAST)
    assert len(actual) > 200
    assert actual[0][0] >= 4.5, actual[0]
    ground = reader.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    reader.context.close()


def test_narrow_screen_has_no_horizontal_scroll(browser: Any, run: Path) -> None:
    reader = Reader(browser, run, viewport={"width": 375, "height": 700})
    assert reader.page.evaluate("document.documentElement.scrollWidth") == 375
    reader.page.locator("#lines button").nth(2).click()
    wide = reader.page.evaluate("document.querySelector('dialog').scrollWidth")
    assert wide <= 375
    reader.context.close()


def test_print_hides_controls_and_includes_images(browser: Any, run: Path) -> None:
    """The button loads every image, and the PDF contains each of them."""
    reader = Reader(browser, run, color_scheme="dark")
    reader.page.evaluate("window.print = () => { window.printed = true; }")
    reader.page.get_by_role("button", name="Print with images").click()
    reader.page.wait_for_function("window.printed")
    assert reader.page.evaluate("[...document.images].every((image) => image.naturalWidth > 0)")
    pictures = reader.page.evaluate("new Set([...document.images].map((image) => image.src)).size")
    assert pictures > 20
    assert reader.page.pdf().count(b"/Subtype /Image") >= pictures
    reader.page.emulate_media(media="print")
    assert not reader.page.locator("#filters").is_visible()
    assert not reader.page.locator("nav").is_visible()
    paper = reader.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(255, 255, 255)"
    assert reader.page.locator("#results").is_visible()
    reader.context.close()


def test_two_thousand_images_open_within_three_seconds(browser: Any, tmp_path: Path) -> None:
    """Best of three: other programs may slow one of them down."""
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    picture = tmp_path / "picture.png"
    Image.fromarray(noise).save(picture, compress_level=1)
    rows = build_run(
        tmp_path / "run",
        recipes=("baseline", "am1", "am2", "dcg", "fastface", "fastface-am2"),
        identities=[f"person {number:02d}" for number in range(14)],
        prompts=[f"prompt {number}: someone in a place, doing something" for number in range(24)],
        picture=picture,
        resamples=100,
    )
    assert len(rows) == 2016
    write_report(tmp_path / "run")
    seconds = []
    for _ in range(3):
        reader = Reader(browser, tmp_path / "run")
        entries = reader.page.evaluate("performance.getEntriesByType('navigation')[0].duration")
        seconds.append(entries / 1000)
        pictures = sum(address.endswith(".png") for address in reader.requests)
        assert pictures < 200  # lazily: not all 2,016 and 14
        reader.page.get_by_role("link", name="Gallery").click()
        reader.page.wait_for_function("document.querySelector('#lines img').naturalWidth > 0")
        assert reader.problems == []
        reader.context.close()
        if seconds[-1] < 3:
            break
    assert min(seconds) < 3, seconds
