import json

import pytest
from source_files import open_list, write_tar

from pixart_jax.data import captions as C
from pixart_jax.data import images as I
from pixart_jax.data import sources as S
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
        ("list.jsonl:11", "bad_record"),
        ("list.jsonl:2", "bad_record"),
        ("list.jsonl:3", "bad_record"),
        ("list.jsonl:4", "outside_root"),
        ("list.jsonl:5", "outside_root"),
        ("list.jsonl:6", "outside_root"),
        ("list.jsonl:7", "outside_root"),
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
