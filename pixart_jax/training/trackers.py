"""Trackers: where a run shows its metrics and images, besides files of the run directory (`log.tracker`)."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from etils import epath

from pixart_jax.config import TrainConfig, to_dict
from pixart_jax.errors import report, system_reason, writing
from pixart_jax.files import is_bucket, replace_text
from pixart_jax.readers import read_json


@contextlib.contextmanager
def _without_its_package(name: str) -> Iterator[None]:
    """Within this context, modules of a package are imported without the code of its `__init__.py`."""
    if name in sys.modules:
        yield
        return
    spec = importlib.util.find_spec(name)
    assert spec is not None, name  # it is a dependency of this package
    sys.modules[name] = package = ModuleType(name)
    package.__path__ = spec.submodule_search_locations or []
    try:
        yield
    finally:
        # A later import of the package itself is a usual one.
        del sys.modules[name]


# The package imports PyTorch where it is installed, which takes seconds. These modules do not need it.
with _without_its_package("tensorboardX"):
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.record_writer import directory_check

# Identifies the run at services, also after it was resumed.
FILE = "tracker.json"
# Seconds that a service may take to start, and to end. It knows them; the thread that ends it gets more.
START_SECONDS, END_SECONDS, GRACE_SECONDS = 60, 30, 5


class Tracker(Protocol):
    """Interface of a tracker."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the metrics of a step."""

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Shows an image, [H, W, C] uint8."""

    def flush(self) -> None:
        """Waits until everything so far is safe, if the tracker writes to the run directory."""

    def close(self) -> None:
        """Ends the tracker."""


def open_trackers(workdir: epath.Path, config: TrainConfig, first_step: int) -> list[Tracker]:
    """Starts the trackers of a run.

    Args:
      workdir: run directory.
      config: config of the run, which services record.
      first_step: step from which the run resumes.

    Raises:
      UserError: the file with the id of the run is damaged.
      OutputError: the run directory cannot be written.
    """
    return [
        TensorBoard(workdir / name, first_step) if name == "tensorboard" else Service(name, workdir, config)
        for name in config.log.trackers
    ]


class TensorBoard:
    """Writes the events that TensorBoard shows. Its methods raise an `OutputError` if they cannot write.

    The writer of tensorboardX has a thread, which dies if the disk is full; the process then waits for it
    forever. This one writes at once.

    Args:
      folder: folder of the events, of which every start of a run adds a file.
      first_step: step from which the run resumes. TensorBoard hides what earlier files have for later steps.
    """

    def __init__(self, folder: epath.Path, first_step: int):
        self._folder = folder
        with writing(folder):
            directory_check(str(folder))
            self._events = EventsWriter(str(folder / "events"))
        for event in (
            Event(file_version="brain.Event:2"),
            Event(session_log=SessionLog(status=SessionLog.START)),
        ):
            self._write(event, first_step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._write(Event(summary=summary.scalar(name, value)), step)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._write(Event(summary=summary.image(name, pixels, dataformats="HWC")), step)

    def _write(self, event: Event, step: int) -> None:
        event.step, event.wall_time = step, time.time()
        with writing(self._folder):
            self._events.write_event(event)

    def flush(self) -> None:
        with writing(self._folder):
            self._events.flush()

    def close(self) -> None:
        with writing(self._folder):
            self._events.close()


class Service:
    """Sends metrics and images to wandb or trackio, which have the same calls.

    An error of theirs never ends the run: it is reported in one line, and the service gets nothing more. Both
    send from a thread or process of their own, so that training does not wait for a network.

    The project is called like the config. The name of the run is that of its directory, with an id that the
    run directory keeps in `tracker.json`: a run that is resumed goes on as the same run of the service.

    Args:
      name: 'wandb' or 'trackio'.
      workdir: run directory.
      config: config of the run.
    """

    def __init__(self, name: str, workdir: epath.Path, config: TrainConfig):
        self._name, self._run = name, None
        run_id = _run_id(workdir)
        arguments: dict[str, Any] = {
            # Services allow no other characters, and not more of them.
            "project": re.sub(r"[^\w.-]+", "-", config.name, flags=re.ASCII)[:100] or "pixart_jax",
            "name": f"{workdir.name}-{run_id}",
            "config": to_dict(config),
            "resume": "allow",
        }
        with self._reported():
            self._module = importlib.import_module(name)
            if name == "wandb":
                arguments |= {
                    "id": run_id,
                    "dir": None if is_bucket(workdir) else str(workdir),
                    "settings": self._module.Settings(
                        login_timeout=START_SECONDS,
                        init_timeout=START_SECONDS,
                        finish_timeout=END_SECONDS,
                        console="off",
                    ),
                }
            run = self._module.init(**arguments)
            if name == "wandb":
                # wandb refuses a step that is not after the last one, as a resumed run repeats some.
                run.define_metric("*", step_metric="step")
            self._run = run

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, lambda: values)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._log(step, lambda: {name: self._module.Image(pixels)})

    def _log(self, step: int, values: Callable[[], Mapping[str, Any]]) -> None:
        if self._run is None:
            return
        with self._reported():
            if self._name == "wandb":
                self._run.log({**values(), "step": step})
            else:
                self._run.log(dict(values()), step=step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        """Waits until everything is sent, but only for `END_SECONDS`."""
        run, name = self._run, self._name
        if run is None:
            return
        # In a thread, because a service without a network may block for longer than `finish_timeout`.
        thread = threading.Thread(target=self._finish, args=(run,), daemon=True)
        thread.start()
        thread.join(END_SECONDS + GRACE_SECONDS)
        if thread.is_alive():
            report(f"log.tracker: {name} did not end within {END_SECONDS} seconds, so it may lack something")
        self._run = None

    def _finish(self, run: Any) -> None:
        with self._reported():
            run.finish()

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Within this context, an error is reported, and turns the service off."""
        try:
            yield
        except Exception as error:  # whatever a service raises
            self._run = None
            report(
                f"log.tracker: {self._name} is off until the run is started again, because it failed: "
                f"{system_reason(error)}"
            )


def _run_id(workdir: epath.Path) -> str:
    """The id in the run directory, which is made if there is none."""
    path = workdir / FILE
    if not path.exists():
        replace_text(path, f'{{"id": "{uuid.uuid4().hex[:8]}"}}\n')
    return read_json(path, "remove it; services then show a new run", {"id": str})["id"]
