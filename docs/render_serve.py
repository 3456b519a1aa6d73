"""Takes docs/images/serve.png and serve-phone.png in Chromium: python docs/render_serve.py ADDRESS

ADDRESS is that of `fastface serve --recipe pocket` on this machine, freshly started.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[1]
FINISHED = ".tile .frame:not([disabled])"


def story(page: Page, address: str, prompts: list[str]) -> None:
    """Generate one image per prompt, then compare the methods."""
    page.goto(address)
    page.locator("#methods input").first.wait_for(state="attached")
    page.set_input_files("#file", str(ROOT / "examples" / "portrait.png"))
    page.locator(".face").first.wait_for()
    for number, prompt in enumerate(prompts):
        page.fill("#prompt", prompt)
        page.fill("#seed", "5")
        if number == len(prompts) - 1:
            page.check("#compare")
        else:
            page.fill("#count", "4")
        page.click("#generate")
        page.locator(f".run:first-child {FINISHED}").nth(3).wait_for(timeout=60000)
        page.fill("#count", "1")
    page.locator(f".group {FINISHED}").nth(5).wait_for(timeout=60000)
    page.locator("#form").evaluate("form => form.scrollTo(0, 0)")
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(500)


def take(page: Page, name: str) -> None:
    """Write a screenshot with a palette of 256 colors, which is a third of the size."""
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(256)
    image.save(ROOT / "docs" / "images" / name, optimize=True)


def main(address: str) -> None:
    """Take both."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        desktop = browser.new_page(viewport={"width": 1440, "height": 900})
        story(desktop, address, ["comic book style; a smiling woman", "a woman smiling, photo"])
        take(desktop, "serve.png")
        phone = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
        phone.goto(address)
        phone.locator(FINISHED).first.wait_for(timeout=60000)
        phone.set_input_files("#file", str(ROOT / "examples" / "portrait.png"))
        phone.locator(".face").first.wait_for()
        phone.fill("#prompt", "a woman smiling, photo")
        phone.wait_for_timeout(500)
        take(phone, "serve-phone.png")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
