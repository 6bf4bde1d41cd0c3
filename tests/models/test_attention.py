import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax.errors import UserError
from pixart_jax.models.attention import (
    IMPLEMENTATIONS,
    attention,
    check_implementation,
    compact_keys,
    splash_attention,
    target_platform,
)


def reference(query, key, value, mask):
    """Attention in float64, by loops over what the mask keeps."""
    out = np.zeros(query.shape)
    for b in range(query.shape[0]):
        kept = np.flatnonzero(mask[b])
        for h in range(query.shape[2]):
            logits = query[b, :, h] @ key[b, kept, h].T / np.sqrt(query.shape[3])
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            out[b, :, h] = weights / weights.sum(axis=1, keepdims=True) @ value[b, kept, h]
    return out


@pytest.fixture
def ragged():
    rng = np.random.default_rng(0)
    query = rng.normal(size=(3, 5, 2, 8))
    key, value = rng.normal(size=(2, 3, 7, 2, 8))
    mask = np.array([[1, 1, 1, 0, 0, 0, 0], [1] * 7, [0, 1, 0, 0, 1, 0, 1]], bool)
    return query, key, value, mask


def run(implementation, *arguments, key_lengths):
    if implementation == "splash":
        # The kernel is written for TPUs; here its program is interpreted.
        return splash_attention(*arguments, key_lengths, interpret=True)
    return attention(*arguments, key_lengths=key_lengths, implementation=implementation)


def can_run(implementation):
    return implementation != "cudnn" or jax.default_backend() == "gpu"


def test_backward_pass_keeps_the_probabilities_alone():
    query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 10, 3, 4))
    _, pullback = jax.vjp(attention, query, key, value)
    tables = [leaf for leaf in jax.tree.leaves(pullback) if leaf.size == 2 * 3 * 10 * 10]
    assert len(tables) == 1


@pytest.mark.parametrize("implementation", list(filter(can_run, IMPLEMENTATIONS)))
def test_any_mask_becomes_a_length(ragged, implementation):
    """Output and gradients, against loops over what the mask keeps."""
    query, key, value, mask = ragged
    if implementation == "cudnn":
        query, key, value = (x.astype(jnp.bfloat16) for x in (query, key, value))

    def out(query, key, value):
        pair = jnp.concatenate([key, value], axis=-1)
        compacted, lengths = compact_keys(pair.reshape(3, 7, -1), jnp.asarray(mask))
        key, value = jnp.split(compacted.reshape(pair.shape), 2, axis=-1)
        return run(implementation, query, key, value, key_lengths=lengths)

    dtype = jnp.bfloat16 if implementation == "cudnn" else jnp.float32
    arguments = [jnp.asarray(x, dtype) for x in (query, key, value)]
    tolerance = dict(rtol=0, atol=2e-2 if implementation == "cudnn" else 5e-6)
    expected = reference(query, key, value, mask)
    np.testing.assert_allclose(jax.jit(out)(*arguments), expected, **tolerance)

    weights = np.random.default_rng(1).normal(size=expected.shape)
    gradients = jax.jit(jax.grad(lambda *x: (out(*x) * weights).sum(), argnums=(0, 1, 2)))(*arguments)
    step = 1e-4
    rng = np.random.default_rng(2)
    for i, gradient in enumerate(gradients):
        direction = rng.normal(size=gradient.shape)
        ends = []
        for sign in (1, -1):
            moved = [query, key, value]
            moved[i] = moved[i] + sign * step * direction
            ends.append((reference(*moved, mask) * weights).sum())
        slope = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose((np.asarray(gradient, np.float64) * direction).sum(), slope, rtol=1e-2)


@pytest.mark.parametrize("tokens", [128, 130])
def test_splash_pads_to_its_blocks(tokens):
    """Self-attention at head width 72, with and without a rest."""
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(1, tokens, 2, 72)), jnp.float32) for _ in range(3))
    out = splash_attention(query, key, value, interpret=True)
    np.testing.assert_allclose(out, attention(query, key, value), atol=3e-6)


@pytest.mark.parametrize(("tokens", "keys"), [(1024, 1024), (960, 120)])
def test_splash_lowers_for_a_tpu(tokens, keys):
    """The kernel's own compiler takes head width 72, captions and odd buckets, forward and backward."""
    query, key = (jax.ShapeDtypeStruct((2, n, 16, 72), jnp.bfloat16) for n in (tokens, keys))
    lengths = None if keys == tokens else jax.ShapeDtypeStruct((2,), jnp.int32)

    def total(query, key, value, lengths):
        out = attention(query, key, value, key_lengths=lengths, implementation="splash")
        return out.astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    program = gradient.trace(query, key, key, lengths).lower(lowering_platforms=("tpu",)).as_text()
    assert program.count("tpu_custom_call") == 3  # forward, gradient of queries, gradient of keys and values


def test_masked_keys_have_no_gradient(ragged):
    query, key, value, mask = ragged

    def total(value):
        compacted, lengths = compact_keys(value.reshape(3, 7, -1), jnp.asarray(mask))
        value = compacted.reshape(value.shape)
        return jnp.square(attention(jnp.asarray(query), jnp.asarray(key), value, key_lengths=lengths)).sum()

    gradient = np.asarray(jax.grad(total)(jnp.asarray(value)))
    assert np.all(gradient[~mask] == 0)
    assert np.all(np.abs(gradient[mask]).sum(axis=(1, 2)) > 0)


def test_an_empty_mask_stays_finite():
    _, lengths = compact_keys(jnp.ones((1, 3, 2)), jnp.zeros((1, 3)))
    np.testing.assert_array_equal(lengths, [1])


def test_unsupported_implementations_say_why():
    with pytest.raises(UserError, match=r"'cudn' is unknown.*Did you mean 'cudnn'"):
        check_implementation("cudn", dtype="float32", head_dim=72)
    with pytest.raises(UserError, match=r"needs a GPU; the dtype is float32.*head width is 12"):
        check_implementation("cudnn", dtype="float32", head_dim=12)
    with pytest.raises(UserError, match=r"'splash' cannot run: the backend is cpu, it needs a TPU; the head"):
        check_implementation("splash", dtype="float32", head_dim=136)


def test_a_platform_that_is_not_here_can_be_aimed_at():
    with target_platform("tpu"):
        check_implementation("splash", dtype="bfloat16", head_dim=72)
        with pytest.raises(UserError, match="the backend is tpu, it needs a GPU"):
            check_implementation("cudnn", dtype="bfloat16", head_dim=72)
    with target_platform("gpu"):
        check_implementation("cudnn", dtype="bfloat16", head_dim=72)
