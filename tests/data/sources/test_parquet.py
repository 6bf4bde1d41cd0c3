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
