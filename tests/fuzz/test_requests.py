"""What `sample` reads: prompts in JSON and tables, settings in PNG files, embeddings and latents."""

import io
import json
import zipfile

import numpy as np
import pytest
import tiny
from fuzzing import fuzz, stop_here
from hostile import Bomb, damaged, json_files, texts, to_json, trees, values
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pixart_jax import sample
from pixart_jax.pipeline.array_files import requests_of_embeddings, save_embeddings
from pixart_jax.pipeline.image_files import SETTINGS, make_record

REQUEST = {
    **{"prompt": "a fox", "negative_prompt": "blurry", "seed": 7, "steps": 3, "sampler": "dpm_solver"},
    **{"guidance_scale": 4.5, "guidance_interval": [100.0, 900.0], "guidance_rescale": 0.5, "strength": 0.5},
    **{"sampler_options": {"order": 3}, "height": 32, "width": 32, "binning": False, "images_per_prompt": 2},
    **{"image": "image.png", "mask": "mask.png", "embeddings": ["e.npz", 0], "latents": ["l.npy", 0]},
}
FIELDS = tuple(REQUEST)
ARGUMENTS = ("--checkpoint=weights", "--out=out", "--noprogress")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, random_params):
    """The pipeline of `sample` is a tiny one, and no image is generated. Returns its input files."""
    pipe = tiny.make_pipe(random_params)
    root = tmp_path_factory.mktemp("inputs")
    requests = [[sample.Request(prompt="a fox")], [sample.Request(prompt="two")]]
    save_embeddings(root / "e.npz", pipe, requests)
    np.save(root / "l.npy", np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32))
    Image.new("RGB", (32, 32), "red").save(root / "image.png")
    Image.new("L", (32, 32)).save(root / "mask.png")
    files = {path.name: path.read_bytes() for path in root.iterdir()}
    resolved, _ = pipe.resolve(sample.Request(prompt="a fox", steps=3))
    source = {"checkpoint": "weights", "weights": None, "pipeline": None}
    record = make_record(pipe, resolved, source, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pixart_jax.pipeline.loading.load_pipeline", lambda *_, **__: pipe)
        patch.setattr("pixart_jax.pipeline.batching.generate", stop_here)
        yield files, record


@st.composite
def requests(draw):
    kept = draw(st.lists(st.sampled_from(FIELDS), max_size=5, unique=True))
    return draw(trees({"prompt": "a fox"} | {name: REQUEST[name] for name in kept}))


@fuzz(120, "inputs", lines=st.lists(requests(), min_size=1, max_size=3), last=json_files(REQUEST))
def test_json_lines(sandbox, inputs, lines, last):
    write(sandbox, inputs[0])
    text = "\n".join([*map(to_json, lines[:-1]), ""])
    sandbox.write("prompts.jsonl", text.encode() + last)
    sandbox.command("sample", *ARGUMENTS, "--prompts=prompts.jsonl").check(outputs=["out"])
    sandbox.write("one.jsonl", to_json(lines[-1]))
    sandbox.command("sample", *ARGUMENTS, "--prompts=one.jsonl").check(outputs=["out"])


@fuzz(40, "inputs", data=st.data(), kind=st.sampled_from(["json", "csv", "tsv", "txt"]))
def test_other_files_of_prompts(sandbox, inputs, data, kind):
    write(sandbox, inputs[0])
    if kind == "json":
        content = data.draw(json_files(["a fox", REQUEST]))
    elif kind == "txt":
        content = data.draw(damaged("a fox\n# no\r\nß 🙂\n".encode()))
    else:
        comma = "," if kind == "csv" else "\t"
        names = data.draw(st.lists(st.sampled_from((*FIELDS, "x", "")), min_size=1, max_size=5))
        cells = st.lists(values.map(str), max_size=len(names) + 1)
        rows = data.draw(st.lists(cells, max_size=3))
        content = "\n".join(comma.join(row) for row in [["prompt", *names], *rows])
    sandbox.write(f"prompts.{kind}", content)
    sandbox.command("sample", *ARGUMENTS, f"--prompts=prompts.{kind}").check(outputs=["out"])


@fuzz(60, "inputs", data=st.data(), opened=st.booleans())
def test_settings_in_images(sandbox, inputs, data, opened):
    files, record = inputs
    write(sandbox, files)
    secret = sandbox.write("secret", "x")
    flags = ("--open_recorded_paths",) if opened else ("--checkpoint=weights",)
    # Without the flag, a file that only the PNG names is not even opened.
    sandbox.unread = set() if opened else {str(secret)}
    request = data.draw(requests(), label="request")
    if isinstance(request, dict):
        record = {**record, "request": {**record["request"], **request}}
    named = {data.draw(texts): "0" * 64, str(secret): "0" * 64}
    record["files"] = data.draw(st.sampled_from([{}, named]))
    text = data.draw(json_files(record), label="settings").decode("utf-8", "replace")
    sandbox.write("x.png", with_text(files["image.png"], text))
    sandbox.command("sample", "--from_image=x.png", *flags, "--out=out").check(outputs=["out"])


@fuzz(40, "inputs", data=st.data())
def test_damaged_images(sandbox, inputs, data):
    files, record = inputs
    write(sandbox, files)
    whole = with_text(files["image.png"], json.dumps(record))
    sandbox.write("x.png", data.draw(damaged(whole), label="png"))
    arguments = ("--from_image=x.png", "--open_recorded_paths", "--out=out")
    sandbox.command("sample", *arguments).check(outputs=["out"])
    sandbox.write("out/00000-0-a-fox.png", data.draw(damaged(whole), label="existing image"))
    sandbox.command("sample", *ARGUMENTS, "--prompts=a fox").check(outputs=["out"])


@fuzz(70, "inputs", data=st.data())
def test_embeddings(sandbox, inputs, data):
    files, _ = inputs
    content = data.draw(st.one_of(damaged(files["e.npz"]), npz_files(files["e.npz"])), label="npz")
    sandbox.write("e.npz", content(sandbox) if callable(content) else content)
    sandbox.read(requests_of_embeddings, "e.npz").check()
    sandbox.command("sample", *ARGUMENTS, "--embeddings=e.npz").check(outputs=["out"])


@fuzz(70, "inputs", data=st.data())
def test_latents(sandbox, inputs, data):
    files, _ = inputs
    content = data.draw(st.one_of(damaged(files["l.npy"]), npy_files(np.load(io.BytesIO(files["l.npy"])))))
    sandbox.write("l.npy", content(sandbox) if callable(content) else content)
    arguments = ("--prompts=a fox", "--images_per_prompt=2", "--latents=l.npy")
    sandbox.command("sample", *ARGUMENTS, *arguments).check(outputs=["out"])


def write(sandbox, files):
    for name, data in files.items():
        sandbox.write(name, data)


def with_text(png, text):
    info, buffer = PngInfo(), io.BytesIO()
    info.add_itxt(SETTINGS, text)
    with Image.open(io.BytesIO(png)) as image:
        image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


# Headers of .npy files that ask for much memory, or are no description of an array.
HEADERS = (
    *("{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000, 4, 4, 3), }", "{}", "[]", "1", "("),
    *("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,), }", "[" * 200, "x" * 9000),
    *("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 32, 32, 3), }", "{'descr': '|O', }", "'"),
    *("{'descr': '|O', 'fortran_order': False, 'shape': (2, 32, 32, 3), }", "__import__('os').getcwd()"),
    *("{'descr': '<f4', 'fortran_order': 1, 'shape': [2, 32, 32, 3], }", "{'descr': [('a', '<f4')], "),
    *("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2, 32, 32, 3), }",),
    *("{'descr': '<M8[ns]', 'fortran_order': False, 'shape': (2,), }", "{'descr': 5, 'shape': 5}"),
    *("{'descr': '<U1000000000', 'fortran_order': False, 'shape': (2,), }",),
)


@st.composite
def arrays(draw, valid):
    """An array that differs from `valid` in its shape, dtype or values."""
    match draw(st.integers(0, 8)):
        case 0:
            return valid.reshape(-1)[0]
        case 1:
            return valid[: draw(st.integers(0, len(valid)))]
        case 2:
            return np.concatenate([valid, valid])
        case 3:
            kind = draw(st.sampled_from(["i1", "u8", "c8", "?", "f2", "f8", "S3", "U3", "M8[s]"]))
            try:
                return valid.astype(kind)
            except (TypeError, ValueError):
                return np.zeros(valid.shape, kind)
        case 4:
            return valid[None]
        case 5:
            return valid[..., 0] if valid.ndim > 1 else valid
        case 6:
            damage = draw(st.sampled_from([np.nan, np.inf, 1e39, -1.0, 2.0]))
            out = np.array(valid, np.float64) if valid.dtype.kind in "fiub" else np.zeros(valid.shape)
            out.reshape(-1)[:1] = damage
            return out
        case 7:
            return np.zeros((len(valid), 0, 0, 0), valid.dtype)
        case _:
            return draw(
                st.sampled_from([np.zeros(0), np.array(5), np.array("text"), np.zeros((0, 32, 32, 3))])
            )


@st.composite
def npy_files(draw, valid):
    """The bytes of a .npy file, or a function from the sandbox to them, for a pickle."""
    how = draw(st.integers(0, 3))
    if how == 0:
        number = draw(st.integers(0, 5))
        return lambda sandbox: saved(np.array([Bomb(str(sandbox.canary), number)], object))
    if how == 1:
        header = draw(st.sampled_from(HEADERS)).encode()
        version = draw(st.sampled_from([b"\1\0", b"\2\0", b"\3\0", b"\7\7"]))
        size = len(header).to_bytes(2 if version == b"\1\0" else 4, "little")
        return b"\x93NUMPY" + version + size + header + b"\n" * 9
    return saved(draw(arrays(valid)))


@st.composite
def npz_files(draw, valid):
    """A function from the sandbox to the bytes of an .npz file in which one array is another."""
    with np.load(io.BytesIO(valid)) as file:
        members = {name: saved(array) for name, array in file.items()}
        name = draw(st.sampled_from(sorted(members)))
        changed = draw(st.one_of(npy_files(file[name]), st.none(), st.just(b""), st.just(b"text")))
    extra = draw(st.sampled_from([(), ("../escape.npy",), ("/tmp/escape.npy",), ("prompts",)]))

    def write(sandbox):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for member, data in members.items():
                data = changed if member == name else data
                if data is not None:
                    archive.writestr(f"{member}.npy", data(sandbox) if callable(data) else data)
            for member in extra:
                archive.writestr(member, members[name])
        return buffer.getvalue()

    return write


def saved(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()
