"""Helpers of the tests of the web page: visitors with and without a browser, and slow generation."""

import base64
import functools
import http.client
import importlib.util
import io
import json
import os
import shutil
import threading
import time
import urllib.parse

import numpy as np
import pytest
from PIL import Image

from pixart_jax.pipeline.page import clicks

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


def needs(present, what):
    """Skips the test if something is not installed; in CI the test fails instead."""
    if not present:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"needs {what}")


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


def open_browser(profile, *more):
    """Starts Chromium; skips the test if it is not installed."""
    found = [shutil.which(name) for name in ("chromium", "chromedriver")]
    needs(all(found), "chromium and chromedriver (Debian: chromium, chromium-driver)")
    needs(importlib.util.find_spec("selenium"), "the extra 'test'")
    from selenium import webdriver as selenium

    options = selenium.ChromeOptions()
    options.binary_location = found[0]
    for argument in (*CHROMIUM, f"--user-data-dir={profile}", *more):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    return selenium.Chrome(options=options, service=selenium.ChromeService(found[1]))


class Screen:
    """Someone who uses the page in a browser."""

    def __init__(self, driver, url):
        self.driver = driver
        driver.get(url)
        self.find("#prompt textarea")

    def find(self, css):
        return wait_for(lambda: self.driver.find_element("css selector", css))

    def all(self, css):
        return self.driver.find_elements("css selector", css)

    def fill(self, name, value):
        """Types into the control of a setting."""
        field = self.find(f"#{name} textarea, #{name} input[type=number], #{name} input")
        field.clear()
        field.send_keys(value)

    def choose(self, name, ending):
        """Chooses the option of a list whose text ends so, when the list is there."""

        def chosen():
            options = [each for each in self.all("[role=option]") if each.text.strip().endswith(ending)]
            for option in options[:1]:
                option.click()
            return options

        self.click(f"#{name} input")
        wait_for(chosen)

    def value(self, name):
        return self.find(f"#{name} textarea, #{name} input").get_property("value")

    def click(self, css):
        wait_for(lambda: self.driver.find_element("css selector", css).click() or True)

    def press(self, *keys):
        """Presses keys where the focus is."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).key_down(keys[0]).send_keys(*keys[1:]).key_up(keys[0]).perform()

    def shows(self, text, css="body"):
        wait_for(lambda: text in self.driver.find_element("css selector", css).text)

    def images(self, count, css="#gallery img"):
        """The images that are shown, once there are so many."""
        return wait_for(
            lambda: (
                len(found := self.all(css)) == count
                and all(each.get_property("naturalWidth") for each in found)
                and found
            )
        )


def png(pixels, kind="PNG", **options):
    """An encoded image."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def drawn(pixels):
    """The value of the brush for a mask, bool [H, W]."""
    url = f"data:image/png;base64,{base64.b64encode(png(pixels)).decode()}"
    return json.dumps({"image": "x", "mask": url})


class Visitor:
    """Someone who talks HTTP to the page, without a browser."""

    def __init__(self, page):
        self.address = urllib.parse.urlsplit(page.local_url).netloc
        self.page, self.listeners = page, page._clicks.listeners

    @functools.cached_property
    def config(self):
        return json.loads(self.ask("/config")[2])

    def connect(self):
        return http.client.HTTPConnection(self.address, timeout=60)

    def ask(self, path, method="GET", body=None, **headers):
        """Returns the status, the headers and the body."""
        connection = self.connect()
        connection.request(method, path, body, headers)
        with connection.getresponse() as answer:
            return answer.status, answer.headers, answer.read()

    def call(self, session="abc", function="generate", event=None, visitor="", **changes):
        """Clicks the button, and returns the status and the answer."""
        call = next(each for each in self.config["dependencies"] if each["api_name"] == function)
        named = {each["id"]: each["props"] for each in self.config["components"]}
        names = [named[number].get("elem_id") for number in call["inputs"]]
        values = {name: named[number].get("value") for number, name in zip(call["inputs"], names)}
        values |= {"prompt": "a corgi", "width": 32, "height": 32, "seed": 0, "steps": 2}
        values |= {"guidance_scale": 1.0, None: visitor} | changes
        data = [values[name] for name in names]
        body = {"session_hash": session, "fn_index": call["id"], "data": data, "event_data": event}
        status, _, answer = self.ask(
            "/gradio_api/queue/join", "POST", json.dumps(body), **{"content-type": "application/json"}
        )
        return status, json.loads(answer)

    def upload(self, data, name="a.png", count=1):
        """Uploads a file, and returns the status and the answer: a list of paths, or a message."""
        line = "----limit"
        part = f'--{line}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        body = (part + data + b"\r\n") * count + f"--{line}--\r\n".encode()
        kind = {"content-type": f"multipart/form-data; boundary={line}"}
        status, _, answer = self.ask("/gradio_api/upload", "POST", body, **kind)
        return status, json.loads(answer) if status == 200 else answer.decode()

    def wait(self, session="abc"):
        """Connects to wait for the results of a session."""
        connection = self.connect()
        connection.request("GET", f"/gradio_api/queue/data?session_hash={session}")
        return connection.getresponse()

    def messages(self, session="abc"):
        """Yields the messages for a session until its event is completed."""
        with self.wait(session) as answer:
            for line in answer:
                message = json.loads(line.removeprefix(b"data:")) if line.strip() else {}
                yield message
                if message.get("msg") == "process_completed":
                    return
        raise AssertionError("the server did not answer")

    def result(self, session="abc", **changes):
        """Clicks, and returns the output of the last message, with `data` or `error`."""
        assert self.call(session, **changes)[0] == 200
        return [each["output"] for each in self.messages(session) if "output" in each][-1]

    def error(self, **changes):
        """Clicks, and returns the message that the page shows."""
        return self.result(**changes)["error"]

    def images(self, session="abc", **changes):
        """Generates images, and returns their paths."""
        before = set(self.page._clicks.pictures)
        output = self.result(session, **changes)
        assert "error" not in output, output
        return [path for path in self.page._clicks.pictures if path not in before]


def uploaded(path):
    """The value of an image control for an upload, as a page sends it."""
    return {"path": path, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}


class Slow:
    """`generate` of black images: the test says when the next one is ready."""

    def __init__(self, monkeypatch):
        self.started, self.ready = threading.Semaphore(0), threading.Semaphore(0)
        self.prompts, self.ended = [], threading.Semaphore(0)
        monkeypatch.setattr(clicks, "generate", self)

    def __call__(self, pipe, requests, batch_size, callback):
        self.prompts.append(requests[0].prompt)
        try:
            for index in range(len(requests)):
                self.started.release()
                assert self.ready.acquire(timeout=60)
                yield index, np.zeros((32, 32, 3), np.uint8), None
        finally:
            self.ended.release()
