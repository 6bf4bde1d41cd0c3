"""Tests the web page in a real browser, with a tiny model."""

import base64
import json

import numpy as np
import pytest
from PIL import Image
from web_page import Screen, Slow, Visitor, png, wait_for

from pixart_jax.pipeline.image_files import read_png_settings
from pixart_jax.pipeline.page import form, server

PROMPT = "a corgi – reading ☕"
# What a visitor can use, or must be told about.
CONTROLS = {"textbox", "spinbutton", "slider", "combobox", "checkbox", "button", "link"}


@pytest.fixture
def page(pipe, gradio, tmp_path):
    with server.serve(pipe, {"checkpoint": "tiny"}, out=str(tmp_path / "out"), port=0, block=False) as page:
        yield page


def small(screen):
    """The smallest image, in the fewest steps."""
    screen.click("#advanced button")
    screen.fill("steps", "2")
    for side in ("width", "height"):
        screen.fill(side, "32")


def settings(screen):
    return "".join(screen.find("#settings").text.replace('"', "").split())


def test_type_generate_see_and_read(page, pipe, browser, tmp_path):
    from selenium.webdriver.common.keys import Keys

    assert page.local_url.startswith("http://127.0.0.1:")
    screen = Screen(browser, page.local_url)
    # The most used controls are visible at once, the others are not.
    for name in ("prompt", "count", "seed", "width", "height"):
        assert screen.find(f"#{name}").is_displayed()
    assert not screen.all("#negative_prompt, #steps")
    small(screen)
    screen.fill("prompt", PROMPT)
    screen.fill("negative_prompt", "blurry")
    screen.fill("width", "48")
    screen.fill("seed", "7")
    screen.fill("count", "2")
    screen.press(Keys.CONTROL, Keys.ENTER)
    screen.shows("Done: 2 of 2 images.", "#status")
    images = screen.images(2)
    assert {each.get_attribute("alt") for each in images} == {PROMPT}
    # The browser shows exactly the bytes of the file.
    shown = browser.execute_async_script(
        "const done = arguments[1]; fetch(arguments[0]).then(r => r.blob()).then(b => {"
        "const f = new FileReader(); f.onload = () => done(f.result.split(',')[1]); f.readAsDataURL(b)})",
        images[0].get_property("src"),
    )
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == ["00000-7-a-corgi-reading.png", "00000-8-a-corgi-reading.png"]
    assert base64.b64decode(shown) == files[0].read_bytes()
    request = read_png_settings(files[0])["request"]
    assert request["prompt"] == PROMPT and request["negative_prompt"] == "blurry"
    assert (request["steps"], request["seed"]) == (2, 7)
    expected = pipe(
        PROMPT, negative_prompt="blurry", steps=2, seed=7, width=48, height=32, images_per_prompt=2
    )
    np.testing.assert_array_equal([np.asarray(Image.open(file)) for file in files], expected)
    # The page shows the settings of the first image, then those of the clicked image.
    wait_for(lambda: "seed:7" in settings(screen))
    assert "blurry" in settings(screen) and "tiny" in settings(screen)
    screen.all("#gallery img")[1].click()
    wait_for(lambda: "seed:8" in settings(screen))
    behaviour = {"behavior": "allow", "downloadPath": str(tmp_path / "downloads")}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    screen.click("#download")
    screen.click("#archive")
    for name, content in ((files[1].name, files[1].read_bytes()), ("images.zip", b"PK")):
        path = tmp_path / "downloads" / name
        wait_for(path.exists)
        assert path.read_bytes().startswith(content)
    # The history survives a reload. Its settings can be put back.
    browser.refresh()
    history = screen.images(2, "#history img")
    assert screen.value("seed") == "0" and screen.value("prompt") == ""
    history[0].click()
    wait_for(lambda: "seed:8" in settings(screen))
    screen.click("#use")
    wait_for(lambda: screen.value("prompt") == PROMPT)
    assert (screen.value("seed"), screen.value("width"), screen.value("count")) == ("8", "48", "1")
    # The error about an empty prompt is shown on the page.
    screen.fill("prompt", " ")
    screen.click("#generate")
    screen.shows("The prompt is empty")
    assert len(list((tmp_path / "out").iterdir())) == 2
    # The page sends requests only to its own server.
    asked = set()
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        params = message["params"]
        # Ignore the requests of the browser's own start page.
        if message["method"] == "Network.requestWillBeSent" and "chrome:" not in params["documentURL"]:
            asked.add(params["request"]["url"])
    assert asked and {url for url in asked if not url.startswith((page.local_url, "data:", "blob:"))} == set()


def test_upload_and_paint_a_mask(page, browser, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    picture = tmp_path / "start.png"
    picture.write_bytes(png(np.full((60, 120, 3), 200, np.uint8)))
    (tmp_path / "start.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "broken.png").write_bytes(picture.read_bytes()[:50])
    screen = Screen(browser, page.local_url)
    small(screen)
    screen.fill("prompt", "a corgi")
    screen.click("#start button")
    chooser = screen.find("#image input[type=file]")
    chooser.send_keys(str(tmp_path / "broken.png"))
    screen.shows("HTTP 400: The image cannot be read")
    chooser = screen.find("#image input[type=file]")
    chooser.send_keys(str(picture))
    canvas = screen.find("#mask canvas")
    wait_for(canvas.is_displayed)
    wait_for(lambda: canvas.get_property("width") == 512)
    # The size follows the upload.
    size = page._clicks.form.size_of(page._clicks.pipe, "120:60")
    wait_for(lambda: (screen.value("width"), screen.value("height")) == tuple(map(str, size)))
    for side in ("width", "height"):
        screen.fill(side, "32")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    moves = ActionChains(browser).move_to_element_with_offset(canvas, -canvas.size["width"] // 3, 0)
    moves.click_and_hold().move_by_offset(0, 20).release().perform()
    screen.click("#generate")
    screen.shows("Done: 1 of 1 image.", "#status")
    (first,) = (tmp_path / "out").glob("*.png")
    request = read_png_settings(first)["request"]
    mask = np.asarray(Image.open(request["mask"]))
    assert mask.shape == (60, 120) and mask[:, :60].any() and not mask[:, 60:].any()
    assert request["strength"] == 1.0
    # Without paint, the whole image is the start.
    screen.click("#mask button")
    screen.click("#generate")
    wait_for(lambda: len(list((tmp_path / "out").glob("*.png"))) == 2)
    second = max((tmp_path / "out").glob("*.png"))
    assert "mask" not in read_png_settings(second)["request"]
    assert read_png_settings(second)["request"]["strength"] == 0.8
    # Put the mask back, and add to it with the keyboard.
    wait_for(lambda: len(screen.all("#history img")) == 2)
    screen.all("#history img")[1].click()
    wait_for(lambda: "strength:1" in settings(screen))
    screen.click("#use")
    canvas = screen.find("#mask canvas")
    script = (
        "const c = arguments[0]; const p = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "let n = 0; for (let i = 0; i < p.length; i += 4) n += p[i] > p[i + 1] + 50; return n"
    )
    wait_for(lambda: browser.execute_script(script, canvas) > 0)
    browser.execute_script("arguments[0].focus()", canvas)
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.SPACE).perform()
    screen.click("#generate")
    wait_for(lambda: len(list((tmp_path / "out").glob("*.png"))) == 3)
    third = np.asarray(
        Image.open(read_png_settings(max((tmp_path / "out").glob("*.png")))["request"]["mask"])
    )
    assert third[:, 60:].any() and (third[:, :40] == mask[:, :40]).mean() > 0.99
    # Without the image, there is no brush.
    screen.click("#image button[aria-label*=lear], #image button[aria-label*=emove]")
    wait_for(lambda: not screen.find("#mask canvas").is_displayed())


def test_wait_and_cancel_with_the_keyboard(page, browser, tmp_path, monkeypatch):
    from selenium.webdriver.common.keys import Keys

    slow = Slow(monkeypatch)
    other = Visitor(page)
    assert other.call("other", prompt="other")[0] == 200
    waiting = other.wait("other")
    assert slow.started.acquire(timeout=60)
    screen = Screen(browser, page.local_url)
    assert not screen.find("#cancel").is_enabled()
    screen.fill("prompt", "mine")
    screen.press(Keys.CONTROL, Keys.ENTER)
    screen.shows("Waiting: 1 click before yours.", "#status")
    wait_for(screen.find("#cancel").is_enabled)
    screen.press(Keys.ESCAPE)
    screen.shows("Cancelled: 0 of 1 image.", "#status")
    screen.press(Keys.CONTROL, Keys.ENTER)
    screen.shows("Waiting: 1 click before yours.", "#status")
    slow.ready.release()
    screen.shows("Image 1 of 1", "#status")
    assert screen.find("#status progress").get_attribute("aria-label") == "Progress"
    screen.press(Keys.ESCAPE)
    screen.shows("Cancelling", "#status")
    slow.ready.release()
    screen.shows("Cancelled: 0 of 1 image.", "#status")
    wait_for(lambda: not screen.find("#cancel").is_enabled())
    # Closing the page drops the click.
    screen.press(Keys.CONTROL, Keys.ENTER)
    screen.shows("Image 1 of 1", "#status")
    browser.get("about:blank")
    slow.ready.release()
    wait_for(lambda: not page.computing)
    waiting.close()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["00000-0-other.png"]


def luminance(colour):
    parts = np.array([float(part) for part in colour.split("(")[1].strip(")").split(",")[:3]]) / 255
    return np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ (
        0.2126,
        0.7152,
        0.0722,
    )


# The colour of every visible text, and the first opaque background behind it.
TEXTS = """
return [...document.querySelectorAll('label span, label, p, h1, h3, button, input, textarea, .placeholder')]
  .filter((each) => each.offsetParent && !each.disabled && each.type !== 'checkbox')
  .filter((each) => (each.value || each.innerText || '').trim())
  .map((each) => {
    let behind = each;
    const colour = (element) => getComputedStyle(element).backgroundColor;
    while (behind.parentElement && /rgba\\(.*, 0\\)|transparent/.test(colour(behind))) {
      behind = behind.parentElement;
    }
    return [(each.value || each.innerText).trim().slice(0, 40), getComputedStyle(each).color, colour(behind)];
  });
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_controls_have_names_and_texts_can_be_read(page, browser, theme):
    feature = {"name": "prefers-color-scheme", "value": theme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    screen = Screen(browser, page.local_url)
    for name in ("start", "advanced"):
        screen.click(f"#{name} button")
    screen.find("#steps input")
    seen = [
        (text, (max(pair) + 0.05) / (min(pair) + 0.05), back)
        for text, front, back in wait_for(lambda: browser.execute_script(TEXTS))
        for pair in [(luminance(front), luminance(back))]
    ]
    assert {"Prompt", "Generate", "Steps"} <= {text for text, _, _ in seen}
    assert [each for each in seen if each[1] < 4.5] == []
    dark = luminance(browser.execute_script("return getComputedStyle(document.body).backgroundColor")) < 0.1
    assert dark == (theme == "dark")
    # The browser's accessibility tree: what a screen reader says.
    browser.execute_cdp_cmd("Accessibility.enable", {})
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    found = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node.get("ignored") and node["role"]["value"] in CONTROLS
    ]
    names = {name for _, name in found}
    labels = [
        each.label for each in page._clicks.form.controls.values() if each.sampler in (None, "dpm_solver")
    ]
    missing = [
        label
        for label in labels
        if label not in ("Mask", "Image to start from") and not any(label in n for n in names)
    ]
    assert not missing and [each for each in found if not each[1].strip()] == []


def test_tab_goes_through_the_page_in_reading_order(page, browser):
    from selenium.webdriver.common.keys import Keys

    screen = Screen(browser, page.local_url)
    screen.click("#prompt textarea")
    reached, name = [], ""
    for _ in range(12):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        name = browser.execute_script(
            "const e = document.activeElement; return e.closest('[id]:not([id^=html-])')?.id || e.innerText"
        )
        reached.append(name)
        width = browser.execute_script("return getComputedStyle(document.activeElement).outlineWidth")
        assert width == "3px", name
    order = ["generate", "count", "seed", "new_seed", "width", "height"]
    assert [each for each in reached if each in order] == order


def test_the_aspect_ratio_sets_the_size(page, browser):
    screen = Screen(browser, page.local_url)
    before = screen.value("seed")
    screen.click("#new_seed")
    wait_for(lambda: screen.value("seed") != before)
    screen.choose("aspect_ratio", "16:9")
    width, height = page._clicks.form.ratios["16:9"]
    wait_for(lambda: (screen.value("width"), screen.value("height")) == (str(width), str(height)))
    screen.fill("width", "32")
    wait_for(lambda: screen.value("aspect_ratio") == "as given")


EVIL = (
    "<img src=x onerror=window.pwned=1></script><script>window.pwned=2</script>[a](javascript:alert(1)) **b**"
)


def test_hostile_texts_do_not_run_in_the_browser(pipe, gradio, browser, tmp_path, monkeypatch):
    monkeypatch.setattr(form, "MAX_TEXT", 200)
    out = str(tmp_path / EVIL.replace("/", "_"))
    with server.serve(pipe, {"checkpoint": EVIL}, out=out, port=0, block=False) as page:
        screen = Screen(browser, page.local_url)
        screen.shows("<img src=x", "#title")
        small(screen)
        for name in ("prompt", "negative_prompt"):
            screen.fill(name, EVIL)
        screen.click("#generate")
        screen.shows("<img src=x", "#settings")
        # Messages repeat the values of fields, and those that someone sends without the page.
        screen.fill("prompt", EVIL * 2)
        screen.click("#generate")
        screen.shows("prompt has ")
        screen.fill("prompt", EVIL)
        sampler = json.dumps(json.dumps(EVIL)[1:-1])
        browser.execute_script(
            "const send = window.fetch; window.fetch = (url, options) => send(url, options?.body ? "
            f"{{...options, body: options.body.replace('dpm_solver', {sampler})}} : options)"
        )
        screen.click("#generate")
        screen.shows("sampler is '<img src=x")
        assert browser.execute_script("return window.pwned") is None
        assert not browser.find_elements("css selector", "img[src=x], a[href^=javascript]")
