"""Metrics of a run: progress bar, `metrics.jsonl` and TensorBoard. Only process 0 writes them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from etils import epath
from tqdm import tqdm

from pixart_jax.errors import writing
from pixart_jax.files import LineFile, is_bucket, replace_text
from pixart_jax.readers import lines_until

if TYPE_CHECKING:
    from tensorboardX.proto.event_pb2 import Event


class MetricWriter:
    """Writes scalars and images to the run directory.

    A run that resumes from `first_step` first removes the lines of later steps, which it will write again.

    Args:
      workdir: run directory.
      first_step: step from which this start resumes.
      total_steps: last step of the run, for the progress bar.
      active: whether this process writes; only the first process should.

    Raises:
      OutputError: something cannot be written; so do the methods.
    """

    def __init__(self, workdir: epath.Path, *, first_step: int, total_steps: int, active: bool):
        self._active = active
        if not active:
            return
        self._path = workdir / "metrics.jsonl"
        self._kept = lines_until(self._path, first_step)
        # Objects in a bucket cannot be appended to. There, `write` rewrites the whole file.
        self._appended = None
        if not is_bucket(workdir):
            replace_text(self._path, "".join(self._kept))
            self._appended = LineFile(Path(self._path))
        self._board = _Board(workdir / "tensorboard", first_step)
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", mininterval=1.0)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes the metrics of `step`."""
        if not self._active:
            return
        line = json.dumps({"step": step, **values}) + "\n"
        if self._appended is None:
            self._kept.append(line)
            replace_text(self._path, "".join(self._kept))
        else:
            self._appended.append(line.encode())
        self._board.scalars(step, values)

    def sync(self) -> None:
        """Waits until the metrics written so far are on disk, also those for TensorBoard."""
        if not self._active:
            return
        if self._appended is not None:
            self._appended.sync()
        self._board.flush()

    def progress(self, step: int, shown: dict[str, float]) -> None:
        """Moves the progress bar to `step` and shows some metrics beside it."""
        if self._active:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
            self._bar.update(step - self._bar.n)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Writes an image, [H, W, C] uint8, to TensorBoard."""
        if self._active:
            self._board.image(step, name, pixels)

    def close(self) -> None:
        if self._active:
            self._bar.close()
            if self._appended is not None:
                self._appended.close()
            self._board.close()


class _Board:
    """Writes the events that TensorBoard shows.

    The writer of tensorboardX has a thread, which dies if the disk is full; the process then waits for it
    forever. This one writes at once.

    Args:
      folder: folder of the events, of which every start of a run adds a file.
      first_step: step from which the run resumes. TensorBoard hides what earlier files have for later steps.
    """

    def __init__(self, folder: epath.Path, first_step: int):
        # tensorboardX imports PyTorch if it is installed, which takes seconds.
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import directory_check

        self._folder, self._summary, self._event = folder, summary, Event
        with writing(folder):
            directory_check(str(folder))
            self._events = EventsWriter(str(folder / "events"))
        for event in (
            Event(file_version="brain.Event:2"),
            Event(session_log=SessionLog(status=SessionLog.START)),
        ):
            self._write(event, first_step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._write(self._event(summary=self._summary.scalar(name, value)), step)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._write(self._event(summary=self._summary.image(name, pixels, dataformats="HWC")), step)

    def _write(self, event: Event, step: int) -> None:
        event.step, event.wall_time = step, time.time()
        with writing(self._folder):
            self._events.write_event(event)

    def flush(self) -> None:
        """Waits until the events are on disk."""
        with writing(self._folder):
            self._events.flush()

    def close(self) -> None:
        with writing(self._folder):
            self._events.close()
