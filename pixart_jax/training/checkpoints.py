"""Saving and restoring, by Orbax. The one module that knows Orbax.

A run directory holds `checkpoints/STEP/{params,ema,optimizer,loader,metadata}`. STEP is the number of
completed updates and equals `state.step`. Each item is read on its own, so that a handover or a sampler reads
the moving average alone. An item that is there but cannot be read, or whose arrays are not those that were
saved, raises; nothing falls back to a fresh start.

What is being written has a temporary name (in a bucket: no commit mark) and is never taken for a checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding

from pixart_jax.config import CheckpointConfig, TrainConfig, from_dict, to_dict
from pixart_jax.errors import EXIT_STORAGE, RunStopped, UserError, one_of
from pixart_jax.files import sha256_of_json
from pixart_jax.training.state import TrainState, init_params
from pixart_jax.versions import git_revision, package_versions

FOLDER = "checkpoints"


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        # Orbax asks this for its log, from a thread and with old steps, which would move JAX's count of the
        # steps back and could make it choose a step to stop at that has already gone by.
        return False


class Checkpoints:
    """The checkpoints of one run directory, local or in a bucket.

    Raises:
      UserError: the directory cannot be written.
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
            self._manager = _Manager(
                self._root,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=keep.AnyPreservationPolicy(policies),
                    # Makes Orbax keep the metrics; what stays is up to the policy.
                    best_fn=_negative_loss if config.keep_best else None,
                    enable_async_checkpointing=True,
                    cleanup_tmp_directories=True,
                    create=True,
                ),
            )
        except (OSError, ImportError) as error:
            raise UserError(
                f"run directory {self._root.parent} cannot be written ({_reason(error)}): choose "
                "another --workdir, or change its permissions."
            ) from error

    def latest_step(self) -> int | None:
        """The newest complete checkpoint, or None for a run that has none."""
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
        """Starts saving `state` under `state.step`; training goes on while it is written.

        Raises:
          RunStopped: this checkpoint, or the one before it, cannot be written.
        """
        step = int(state.step)
        items = _items(state)
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(item) for name, item in items.items()},
                    loader=ocp.args.JsonSave(loader_state),
                    metadata=ocp.args.JsonSave(_metadata(config, step, items, loader_state)),
                ),
                metrics=None if validation_loss is None else {"validation_loss": validation_loss},
            )
        except Exception as error:
            raise self._unwritten(error) from error

    def restore(self, step: int, target: TrainState) -> tuple[TrainState, dict[str, Any], TrainConfig]:
        """Reads a checkpoint onto the shardings of `target`, whatever mesh it was written from.

        Args:
          step: one of the saved steps.
          target: a `TrainState` of `jax.ShapeDtypeStruct` with shardings.

        Returns:
          state, loader state, and the config it was saved with.

        Raises:
          UserError: it cannot be read, or its arrays are not those of `target`.
        """
        items = _items(target)
        where = self._root / str(step)
        metadata = _read_metadata(where)
        for name in ("params", "ema"):
            _check_shapes(where, name, items[name])
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardRestore(item) for name, item in items.items()},
                    loader=ocp.args.JsonRestore(),
                ),
            )
        except Exception as error:
            unreadable = _unreadable(where, error)
            unreadable.collective = True
            raise unreadable from error
        for name in items:
            _check_sums(where / name, restored[name], metadata["checksums"][name])
        if metadata["loader"] != restored["loader"]:
            raise _unreadable(where / "loader", ValueError("it is not what was saved"))
        optimizer = restored["optimizer"]
        state = TrainState(
            step=optimizer["step"],
            params=restored["params"],
            ema=restored["ema"],
            opt_state=optimizer["state"],
            loss_average=optimizer["loss_average"],
        )
        if int(state.step) != step:
            raise UserError(f"checkpoint {where} holds step {int(state.step)}: it was renamed or altered.")
        return state, restored["loader"], from_dict(metadata["config"])

    def check(self) -> None:
        """Raises a `RunStopped` if writing in the background has failed."""
        try:
            self._manager.check_for_errors()
        except Exception as error:
            raise self._unwritten(error) from error

    def wait(self) -> None:
        """Returns when everything that was started is on disk; raises as `check`."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._unwritten(error) from error

    def close(self) -> None:
        self._manager.close()

    def _unwritten(self, error: Exception) -> RunStopped:
        # Read from the directory: the manager counts a step as saved when its writing begins.
        steps = finished_steps(self._root)
        newest = f"step {max(steps)}" if steps else "the beginning"
        return RunStopped(
            f"a checkpoint could not be written to {self._root} ({_reason(error)}): make room or mend the "
            f"folder and start the same command again; it continues from {newest}.",
            EXIT_STORAGE,
            collective=True,
        )


def read_weights(path: str | Path, which: str = "ema") -> tuple[dict[str, Any], TrainConfig]:
    """The weights of a run directory (newest step), of one step's folder, or of `write_weights`.

    Args:
      path: `RUN`, `RUN/checkpoints/STEP` or a folder of `write_weights`.
      which: 'ema' (moving average) or 'raw' (the weights that are trained).

    Returns:
      nested dict of float32 arrays on the first device, and the config.

    Raises:
      UserError: there is no checkpoint, or it cannot be read.
    """
    one_of("weights", which, ("ema", "raw"))
    item = "ema" if which == "ema" else "params"
    folder = checkpoint_folder(path)
    config = read_config(folder)
    # Which kernel and dtype a run computed with is no property of its weights, which open on any backend.
    shape = dataclasses.replace(config.model, attention="auto", dtype="float32")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="auto"))
    if not (folder / item).exists():
        raise UserError(f"checkpoint {folder} holds no '{which}' weights: take --weights=ema.")
    # The first device that this process can reach: a checkpoint of a pod opens on a laptop.
    device = SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        jax.eval_shape(lambda: init_params(shape, 0)),
    )
    _check_shapes(folder, item, target)
    try:
        with ocp.StandardCheckpointer() as reader:
            weights = reader.restore(folder / item, target)
    except Exception as error:
        raise _unreadable(folder / item, error) from error
    _check_sums(folder / item, weights, _read_metadata(folder)["checksums"][item])
    return weights, config


def write_weights(path: str | Path, params: dict[str, Any], config: TrainConfig) -> None:
    """Writes weights without optimizer as a checkpoint of step 0; all of it or nothing.

    Args:
      path: a folder that does not exist yet.
      params: nested dict of arrays in the tree of `config.model`.
      config: what is stored with them.

    Raises:
      UserError: the folder exists.
    """
    path = absolute(path)
    if path.exists():
        raise UserError(f"output {path} exists: remove it or choose another.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial"
    if partial.exists():
        partial.rmtree()
    try:
        with ocp.CheckpointManager(
            partial / FOLDER, options=ocp.CheckpointManagerOptions(create=True)
        ) as manager:
            manager.save(
                0,
                args=ocp.args.Composite(
                    ema=ocp.args.StandardSave(params),
                    metadata=ocp.args.JsonSave(_metadata(config, 0, {"ema": params})),
                ),
            )
            manager.wait_until_finished()
        partial.rename(path)
    finally:
        if partial.exists():
            partial.rmtree()


def checkpoint_folder(path: str | Path) -> epath.Path:
    """The folder of one checkpoint in or at `path`; the newest step of a run directory."""
    path = absolute(path)
    if (path / "metadata").exists():
        return path
    root = path / FOLDER
    steps = finished_steps(root)
    if not steps:
        raise UserError(f"'{path}' holds no checkpoint: give a run directory with {FOLDER}/STEP in it.")
    return root / str(max(steps))


def finished_steps(root: epath.Path) -> list[int]:
    """The steps in a folder of checkpoints, without those that are still being written."""
    if not root.exists():
        return []
    return sorted(metadata.step for metadata in ocp.path.step.standard_name_format().find_all(root))


def absolute(path: str | Path) -> epath.Path:
    """The path as one that Orbax takes. `epath` makes nonsense of the absolute path of a bucket."""
    path = epath.Path(path)
    return path if "://" in str(path) else path.absolute()


def read_config(folder: epath.Path) -> TrainConfig:
    """The config stored in one checkpoint's folder."""
    return from_dict(_read_metadata(folder)["config"])


def _read_metadata(folder: epath.Path) -> dict[str, Any]:
    file = folder / "metadata" / "metadata"
    try:
        metadata = json.loads(file.read_text())
        if metadata.pop("sha256") != _hash(metadata):
            raise ValueError("its content does not have the hash it was written with")
        return metadata
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(file, error) from error


def _items(state: TrainState) -> dict[str, Any]:
    return {
        "params": state.params,
        "ema": state.ema,
        "optimizer": {"step": state.step, "state": state.opt_state, "loss_average": state.loss_average},
    }


def _negative_loss(metrics: dict[str, float]) -> float:
    return -metrics["validation_loss"]


def _metadata(
    config: TrainConfig, step: int, items: dict[str, Any], loader_state: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The manifest: enough to say what made the checkpoint, and whether it is still what was made."""
    metadata = {
        "step": step,
        "config": to_dict(config),
        "versions": package_versions(),
        "git_revision": git_revision(),
        "checksums": {name: checksums(item) for name, item in items.items()},
        "loader": loader_state,
    }
    return {**metadata, "sha256": _hash(metadata)}


def _hash(metadata: dict[str, Any]) -> str:
    return sha256_of_json(metadata)


def checksums(tree: Any) -> dict[str, int]:
    """One number per array, by key path: sum over i of (2 i + 1) bits_i, modulo 2^32.

    Sums of integers do not depend on their order, so the numbers are those of any mesh and process count;
    odd factors let no change of a single element pass. Orbax itself does not notice a flipped byte.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    sums = jax.device_get(_sums([leaf for _, leaf in leaves]))
    return {jax.tree_util.keystr(path): int(value) for (path, _), value in zip(leaves, sums)}


@jax.jit
def _sums(arrays: list[jax.Array]) -> list[jax.Array]:
    def one(array: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}").astype(jnp.uint32)
        place = jnp.zeros(array.shape, jnp.uint32)
        for axis in range(array.ndim):
            stride = math.prod(array.shape[axis + 1 :]) % 2**32
            place += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride)
        return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

    return [one(array) for array in arrays]


def _check_sums(folder: epath.Path, tree: Any, saved: dict[str, int]) -> None:
    found = checksums(tree)
    damaged = sorted(name for name in found.keys() | saved.keys() if found.get(name) != saved.get(name))
    if damaged:
        raise _unreadable(folder, ValueError(f"array {damaged[0]} is not what was saved"))


def _check_shapes(folder: epath.Path, item: str, target: dict[str, Any]) -> None:
    """Raises one line with the key paths that differ, before anything is read."""
    try:
        with ocp.StandardCheckpointer() as reader:
            found = reader.metadata(folder / item).item_metadata
        if found is None:
            raise ValueError("the list of its arrays is missing or damaged")
        saved = found.tree
    except Exception as error:
        raise _unreadable(folder / item, error) from error
    shapes = [
        {
            ".".join(str(key.key) for key in path): tuple(leaf.shape)
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        }
        for tree in (saved, target)
    ]
    have, wanted = shapes
    differences = [
        f"{name} is {have.get(name, 'absent')}, the config wants {wanted.get(name, 'none')}"
        for name in sorted(have.keys() | wanted.keys())
        if have.get(name) != wanted.get(name)
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise UserError(
            f"checkpoint {folder} is of another model: {'; '.join(differences[:3])}{more}. Use the config it "
            "was made with, or another --workdir."
        )


def _unreadable(path: Any, error: Exception) -> UserError:
    return UserError(
        f"checkpoint {path} is there but cannot be read ({_reason(error)}): remove that step to continue "
        "from the one before it."
    )


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
