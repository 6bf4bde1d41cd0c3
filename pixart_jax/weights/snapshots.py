"""Post-hoc EMA: reads snapshots of power-function averages, and reconstructs averages of other widths.

A run tracks averages of a few widths (`optimizer.power_ema`) and stores them from time to time
(`checkpoint.snapshot_every`) in `RUN/ema/STEP/NAME`, with `metadata` as in a checkpoint. An average of
another width is approximated by the linear combination of the stored ones whose profile is nearest to its own
(`power_averages.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from jax.sharding import SingleDeviceSharding

from pixart_jax.config import TrainConfig, parse_widths
from pixart_jax.errors import UserError, listing
from pixart_jax.hub import is_hub, local
from pixart_jax.weights.checkpoints import (
    absolute,
    check_shapes,
    check_sums,
    finished_steps,
    not_finite,
    read_item,
    read_metadata,
    read_network,
    saved_arrays,
)
from pixart_jax.weights.power_averages import PREFIX, SNAPSHOTS, Fit, PowerAverage, Profile, fit_profile

# Largest relative error of a profile. A single average of width 0.05 has the error 0.37 as one of 0.075.
LARGEST_ERROR = 0.25


def stored_profiles(run: str | Path, step: int | None = None) -> list[Profile]:
    """Returns the profiles of the averages in the snapshots of a run, up to a step.

    Args:
      run: run directory.
      step: step of one of its snapshots; None for the last.

    Raises:
      UserError: there are no snapshots, or none of this step; or a snapshot cannot be read.
    """
    root = _root(run)
    steps = finished_steps(root)
    if not steps:
        raise UserError(
            f"'{run}' holds no snapshots of power-function averages: give a run directory with {SNAPSHOTS}/"
            "STEP in it, of a run with optimizer.power_ema and checkpoint.snapshot_every."
        )
    if step is not None and step not in steps:
        raise UserError(f"--step is {step}: '{run}' holds snapshots of the steps {listing(steps)}.")
    profiles = []
    for at in steps:
        if step is None or at <= step:
            metadata = read_metadata(root / str(at))
            if metadata["step"] != at:
                raise UserError(
                    f"snapshot {root / str(at)} is of step {metadata['step']}: its folder was renamed. Give "
                    f"it the name {metadata['step']} again."
                )
            names = sorted(name.removeprefix(PREFIX) for name in metadata["checksums"])
            widths = parse_widths(f"the name of the averages in {root / str(at)}", ",".join(names))
            profiles += [Profile(at, width) for width in widths]
    return profiles


def reconstruct(
    run: str | Path, width: float, step: int | None = None
) -> tuple[dict[str, Any], TrainConfig, Fit]:
    """Computes the average of a width from the snapshots of a run.

    Frozen parameters, which have no averages, are those of the newest checkpoint.

    Args:
      run: run directory.
      width: sigma of the average.
      step: as for `stored_profiles`.

    Returns:
      Parameters of the network as the run stores them (see `read_network`), their config, and how the stored
      averages were combined.

    Raises:
      UserError: see `stored_profiles`; no combination of the stored averages comes near to this width; or
        arrays cannot be read, are damaged or not finite.
    """
    run = local(run) if is_hub(run) else run
    stored = stored_profiles(run, step)
    target = Profile(stored[-1].step, width)
    fit = fit_profile(stored, target)
    if fit.error > LARGEST_ERROR:
        steps, widths = ({getattr(each, name) for each in stored} for name in ("step", "width"))
        raise UserError(
            f"width {width:g} cannot be reconstructed, because the best combination of the stored averages "
            f"(steps: {len(steps)}, widths: {listing(sorted(widths))}) has an error of {fit.error:.0%}: "
            "choose a width nearer to these, or a run with more snapshots."
        )
    params, config = read_network(run)
    params = traverse_util.flatten_dict(params)
    totals: dict[tuple[str, ...], np.ndarray] = {}
    for profile, weight in zip(stored, fit.weights):
        folder, name = _root(run) / str(profile.step), PowerAverage(profile.width).name
        for path, leaf in _read_average(folder, name, params).items():
            term = weight * np.asarray(leaf, np.float64)
            totals[path] = totals[path] + term if path in totals else term
    params |= {path: jnp.asarray(total.astype(np.float32)) for path, total in totals.items()}
    return traverse_util.unflatten_dict(params), config, fit


def _read_average(
    folder: epath.Path, name: str, params: dict[tuple[str, ...], Any]
) -> dict[tuple[str, ...], Any]:
    """Reads an average of the main network from a snapshot, on the first device, by path."""
    device = SingleDeviceSharding(jax.local_devices()[0])
    saved = saved_arrays(folder, name)
    own = {path[1:]: leaf for path, leaf in saved.items()}  # without the name of the network
    wanted = {path: leaf for path, leaf in params.items() if path in own}
    check_shapes(folder, traverse_util.unflatten_dict(wanted), own)
    target = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device) for path, leaf in saved.items()
    }
    tree = read_item(folder / name, traverse_util.unflatten_dict(target))
    check_sums(folder / name, tree, read_metadata(folder)["checksums"][name])
    if array := not_finite(tree):
        raise UserError(
            f"snapshot {folder / name}: array {array} has values that are NaN or infinite: give an earlier "
            "--step."
        )
    return {path[1:]: leaf for path, leaf in traverse_util.flatten_dict(tree).items()}


def _root(run: str | Path) -> epath.Path:
    return absolute(run) / SNAPSHOTS
