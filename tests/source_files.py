"""Sources for the tests: the same crops of real photos, in the formats of all kinds of source."""

import contextlib
import functools
import io
import json
import os
import socket
import tarfile

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from pixart_jax.data import sources as S

# (name, photo, top, left, height, width, format): several shapes, folders, and names that differ in suffix.
CROPS = [
    ("a.png", 0, 0, 0, 40, 60, "PNG"),
    ("a.jpg", 1, 10, 20, 50, 30, "JPEG"),
    ("deep/er/b.webp", 0, 100, 50, 33, 77, "WEBP"),
    ("deep/c.JPEG", 1, 40, 40, 64, 64, "JPEG"),
    ("z.tif", 0, 5, 300, 20, 200, "TIFF"),
    ("ünï cødé.bmp", 1, 0, 0, 25, 26, "BMP"),
]


def encode(image, fmt, **options):
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, fmt, **options)
    return buffer.getvalue()


@functools.cache
def crops():
    """Returns {name: (encoded bytes, caption)} of crops of the sample photos."""
    photos = load_sample_images().images
    made = {}
    for name, photo, top, left, height, width, fmt in CROPS:
        crop = photos[photo][top : top + height, left : left + width]
        made[name] = encode(crop, fmt), f"A crop named {name}, naïvely"
    return made


def write_folder(root, files, captions=True):
    for name, (data, caption) in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        if captions:
            path.with_name(path.name + ".txt").write_text(caption + "\n", "utf-8")
    return root


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_parquet(path, columns, row_group_size=2):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def write_tfds(data_dir, files, name="photos"):
    tfds = pytest.importorskip("tensorflow_datasets")
    features = tfds.features

    def info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=features.FeaturesDict(
                {
                    "image": features.Image(),
                    "text": features.Text(),
                    "captions": features.Sequence({"text": features.Text()}),
                    "label": features.ClassLabel(names=["cat", "dog"]),
                    "name": features.Text(),
                }
            ),
        )

    def examples(self):
        for number, (name, (data, caption)) in enumerate(files.items()):
            yield (
                f"{number:03d}",
                {
                    "image": io.BytesIO(data),
                    "text": caption,
                    "captions": [{"text": caption}, {"text": "second"}],
                    "label": number % 2,
                    "name": name,
                },
            )

    body = {
        "VERSION": tfds.core.Version("1.2.3"),
        "_info": info,
        "_split_generators": lambda self, manager: {"train": self._generate_examples()},
        "_generate_examples": examples,
        "__module__": __name__,
    }
    builder_class = type(name.capitalize(), (tfds.core.GeneratorBasedBuilder,), body, skip_registration=True)
    builder = builder_class(data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
    return builder


def records(files):
    return [{"path": name, "prompt": caption} for name, (_, caption) in files.items()]


def open_every_kind(root, files):
    """Writes the files in the formats of all kinds; yields (kind, source, function from key to file name)."""
    folder = write_folder(root / "folder", files)
    yield "folder", S.open_source("folder", folder), lambda key: key

    (root / "list.json").write_text(json.dumps(records(files)))
    yield "json", S.open_source("auto", root / "list.json", image_root=folder), lambda key: key

    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in reversed(records(files)))
    (root / "list.jsonl").write_text(lines, "utf-8")
    yield "jsonl", S.open_source("auto", root / "list.jsonl", image_root=folder), lambda key: key

    rows = "".join(f'"{name}","{caption}"\n' for name, (_, caption) in files.items())
    (root / "list.csv").write_text("file_name,text\n" + rows, "utf-8")
    yield "csv", S.open_source("auto", root / "list.csv", image_root=folder), lambda key: key

    hf = write_folder(root / "imagefolder", files, captions=False)
    (hf / "metadata.csv").write_text("file_name,text\n" + rows, "utf-8")
    yield "imagefolder", S.open_source("auto", hf), lambda key: key

    write_folder(root / "kohya" / "5_photos", files)
    yield "kohya", S.open_source("kohya", root / "kohya"), lambda key: key.removeprefix("5_photos/")

    names, blobs = list(files), [data for data, _ in files.values()]
    texts = [caption for _, caption in files.values()]
    write_parquet(root / "bytes.parquet", {"image": blobs, "caption": texts, "id": names})
    yield "parquet", S.open_source("auto", root / "bytes.parquet", key_field="id"), lambda key: key
    structs = [{"bytes": blob, "path": None} for blob in blobs]
    (root / "hf").mkdir()
    write_parquet(root / "hf" / "0.parquet", {"image": structs[:3], "text": texts[:3]})
    write_parquet(root / "hf" / "1.parquet", {"image": structs[3:], "text": texts[3:]})
    rows = {f"{i // 3}.parquet/{i % 3:08d}": name for i, name in enumerate(names)}
    yield "parquet", S.open_source("auto", root / "hf"), rows.__getitem__
    write_parquet(root / "paths.parquet", {"image": names, "prompt": texts})
    yield "parquet", S.open_source("auto", root / "paths.parquet", image_root=folder), lambda key: key

    members, by_key = [], {}
    for i, (name, (data, caption)) in enumerate(files.items()):
        suffix = name.split(".")[-1]
        members += [(f"{i:04d}.{suffix}", data), (f"{i:04d}.txt", caption.encode())]
        by_key[f"{i // 3:02d}.tar/{i:04d}.{suffix.lower()}"] = name
    (root / "tars").mkdir()
    write_tar(root / "tars" / "00.tar", members[:6])
    write_tar(root / "tars" / "01.tar", members[6:])
    yield "webdataset", S.open_source("auto", root / "tars"), by_key.__getitem__
    yield "webdataset", S.open_source("auto", root / "tars" / "{00..01}.tar"), by_key.__getitem__
    yield "webdataset", S.open_source("webdataset", root / "tars" / "*.tar"), by_key.__getitem__

    builder = write_tfds(root / "tfds", files)
    options = {"caption_fields": ["text"], "key_field": "name"}
    yield "tfds", S.open_source("auto", builder.data_dir, **options), lambda key: key
    yield "tfds", S.open_source("tfds", "photos", data_dir=root / "tfds", **options), lambda key: key


def open_list(tmp_path, records, **options):
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return S.open_source("jsonl", path, **options)


def bad_records(good):
    """Returns records of a list that cannot be used, made from a good one, each with its reason."""
    many = [{"text": "x", "weight": 1}] * 70_000
    return [
        (good | change, reason)
        for change, reason in [
            ({"prompt": "half a \ud83d pair"}, "bad_caption"),
            ({"prompt": "a\0b"}, "bad_caption"),
            ({"prompt": "word " * 1_000_000}, "bad_caption"),
            ({"prompt": ["x"] * 70_000}, "bad_caption"),
            ({"captions": many}, "bad_caption"),
            ({"captions": [{"text": "x", "name": "n\ud83d"}]}, "bad_caption"),
            ({"captions": [{"text": "x", "name": "n" * 70_000}]}, "bad_record"),
            *(
                ({"captions": [{"text": "x", "weight": weight}]}, "bad_record")
                for weight in (1e39, 1e-39, -1, 10**400, float("nan"), float("inf"), "1", [1])
            ),
            *(({"label": label}, "bad_record") for label in (2**31, -2, 1.5, 10**400, float("inf"), "2.5")),
            ({"path": "p" * 70_000}, "bad_record"),
            ({"path": "a\0.png"}, "outside_root"),
            ({"path": 3}, "bad_record"),
            ({"path": "fifo.png"}, "unreadable"),
            ({"path": "socket.png"}, "unreadable"),
            ({"path": "folder.png"}, "unreadable"),
            ({"path": "circle.png"}, "unreadable"),
            ({"path": "device.png"}, "unreadable"),
            ({"path": "broken.png"}, "missing_image"),
            ({"path": "empty.png"}, "broken"),
        ]
    ]


def write_special_files(root):
    """Writes what may be in place of an image; `bad_records` has their names."""
    root.mkdir(exist_ok=True)
    os.mkfifo(root / "fifo.png")
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(root):  # a path has at most 108 bytes
        listener.bind("socket.png")
    (root / "folder.png").mkdir()
    (root / "circle.png").symlink_to("circle.png")
    (root / "device.png").symlink_to("/dev/zero")
    (root / "broken.png").symlink_to("absent")
    (root / "empty.png").write_bytes(b"")
