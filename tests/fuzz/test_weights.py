"""Weight files: safetensors, indices, PyTorch pickles, configs of pipelines. No content is executed."""

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import foreign
import pytest
from fuzzing import fuzz
from hostile import Bomb, damaged, json_files, pickled, to_json, trees
from hypothesis import strategies as st

from pixart_jax.pipeline import load_pipeline
from pixart_jax.weights.files import open_groups, open_tensors
from pixart_jax.weights.loading import read_any

OLD = Path(__file__).parent.parent / "data" / "v0_1" / "diffusers"
WEIGHTS = (OLD / "diffusion_pytorch_model.safetensors").read_bytes()
CONFIG = json.loads((OLD / "config.json").read_text())
SIZE = struct.unpack("<Q", WEIGHTS[:8])[0]
HEADER, DATA = json.loads(WEIGHTS[8 : 8 + SIZE]), WEIGHTS[8 + SIZE :]
# A header of few tensors, so that a change of it often matters.
SMALL = {
    "__metadata__": {"format": "pt", "pixart_jax": "{}"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def with_header(text, data):
    return struct.pack("<Q", len(text)) + text + data


def read_tensors(path):
    for tensors in open_groups(path).values():
        for name in tensors:
            tensors[name].sum()


@fuzz(
    120,
    header=st.one_of(trees(SMALL, 3).map(to_json).map(str.encode), json_files(SMALL)),
    data=st.none() | st.binary(),
)
def test_safetensors_headers(sandbox, header, data):
    sandbox.write("model.safetensors", with_header(header, bytes(32) if data is None else data))
    sandbox.read(read_tensors, "model.safetensors").check()


@fuzz(60, content=damaged(with_header(json.dumps(SMALL).encode(), bytes(32))))
def test_safetensors_bytes(sandbox, content):
    sandbox.write("model.safetensors", content)
    sandbox.read(read_tensors, "model.safetensors").check()


@fuzz(15, data=st.data())
def test_exports(sandbox, data):
    """A diffusers folder with a changed config or header is converted, or nothing is written."""
    header = data.draw(st.just(HEADER) | trees(HEADER), label="header")
    config = data.draw(json_files(CONFIG), label="config.json")
    sandbox.write("in/diffusion_pytorch_model.safetensors", with_header(to_json(header).encode(), DATA))
    sandbox.write("in/config.json", config)
    sandbox.command("convert", "--input=in", "--output=out.safetensors", "--to=official").check(
        outputs=["out.safetensors", "out.safetensors.md"]
    )


INDEX = {
    "metadata": {"total_size": 32},
    "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
}


@fuzz(60, index=json_files(INDEX), folder=st.booleans())
def test_indices(sandbox, index, folder):
    for number, name in enumerate("ab", 1):
        entry = {**SMALL[name], "data_offsets": [0, 24 if name == "a" else 8]}
        content = with_header(json.dumps({name: entry}).encode(), bytes(24 if name == "a" else 8))
        sandbox.write(f"w/model-0000{number}-of-00002.safetensors", content)
    sandbox.write("w/model.safetensors.index.json", index)
    sandbox.read(open_tensors, "w" if folder else "w/model.safetensors.index.json").check()


@pytest.fixture(scope="module")
def archive():
    """A PyTorch file."""
    buffer = io.BytesIO()
    tensors = {"a": foreign.torch.zeros(2, 3), "b": foreign.torch.zeros(4, dtype=foreign.torch.bfloat16)}
    foreign.torch.save({"state_dict": tensors, "epoch": 3}, buffer)
    return buffer.getvalue()


@fuzz(60, "archive", data=st.data(), name=st.sampled_from(["w.pth", "w.pt", "w.bin", "w.ckpt"]))
def test_pickles(sandbox, archive, data, name):
    how = data.draw(st.sampled_from(["bytes", "bomb", "bare bomb", "member", "pickle", "huge"]))
    bomb = {"state_dict": {"a": Bomb(str(sandbox.canary), data.draw(st.integers(0, 5), label="bomb"))}}
    protocol = data.draw(st.integers(0, 5), label="protocol")
    if how == "bytes":
        content = data.draw(damaged(archive), label="content")
    elif how == "bare bomb":
        content = pickled(bomb, protocol)
    elif how == "bomb":
        content = with_member(archive, "data.pkl", lambda _: pickled(bomb, protocol))
    elif how == "pickle":
        value = data.draw(
            st.sampled_from([1, [], {}, {"a": 1}, {1: 2}, {"state_dict": 5}, {"ema": {"a": [1]}}, None])
        )
        content = with_member(archive, "data.pkl", lambda _: pickle.dumps(value, 2))
    elif how == "huge":
        content = with_member(
            archive, "data.pkl", lambda old: old.replace(b"K\x02K\x03", b"J\xff\xff\xff\x7fK\x03")
        )
    else:
        member = data.draw(st.sampled_from(["data.pkl", "data/0", "version", "byteorder", ".format_version"]))
        content = with_member(archive, member, lambda old: data.draw(damaged(old), label=member))
    sandbox.write(name, content)
    sandbox.read(read_tensors, name).check()


def with_member(archive, name, change):
    """The archive with another content of the member that ends in `name`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w") as new:
        for member in old.namelist():
            content = old.read(member)
            new.writestr(member, change(content) if member.endswith(f"/{name}") else content)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The files of a pipeline folder by their names."""
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("pipeline") / "pipeline"
    foreign.save_pipeline(folder, foreign.diffusers_model(**foreign.SIZES["small"], sizes=False))
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@fuzz(2, "pipeline", data=st.data(), number=st.integers(0, 30), second=st.booleans())
def test_pipelines(sandbox, pipeline, data, number, second):
    names = sorted(name for name in pipeline if name.endswith(".json"))
    changed = {names[number % len(names)]}
    if second:
        changed.add(data.draw(st.sampled_from(names)))
    for name, content in pipeline.items():
        if name in changed:
            content = data.draw(json_files(json.loads(content)), label=name)
        sandbox.write(f"pipe/{name}", content)
    sandbox.read(load_pipeline, "pipe").check()
    sandbox.command("convert", "--input=pipe", "--pipeline=pipe", "--output=out", "--to=diffusers").check(
        outputs=["out"]
    )


@fuzz(5, "pipeline", data=st.data())
def test_remote_code(sandbox, pipeline, data):
    """Code that a folder of a tokenizer brings along is not run."""
    for name, content in pipeline.items():
        sandbox.write(f"pipe/{name}", content)
    code = f"open({str(sandbox.canary)!r}, 'w')\nclass Own: pass\n"
    for folder in ("tokenizer", "text_encoder", "transformer", "vae", "scheduler", "."):
        sandbox.write(f"pipe/{folder}/own.py", code)
        for file in ("tokenizer_config.json", "config.json"):
            old = json.loads(pipeline.get(f"{folder}/{file}", b"{}"))
            kind = data.draw(st.sampled_from(["AutoTokenizer", "AutoConfig", "AutoModel"]))
            auto = {"auto_map": {kind: data.draw(st.sampled_from(["own.Own", ["own.Own", "own.Own"]]))}}
            own = {"tokenizer_class": "Own"} if data.draw(st.booleans()) else {}
            if f"{folder}/{file}" in pipeline:
                sandbox.write(f"pipe/{folder}/{file}", json.dumps({**old, **auto, **own}))
    sandbox.read(load_pipeline, "pipe").check()


def test_valid_files_are_read(tmp_path, archive):
    """Otherwise the targets would try nothing."""
    (tmp_path / "a.safetensors").write_bytes(with_header(json.dumps(SMALL).encode(), bytes(32)))
    (tmp_path / "a.pth").write_bytes(archive)
    assert (
        set(open_tensors(tmp_path / "a.safetensors")) == set(open_tensors(tmp_path / "a.pth")) == {"a", "b"}
    )
    assert read_any(OLD).source == "diffusers"
