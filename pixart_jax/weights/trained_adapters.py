"""Adapters between a training state, which stacks the blocks, and files, which name every module."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from pixart_jax.config import TrainConfig
from pixart_jax.errors import UserError
from pixart_jax.hub import HubPath, is_hub, name_of
from pixart_jax.models.adapters import ADAPTER, is_adapter
from pixart_jax.models.configs import ADAPTER_TARGETS, LAYER_NAMES, AdapterConfig, adapter_targets
from pixart_jax.readers import read_json
from pixart_jax.weights import cards
from pixart_jax.weights.adapters import Adapter, Factors
from pixart_jax.weights.checkpoints import checkpoint_folder, read_network
from pixart_jax.weights.files import COPY

Params = dict[str, Any]


def read_run_adapter(path: str | Path, which: str = "ema") -> Adapter:
    """Reads the adapter that a run has trained.

    Args:
      path, which: as for `weights.checkpoints.read_weights`.

    Raises:
      UserError: see `read_weights`; or the run has trained a network, not an adapter.
    """
    params, config = read_network(path, which)
    if not config.adapter:
        raise UserError(
            f"'{path}' holds the weights of a whole network, not an adapter: give the run of an adapter, or "
            "convert it with --to=diffusers or --to=official."
        )
    from pixart_jax.weights.loading import licence_of  # imports the formats of adapters

    manifest = read_json(checkpoint_folder(path) / "metadata" / "metadata", COPY, lenient=True)
    return dataclasses.replace(
        extract(params, config),
        base=_published_name(config.init.path),
        licence=licence_of(path),
        manifest=manifest,
        name=name_of(path),
    )


def _published_name(path: str) -> str:
    """The name of base weights, as others may read it: of a path of the hub, the repository."""
    return HubPath.parse(path).repository if is_hub(path) else cards.without_folders(path)


def extract(params: Params, config: TrainConfig) -> Adapter:
    """Returns the adapter in the parameters of a network.

    Args:
      params: nested dict in the tree of the network of `config`.
      config: config of the run.
    """
    flat, modules = _host_adapters(params), {}
    for name, (at, index, layer) in _modules(flat, config).items():
        down, up = flat[*at, "down"][layer][..., index, :], flat[*at, "up"][layer][:, index]
        magnitude = flat.get((*at, "magnitude"))
        if magnitude is not None:
            magnitude = magnitude[layer][index].reshape(-1)
        rank = down.shape[-1]
        modules[name] = Factors(
            _to_theirs(name, down.reshape(-1, rank), config),
            np.ascontiguousarray(up.reshape(rank, -1).T),
            config.adapter.scale,
            magnitude,
        )
    return Adapter(modules, rslora=config.adapter.kind == "rslora")


def insert(adapter: Adapter, params: Params, config: TrainConfig) -> Params:
    """Replaces the adapter in the parameters of a network, to continue its training.

    Raises:
      UserError: its kind, rank, scale or modules are not those of `config.adapter`.
    """
    flat = _host_adapters(params)
    places = _modules(flat, config)
    _check(adapter, config.adapter, set(places))
    for name, (at, index, layer) in places.items():
        factors = adapter.modules[name]
        arrays = {"down": _to_ours(name, factors.down), "up": factors.up.T, "magnitude": factors.magnitude}
        for key, value in arrays.items():
            if value is None:
                continue
            array = flat[*at, key][layer]
            # The axis of the parts is the last but one of A, the second of B, and the first of m.
            part = np.moveaxis(array, {"down": -2, "up": 1, "magnitude": 0}[key], 0)[index]
            if part.size != value.size:
                raise UserError(
                    f"init.adapter '{config.init.adapter}' does not fit the network: {name} has {value.size} "
                    f"values where this one needs {part.size}. Use the network that it was trained with."
                )
            part[...] = value.reshape(part.shape)
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(params) | flat)


def _check(adapter: Adapter, config: AdapterConfig, modules: set[str]) -> None:
    first = next(iter(adapter.modules.values()))
    kind = "dora" if first.magnitude is not None else "rslora" if adapter.rslora else "lora"
    ranks = {factors.down.shape[0] for factors in adapter.modules.values()}
    scales = {factors.scale for factors in adapter.modules.values()}
    problems = []
    if kind != config.kind:
        problems.append(f"adapter.kind is '{config.kind}', the adapter's is '{kind}'")
    if ranks != {config.rank}:
        problems.append(f"adapter.rank is {config.rank}, the adapter's is {_list(ranks)}")
    elif not all(math.isclose(scale, config.scale, rel_tol=1e-6) for scale in scales):
        problems.append(f"adapter.alpha gives the scale {config.scale:g}, the adapter's is {_list(scales)}")
    if set(adapter.modules) != modules:
        missing, more = modules - set(adapter.modules), set(adapter.modules) - modules
        different = [
            f"{words} {sorted(each)[0]}" for words, each in (("lacks", missing), ("has", more)) if each
        ]
        problems.append(f"adapter.targets is '{config.targets}', the adapter {' and '.join(different)}")
    if problems:
        flags = _flags(adapter, kind, ranks, scales, config, modules)
        fix = (
            f"Set {' '.join(flags)}"
            if flags
            else "Train a new adapter: no settings of a run are like this one's"
        )
        raise UserError(f"init.adapter cannot be continued: {'; '.join(problems)}. {fix}.")


def _flags(
    adapter: Adapter, kind: str, ranks: set[int], scales: set[float], config: AdapterConfig, modules: set[str]
) -> list[str]:
    """The flags with which a run has the settings of an adapter; an empty list if there are none."""
    if len(ranks) > 1 or max(scales) - min(scales) > 1e-6 * max(map(abs, scales)):
        return []
    (rank,), scale = ranks, max(scales)
    values: dict[str, Any] = {"kind": kind, "rank": rank}
    if not math.isclose(scale, dataclasses.replace(config, kind=kind, rank=rank).scale, rel_tol=1e-6):
        alpha = scale * (math.sqrt(rank) if kind == "rslora" else rank)
        if alpha <= 0:
            return []
        values["alpha"] = f"{alpha:.8g}"
    if set(adapter.modules) != modules:
        names = {_BLOCK.sub("", name) for name in adapter.modules}
        blocks = {match[0] for name in [*modules, *adapter.modules] if (match := _BLOCK.match(name))}
        every = {f"{block}{name}" for name in names for block in (blocks if name in _IN_BLOCKS else [""])}
        if every != set(adapter.modules):  # only some of the blocks
            return []
        presets = [
            preset
            for preset in ADAPTER_TARGETS
            # Not all networks have size embedders.
            if names ^ set(_layer_names(dataclasses.replace(config, targets=preset))) <= _OPTIONAL - names
        ]
        values["targets"] = presets[0] if presets else ",".join(sorted(names))
    return [
        f"--config.adapter.{name}={value}" for name, value in values.items() if value != getattr(config, name)
    ]


_BLOCK = re.compile(r"transformer_blocks\.\d+\.")
_IN_BLOCKS = {name for layer, parts in LAYER_NAMES.items() if layer.startswith("blocks.") for name in parts}

_OPTIONAL = {
    name
    for layer, parts in LAYER_NAMES.items()
    if layer.startswith(("size_embedder.", "ratio_embedder."))
    for name in parts
}


def _layer_names(config: AdapterConfig) -> Iterator[str]:
    """The names of the layers that a config adapts, without their block."""
    for layer, parts in adapter_targets(config).items():
        yield from (LAYER_NAMES[layer][part] for part in parts)


def _list(values: set[float]) -> str:
    return ", ".join(f"{value:g}" for value in sorted(values))


def _modules(flat: Params, config: TrainConfig) -> dict[str, tuple[tuple[str, ...], int, Any]]:
    """Path of the adapter's arrays, index of the part and of the block, by the name of the module."""
    return dict(_places(flat, config))


def _places(flat: Params, config: TrainConfig) -> Iterator[tuple[str, tuple[tuple[str, ...], int, Any]]]:
    for layer, parts in adapter_targets(config.adapter).items():
        at = (*layer.split("."), ADAPTER)
        if (*at, "down") not in flat:  # size embedders are optional
            continue
        for index, part in enumerate(parts):
            name = LAYER_NAMES[layer][part]
            if layer.startswith("blocks."):
                for block in range(config.model.depth):
                    yield f"transformer_blocks.{block}.{name}", (at, index, block)
            else:
                yield name, (at, index, ...)


def _host_adapters(params: Params) -> Params:
    """Copies of the arrays of adapters in host memory, by path."""
    flat = traverse_util.flatten_dict(params)
    return {path: np.array(leaf) for path, leaf in flat.items() if is_adapter(path)}


def _to_theirs(name: str, down: np.ndarray, config: TrainConfig) -> np.ndarray:
    """[in, r] -> [r, in]; for the patch embedding, a convolution, [r, C, p, p]."""
    if name != "pos_embed.proj":
        return np.ascontiguousarray(down.T)
    side, channels = config.model.patch_size, config.model.in_channels
    return np.ascontiguousarray(down.reshape(side, side, channels, -1).transpose(3, 2, 0, 1))


def _to_ours(name: str, down: np.ndarray) -> np.ndarray:
    """The inverse of `_to_theirs`."""
    if name != "pos_embed.proj":
        return down.T
    return down.transpose(2, 3, 1, 0).reshape(-1, down.shape[0])
