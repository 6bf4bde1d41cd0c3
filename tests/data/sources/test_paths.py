from pixart_jax.data.sources.paths import expand_braces


def test_braces():
    assert expand_braces("s/{08..11}.tar") == ["s/08.tar", "s/09.tar", "s/10.tar", "s/11.tar"]
    assert expand_braces("{0..1}-{0..1}") == ["0-0", "0-1", "1-0", "1-1"]
    assert expand_braces("plain") == ["plain"]
