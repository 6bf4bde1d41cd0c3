import base64
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from source_files import write_parquet

from pixart_jax.data import captions as C
from pixart_jax.data import images as I
from pixart_jax.data import sources as S
from pixart_jax.errors import UserError


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


def test_parquet_input_errors(tmp_path, files):
    write_parquet(tmp_path / "a.parquet", {"image": [b"x"], "text": ["t"]})
    with pytest.raises(UserError, match="Did you mean 'image'"):
        S.open_source("parquet", tmp_path, image_field="imag")
    write_parquet(tmp_path / "b.parquet", {"image": [b"x"]})
    with pytest.raises(UserError, match=r"b.parquet.*no column 'text'"):
        S.open_source("parquet", tmp_path)


def keys_of(source):
    return [source.key(i) for i in range(len(source))]


def test_images_in_base64(tmp_path, files):
    data = files["a.png"][0]
    text = base64.b64encode(data).decode()
    table = {
        "image": [text, None, f"data:image/png;base64,{text}", "A" * 3000, text[:800]],
        "text": ["t"] * 5,
    }
    source = S.open_source("auto", write_parquet(tmp_path / "t.parquet", table))
    assert keys_of(source) == [f"t.parquet/{i:08d}" for i in range(5)]
    assert source[0].read() == source[2].read() == data
    for i, reason in [(1, "missing_image"), (3, "bad_record")]:
        with pytest.raises(I.Refused, match=reason) as refused:
            source[i]
        assert len(str(refused.value)) < 320
    with pytest.raises(I.Refused, match="broken"):
        source[4].decode()
    # As bytes, in a table that begins with paths.
    write_parquet(tmp_path / "b.parquet", {"image": [text.encode(), data], "text": ["t"] * 2})
    assert [S.open_source("parquet", tmp_path / "b.parquet")[i].read() for i in range(2)] == [data, data]
    (tmp_path / "x.png").write_bytes(data)
    mixed = {"image": ["x.png"] * 150 + [text], "text": ["t"] * 151}
    source = S.open_source("parquet", write_parquet(tmp_path / "m.parquet", mixed))
    assert (source.key(0), source.key(150)) == ("x.png", "m.parquet/00000150") and source[150].read() == data


def test_lists_of_images(tmp_path, files):
    png, jpg = files["a.png"][0], files["a.jpg"][0]
    rows = [[{"bytes": png, "path": None}], [{"bytes": png, "path": None}, {"bytes": jpg, "path": None}], []]
    path = write_parquet(tmp_path / "t.parquet", {"images": rows, "text": ["t"] * 3})
    source = S.open_source("auto", path)
    assert source[0].read() == png
    for i, words in [
        (1, r"column 'images' has 2 images; choose one with .*image_index=0"),
        (2, "missing_image"),
    ]:
        with pytest.raises(I.Refused, match=words):
            source[i]
    second = S.open_source("auto", path, image_index="1")
    assert second[1].read() == jpg
    with pytest.raises(I.Refused, match=r"missing_image.*has 1 images"):
        second[0]


def test_splits(tmp_path):
    columns = {"image": [b"x"], "text": ["t"]}
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001", "validation"):
        write_parquet(tmp_path / f"{name}.parquet", columns)
    source = S.open_source("auto", tmp_path)
    train = ["train-00000-of-00002.parquet/00000000", "train-00001-of-00002.parquet/00000000"]
    assert keys_of(source) == train
    assert "2 of 4 files are read, without those of the split test, validation" in source.notes[0]
    assert keys_of(S.open_source("auto", tmp_path, split="val")) == ["validation.parquet/00000000"]
    assert len(S.open_source("auto", tmp_path, split="all")) == 4
    # A pattern chooses files, and then there is nothing to say.
    source = S.open_source("parquet", tmp_path / "te*.parquet")
    assert (len(source), source.notes) == (1, ())
    with pytest.raises(UserError, match="Did you mean 'train'"):
        S.open_source("auto", tmp_path, split="trian")
    for path in tmp_path.glob("train*"):
        path.unlink()
    with pytest.raises(UserError, match="has the splits test and validation; choose one"):
        S.open_source("auto", tmp_path)
    with pytest.raises(UserError, match=r"split is 'train': .* has only test, validation"):
        S.open_source("auto", tmp_path, split="train")


def test_bad_cells_are_skipped(tmp_path, files):
    pa = pytest.importorskip("pyarrow")
    png = files["a.png"][0]

    def reasons(columns, **options):
        source = S.open_source("parquet", write_parquet(tmp_path / "t.parquet", columns), **options)
        found = []
        for index in range(len(source)):
            assert len(source.key(index)) < 100 or "key_field" in options
            try:
                found.append(source[index].captions[0].text)
            except I.Refused as refused:
                found.append(refused.reason)
        return found

    # A text column whose bytes are not UTF-8, which Arrow does not check.
    wrong = pa.Array.from_buffers(
        pa.string(), 2, pa.array([b"\xff\xfe", b"ok"], pa.binary()).buffers(), null_count=0
    )
    assert reasons({"image": [png, png], "caption": wrong}) == ["bad_record", "ok"]
    assert reasons({"image": [png, png], "caption": ["a", "b"], "id": wrong}, key_field="id")[1] == "b"
    assert reasons({"image": wrong, "caption": ["a", "b"]})[0] == "bad_record"
    assert reasons({"image": [1, 2], "caption": ["a", "b"]}) == ["missing_image"] * 2
    assert reasons({"image": [png, png], "caption": [1, 2]}) == ["bad_caption"] * 2
    times = pa.array([2**62, 0], pa.timestamp("us"))
    assert reasons({"image": [png, png], "caption": times}) == ["bad_record", "bad_caption"]
    labels = pa.array([2.0**31, 3.0], pa.float64())
    columns = {"image": [png, png], "caption": ["a", "b"], "label": labels}
    assert reasons(columns, label_field="label") == ["bad_record", "b"]
    names = ["n" * 70_000, "a\0b"]
    columns = {"image": [png, png], "caption": ["a", "b"], "id": names}
    assert reasons(columns, key_field="id") == ["bad_record"] * 2
