import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax.errors import UserError
from pixart_jax.models.attention import attention, check_implementation, compact_keys


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


def test_any_mask_becomes_a_length(ragged):
    query, key, value, mask = ragged
    pair = jnp.asarray(np.concatenate([key, value], axis=-1).reshape(3, 7, -1))
    compacted, lengths = compact_keys(pair, jnp.asarray(mask))
    np.testing.assert_array_equal(lengths, [3, 7, 3])
    key_c, value_c = jnp.split(compacted.reshape(3, 7, 2, 16), 2, axis=-1)
    out = attention(jnp.asarray(query), key_c, value_c, key_lengths=lengths)
    np.testing.assert_allclose(out, reference(query, key, value, mask), atol=2e-6)


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
