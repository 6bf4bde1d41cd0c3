import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pixart_jax.models.attention import target_platform
from pixart_jax.models.blocks import TokenRoute, is_scanned
from pixart_jax.models.configs import PixArtConfig
from pixart_jax.models.layers import REMAT_POLICIES
from pixart_jax.models.pixart import PixArt

TINY = PixArtConfig(size="custom", depth=3, hidden_size=24, num_heads=2, text_dim=8, text_length=5)
# Runs of one block: compressed, not, compressed.
SIGMA = dataclasses.replace(TINY, qk_norm=True, kv_compression="conv", kv_compression_layers="0,2")


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
    """Returns output and gradient."""
    (_, out), gradient = compiled(config)(params)
    return out, gradient


def test_scanned_and_unrolled_blocks_give_the_same_result(random_params):
    _, params = random_params(SIGMA)
    scanned = run(SIGMA, params)
    unrolled = run(dataclasses.replace(SIGMA, scan_layers=False), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), scanned, unrolled)


def test_blocks_are_unrolled_on_gpus_unless_the_config_says_otherwise():
    chosen = {}
    for platform in ("cpu", "gpu", "tpu"):
        with target_platform(platform):
            chosen[platform] = [
                is_scanned(dataclasses.replace(TINY, scan_layers=given)) for given in (None, True, False)
            ]
    assert chosen == {
        "cpu": [True, True, False],
        "gpu": [False, True, False],
        "tpu": [True, True, False],
    }


@pytest.mark.parametrize("remat", ["none", "full"])
def test_unstacked_blocks_give_the_same_result(random_params, remat):
    """They match unrolled stacked blocks, with and without token routing: bit for bit without remat."""
    config = dataclasses.replace(SIGMA, scan_layers=False, remat=remat)
    stacked, separate = (nnx.merge(*random_params(config)) for _ in range(2))
    separate.blocks.unstack()
    assert len(separate.blocks.stacked) == config.depth and len(separate.blocks.compression) == 2
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 6, 24)), jnp.float32)
    conditions = jnp.ones((2, 6, 24)), jnp.asarray(rng.normal(size=(2, 5, 24))), jnp.asarray([5, 2])
    routes = None, TokenRoute(jnp.asarray([[4, 0, 1], [2, 3, 5]]), 1, 2)
    for route in routes:
        outs = [
            jax.jit(lambda x, b=m.blocks, r=route: b(x, *conditions, route=r, grid=(2, 3)))(x)
            for m in (stacked, separate)
        ]
        np.testing.assert_allclose(
            *outs, rtol=0 if remat == "none" else 1e-5, atol=0 if remat == "none" else 1e-5
        )
    program = jax.make_jaxpr(jax.grad(lambda x: separate.blocks(x, *conditions, grid=(2, 3)).sum()))(x)
    assert ("remat" in str(program)) == (remat == "full")


# Unrolled blocks treat all policies alike.
@pytest.mark.parametrize(
    ("remat", "scan_layers"), [*((name, True) for name in REMAT_POLICIES if name != "none"), ("dots", False)]
)
def test_rematerialization_does_not_change_the_gradient(remat, scan_layers, random_params):
    _, params = random_params(SIGMA)
    plain = run(dataclasses.replace(SIGMA, scan_layers=scan_layers), params)
    again = run(dataclasses.replace(SIGMA, remat=remat, scan_layers=scan_layers), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, again)


def test_rematerialization_is_in_the_program(random_params):
    _, params = random_params(TINY)

    def saved(remat):
        config = dataclasses.replace(TINY, remat=remat, scan_layers=False)
        graph, _ = nnx.split(nnx.eval_shape(lambda: PixArt(config, rngs=nnx.Rngs(0))))
        return str(jax.make_jaxpr(jax.grad(lambda p: nnx.merge(graph, p)(*inputs()).sum()))(params))

    assert "remat" not in saved("none")
    assert "remat" in saved("full")
    assert saved("save_attention") != saved("full")


def test_unrolled_blocks_keep_the_stack_instead_of_copies_of_their_weights(random_params, capsys):
    """What the backward pass needs contains the stack of kernels, and no kernel of a single block."""
    config = dataclasses.replace(SIGMA, remat="full", scan_layers=False)
    graph, params = random_params(config)
    jax.ad_checkpoint.print_saved_residuals(lambda p: nnx.merge(graph, p)(*inputs()).sum(), params)
    saved = capsys.readouterr().out
    assert "f32[3,24,96]" in saved and "f32[24,96]" not in saved


@pytest.mark.parametrize("scan_layers", [True, False])
def test_routed_tokens_skip_blocks(random_params, scan_layers):
    """In block 1 the kept tokens see only each other; the others enter block 2 as they left block 0."""
    config = dataclasses.replace(TINY, scan_layers=scan_layers)
    graph, params = random_params(config)
    blocks = nnx.merge(graph, params).blocks
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 6, 24)), jnp.float32)
    conditions = jnp.ones((2, 6, 24)), jnp.asarray(rng.normal(size=(2, 5, 24))), jnp.asarray([5, 2])
    kept = jnp.asarray([[4, 0, 1], [2, 3, 5]])
    out = blocks(x, *conditions, route=TokenRoute(kept, 1, 2))

    block_graph, stacked = nnx.split(blocks.stacked)
    each = [nnx.merge(block_graph, jax.tree.map(operator.itemgetter(i), stacked)) for i in range(3)]
    expected = np.array(each[0](x, *conditions))
    rows = np.arange(2)[:, None]
    expected[rows, kept] = each[1](expected[rows, kept], *conditions)
    expected = each[2](jnp.asarray(expected), *conditions)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_close_and_returns_float32(random_params):
    _, params = random_params(TINY)
    exact, _ = run(TINY, params)
    rough, gradient = run(dataclasses.replace(TINY, dtype="bfloat16"), params)
    assert rough.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))
    assert 0 < float(jnp.abs(rough - exact).max()) < 0.05 * float(jnp.abs(exact).max())


@pytest.mark.parametrize(("scan_layers", "remat"), [(True, "none"), (False, "dots")])
def test_the_tokens_after_a_block_are_those_of_a_network_that_ends_there(random_params, scan_layers, remat):
    config = dataclasses.replace(TINY, depth=2, scan_layers=scan_layers, remat=remat)
    graph, params = random_params(config)
    shallow, _ = random_params(dataclasses.replace(config, depth=1))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 6, 24)), jnp.float32)
    conditions = jnp.ones((2, 6, 24)), jnp.asarray(rng.normal(size=(2, 5, 24))), jnp.asarray([5, 2])
    route = TokenRoute(jnp.asarray([[4, 0, 1], [2, 3, 5]]), 1, 2)

    @jax.jit
    def compute(params):
        blocks = nnx.merge(graph, params).blocks
        first = {**params, "blocks": jax.tree.map(lambda leaf: leaf[:1], params["blocks"])}
        return (
            nnx.merge(shallow, first).blocks(x, *conditions),
            blocks(x, *conditions),
            blocks(x, *conditions, tap=1),
            blocks(x, *conditions, tap=2),
            blocks(x, *conditions, route=route, tap=1),
            blocks(x, *conditions, route=route, tap=2),
        )

    expected, plain, (whole, after), (last, end), (_, before), (routed, kept) = compute(params)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    for each in (after, before):
        close(each, expected)
    for each in (whole, last, end):
        close(each, plain)
    # Routed blocks return the kept tokens.
    close(kept, np.take_along_axis(np.asarray(routed), np.asarray(route.kept)[:, :, None], axis=1))
