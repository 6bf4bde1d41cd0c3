"""Skips updates whose loss or gradient is not finite, or whose loss is a spike.

The decision is part of the compiled step and depends only on the training state and the batch, so a resumed
run makes the same decisions. Whether the run then stops or continues is decided on the host, which knows the
keys of the batch's records.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from pixart_jax.config import DivergenceConfig
from pixart_jax.errors import EXIT_DIVERGED, RunStopped
from pixart_jax.files import replace_text
from pixart_jax.readers import lines_until

# Decay of the running average of the loss, after its first steps.
AVERAGE_DECAY = 0.99
FILE = "refused_updates.jsonl"


class StepRecord(NamedTuple):
    """What the host keeps of a step until it reads the metrics; `keys` are those of this process's rows."""

    step: int
    keys: list[str]
    metrics: dict[str, jax.Array]


def refuse(
    config: DivergenceConfig, step: jax.Array, loss: jax.Array, gradient_norm: jax.Array, average: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Decides whether an update is skipped.

        refused  = loss or |g| is not finite, or loss > factor * average (after the warm-up)
        average += (1 - d) (loss - average), d = min(0.99, (1 + step) / (10 + step)), unless refused

    Args:
      config: spike factor and warm-up.
      step: [] number of updates before this one.
      loss, gradient_norm: [] loss and gradient norm of this update.
      average: [] running average of the loss, 0 before the first step.

    Returns:
      refused: [] bool, whether to skip the update.
      average: [] the new running average.
    """
    refused = ~(jnp.isfinite(loss) & jnp.isfinite(gradient_norm))
    if config.spike_factor:
        refused |= (step >= config.spike_warmup) & (loss > config.spike_factor * average)
    n = step.astype(jnp.float32)
    decay = jnp.minimum(AVERAGE_DECAY, (1.0 + n) / (10.0 + n))
    return refused, jnp.where(refused, average, average + (1.0 - decay) * (loss - average))


class DivergenceGuard:
    """Logs skipped updates and stops the run if necessary. All processes act alike, and make it together.

    Args:
      config: whether and when to stop.
      workdir: run directory; `refused_updates.jsonl` in it gets one line per skipped update.
      gather: (name, value of this process) -> values of all processes.
      first: whether this process writes the file.
      first_step: step from which this start resumes. Skipped updates right before it count as in a row.
    """

    def __init__(
        self,
        config: DivergenceConfig,
        workdir: epath.Path,
        gather: Callable[[str, str], list[str]],
        first: bool = True,
        first_step: int = 0,
    ):
        self._config, self._path = config, workdir / FILE
        self._gather, self._first = gather, first
        self._in_a_row = int(gather("refused in a row", str(self._refused_before(first_step)))[0])

    def _refused_before(self, first_step: int) -> int:
        """How many updates in a row were skipped right before `first_step`, as far as this process knows."""
        lines = lines_until(self._path, first_step) if self._first and first_step else []
        refused = {json.loads(line)["step"] for line in lines}
        return next(count for count in itertools.count() if first_step - count not in refused)

    def means(self, pending: list[StepRecord]) -> dict[str, float]:
        """Returns the mean of each metric over the given steps, without those whose update was skipped.

        Raises:
          RunStopped: if an update was skipped and `config.action` is 'stop', or if too many were skipped in a
            row.
        """
        fetched = [jax.device_get(record.metrics) for record in pending]
        for record, metrics in zip(pending, fetched):
            if not metrics["refused"]:
                self._in_a_row = 0
                continue
            self._in_a_row += 1
            self._log(record, metrics)
            loss, average = metrics["loss"], metrics["loss_average"]
            why = f"loss {loss:.6g} (running average {average:.6g}) at step {record.step}"
            if self._config.action == "stop":
                raise RunStopped(
                    f"{why}: the update was not applied. The keys of the batch are in {self._path}; earlier "
                    "checkpoints are intact. Remove bad records, lower the learning rate, or set "
                    "divergence.action=skip.",
                    EXIT_DIVERGED,
                    everywhere=True,
                )
            if self._in_a_row >= self._config.patience:
                raise RunStopped(
                    f"{why}: {self._in_a_row} updates in a row were skipped. Resume from the last checkpoint "
                    "before them with a lower learning rate.",
                    EXIT_DIVERGED,
                    everywhere=True,
                )
        kept = [metrics for metrics in fetched if not metrics["refused"]] or fetched
        # Steps before and after a change of the objective have different terms.
        names = dict.fromkeys(name for metrics in kept for name in metrics)
        means = {
            name: float(np.mean([metrics[name] for metrics in kept if name in metrics])) for name in names
        }
        return means | {"refused": float(sum(metrics["refused"] for metrics in fetched))}

    def _log(self, record: StepRecord, metrics: dict[str, Any]) -> None:
        parts = self._gather(f"refused/{record.step}", json.dumps(record.keys))
        if not self._first:
            return
        line = {
            "step": record.step,
            **{name: str(metrics[name]) for name in ("loss", "loss_average", "gradient_norm")},
            "keys": sorted({key for part in parts for key in json.loads(part)}),
        }
        # Rewrite the file, because objects in a bucket cannot be appended to; there are few lines. A resumed
        # run repeats steps, which must not appear twice.
        before = lines_until(self._path, record.step - 1)
        replace_text(self._path, "".join(before) + json.dumps(line) + "\n")
