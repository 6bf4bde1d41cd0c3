"""Each kind of source gives the same images and captions for the same files, and refuses what it must."""

import contextlib
import io
import json
import os
import pickle
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from pixart_jax.data import captions as C
from pixart_jax.data import images as I
from pixart_jax.data import sources as S
from pixart_jax.errors import UserError

# (name, photo, top, left, height, width, format): many shapes, folders, and equal stems with other suffixes.
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


@pytest.fixture(scope="session")
def files():
    """Name to (encoded bytes, caption) of crops of the sample photos."""
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
    """Writes the same files in every way there is, and yields (kind, source, key to name)."""
    folder = write_folder(root / "folder", files)
    yield "folder", S.open_source("folder", folder), lambda key: key

    (root / "list.json").write_text(json.dumps(records(files)))
    yield "json", S.open_source("auto", root / "list.json", image_root=folder), lambda key: key

    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in reversed(records(files)))
    (root / "list.jsonl").write_text(lines, "utf-8")
    yield "jsonl", S.open_source("auto", root / "list.jsonl", image_root=folder), lambda key: key

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


@pytest.mark.filterwarnings("ignore")
def test_identical_images_whatever_the_kind(tmp_path, files):
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
    import subprocess
    import sys

    write_tfds(tmp_path, files)
    code = (
        "import sys; from pixart_jax.data import sources as S;"
        f"s = S.open_source('tfds', 'photos', data_dir={str(tmp_path)!r}, label_field='label');"
        "print(s[0].decode().shape, s.classes, [m for m in ('tensorflow', 'jax') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.endswith("['cat', 'dog'] []\n"), run.stderr


# --- folder


def test_folder_order_keys_and_captions(tmp_path, files):
    root = write_folder(tmp_path, files)
    source = S.open_source("folder", root)
    assert [source.key(i) for i in range(len(source))] == sorted(files)
    (root / "a.jpg.txt").unlink()
    (root / "a.png.txt").unlink()
    (root / "a.txt").write_text("\ufeffshared  caption\nsecond line ", "utf-8")
    shared = [example.captions[0].text for example in (source[0], source[1])]
    assert [source.key(0), source.key(1)] == ["a.jpg", "a.png"] and shared == [
        "shared  caption\nsecond line"
    ] * 2
    (root / "a.png.txt").write_text("own")
    assert source[1].captions == (C.Caption("own", 1.0, "caption"),)


def test_folder_refusals(tmp_path, files):
    root = write_folder(tmp_path, files)
    source = S.open_source("folder", root)
    index = {source.key(i): i for i in range(len(source))}
    (root / "a.png.txt").unlink()
    (root / "z.tif.txt").write_text("  \n")
    (root / "a.jpg.txt").write_bytes(b"caf\xe9")
    (root / "deep/c.JPEG").unlink()
    for key, reason in [("a.png", "missing_caption"), ("z.tif", "missing_caption"), ("a.jpg", "bad_caption")]:
        with pytest.raises(I.Refused, match=reason):
            source[index[key]]
    example = source[index["deep/c.JPEG"]]  # the list is lazy: the image is missed when it is read
    with pytest.raises(I.Refused, match="missing_image"):
        example.decode()
    without = S.open_source("folder", root, require_captions=False)
    assert [without[i].captions for i in range(len(without)) if without.key(i) == "a.png"] == [()]


def test_folder_skips_hidden_files_and_survives_links_in_circles(tmp_path, files):
    root = write_folder(tmp_path / "root", files)
    (root / "._a.png").write_bytes(b"resource fork")
    (root / ".cache").mkdir()
    (root / ".cache" / "x.png").write_bytes(b"")
    os.symlink(root, root / "deep" / "up")
    os.symlink(write_folder(tmp_path / "else", {"far.png": files["a.png"]}), root / "link")
    source = S.open_source("folder", root)
    assert [source.key(i) for i in range(len(source))] == sorted([*files, "link/far.png"])


def test_file_names_that_are_not_utf8(tmp_path, files):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        (tmp_path / name).write_bytes(files["a.png"][0])
    except OSError:
        pytest.skip("the file system refuses such names")
    source = S.open_source("folder", tmp_path, require_captions=False)
    assert source.key(0) == "caf\\udce9.png"
    assert source[0].decode().shape == (40, 60, 3)


# --- class folders


def test_class_folders(tmp_path, files):
    data = files["a.png"][0]
    for name in ["n02/b.png", "n01/x/a.png", "n10/c.png", "n01/a.JPG"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    source = S.open_source("auto", tmp_path)
    assert source.kind == "classes" and source.classes == ["n01", "n02", "n10"]
    assert [(source[i].key, source[i].label) for i in range(4)] == [
        ("n01/a.JPG", 0), ("n01/x/a.png", 0), ("n02/b.png", 1), ("n10/c.png", 2),
    ]  # fmt: skip
    assert source[0].captions == ()
    (tmp_path / "stray.png").write_bytes(data)
    source = S.open_source("classes", tmp_path)
    with pytest.raises(I.Refused, match=r"stray.png"):
        source[4]
    (tmp_path / "n05").mkdir()
    with pytest.raises(UserError, match=r"n05.*holds no image"):
        S.open_source("classes", tmp_path)
    with pytest.raises(UserError, match="no captions"):
        S.open_source("classes", tmp_path, require_captions=True)


# --- lists


def open_list(tmp_path, records, **options):
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return S.open_source("jsonl", path, **options)


def test_official_fields(tmp_path):
    source = open_list(
        tmp_path,
        [{"path": "x.png", "height": 480, "width": 640, "ratio": 0.75, "prompt": "p", "sharegpt4v": " s "}],
    )
    example = source[0]
    assert (example.height, example.width, example.label) == (480, 640, None)
    assert example.captions == (C.Caption("p", 1.0, "prompt"), C.Caption("s", 1.0, "sharegpt4v"))
    assert example.image == tmp_path / "x.png"
    weighted = open_list(
        tmp_path, [{"path": "x", "prompt": "p", "sharegpt4v": "s"}], caption_fields={"sharegpt4v": 3}
    )
    assert weighted[0].captions == (C.Caption("s", 3.0, "sharegpt4v"),)


def test_several_captions_with_weights(tmp_path):
    source = open_list(
        tmp_path,
        [
            {
                "path": "0",
                "prompt": "unused",
                "captions": [{"text": "a", "weight": 0.25, "name": "real"}, "b"],
            },
            {"path": "1", "captions": [{"text": "a", "weight": 0}, {"text": ""}, {"text": "c"}]},
            {"path": "2", "prompt": ["one", "two", None, ""]},
            {"path": "3", "captions": [{"text": "a", "weight": -1}]},
            {"path": "4", "captions": [{"txt": "a"}]},
            {"path": "5", "captions": "a"},
            {"path": "6", "prompt": 7},
            {"path": "7", "captions": [{"text": "a", "weight": 0}]},
        ],
    )
    assert source[0].captions == (C.Caption("a", 0.25, "real"), C.Caption("b", 1.0, "caption1"))
    assert source[1].captions == (C.Caption("c", 1.0, "caption2"),)
    assert source[2].captions == (C.Caption("one", 0.5, "prompt"), C.Caption("two", 0.5, "prompt"))
    for i, reason in enumerate(
        ["bad_record", "bad_record", "bad_record", "bad_caption", "missing_caption"], 3
    ):
        with pytest.raises(I.Refused, match=reason):
            source[i]
    chosen = open_list(tmp_path, [{"path": "0", "prompt": "p", "captions": ["c"]}], caption_fields=["prompt"])
    assert [c.text for c in chosen[0].captions] == ["p"]


def test_bad_records_are_refused_one_by_one(tmp_path):
    lines = [
        b'{"path": "good.png", "prompt": "fine", "height": "480", "width": -3, "label": true}',
        b'["no object"]',
        b"",
        b'{"path": 7, "prompt": "x"}',
        b'{"path": "../up.png", "prompt": "x"}',
        b'{"path": "/etc/passwd", "prompt": "x"}',
        b'{"path": "..", "prompt": "x"}',
        b'{"path": "a/../../up.png", "prompt": "x"}',
        b'{"path": "good.png", "prompt": "again"}',
        b'{"path": "./sub/../good2.png", "prompt": "x"}',
        b'{"path": "no caption.png"}',
        b'{"path": "torn.png", "pro',
    ]
    (tmp_path / "list.jsonl").write_bytes(b"\n".join(lines))
    source = S.open_source("auto", tmp_path / "list.jsonl")
    taken, refused = {}, []
    for i in range(len(source)):
        try:
            taken[source.key(i)] = source[i]
        except I.Refused as error:
            refused.append((source.key(i), error.reason))
    assert sorted(taken) == ["good.png", "good2.png"]
    good = taken["good.png"]
    assert good.captions[0].text == "fine", "of two entries the first counts"
    assert (good.height, good.width, good.label) == (480, None, None)
    assert sorted(refused) == [
        ("good.png", "duplicate_key"),
        ("list.jsonl:11", "bad_record"),
        ("list.jsonl:2", "bad_record"),
        ("list.jsonl:3", "bad_record"),
        ("list.jsonl:4", "outside_root"),
        ("list.jsonl:5", "outside_root"),
        ("list.jsonl:6", "outside_root"),
        ("list.jsonl:7", "outside_root"),
        ("no caption.png", "missing_caption"),
    ]


def test_absolute_paths_below_the_root_are_taken(tmp_path):
    source = open_list(tmp_path, [{"path": str(tmp_path / "a" / "x.png"), "prompt": "p"}])
    assert source.key(0) == "a/x.png" and source[0].image == tmp_path / "a/x.png"


# --- Parquet


def test_parquet_rows(tmp_path, files):
    data = files["a.png"][0]
    path = write_parquet(
        tmp_path / "t.parquet",
        {
            "image": [data, None, data, b"broken", data],
            "captions": [["a", "b"], ["c"], [], ["d"], ["e"]],
            "label": [3, 1, 2, 0, None],
            "key": [0, 1, 2, 3, 0],
        },
    )
    source = S.open_source("parquet", path, label_field="label")
    assert [source.key(i) for i in range(5)] == [f"t.parquet/{i:08d}" for i in range(5)]
    assert source[-5].captions == (C.Caption("a", 1.0, "caption0"), C.Caption("b", 1.0, "caption1"))
    assert [source[i].label for i in (0, 3, 4)] == [3, 0, None]
    for i, reason in [(1, "missing_image"), (2, "missing_caption")]:
        with pytest.raises(I.Refused, match=reason):
            source[i]
    with pytest.raises(I.Refused, match="format"):
        source[3].decode()
    keyed = S.open_source("parquet", path, key_field="key")
    assert keyed.key(0) == "0"
    with pytest.raises(I.Refused, match="duplicate_key"):
        keyed[4]


def test_parquet_from_many_threads(tmp_path, files):
    blobs = [files["a.png"][0] + bytes([i]) for i in range(40)]
    path = write_parquet(tmp_path / "t.parquet", {"image": blobs, "text": ["x"] * 40}, row_group_size=3)
    source = S.open_source("parquet", path)
    order = np.random.default_rng(0).integers(0, 40, 400).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: source[i].read(), order)) == [blobs[i] for i in order]


# --- WebDataset


def test_webdataset_members(tmp_path, files):
    png, jpg = files["a.png"][0], files["a.jpg"][0]
    write_tar(
        tmp_path / "s.tar",
        [
            ("./0.png", png), ("./0.json", b'{"caption": "from json", "height": 40, "label": 5}'),
            ("dir/1.v2.png", b"mask"), ("dir/1.jpg", jpg), ("dir/1.txt", b"from txt"), ("dir/1.cls", b"7\n"),
            ("dir/1.json", b'{"caption": "not used"}'),
            ("2.txt", b"no image"),
            ("3.png", png),
            ("4.png", png), ("4.json", b"[]"),
            ("5.png", png), ("5.txt", b"first"), ("5.txt", b"second"),
            ("6.png", png), ("6.json", b'{"captions": [{"text": "t", "weight": 2, "name": "n"}]}'),
            ("noextension", b""),
        ],
    )  # fmt: skip
    source = S.open_source("auto", tmp_path / "s.tar")
    keys = ["s.tar/0.png", "s.tar/dir/1.jpg", "s.tar/2", *(f"s.tar/{i}.png" for i in (3, 4, 5, 6))]
    assert [source.key(i) for i in range(len(source))] == keys
    assert source[0].captions == (C.Caption("from json", 1.0, "caption"),)
    assert (source[0].height, source[0].label) == (40, 5)
    assert source[1].captions == (C.Caption("from txt", 1.0, "txt"),) and source[1].label == 7
    assert source[1].read() == jpg
    for i, reason in [(2, "missing_image"), (3, "missing_caption"), (4, "bad_record")]:
        with pytest.raises(I.Refused, match=reason):
            source[i]
    assert source[5].captions[0].text == "second"
    assert source[6].captions == (C.Caption("t", 2.0, "n"),)
    both = S.open_source("webdataset", tmp_path / "s.tar", caption_fields={"txt": 1, "caption": 3})
    assert [(c.text, c.weight) for c in both[1].captions] == [("from txt", 1.0), ("not used", 3.0)]
    masks = S.open_source("webdataset", tmp_path / "s.tar", image_field="v2.png", require_captions=False)
    assert masks[1].key == "s.tar/dir/1.v2.png" and masks[1].read() == b"mask"


def test_webdataset_damage(tmp_path, files):
    members = [(f"{i}.png", files["a.png"][0]) for i in range(3)]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    (tmp_path / "torn.tar").write_bytes(whole[: 512 + 3000])
    with pytest.raises(UserError, match=r"torn.tar.*restore or remove"):
        S.open_source("auto", tmp_path / "torn.tar")
    with tarfile.open(tmp_path / "zipped.tar", "w:gz"):
        pass
    with pytest.raises(UserError, match="gunzip"):
        S.open_source("auto", tmp_path / "zipped.tar")
    source = S.open_source("auto", tmp_path / "whole.tar", require_captions=False)
    (tmp_path / "whole.tar").write_bytes(whole[:600])
    with pytest.raises(I.Refused, match="unreadable"):
        source[0].decode()
    (tmp_path / "whole.tar").unlink()
    with pytest.raises(I.Refused, match="missing_image"):
        source[0].decode()


def test_archive_with_captions_of_its_own_file(tmp_path, files):
    write_tar(
        tmp_path / "s.tar",
        [("0.png", files["a.png"][0]), ("0.txt", b"old"), ("1.png", b"x"), ("2.png", b"y")],
    )
    lines = [
        {"path": "s.tar/0.png", "captions": [{"text": "new", "weight": 2, "name": "vlm"}]},
        {"path": "s.tar/0.png", "captions": ["later"]},
        {"path": "s.tar/2.png", "prompt": "plain"},
    ]
    (tmp_path / "c.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"path": "s.tar/1'
    )
    source = S.open_source("auto", tmp_path / "s.tar", captions=tmp_path / "c.jsonl")
    assert (source.kind, len(source), source.key(1)) == ("webdataset", 3, "s.tar/1.png")
    assert source[0].captions == (C.Caption("new", 2.0, "vlm"),) and source[0].read() == files["a.png"][0]
    assert source[2].captions == (C.Caption("plain", 1.0, "prompt"),)
    with pytest.raises(I.Refused, match=r"missing_caption.*c.jsonl"):
        source[1]
    optional = S.open_source(
        "auto", tmp_path / "s.tar", captions=tmp_path / "c.jsonl", require_captions=False
    )
    assert optional[1].captions == ()
    with pytest.raises(UserError, match="does not exist"):
        S.open_source("auto", tmp_path / "s.tar", captions=tmp_path / "absent.jsonl")


# --- TFDS


@pytest.mark.filterwarnings("ignore")
def test_tfds_options(tmp_path, files):
    builder = write_tfds(tmp_path, files)
    source = S.open_source("tfds", "photos", data_dir=tmp_path, split="train[:4]", label_field="label")
    assert len(source) == 4 and source.classes == ["cat", "dog"]
    assert source.key(1) == "photos/1.2.3/train[:4]/0000000001"
    assert source[1].label in (0, 1) and source[1].captions[0].name == "text"
    several = S.open_source("tfds", builder.data_dir, caption_fields=["captions/text"])[0].captions
    assert [c.weight for c in several] == [0.5, 0.5] and several[1].text == "second"
    for options, words in [
        ({"split": "trian"}, "Unknown split 'trian'"),
        ({"image_field": "imgae"}, "Did you mean 'image'"),
        ({"caption_fields": ["txet"]}, "Did you mean 'text'"),
        ({"label_field": "labels"}, "Did you mean 'label'"),
    ]:
        with pytest.raises(UserError, match=words) as error:
            S.open_source("tfds", "photos", data_dir=tmp_path, **options)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="Did you mean 'mnist'"):
        S.open_source("tfds", "mnits", data_dir=tmp_path)


# --- opening


def test_kind_is_told_by_content(tmp_path, files):
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
        ("folder", {}, {}, "holds no image"),
        ("auto", {}, {}, "holds no images"),
        ("auto", {"x.bin": b""}, {"file": "x.bin"}, "suffix tells no kind"),
        ("folder", {"a.png": b"x"}, {"caption_field": ["x"]}, "option 'caption_field'.*require_captions"),
        ("json", {"l.json": b"{"}, {"file": "l.json"}, "no JSON.*jsonl"),
        ("json", {"l.json": b"{}"}, {"file": "l.json"}, "holds a dict"),
        ("json", {"l.json": b"[]"}, {"file": "l.json"}, "list is empty"),
        ("json", {"l.json": b'[{"file": "a"}]'}, {"file": "l.json"}, "no object has the field 'path'.*file"),
        (
            "json",
            {"l.json": b'[{"path": "a", "x": "b"}]'},
            {"file": "l.json"},
            "name yours with caption_fields",
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
        ("json", {"l.json": b"[1]"}, {"file": "l.json", "image_root": "absent"}, "is no folder"),
        ("parquet", {"x.parquet": b"PAR1"}, {"file": "x.parquet"}, "no readable Parquet"),
        ("webdataset", {}, {}, "no .tar file there"),
        ("webdataset", {"0.tar": b"\0" * 10240}, {"file": "{0..2}.tar"}, "1.tar' is missing"),
        ("webdataset", {"0.tar": b"\0" * 10240}, {}, "hold no samples"),
    ],
)
def test_mistakes_are_one_line(tmp_path, kind, make, options, words):
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


def test_parquet_mistakes(tmp_path, files):
    write_parquet(tmp_path / "a.parquet", {"image": [b"x"], "text": ["t"]})
    with pytest.raises(UserError, match="Did you mean 'image'"):
        S.open_source("parquet", tmp_path, image_field="imag")
    write_parquet(tmp_path / "b.parquet", {"image": [b"x"]})
    with pytest.raises(UserError, match=r"b.parquet.*no column 'text'"):
        S.open_source("parquet", tmp_path)


def test_caption_fields_of_a_flag():
    assert C.parse_caption_fields("") is None
    assert C.parse_caption_fields("prompt") == {"prompt": 1.0}
    assert C.parse_caption_fields(" prompt=1, sharegpt4v = 0.5") == {"prompt": 1.0, "sharegpt4v": 0.5}
    for text in ("a=0", "a=-1", "a=x", "a=nan", "a=inf"):
        with pytest.raises(UserError, match="positive number"):
            C.parse_caption_fields(text)


def test_braces():
    assert S._expand_braces("s/{08..11}.tar") == ["s/08.tar", "s/09.tar", "s/10.tar", "s/11.tar"]
    assert S._expand_braces("{0..1}-{0..1}") == ["0-0", "0-1", "1-0", "1-1"]
    assert S._expand_braces("plain") == ["plain"]


# --- the report


def test_report_of_a_run(tmp_path, files):
    root = write_folder(tmp_path / "data", files)
    (root / "a.png").write_bytes(files["a.png"][0][:100])
    (root / "z.tif.txt").unlink()
    (root / "moving.gif").write_bytes(
        encode(
            np.zeros((4, 4, 3), np.uint8),
            "GIF",
            save_all=True,
            append_images=[Image.new("RGB", (4, 4), "red")],
        )
    )
    (root / "moving.txt").write_text("moves")
    source, report = S.open_source("auto", root), I.RefusalReport(max_refused_share=0.5)
    for i in reversed(range(len(source))):
        try:
            source[i].decode()
            report.take()
        except I.Refused as refused:
            report.refuse(source.key(i), refused)
    report.check()
    assert (report.taken, len(report.refused)) == (4, 3)
    assert report.counts() == {"animated": 1, "broken": 1, "missing_caption": 1}
    table = report.table().splitlines()
    assert table[0].split() == ["taken", "4"] and table[-1].split() == ["refused", "in", "all", "3", "42.86%"]
    assert any("no caption" in line and "z.tif" in line for line in table)
    report.write(tmp_path / "refused.jsonl")
    assert [refusal.key for refusal in I.read_refused(tmp_path / "refused.jsonl")] == [
        "a.png",
        "moving.gif",
        "z.tif",
    ]
    assert I.read_refused(tmp_path / "refused.jsonl") == sorted(report.refused)
    assert {path.name for path in tmp_path.iterdir()} == {"data", "refused.jsonl"}


def test_report_stops_a_run_that_refuses_too_much():
    report = I.RefusalReport(max_refused_share=0.1, minimum=20)
    for i in range(10):  # all of the first ten: too few to judge
        report.refuse(f"k{i}", I.Refused("broken", "bad\nbytes"))
    report.take(9)
    with pytest.raises(
        UserError, match=r"refused 11 of 20 samples \(55.0%\).*broken \(11\).*'k0': bad bytes"
    ):
        report.refuse("k10", I.Refused("broken", "x"))
    report.take(90)
    report.check()  # 11 of 110 is exactly a tenth
    report.refused.append(I.Refusal("k", "format", "t"))
    with pytest.raises(UserError):
        report.check()


def test_report_ends():
    nothing_taken = I.RefusalReport(max_refused_share=1.0, minimum=100)
    nothing_taken.refuse("k", I.Refused("broken", "x"))
    with pytest.raises(UserError, match="1 of 1"):
        nothing_taken.check()
    I.RefusalReport().check()
    with pytest.raises(UserError, match=r"max_refused_share 5.*between 0 and 1"):
        I.RefusalReport(max_refused_share=5)


def test_report_from_many_threads():
    report = I.RefusalReport(max_refused_share=1.0)

    def work():
        for i in range(300):
            report.take()
            with contextlib.suppress(UserError):
                report.refuse(str(i), I.Refused("broken", "x"))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (report.taken, len(report.refused)) == (2400, 2400)
