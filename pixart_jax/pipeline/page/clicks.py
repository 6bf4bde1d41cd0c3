"""Computes what visitors of the web page ask for, one click after the other, and remembers their images."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pixart_jax.errors import UserError
from pixart_jax.pipeline.batching import generate
from pixart_jax.pipeline.generation import Step
from pixart_jax.pipeline.image_files import file_name, make_record, read_png_settings, save_png
from pixart_jax.pipeline.memory import Work, check_memory, file_bytes
from pixart_jax.pipeline.page.form import Asked, Form
from pixart_jax.pipeline.page.uploads import Uploads
from pixart_jax.pipeline.pipeline import Pipeline
from pixart_jax.pipeline.requests import with_consecutive_seeds

# Maximum number of clicks that wait.
MAX_WAITING = 8

# Seconds after which a click is dropped if its page does not ask for the result. It does so at once.
_PATIENCE = 5.0


class Dropped(Exception):
    """A click has been cancelled, or nobody waits for its images any longer."""


class Click:
    """What a visitor has asked for, and what has been computed of it.

    Attributes:
      session: the page that waits for it.
      visitor: whose history gets the images.
      paths: paths of the finished images, in the order of their seeds.
      error: what ended it early; `Dropped` if it was cancelled.
      done: is set when nothing more will be computed.
    """

    def __init__(self, session: str, visitor: str, asked: Asked, batch_size: int):
        self.session, self.visitor, self.asked, self.batch_size = session, visitor, asked, batch_size
        self.paths: list[str] = []
        self.error: Exception | None = None
        self.done = threading.Event()
        self.cancelled = False
        self.made = time.monotonic()
        # Of the batch that is computed: its first and last image, from 1, and its last step.
        self.batch: tuple[int, int] | None = None
        self.step = 0

    @property
    def steps(self) -> int:
        """Number of steps of each image."""
        request = self.asked.request
        return max(int(request.steps * (request.strength or 1.0)), 1)

    @property
    def progress(self) -> float:
        """Share of the work that is done, from 0 to 1."""
        if self.batch is None:
            return 0.0
        first, last = self.batch
        return (first - 1 + (last - first + 1) * min(self.step / self.steps, 1)) / self.asked.count


class Clicks:
    """The clicks of a page: those that wait, the one that is computed, and the images of all.

    Attributes:
      pipe: the pipeline.
      checkpoint: name of the weights.
      form: the controls of the page.
      uploads: images that visitors have sent.
      pictures: prompts of the images that this page has made, by their paths.
      history: paths of the images of each visitor, oldest first.
      listeners: number of connections that wait for results, by session. The server keeps it up to date.
    """

    def __init__(self, pipe: Pipeline, source: Mapping[str, Any], folder: Path, temporary: Path):
        """Starts a thread that computes.

        Args:
          pipe, source: see `serve`.
          folder: absolute path of the folder for the images.
          temporary: absolute path of a folder for uploads.
        """
        self.pipe, self._source, self.folder = pipe, source, folder
        self.checkpoint = source.get("checkpoint") or ""
        self.form = Form(pipe)
        self.uploads = Uploads(temporary / "uploads", folder / "inputs")
        self.pictures: dict[str, str] = {}
        self.history: collections.defaultdict[str, list[str]] = collections.defaultdict(list)
        self.listeners: collections.Counter[str] = collections.Counter()
        self._waiting: collections.deque[Click] = collections.deque()
        self._current: Click | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._saving = threading.Lock()
        # A daemon: a click that is being computed does not keep the process from ending.
        threading.Thread(target=self._work, daemon=True).start()

    def close(self) -> None:
        """From now on, nothing is written. A click that is being computed is dropped."""
        with self._saving:
            self._closed = True
        self.uploads.close()
        with self._changed:
            self._changed.notify_all()

    @property
    def computing(self) -> bool:
        """Whether a click is being computed."""
        return self._current is not None

    def submit(self, session: str, visitor: str, values: Mapping[str, Any]) -> Click:
        """Adds a click to those that wait.

        Args:
          session: who waits for its images. If nobody does any longer, or it is cancelled, it ends after the
            batch that is being computed.
          visitor: whose history gets the images.
          values: by the name of the control, as a page or anyone else sent them.

        Raises:
          UserError: an invalid value, or too many clicks are waiting.
          OutputError: an upload cannot be written.
        """
        asked = self.form.read(values, self.uploads)
        request, size = self.pipe.resolve(asked.request)
        batch_size = self.pipe.generator.per_device(asked.count, None)
        files = [path for path in (request.image, request.mask) if path]
        check_memory(self.pipe, size, batch_size, Work(total=asked.count, files=file_bytes(files, [])))
        click = Click(session, visitor, asked._replace(request=request), batch_size)
        with self._changed:
            for each in [each for each in self._waiting if not self._is_wanted(each)]:
                self._drop(each)
            if len(self._waiting) >= MAX_WAITING:
                raise UserError(f"{MAX_WAITING} clicks are waiting already: try again later.")
            self._waiting.append(click)
            self._changed.notify_all()
        return click

    def cancel(self, session: str) -> None:
        """Cancels the clicks of a session."""
        with self._changed:
            for click in [*self._waiting, *([self._current] if self._current else [])]:
                if click.session == session:
                    self.cancel_click(click)

    def cancel_click(self, click: Click) -> None:
        """Cancels a click. If it waits, it ends at once; otherwise after the batch that is being computed."""
        with self._changed:
            click.cancelled = True
            if click in self._waiting:
                self._drop(click)

    def before(self, click: Click) -> int | None:
        """Number of clicks that are computed before this one; None if it does not wait."""
        with self._changed:
            if click not in self._waiting:
                return None
            return self._waiting.index(click) + (self._current is not None)

    def archive(self, visitor: str) -> Iterator[bytes] | None:
        """The ZIP of a visitor's images, with the files they were generated from; None if there are none.

        It has the paths that `sample --from_image` needs: images, and their inputs in a folder beside them.
        """
        paths = [Path(path) for path in self.history.get(visitor, ())]
        return _zipped(paths, self.folder / "inputs") if paths else None

    def _drop(self, click: Click) -> None:
        self._waiting.remove(click)
        click.error = Dropped()
        click.done.set()

    def _is_wanted(self, click: Click) -> bool:
        # A page calls first, and then connects to wait for the result.
        new = time.monotonic() < click.made + _PATIENCE
        return not (self._closed or click.cancelled) and (self.listeners[click.session] > 0 or new)

    def _check_wanted(self, click: Click) -> None:
        if self._closed or click.cancelled or not self.listeners[click.session]:
            raise Dropped

    def _work(self) -> None:
        """Computes clicks until the page is closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    for click in list(self._waiting):
                        self._drop(click)
                    return
                self._current = click = self._waiting.popleft()
            try:
                while not self.listeners[click.session] and self._is_wanted(click):
                    time.sleep(0.02)
                self._check_wanted(click)
                self._compute(click)
            except Exception as error:  # the page shows it
                click.error = error
            finally:
                with self._changed:
                    self._current = None
                click.done.set()

    def _compute(self, click: Click) -> None:
        request, count, weights = click.asked
        files = {name: getattr(request, name) for name in ("image", "mask") if getattr(request, name)}
        with self._saving:
            self._check_wanted(click)
            used = {name: self.uploads.use(path) for name, path in files.items()}
        request = dataclasses.replace(request, **used)
        # Every click sets all weights: those of another click do not remain.
        if weights:
            self.pipe.set_adapter_weights(weights)
        # Every click gets a new number, even after a restart.
        taken = (int(path.name[:5]) for path in self.folder.glob("[0-9]" * 5 + "-*.png"))
        number = max(taken, default=-1) + 1
        requests = with_consecutive_seeds(request, count)
        size = click.batch_size * len(self.pipe.generator.devices)

        def begin(first: int) -> None:
            click.step, click.batch = 0, (first + 1, min(first + size, count))

        def watch(step: Step) -> None:
            self._check_wanted(click)
            click.step = step.number

        begin(0)
        for index, pixels, _ in generate(self.pipe, requests, click.batch_size, watch):
            each = requests[index]
            path = self.folder / file_name(number, each.seed, each.prompt)
            record = make_record(self.pipe, each, self._source, click.batch_size, watched=True)
            with self._saving:
                self._check_wanted(click)
                save_png(path, pixels, record)
            self.pictures[str(path)] = each.prompt
            self.history[click.visitor].append(str(path))
            click.paths.append(str(path))
            if index + 1 == click.batch[1] and index + 1 < count:
                begin(index + 1)


class _Parts:
    """A file that can only be written, and whose content is taken away as it grows."""

    def __init__(self):
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def flush(self) -> None: ...

    def take(self) -> bytes:
        taken, self._parts = b"".join(self._parts), []
        return taken


def _zipped(paths: Sequence[Path], inputs: Path) -> Iterator[bytes]:
    """Yields the parts of a ZIP of images and of the files in `inputs` that they were generated from."""
    parts, added = _Parts(), set()
    with zipfile.ZipFile(parts, "w") as archive:
        for path in paths:
            with contextlib.suppress(OSError, UserError):  # it has been removed from the folder
                files = [Path(each) for each in read_png_settings(path)["files"]]
                for file in (path, *(each for each in files if each.parent == inputs)):
                    if file not in added:
                        added.add(file)
                        archive.writestr(str(file.relative_to(inputs.parent)), file.read_bytes())
                        yield parts.take()
    yield parts.take()
