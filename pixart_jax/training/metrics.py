"""What a run tells: a progress bar, `metrics.jsonl`, TensorBoard. Written by process 0 alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm


class MetricWriter:
    """Writes scalars and pictures of a run to its directory; a no-op on every process but the first."""

    def __init__(self, workdir: Path, *, first_step: int, total_steps: int, active: bool):
        self._active = active
        if not active:
            return
        self._path = workdir / "metrics.jsonl"
        _drop_after(self._path, first_step)
        self._lines = self._path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", mininterval=1.0)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics that belong to `step`."""
        if not self._active:
            return
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def progress(self, step: int, shown: dict[str, float]) -> None:
        """Moves the bar to `step`."""
        if self._active:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
            self._bar.update(step - self._bar.n)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """A picture [H, W, C] uint8."""
        if self._active:
            self._board.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        if self._active:
            self._bar.close()
            self._lines.close()
            self._board.close()


def _drop_after(path: Path, step: int) -> None:
    """Removes what a run wrote after the checkpoint it continues from, so that no step stands twice."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            pass  # a line that was torn by the kill
    replacement = path.with_suffix(".tmp")
    replacement.write_text("".join(kept))
    os.replace(replacement, path)
