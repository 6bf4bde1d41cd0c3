import pytest

from pixart_jax.data.sources.options import parse_options, parse_part
from pixart_jax.errors import UserError


@pytest.mark.parametrize("text", ["", "1", "1/1", "3/2", "-1/2", "a/b", "0/0", "0/"])
def test_part(text):
    assert parse_part("2/5") == (2, 5)
    with pytest.raises(UserError, match=f"--shard is '{text}': it must be i/n with 0 <= i < n"):
        parse_part(text)


def test_options():
    assert parse_options(["image_root=/a=b", "key_field=id"]) == {"image_root": "/a=b", "key_field": "id"}
    with pytest.raises(UserError, match="--source_option is 'image_root': it must be NAME=VALUE"):
        parse_options(["image_root"])
