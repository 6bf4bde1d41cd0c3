import pytest

from pixart_jax.data.sources.paths import expand_braces, split_of


def test_braces():
    assert expand_braces("s/{08..11}.tar") == ["s/08.tar", "s/09.tar", "s/10.tar", "s/11.tar"]
    assert expand_braces("{0..1}-{0..1}") == ["0-0", "0-1", "1-0", "1-1"]
    assert expand_braces("plain") == ["plain"]


@pytest.mark.parametrize(
    "name, split",
    [
        ("train-00000-of-00002.parquet", "train"),
        ("data/TEST.parquet", "test"),
        ("my_val_0.tar", "validation"),
        ("dev/part-0.parquet", "validation"),
        ("train/test-shots.parquet", "train"),
        ("trains-0.parquet", ""),
        ("contest.parquet", ""),
        ("part-0.parquet", ""),
    ],
)
def test_split_of_a_file(name, split):
    assert split_of(name) == split
