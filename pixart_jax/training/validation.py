"""The validation loss of a run, on held-out records with fixed noise and a fixed grid of timesteps."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from pixart_jax.config import TrainConfig
from pixart_jax.data.loader import Dataset
from pixart_jax.training import distributed, sharding
from pixart_jax.training.data import held_out_batches
from pixart_jax.training.objectives import Objective, Params


def make_validation(
    config: TrainConfig, objective: Objective, mesh: jax.sharding.Mesh, held_out: Dataset
) -> Callable[[Params], dict[str, float]]:
    """Makes a function params -> validation losses: the mean, and the mean in each part of the timesteps.

    Each record belongs to one part of the timesteps. With fewer than eight records, some parts have no
    records and therefore no loss.
    """
    step = jax.jit(objective.validation, out_shardings=sharding.replicated(mesh))
    part, parts = distributed.batch_part(mesh, config.data.batch_size // config.optimizer.accumulation)
    batches = list(held_out_batches(config, held_out, part, parts, objective.arrays))

    def validate(params: Params) -> dict[str, float]:
        sums = [step(params, sharding.global_batch(mesh, batch.arrays)) for batch in batches]
        loss, count = (np.sum(jax.device_get(part), axis=0) for part in zip(*sums))
        by_part = {
            f"validation_loss_part_{part}": float(loss[part] / count[part]) for part in np.flatnonzero(count)
        }
        return {"validation_loss": float(loss.sum() / count.sum()), **by_part}

    return validate
