"""AdamW as PixArt-α is trained, Muon in its place, and the moving average of the weights."""

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
    """Linear warm-up to a constant rate; with sqrt scaling, rate * sqrt(batch / reference batch)."""
    rate = config.learning_rate
    if config.sqrt_scaling_batch:
        rate *= math.sqrt(batch_size / config.sqrt_scaling_batch)
    if not config.warmup_steps:
        return optax.constant_schedule(rate)
    return optax.linear_schedule(0.0, rate, config.warmup_steps)


def make_optimizer(
    config: OptimizerConfig, batch_size: int, objective: Objective | None = None
) -> optax.GradientTransformation:
    """Clip by the global norm, then AdamW with decay on every parameter (biases and tables too), or Muon.

    Muon (Jordan et al. 2024) steps along the orthogonalized momentum of a matrix, scaled to the root mean
    square of an AdamW step (arXiv 2502.16982, section 2.2), so that rate and decay mean the same in both. It
    takes the matrices of the blocks, AdamW everything else.

    Args:
      config: of the stage.
      batch_size: samples per update, which may scale the learning rate.
      objective: of its trained parameters, Muon takes those that are `matrices`; AdamW needs none.
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
    """For the path of each trained parameter, the axes that make a matrix if Muon is to train it, else None.

    Those are the kernels of linear layers within a stack of blocks, as `layers.linear` marks them. Embeddings
    and last layers are matrices, too, but Muon is not for them (Jordan et al. 2024).
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

    The average starts from the initial weights; the rising decay lets it forget them.

    Args:
      ema, params: trees of equal structure.
      decay: the final decay.
      step: updates completed before this one.
    """
    step = step.astype("float32")
    decay = jax.numpy.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda average, value: average + (1.0 - decay) * (value - average), ema, params)
