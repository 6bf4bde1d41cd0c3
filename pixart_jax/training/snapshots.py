"""Writes snapshots of the power-function averages of a run, from which `evaluate ema` reconstructs others.

The layout on disk is described in `weights/snapshots.py`. Until a snapshot is complete, its folder has a
temporary name or, in a bucket, no commit marker.
"""

from __future__ import annotations

from pathlib import Path

import orbax.checkpoint as ocp

from pixart_jax.config import TrainConfig
from pixart_jax.denoiser import NETWORK
from pixart_jax.errors import EXIT_STORAGE, RunStopped, system_reason, writing
from pixart_jax.training.state import TrainState
from pixart_jax.weights.checkpoints import absolute, finished_steps, make_metadata
from pixart_jax.weights.power_averages import SNAPSHOTS, PowerAverage


class Snapshots:
    """The snapshots in a run directory, which is local or in a bucket.

    None is ever removed, except those of later steps than the checkpoint from which a run continues: the run
    writes them again, or has another history than they have.

    Args:
      workdir: run directory.
      config: config of the stage.
      first_step: step from which the run continues.
      active: whether this process removes snapshots; one process of a run does.

    Raises:
      OutputError: if the directory cannot be written.
    """

    def __init__(self, workdir: str | Path, config: TrainConfig, first_step: int, active: bool = True):
        self._root = absolute(workdir) / SNAPSHOTS
        self._config = config
        with writing(self._root):
            if config.checkpoint.snapshot_every:
                self._root.mkdir(parents=True, exist_ok=True)
            if active:
                unfinished = list(self._root.glob("*.orbax-checkpoint-tmp*")) if self._root.exists() else []
                later = [step for step in finished_steps(self._root) if step > first_step]
                for path in [*unfinished, *(self._root / str(step) for step in later)]:
                    path.rmtree()

    def due(self, step: int) -> bool:
        """Returns whether averages are stored after `step` updates, as they are after the last if new."""
        every = self._config.checkpoint.snapshot_every
        last = step == self._config.steps and step % self._config.optimizer.ema_every == 0
        return every > 0 and (step % every == 0 or last)

    def save(self, state: TrainState, step: int) -> None:
        """Writes the averages of the main network in float32, before this returns.

        A checkpoint of the same step must be saved afterwards: a run that continues from it does not write
        the snapshot again.

        Args:
          state: training state.
          step: number of updates, `state.step`.

        Raises:
          RunStopped: if they cannot be written.
        """
        names = [PowerAverage(width).name for width in self._config.optimizer.power_widths]
        items = {name: {NETWORK: state.ema[name][NETWORK]} for name in names}
        folder = self._root / str(step)
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
                writer.save(
                    folder,
                    ocp.args.Composite(
                        **{name: ocp.args.StandardSave(item) for name, item in items.items()},
                        metadata=ocp.args.JsonSave(make_metadata(folder, self._config, step, items)),
                    ),
                    force=True,
                )
        except Exception as error:
            raise RunStopped(
                f"snapshot {folder} could not be written ({system_reason(error)}): free disk space or fix "
                "the folder, then run the same command again; it resumes from the newest checkpoint.",
                EXIT_STORAGE,
                collective=True,
            ) from error
