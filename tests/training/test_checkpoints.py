import functools

import jax
import numpy as np
import pytest

from pixart_jax.config import CheckpointConfig, MeshConfig, TrainConfig
from pixart_jax.errors import UserError
from pixart_jax.models.pixart import PixArtConfig
from pixart_jax.training import sharding
from pixart_jax.training.checkpoints import Checkpoints, read_weights, write_weights
from pixart_jax.training.optimizers import make_optimizer
from pixart_jax.training.state import abstract_state, new_state

MODEL = PixArtConfig(size="custom", depth=2, hidden_size=24, num_heads=2, text_dim=8, text_length=5)
CONFIG = TrainConfig(name="tiny", model=MODEL)


def state_on(mesh, params):
    optimizer = make_optimizer(CONFIG.optimizer, 8)
    target, shardings = abstract_state(MODEL, optimizer, mesh)
    make = jax.jit(functools.partial(new_state, optimizer=optimizer), out_shardings=shardings)
    return make(params), target


def test_a_checkpoint_opens_on_any_mesh(random_params, tmp_path):
    _, params = random_params(MODEL)
    state, _ = state_on(sharding.make_mesh(MeshConfig(2, 4, 1)), params)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=5))
    assert checkpoints.latest_step() is None
    assert checkpoints.due(5, 7) and checkpoints.due(7, 7) and not checkpoints.due(6, 7)
    checkpoints.save(state, {"fingerprint": "f"}, CONFIG)
    checkpoints.wait()
    checkpoints.close()
    for mesh in ((8, 1, 1), (4, 1, 2), (1, 2, 4)):
        if mesh[2] > 2:
            continue  # two heads
        _, target = state_on(sharding.make_mesh(MeshConfig(*mesh)), params)
        again = Checkpoints(tmp_path, CheckpointConfig())
        restored, loader, config = again.restore(again.latest_step(), target)
        again.close()
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, restored, target))
        assert loader == {"fingerprint": "f"} and config == CONFIG


def test_weights_travel_without_an_optimizer(random_params, tmp_path):
    _, params = random_params(MODEL)
    write_weights(tmp_path / "weights", params, CONFIG)
    found, config = read_weights(tmp_path / "weights")
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert config == CONFIG
    with pytest.raises(UserError, match="exists"):
        write_weights(tmp_path / "weights", params, CONFIG)
    with pytest.raises(UserError, match="holds no 'raw' weights"):
        read_weights(tmp_path / "weights", "raw")
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_absent_and_damaged_are_told_apart(random_params, tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        read_weights(tmp_path / "nothing")
    _, params = random_params(MODEL)
    write_weights(tmp_path / "weights", params, CONFIG)
    (tmp_path / "weights/checkpoints/0/metadata/metadata").write_text("{")
    with pytest.raises(UserError, match="is there but cannot be read"):
        read_weights(tmp_path / "weights")
