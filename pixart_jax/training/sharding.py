"""Where every array lives: one table from logical axes to mesh axes.

Parameters name their axes where they are made (`models/layers.py`); moving average and optimizer moments
follow their parameter. Nothing is replicated in silence: an axis that does not divide raises.
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

MESH_AXES = ("data", "fsdp", "sequence", "tensor")

Rules = Mapping[str, tuple[str, ...]]

# Logical axis -> mesh axes. What is not listed is whole on every device.
RULES: Rules = {
    "batch": ("data", "fsdp"),
    "tokens": ("sequence",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
}
# ZeRO-1: parameters are whole along `fsdp`; moving average and optimizer follow RULES.
ZERO1_RULES: Rules = {name: axes for name, axes in RULES.items() if name != "embed"}

# The planner shards the state over at most this many devices: of XL/2's 9.1 GiB, 64 devices hold 0.15 each,
# and more devices only make the messages smaller.
MAX_PLANNED_FSDP = 64


def make_mesh(
    config: MeshConfig,
    stage: TrainConfig | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """The mesh over all devices of all processes.

    One axis that is -1 takes what is left. Of several, `sequence` (else `tensor`) takes as few devices as the
    batch allows (the rows of a micro-batch must divide over the others), `fsdp` as many as divide the width,
    within a slice and at most `MAX_PLANNED_FSDP`, and the first that is still free the rest.

    With more than one slice, `data` is laid across them and the other axes stay within one: only the sum of
    gradients over replicas crosses the slow network.

    Args:
      config: devices along each axis.
      stage: its batch and model decide when several axes are -1.
      devices: default those of this run.

    Raises:
      UserError: the axes do not multiply to the number of devices, or the slices do not fit.
    """
    devices = list(jax.devices() if devices is None else devices)
    groups = _slice_groups(devices, config.slices)
    sizes = _axis_sizes(config, stage, len(devices), len(groups))
    if sizes["data"] % len(groups):
        raise UserError(
            f"mesh.data is {sizes['data']} over {len(groups)} slices: it must be a multiple of their number, "
            "for `data` is laid across slices. mesh.slices=1 takes all devices as one group."
        )
    within = [sizes["data"] // len(groups), *(sizes[axis] for axis in MESH_AXES[1:])]
    # Devices of one slice are neighbours along every axis but the first.
    grid = np.concatenate(
        [mesh_utils.create_device_mesh(within, group, allow_split_physical_axes=True) for group in groups]
    )
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _slice_groups(devices: list[jax.Device], slices: int) -> list[list[jax.Device]]:
    """Devices by slice, or by process where a backend knows no slices and several groups are asked for."""
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
            f"mesh.slices is {slices}, the devices here make {len(by)}: set it to that number, to 1 or to -1."
        )
    return [by[key] for key in sorted(by)]


def _axis_sizes(config: MeshConfig, stage: TrainConfig | None, count: int, slices: int) -> dict[str, int]:
    """Mesh axis -> devices, with every -1 replaced."""
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 and stage is None:
        raise UserError(
            f"mesh is {_words(sizes)}: at most one axis is -1 when there is no stage to plan for."
        )
    left, remainder = divmod(count, math.prod(size for size in sizes.values() if size != -1))
    if remainder or (not free and left != 1):
        raise UserError(
            f"mesh {_words(sizes)} does not make the {count} devices here: the product of the axes must "
            "equal that number."
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
    """What divides the image tokens of every bucket of a stage."""
    if stage.features.buckets == "official":
        return math.gcd(*(bucket.tokens for bucket in bucket_table(stage.features.image_size)))
    return (stage.features.latent_side // stage.model.patch_size) ** 2


def _words(sizes: Mapping[str, int]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in sizes.items())


def check_batch(config: TrainConfig, mesh: Mesh) -> None:
    """Raises a `UserError` when the batch does not divide over devices and micro-batches."""
    shards, parts = batch_shards(mesh), config.optimizer.accumulation
    if config.data.batch_size % (shards * parts):
        raise UserError(
            f"data.batch_size {config.data.batch_size} does not divide over {shards} devices x {parts} "
            f"micro-batches: choose a multiple of {shards * parts}, or share rows by mesh.tensor."
        )


def batch_shards(mesh: Mesh) -> int:
    """Devices that the rows of a batch are spread over."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def spec(axes: tuple[str | None, ...], rules: Rules = RULES) -> PartitionSpec:
    """Logical axes -> partition."""
    return PartitionSpec(*(rules.get(axis) for axis in axes))


def activation_rule(mesh: Mesh):
    """The rule for `models.layers.activation_sharding`."""
    return lambda axes: NamedSharding(mesh, spec(axes))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`."""
    return NamedSharding(mesh, spec(("batch",)))


def global_batch(mesh: Mesh, rows: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """One array over all processes per entry, from the rows that this process holds."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in rows.items()}


def parameter_shardings(mesh: Mesh, state: nnx.State, rules: Rules = RULES) -> dict[str, Any]:
    """The sharding of every parameter of an abstract model state, as a nested dict.

    Raises:
      UserError: an axis that the mesh does not divide, with the sizes that would.
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
    """Bytes that one device holds of a tree of abstract arrays."""
    sizes = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        tree,
        shardings,
    )
    return sum(jax.tree.leaves(sizes))


def totals(target: Any, shardings: Any) -> str:
    """What a device holds of an abstract `TrainState`, in one line."""
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
    parts = ", ".join(f"{name} {size:,.1f}" for name, size in held.items())
    count = sum(leaf.size for leaf in jax.tree.leaves((target.trained, target.frozen)))
    return f"{count:,} parameters; MiB of state a device: {parts}, in all {sum(held.values()):,.1f}"


def table(params: Any, shardings: Any) -> str:
    """The sharding table: a line per parameter with shape, partition and bytes per device."""
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
