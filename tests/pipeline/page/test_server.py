"""Tests the web page over HTTP and in a real browser, with a tiny model."""

import base64
import dataclasses
import functools
import http.client
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from PIL import Image

from pixart_jax.config import FeaturesConfig, TextEncoderConfig, TrainConfig
from pixart_jax.encoders.images import make_codec
from pixart_jax.encoders.text import TextEncoder
from pixart_jax.errors import UserError
from pixart_jax.models.pixart import PixArtConfig
from pixart_jax.pipeline import Pipeline, app, guard
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
    page = app.build_page(app.Clicks(pipe, {}, tmp_path))
    controls = {block.elem_id: block for block in page.blocks.values() if getattr(block, "elem_id", None)}
    resolved, _ = pipe.resolve(Request(""))
    labelled = [field for field in dataclasses.fields(Request) if field.metadata.get("label")]
    assert {"prompt", "seed", "sampler"} <= {field.name for field in labelled}
    for field in labelled:
        control = controls[field.name]
        assert control.label == field.metadata["label"]
        assert (control.value or "") == (getattr(resolved, field.name) or ""), field.name


@pytest.fixture
def served(pipe, gradio, tmp_path):
    with app.serve(pipe, {"checkpoint": "tiny"}, out=str(tmp_path / "out"), port=0, block=False) as page:
        yield Visitor(page)


class Visitor:
    """Someone who talks HTTP to the page, without a browser."""

    def __init__(self, page):
        self.address = urllib.parse.urlsplit(page.local_url).netloc
        self.listeners = page._clicks.listeners

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

    def call(self, session="abc", function="generate", event=None, **changes):
        """Clicks the button, and returns the status and the answer."""
        call = next(
            each for each in self.config["dependencies"] if function in (each["api_name"], each["id"])
        )
        named = {each["id"]: each["props"] for each in self.config["components"]}
        values = {named[number]["elem_id"]: named[number].get("value") or "" for number in call["inputs"]}
        values |= {
            "prompt": "a corgi",
            "width": 32,
            "height": 32,
            "seed": 0,
            "steps": 2,
            "guidance_scale": 1.0,
        }
        data = [(values | changes)[named[number]["elem_id"]] for number in call["inputs"]]
        body = {"session_hash": session, "fn_index": call["id"], "data": data, "event_data": event}
        status, _, answer = self.ask(
            "/gradio_api/queue/join", "POST", json.dumps(body), **{"content-type": "application/json"}
        )
        return status, json.loads(answer)

    def wait(self, session="abc"):
        """Connects to wait for the results of a session."""
        connection = self.connect()
        connection.request("GET", f"/gradio_api/queue/data?session_hash={session}")
        return connection.getresponse()

    def result(self, session="abc", **changes):
        """Clicks, and returns the output, with `data` or `error`."""
        assert self.call(session, **changes)[0] == 200
        with self.wait(session) as answer:
            for line in answer:
                message = json.loads(line.removeprefix(b"data:")) if line.strip() else {}
                if message.get("msg") == "process_completed":
                    return message["output"]
        raise AssertionError("the server did not answer")


class Slow:
    """`generate` of black images: the test says when the next one is ready."""

    def __init__(self, monkeypatch):
        self.started, self.ready = threading.Semaphore(0), threading.Semaphore(0)
        self.prompts, self.ended = [], threading.Semaphore(0)
        monkeypatch.setattr(app, "generate", self)

    def __call__(self, pipe, requests, batch_size):
        self.prompts.append(requests[0].prompt)
        try:
            for index in range(len(requests)):
                self.started.release()
                assert self.ready.acquire(timeout=60)
                yield index, np.zeros((32, 32, 3), np.uint8), None
        finally:
            self.ended.release()


def test_only_the_images_of_the_page_are_served(served, tmp_path):
    out = tmp_path / "out"
    for name in ("secret.txt", "page.html", "00000-0-earlier.png"):
        (out / name).write_text("<script>alert(1)</script>")
    paths = [each["image"]["path"] for each in served.result(count=2)["data"][0]]
    assert [Path(path).name for path in paths] == ["00001-0-a-corgi.png", "00001-1-a-corgi.png"]
    for path in paths:
        status, headers, body = served.ask(f"/gradio_api/file={path}")
        assert (status, body) == (200, Path(path).read_bytes())
        assert headers["content-type"] == "image/png" and headers["x-content-type-options"] == "nosniff"
    for name in ("secret.txt", "page.html", "00000-0-earlier.png", "", f"../{tmp_path.name}"):
        assert served.ask(f"/gradio_api/file={out / name}")[0] == 404
        picture = {"index": 0, "value": {"image": {"path": str(out / name)}}}
        shown = served.result(function=1, event=picture)
        assert "no such image" in shown["error"]
    picture = {"index": 0, "value": {"image": {"path": paths[1]}}}
    assert served.result(function=1, event=picture)["data"][0]["request"]["seed"] == 1
    # Gradio would copy a file that a value names into the folder.
    file = {"path": str(out / "secret.txt"), "meta": {"_type": "gradio.FileData"}}
    assert served.call(prompt=file)[0] == 400
    for path in ("/gradio_api/upload", "/gradio_api/run/generate", "/gradio_api/call/generate"):
        assert served.ask(path, "POST", b"x" * 1000)[0] == 405
    assert len(list(out.iterdir())) == 5  # nothing is uploaded or copied


def test_other_sites_are_refused(served):
    for header in ({"Host": "example.org"}, {"Origin": "http://example.org"}, {"Origin": "null"}):
        for method, path in (("GET", "/"), ("GET", "/config"), ("OPTIONS", "/gradio_api/queue/join")):
            status, headers, _ = served.ask(path, method, **header)
            assert status == 403 and not [name for name in headers if name.startswith("access-control")]
    assert served.ask("/", Origin=f"http://{served.address}")[0] == 200


@pytest.mark.parametrize(
    "change, words",
    [
        ({"prompt": "x" * 4001}, "prompt has 4,001 characters"),
        ({"negative_prompt": "x" * 4001}, "negative_prompt has 4,001 characters"),
        ({"sampler": "x" * 4001}, "sampler has 4,001 characters"),
        ({"prompt": " "}, "The prompt is empty"),
        ({"prompt": 5}, "prompt is 5"),
        ({"prompt": "\ud800"}, "not Unicode"),
        ({"prompt": None}, "fill in every field"),
        ({"count": 0}, "count is 0: it must be between 1 and 16"),
        ({"count": 1e9}, "count is 1000000000"),
        ({"count": "2"}, "count is"),
        ({"count": float("nan")}, "count is nan"),
        ({"steps": 101}, "steps is 101: it must be between 1 and 100"),
        ({"steps": 10**9}, "steps is 1000000000: it must be"),
        ({"steps": 10**4000}, "steps is 1000"),
        ({"steps": [1]}, "steps is [1]"),
        ({"steps": True}, "steps is True"),
        ({"width": 4097}, "width is 4097: it must be between 1 and 4096"),
        ({"width": 100_000}, "width is 100000: it must be"),
        ({"height": 1e308}, "height is"),
        ({"seed": -1}, "seed is -1"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"guidance_scale": 16}, "guidance_scale is 16"),
        ({"sampler": "magic"}, "sampler is"),
    ],
)
def test_values_that_no_control_allows_are_one_line(pipe, tmp_path, change, words):
    clicks = app.Clicks(pipe, {}, tmp_path)
    values = {"prompt": "a", "negative_prompt": "", "width": 32, "height": 32, "seed": 0, "steps": 2}
    values |= {"guidance_scale": 1.0, "sampler": "dpm_solver", "count": 1} | change
    with pytest.raises(UserError) as caught:
        clicks.generate("abc", values.pop("count"), values)
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.fixture
def adapted(pipe):
    """The pipeline with two adapters."""
    adapters = [
        (tiny.make_adapter(k, pipe.model.config, name=f"loras/{name}"), weight)
        for k, (name, weight) in enumerate([("ink.safetensors", 0.5), ("moss", 3.0)])
    ]
    devices = jax.devices()[:1]
    return Pipeline(
        pipe.model, pipe.config, pipe.text_encoder, pipe.codec, devices=devices, adapters=adapters
    )


def test_every_click_has_the_weights_of_its_sliders(pipe, adapted, gradio, tmp_path):
    with app.serve(adapted, {"checkpoint": "tiny"}, out=str(tmp_path / "out"), port=0, block=False) as page:
        visitor = Visitor(page)
        sliders = {
            each["props"]["elem_id"]: each["props"]
            for each in visitor.config["components"]
            if each["props"].get("elem_id", "").startswith("adapter-")
        }
        shown = [(s["label"], s["minimum"], s["maximum"], s["value"]) for s in sliders.values()]
        assert shown == [("Weight of ink.safetensors", -2, 2, 0.5), ("Weight of moss", -2, 3, 3)]
        records = []
        for changes in ({"adapter-0": 0, "adapter-1": 0}, {"adapter-1": 1}, {}):
            paths = [each["image"]["path"] for each in visitor.result(**changes)["data"][0]]
            records.append(read_png_settings(paths[0]))
            weights = {"adapter-0": 0.5, "adapter-1": 3.0} | changes
            assert [each["weight"] for each in records[-1]["adapters"]] == list(weights.values())
            if not any(weights.values()):
                expected = pipe("a corgi", width=32, height=32, seed=0, steps=2, guidance_scale=1.0)
                np.testing.assert_array_equal(Image.open(paths[0]), expected[0])
        assert len({record["fingerprint"] for record in records}) == 3
        for value, words in ((2.5, "between -2.0 and 2.0"), (float("nan"), "is nan"), ("1", "is 1:")):
            assert words in visitor.result(**{"adapter-0": value})["error"]
        assert "The weight of ink.safetensors is None" in visitor.result(**{"adapter-0": None})["error"]


def test_a_refused_value_is_shown_and_not_logged(served, tmp_path, capfd):
    assert "prompt has 5,000 characters" in served.result(prompt="<b>" + "x" * 4997)["error"]
    assert served.result(sampler="<b>")["error"].startswith("sampler is &#x27;&lt;b&gt;&#x27;")
    assert served.call(prompt="x" * 2_000_000)[0] == 413
    assert capfd.readouterr() == ("", "") and not list((tmp_path / "out").iterdir())


def test_an_image_that_cannot_be_written_is_one_line(served, tmp_path, capfd):
    (tmp_path / "out").rmdir()
    (tmp_path / "out").write_text("a file")
    assert "cannot be written" in served.result()["error"]
    err = capfd.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_the_queue_is_bounded_and_drops_clicks_without_a_client(served, monkeypatch, tmp_path):
    slow = Slow(monkeypatch)
    monkeypatch.setattr(app, "_PATIENCE", 0.2)
    assert served.call("first", prompt="first", count=3)[0] == 200
    watching = served.wait("first")
    assert slow.started.acquire(timeout=60)
    for number in range(app.MAX_WAITING):
        assert served.call(f"waiting_{number}", prompt=f"waiting_{number}", count=16, steps=100)[0] == 200
    assert served.call("late")[0] == 503
    # A client that goes while it waits, others that never asked for the result, and one that stays.
    served.wait("waiting_0").close()
    last = served.wait(f"waiting_{app.MAX_WAITING - 1}")
    wait_for(lambda: served.listeners[f"waiting_{app.MAX_WAITING - 1}"])
    # The client of the first click goes after one of three images.
    slow.ready.release()
    assert slow.started.acquire(timeout=60)
    watching.close()
    wait_for(lambda: not served.listeners["first"] and not served.listeners["waiting_0"])
    slow.ready.release()
    assert slow.ended.acquire(timeout=60)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["00000-0-first.png"]
    assert slow.started.acquire(timeout=60)
    assert slow.prompts == ["first", f"waiting_{app.MAX_WAITING - 1}"]
    last.close()
    wait_for(lambda: not served.listeners)
    slow.ready.release()
    assert slow.ended.acquire(timeout=60)


def test_closing_removes_the_temporary_folder_while_a_click_is_computed(pipe, gradio, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    slow = Slow(monkeypatch)
    page = app.serve(pipe, {}, port=0, block=False)
    visitor = Visitor(page)
    assert visitor.call(count=2)[0] == 200
    waiting = visitor.wait()
    slow.ready.release()
    assert slow.started.acquire(timeout=60) and slow.started.acquire(timeout=60)
    assert [path.name for path in tmp_path.rglob("*.png")] == ["00000-0-a-corgi.png"] and page.computing
    page.close()
    assert not list(tmp_path.iterdir())
    slow.ready.release()
    assert slow.ended.acquire(timeout=60)
    assert not list(tmp_path.iterdir())
    waiting.close()
    page.close()  # may be called again


SERVER = """
import sys
from pixart_jax.pipeline import app
from pixart_jax.pipeline.requests import Request

class Pipe:
    def resolve(self, request):
        return Request("", width=32, height=32, guidance_scale=1.0), None

app.serve(Pipe(), {}, port=0)
"""


@pytest.mark.parametrize(
    "ends", [(signal.SIGKILL, signal.SIGTERM), (signal.SIGINT,)], ids=["killed, then SIGTERM", "Ctrl-C"]
)
def test_nothing_stays_in_the_temporary_folder(gradio, tmp_path, ends):
    status = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 0}
    for number in ends:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            env=os.environ | {"TMPDIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert server.stdout.readline().startswith(f"images in {tmp_path}")
        assert len(list(tmp_path.iterdir())) == 1  # that of a killed process is gone
        server.send_signal(number)
        assert server.communicate(timeout=60) == ("", "")
        assert server.returncode == status[number]
        assert bool(list(tmp_path.iterdir())) == (number == signal.SIGKILL)


def test_folders_in_use_and_of_others_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "file").touch()
    (tmp_path / f"{app._PREFIX}link").symlink_to(tmp_path / "else")
    (tmp_path / f"{app._PREFIX}file").touch()
    with app._temporary_folder() as first:
        (Path(first) / "picture.png").touch()
        with app._temporary_folder() as second:
            assert (Path(first) / "picture.png").exists() and first != second
    assert (tmp_path / "else" / "file").exists()
    assert sorted(path.name[-4:] for path in tmp_path.iterdir()) == ["else", "file", "link"]


@pytest.mark.parametrize(
    "host, users, warned",
    [("0.0.0.0", [], True), ("0.0.0.0", [("ada", "secret")], False), ("localhost", [], False)],
)
def test_an_open_page_without_users_is_warned_about(pipe, gradio, tmp_path, capsys, host, users, warned):
    with app.serve(pipe, {}, out=str(tmp_path), host=host, port=0, users=users, block=False) as page:
        assert Visitor(page).ask("/")[0] == (401 if users else 200)
    out, err = capsys.readouterr()
    assert err.startswith("warning: everyone who reaches port") == warned and err.count("\n") == warned
    assert "secret" not in out + err


def test_requests_are_refused_while_too_many_connections_are_open(pipe, gradio, tmp_path, monkeypatch):
    monkeypatch.setattr(app, "MAX_CONNECTIONS", 3)
    with app.serve(pipe, {}, out=str(tmp_path), port=0, block=False) as page:
        visitor = Visitor(page)
        assert visitor.ask("/")[0] == 200
        opened = [visitor.connect() for _ in range(3)]
        for connection in opened:
            connection.connect()
        wait_for(lambda: visitor.ask("/")[0] == 503)
        for connection in opened:
            connection.close()
        wait_for(lambda: visitor.ask("/")[0] == 200)


def is_closed(connection):
    connection.sock.settimeout(0.1)
    try:
        return not connection.sock.recv(1)
    except TimeoutError:
        return False


def test_connections_without_a_request_are_closed(pipe, gradio, tmp_path, monkeypatch):
    monkeypatch.setattr(app, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(guard, "REQUEST_SECONDS", 1.0)
    with app.serve(pipe, {}, out=str(tmp_path), port=0, block=False) as page:
        visitor = Visitor(page)
        opened = [visitor.connect() for _ in range(5)]
        for connection in opened:
            connection.connect()
        assert is_closed(opened[4]) and not is_closed(opened[0])
        opened[0].sock.sendall(b"GET / HTTP/1.1\r\nX-")
        wait_for(lambda: all(map(is_closed, opened[:4])))
        assert visitor.ask("/")[0] == 200


EVIL = (
    "<img src=x onerror=window.pwned=1></script><script>window.pwned=2</script>[a](javascript:alert(1)) **b**"
)


def test_hostile_texts_do_not_run_in_the_browser(pipe, gradio, browser, tmp_path, monkeypatch):
    monkeypatch.setattr(app, "MAX_TEXT", 200)
    out = str(tmp_path / EVIL.replace("/", "_"))
    with app.serve(pipe, {"checkpoint": EVIL}, out=out, port=0, block=False) as page:
        browser.get(page.local_url)

        def fill(name, value, kind="textarea"):
            field = wait_for(lambda: browser.find_element("css selector", f"#{name} {kind}"))
            field.clear()
            field.send_keys(value)

        def generate():
            wait_for(lambda: browser.find_element("css selector", "#generate").click() or True)

        def shows(text, css="body"):
            wait_for(lambda: text in browser.find_element("css selector", css).text)

        shows("<img src=x", "h2 ~ p, .prose")
        for name in ("prompt", "negative_prompt"):
            fill(name, EVIL)
        for name in ("width", "height", "steps"):
            fill(name, "1" if name == "steps" else "32", "input")
        generate()
        shows("<img src=x", "#settings")
        # Messages repeat the values of fields, and those that someone sends without the page.
        fill("prompt", EVIL * 2)
        generate()
        shows("prompt has ")
        fill("prompt", EVIL)
        sampler = json.dumps(json.dumps(EVIL)[1:-1])
        browser.execute_script(
            "const send = window.fetch; window.fetch = (url, options) => send(url, options?.body ? "
            f"{{...options, body: options.body.replace('dpm_solver', {sampler})}} : options)"
        )
        generate()
        shows("sampler is '<img src=x")
        assert browser.execute_script("return window.pwned") is None
        assert not browser.find_elements("css selector", "img[src=x], a[href^=javascript]")


def test_a_port_in_use_is_one_line(pipe, gradio, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port={port}.*give another --port"):
            app.serve(pipe, {}, out=str(tmp_path), port=port, block=False)
    assert not list(Path(tmp_path).iterdir())


def test_without_gradio_the_extra_is_named(pipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"pip install 'pixart_jax\[app\]'"):
        app.serve(pipe, {}, out=str(tmp_path / "out"), block=False)
    assert not (tmp_path / "out").exists()
