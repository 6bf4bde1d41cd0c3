from pathlib import Path

import pytest
from source_files import crops

from pixart_jax.data.captions import Caption
from pixart_jax.data.images import Refused
from pixart_jax.data.sources.base import Example, FileSlice, class_label, integer


def test_bytes_inside_a_file(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"0123456789")
    assert FileSlice(path, 3, 4).read() == Example("k", FileSlice(path, 3, 4)).read() == b"3456"
    with pytest.raises(Refused, match=r"unreadable.*ends inside the 4 bytes at 8"):
        FileSlice(path, 8, 4).read()
    with pytest.raises(Refused, match=r"unreadable.*is a folder"):
        FileSlice(tmp_path, 0, 1).read()
    path.unlink()
    with pytest.raises(Refused, match=r"missing_image.*no file"):
        FileSlice(path, 3, 4).read()


@pytest.mark.parametrize(
    "value, number",
    [("7", 7), (7.0, 7), (2, 2), (1, None), ("x", None), (None, None), (True, None), (float("inf"), None)],
)
def test_integer(value, number):
    assert integer(value, 2) == number


def test_the_size_of_a_part_of_a_file(tmp_path, monkeypatch):
    data = crops()["a.png"][0]
    (tmp_path / "f").write_bytes(b"before" + data + b"after")
    example = Example("k", FileSlice(tmp_path / "f", 6, len(data)))
    assert example.read() == data
    monkeypatch.setattr(FileSlice, "read", lambda _: pytest.fail("reads the whole image"))
    assert example.size() == (40, 60)
    with pytest.raises(Refused, match="missing_image"):
        Example("k", FileSlice(tmp_path / "absent", 6, 10)).size()


@pytest.mark.parametrize(
    "value, label",
    [
        *[(7, 7), ("7", 7), (b"7\n", 7), (7.0, 7), ("7.0", 7), (2**31 - 1, 2**31 - 1), (0, 0)],
        *((value, None) for value in (None, -1, "-1", True, float("nan"), "cat", b"cat", [7], {})),
        *((value, Refused) for value in (-2, 2**31, 1.5, "1.5", 10**400, float("inf"), "inf", b"9" * 5000)),
    ],
)
def test_class_label(value, label):
    if label is Refused:
        with pytest.raises(Refused, match=r"bad_record: label is .*: it must be a whole number from 0"):
            class_label(value)
    else:
        assert class_label(value) == label


def test_what_a_record_cannot_store_is_skipped():
    Example("k" * 65_535, b"", (Caption("a"),) * 1000)
    for key, captions in (
        ("k" * 65_536, ()),
        ("é" * 40_000, ()),
        ("a\0b", ()),
        ("k", (Caption("a"),) * 1001),
    ):
        with pytest.raises(Refused):
            Example(key, b"", captions)
    with pytest.raises(Refused, match="too_large"):
        FileSlice(Path("absent"), 0, 2**40).read()
