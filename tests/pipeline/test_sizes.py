import pytest

from pixart_jax.errors import UserError
from pixart_jax.pipeline.sizes import MAX_PIXELS, Size, choose_size


def test_buckets_and_the_way_back():
    def size(*args, base=512, **kwargs):
        return choose_size(*args, base=base, step=16, **kwargs)

    assert size(None, None) == Size(512, 512, 512, 512)
    assert size(300, 600) == Size(352, 704, 300, 600)
    assert size(None, 700) == Size(416, 576, 512, 700)
    assert size(512, 512, base=1024) == Size(1024, 1024, 512, 512)
    assert size(304, 608, binning=False) == Size(304, 608, 304, 608)
    assert size(None, None, "16:9", base=1024) == Size(768, 1344, 768, 1344)
    assert size(None, None, "2.39:1")[0] < 512
    assert size(None, None, "16:9", base=2880) == Size(2112, 3840, 2112, 3840)
    assert size(1000, 3000, base=2880)[:2] == (1600, 4800)
    assert size(None, None, base=2048) == Size(2048, 2048, 2048, 2048)
    assert size(None, None, "16:9", base=2048) == Size(1536, 2688, 1536, 2688)
    # At 2048 px, the tables of diffusers are complete.
    assert size(1100, 4000, base=2048) == Size(1024, 3840, 1100, 4000)
    # Only the official tables have the key 0.27.
    assert size(270, 1000, bins="official").height == 256
    assert size(270, 1000, bins="official").width == 960 and size(270, 1000).width != 960


def test_models_without_buckets_draw_any_size():
    def size(*args, **kwargs):
        return choose_size(*args, base=64, step=16, **kwargs)

    assert size(48, 112) == Size(48, 112, 48, 112)
    assert size(None, None, "2:1") == Size(48, 96, 48, 96)
    with pytest.raises(UserError, match="height is 60 px: it must be a multiple of 16, such as 48 or 64"):
        size(60, None)


@pytest.mark.parametrize("ratio", ["16x9", "0:1", "1:0", "", "1000:1", "-1:1"])
def test_ratios_that_are_none(ratio):
    with pytest.raises(UserError, match="give WIDTH:HEIGHT"):
        choose_size(None, None, ratio, base=512, step=16)


def test_sizes_that_are_none():
    with pytest.raises(UserError, match="width is -3: it must be at least 1"):
        choose_size(None, -3, base=512, step=16)
    with pytest.raises(UserError, match="together with height or width"):
        choose_size(512, None, "1:1", base=512, step=16)


def test_an_image_that_could_not_be_opened_again_raises():
    """`sample` was killed by the operating system when it resized such an image."""
    with pytest.raises(UserError, match=r"^100000x100000 px .* are 10,000,000,000 pixels: an image may"):
        choose_size(100_000, 100_000, base=1024, step=16)
    with pytest.raises(UserError, match="pixels: an image may have"):
        choose_size(16_000, 12_800, base=48, step=16, binning=False)
    assert choose_size(13_376, 13_376, base=1024, step=16).out_height == 13_376
    assert 13_376**2 <= MAX_PIXELS < 13_392**2
