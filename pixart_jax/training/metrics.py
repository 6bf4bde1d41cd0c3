"""What a run tells: a progress bar, `metrics.jsonl`, TensorBoard. Written by process 0 alone."""

from __future__ import annotations

import json

import numpy as np
from etils import epath
from tensorboardX import SummaryWriter
from tqdm import tqdm


class MetricWriter:
    """Writes scalars and pictures of a run to its directory; a no-op on every process but the first."""

    def __init__(self, workdir: epath.Path, *, first_step: int, total_steps: int, active: bool):
        self._active = active
        if not active:
            return
        self._path = workdir / "metrics.jsonl"
        self._kept = _lines_until(self._path, first_step)
        # A bucket knows no appending: there, all lines are written again.
        self._appended = None if _is_bucket(workdir) else _rewritten(self._path, self._kept).open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", mininterval=1.0)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics that belong to `step`."""
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
            if self._appended is not None:
                self._appended.close()
            self._board.close()


def _is_bucket(path: epath.Path) -> bool:
    return "://" in str(path)


def _lines_until(path: epath.Path, step: int) -> list[str]:
    """Lines up to `step`: what a run wrote after the checkpoint it continues from would stand twice."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            pass  # a line that was torn by the kill
    return kept


def _rewritten(path: epath.Path, lines: list[str]) -> epath.Path:
    replacement = path.with_name(f".{path.name}.partial")
    replacement.write_text("".join(lines))
    return replacement.replace(path)
