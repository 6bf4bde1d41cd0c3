"""The device mesh and the sharding of all arrays, which a table from logical axes to mesh axes defines.

Parameters are annotated with logical axes when they are made (`models/layers.py`). Moving averages and
optimizer moments have the sharding of their parameter; `state.abstract_state` replicates the small arrays of
optimizers that have other shapes. An axis that cannot be divided evenly raises an error; it is never silently
replicated.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pixart_jax.config import MeshConfig, TrainConfig
from pixart_jax.data.buckets import bucket_table
from pixart_jax.errors import UserError
from pixart_jax.models.memory import HOST, is_on_host

MESH_AXES = ("data", "fsdp", "sequence", "tensor")

Rules = Mapping[str, tuple[str, ...]]

# Logical axis -> mesh axes. Axes that are not listed are replicated.
RULES: Rules = {
    "batch": ("data", "fsdp"),
    "tokens": ("sequence",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
}
# Rules for parameters under ZeRO-1, which replicates them along `fsdp`. Moving averages and optimizer state
# still follow RULES.
ZERO1_RULES: Rules = {name: axes for name, axes in RULES.items() if name != "embed"}

# Upper limit of `fsdp` when the mesh is planned automatically. The state of XL/2, 9.1 GiB, takes 0.15 GiB on
# each of 64 devices; more devices would only make the messages smaller.
MAX_PLANNED_FSDP = 64


def make_mesh(
    config: MeshConfig,
    stage: TrainConfig | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Makes the mesh over all devices of all processes.

    If one axis is -1, it takes the remaining devices. If several are -1, they are planned in this order:
    `sequence` (or else `tensor`) takes as few devices as the batch allows, since the rows of a micro-batch
    must be divisible by the number of devices along `data` and `fsdp`; `fsdp` takes the largest number that
    divides the width of the model, fits into a slice and is at most `MAX_PLANNED_FSDP`; the first axis that
    is still -1 takes the rest.

    With several slices, `data` spans them and every other axis stays within a slice. Then only the sum of
    gradients over replicas crosses the slower network between slices.

    Args:
      config: number of devices along each axis.
      stage: config of the stage, whose batch and model determine the plan if several axes are -1.
      devices: devices to use; by default all devices of the run.

    Raises:
      UserError: if the product of the axes is not the number of devices, or if the slices do not fit.
    """
    devices = list(jax.devices() if devices is None else devices)
    groups = _slice_groups(devices, config.slices)
    sizes = _axis_sizes(config, stage, len(devices), len(groups))
    if sizes["data"] % len(groups):
        raise UserError(
            f"mesh.data is {sizes['data']} with {len(groups)} slices: it must be a multiple of their number, "
            "because `data` spans the slices. Set mesh.slices=1 to treat all devices as one slice."
        )
    within = [sizes["data"] // len(groups), *(sizes[axis] for axis in MESH_AXES[1:])]
    # Concatenate the grids of the slices along `data`, the first axis.
    grid = np.concatenate(
        [mesh_utils.create_device_mesh(within, group, allow_split_physical_axes=True) for group in groups]
    )
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _slice_groups(devices: list[jax.Device], slices: int) -> list[list[jax.Device]]:
    """Groups devices by slice, or by process if the config asks for slices but the backend reports none."""
    if slices == 1:
        return [devices]
    by = collections.defaultdict(list)
    for device in devices:
        by[getattr(device, "slice_index", None) or 0].append(device)
    if len(by) == 1 and slices > 1:
        by.clear()
        for device in devices:
            by[device.process_index].append(device)
    if slices not in (-1, len(by)):
        raise UserError(
            f"mesh.slices is {slices}, but the devices form {len(by)}: set it to that number, to 1 or to -1."
        )
    return [by[key] for key in sorted(by)]


def _axis_sizes(config: MeshConfig, stage: TrainConfig | None, count: int, slices: int) -> dict[str, int]:
    """Returns the number of devices along each mesh axis, with every -1 replaced."""
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 and stage is None:
        raise UserError(
            f"mesh is {_words(sizes)}: without the config of a stage, at most one axis may be -1."
        )
    left, remainder = divmod(count, math.prod(size for size in sizes.values() if size != -1))
    if remainder or (not free and left != 1):
        raise UserError(
            f"mesh {_words(sizes)} does not match the {count} devices: the product of the axes must be equal "
            "to that number."
        )

    def settle(axis: str, size: int) -> None:
        nonlocal left
        sizes[axis], left = size, left // size
        free.remove(axis)

    sharing = next((axis for axis in ("sequence", "tensor") if axis in free), None)
    if len(free) > 1 and sharing:
        rows = stage.data.batch_size // stage.optimizer.accumulation
        known = math.prod(sizes[axis] for axis in RULES["batch"] if axis not in free)
        shared = _tokens(stage) if sharing == "sequence" else stage.model.num_heads
        works = (n for n in _divisors(left) if shared % n == 0 and rows % (known * left // n) == 0)
        settle(sharing, next(works, 1))
    if len(free) > 1 and "fsdp" in free:
        works = (
            n
            for n in _divisors(left)
            if n <= MAX_PLANNED_FSDP and stage.model.hidden_size % n == 0 and left // n % slices == 0
        )
        settle("fsdp", max(works, default=1))
    for axis in list(free):
        settle(axis, left)
    return sizes


def _tokens(stage: TrainConfig) -> int:
    """Returns the greatest common divisor of the numbers of image tokens of all buckets of a stage."""
    if stage.features.buckets == "official":
        return math.gcd(*(bucket.tokens for bucket in bucket_table(stage.features.image_size)))
    return (stage.features.latent_side // stage.model.patch_size) ** 2


def _words(sizes: Mapping[str, int]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in sizes.items())


def check_batch(config: TrainConfig, mesh: Mesh) -> None:
    """Raises a `UserError` if the batch cannot be divided evenly among devices and micro-batches."""
    shards, parts = batch_shards(mesh), config.optimizer.accumulation
    if config.data.batch_size % (shards * parts):
        raise UserError(
            f"data.batch_size {config.data.batch_size} cannot be divided among {shards} devices x {parts} "
            f"micro-batches: choose a multiple of {shards * parts}, or increase mesh.tensor."
        )


def check_host_memory(config: TrainConfig, mesh: Mesh) -> None:
    """Raises a `UserError` if the state cannot be in host memory as the config says."""
    device = mesh.local_mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if config.optimizer.on_host and HOST not in kinds:
        raise UserError(
            f"optimizer.ema_device '{config.optimizer.ema_device}' and optimizer.offload "
            f"{config.optimizer.offload} need JAX's memory kind '{HOST}', and {device.device_kind} has only "
            f"{', '.join(kinds)}: set optimizer.ema_device to 'device' and optimizer.offload to False."
        )


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of devices among which the rows of a batch are divided."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def fast_axes(mesh: Mesh) -> tuple[str, ...]:
    """Returns the mesh axes within a TPU slice: all but `data` if that spans several slices."""
    slices = {getattr(device, "slice_index", None) or 0 for device in mesh.devices.flat}
    return mesh.axis_names if len(slices) == 1 else tuple(axis for axis in mesh.axis_names if axis != "data")


def spec(axes: tuple[str | None, ...], rules: Rules = RULES) -> PartitionSpec:
    """Maps logical axes to a partition spec."""
    return PartitionSpec(*(rules.get(axis) for axis in axes))


def activation_rule(mesh: Mesh):
    """Returns the rule for `models.layers.activation_sharding`."""
    return lambda axes: NamedSharding(mesh, spec(axes))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: rows over `data` and `fsdp`."""
    return NamedSharding(mesh, spec(("batch",)))


def global_batch(mesh: Mesh, rows: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Makes the arrays of a global batch from the rows that this process has read."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in rows.items()}


def parameter_shardings(mesh: Mesh, state: nnx.State, rules: Rules = RULES) -> dict[str, Any]:
    """Returns the sharding of every parameter of an abstract model state, as a nested dict.

    Raises:
      UserError: if the mesh does not divide an axis evenly. The message lists the sizes that would.
    """
    shardings = {}
    for path, variable in nnx.to_flat_state(state):
        axes = variable.get_metadata().get("out_sharding") or ()
        for size, axis in zip(variable.shape, axes):
            for mesh_axis in rules.get(axis, ()):
                if size % mesh.shape[mesh_axis]:
                    raise UserError(
                        f"parameter {'.'.join(map(str, path))} {variable.shape} cannot be sharded "
                        f"{mesh.shape[mesh_axis]} ways along '{axis}' ({size}): choose mesh.{mesh_axis} "
                        f"among {', '.join(map(str, _divisors(size)))}."
                    )
        shardings[path] = NamedSharding(mesh, spec(axes, rules))
    return nnx.traversals.unflatten_mapping(shardings)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, min(number, 256) + 1) if number % n == 0]


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Returns the number of bytes of a tree of abstract arrays that each device holds.

    Arrays in host memory do not count.
    """

    def held(leaf, sharding):
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    sizes = jax.tree.map(lambda leaf, at: 0 if is_on_host(at) else held(leaf, at), tree, shardings)
    return sum(jax.tree.leaves(sizes))


def totals(target: Any, shardings: Any) -> str:
    """Describes in one line how much memory the parts of an abstract `TrainState` take on a device."""
    held = {
        name: bytes_per_device(getattr(target, field), getattr(shardings, field)) / 2**20
        for name, field in (
            ("parameters", "trained"),
            ("frozen parameters", "frozen"),
            ("moving average", "ema"),
            ("optimizer", "optimizer"),
        )
        if getattr(target, field)
    }
    # Entries of fields in host memory; the optimizer's counters remain on the device.
    held = {name: size for name, size in held.items() if size}
    parts = ", ".join(f"{name} {size:,.1f}" for name, size in held.items())
    count = sum(leaf.size for leaf in jax.tree.leaves((target.trained, target.frozen)))
    return f"{count:,} parameters; MiB of state per device: {parts}, total {sum(held.values()):,.1f}"


def table(params: Any, shardings: Any) -> str:
    """Returns the sharding table, one line per parameter with its shape, partition and bytes per device."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    rows = []
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings)):
        name = ".".join(str(key.key) for key in path)
        held = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        rows.append((name, "x".join(map(str, leaf.shape)), _describe(sharding.spec), f"{held:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c:<{widths[2]}}  {d:>{widths[3]}} B" for a, b, c, d in rows
    )


def _describe(partition: PartitionSpec) -> str:
    names = ("+".join(axis) if isinstance(axis, tuple) else axis or "-" for axis in partition)
    return "(" + ", ".join(names) + ")"
