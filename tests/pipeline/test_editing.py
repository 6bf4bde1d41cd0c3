import numpy as np
import pytest
import tiny
from PIL import Image

from pixart_jax.errors import UserError
from pixart_jax.pipeline.editing import latent_mask, read_mask, resize_back

OPTIONS = dict(steps=5, output="latents")


@pytest.fixture(scope="module")
def pipe(random_params):
    return tiny.make_pipe(random_params)


@pytest.fixture(scope="module")
def picture():
    rows, columns = np.mgrid[: tiny.SIDE, : tiny.SIDE].astype(np.uint8)
    return np.stack([rows * 8, columns * 8, 255 - rows * 8], axis=2)


def test_an_image_to_start_from(pipe, picture):
    clean = picture / 127.5 - 1
    distance = [
        np.abs(pipe("a corgi", image=picture, strength=strength, **OPTIONS)[0] - clean).mean()
        for strength in (0.2, 0.6, 1.0)
    ]
    assert distance[0] < distance[1] < distance[2]
    np.testing.assert_array_equal(
        pipe("a corgi", image=picture, **OPTIONS), pipe("a corgi", image=picture, strength=0.8, **OPTIONS)
    )


def test_inpainting_keeps_what_is_masked_out(pipe, picture, tmp_path):
    mask = np.zeros((tiny.SIDE, tiny.SIDE), bool)
    mask[8:20, 4:30] = True
    drawn = pipe(["a corgi", "a fox"], image=picture, mask=mask, **OPTIONS)
    clean = (picture / np.float32(127.5) - 1).astype(np.float32)
    for image in drawn:
        np.testing.assert_allclose(image[~mask], clean[~mask], rtol=0, atol=1e-6)
        assert np.abs(image[mask] - clean[mask]).mean() > 0.1
    assert not np.array_equal(*drawn)
    # Files give the same result, and the pixels outside the mask are exactly those of the picture.
    Image.fromarray(picture).save(tmp_path / "picture.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    files = dict(image=str(tmp_path / "picture.png"), mask=tmp_path / "mask.png")
    images, latents = pipe("a corgi", **files, steps=5, output="both")
    np.testing.assert_array_equal(latents[0], drawn[0])
    np.testing.assert_array_equal(images[0][~mask], picture[~mask])
    # So do PIL images, which are turned upright as files are.
    turned = Image.open(tmp_path / "picture.png").transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[274] = 6  # to be turned by 270 degrees
    opened = dict(image=turned, mask=Image.fromarray(mask))
    np.testing.assert_array_equal(pipe("a corgi", **opened, **OPTIONS)[0], drawn[0])
    # At full strength, the original pixels inside the mask have no influence.
    other = picture.copy()
    other[mask] = 17
    np.testing.assert_array_equal(pipe("a corgi", image=other, mask=mask, **OPTIONS)[0], drawn[0])
    assert not np.array_equal(pipe("a corgi", image=other, mask=mask, strength=0.4, **OPTIONS)[0], drawn[0])


def test_masks(tmp_path):
    mask = np.zeros((16, 16), np.uint8)
    mask[3, 4] = 200
    assert latent_mask(mask, 16, 16, 8)[:, :, 0].tolist() == [[1, 0], [0, 0]]
    assert read_mask(mask).sum() == read_mask(mask / 255).sum() == read_mask(mask > 0).sum() == 1
    with pytest.raises(UserError, match=r"mask is \[16\]"):
        read_mask(mask[0])
    with pytest.raises(UserError, match="mask is float64, or NaN or infinite somewhere"):
        read_mask(np.full((16, 16), np.nan))


def test_input_errors(pipe, picture, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-1000])
    for kwargs, message in (
        (dict(mask=picture[:, :, 0]), "mask is given without image"),
        (dict(strength=0.5), "there is no image to start from"),
        (dict(image=picture.astype(np.float32)), "image is float32"),
        (dict(image=str(tmp_path / "text.png")), "cannot be read"),
        (dict(image=str(tmp_path / "none.png")), "cannot be read"),
        (dict(image=Image.fromarray(picture).convert("F")), r"image cannot be read \(PIL image of mode F"),
        (dict(image=Image.new("RGB", (0, 5))), "image is 0x5 px: give one that has pixels"),
        (
            dict(image=Image.open(tmp_path / "cut.png")),
            "image cannot be read .PNG image",
        ),
        (dict(image=picture.tolist()), "image has 32 entries for 1 prompts"),
        (dict(image=[picture, picture]), "image has 2 entries for 1 prompts"),
        (dict(image=picture, mask=np.ones((4, 4))), r"mask is \[4, 4\] and its image \[32, 32\]"),
        (dict(image=picture, strength=0.1), "leaves none"),
    ):
        with pytest.raises(UserError, match=message):
            pipe("a corgi", steps=4, **kwargs)


def test_the_way_back_to_the_wished_size(picture):
    images = np.stack([picture, picture[::-1]])
    assert resize_back(images, 32, 32) is images
    assert resize_back(images, 20, 50).shape == (2, 20, 50, 3)
    assert resize_back(images[..., :1], 64, 64).shape == (2, 64, 64, 1)
