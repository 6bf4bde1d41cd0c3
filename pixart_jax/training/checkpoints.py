"""Saves and restores the training state of a run with Orbax.

The layout on disk is described in `weights/checkpoints.py`. The folder of a checkpoint is named after
`state.step`. Until it is complete it has a temporary name or, in a bucket, no commit marker, so an unfinished
checkpoint is never mistaken for a finished one.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from pixart_jax.config import CheckpointConfig, TrainConfig, from_dict
from pixart_jax.denoiser import NETWORK
from pixart_jax.errors import EXIT_DIVERGED, EXIT_STORAGE, RunStopped, UserError, system_reason, writing
from pixart_jax.files import is_bucket, locked, remove_leftovers
from pixart_jax.readers import check_regular
from pixart_jax.training.distributed import Cluster
from pixart_jax.training.objectives import Params
from pixart_jax.training.state import TrainState, merge
from pixart_jax.weights.checkpoints import (
    FOLDER,
    absolute,
    check_name,
    check_shapes,
    check_sums,
    finished_steps,
    make_metadata,
    not_finite,
    read_back,
    read_metadata,
    reason,
    saved_arrays,
    unreadable,
)


def lock_run(workdir: epath.Path, cluster: Cluster, stack: contextlib.ExitStack) -> None:
    """Locks a run directory until `stack` is closed, so that a second run does not overwrite it.

    Process 0 locks it for all processes of the run. A bucket has no locks; then a line says so. Files that a
    killed run has left half-written are removed.

    Args:
      workdir: run directory; created if it does not exist.
      cluster: processes of the run.
      stack: releases the lock.

    Raises:
      UserError: if another run uses the directory, or Orbax cannot write to a folder of its name.
      OutputError: if the directory cannot be written.
    """
    check_name(workdir)
    if "://" in str(workdir):
        cluster.say(f"{workdir} cannot be locked, as it is in a bucket: make sure that no other run uses it")
    elif cluster.first:
        taken = f"run directory '{workdir}' is used by another run"
        fix = "wait until that run ends, or choose another --workdir."
        stack.enter_context(locked(workdir / "lock", taken, fix, cluster.say))
        remove_leftovers(Path(workdir).absolute())


# Orbax moves an old checkpoint to this folder, in one call, before its files are removed. A kill during the
# removal thus leaves no incomplete checkpoint that looks finished. The name is that of an unfinished
# checkpoint, so that the next start removes what is left.
_REMOVED = "removed.orbax-checkpoint-tmp"


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        # Orbax calls this only to write to its log, but from a thread and with old steps. Its own
        # implementation would set back the step counter of JAX's preemption service, which could then choose
        # a step to stop at that has already passed.
        return False

    def _finalize(self, step: int, steps_to_remove: list[int]) -> None:
        # In a background thread: completes a checkpoint, then moves those that are no longer kept.
        super()._finalize(step, steps_to_remove)
        if jax.process_index() == 0:
            (self.directory / _REMOVED).rmtree(missing_ok=True)


class Checkpoints:
    """The checkpoints in a run directory, which is local or in a bucket.

    A context manager, which at its end waits until the last checkpoint is written.

    Args:
      workdir: run directory.
      config: when to save and which checkpoints to keep.

    Raises:
      UserError: if a package for a bucket is missing, or a checkpoint holds a pipe or a device.
      OutputError: if the directory cannot be written.
    """

    def __init__(self, workdir: str | Path, config: CheckpointConfig):
        self._root = absolute(workdir) / FOLDER
        self._every = config.every
        keep = ocp.checkpoint_managers
        policies = [keep.LatestN(config.keep)]
        if config.keep_every:
            policies.append(keep.EveryNSteps(config.keep_every))
        if config.keep_best:
            policies.append(
                keep.BestN(
                    get_metric_fn=_negative_loss, n=config.keep_best, keep_checkpoints_without_metrics=False
                )
            )
        try:
            with writing(self._root):
                # Orbax would find a file of this name only when it saves, after hours of training.
                self._root.mkdir(parents=True, exist_ok=True)
                for step in finished_steps(self._root):
                    _check_top(self._root / str(step))
                self._manager = _Manager(
                    self._root,
                    options=ocp.CheckpointManagerOptions(
                        preservation_policy=keep.AnyPreservationPolicy(policies),
                        # Orbax stores the metrics only if `best_fn` is set. Which checkpoints it keeps is
                        # decided by the preservation policy.
                        best_fn=_negative_loss if config.keep_best else None,
                        enable_async_checkpointing=True,
                        cleanup_tmp_directories=True,
                        # In a bucket, nothing can be moved in one call.
                        todelete_subdir=None if is_bucket(self._root) else _REMOVED,
                        create=True,
                    ),
                )
        except ImportError as error:
            raise UserError(
                f"run directory {self._root.parent} needs another package ({reason(error)}): install it, or "
                "choose another --workdir."
            ) from error

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None if there is none."""
        return self._manager.latest_step()

    def due(self, step: int, last_step: int) -> bool:
        return step % self._every == 0 or step == last_step

    def save(
        self,
        state: TrainState,
        loader_state: dict[str, Any],
        config: TrainConfig,
        validation_loss: float | None = None,
    ) -> None:
        """Starts saving `state` as the checkpoint `state.step`. It is written while training continues.

        The first checkpoint of a run is written and read back before this returns.

        Args:
          state: training state.
          loader_state: position of the data loader, as JSON.
          config: config to store with the checkpoint.
          validation_loss: metric for `keep_best`.

        Raises:
          RunStopped: if this checkpoint or the previous one cannot be written, the first cannot be read, or a
            parameter is not finite.
        """
        step, first = int(state.step), self._manager.latest_step() is None
        items, where = _Layout2.items(state), self._root / str(step)
        # The step skips updates whose loss or gradient is not finite. Before the next step, only this shows
        # that a finite gradient has led to an infinite parameter.
        if array := not_finite({"trained": state.trained, **state.ema}):
            raise RunStopped(
                f"array {array} has values that are NaN or infinite at step {step}: this checkpoint is not "
                "saved, and earlier ones are intact. Run the same command with a lower learning rate.",
                EXIT_DIVERGED,
                everywhere=True,
            )
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(item) for name, item in items.items()},
                    loader=ocp.args.JsonSave(loader_state),
                    metadata=ocp.args.JsonSave(make_metadata(where, config, step, items, loader_state)),
                ),
                metrics=None if validation_loss is None else {"validation_loss": validation_loss},
            )
            if first:
                self._manager.wait_until_finished()
        except Exception as error:
            raise self._unwritten(error) from error
        if first:
            try:
                read_back(where, items)
            except UserError as error:
                raise RunStopped(
                    f"the first checkpoint of this run cannot be read back, so later ones would be lost too "
                    f"({reason(error.__cause__)}): remove {where} and choose another --workdir.",
                    EXIT_STORAGE,
                    collective=True,
                ) from error

    def restore(self, step: int, target: TrainState) -> tuple[TrainState, dict[str, Any], TrainConfig]:
        """Restores a checkpoint with the shardings of `target`; it may have been saved on another mesh.

        Args:
          step: one of the saved steps.
          target: a `TrainState` of `jax.ShapeDtypeStruct` with shardings.

        Returns:
          The state, the loader state, and the config that was stored with them.

        Raises:
          UserError: if the checkpoint cannot be read or its arrays differ from those of `target`.
        """
        where = self._root / str(step)
        metadata = read_metadata(where)
        # Version 0.1 stored the state in another layout.
        layout = _Layout1 if metadata.get("format", 1) == 1 else _Layout2
        items = layout.items(target)
        _check_structure(where, items, metadata["checksums"])
        for name, item in items.items():
            if name != "optimizer":
                saved = saved_arrays(where, name)
                check_shapes(where, item, saved)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardRestore(item) for name, item in items.items()},
                    loader=ocp.args.JsonRestore(),
                ),
            )
        except Exception as error:
            failure = unreadable(where, error)
            # All processes read together, and a dead process makes Orbax raise the same exceptions as a
            # damaged file. The watchdog checks for the former first.
            failure.collective = True
            raise failure from error
        for name in items:
            check_sums(where / name, restored[name], metadata["checksums"][name])
        if metadata["loader"] != restored["loader"]:
            raise unreadable(where / "loader", ValueError("it differs from what was saved"))
        state = layout.state(restored, target)
        if int(state.step) != step:
            raise UserError(
                f"checkpoint {where} contains step {int(state.step)}: its folder was renamed or its files "
                "were modified. Restore the original, or remove it to resume from an earlier checkpoint."
            )
        return state, restored["loader"], from_dict(metadata["config"])

    def check(self) -> None:
        """Raises a `RunStopped` if a background write has failed."""
        try:
            self._manager.check_for_errors()
        except Exception as error:
            raise self._unwritten(error) from error

    def wait(self) -> None:
        """Waits until all checkpoints are written. Raises like `check`."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._unwritten(error) from error

    def close(self) -> None:
        """Waits until all checkpoints are written."""
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        """Waits for the checkpoint that is being written, also if the run stops because it diverged.

        It does not wait if this process alone has failed, because all processes finish a checkpoint together,
        nor after Ctrl-C.
        """
        if error is None:
            self.close()
        elif getattr(error, "everywhere", False) or (
            jax.process_count() == 1 and isinstance(error, Exception)
        ):
            with contextlib.suppress(Exception):  # `error` has the reason why the run ends
                self.close()

    def _unwritten(self, error: Exception) -> RunStopped:
        # List the directory, because the manager counts a step as saved as soon as it starts to write it.
        steps = finished_steps(self._root)
        newest = f"step {max(steps)}" if steps else "the beginning"
        return RunStopped(
            f"a checkpoint could not be written to {self._root} ({system_reason(error)}): free disk space "
            f"or fix the folder, then run the same command again; it resumes from {newest}.",
            EXIT_STORAGE,
            collective=True,
        )


def _check_top(folder: epath.Path) -> None:
    """Checks the files directly in the folder of a checkpoint, which Orbax reads when a run starts."""
    try:
        check_regular(folder, recursive=False)
    except ValueError as error:
        raise unreadable(folder, error) from error


def _check_structure(where: epath.Path, items: dict[str, Any], saved: dict[str, dict[str, int]]) -> None:
    """Raises a `UserError` if the items of a checkpoint, or the arrays of the optimizer, are not `items`.

    The comparison reads no arrays, so files that are damaged have no part in it.
    """
    if items.keys() != saved.keys():
        raise UserError(
            f"checkpoint {where} is of another model: it holds {', '.join(sorted(saved))}, the config needs "
            f"{', '.join(sorted(items))}. Use the config it was made with, or another --workdir."
        )
    leaves = jax.tree_util.tree_flatten_with_path(items["optimizer"])[0]
    wanted = {jax.tree_util.keystr(path) for path, _ in leaves}
    differences = [
        f"{name} is {'absent' if name in wanted else 'not used by this config'}"
        for name in sorted(wanted ^ saved["optimizer"].keys())
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise UserError(
            f"checkpoint {where} is of another optimizer: {'; '.join(differences[:3])}{more}. Use the "
            "optimizer.name and optimizer.clip_norm it was made with, or another --workdir."
        )


def _negative_loss(metrics: dict[str, float]) -> float:
    return -metrics["validation_loss"]


class _Layout2:
    """The items of checkpoints in the current format."""

    @staticmethod
    def items(state: TrainState) -> dict[str, Any]:
        taken = {"trained", "frozen", "optimizer", "loader", "metadata"} & set(state.ema)
        if taken:
            raise ValueError(f"a moving average cannot be called '{taken.pop()}': checkpoints use that name")
        items = {
            "trained": state.trained,
            **state.ema,
            "optimizer": {
                "step": state.step,
                "state": state.optimizer,
                "loss_average": state.loss_average,
            },
        }
        return items | ({"frozen": state.frozen} if state.frozen else {})

    @staticmethod
    def state(items: dict[str, Any], target: TrainState) -> TrainState:
        optimizer = items["optimizer"]
        return TrainState(
            step=optimizer["step"],
            trained=items["trained"],
            frozen=items["frozen"] if target.frozen else {},
            ema={name: items[name] for name in target.ema},
            optimizer=optimizer["state"],
            loss_average=optimizer["loss_average"],
        )


class _Layout1:
    """The items of checkpoints of version 0.1, which hold all parameters of a single, unnamed network."""

    @staticmethod
    def items(state: TrainState) -> dict[str, Any]:
        if set(state.trained) != {NETWORK} or set(state.ema) != {"ema"}:
            raise UserError(
                "the checkpoint was written by version 0.1, which trained a single network: use another "
                "--workdir for this objective."
            )
        return {
            "params": merge(state.trained, state.frozen)[NETWORK],
            "ema": merge(state.ema["ema"], state.frozen)[NETWORK],
            "optimizer": {
                "step": state.step,
                "state": _without_name(state.optimizer),
                "loss_average": state.loss_average,
            },
        }

    @staticmethod
    def state(items: dict[str, Any], target: TrainState) -> TrainState:
        optimizer = items["optimizer"]
        params, ema = {NETWORK: items["params"]}, {NETWORK: items["ema"]}
        return TrainState(
            step=optimizer["step"],
            trained=_part(params, target.trained),
            frozen=_part(params, target.frozen),
            ema={"ema": _part(ema, target.trained)},
            # The trees differ only by a dict with one entry around the parameters, which does not change the
            # order of the leaves.
            optimizer=jax.tree.unflatten(
                jax.tree.structure(target.optimizer), jax.tree.leaves(optimizer["state"])
            ),
            loss_average=optimizer["loss_average"],
        )


def _without_name(tree: Any) -> Any:
    """Replaces every {"network": x} in the state of an optimizer by x."""

    def is_named(node: Any) -> bool:
        return isinstance(node, dict) and set(node) == {NETWORK}

    return jax.tree.map(lambda node: node[NETWORK] if is_named(node) else node, tree, is_leaf=is_named)


def _part(params: Params, like: Params) -> Params:
    """Returns the arrays of `params` at the paths of `like`."""
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({path: flat[path] for path in traverse_util.flatten_dict(like)})
