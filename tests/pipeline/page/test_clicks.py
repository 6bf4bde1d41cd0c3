"""Tests the queue of the web page: order, progress, cancelling, visitors who leave."""

import threading
import time

import numpy as np
import pytest
from PIL import Image
from web_page import Slow, Visitor, png, wait_for

from pixart_jax.errors import UserError
from pixart_jax.pipeline.image_files import read_png_settings
from pixart_jax.pipeline.page import clicks as module
from pixart_jax.pipeline.page import server
from pixart_jax.pipeline.page.clicks import Clicks, Dropped

ADA = "a" * 22


@pytest.fixture
def clicks(pipe, tmp_path):
    (tmp_path / "out").mkdir()
    made = Clicks(pipe, {"checkpoint": "tiny"}, tmp_path / "out", tmp_path / "temporary")
    made.listeners["abc"] = 1
    yield made
    made.close()


def submit(clicks, session="abc", visitor=ADA, **changes):
    values = {name: control.value for name, control in clicks.form.controls.items()}
    values |= {"prompt": "a corgi", "width": 32, "height": 32, "steps": 2, "guidance_scale": 1.0}
    return clicks.submit(session, visitor, values | changes)


def names(tmp_path):
    return sorted(path.name for path in (tmp_path / "out").glob("*.png"))


def test_a_click_reports_its_progress_and_its_images(clicks, pipe, tmp_path, monkeypatch):
    seen = []
    watched = module.generate

    def watching(*args):
        for each in watched(*args):
            seen.append((click.batch, click.step, round(click.progress, 2)))
            yield each

    monkeypatch.setattr(module, "generate", watching)
    click = submit(clicks, count=2, steps=4, seed=5)
    assert click.done.wait(60) and click.error is None
    assert seen == [((1, 1), 4, 0.5), ((2, 2), 4, 1.0)] and not clicks.computing
    assert names(tmp_path) == ["00000-5-a-corgi.png", "00000-6-a-corgi.png"]
    assert clicks.history == {ADA: click.paths} and dict.fromkeys(click.paths, "a corgi") == clicks.pictures
    expected = pipe("a corgi", width=32, height=32, steps=4, seed=5, guidance_scale=1.0, images_per_prompt=2)
    np.testing.assert_array_equal([np.asarray(Image.open(path)) for path in click.paths], expected)
    assert read_png_settings(click.paths[0])["made_with"]["watched"] is True


def test_strength_leaves_out_steps(clicks):
    path = clicks.uploads.add(png(np.zeros((32, 32, 3), np.uint8)))
    click = submit(clicks, image=path, strength=0.5, steps=6)
    assert click.done.wait(60) and click.error is None
    assert (click.steps, click.step, click.progress) == (3, 3, 1.0)


def test_waiting_clicks_know_their_position_and_can_be_cancelled(clicks, monkeypatch, tmp_path):
    slow = Slow(monkeypatch)
    for session in ("second", "third"):
        clicks.listeners[session] = 1
    first = submit(clicks, prompt="first", count=3)
    assert slow.started.acquire(timeout=60)
    second, third = (submit(clicks, session, prompt=session) for session in ("second", "third"))
    assert [clicks.before(each) for each in (first, second, third)] == [None, 1, 2]
    clicks.cancel("second")
    assert second.done.is_set() and isinstance(second.error, Dropped)
    assert [clicks.before(each) for each in (second, third)] == [None, 1]
    # The click that is computed ends after the batch; its finished images stay.
    slow.ready.release()
    assert slow.started.acquire(timeout=60)
    clicks.cancel("abc")
    clicks.cancel("nobody")
    assert not first.done.is_set()
    slow.ready.release()
    assert first.done.wait(60) and isinstance(first.error, Dropped) and len(first.paths) == 1
    slow.ready.release()
    assert third.done.wait(60) and third.error is None
    assert names(tmp_path) == ["00000-0-first.png", "00001-0-third.png"]


def test_cancelling_between_two_steps_decodes_nothing(clicks, pipe, monkeypatch, tmp_path):
    decoded, decode = [], pipe.decode
    monkeypatch.setattr(pipe, "decode", lambda *args: decoded.append(args) or decode(*args))
    watched = module.generate

    def cancelling(pipe, requests, batch_size, callback):
        def watch(step):
            clicks.cancel("abc")
            callback(step)

        return watched(pipe, requests, batch_size, watch)

    monkeypatch.setattr(module, "generate", cancelling)
    click = submit(clicks, count=4)
    assert click.done.wait(60) and isinstance(click.error, Dropped)
    assert not decoded and not names(tmp_path) and not click.step


def test_the_queue_is_bounded_and_drops_clicks_without_a_visitor(clicks, monkeypatch, tmp_path):
    slow = Slow(monkeypatch)
    monkeypatch.setattr(module, "_PATIENCE", 0.2)
    first = submit(clicks, prompt="first", count=3)
    assert slow.started.acquire(timeout=60)
    waiting = []
    for number in range(module.MAX_WAITING):
        clicks.listeners[f"waiting_{number}"] = 1
        waiting.append(submit(clicks, f"waiting_{number}"))
    with pytest.raises(UserError, match="8 clicks are waiting already"):
        submit(clicks, "late")
    # Others leave, or never ask for the result, and make room.
    del clicks.listeners["waiting_0"], clicks.listeners["waiting_3"]
    time.sleep(0.3)
    late = submit(clicks)
    assert [each.done.is_set() for each in waiting] == [number in (0, 3) for number in range(8)]
    assert clicks.before(late) == 7
    # The visitor of the first click leaves after one of three images.
    slow.ready.release()
    assert slow.started.acquire(timeout=60)
    clicks.listeners["abc"] = 0
    slow.ready.release()
    assert first.done.wait(60) and isinstance(first.error, Dropped)
    assert names(tmp_path) == ["00000-0-first.png"]


def test_an_error_ends_a_click_and_not_the_queue(clicks, monkeypatch):
    monkeypatch.setattr(module, "generate", lambda *_: 1 / 0)
    broken = submit(clicks)
    assert broken.done.wait(60) and isinstance(broken.error, ZeroDivisionError)
    monkeypatch.undo()
    fine = submit(clicks)
    assert fine.done.wait(60) and fine.error is None


def test_many_who_cancel_at_once_leave_an_empty_queue(clicks, monkeypatch):
    slow = Slow(monkeypatch)
    for _ in range(1000):
        slow.ready.release()
    ended = []

    def use(session):
        clicks.listeners[session] = 1
        for _ in range(5):
            try:
                click = submit(clicks, session)
            except UserError:
                continue
            clicks.cancel(session)
            ended.append(click.done.wait(60))

    threads = [threading.Thread(target=use, args=[f"s{number}"]) for number in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert ended and all(ended)
    wait_for(lambda: not clicks.computing)
    assert not clicks._waiting


def test_closing_ends_waiting_clicks(pipe, tmp_path, monkeypatch):
    slow = Slow(monkeypatch)
    clicks = Clicks(pipe, {}, tmp_path, tmp_path / "temporary")
    clicks.listeners["abc"] = 1
    first = submit(clicks)
    assert slow.started.acquire(timeout=60)
    second = submit(clicks)
    clicks.close()
    slow.ready.release()
    assert first.done.wait(60) and second.done.wait(60)
    assert isinstance(first.error, Dropped) and isinstance(second.error, Dropped)
    assert not list(tmp_path.iterdir())


def test_every_click_has_the_weights_of_its_sliders(pipe, adapted, gradio, tmp_path):
    with server.serve(
        adapted, {"checkpoint": "tiny"}, out=str(tmp_path / "out"), port=0, block=False
    ) as page:
        visitor = Visitor(page)
        sliders = {
            each["props"]["elem_id"]: each["props"]
            for each in visitor.config["components"]
            if (each["props"].get("elem_id") or "").startswith("adapter-")
        }
        shown = [(s["label"], s["minimum"], s["maximum"], s["value"]) for s in sliders.values()]
        assert shown == [("Weight of ink.safetensors", -2, 2, 0.5), ("Weight of moss", -2, 3, 3)]
        records = []
        for changes in ({"adapter-0": 0, "adapter-1": 0}, {"adapter-1": 1}, {}):
            (path,) = visitor.images(**changes)
            records.append(read_png_settings(path))
            weights = {"adapter-0": 0.5, "adapter-1": 3.0} | changes
            assert [each["weight"] for each in records[-1]["adapters"]] == list(weights.values())
            if not any(weights.values()):
                expected = pipe("a corgi", width=32, height=32, seed=0, steps=2, guidance_scale=1.0)
                np.testing.assert_array_equal(Image.open(path), expected[0])
        assert len({record["fingerprint"] for record in records}) == 3
        for value, words in (
            (2.5, "between -2.0 and 2.0"),
            (float("nan"), "is nan"),
            ("1", "is &#x27;1&#x27;"),
        ):
            assert words in visitor.error(**{"adapter-0": value})
        assert "fill in the field" in visitor.error(**{"adapter-0": None})
