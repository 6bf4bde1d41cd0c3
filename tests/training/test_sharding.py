import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pixart_jax.config import MeshConfig
from pixart_jax.errors import UserError
from pixart_jax.models.pixart import PixArtConfig
from pixart_jax.training import sharding
from pixart_jax.training.state import abstract_model

TINY = PixArtConfig(size="custom", depth=2, hidden_size=24, num_heads=2, text_dim=8, text_length=5)


def test_a_mesh_takes_what_is_left():
    assert dict(sharding.make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2)).shape) == {
        "data": 2,
        "fsdp": 2,
        "tensor": 2,
    }
    assert sharding.batch_shards(sharding.make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2))) == 4


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(data=3), "does not make the 8 devices here"),
        (MeshConfig(data=-1, fsdp=3), "does not make the 8 devices here"),
        (MeshConfig(data=-1, fsdp=-1), "at most one is -1"),
        (MeshConfig(data=0), "each axis is at least 1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(mesh)


def test_parameters_follow_the_table():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    _, state = abstract_model(TINY)
    found = sharding.parameter_shardings(mesh, state)
    block = found["blocks"]["stacked"]
    assert block["attn"]["qkv"]["kernel"].spec == P(None, "fsdp", None, "tensor", None)
    assert block["attn"]["qkv"]["bias"].spec == P(None, None, "tensor", None)
    assert block["mlp"]["fc2"]["kernel"].spec == P(None, "tensor", "fsdp")
    assert found["null_text"].spec == P(None, None)


@pytest.mark.parametrize(
    ("mesh", "axis", "sizes"),
    [
        (MeshConfig(data=1, fsdp=1, tensor=8), "heads", "choose mesh.tensor among 1, 2."),
        (MeshConfig(data=1, fsdp=8, tensor=1), "embed", "among 1, 2, 4, 5, 10, 20."),
    ],
)
def test_what_cannot_be_sharded_names_the_sizes_that_work(mesh, axis, sizes):
    config = PixArtConfig(size="custom", depth=2, hidden_size=20, num_heads=2, text_dim=8, text_length=5)
    _, state = abstract_model(config)
    with pytest.raises(UserError, match=f"along '{axis}'") as raised:
        sharding.parameter_shardings(sharding.make_mesh(mesh), state)
    assert sizes in str(raised.value)


def test_the_table_counts_bytes_per_device():
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8, tensor=1))
    _, state = abstract_model(TINY)
    from flax import nnx

    params = nnx.to_pure_dict(state)
    shardings = sharding.parameter_shardings(mesh, state)
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(params))
    assert whole / 8 < sharding.bytes_per_device(params, shardings) < whole
    line = next(row for row in sharding.table(params, shardings).splitlines() if "mlp.fc1.kernel" in row)
    assert "2x24x96" in line and "(-, fsdp, tensor)" in line and f"{2 * 3 * 96 * 4:,} B" in line


def test_a_global_batch_keeps_its_rows():
    mesh = sharding.make_mesh(MeshConfig(data=4, fsdp=2))
    rows = np.arange(16.0).reshape(16, 1)
    batch = sharding.global_batch(mesh, {"x": rows})
    np.testing.assert_array_equal(batch["x"], rows)
    assert len(batch["x"].sharding.device_set) == 8
    assert batch["x"].addressable_shards[0].data.shape == (2, 1)


def test_activations_are_constrained():
    from pixart_jax.models.layers import activation_sharding, constrain

    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with activation_sharding(sharding.activation_rule(mesh)):
        out = jax.jit(lambda x: constrain(x, "batch", "tokens", "heads", None))(jnp.ones((4, 3, 2, 5)))
    assert out.sharding.shard_shape(out.shape) == (1, 3, 1, 5)
    # Without the context nothing is constrained.
    assert constrain(out, "batch", None, None, None) is out
