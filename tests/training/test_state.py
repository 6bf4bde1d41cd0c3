import jax
import numpy as np
import optax

from pixart_jax.config import MeshConfig
from pixart_jax.models.pixart import NULL_TEXT, PixArtConfig
from pixart_jax.training import sharding
from pixart_jax.training.state import abstract_state, init_params, new_state, split_frozen

MODEL = PixArtConfig(size="custom", depth=1, hidden_size=24, num_heads=2, text_dim=8, text_length=5)


def test_initial_weights_depend_on_the_seed_alone():
    first, again, other = (jax.jit(lambda seed=seed: init_params(MODEL, seed))() for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert np.any(first["t_block"]["kernel"] != other["t_block"]["kernel"])


def test_the_average_starts_from_the_weights_and_the_null_caption_has_no_optimizer(random_params):
    _, params = random_params(MODEL)
    state = new_state(params, optax.adamw(1e-3))
    jax.tree.map(np.testing.assert_array_equal, state.ema, params)
    trained, frozen = split_frozen(params)
    assert list(frozen) == [NULL_TEXT] and NULL_TEXT not in trained
    assert jax.tree.structure(state.opt_state[0].mu) == jax.tree.structure(trained)


def test_moments_are_sharded_like_their_parameter():
    mesh = sharding.make_mesh(MeshConfig(2, 4, 1))
    target, shardings = abstract_state(MODEL, optax.adamw(1e-3), mesh)
    moments = shardings.opt_state[0].nu
    assert moments == split_frozen(shardings.params)[0]
    assert shardings.opt_state[0].count.spec == jax.sharding.PartitionSpec()
    kernel = target.opt_state[0].mu["t_block"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (6, 6, 24)
