import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from pixart_jax.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from pixart_jax.denoiser import NETWORK, abstract_model
from pixart_jax.errors import UserError
from pixart_jax.models.configs import PixArtConfig
from pixart_jax.training import sharding
from pixart_jax.training.objectives import make_objective
from pixart_jax.training.state import abstract_state

TINY = PixArtConfig(size="custom", depth=2, hidden_size=24, num_heads=2, text_dim=8, text_length=5)


@dataclasses.dataclass(frozen=True)
class Device:
    """The attributes of a device that `make_mesh` reads."""

    id: int
    slice_index: int | None = None
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "none"


def stage(batch_size, mesh, accumulation=1, **model):
    model = {"size": "XL/2", "text_dim": 8, "text_length": 5, **model}
    return TrainConfig(
        model=PixArtConfig(**model),
        data=DataConfig(batch_size=batch_size),
        optimizer=OptimizerConfig(accumulation=accumulation),
        mesh=mesh,
    )


def test_a_free_axis_takes_the_remaining_devices():
    mesh = sharding.make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 2}
    assert sharding.batch_shards(mesh) == 4


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(data=3), "does not match the 8 devices"),
        (MeshConfig(data=-1, fsdp=3), "does not match the 8 devices"),
        (MeshConfig(data=16), "does not match the 8 devices"),
        (MeshConfig(data=-1, fsdp=-1), "at most one axis may be -1"),
        (MeshConfig(slices=2), "the devices form 1: set it to that number"),
    ],
)
def test_a_mesh_that_does_not_fit_raises(mesh, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(mesh)


@pytest.mark.parametrize(
    ("count", "batch_size", "accumulation", "expected"),
    [
        # The paper's batches. 11,392 = 2^7 x 89 and 384 = 2^7 x 3 divide over 128 of 256 devices.
        (16, 11_392, 8, (1, 16, 1)),
        (64, 2_560, 1, (1, 64, 1)),
        (256, 2_560, 1, (4, 64, 1)),
        (256, 11_392, 1, (2, 64, 2)),
        (256, 384, 1, (2, 64, 2)),
        (512, 384, 1, (2, 64, 4)),
        # The rows of a micro-batch must be divisible, too.
        (16, 32, 4, (1, 8, 2)),
        # 48 devices: the largest divisor of the width 1152 = 2^7 x 9.
        (48, 96, 1, (1, 48, 1)),
        (1, 7, 1, (1, 1, 1)),
    ],
)
def test_several_free_axes_are_planned(count, batch_size, accumulation, expected):
    config = stage(batch_size, MeshConfig(data=-1, fsdp=-1, tensor=-1), accumulation)
    mesh = sharding.make_mesh(config.mesh, config, [Device(i) for i in range(count)])
    assert (mesh.shape["data"], mesh.shape["fsdp"], mesh.shape["tensor"]) == expected
    sharding.check_batch(config, mesh)


def test_only_data_spans_slices():
    devices = [Device(i, slice_index=i // 8) for i in range(16)]
    config = stage(32, MeshConfig(data=-1, fsdp=-1, tensor=-1))
    mesh = sharding.make_mesh(config.mesh, config, devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 8, "sequence": 1, "tensor": 1}
    for row, grid in enumerate(mesh.devices):
        assert {device.slice_index for device in grid.flat} == {row}
    with pytest.raises(UserError, match="with 2 slices: it must be a multiple"):
        sharding.make_mesh(MeshConfig(data=1, fsdp=16), devices=devices)
    with pytest.raises(UserError, match=r"mesh\.slices is 4, but the devices form 2"):
        sharding.make_mesh(MeshConfig(slices=4), devices=devices)
    # slices=1 treats all devices as one slice.
    assert sharding.make_mesh(MeshConfig(data=1, fsdp=16, slices=1), devices=devices).shape["fsdp"] == 16


def test_processes_count_as_slices_if_the_backend_reports_none():
    devices = [Device(i, process_index=i // 4) for i in range(8)]
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4, slices=2), devices=devices)
    assert [{d.process_index for d in grid.flat} for grid in mesh.devices] == [{0}, {1}]
    # By default all processes form one slice, and any axis may span them.
    assert sharding.make_mesh(MeshConfig(data=1, fsdp=8), devices=devices).shape["fsdp"] == 8


def test_a_batch_that_cannot_be_divided_raises():
    config = stage(24, MeshConfig(), accumulation=2)
    with pytest.raises(UserError, match=r"24 cannot be divided among 8 devices x 2 .* a multiple of 16"):
        sharding.check_batch(config, sharding.make_mesh(config.mesh))


def objective_of(model):
    return make_objective(TrainConfig(model=model))


def test_parameters_are_sharded_by_the_table():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    _, state = abstract_model(TINY)
    found = sharding.parameter_shardings(mesh, state)
    block = found["blocks"]["stacked"]
    assert block["attn"]["qkv"]["kernel"].spec == P(None, "fsdp", None, "tensor", None)
    assert block["attn"]["qkv"]["bias"].spec == P(None, None, "tensor", None)
    assert block["mlp"]["fc2"]["kernel"].spec == P(None, "tensor", "fsdp")
    assert found["null_text"].spec == P(None, None)


@pytest.mark.parametrize(
    ("count", "mesh", "axis", "sizes"),
    [
        (5, MeshConfig(data=1, tensor=5), "heads", "choose mesh.tensor among 1, 2, 4, 8, 16."),
        (
            256,
            MeshConfig(data=1, fsdp=256),
            "embed",
            "choose mesh.fsdp among 1, 2, 3, 4, 6, 8, 9, 12, 16, 18,",
        ),
    ],
)
@pytest.mark.parametrize("strategy", ["fsdp", "zero1"])
def test_an_axis_that_cannot_be_sharded_raises_with_the_possible_sizes(count, mesh, axis, sizes, strategy):
    """XL/2 has 16 heads and the width 1152."""
    config = stage(8, mesh).model
    mesh = sharding.make_mesh(mesh, devices=[Device(i) for i in range(count)])
    with pytest.raises(UserError, match=f"along '{axis}'") as raised:
        abstract_state(objective_of(config), optax.adamw(1e-3), mesh, strategy)
    assert sizes in str(raised.value)


def test_zero1_shards_only_moving_average_and_optimizer():
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8))
    target, shardings = abstract_state(objective_of(TINY), optax.adamw(1e-3), mesh, "zero1")
    kernel = (NETWORK, "blocks", "stacked", "mlp", "fc1", "kernel")

    def at(tree):
        return functools.reduce(lambda node, name: node[name], kernel, tree).spec

    assert at(shardings.trained) == P(None, None, "tensor")
    assert at(shardings.ema["ema"]) == at(shardings.optimizer[0].mu) == P(None, "fsdp", "tensor")
    whole = sharding.bytes_per_device(target.trained, shardings.trained)
    assert whole == sum(leaf.size * 4 for leaf in jax.tree.leaves(target.trained))
    assert sharding.bytes_per_device(target.ema, shardings.ema) < whole / 4
    line = sharding.totals(target, shardings)
    assert f"parameters {whole / 2**20:,.1f}, frozen parameters 0.0, moving average" in line
    assert f"{sum(leaf.size for leaf in jax.tree.leaves(target.weights(None))):,} parameters" in line


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


def test_a_global_batch_has_the_rows_in_order():
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
