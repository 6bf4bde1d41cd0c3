"""muP: a network whose best learning rate does not depend on its width.

Maximal update parametrization (Yang et al., arXiv 2203.03466), with the table for PixArt of "Scaling
Diffusion Transformers Efficiently via muP" (arXiv 2505.15270). With m = width / `model.mup_base_width` and
heads of a fixed width, compared with the base width at the same learning rate and weight decay:

    kind     arrays                                      initial values                 learning rate   output
    matrix   kernels whose inputs grow with the width    deviation / sqrt(m)            1 / m
    input    kernels whose inputs do not                 as at the base width
    table    `scale_shift_table`                         N(0, 0.02)
    vector   biases, and scales of norms                 0; as without muP
    readout  kernel of the last layer                    0                                              1 / m

The decay of a weight per update, learning rate x weight decay, is the same for all kinds. Without muP, tables
have the deviation 1 / sqrt(width), and the bias of the patches is random.

A plain PixArt computes the same with the kernel of the last layer divided by m. Weights that are read from a
checkpoint are therefore plain (`weights/checkpoints.py`), whatever they are used for, and a run with muP
multiplies the kernel by m at its start (`training/initialization.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

READOUT = ("final_layer", "linear", "kernel")
_PATCHES = ("patch_embed", "proj", "kernel")
# Layers whose number of inputs does not grow with the width.
_INPUTS = (
    _PATCHES,
    *((name, "fc1", "kernel") for name in ("t_embedder", "text_proj", "size_embedder", "ratio_embedder")),
    ("label_table",),
)
# Matrices that are initialized with N(0, 0.02). All others have Xavier's bound, which contains 1 / sqrt(m),
# or are zero.
_NORMAL = (
    ("t_block", "kernel"),
    *((name, "fc2", "kernel") for name in ("t_embedder", "text_proj", "size_embedder", "ratio_embedder")),
)
# Deviation of the tables.
_TABLES = 0.02


def multiplier(model: Any) -> float:
    """m, or 1 without muP.

    Args:
      model: a `BackboneConfig`.
    """
    return model.hidden_size / model.mup_base_width if model.mup_base_width else 1.0


def kind(path: tuple[str, ...]) -> str:
    """The kind of a parameter, a row of the table above.

    Args:
      path: its names, such as ("blocks", "stacked", "attn", "qkv", "kernel").
    """
    if path == READOUT:
        return "readout"
    if path in _INPUTS:
        return "input"
    if path[-1] == "scale_shift_table":
        return "table"
    if path[-1] != "kernel" or "compression" in path:  # a compression has a filter for each channel
        return "vector"
    return "matrix"


def parametrize(network: nnx.Module, model: Any) -> None:
    """Changes the initial values of a new network, and marks the arrays with another learning rate.

    Does nothing without muP. The factor of the learning rate is the metadata `rate` of a parameter.
    """
    if not model.mup_base_width:
        return
    for path, _ in nnx.to_flat_state(nnx.state(network, nnx.Param)):
        variable = _find(network, path)
        variable.set_value(variable[...] * _init_factor(path, model))
        if kind(path) == "matrix":
            variable.set_metadata(rate=1 / multiplier(model))


def _find(network: nnx.Module, path: tuple[str, ...]) -> nnx.Variable:
    found: Any = network
    for name in path:
        found = getattr(found, name)
    return found


def _init_factor(path: tuple[str, ...], model: Any) -> float:
    """What the initial values without muP, at the width of the model, are multiplied by."""
    if path[-1] == "bias":
        return 0.0
    if kind(path) == "table":
        return _TABLES * math.sqrt(model.hidden_size)
    if path in _NORMAL:
        return multiplier(model) ** -0.5
    if path == _PATCHES:
        # Xavier's bound of the convolution at the base width, in place of that of the flattened kernel.
        inputs = model.patch_size**2 * model.in_channels
        outputs = model.patch_size**2 * model.mup_base_width
        return math.sqrt((inputs + model.hidden_size) / (inputs + outputs))
    return 1.0


def with_readout(params: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Multiplies the kernel of the last layer: by m for a run with muP, by 1 / m for a plain network."""
    if factor == 1:
        return dict(params)
    last = params[READOUT[0]]
    linear = last[READOUT[1]]
    kernel = jnp.asarray(linear[READOUT[2]]) * factor
    return {**params, READOUT[0]: {**last, READOUT[1]: {**linear, READOUT[2]: kernel}}}


def read_out(x: jax.Array, model: Any) -> jax.Array:
    """The input of the last layer, divided by m."""
    return x / multiplier(model) if model.mup_base_width else x
