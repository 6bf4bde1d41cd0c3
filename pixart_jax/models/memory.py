"""Arrays in host memory: JAX's memory kind 'pinned_host'."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import NamedSharding, Sharding

HOST = "pinned_host"


def is_on_host(sharding: Any) -> bool:
    """Returns whether a sharding places an array in host memory."""
    return isinstance(sharding, Sharding) and sharding.memory_kind == HOST


def host_sharding(sharding: NamedSharding) -> NamedSharding:
    """Returns a sharding with the same shards, in the memory of the hosts of their devices."""
    return sharding.with_memory_kind(HOST)


def device_shardings(shardings: Any) -> Any:
    """Returns a tree of shardings with the same shards, on the devices."""

    def one(sharding):
        return NamedSharding(sharding.mesh, sharding.spec) if is_on_host(sharding) else sharding

    return jax.tree.map(one, shardings)


def on_device(tree: Any) -> Any:
    """Starts to copy the arrays of a tree that are in host memory to their devices.

    Each process copies its own shards. Other leaves of the tree stay the same objects.
    """

    def one(leaf):
        concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
        if not concrete or not is_on_host(leaf.sharding):
            return leaf
        return jax.device_put(leaf, device_shardings(leaf.sharding))

    return jax.tree.map(one, tree)
