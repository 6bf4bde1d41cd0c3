"""Metrics of a run: progress bar, `metrics.jsonl` and TensorBoard. Only process 0 writes them."""

from __future__ import annotations

import json
import os

import numpy as np
from etils import epath
from tensorboardX import SummaryWriter
from tqdm import tqdm

from pixart_jax.files import lines_until, replace_text


class MetricWriter:
    """Writes scalars and images to the run directory.

    A run that resumes from `first_step` first removes the lines of later steps, which it will write again.

    Args:
      workdir: run directory.
      first_step: step from which this start resumes.
      total_steps: last step of the run, for the progress bar.
      active: whether this process writes; only the first process should.
    """

    def __init__(self, workdir: epath.Path, *, first_step: int, total_steps: int, active: bool):
        self._active = active
        if not active:
            return
        self._path = workdir / "metrics.jsonl"
        self._kept = lines_until(self._path, first_step)
        # Objects in a bucket cannot be appended to. There, `write` rewrites the whole file.
        self._appended = None
        if not _is_bucket(workdir):
            replace_text(self._path, "".join(self._kept))
            self._appended = self._path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", mininterval=1.0)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes the metrics of `step`."""
        if not self._active:
            return
        line = json.dumps({"step": step, **values}) + "\n"
        if self._appended is None:
            self._kept.append(line)
            self._path.write_text("".join(self._kept))
        else:
            self._appended.write(line)
            self._appended.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Waits until the metrics written so far are on disk, also those for TensorBoard."""
        if not self._active:
            return
        if self._appended is not None:
            os.fsync(self._appended.fileno())
        self._board.flush()

    def progress(self, step: int, shown: dict[str, float]) -> None:
        """Moves the progress bar to `step` and shows some metrics beside it."""
        if self._active:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
            self._bar.update(step - self._bar.n)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Writes an image, [H, W, C] uint8, to TensorBoard."""
        if self._active:
            self._board.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        if self._active:
            self._bar.close()
            if self._appended is not None:
                self._appended.close()
            self._board.close()


def _is_bucket(path: epath.Path) -> bool:
    return "://" in str(path)
