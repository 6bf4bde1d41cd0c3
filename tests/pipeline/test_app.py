"""Tests the web page in a real browser, with a tiny model."""

import base64
import dataclasses
import importlib.util
import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from pixart_jax.config import FeaturesConfig, TextEncoderConfig, TrainConfig
from pixart_jax.encoders.images import make_codec
from pixart_jax.encoders.text import TextEncoder
from pixart_jax.errors import UserError
from pixart_jax.models.pixart import PixArtConfig
from pixart_jax.pipeline import Pipeline, app
from pixart_jax.pipeline.image_files import read_png_settings
from pixart_jax.pipeline.requests import Request

# Only this machine is reachable, because the page must also work without internet access.
CHROMIUM = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,800",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
PROMPT = "a corgi – reading ☕"


@pytest.fixture(scope="module")
def pipe(random_params):
    text = TextEncoderConfig(
        tokenizer="byt5", weights="random", d_model=16, d_ff=16, d_kv=8, num_heads=2, num_layers=1
    )
    model = PixArtConfig(
        size="custom", depth=1, hidden_size=16, num_heads=2, in_channels=3, text_dim=16, text_length=32
    )
    features = FeaturesConfig(image_size=32, codec="pixels", latent_scale=1.0, text_encoder=text)
    config = TrainConfig(model=model, features=features)
    encoder = TextEncoder(text, 32, batch_size=1)
    backbone = nnx.merge(*random_params(model))
    return Pipeline(backbone, config, encoder, make_codec(features), devices=jax.devices()[:1])


def needs(present, what):
    """Skips the test if something is not installed; in CI the test fails instead."""
    if not present:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"needs {what}")


@pytest.fixture
def gradio():
    needs(importlib.util.find_spec("gradio"), "the extra 'app'")


@pytest.fixture
def browser(tmp_path):
    found = [shutil.which(name) for name in ("chromium", "chromedriver")]
    needs(all(found), "chromium and chromedriver (Debian: chromium, chromium-driver)")
    needs(importlib.util.find_spec("selenium"), "the extra 'test'")
    from selenium import webdriver as selenium

    options = selenium.ChromeOptions()
    options.binary_location = found[0]
    for argument in (*CHROMIUM, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(found[1]))
    yield driver
    driver.quit()


def wait_for(what, seconds=90):
    """Returns the first true value of `what()`. While the page loads, elements may appear and disappear."""
    from selenium.common.exceptions import WebDriverException

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            value = what()
        except WebDriverException:
            value = None
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError("the page did not get there")


def test_type_generate_see_and_read(pipe, gradio, browser, tmp_path):
    page = app.serve(pipe, {"checkpoint": "tiny"}, out=str(tmp_path / "out"), port=0, block=False)
    try:
        assert page.local_url.startswith("http://127.0.0.1:")
        browser.get(page.local_url)

        def fill(name, value, kind="input"):
            field = wait_for(lambda: browser.find_element("css selector", f"#{name} {kind}"))
            field.clear()
            field.send_keys(value)

        def click(css):
            wait_for(lambda: browser.find_element("css selector", css).click() or True)

        fill("prompt", PROMPT, "textarea")
        fill("negative_prompt", "blurry", "textarea")
        fill("steps", "3")
        fill("width", "48")
        fill("seed", "7")
        fill("count", "2")
        click("#generate")
        images = wait_for(
            lambda: (
                (found := browser.find_elements("css selector", "#gallery img"))
                and len(found) >= 2
                and all(image.get_property("naturalWidth") for image in found)
                and found
            )
        )
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
        assert (request["steps"], request["seed"]) == (3, 7)
        expected = pipe(PROMPT, negative_prompt="blurry", steps=3, seed=7, width=48, images_per_prompt=2)
        np.testing.assert_array_equal([np.asarray(Image.open(file)) for file in files], expected)

        def settings():
            return browser.find_element("css selector", "#settings").text

        # The page shows the settings of the first image, then those of the clicked image.
        text = wait_for(lambda: PROMPT in settings() and settings())
        assert "blurry" in text and "tiny" in text and "seed:7" in "".join(text.replace('"', "").split())
        browser.find_elements("css selector", "#gallery img")[1].click()
        wait_for(lambda: "seed:8" in "".join(settings().replace('"', "").split()))
        # The error about an empty prompt is shown on the page.
        fill("prompt", " ", "textarea")
        click("#generate")
        wait_for(lambda: "The prompt is empty" in browser.find_element("css selector", "body").text)
        assert len(list((tmp_path / "out").iterdir())) == 2
        # The page sends requests only to its own server.
        asked = set()
        for entry in browser.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            params = message["params"]
            # Ignore the requests of the browser's own start page.
            if message["method"] == "Network.requestWillBeSent" and "chrome:" not in params["documentURL"]:
                asked.add(params["request"]["url"])
        assert (
            asked
            and {url for url in asked if not url.startswith((page.local_url, "data:", "blob:"))} == set()
        )
    finally:
        page.close()


def test_every_setting_with_a_label_has_a_control(pipe, gradio, tmp_path):
    page = app.build_page(pipe, {}, tmp_path)
    controls = {block.elem_id: block for block in page.blocks.values() if getattr(block, "elem_id", None)}
    resolved, _ = pipe.resolve(Request(""))
    labelled = [field for field in dataclasses.fields(Request) if field.metadata.get("label")]
    assert {"prompt", "seed", "sampler"} <= {field.name for field in labelled}
    for field in labelled:
        control = controls[field.name]
        assert control.label == field.metadata["label"]
        assert (control.value or "") == (getattr(resolved, field.name) or ""), field.name


def test_a_port_in_use_is_one_line(pipe, gradio, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port={port}"):
            app.serve(pipe, {}, out=str(tmp_path), port=port, block=False)
    assert not list(Path(tmp_path).iterdir())


def test_without_gradio_the_extra_is_named(pipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"pip install 'pixart_jax\[app\]'"):
        app.serve(pipe, {}, out=str(tmp_path / "out"), block=False)
    assert not (tmp_path / "out").exists()
