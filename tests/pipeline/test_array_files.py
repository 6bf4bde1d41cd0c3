import os
import pickle
import struct
import tracemalloc
import zipfile

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
        (
            lambda arrays: {"text": arrays["text"].astype(object)},
            "read .*text.npy holds Python objects",
        ),
        (lambda arrays: {"negative_prompts": ["one"]}, "different numbers of rows: .*negative_prompts 1"),
        (lambda arrays: {"mask": arrays["mask"] * [[1], [0]]}, r"is 0 everywhere in row 1 \(a fox\)"),
        (
            lambda arrays: {"negative_mask": 0 * arrays["mask"]},
            "negative_text .* 0 everywhere in row 0",
        ),
        (lambda arrays: {"prompts": np.array("x")}, r"prompts of .* are <U1 \[\]: give text, .prompts."),
        (lambda arrays: {"prompts": np.arange(2)}, r"prompts of .* are int64 \[2\]"),
        (
            lambda arrays: {"prompts": np.full(2, 2**32 - 1, "<u4").view("<U1")},
            "that are not Unicode",
        ),
        (lambda arrays: {name: value[:0] for name, value in arrays.items()}, "have no rows"),
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
    with pytest.raises(UserError, match="not a zip file"):
        requests_of_embeddings(str(noise))
    with pytest.raises(UserError, match="cannot be read"):
        requests_of_embeddings(str(tmp_path / "none.npz"))


def npy(shape: str, dtype: str = "<f4", content: bytes = b"") -> bytes:
    """The bytes of a .npy file with any header."""
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


BROKEN_ARRAYS = {
    "objects": (npy("(1,)", "|O", pickle.dumps([1])), "Python objects"),
    "37 GiB": (npy("(1, 100000, 100000, 4)", "|u1"), "0 bytes, and 40,000,000,000 according to its header"),
    "negative": (npy("(1, -4, 4, 3)"), r"shape \[1, -4, 4, 3\]"),
    "huge": (npy(f"({10**400}, 4, 4, 3)"), "according to its header"),
    "cut off": (npy("(1, 4, 4, 3)", content=b"x"), "1 bytes, and 192 according to its header"),
    "longer": (npy("(1, 1, 1, 3)", content=bytes(13)), "13 bytes, and 12 according"),
    "nested": (npy("(" * 5000 + ")" * 5000), "damaged header"),
    "minus": (npy("-" * 9000 + "1"), "damaged header"),
    "dtype": (npy("(1,)", "|V99999999999999999999"), "damaged header"),
    "text": (b"a corgi\n", "not an array of NumPy"),
    "empty": (b"", "not an array of NumPy"),
    "version": (b"\x93NUMPY\x09\x00" + bytes(200), "not an array of NumPy"),
}


@pytest.mark.parametrize("kind", BROKEN_ARRAYS)
def test_broken_latents(tmp_path, kind):
    content, message = BROKEN_ARRAYS[kind]
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    for read in (
        lambda: with_latents([[Request("a corgi")]], str(path)),
        lambda: read_latents_row(str(path), 0),
    ):
        with pytest.raises(UserError, match=rf"x\.npy' cannot be read \(.*{message}.*\): give a .npy file"):
            read()


@pytest.mark.parametrize("kind", BROKEN_ARRAYS)
def test_broken_arrays_in_embeddings(pipe, tmp_path, kind):
    content, message = BROKEN_ARRAYS[kind]
    path = tmp_path / "x.npz"
    save_embeddings(path, pipe, [[Request("a corgi")]])
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, old_content in members.items():
            new.writestr(name, content if name == "text.npy" else old_content)
    with pytest.raises(UserError, match=rf"x\.npz' cannot be read \(.*{message}.*\): make it with"):
        requests_of_embeddings(str(path))


def test_embeddings_that_are_no_such_archive(tmp_path):
    path = tmp_path / "x.npz"

    def message(content: bytes | None = None) -> str:
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError) as error:
            requests_of_embeddings(str(path))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "not a zip file" in message(b"") and "not a zip file" in message(b"text\n")
    assert "cannot be read (File is not a zip file)" in message(npy("()", content=bytes(4)))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("../../text.npy", npy("(1,)", content=bytes(4)))
    assert "it has no prompts, negative_prompts, text, mask" in message()
    assert not list(tmp_path.parent.glob("text.npy"))
    # A gigabyte of zeros in a megabyte: nothing is unpacked, because the header states another size.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("prompts.npy", "w") as member:
        for _ in range(64):
            member.write(bytes(2**20))
    with zipfile.ZipFile(path, "a") as file:
        for name in ("negative_prompts", "text", "mask", "negative_text", "negative_mask"):
            file.writestr(f"{name}.npy", b"")
    tracemalloc.start()
    assert "prompts.npy is not an array of NumPy" in message()
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
    path.unlink()
    path.mkdir()
    assert "Is a directory" in message()


def test_latents_of_other_shapes(tmp_path):
    path = str(tmp_path / "x.npy")
    for array, row_message in (
        (np.float32(0), r"are \[\]: give \[images, h, w, C\]"),
        (np.zeros((4, 4, 3), np.float32), r"are \[4, 4, 3\]"),
        (np.zeros((0, 4, 4, 3), np.float32), "has no row 0: it has no rows"),
    ):
        np.save(path, array)
        with pytest.raises(UserError, match=r"give \[1, h, w, C\], one row for each image"):
            with_latents([[Request("a corgi")]], path)
        with pytest.raises(UserError, match=row_message):
            read_latents_row(path, 0)
    os.remove(path)
    os.mkfifo(path)  # would block
    with pytest.raises(UserError, match="not a regular file"):
        read_latents_row(path, 0)
