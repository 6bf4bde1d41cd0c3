import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pixart_jax.config import MeshConfig
from pixart_jax.errors import UserError
from pixart_jax.models import layers
from pixart_jax.models.attention import attention
from pixart_jax.models.layers import (
    REMAT_POLICIES,
    BackboneConfig,
    linear,
    modulate,
    position_table,
    sinusoid,
)
from pixart_jax.models.pixart import PixArt, PixArtConfig
from pixart_jax.training import sharding

TINY = PixArtConfig(size="custom", depth=3, hidden_size=24, num_heads=2, text_dim=8, text_length=5)


def inputs(batch=2):
    rng = np.random.default_rng(1)
    return (
        jnp.asarray(rng.normal(size=(batch, 4, 6, 4)), jnp.float32),
        jnp.asarray([3.0, 711.5][:batch]),
        jnp.asarray(rng.normal(size=(batch, 5, 8)), jnp.float32),
        jnp.asarray([[1, 1, 1, 1, 0], [1, 0, 0, 0, 0]][:batch]),
    )


@functools.cache
def compiled(config):
    graph, _ = nnx.split(nnx.eval_shape(lambda: PixArt(config, rngs=nnx.Rngs(0))))

    def loss(params):
        out = nnx.merge(graph, params)(*inputs())
        return jnp.square(out).mean(), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def run(config, params):
    """Output and gradient."""
    (_, out), gradient = compiled(config)(params)
    return out, gradient


def test_sinusoid_is_cosine_first():
    # The values of the official embedding at t = 999.
    features = np.asarray(sinusoid(jnp.asarray([999.0])))[0]
    np.testing.assert_allclose(features[:3], [0.99965, 0.96379, -0.39902], atol=1e-4)
    np.testing.assert_allclose(features[128:131], [-0.02646, -0.26668, -0.91694], atol=1e-4)


def test_positions_put_the_column_first_and_stretch_both_axes():
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


def test_modulate_normalises_then_scales_and_shifts():
    x = jnp.asarray([[[1.0, 3.0]]])
    out = modulate(x, shift=jnp.full((1, 1, 2), 10.0), scale=jnp.full((1, 1, 2), 1.0))
    np.testing.assert_allclose(out, [[[8.0, 12.0]]], atol=1e-5)


def test_modulate_keeps_statistics_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(200, 1, size=(1, 1, 64)), jnp.bfloat16)
    out = modulate(x, jnp.zeros((1, 1, 64)), jnp.zeros((1, 1, 64)))
    assert out.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean()) / exact.std()
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, atol=0.02)


def test_fused_projection_is_initialised_as_pytorch_stores_it():
    width = 120
    kernel = linear(width, (3, 4, 30), ("embed", None, "heads", None), rngs=nnx.Rngs(0)).kernel[...]
    bound = np.sqrt(6 / (width + 3 * width))
    assert 0.99 * bound < float(jnp.abs(kernel).max()) <= bound


def test_scanned_and_unrolled_blocks_are_the_same(random_params):
    _, params = random_params(TINY)
    scanned = run(TINY, params)
    unrolled = run(dataclasses.replace(TINY, scan_layers=False), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), scanned, unrolled)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_blocks_of_their_own_arrays_are_the_same(random_params, remat):
    """Bit for bit those that are unrolled from the stack, with routed tokens and without."""
    config = dataclasses.replace(TINY, scan_layers=False, remat=remat)
    stacked, separate = (nnx.merge(*random_params(config)) for _ in range(2))
    separate.blocks.unstack()
    assert len(separate.blocks.stacked) == config.depth
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 6, 24)), jnp.float32)
    conditions = jnp.ones((2, 6, 24)), jnp.asarray(rng.normal(size=(2, 5, 24))), jnp.asarray([5, 2])
    routes = None, layers.TokenRoute(jnp.asarray([[4, 0, 1], [2, 3, 5]]), 1, 2)
    for route in routes:
        outs = [
            jax.jit(lambda x, b=m.blocks, r=route: b(x, *conditions, route=r))(x) for m in (stacked, separate)
        ]
        np.testing.assert_array_equal(*outs)
    program = jax.make_jaxpr(jax.grad(lambda x: separate.blocks(x, *conditions).sum()))(x)
    assert ("remat" in str(program)) == (remat == "full")


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("remat", [name for name in REMAT_POLICIES if name != "none"])
def test_rematerialisation_changes_no_gradient(remat, scan_layers, random_params):
    _, params = random_params(TINY)
    plain = run(dataclasses.replace(TINY, scan_layers=scan_layers), params)
    again = run(dataclasses.replace(TINY, remat=remat, scan_layers=scan_layers), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, again)


def test_rematerialisation_is_in_the_program(random_params):
    _, params = random_params(TINY)

    def saved(remat):
        config = dataclasses.replace(TINY, remat=remat, scan_layers=False)
        graph, _ = nnx.split(nnx.eval_shape(lambda: PixArt(config, rngs=nnx.Rngs(0))))
        return str(jax.make_jaxpr(jax.grad(lambda p: nnx.merge(graph, p)(*inputs()).sum()))(params))

    assert "remat" not in saved("none")
    assert "remat" in saved("full")
    assert saved("save_attention") != saved("full")


@pytest.mark.parametrize("scan_layers", [True, False])
def test_routed_tokens_jump_over_blocks(random_params, scan_layers):
    """Kept tokens see each other alone in between; the others enter the last block as they were."""
    config = dataclasses.replace(TINY, scan_layers=scan_layers)
    graph, params = random_params(config)
    blocks = nnx.merge(graph, params).blocks
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 6, 24)), jnp.float32)
    conditions = jnp.ones((2, 6, 24)), jnp.asarray(rng.normal(size=(2, 5, 24))), jnp.asarray([5, 2])
    kept = jnp.asarray([[4, 0, 1], [2, 3, 5]])
    out = blocks(x, *conditions, route=layers.TokenRoute(kept, 1, 2))

    block_graph, stacked = nnx.split(blocks.stacked)
    each = [nnx.merge(block_graph, jax.tree.map(operator.itemgetter(i), stacked)) for i in range(3)]
    expected = np.array(each[0](x, *conditions))
    rows = np.arange(2)[:, None]
    expected[rows, kept] = each[1](expected[rows, kept], *conditions)
    expected = each[2](jnp.asarray(expected), *conditions)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_kernels_run_on_the_part_of_each_device(monkeypatch):
    """A fused kernel sees the rows and heads of its device alone, under the same mask as elsewhere."""
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
            out = jax.jit(functools.partial(layers._attend, key_lengths=one, implementation="splash"))(
                query, key, value
            )
        expected = attention(query, key, value, key_lengths=one)
        np.testing.assert_allclose(out, expected, atol=1e-6)
    assert seen == [((1, 6, 1, 8), (1, 5, 1, 8), (1,)), ((1, 6, 1, 8), (1, 5, 1, 8), None)]


def test_bfloat16_is_close_and_returns_float32(random_params):
    _, params = random_params(TINY)
    exact, _ = run(TINY, params)
    rough, gradient = run(dataclasses.replace(TINY, dtype="bfloat16"), params)
    assert rough.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))
    assert 0 < float(jnp.abs(rough - exact).max()) < 0.05 * float(jnp.abs(exact).max())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(size="XL/3"), "Did you mean 'XL/2'"),
        (dict(size="custom", num_heads=5), "does not divide into model.num_heads 5"),
        (dict(remat="ful"), "Did you mean 'full'"),
        (dict(dtype="float16"), "'float32' or 'bfloat16'"),
        (dict(size="custom", hidden_size=18, num_heads=2), "multiple of 4"),
        (dict(depth=0, size="custom"), "model.depth is 0"),
    ],
)
def test_bad_configs_say_what_to_do(change, message):
    with pytest.raises(UserError, match=message):
        BackboneConfig(**change)
