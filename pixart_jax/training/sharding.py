"""Where every array lives: one table from logical axes to mesh axes.

Parameters name their axes where they are made (`models/layers.py`); moving average and optimizer moments
follow their parameter. Nothing is replicated in silence: an axis that does not divide raises.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pixart_jax.config import MeshConfig
from pixart_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. What is not listed is whole on every device.
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
}


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh over all devices of all processes.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    count = jax.device_count()
    sizes = [config.data, config.fsdp, config.tensor]
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"mesh is {sizes}: each axis is at least 1, and at most one is -1 (what is left).")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if math.prod(sizes) != count:
        raise UserError(
            f"mesh data={config.data} fsdp={config.fsdp} tensor={config.tensor} does not make the {count} "
            "devices here: the product of the axes must equal that number."
        )
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Devices that the rows of a batch are spread over."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Logical axes -> partition."""
    return PartitionSpec(*(RULES.get(axis) for axis in axes))


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


def parameter_shardings(mesh: Mesh, state: nnx.State) -> dict[str, Any]:
    """The sharding of every parameter of an abstract model state, as a nested dict.

    Raises:
      UserError: an axis that the mesh does not divide, with the sizes that would.
    """
    shardings = {}
    for path, variable in nnx.to_flat_state(state):
        axes = variable.get_metadata().get("out_sharding") or ()
        for size, axis in zip(variable.shape, axes):
            for mesh_axis in RULES.get(axis, ()):
                if size % mesh.shape[mesh_axis]:
                    raise UserError(
                        f"parameter {'.'.join(map(str, path))} {variable.shape} cannot be sharded "
                        f"{mesh.shape[mesh_axis]} ways along '{axis}' ({size}): choose mesh.{mesh_axis} "
                        f"among {', '.join(map(str, _divisors(size)))}."
                    )
        shardings[path] = NamedSharding(mesh, spec(axes))
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
