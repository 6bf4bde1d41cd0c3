"""All kinds of source return the same images and captions; detection of the kind."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
from source_files import open_every_kind, write_folder, write_tar, write_tfds

from pixart_jax.data import images as I
from pixart_jax.data import sources as S
from pixart_jax.errors import UserError


@pytest.mark.filterwarnings("ignore")
def test_all_kinds_return_the_same_samples(tmp_path, files):
    expected = {name: (I.decode_image(data), caption) for name, (data, caption) in files.items()}
    seen = set()
    for kind, source, name_of in open_every_kind(tmp_path, files):
        assert source.kind == kind and len(source) == len(files)
        seen.add(kind)
        keys = [source.key(i) for i in range(len(source))]
        assert len(set(keys)) == len(files) and {name_of(key) for key in keys} == set(files), kind
        again = pickle.loads(pickle.dumps(source))
        for i in [3, 0, 5, 1, 4, 2]:  # random access
            example = source[i]
            assert example.key == keys[i]
            pixels, caption = expected[name_of(example.key)]
            np.testing.assert_array_equal(example.decode(), pixels)
            assert [c.text for c in example.captions] == [caption]
            assert example.captions[0].weight == 1.0
            assert example.size() == pixels.shape[:2]
            assert again[i].read() == example.read() and again[i].captions == example.captions
        with pytest.raises(IndexError):
            source[len(files)]
    assert seen == set(S.KINDS) - {"classes"}


@pytest.mark.filterwarnings("ignore")
def test_no_tensorflow_is_imported(tmp_path, files):
    write_tfds(tmp_path, files)
    code = (
        "import sys; from pixart_jax.data import sources as S;"
        f"s = S.open_source('tfds', 'photos', data_dir={str(tmp_path)!r}, label_field='label');"
        "print(s[0].decode().shape, s.classes, [m for m in ('tensorflow', 'jax') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.endswith("['cat', 'dog'] []\n"), run.stderr


def test_detection_of_the_kind(tmp_path, files):
    folder = write_folder(tmp_path / "flat", files, captions=False)
    assert S.detect_kind(folder) == "folder"
    deep = write_folder(tmp_path / "deep", {"c/a.png": files["a.png"]}, captions=False)
    assert S.detect_kind(deep) == "classes"
    assert S.detect_kind(deep, require_captions=False) == "folder"
    (deep / "c" / "a.txt").write_text("x")
    assert S.detect_kind(deep) == "folder"
    write_tar(deep / "x.tar", [])
    with pytest.raises(UserError, match="folder and webdataset"):
        S.detect_kind(deep)


@pytest.mark.parametrize(
    ("kind", "make", "options", "words"),
    [
        ("foldr", None, {}, "Did you mean 'folder'"),
        ("auto", None, {}, "no such file or folder"),
        ("folder", None, {}, "does not exist"),
        ("folder", {}, {}, "has no images"),
        ("auto", {}, {}, "has no images"),
        ("auto", {"x.bin": b""}, {"file": "x.bin"}, "its suffix is not that of a source"),
        (
            "folder",
            {"a.png": b"x"},
            {"caption_field": ["x"]},
            "is 'caption_field': choose one of require_captions",
        ),
        ("json", {"l.json": b"{"}, {"file": "l.json"}, "not JSON.*jsonl"),
        ("json", {"l.json": b"{}"}, {"file": "l.json"}, "contains a dict"),
        ("json", {"l.json": b"[]"}, {"file": "l.json"}, "list is empty"),
        ("json", {"l.json": b'[{"file": "a"}]'}, {"file": "l.json"}, "no object has the field 'path'.*file"),
        (
            "json",
            {"l.json": b'[{"path": "a", "x": "b"}]'},
            {"file": "l.json"},
            "pass the name of your caption field as caption_fields",
        ),
        (
            "json",
            {"l.json": b'[{"path": "a", "prompt": "b"}]'},
            {"file": "l.json", "caption_fields": ["promt"]},
            "Did you mean 'prompt'",
        ),
        (
            "json",
            {"l.json": b'[{"path": "a", "prompt": "b"}]'},
            {"file": "l.json", "caption_fields": {"prompt": 0}},
            "positive number",
        ),
        ("json", {"l.json": b"[1]"}, {"file": "l.json", "image_root": "absent"}, "is not a folder"),
        ("parquet", {"x.parquet": b"PAR1"}, {"file": "x.parquet"}, "not a readable Parquet file"),
        ("webdataset", {}, {}, "no .tar file found"),
        ("webdataset", {"0.tar": b"\0" * 10240}, {"file": "{0..2}.tar"}, "1.tar' is missing"),
        ("webdataset", {"0.tar": b"\0" * 10240}, {}, "have no samples"),
    ],
)
def test_input_errors_are_one_line(tmp_path, kind, make, options, words):
    root = tmp_path / "data"
    if make is not None:
        root.mkdir()
        for name, data in make.items():
            (root / name).write_bytes(data)
    options = dict(options)
    path = root / options.pop("file", "")
    with pytest.raises(UserError, match=words) as error:
        S.open_source(kind, path, **options)
    assert "\n" not in str(error.value)
