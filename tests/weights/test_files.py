import argparse
import datetime
import errno
import json
import os
import pickle
import struct
import sys
from pathlib import Path

import foreign
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pixart_jax.errors import OutputError, UserError
from pixart_jax.weights.files import (
    CARD,
    CARD_MARK,
    _set_aside,
    all_or_nothing,
    check_output,
    open_groups,
    open_tensors,
    write_safetensors,
    write_torch,
)

torch = foreign.torch


class Evil:
    """Creates a folder when it is unpickled by an ordinary loader."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in (("a", (3, 4)), ("b", (5,)))
    }


def one_line(path, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        opened = open_tensors(path, **kwargs)
        for name in opened:
            opened[name]
    assert "\n" not in str(error.value) and str(path.name) in str(error.value)
    return str(error.value)


# --- safetensors ------------------------------------------------------------------------------------


def test_every_float_is_read_as_it_is(tmp_path):
    values = torch.randn(3, 4)
    tensors = {"f32": values, "f16": values.half(), "bf16": values.bfloat16(), "scalar": values[0, 0].clone()}
    from safetensors.torch import save_file as save

    save(
        {**tensors, "empty": torch.zeros(0, 2), "i": torch.arange(3)},
        tmp_path / "x.safetensors",
        {"note": "ü"},
    )
    opened = open_tensors(tmp_path / "x.safetensors")
    assert opened.metadata == {"note": "ü"}
    assert opened.shapes == {name: opened[name].shape for name in opened}
    assert opened["bf16"].dtype == ml_dtypes.bfloat16 and opened["empty"].shape == (0, 2)
    for name, value in tensors.items():
        np.testing.assert_array_equal(opened[name].astype(np.float32), value.float().numpy())
    with pytest.raises(KeyError):
        opened["g"]


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "diffusion_pytorch_model.safetensors.index.json"])
def test_a_pointer_of_git_lfs_is_named(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 134\n")
    with pytest.raises(UserError, match="is a pointer of Git LFS, not the file itself: run 'git lfs pull'"):
        open_tensors(tmp_path / name)


def test_the_weights_of_deepspeed(tmp_path):
    torch.save({"module": {"a": torch.ones(2)}, "optimizer": None}, tmp_path / "mp_rank_00_model_states.pt")
    assert open_tensors(tmp_path / "mp_rank_00_model_states.pt")["a"].tolist() == [1, 1]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_read_as_it_is(tmp_path, dtype, suffix):
    from safetensors.torch import save_file as save

    path, values = tmp_path / f"x{suffix}", torch.randn(3, 4).to(dtype)
    (save if suffix == ".safetensors" else torch.save)({"a": values}, path)
    found = open_tensors(path)["a"]
    assert found.dtype.itemsize == 1
    np.testing.assert_array_equal(found.astype(np.float32), values.float().numpy())


def test_what_is_written_is_read_by_the_library(tmp_path):
    values = arrays()
    shapes = {name: value.shape for name, value in values.items()}
    # Column-major arrays, such as a transposed view of a kernel.
    stream = ((name, np.asfortranarray(value)) for name, value in values.items())
    write_safetensors(tmp_path / "x.safetensors", shapes, stream, {"format": "pt", "k": '{"ü": 1}'})
    back = load_file(tmp_path / "x.safetensors")
    for name, value in values.items():
        np.testing.assert_array_equal(back[name], value)
    opened = open_tensors(tmp_path / "x.safetensors")
    assert opened.metadata == {"format": "pt", "k": '{"ü": 1}'} and list(opened) == ["a", "b"]


def test_a_stream_that_is_not_what_the_header_says_is_a_defect(tmp_path):
    values = arrays()
    shapes = {name: value.shape for name, value in values.items()}
    for stream in (list(values.items())[:1], [("a", values["a"].T), ("b", values["b"])]):
        with pytest.raises(ValueError, match="header"):
            write_safetensors(tmp_path / "x.safetensors", shapes, iter(stream), {})


@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_truncated_safetensors(tmp_path, kept):
    save_file(arrays(), tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(content[:kept])
    assert "not a complete safetensors file" in one_line(tmp_path / "x.safetensors")


def test_other_contents_under_the_name(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"PK\x03\x04" * 100)
    assert "not a complete safetensors file" in one_line(path)
    header = json.dumps({"a": {"dtype": "U32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    assert "holds U32 tensors" in one_line(path)
    (tmp_path / "x.onnx").write_bytes(b"")
    assert "'.onnx'" in one_line(tmp_path / "x.onnx")
    assert "do not exist" in one_line(tmp_path / "gone.safetensors")


# --- Shards -----------------------------------------------------------------------------------------


def shards(folder, places=None, suffix=".safetensors"):
    folder.mkdir()
    one, two = (f"model-{i}-of-2{suffix}" for i in (1, 2))
    values = arrays()
    for name, key in ((one, "a"), (two, "b")):
        if suffix == ".bin":
            torch.save({key: torch.from_numpy(values[key])}, folder / name)
        else:
            save_file({key: values[key]}, folder / name)
    index = folder / f"model{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": one, "b": two, **(places or {})}}))
    return index


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_are_one_set_of_tensors(tmp_path, suffix):
    index = shards(tmp_path / "m", suffix=suffix)
    for path in (index, tmp_path / "m"):
        opened = open_tensors(path)
        assert opened.keys() == {"a", "b"}
        for name, value in arrays().items():
            np.testing.assert_array_equal(opened[name], value)


@pytest.mark.parametrize(
    ("index", "shard"),
    [
        # The names of transformers and diffusers, of older diffusers, and of the Hub's own tools.
        ("model.safetensors.index.fp16.json", "model.fp16-0000{}-of-00002.safetensors"),
        (
            "diffusion_pytorch_model.safetensors.index.fp16.json",
            "diffusion_pytorch_model-0000{}-of-00002.fp16.safetensors",
        ),
        ("model.bf16.safetensors.index.json", "model.bf16-0000{}-of-00002.safetensors"),
        ("pytorch_model.bin.index.fp16.json", "pytorch_model.fp16-0000{}-of-00002.bin"),
    ],
)
def test_shards_of_a_variant(tmp_path, index, shard):
    values = arrays()
    places = {name: shard.format(number) for number, name in enumerate(values, 1)}
    for name, place in places.items():
        if place.endswith(".bin"):
            torch.save({name: torch.from_numpy(values[name])}, tmp_path / place)
        else:
            save_file({name: values[name]}, tmp_path / place)
    (tmp_path / index).write_text(json.dumps({"weight_map": places}))
    for path in (tmp_path, tmp_path / index):
        opened = open_tensors(path)
        for name, value in values.items():
            np.testing.assert_array_equal(opened[name], value)
    # A complete set without a variant has priority.
    save_file(arrays(1), tmp_path / "model.safetensors")
    np.testing.assert_array_equal(open_tensors(tmp_path)["a"], arrays(1)["a"])


def test_shards_without_their_index(tmp_path):
    (shards(tmp_path / "m")).unlink()
    for number in (1, 2):
        (tmp_path / "m" / f"model-{number}-of-2.safetensors").rename(
            tmp_path / "m" / f"model.fp16-0000{number}-of-00002.safetensors"
        )
    with pytest.raises(UserError, match=r"shards model\.fp16-00001-of-00002\..* not their index"):
        open_tensors(tmp_path / "m")


def test_several_variants_of_the_same_weights(tmp_path):
    for name in ("model.fp16.safetensors", "model.fp16.bin"):
        (save_file if name.endswith("s") else torch.save)(
            {"a": arrays()["a"] if name.endswith("s") else torch.zeros(1)}, tmp_path / name
        )
    assert open_tensors(tmp_path).path.name == "model.fp16.safetensors"
    save_file(arrays(), tmp_path / "model.non_ema.safetensors")
    message = one_line(tmp_path)
    assert "in several variants: give one of model.fp16.bin, model.fp16.safetensors, model.non_ema" in message


@pytest.mark.parametrize(
    "place",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..",
        "",
        "a\\b.safetensors",
        "model.safetensors.index.json",
    ],
)
def test_a_shard_index_cannot_lead_out_of_its_folder(tmp_path, place):
    save_file(arrays(), tmp_path / "secret.safetensors")
    index = shards(tmp_path / "m", {"a": place})
    message = one_line(index)
    assert f"'{place}'" in message and "plain name" in message


def test_shards_that_differ_from_their_index(tmp_path):
    assert "c is not in model-1" in one_line(shards(tmp_path / "m", {"c": "model-1-of-2.safetensors"}))
    message = one_line(shards(tmp_path / "n", {"a": "model-2-of-2.safetensors"}))
    assert "a is not in model-2" in message
    index = shards(tmp_path / "o")
    save_file({**arrays(), "extra": np.zeros(2)}, tmp_path / "o" / "model-2-of-2.safetensors")
    assert "extra in model-2-of-2.safetensors is not in the index" in one_line(index)
    (tmp_path / "o" / "model-1-of-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"names model-1-of-2\.safetensors, which the folder lacks"):
        open_tensors(index)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": ["x"]}', '{"weight_map": {"a": 1}}', "{"])
def test_an_index_that_is_none(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    one_line(tmp_path / "model.safetensors.index.json")


def test_the_folder_of_a_trainer_names_the_folders_with_weights(tmp_path):
    """What diffusers' training scripts leave: models in folders, next to the state of the optimizer."""
    folder = tmp_path / "output" / "checkpoint-100"
    for name in ("transformer", "transformer_ema"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        torch.save({}, folder / name)
    assert "give one of its folders, transformer, transformer_ema" in one_line(folder)
    inside = "checkpoint-100/transformer, checkpoint-100/transformer_ema"
    assert f"give one of its folders, {inside}" in one_line(folder.parent)
    # A model that accelerate saves itself is in the folder.
    save_file(arrays(), folder / "model.safetensors")
    assert open_tensors(folder).keys() == {"a", "b"}


def test_which_file_of_a_folder(tmp_path):
    assert "give another folder" in one_line(tmp_path)
    save_file(arrays(1), tmp_path / "some.safetensors")
    np.testing.assert_array_equal(open_tensors(tmp_path)["a"], arrays(1)["a"])
    save_file(arrays(2), tmp_path / "other.safetensors")
    assert "give one of other.safetensors, some.safetensors" in one_line(tmp_path)
    # Known names have priority over others, and safetensors over pickles.
    torch.save({"a": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.bin")
    save_file(arrays(3), tmp_path / "model.safetensors")
    np.testing.assert_array_equal(open_tensors(tmp_path)["a"], arrays(3)["a"])


# --- Pickles ----------------------------------------------------------------------------------------


def test_pytorch_files(tmp_path):
    values = torch.randn(4, 6)
    tensors = {
        "view": values.t()[:2],
        "half": values.half(),
        "bf16": values.bfloat16(),
        "p": torch.nn.Parameter(values),
    }
    for zipped in (True, False):
        torch.save(tensors, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
        opened = open_tensors(tmp_path / "x.pt")
        for name, value in tensors.items():
            assert opened.shapes[name] == tuple(value.shape)
            np.testing.assert_array_equal(opened[name].astype(np.float32), value.detach().float().numpy())


def test_arguments_of_a_trainer_beside_the_weights(tmp_path):
    """DiT's trainer stores an `argparse.Namespace`."""
    arguments = argparse.Namespace(lr=1e-4, results=Path("runs"), nested=argparse.Namespace(a=[1, None]))
    for zipped in (True, False):
        torch.save(
            {"model": {"a": torch.ones(2)}, "ema": {"a": torch.zeros(2)}, "opt": {}, "args": arguments},
            tmp_path / "x.pt",
            _use_new_zipfile_serialization=zipped,
        )
        assert open_groups(tmp_path / "x.pt").keys() == {"ema", "raw"}
        assert open_tensors(tmp_path / "x.pt", "raw")["a"][0] == 1


def test_other_objects_beside_the_weights_are_named(tmp_path):
    torch.save({"model": {"a": torch.ones(2)}, "when": datetime.date(2026, 1, 1)}, tmp_path / "x.pt")
    message = one_line(tmp_path / "x.pt")
    assert "holds a datetime.date" in message and "save its state dict alone" in message
    assert "Copy it again" not in message


def test_ema_and_raw(tmp_path):
    one, two = ({"a": torch.full((2,), float(i))} for i in (1, 2))
    content = {
        "state_dict": one,
        "state_dict_ema": two,
        "optimizer": {"state": {}},
        "epoch": 3,
        "note": "text",
    }
    torch.save(content, tmp_path / "x.pth")
    groups = open_groups(tmp_path / "x.pth")
    assert groups.keys() == {"ema", "raw"} and groups["ema"].metadata == {"note": "text"}
    for which, value in ((None, 2), ("ema", 2), ("raw", 1)):
        assert open_tensors(tmp_path / "x.pth", which)["a"][0] == value
    torch.save({"state_dict": one}, tmp_path / "raw.pth")
    assert open_tensors(tmp_path / "raw.pth")["a"][0] == 1
    assert "use --weights=raw" in one_line(tmp_path / "raw.pth", which="ema")
    # The format of DiT's trainer.
    torch.save({"model": one, "ema": two, "opt": {}}, tmp_path / "dit.pt")
    assert open_tensors(tmp_path / "dit.pt")["a"][0] == 2


@pytest.mark.parametrize("where", ["beside", "within", "alone"])
def test_code_in_a_pickle_is_not_run(tmp_path, where):
    evil = Evil(tmp_path / "pwned")
    path = tmp_path / "x.pth"
    if where == "alone":
        path.write_bytes(pickle.dumps(evil))
    else:
        content = {"state_dict": {"a": torch.zeros(2)}}
        (content if where == "beside" else content["state_dict"])["b"] = evil
        torch.save(content, path)
    message = one_line(path)
    assert "hold tensors and plain containers only" in message and len(message) < 500
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("kept", [0, 100, -50])
def test_truncated_pickles(tmp_path, kept):
    torch.save({"a": torch.randn(100)}, tmp_path / "x.pth")
    content = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(content[:kept])
    assert "must be complete" in one_line(tmp_path / "x.pth")


def test_pickles_of_other_things(tmp_path):
    for content, message in (
        (torch.zeros(2), "a Tensor"),
        ({"epoch": 1}, "no tensors, only epoch"),
        ({"state_dict": {}}, "no tensors"),
        ({"a": torch.eye(2).to_sparse()}, "sparse"),
        ({"a": torch.zeros(2).to(torch.float8_e8m0fnu)}, "float8_e8m0fnu"),
        ({}, "holds no tensors: give"),
    ):
        torch.save(content, tmp_path / "x.pth")
        assert message in one_line(tmp_path / "x.pth")


def test_without_pytorch(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(2)}, tmp_path / "x.pth")
    save_file(arrays(), tmp_path / "x.safetensors")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert open_tensors(tmp_path / "x.safetensors")["a"].shape == (3, 4)
    assert "pip install torch" in one_line(tmp_path / "x.pth")
    with pytest.raises(UserError, match="pip install torch"):
        write_torch(tmp_path / "y.pth", "state_dict", iter(()), {})


def test_a_pth_is_what_the_official_code_loads(tmp_path):
    values = arrays()
    write_torch(tmp_path / "x.pth", "state_dict", iter(values.items()), {"note": "text"})
    content = torch.load(tmp_path / "x.pth", weights_only=True)
    assert content.keys() == {"state_dict", "note"}
    assert content["state_dict"]["a"].is_contiguous()
    np.testing.assert_array_equal(content["state_dict"]["a"].numpy(), values["a"])
    assert open_tensors(tmp_path / "x.pth").metadata == {"note": "text"}


# --- Output -----------------------------------------------------------------------------------------


def test_all_or_nothing(tmp_path):
    target = tmp_path / "deep" / "out"
    with all_or_nothing(target) as folder:
        (folder / "out").mkdir()
        (folder / "out" / "f").write_text("1")
        (folder / "out.md").write_text("2")
        assert not target.exists()
    assert sorted(os.listdir(target.parent)) == ["out", "out.md"] and (target / "f").read_text() == "1"

    with pytest.raises(RuntimeError), all_or_nothing(tmp_path / "failed") as folder:
        (folder / "failed").mkdir()
        raise RuntimeError
    assert os.listdir(tmp_path) == ["deep"]


@pytest.mark.parametrize("failing", ["write", "out.md", "out"])
@pytest.mark.parametrize("is_folder", [False, True])
def test_a_failed_export_leaves_what_was_there(tmp_path, monkeypatch, failing, is_folder):
    path = tmp_path / ("out" if is_folder else "out.pth")

    def write(text):
        with all_or_nothing(path, overwrite=True) as folder:
            new = folder / path.name
            if is_folder:
                new.mkdir()
                new = new / CARD
            new.write_text(f"{CARD_MARK}\n{text}")
            (folder / "out.md").write_text(text)
            if text == "new" and failing == "write":
                raise OSError(errno.ENOSPC, "No space left on device")

    def content():
        return {file.name: file.read_text() for file in tmp_path.rglob("*") if file.is_file()}

    write("old")
    before, replace, rename = content(), Path.replace, Path.rename

    def fails(real):
        def move(source, target):
            if source.name == (path.name if failing == "out" else failing) and ".tmp" in source.parent.name:
                raise OSError(errno.EIO, "Input/output error")
            return real(source, target)

        return move

    monkeypatch.setattr(Path, "replace", fails(replace))
    monkeypatch.setattr(Path, "rename", fails(rename))
    with pytest.raises(OutputError, match=f"{path}' cannot be written"):
        write("new")
    monkeypatch.undo()
    assert content() == before and sorted(os.listdir(tmp_path)) == sorted([path.name, "out.md"])


@pytest.mark.parametrize("complete", [False, True])
def test_a_process_killed_between_two_renames_loses_nothing(tmp_path, complete):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / CARD).write_text(CARD_MARK)
    old = _set_aside(tmp_path / "out")
    (tmp_path / "out").rename(old)
    if complete:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / CARD).write_text(f"{CARD_MARK} new")
    with pytest.raises(UserError, match="exists"), all_or_nothing(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / CARD).read_text() == (f"{CARD_MARK} new" if complete else CARD_MARK)


def test_pytorch_says_why_it_cannot_write():
    pytest.importorskip("torch")
    with pytest.raises(OSError, match="No space left on device"):
        write_torch(Path("/dev/full"), "state_dict", [("a", np.zeros(9999, np.float32))], {})


def test_overwrite_replaces_exports_only(tmp_path):
    def write(text):
        with all_or_nothing(tmp_path / "out", overwrite=True) as folder:
            (folder / "out").mkdir()
            (folder / "out" / CARD).write_text(f"{CARD_MARK}\n{text}")

    write("old")
    with pytest.raises(UserError, match="exists: choose another, or add --overwrite"):
        check_output(tmp_path / "out")
    write("new")
    assert "new" in (tmp_path / "out" / CARD).read_text() and os.listdir(tmp_path) == ["out"]
    with pytest.raises(RuntimeError), all_or_nothing(tmp_path / "out", overwrite=True):
        raise RuntimeError
    assert "new" in (tmp_path / "out" / CARD).read_text() and os.listdir(tmp_path) == ["out"]

    # Other folders, such as a home directory or a training run, are not exports, so they are not overwritten.
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not an export of this project"):
        check_output(tmp_path / "home", overwrite=True)
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", overwrite=True)
