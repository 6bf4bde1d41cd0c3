import base64
import json

import pytest
from source_files import (
    bad_records,
    open_list,
    write_folder,
    write_parquet,
    write_special_files,
    write_tar,
)

from pixart_jax.data import captions as C
from pixart_jax.data import images as I
from pixart_jax.data import sources as S
from pixart_jax.data.sources.lists import parse_line
from pixart_jax.errors import UserError


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


def test_bad_records_are_skipped(tmp_path):
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
    used, refused = {}, []
    for i in range(len(source)):
        try:
            used[source.key(i)] = source[i]
        except I.Refused as error:
            refused.append((source.key(i), error.reason))
    assert sorted(used) == ["good.png", "good2.png"]
    good = used["good.png"]
    assert good.captions[0].text == "fine", "the first of two entries is used"
    assert (good.height, good.width, good.label) == (480, None, None)
    assert sorted(refused) == [
        ("good.png", "duplicate_key"),
        # The empty line 3 counts.
        ("list.jsonl:12", "bad_record"),
        ("list.jsonl:2", "bad_record"),
        ("list.jsonl:4", "bad_record"),
        ("list.jsonl:5", "outside_root"),
        ("list.jsonl:6", "outside_root"),
        ("list.jsonl:7", "outside_root"),
        ("list.jsonl:8", "outside_root"),
        ("no caption.png", "missing_caption"),
    ]


def test_absolute_paths_below_the_root(tmp_path):
    source = open_list(tmp_path, [{"path": str(tmp_path / "a" / "x.png"), "prompt": "p"}])
    assert source.key(0) == "a/x.png" and source[0].image == tmp_path / "a/x.png"


def test_archive_with_captions_in_a_file(tmp_path, files):
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


def test_default_names_of_the_path(tmp_path):
    records = [
        {"file_name": "a.png", "text": "t"},
        {"image": "b.png", "text": "t"},
        {"image": ["c.png"], "text": "t"},
    ]
    source = open_list(tmp_path, records)
    assert [source.key(i) for i in range(3)] == ["a.png", "b.png", "c.png"]
    assert [source[i].captions[0].text for i in range(3)] == ["t"] * 3
    several = open_list(tmp_path, [{"image": ["a.png", "b.png"], "text": "t"}], image_index="1")
    assert several[0].key == "b.png"
    with pytest.raises(I.Refused, match=r"field 'image' has 2 images; choose one with .*image_index"):
        open_list(tmp_path, [{"image": ["a.png", "b.png"], "text": "t"}])[0]
    with pytest.raises(UserError, match="image_index is 'x': it must be a whole number"):
        open_list(tmp_path, [{"image": "a.png", "text": "t"}], image_index="x")


def test_images_in_base64(tmp_path, files):
    data = files["a.png"][0]
    text = base64.b64encode(data).decode()
    texts = [
        text,
        f"data:image/png;base64,{text}",
        f"Data:image/png;base64,{text}",
        *("\n".join(text[i : i + width] for i in range(0, len(text), width)) for width in (76, 40)),
    ]
    texts.append(base64.urlsafe_b64encode(data).decode().rstrip("="))
    source = open_list(tmp_path, [{"image": text, "prompt": "p"} for text in texts])
    assert [source.key(i) for i in range(6)] == [f"list.jsonl:{line}" for line in range(1, 7)]
    assert all(source[i].read() == data and source[i].size() == (40, 60) for i in range(6))
    # Base64 of something else is not repeated in the message.
    other = open_list(tmp_path, [{"image": base64.b64encode(b"<svg>" * 900).decode(), "prompt": "p"}])
    with pytest.raises(I.Refused) as refused:
        other[0]
    assert refused.value.reason == "bad_record" and len(refused.value.text) < 300
    assert "characters)' is neither a path nor an image in base64" in refused.value.text


def test_csv(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text(
        'path,prompt,label\na.png,"one, two\nthree",3\n\nb.png,x,1,y\nc.png\n../d.png,x,1\n', "utf-8"
    )
    source = S.open_source("auto", path)
    assert [source.key(i) for i in range(len(source))] == ["a.png", "c.png", "list.csv:5", "list.csv:7"]
    assert source[0].captions[0].text == "one, two\nthree" and source[0].label == 3
    for i, words in [(1, "missing_caption"), (2, "more cells than the first line"), (3, "outside_root")]:
        with pytest.raises(I.Refused, match=words):
            source[i]
    path.write_text("path;prompt\na.png;one, two\n", "utf-8")
    assert S.open_source("auto", path)[0].captions[0].text == "one, two"
    path.rename(tmp_path / "list.TSV").write_text("path\tprompt\na.png\tone, two; three\n", "utf-8")
    assert S.open_source("auto", tmp_path / "list.TSV")[0].captions[0].text == "one, two; three"
    (tmp_path / "bad.csv").write_bytes(b"path,prompt\nx,caf\xe9\n")
    with pytest.raises(UserError, match=r"bad.csv' is not a table in CSV and UTF-8"):
        S.open_source("auto", tmp_path / "bad.csv")


def test_captions_of_coco(tmp_path):
    path = tmp_path / "captions_train2017.json"
    images = [{"id": 7, "file_name": "7.jpg", "height": 4, "width": 6}, {"id": 3, "file_name": "3.jpg"}]
    captions = [{"id": 1, "image_id": 7, "caption": "one"}, {"id": 2, "image_id": 7, "caption": "two"}]
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": captions}))
    source = S.open_source("auto", path)
    assert [source.key(i) for i in range(2)] == ["3.jpg", "7.jpg"]
    assert [caption.text for caption in source[1].captions] == ["one", "two"]
    with pytest.raises(I.Refused, match="missing_caption"):
        source[0]
    path.write_text(json.dumps({"images": images, "annotations": [{"image_id": 7, "bbox": []}]}))
    with pytest.raises(UserError, match=r"no field .caption. in its annotations; give the file with"):
        S.open_source("auto", path)


def test_an_object_of_paths(tmp_path):
    path = tmp_path / "meta.json"
    path.write_text(json.dumps({"b.png": "plain", "a/c.JPG": {"caption": "kohya", "tags": "x"}}))
    source = S.open_source("auto", path)
    assert [(source[i].key, source[i].captions[0].text) for i in range(2)] == [
        ("a/c.JPG", "kohya"),
        ("b.png", "plain"),
    ]
    path.write_text(json.dumps({"version": "1", "data": []}))
    with pytest.raises(UserError, match="contains a dict; it must contain one list"):
        S.open_source("auto", path)


def test_image_folder_of_hugging_face(tmp_path, files):
    data = {"0.png": files["a.png"], "1.png": files["a.png"]}
    for split in ("train", "test"):
        folder = write_folder(tmp_path / split, data, captions=False)
        lines = [{"file_name": name, "text": f"{split} {name}"} for name in data]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert S.detect_kind(tmp_path) == "imagefolder"
    source = S.open_source("auto", tmp_path)
    assert [source.key(i) for i in range(len(source))] == ["train/0.png", "train/1.png"]
    assert source[1].captions[0].text == "train 1.png" and source[1].decode().shape == (40, 60, 3)
    assert source.notes == (
        f"'{tmp_path}': 1 of 2 files are read, without those of the split test; set split to read others, "
        "or to all",
    )
    assert S.open_source("auto", tmp_path, split="test").key(0) == "test/0.png"
    assert len(S.open_source("auto", tmp_path, split="all")) == 4
    (tmp_path / "train" / "2.png").write_bytes(b"")
    assert (
        "1 images are in no metadata.jsonl or metadata.csv or metadata.parquet"
        in S.open_source("auto", tmp_path / "train").notes[0]
    )
    # A list above its images, and a second entry of the same image.
    (tmp_path / "metadata.csv").write_text("file_name,text\ntrain/0.png,again\n")
    both = S.open_source("auto", tmp_path, split="all")
    assert [both.key(i) for i in range(2)] == ["test/0.png", "test/1.png"] and len(both) == 5
    with pytest.raises(I.Refused, match="duplicate_key"):
        both[3]


def test_an_image_folder_says_what_it_reads(tmp_path, files):
    """Images of several splits in one list, and images of a folder that has no list."""
    data = {"train/0.png": files["a.png"], "test/0.png": files["a.png"]}
    folder = write_folder(tmp_path / "one", data, captions=False)
    (folder / "metadata.csv").write_text("file_name,text\ntrain/0.png,a\ntest/0.png,b\n")
    source = S.open_source("auto", folder)
    assert len(source) == 2
    (note,) = source.notes
    assert "the images of train and test are all read; to keep one of these folders" in note
    (folder / "metadata.csv").rename(folder / "train" / "metadata.csv")
    (folder / "train" / "metadata.csv").write_text("file_name,text\n0.png,a\n")
    (note,) = S.open_source("auto", folder).notes
    assert "1 images are in no metadata.jsonl or metadata.csv or metadata.parquet and are not read" in note


def test_an_image_folder_with_metadata_in_parquet(tmp_path, files):
    for split in ("train", "test"):
        folder = write_folder(tmp_path / split, {"0.png": files["a.png"]}, captions=False)
        write_parquet(folder / "metadata.parquet", {"file_name": ["0.png"], "text": [split]})
    source = S.open_source("auto", tmp_path)
    assert source.kind == "imagefolder" and len(source) == 1 and len(source.notes) == 1
    assert source[0].key == "train/0.png" and source[0].read() == files["a.png"][0]
    assert source[0].captions[0].text == "train"
    (folder / "0.png").unlink()
    assert S.detect_kind(folder) == "parquet"


def test_a_folder_with_two_kinds_of_captions(tmp_path, files):
    folder = write_folder(tmp_path, {"0.png": files["a.png"]}, captions=False)
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "x"}\n')
    (folder / "README.txt").write_text("not a caption")
    assert S.detect_kind(folder) == "imagefolder"
    (folder / "0.TXT").write_text("a caption")
    with pytest.raises(UserError, match="set source=folder or source=imagefolder"):
        S.detect_kind(folder)
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match=r"has no metadata.jsonl or metadata.csv or metadata.parquet"):
        S.open_source("imagefolder", folder)


def test_a_number_that_python_cannot_parse_is_not_an_object():
    """Python parses integers of at most 4,300 digits."""
    assert parse_line(b'{"path": "a.jpg", "width": ' + b"1" * 5000 + b"}") is None


def test_no_bad_record_is_an_error(tmp_path):
    write_special_files(tmp_path)
    bad = bad_records({"prompt": "good", "path": "empty.png"})
    records = [{**record, "id": number} for number, (record, _) in enumerate(bad)]
    # Equal keys would be reported as such.
    for number, record in enumerate(records):
        if record["path"] == "empty.png" and number < len(records) - 1:
            record["path"] = f"{number}.png"
    source = open_list(tmp_path, records)
    reasons = {}
    for index in range(len(source)):
        with pytest.raises(I.Refused) as error:
            source[index].decode()
        record = source._record(int(source._positions[index])) or {"id": -1}
        reasons[record["id"]] = error.value.reason
        json.dumps(error.value.text, ensure_ascii=False).encode()
        assert len(error.value.text) < 700 and "\n" not in error.value.text
    # Python parses no number of more than 4,300 digits.
    assert reasons == {number: reason for number, (_, reason) in enumerate(bad)}
    for key in map(source.key, range(len(source))):
        assert len(key.encode()) < 2**16


def test_coco_with_bad_entries(tmp_path):
    path = tmp_path / "captions.json"
    images = [{"id": 7, "file_name": "7.jpg"}, 3, {"id": [1], "file_name": "1.jpg"}, {"id": 8}]
    images += [{"file_name": "9.jpg"}]
    good = {"image_id": 7, "caption": "one"}
    captions = [good, {"image_id": 99, "caption": "x"}, 5, {"image_id": [1], "caption": "x"}, {"image_id": 7}]
    captions += [{"image_id": None, "caption": "x"}]
    path.write_text(json.dumps({"images": images, "annotations": captions}))
    source = S.open_source("auto", path)
    assert len(source) == 5 and source.notes == (
        f"'{path}': 5 captions have no image and are not read, for example image_id '99'",
    )
    found = {}
    for index in range(5):
        try:
            found[source.key(index)] = [caption.text for caption in source[index].captions]
        except I.Refused as refused:
            found[source.key(index)] = refused.reason
    assert found == {
        "1.jpg": "missing_caption",
        "7.jpg": ["one"],
        "9.jpg": "missing_caption",
        "captions.json:2": "bad_record",
        "captions.json:4": "bad_record",
    }
    for entries in ({"images": {}, "annotations": [good]}, {"images": images[:1], "annotations": 5}):
        path.write_text(json.dumps(entries))
        with pytest.raises(UserError, match="as in COCO, but no field"):
            S.open_source("auto", path)
