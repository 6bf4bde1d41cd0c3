"""Takes the pictures of the web page that docs/sample.md shows, in a real browser.

    python tests/page_screenshots.py --checkpoint=demo/emoji/stage3 --out=docs

needs the extras 'app' and 'test', and chromium.
"""

import argparse
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from web_page import Screen, open_browser, wait_for

import pixart_jax
from pixart_jax.pipeline.page.server import serve

PROMPTS = ("a yellow face", "a red apple")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--pipeline", help="folder with the text encoder and the VAE, if they are elsewhere")
    parser.add_argument("--out", default="docs", help="folder for the pictures")
    given = parser.parse_args()
    pipe = pixart_jax.load_pipeline(given.checkpoint, pipeline=given.pipeline)
    source = {"checkpoint": given.checkpoint, "weights": None, "pipeline": given.pipeline}
    with tempfile.TemporaryDirectory() as profile:
        driver = open_browser(profile, "--window-size=1400,1000", "--hide-scrollbars")
        try:
            with serve(pipe, source, port=0, block=False) as page:
                take(driver, page, Path(given.out))
        finally:
            driver.quit()


def take(driver, page, out):
    """Generates images, and takes a light picture of them and a dark one of inpainting."""
    screen = Screen(driver, page.local_url)
    screen.fill("count", "6")
    for prompt in PROMPTS:
        screen.fill("prompt", prompt)
        generate(screen)
    picture = screen.find("#gallery img").get_attribute("src")
    save(driver, out / "sample-page.png")
    path = picture.partition("file=")[2]
    screen.click("#start button")
    screen.find("#image input[type=file]").send_keys(path)
    canvas = screen.find("#mask canvas")
    wait_for(canvas.is_displayed)
    scheme = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    paint(driver, canvas)
    screen.fill("prompt", "a green apple")
    generate(screen)
    driver.set_window_size(1400, 1460)
    driver.execute_script("window.scrollTo(0, 0)")
    save(driver, out / "sample-page-dark.png")


def paint(driver, canvas):
    """Paints over the right half."""
    from selenium.webdriver.common.action_chains import ActionChains

    width, height = canvas.size["width"], canvas.size["height"]
    moves = (
        ActionChains(driver).move_to_element_with_offset(canvas, width // 6, -height // 3).click_and_hold()
    )
    for _ in range(5):
        moves.move_by_offset(width // 4, 0).move_by_offset(-(width // 4), height // 8)
    moves.release().perform()


def generate(screen):
    before = len(screen.all("#history img"))
    screen.click("#generate")
    wait_for(lambda: len(screen.all("#history img")) == before + int(screen.value("count")), seconds=300)
    screen.shows("Done", "#status")
    wait_for(lambda: all(each.get_property("naturalWidth") for each in screen.all("#gallery img")))


def save(driver, path):
    """Writes the page as a PNG of 256 colours."""
    picture = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
