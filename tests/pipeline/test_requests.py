import json

import numpy as np
import pytest
import tiny

from pixart_jax.errors import UserError
from pixart_jax.pipeline.requests import (
    Request,
    draw,
    make_record,
    read_requests,
    requests_of_embeddings,
    resolve,
    save_embeddings,
    with_latents,
)


@pytest.fixture(scope="module")
def pipe(random_params):
    return tiny.make_pipe(random_params)


def test_prompts_come_from_text_or_file(tmp_path):
    assert read_requests("a corgi") == [[Request("a corgi")]]
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa corgi\r\n\n  ein Hörnchen \u2028🙂\n../x\na corgi".encode())
    texts = ["a corgi", "ein Hörnchen \u2028🙂", "../x", "a corgi"]
    assert [images[0].prompt for images in read_requests(str(file))] == texts
    many = read_requests(str(file), {"steps": 3, "seed": 5}, images_per_prompt=2)
    assert [request.seed for request in many[2]] == [5, 6] and many[3][1].steps == 3
    long = ("word " * 400).strip()
    assert read_requests(long)[0][0].prompt == long
    assert read_requests("two\nlines")[0][0].prompt == "two lines"


def test_lines_of_json_have_fields_of_their_own(tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "a\u2028b", "seed": 9, "height": 64, "image": "x.png", "images_per_prompt": 3},
        {"prompt": "", "sampler_options": {"order": 3}, "guidance_scale": 2, "negative_prompt": "blurry"},
    ]
    file.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    first, second = read_requests(str(file), {"steps": 7, "seed": 1}, images_per_prompt=2)
    assert [request.seed for request in first] == [9, 10, 11] and first[0].image == str(tmp_path / "x.png")
    assert first[0].height == 64 and first[0].prompt == "a\u2028b"
    assert [request.seed for request in second] == [1, 2] and second[0].steps == 7
    assert second[0].sampler_options == {"order": 3} and second[0].negative_prompt == "blurry"
    # A line's own size is not mixed with a default of the other kind.
    first, second = read_requests(str(file), {"aspect_ratio": "16:9"})
    assert (first[0].aspect_ratio, second[0].aspect_ratio) == (None, "16:9")
    file.write_text('{"prompt": "x", "aspect_ratio": "1:2"}')
    ((only,),) = read_requests(str(file), {"height": 512})
    assert (only.height, only.aspect_ratio) == (None, "1:2")


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": "x", "sede": 3}', "line 2 of .*field 'sede' is unknown. Did you mean 'seed'"),
        ('{"prompt": 3}', "line 2 .*prompt is 3: it has the wrong type"),
        ('{"prompt": "x", "seed": true}', "seed is True"),
        ('{"prompt": "x", "seed": null}', "seed is None"),
        ('{"prompt": "x", "guidance_interval": [1]}', "guidance_interval is"),
        ('{"prompt": "x", "images_per_prompt": 0}', "images_per_prompt is 0"),
        ('{"seed": 3}', "there is no prompt"),
        ('["x"]', "is no JSON object"),
        ("{x}", "no JSON"),
    ],
)
def test_mistakes_are_told_with_their_line(tmp_path, line, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "x"}\n' + line)
    with pytest.raises(UserError, match=message):
        read_requests(str(file))


def test_files_that_are_not_there_or_empty(tmp_path):
    for name in ("prompts.txt", "some/where.jsonl"):
        with pytest.raises(UserError, match="there is no such file"):
            read_requests(name)
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "latin.txt").write_bytes(b"H\xf6rnchen")
    for name, message in (("empty.txt", "hold no prompt"), ("latin.txt", "cannot be read")):
        with pytest.raises(UserError, match=message):
            read_requests(str(tmp_path / name))
    with pytest.raises(UserError, match="hold no prompt"):
        read_requests("  ")
    assert read_requests("a \0 b")[0][0].prompt == "a \0 b"


def test_requests_of_any_kind_are_drawn_together(pipe):
    requests = [
        Request("a corgi", steps=2, seed=3),
        Request("a fox", steps=2, height=16, width=64),
        Request("a corgi", steps=2, seed=4, negative_prompt="blurry"),
        Request("a fox", steps=3, seed=3, sampler="ddim", guidance_scale=1),
    ]
    drawn = {index: (pixels, latents) for index, pixels, latents in draw(pipe, requests)}
    assert sorted(drawn) == [0, 1, 2, 3] and drawn[1][0].shape == (16, 64, 3)
    for index, kwargs in (
        (0, dict(prompts="a corgi", steps=2, seed=3)),
        (2, dict(prompts="a corgi", steps=2, seed=4, negative_prompt="blurry")),
        (3, dict(prompts="a fox", steps=3, seed=3, sampler="ddim", guidance_scale=1)),
    ):
        np.testing.assert_array_equal(drawn[index][1], pipe(**kwargs, output="latents")[0])


def test_each_distinct_text_is_encoded_once(random_params, monkeypatch):
    pipe = tiny.make_pipe(random_params, keep_text_encoder=False)
    encoder, encoded, loads = pipe.text_encoder, [], []
    encode_each, load = encoder.encode_each, encoder.load

    def counted_load():
        loads.append(1) if encoder._params is None else None
        load()

    monkeypatch.setattr(encoder, "encode_each", lambda texts: encoded.extend(texts) or encode_each(texts))
    monkeypatch.setattr(encoder, "load", counted_load)
    requests = [Request(text, steps=1, seed=k) for k, text in enumerate(["a", "b", "a", "a", "c"])]
    assert len(list(draw(pipe, requests))) == 5
    assert sorted(encoded) == ["", "a", "b", "c"]
    # Read once, and gone while images were drawn.
    assert len(loads) == 1 and encoder._params is None
    list(draw(pipe, requests))
    assert len(loads) == 1


def test_what_the_weights_decide_is_written_down(pipe):
    request, size = resolve(pipe, Request("x", width=64, image="x.png"))
    assert (request.height, request.width, request.strength) == (tiny.SIDE, 64, 0.8) and size.width == 64
    assert request.guidance_scale == pipe.config.guidance.scale and request.sampler_options == {}
    assert resolve(pipe, request) == (request, size)
    record = make_record(pipe, resolve(pipe, Request("x"))[0], {"checkpoint": "c"}, 1)
    assert Request.from_dict(json.loads(json.dumps(record))["request"]) == resolve(pipe, Request("x"))[0]
    for wrong, message in (
        (dict(strength=0.3), "no image to start from"),
        (dict(mask="x.png"), "comes without image"),
        (dict(seed=-1), "seed is -1"),
        (dict(sampler="dpm"), "sampler is 'dpm': choose"),
    ):
        with pytest.raises(UserError, match=message):
            resolve(pipe, Request("x", **wrong))
    with pytest.raises(UserError, match=r"x\.png' is not there"):
        make_record(pipe, request, {}, 1)


def test_embeddings_and_latents_go_through_files(pipe, tmp_path):
    requests = read_requests("a corgi", {"steps": 2, "negative_prompt": "blurry"}, 2)
    file, noise = tmp_path / "features.npz", tmp_path / "noise.npy"
    save_embeddings(file, pipe, requests)
    np.save(noise, np.random.default_rng(0).normal(size=(2, tiny.SIDE, tiny.SIDE, 3)))
    back = with_latents(requests_of_embeddings(str(file), {"steps": 2}, 2), str(noise))
    assert [r.prompt for images in back for r in images] == ["a corgi"] * 2
    assert back[0][1].files == (str(file), str(noise))
    encoder, pipe.text_encoder = pipe.text_encoder, None
    drawn = [latents for _, _, latents in draw(pipe, back[0])]
    pipe.text_encoder = encoder
    expected = pipe(
        "a corgi",
        negative_prompt="blurry",
        steps=2,
        images_per_prompt=2,
        latents=np.load(noise),
        output="latents",
    )
    np.testing.assert_array_equal(drawn, expected)
    with pytest.raises(UserError, match=r"give \[1, h, w, C\]"):
        with_latents([requests[0][:1]], str(noise))
    with pytest.raises(UserError, match="have no prompts"):
        requests_of_embeddings(str(noise))
    with pytest.raises(UserError, match="cannot be read"):
        requests_of_embeddings(str(tmp_path / "none.npz"))
