import numpy as np
import pytest
import tiny

from pixart_jax.errors import UserError
from pixart_jax.pipeline.array_files import (
    read_embeddings_row,
    read_latents_row,
    requests_of_embeddings,
    save_embeddings,
    with_latents,
)
from pixart_jax.pipeline.batching import generate
from pixart_jax.pipeline.requests import Request, read_requests


@pytest.fixture(scope="module")
def pipe(random_params):
    return tiny.make_pipe(random_params)


def test_arrays_that_are_not_finite_real_numbers_name_the_prompt(pipe, tmp_path):
    features, noise = tmp_path / "features.npz", tmp_path / "noise.npy"
    save_embeddings(features, pipe, [[Request("a corgi")], [Request("a fox")]])
    arrays = dict(np.load(features))
    for name in ("text", "negative_text"):
        changed = {**arrays, name: np.array(arrays[name])}
        changed[name][1, 0, 0] = np.inf
        np.savez(tmp_path / f"{name}.npz", **changed)
        message = rf"^{name} of embeddings .* NaN or infinite in row 1 \(a fox\)"
        with pytest.raises(UserError, match=message):
            requests_of_embeddings(str(tmp_path / f"{name}.npz"))
        # As a line of JSONL names it.
        with pytest.raises(UserError, match=message):
            read_embeddings_row(str(tmp_path / f"{name}.npz"), 0)
    with pytest.raises(UserError, match="has no row 2: it has the rows 0 to 1"):
        read_embeddings_row(str(features), 2)

    requests = [[Request("a corgi")], [Request("a fox")]]
    values = np.zeros((2, 4, 4, 3))
    values[1, 0, 0, 0] = np.nan
    for wrong, message in (
        (values, r"^latents .* NaN or infinite in row 1 \(a fox\)"),
        (np.zeros((2, 4, 4, 3), complex), "are complex128: give real numbers"),
        (np.full((2, 4, 4, 3), "x"), "give real numbers"),
    ):
        np.save(noise, wrong)
        with pytest.raises(UserError, match=message):
            with_latents(requests, str(noise))
        with pytest.raises(UserError, match=r"real numbers|finite numbers"):
            read_latents_row(str(noise), 1)
    with pytest.raises(UserError, match="has no row -1"):
        read_latents_row(str(noise), -1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            lambda arrays: {"mask": arrays["mask"] * np.nan},
            "the mask of text of .* other values than 0 and 1",
        ),
        (lambda arrays: {"negative_mask": arrays["negative_mask"] * 7}, "mask of negative_text .* 0 and 1"),
        (lambda arrays: {"mask": arrays["mask"].astype(str)}, "other values than 0 and 1"),
        (lambda arrays: {"mask": arrays["mask"][:, :5]}, r"are \[2, 32, 16\], their mask is \[2, 5\]"),
        (lambda arrays: {"text": arrays["text"][0]}, "give features .prompts, tokens, width."),
        (lambda arrays: {"text": arrays["text"].astype(object)}, "cannot be read .*Object arrays"),
        (lambda arrays: {"negative_prompts": ["one"]}, "different numbers of rows: .*negative_prompts 1"),
        (
            lambda arrays: {"text": arrays["text"][:1], "mask": arrays["mask"][:1]},
            "different numbers of rows: prompts 2, negative_prompts 2, text 1",
        ),
    ],
)
def test_embeddings_that_do_not_fit_together(pipe, tmp_path, changes, message):
    file = tmp_path / "features.npz"
    save_embeddings(file, pipe, [[Request("a corgi")], [Request("a fox")]])
    arrays = dict(np.load(file))
    np.savez(file, **{**arrays, **changes(arrays)})
    with pytest.raises(UserError, match=message):
        requests_of_embeddings(str(file))


def test_a_truncated_file(pipe, tmp_path):
    file = tmp_path / "features.npz"
    save_embeddings(file, pipe, [[Request("a corgi")]])
    for size in (1000, 0):
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(UserError, match="cannot be read"):
            requests_of_embeddings(str(file))


def test_embeddings_and_latents_go_through_files(pipe, tmp_path):
    requests = read_requests("a corgi", {"steps": 2, "negative_prompt": "blurry"}, 2)
    file, noise = tmp_path / "features.npz", tmp_path / "noise.npy"
    save_embeddings(file, pipe, requests)
    np.save(noise, np.random.default_rng(0).normal(size=(2, tiny.SIDE, tiny.SIDE, 3)))
    back = with_latents(requests_of_embeddings(str(file), {"steps": 2}, 2), str(noise))
    assert [r.prompt for images in back for r in images] == ["a corgi"] * 2
    assert back[0][1].files == (str(file), str(noise))
    encoder, pipe.text_encoder = pipe.text_encoder, None
    made = [latents for _, _, latents in generate(pipe, back[0])]
    pipe.text_encoder = encoder
    expected = pipe(
        "a corgi",
        negative_prompt="blurry",
        steps=2,
        images_per_prompt=2,
        latents=np.load(noise),
        output="latents",
    )
    np.testing.assert_array_equal(made, expected)
    with pytest.raises(UserError, match=r"give \[1, h, w, C\]"):
        with_latents([requests[0][:1]], str(noise))
    with pytest.raises(UserError, match="have no prompts"):
        requests_of_embeddings(str(noise))
    with pytest.raises(UserError, match="cannot be read"):
        requests_of_embeddings(str(tmp_path / "none.npz"))
