import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pixart_jax.errors import UserError
from pixart_jax.models.configs import DiTConfig
from pixart_jax.models.dit import DiT

TINY = DiTConfig(size="custom", depth=2, hidden_size=16, num_heads=2, num_classes=3)


def test_xl2_has_the_official_number_of_parameters():
    model = nnx.eval_shape(lambda: DiT(DiTConfig(), rngs=nnx.Rngs(0)))
    # The official 675,129,632 include the fixed position table of 256 x 1152, which is not a parameter here.
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) == 675_129_632 - 256 * 1152


def test_blocks_are_initially_the_identity_and_the_output_is_zero():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 16)), jnp.float32)

    @jax.jit
    def start():
        model = DiT(TINY, rngs=nnx.Rngs(0))
        out = model(jnp.ones((2, 4, 4, 4)), jnp.ones(2), jnp.zeros(2, int))
        return model.blocks(x, jnp.ones((2, 16))), out

    through, out = start()
    np.testing.assert_array_equal(through, x)
    assert not jnp.any(out)


def test_output_depends_on_class_and_timestep(random_params):
    graph, params = random_params(TINY)
    model = jax.jit(nnx.merge(graph, params))
    latents = jnp.ones((4, 4, 6, 4))
    out = model(latents, jnp.asarray([5.0, 5.0, 5.0, 6.0]), jnp.asarray([0, 3, 0, 0]))
    assert out.shape == (4, 4, 6, 8)
    np.testing.assert_allclose(out[0], out[2], atol=1e-6)
    assert jnp.abs(out[0] - out[1]).max() > 1e-3
    assert jnp.abs(out[0] - out[3]).max() > 1e-4


def test_zero_classes_raise():
    with pytest.raises(UserError, match="num_classes is 0"):
        DiTConfig(num_classes=0)
