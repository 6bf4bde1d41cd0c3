"""Metrics of a run: progress bar, `metrics.jsonl` and trackers. Only process 0 writes them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from pixart_jax.config import TrainConfig
from pixart_jax.errors import OutputError, UserError
from pixart_jax.files import LineFile, is_bucket, replace_text
from pixart_jax.readers import lines_until

# Metrics beside the progress bar, and what they are called there.
_SHOWN = {
    "loss": "loss",
    "validation_loss": "val",
    "gradient_norm": "grad",
    "learning_rate": "lr",
    "images_per_second": "img/s",
    "memory_gib": "GiB",
}


def check_trackers(names: Sequence[str]) -> None:
    """Raises a `UserError` if a tracker in `log.tracker` is not installed."""
    for name in names:
        found = importlib.util.find_spec("tensorboardX" if name == "tensorboard" else name)
        # A folder without code, such as the one that wandb makes for its runs, has no origin.
        if found is None or found.origin is None:
            raise UserError(
                f"log.tracker names '{name}', which is not installed: run `pip install {name}` (extra "
                f"'{name}'), or set --config.log.tracker=tensorboard."
            )


def device_memory() -> dict[str, float]:
    """Returns the memory in use, and the most so far, on the fullest device of this process, in GiB.

    It is empty if the devices do not report it, as CPUs.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    names = {"memory_gib": "bytes_in_use", "memory_peak_gib": "peak_bytes_in_use"}
    return {
        name: max(each[key] for each in stats) / 2**30
        for name, key in names.items()
        if all(key in each for each in stats)
    }


class MetricWriter:
    """Writes scalars and images to the run directory and to the trackers in `log.tracker`.

    A run that resumes from `first_step` first removes the lines of later steps, which it will write again. As
    a context manager it closes itself at the end, also after an error.

    Args:
      workdir: run directory.
      config: config of the run.
      first_step: step from which this start resumes.
      active: whether this process writes; only the first process should.

    Raises:
      OutputError: something cannot be written; so do the methods.
    """

    def __init__(self, workdir: epath.Path, config: TrainConfig, *, first_step: int, active: bool):
        self._active = active
        if not active:
            return
        from pixart_jax.training.trackers import open_trackers  # only this process needs them

        self._path = workdir / "metrics.jsonl"
        self._kept = lines_until(self._path, first_step)
        # Objects in a bucket cannot be appended to. There, `write` rewrites the whole file.
        self._appended = None
        if not is_bucket(workdir):
            replace_text(self._path, "".join(self._kept))
            self._appended = LineFile(Path(self._path))
        self._trackers = open_trackers(workdir, config, first_step)
        self._bar = tqdm(
            total=config.steps,
            initial=first_step,
            mininterval=1.0,
            # The time left is among the metrics.
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        # After an error, such as a full disk, the first message is the one to report.
        with contextlib.suppress(*([OutputError] if kind else [])):
            self.close()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes the metrics of `step`, and moves the progress bar there."""
        if not self._active:
            return
        shown = {label: f"{values[name]:.4g}" for name, label in _SHOWN.items() if name in values}
        if "seconds_left" in values:
            shown["left"] = tqdm.format_interval(values["seconds_left"])
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._bar.n)
        line = json.dumps({"step": step, **values}) + "\n"
        if self._appended is None:
            self._kept.append(line)
            replace_text(self._path, "".join(self._kept))
        else:
            self._appended.append(line.encode())
        for tracker in self._trackers:
            tracker.scalars(step, values)

    def sync(self) -> None:
        """Waits until the metrics written so far are on disk, also those for TensorBoard."""
        if not self._active:
            return
        if self._appended is not None:
            self._appended.sync()
        for tracker in self._trackers:
            tracker.flush()

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Gives an image, [H, W, C] uint8, to the trackers."""
        if self._active:
            for tracker in self._trackers:
                tracker.image(step, name, pixels)

    def close(self) -> None:
        """Ends the progress bar and the trackers. It may be called again."""
        if self._active:
            self._active = False
            self._bar.close()
            if self._appended is not None:
                self._appended.close()
            for tracker in self._trackers:
                tracker.close()
