"""Saving and restoring, by Orbax. The one module that knows Orbax.

A run directory holds `checkpoints/STEP/{params,ema,optimizer,loader,metadata}`. STEP is the number of
completed updates and equals `state.step`. Each item is read on its own, so that a handover or a sampler reads
the moving average alone. An item that is there but cannot be read raises; nothing falls back to a fresh
start.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding

from pixart_jax.config import CheckpointConfig, TrainConfig, from_dict, to_dict
from pixart_jax.errors import UserError
from pixart_jax.training.state import TrainState, init_params

FOLDER = "checkpoints"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pixart_jax")


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, workdir: str | Path, config: CheckpointConfig):
        self._root = epath.Path(workdir).absolute() / FOLDER
        self._every = config.every
        self._manager = ocp.CheckpointManager(
            self._root,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep,
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
                create=True,
            ),
        )

    def latest_step(self) -> int | None:
        """The newest complete checkpoint, or None for a run that has none."""
        return self._manager.latest_step()

    def due(self, step: int, last_step: int) -> bool:
        return step % self._every == 0 or step == last_step

    def save(self, state: TrainState, loader_state: dict[str, Any], config: TrainConfig) -> None:
        """Starts saving `state` under `state.step`; training goes on while it is written."""
        step = int(state.step)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                ema=ocp.args.StandardSave(state.ema),
                optimizer=ocp.args.StandardSave({"step": state.step, "state": state.opt_state}),
                loader=ocp.args.JsonSave(loader_state),
                metadata=ocp.args.JsonSave(_metadata(config, step)),
            ),
        )

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
        items = {
            "params": target.params,
            "ema": target.ema,
            "optimizer": {"step": target.step, "state": target.opt_state},
        }
        where = self._root / str(step)
        for name in ("params", "ema"):
            _check_shapes(where, name, items[name])
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardRestore(item) for name, item in items.items()},
                    loader=ocp.args.JsonRestore(),
                    metadata=ocp.args.JsonRestore(),
                ),
            )
        except Exception as error:
            raise _unreadable(where, error) from error
        state = TrainState(
            restored["optimizer"]["step"],
            restored["params"],
            restored["ema"],
            restored["optimizer"]["state"],
        )
        if int(state.step) != step:
            raise UserError(f"checkpoint {where} holds step {int(state.step)}: it was renamed or altered.")
        return state, restored["loader"], from_dict(restored["metadata"]["config"])

    def wait(self) -> None:
        """Returns when everything that was started is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


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
    if which not in ("ema", "raw"):
        raise UserError(f"weights '{which}': choose 'ema' or 'raw'.")
    item = "ema" if which == "ema" else "params"
    folder = checkpoint_folder(path)
    config = read_config(folder)
    if not (folder / item).exists():
        raise UserError(f"checkpoint {folder} holds no '{which}' weights: take --weights=ema.")
    # The first device that this process can reach: a checkpoint of a pod opens on a laptop.
    device = SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        jax.eval_shape(lambda: init_params(config.model, 0)),
    )
    _check_shapes(folder, item, target)
    try:
        with ocp.StandardCheckpointer() as reader:
            return reader.restore(folder / item, target), config
    except Exception as error:
        raise _unreadable(folder / item, error) from error


def write_weights(path: str | Path, params: dict[str, Any], config: TrainConfig) -> None:
    """Writes weights without optimizer as a checkpoint of step 0; all of it or nothing.

    Args:
      path: a folder that does not exist yet.
      params: nested dict of arrays in the tree of `config.model`.
      config: what is stored with them.

    Raises:
      UserError: the folder exists.
    """
    path = epath.Path(path).absolute()
    if path.exists():
        raise UserError(f"output {path} exists: remove it or choose another.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial"
    if partial.exists():
        shutil.rmtree(partial)
    try:
        with ocp.CheckpointManager(
            partial / FOLDER, options=ocp.CheckpointManagerOptions(create=True)
        ) as manager:
            manager.save(
                0,
                args=ocp.args.Composite(
                    ema=ocp.args.StandardSave(params),
                    metadata=ocp.args.JsonSave(_metadata(config, 0)),
                ),
            )
            manager.wait_until_finished()
        partial.rename(path)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def checkpoint_folder(path: str | Path) -> epath.Path:
    """The folder of one checkpoint in or at `path`; the newest step of a run directory."""
    path = epath.Path(path).absolute()
    if (path / "metadata").exists():
        return path
    root = path / FOLDER
    steps = []
    if root.exists():
        # A step that is still being written has a temporary name.
        steps = [int(child.name) for child in root.iterdir() if child.name.isdigit()]
    if not steps:
        raise UserError(f"'{path}' holds no checkpoint: give a run directory with {FOLDER}/STEP in it.")
    return root / str(max(steps))


def read_config(folder: epath.Path) -> TrainConfig:
    """The config stored in one checkpoint's folder."""
    file = folder / "metadata" / "metadata"
    try:
        return from_dict(json.loads(file.read_text())["config"])
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(file, error) from error


def _metadata(config: TrainConfig, step: int) -> dict[str, Any]:
    """The manifest: enough to say what made the checkpoint."""
    return {
        "step": step,
        "config": to_dict(config),
        "versions": {name: _version(name) for name in _PACKAGES},
        "git_revision": _git_revision(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _git_revision() -> str:
    here = Path(__file__).parent
    try:
        out = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return out.stdout.strip()


def _check_shapes(folder: epath.Path, item: str, target: dict[str, Any]) -> None:
    """Raises one line with the key paths that differ, before anything is read."""
    try:
        with ocp.StandardCheckpointer() as reader:
            saved = reader.metadata(folder / item).item_metadata.tree
    except Exception as error:
        raise _unreadable(folder / item, error) from error
    shapes = [
        {
            ".".join(str(key.key) for key in path): tuple(leaf.shape)
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        }
        for tree in (saved, target)
    ]
    found, wanted = shapes
    differences = [
        f"{name} is {found.get(name, 'absent')}, the config wants {wanted.get(name, 'none')}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise UserError(
            f"checkpoint {folder} is of another model: {'; '.join(differences[:3])}{more}. Use the config it "
            "was made with, or another --workdir."
        )


def _unreadable(path: Any, error: Exception) -> UserError:
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    return UserError(
        f"checkpoint {path} is there but cannot be read ({reason[:300]}): remove that step to continue from "
        "the one before it."
    )
