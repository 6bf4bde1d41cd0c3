import numpy as np
import pytest
import tiny

from pixart_jax.pipeline.batching import generate
from pixart_jax.pipeline.requests import Request


@pytest.fixture(scope="module")
def pipe(random_params):
    return tiny.make_pipe(random_params)


def test_requests_of_any_kind_together(pipe):
    requests = [
        Request("a corgi", steps=2, seed=3),
        Request("a fox", steps=2, height=16, width=64),
        Request("a corgi", steps=2, seed=4, negative_prompt="blurry"),
        Request("a fox", steps=3, seed=3, sampler="ddim", guidance_scale=1),
    ]
    made = {index: (pixels, latents) for index, pixels, latents in generate(pipe, requests)}
    assert sorted(made) == [0, 1, 2, 3] and made[1][0].shape == (16, 64, 3)
    for index, kwargs in (
        (0, dict(prompts="a corgi", steps=2, seed=3)),
        (2, dict(prompts="a corgi", steps=2, seed=4, negative_prompt="blurry")),
        (3, dict(prompts="a fox", steps=3, seed=3, sampler="ddim", guidance_scale=1)),
    ):
        np.testing.assert_array_equal(made[index][1], pipe(**kwargs, output="latents")[0])


def test_each_distinct_text_is_encoded_once(random_params, monkeypatch):
    """All texts are encoded before the first image is generated, so that the text encoder can be freed."""
    pipe, events = tiny.make_pipe(random_params, keep_text_encoder=False), []
    encoder = pipe.text_encoder
    encode_each, release = encoder.encode_each, encoder.release

    def recorded(texts):
        events.extend(texts)
        return encode_each(texts)

    monkeypatch.setattr(encoder, "encode_each", recorded)
    monkeypatch.setattr(encoder, "release", lambda: events.append("released") or release())
    requests = [Request(text, steps=1, seed=k) for k, text in enumerate(["a", "b", "a", "a", "c"])]
    for index, _, _ in generate(pipe, requests):
        events.append(index)
    first = events.index(0)
    assert sorted(events[: events.index("released")]) == ["", "a", "b", "c"]
    assert set(events[first:]) == {0, 1, 2, 3, 4, "released"}
    events.clear()
    assert len(list(generate(pipe, requests))) == 5
    assert set(events) == {"released"}
