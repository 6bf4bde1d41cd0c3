import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pixart_jax.config import MeshConfig
from pixart_jax.errors import UserError
from pixart_jax.models import layers
from pixart_jax.models.attention import Choice, attention
from pixart_jax.models.configs import PixArtConfig
from pixart_jax.models.layers import (
    linear,
    position_table,
    sinusoid,
)
from pixart_jax.training import sharding


def test_sinusoid_is_cosine_first():
    # Values of the official embedding at t = 999.
    features = np.asarray(sinusoid(jnp.asarray([999.0])))[0]
    np.testing.assert_allclose(features[:3], [0.99965, 0.96379, -0.39902], atol=1e-4)
    np.testing.assert_allclose(features[128:131], [-0.02646, -0.26668, -0.91694], atol=1e-4)


def test_positions_encode_the_column_first_and_span_the_same_range_on_both_axes():
    table = position_table(2, 4, 8, base_size=4, position_scale=2.0).reshape(2, 4, 8)
    # Column 3 of 4 is at 3 / (4/4) / 2 = 1.5, row 1 of 2 at 1 / (2/4) / 2 = 1.
    expected = [np.sin(1.5), np.sin(0.015), np.cos(1.5), np.cos(0.015)]
    np.testing.assert_allclose(table[1, 3, :4], expected, atol=1e-6)
    np.testing.assert_allclose(table[1, 3, 4:], [np.sin(1), np.sin(0.01), np.cos(1), np.cos(0.01)], atol=1e-6)


def test_patches_are_rows_of_pixels_with_channels_last():
    latents = jnp.arange(2 * 4 * 2).reshape(1, 2, 4, 2)
    patches = layers.patchify(latents, 2)
    np.testing.assert_array_equal(patches[0, 0], [0, 1, 2, 3, 8, 9, 10, 11])
    np.testing.assert_array_equal(layers.unpatchify(patches, 2, 4, 2), latents)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("out_shape", [(3, 4, 5), (4, 5)])
def test_heads_are_the_slices_of_a_single_product(out_shape, separate):
    parts = out_shape[0] if len(out_shape) == 3 else 1
    layer = linear(6, out_shape, (None,) * (1 + len(out_shape)), matrices=parts, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    layer.bias[...] = jnp.asarray(rng.normal(size=out_shape), jnp.float32)
    x = jnp.asarray(rng.normal(size=(2, 7, 6)), jnp.float32)
    whole = jnp.tensordot(x, layer.kernel[...], 1) + layer.bias[...]
    expected = [whole] if parts == 1 else list(jnp.moveaxis(whole, 2, 0))
    found = layer.heads(x, separate=separate)
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_fused_projection_is_initialized_as_a_single_matrix():
    width = 120
    kernel = linear(width, (3, 4, 30), ("embed", None, "heads", None), rngs=nnx.Rngs(0)).kernel[...]
    bound = np.sqrt(6 / (width + 3 * width))
    assert 0.99 * bound < float(jnp.abs(kernel).max()) <= bound


def test_kernels_run_on_the_shard_of_each_device(monkeypatch):
    """A fused kernel sees only the samples and heads of its device, and the result is the same."""
    seen = []

    def kernel(query, key, value, *, key_lengths, implementation):
        seen.append((query.shape, key.shape, None if key_lengths is None else key_lengths.shape))
        return attention(query, key, value, key_lengths=key_lengths)

    monkeypatch.setattr(layers, "attention", kernel)
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.normal(size=(4, 6, 2, 8)), jnp.float32)
    key, value = jnp.asarray(rng.normal(size=(2, 4, 5, 2, 8)), jnp.float32)
    lengths = jnp.asarray([1, 5, 3, 2])
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    for one in (lengths, None):
        with layers.activation_sharding(sharding.activation_rule(mesh)):
            out = jax.jit(functools.partial(layers._attend, key_lengths=one, choice=Choice("splash", "")))(
                query, key, value
            )
        expected = attention(query, key, value, key_lengths=one)
        np.testing.assert_allclose(out, expected, atol=1e-6)
    assert seen == [((1, 6, 1, 8), (1, 5, 1, 8), (1,)), ((1, 6, 1, 8), (1, 5, 1, 8), None)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(size="XL/3"), "Did you mean 'XL/2'"),
        (dict(size="custom", num_heads=5), "does not divide into model.num_heads 5"),
        (dict(remat="ful"), "Did you mean 'full'"),
        (dict(dtype="bfloat61"), "float32, bfloat16, float16.*Did you mean 'bfloat16'"),
        (dict(size="custom", hidden_size=18, num_heads=2), "multiple of 4"),
        (dict(depth=-1, size="custom"), "model.depth is -1"),
        (dict(size="B/2", depth=3), "model.depth is 3, but the size B/2 has 12: leave it out"),
    ],
)
def test_invalid_configs_raise_with_a_fix(change, message):
    with pytest.raises(UserError, match=message):
        PixArtConfig(**change)
