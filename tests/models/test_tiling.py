import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import repeat

from pixart_jax.errors import UserError
from pixart_jax.models.tiling import decode_in_tiles


def random(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def doubled(latents):
    return repeat(latents, "b h w c -> b (h p) (w q) c", p=2, q=2)


def test_tiles_fade_into_each_other():
    """Each tile is painted with its first row number, so that the result shows which tile counts how much."""
    rows = jnp.arange(10.0).reshape(1, 10, 1, 1)
    image = decode_in_tiles(lambda z: jnp.broadcast_to(z[:, :1], z.shape), rows, tile=4, overlap=2)
    # Tiles of 4 begin at rows 0, 2, 4 and 6.
    fades = [[a, a, 0.75 * a + 0.25 * (a + 2), 0.25 * a + 0.75 * (a + 2)] for a in (0, 2, 4)]
    expected = [0, 0, *fades[0][2:], *fades[1][2:], *fades[2][2:], 6, 6]
    np.testing.assert_allclose(image.ravel(), expected, atol=1e-6)


@pytest.mark.parametrize("size, tile, overlap", [(10, 4, 2), (13, 5, 1), (12, 4, 0), (65, 64, 16), (9, 8, 7)])
def test_tiles_of_a_local_decoder_are_the_whole_image(size, tile, overlap):
    latents = random(2, size, 7, 3)
    image = jax.jit(lambda z: decode_in_tiles(doubled, z, tile, overlap))(latents)
    assert image.shape == (2, 2 * size, 14, 3)
    np.testing.assert_allclose(image, doubled(latents), atol=1e-6)


def test_latents_of_one_tile_are_decoded_at_once():
    latents = random(1, 6, 5, 2)
    # The mean over all positions would differ between tiles.
    image = decode_in_tiles(lambda z: z - z.mean(), latents, tile=6, overlap=2)
    np.testing.assert_allclose(image, latents - latents.mean(), atol=1e-6)


def test_tiles_are_exact_away_from_their_seams():
    kernels = [random(3, 3, 2, 2), random(3, 3, 2, 2)]

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def decode(latents):
        return convolve(doubled(convolve(latents, kernels[0])), kernels[1])

    latents = random(1, 8, 8, 2)
    whole = decode(latents)
    # Tiles begin at 0 and 2. A pixel depends on less than 2 latent positions around it. Pixels that only one
    # tile covers (positions 0, 1 and 6, 7) therefore do not depend on the inner edge of that tile.
    difference = np.abs(decode_in_tiles(decode, latents, tile=6, overlap=4) - whole)
    alone = np.r_[0:4, 12:16]
    scale = np.abs(whole).max()
    assert difference[:, alone][:, :, alone].max() < 1e-5 * scale
    # At the seams the images differ, which shows that the comparison above can fail.
    assert difference.max() > 1e-3 * scale


@pytest.mark.parametrize("overlap", [-1, 8])
def test_the_overlap_must_be_less_than_a_tile(overlap):
    with pytest.raises(UserError, match=f"overlap {overlap}: the overlap must be in"):
        decode_in_tiles(doubled, random(1, 9, 9, 1), tile=8, overlap=overlap)
