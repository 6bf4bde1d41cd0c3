"""Lists of images and captions: a bad sample is skipped with a reason, and never ends a run."""

import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
from fuzzing import fuzz
from hostile import TEXTS, damaged, json_files, texts, values
from hypothesis import strategies as st
from PIL import Image

from pixart_jax.config import FeaturesConfig
from pixart_jax.data.captions import LONGEST_CAPTION, prepare_caption
from pixart_jax.data.images import Refused
from pixart_jax.data.planning import open_images
from pixart_jax.data.sources import open_source
from pixart_jax.precompute import Options, precompute

RECORDS = [
    {"path": "a.png", "caption": "a red square", "label": 1},
    {"path": "b.png", "prompt": "short", "sharegpt4v": "long", "height": 16, "width": 16},
    {"path": "c.jpg", "captions": [{"text": "one", "weight": 0.5, "name": "llava"}, {"text": "two"}]},
]
COCO = {
    "images": [{"id": 1, "file_name": "a.png", "height": 16, "width": 16}, {"id": 2, "file_name": "b.png"}],
    "annotations": [{"image_id": 1, "caption": "one", "id": 5}, {"image_id": 2, "caption": "two", "id": 6}],
}
KOHYA = {"a.png": {"caption": "a red square", "tags": "red"}, "b.png": "text"}
FEATURES = FeaturesConfig(image_size=16, codec="pixels", vae="", latent_scale=1.0, text=False)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name, colour in (("a.png", "red"), ("b.png", "blue"), ("c.jpg", "green")):
        Image.new("RGB", (16, 16), colour).save(folder / name)
    return folder


def read_all(kind, path, **options):
    """Reads every sample of a source, which may be skipped, and writes its features."""
    source = open_source(kind, path, **options)
    for index in range(len(source)):
        source.key(index).encode()
        try:
            for caption in source[index].captions:
                caption.text.encode()
                assert np.isfinite(np.float32(caption.weight)) and caption.weight >= 0
                caption.name.encode()
        except Refused as refused:
            assert refused.reason and "\n" not in refused.text and len(refused.text) < 1000
    options = {name: value for name, value in options.items() if name != "require_captions"}
    precompute(
        open_images(kind, path, FEATURES, options),
        FEATURES,
        "out",
        Options(min_bucket=1, workers=1, max_refused_share=1.0),
    )


def check(outcome):
    # Samples that cannot be used are listed even if none is left.
    outcome.check(leaves=["out"], allowed={0, 2})


@fuzz(50, "images", data=st.data(), kind=st.sampled_from(["json", "coco", "kohya"]))
def test_json(sandbox, images, data, kind):
    shutil.copytree(images, sandbox.path, dirs_exist_ok=True)
    valid = {"json": RECORDS, "coco": COCO, "kohya": KOHYA}[kind]
    sandbox.write("list.json", data.draw(json_files(valid), label="list.json"))
    check(sandbox.read(read_all, "json", "list.json"))


@fuzz(50, "images", data=st.data(), whole=st.booleans())
def test_json_lines(sandbox, images, data, whole):
    shutil.copytree(images, sandbox.path, dirs_exist_ok=True)
    good = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
    lines = damaged(good) if whole else st.sampled_from(RECORDS).flatmap(json_files)
    sandbox.write("list.jsonl", (b"" if whole else good) + data.draw(lines, label="list.jsonl"))
    check(sandbox.read(read_all, "jsonl", "list.jsonl"))
    sandbox.command("caption", "stats", "list.jsonl", "--tagger=nltk").check()


@fuzz(40, "images", data=st.data(), tabs=st.booleans())
def test_tables(sandbox, images, data, tabs):
    shutil.copytree(images, sandbox.path, dirs_exist_ok=True)
    comma = "\t" if tabs else ","
    names = data.draw(st.permutations(["path", "caption", "weight", "label"]))
    if data.draw(st.integers(0, 4)) == 0:
        names = data.draw(st.lists(texts, max_size=4))
    cell = st.sampled_from(["a.png", "b.png", "x", '"a', '"a,b"']) | values.map(str)
    rows = data.draw(st.lists(st.lists(cell, max_size=5), max_size=4))
    name = "list.tsv" if tabs else "list.csv"
    sandbox.write(name, "\n".join(comma.join(row) for row in [names, ["a.png", "ok", "1", "2"], *rows]))
    check(sandbox.read(read_all, "csv", name))


@fuzz(
    40, "images", data=st.data(), which=st.sampled_from(["a.png", "c.jpg", "a.txt", "metadata.jsonl", "fifo"])
)
def test_folders(sandbox, images, data, which):
    root = sandbox.path / "photos"
    shutil.copytree(images, root)
    for name in ("a", "b", "c"):
        (root / f"{name}.txt").write_text("a caption")
    if which == "fifo":
        os.mkfifo(root / "d.png")
    elif which == "metadata.jsonl":
        good = b'{"file_name": "a.png", "text": "a"}\n'
        content = data.draw(json_files({"file_name": "b.png", "text": "b"}), label=which)
        (root / which).write_bytes(good + content)
    else:
        old = (root / which).read_bytes()
        (root / which).write_bytes(data.draw(damaged(old), label=which))
    check(sandbox.read(read_all, "auto", "photos"))


@fuzz(
    20,
    "images",
    data=st.data(),
    name=st.sampled_from(["0.png", "0.txt", "../../escape.png", "x/" * 200 + "0.png"]),
)
def test_archives(sandbox, images, data, name):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for member, content in (("1.png", (images / "a.png").read_bytes()), ("1.txt", b"a"), (name, b"x")):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("2.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    sandbox.write(
        "photos.tar", data.draw(st.just(buffer.getvalue()) | damaged(buffer.getvalue()), label="tar")
    )
    check(sandbox.read(read_all, "webdataset", "photos.tar"))


@fuzz(60, text=st.text() | st.lists(st.sampled_from(TEXTS) | st.text(max_size=5), max_size=20).map("".join))
def test_captions(sandbox, text):
    # Sources and requests do not let half of a surrogate pair through.
    sandbox.read(prepare_caption, text.encode("utf-8", "ignore").decode()).check()


@fuzz(
    8,
    part=st.sampled_from(
        ["<", "(", "a@", "#", "&amp;", "http://", "--", "\n", "1:2", "x_", "é", "«", "1.", "a.b"]
    ),
    size=st.sampled_from([LONGEST_CAPTION, LONGEST_CAPTION, 2**20]),
)
def test_long_captions(sandbox, part, size):
    """Cleaning takes quadratic time, so the length of captions is limited."""
    sandbox.read(prepare_caption, part * (size // len(part))).check()
