"""AdamW with the settings of PixArt-α, Muon as an alternative, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

from pixart_jax.config import OptimizerConfig
from pixart_jax.training.objectives import Objective


def learning_rate_schedule(config: OptimizerConfig, batch_size: int) -> optax.Schedule:
    """Linear warm-up to a constant learning rate, scaled by sqrt(batch_size / `sqrt_scaling_batch`)."""
    rate = config.learning_rate
    if config.sqrt_scaling_batch:
        rate *= math.sqrt(batch_size / config.sqrt_scaling_batch)
    if not config.warmup_steps:
        return optax.constant_schedule(rate)
    return optax.linear_schedule(0.0, rate, config.warmup_steps)


def make_optimizer(
    config: OptimizerConfig, batch_size: int, objective: Objective | None = None
) -> optax.GradientTransformation:
    """Makes the optimizer: clipping by global norm, followed by AdamW or Muon.

    Weight decay applies to all parameters, including biases and tables, as in the official code.

    The update of Muon (Jordan et al. 2024) is the orthogonalized momentum of a matrix, scaled to the root
    mean square of an AdamW update (arXiv 2502.16982, section 2.2), so that learning rate and weight decay
    have the same meaning as in AdamW. Muon trains the matrices of the blocks, AdamW all other parameters.

    Args:
      config: config of the optimizer.
      batch_size: samples per update, by which the learning rate may be scaled.
      objective: defines the trained parameters; Muon trains those in `matrices`. AdamW does not need it.
    """
    rate = learning_rate_schedule(config, batch_size)
    optimizer = optax.adamw(
        rate, b1=config.beta1, b2=config.beta2, eps=config.eps, weight_decay=config.weight_decay
    )
    if config.name == "muon":
        axes = matrices(objective)

        def at(tree: Any, choose: Callable[[Any], Any]) -> Any:
            return jax.tree_util.tree_map_with_path(
                lambda path, _: choose(axes[tuple(key.key for key in path)]), tree
            )

        muon = optax.contrib.muon(
            rate,
            beta=config.momentum,
            weight_decay=config.weight_decay,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=lambda params: at(params, lambda found: found),
        )
        optimizer = optax.partition(
            {"muon": muon, "adamw": optimizer},
            lambda params: at(params, lambda found: "muon" if found else "adamw"),
        )
    if not config.clip_norm:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


def matrices(
    objective: Objective,
) -> dict[tuple[str, ...], optax.contrib.MuonDimensionNumbers | None]:
    """Returns, for the path of each trained parameter, its matrix axes if Muon trains it, else None.

    Muon trains the kernels of linear layers inside the stack of blocks, which `layers.linear` marks.
    Embeddings and last layers are matrices too, but should not be trained with Muon (Jordan et al. 2024).
    """
    found = {}
    for network, state in objective.abstract_networks().items():
        for path, variable in nnx.to_flat_state(state):
            metadata = variable.get_metadata()
            matrix, logical = metadata.get("matrix"), metadata.get("out_sharding") or ()
            if objective.is_trained((network, *path)):
                found[network, *path] = (
                    optax.contrib.MuonDimensionNumbers(
                        *(tuple(len(variable.shape) + axis for axis in axes) for axes in matrix)
                    )
                    if matrix and "layers" in logical
                    else None
                )
    return found


@jax.named_scope("ema")
def update_ema(ema: dict, params: dict, decay: float, step: jax.Array) -> dict:
    """ema += (1 - d) (params - ema), d = min(decay, (1 + step) / (10 + step)), in float32.

    The average starts from the initial weights. The decay increases from 0.1 to `decay`, so that the initial
    weights are soon forgotten.

    Args:
      ema, params: trees of the same structure.
      decay: final decay.
      step: [] number of updates before this one.
    """
    step = step.astype("float32")
    decay = jax.numpy.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda average, value: average + (1.0 - decay) * (value - average), ema, params)
