"""The web page of `sample --serve`: type a prompt, generate images, see them and their settings.

The page is made with Gradio (extra 'app'). It loads nothing from other servers: no fonts, no scripts, no
analytics. `guard.py` decides which requests it answers.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import dataclasses
import fcntl
import html
import ipaddress
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pixart_jax.errors import OutputError, UserError, report, short, system_reason
from pixart_jax.files import make_folder
from pixart_jax.flags import field_kinds
from pixart_jax.pipeline.batching import generate
from pixart_jax.pipeline.guard import Guard, Hosts, bounded
from pixart_jax.pipeline.image_files import file_name, make_record, read_png_settings, save_png
from pixart_jax.pipeline.memory import Work, check_memory
from pixart_jax.pipeline.pipeline import Pipeline
from pixart_jax.pipeline.requests import Request, typed, with_consecutive_seeds

# Maximum number of images for one click.
MAX_IMAGES = 16
# Maximum number of characters of a text. The text encoder reads about the first thousand.
MAX_TEXT = 4000
# Maximum number of clicks that wait.
MAX_WAITING = 8
# Range of the sliders of adapters; it is extended to the weights that the command gives.
WEIGHTS = (-2.0, 2.0)
# While this many connections are open, requests are answered with status 503. Beyond twice as many,
# connections are closed.
MAX_CONNECTIONS = 256

# Seconds after which a click is dropped if its page does not ask for the result. It does so at once.
_PATIENCE = 5.0

# Beginning of the names of temporary folders.
_PREFIX = "pixart-page-"


def serve(
    pipe: Pipeline,
    source: Mapping[str, Any],
    *,
    out: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    users: Sequence[tuple[str, str]] = (),
    allow_host: Sequence[str] = (),
    block: bool = True,
) -> Page | None:
    """Serves the page.

    Args:
      pipe: the pipeline.
      source: arguments of `load_pipeline`, for the settings in the images.
      out: folder for the images; None for a temporary one, which is removed when the page is closed or the
        process ends. A folder that a killed process has left is removed by the next call.
      host: address to listen on.
      port: port to listen on; 0 for any free one.
      users: names and passwords of those who may use the page; none for everyone.
      allow_host: names under which the page may be opened, besides that of `host`.
      block: serve until Ctrl-C, SIGTERM or SIGHUP. The last two raise SystemExit, with status 143 or 129.

    Returns:
      The page, which is closed if this function blocks; None if it was interrupted before it began.

    Raises:
      UserError: Gradio is not installed, the port is in use, or a name is not one of a host.
      OutputError: the folder cannot be made.
    """
    if not block:
        return Page(pipe, source, out, host, port, users, allow_host)
    with _signals() as ignore:
        page, status = None, 0
        try:
            page = Page(pipe, source, out, host, port, users, allow_host)
            page.wait()
        except (KeyboardInterrupt, SystemExit) as end:
            status = getattr(end, "code", 0)
        finally:
            ignore()
            if page:
                page.close()
        if page and page.computing:
            # If Python ended while JAX computes in another thread, JAX would abort the process (status 134).
            sys.stdout.flush()
            os._exit(status)
        if status:
            sys.exit(status)
    return page


class Page:
    """The page and its server.

    Attributes:
      local_url: where to open it on this machine.
    """

    def __init__(
        self,
        pipe: Pipeline,
        source: Mapping[str, Any],
        out: str | None,
        host: str,
        port: int,
        users: Sequence[tuple[str, str]],
        allow_host: Sequence[str],
    ):
        """Starts the server, in a thread. The arguments are those of `serve`."""
        with contextlib.ExitStack() as opened:
            listening = opened.enter_context(_listen(host, port))
            address, port = listening.getsockname()[:2]
            hosts = Hosts(host, address, allow_host)
            temporary = opened.enter_context(_temporary_folder())
            # Gradio makes folders in this one when it is imported.
            opened.enter_context(_environment("GRADIO_TEMP_DIR", temporary))
            gr = _gradio()
            import fastapi
            import uvicorn
            from uvicorn.protocols.http.auto import AutoHTTPProtocol

            folder = make_folder(Path(temporary if out is None else out).absolute())
            # Later, it copies each image into this folder unless it is there.
            opened.enter_context(_environment("GRADIO_TEMP_DIR", str(folder)))
            self._clicks = clicks = Clicks(pipe, source, folder)
            opened.callback(clicks.close)
            blocks = build_page(clicks)
            app = gr.mount_gradio_app(
                fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
                blocks,
                path="/",
                theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
                footer_links=[],
                show_error=False,
                enable_monitoring=False,
                max_file_size=1,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
            )
            functions = {number: len(function.inputs) for number, function in blocks.fns.items()}
            self._guard = Guard(app, hosts, users, functions, clicks.pictures, clicks.listeners)
            self._server = uvicorn.Server(
                uvicorn.Config(
                    self._guard,
                    http=bounded(AutoHTTPProtocol, 2 * MAX_CONNECTIONS),
                    log_level="error",
                    ws="none",
                    server_header=False,
                    limit_concurrency=MAX_CONNECTIONS,
                )
            )
            # A daemon, and so are the threads that it starts: a click that is being computed does not keep
            # the process from ending.
            self._thread = threading.Thread(
                target=self._server.run, kwargs={"sockets": [listening]}, daemon=True
            )
            self._thread.start()
            opened.callback(self._stop_server)
            while not self._server.started:
                if not self._thread.is_alive():
                    raise RuntimeError("the server of the page did not start")
                time.sleep(0.01)
            name = "localhost" if ipaddress.ip_address(address).is_unspecified else address
            self.local_url = f"http://{f'[{name}]' if ':' in name else name}:{port}/"
            print(f"images in {folder}; open {self.local_url} (Ctrl-C to end)", flush=True)
            if not hosts.loopback and not users:
                report(
                    f"warning: everyone who reaches port {port} of {host} can use the page: give "
                    "--auth=USER:PASSWORD_FILE, or leave out --host."
                )
            self._opened = opened.pop_all()
        atexit.register(self.close)

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait(self) -> None:
        """Waits until the server ends."""
        while self._thread.is_alive():
            self._thread.join(0.2)  # a signal is handled between two waits

    def close(self) -> None:
        """Ends the server, and removes the folder if it is temporary.

        A click that is being computed is dropped.
        """
        self._opened.close()
        atexit.unregister(self.close)

    @property
    def computing(self) -> bool:
        """Whether a click is still being computed."""
        return self._clicks.computing.locked()

    def _stop_server(self) -> None:
        self._guard.ending = self._server.should_exit = True
        self._thread.join(timeout=5)


class _Dropped(Exception):
    """Nobody waits for the images of a click any longer."""


class Clicks:
    """Computes the clicks of a page.

    Attributes:
      pipe: the pipeline.
      checkpoint: name of the weights.
      pictures: paths of the images that this page has made; only they may be read over the network.
      listeners: number of connections that wait for results, by session. The server keeps it up to date.
      computing: is locked while a click is computed.
      adapters: range of the weight of each adapter, by its path.
    """

    def __init__(self, pipe: Pipeline, source: Mapping[str, Any], folder: Path):
        """Takes the arguments of `serve`, and the folder for the images, an absolute path."""
        self.pipe, self._source, self.folder = pipe, source, folder
        self.checkpoint = source.get("checkpoint") or ""
        self.pictures: set[str] = set()
        self.listeners: collections.Counter[str] = collections.Counter()
        self.computing = threading.Lock()
        adapters = getattr(pipe, "adapters", None)
        weights = adapters.weights if adapters else {}
        self.adapters = {
            name: (min(weight, WEIGHTS[0]), max(weight, WEIGHTS[1])) for name, weight in weights.items()
        }
        self._closed = False
        self._saving = threading.Lock()

    def close(self) -> None:
        """From now on, no image is written."""
        with self._saving:
            self._closed = True

    def generate(
        self, session: str, count: Any, values: Mapping[str, Any], weights: Sequence[Any] = ()
    ) -> list[str]:
        """Generates the images of one click.

        Args:
          session: who waits for them. If nobody does any longer, the click ends after the current batch.
          count: number of images.
          values: settings by name, as a page or anyone else sent them.
          weights: the weight of each adapter, likewise, in the order of `adapters`.

        Returns:
          The paths of the images.

        Raises:
          UserError: an invalid value.
        """
        request, count = checked_request(count, values)
        adapters = self._checked_weights(weights)
        request, size = self.pipe.resolve(request)
        batch_size = self.pipe.generator.per_device(count, None)
        check_memory(self.pipe, size, batch_size, Work(total=count))
        # A page calls first, and then connects to wait for the result.
        end = time.monotonic() + _PATIENCE
        while not self.listeners[session] and time.monotonic() < end:
            time.sleep(0.02)
        with self.computing:
            self._check_wanted(session)
            # Every click sets all weights: those of another click do not remain.
            if adapters:
                self.pipe.set_adapter_weights(adapters)
            paths = self._images(session, with_consecutive_seeds(request, count), batch_size)
        return [paths[index] for index in range(count)]

    def _images(self, session: str, requests: Sequence[Request], batch_size: int) -> dict[int, str]:
        """Generates images and returns their paths, by index in `requests`."""
        # Every click gets a new number, even after a restart.
        taken = (int(path.name[:5]) for path in self.folder.glob("[0-9]" * 5 + "-*.png"))
        number = max(taken, default=-1) + 1
        paths: dict[int, str] = {}
        for index, pixels, _ in generate(self.pipe, requests, batch_size):
            each = requests[index]
            path = self.folder / file_name(number, each.seed, each.prompt)
            record = make_record(self.pipe, each, self._source, batch_size)
            with self._saving:
                self._check_wanted(session)
                save_png(path, pixels, record)
            paths[index] = str(path)
            self.pictures.add(str(path))
        return paths

    def _checked_weights(self, weights: Sequence[Any]) -> dict[str, float]:
        if len(weights) != len(self.adapters):
            raise UserError(f"There are {len(weights)} weights for {len(self.adapters)} adapters.")
        for (name, (low, high)), weight in zip(self.adapters.items(), weights):
            is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not is_number or not low <= weight <= high:
                raise UserError(
                    f"The weight of {Path(name).name} is {short(weight)}: it must be between {low} and "
                    f"{high}."
                )
        return dict(zip(self.adapters, map(float, weights)))

    def _check_wanted(self, session: str) -> None:
        if self._closed or not self.listeners[session]:
            raise _Dropped


def checked_request(count: Any, values: Mapping[str, Any]) -> tuple[Request, int]:
    """The request of a click, and its number of images.

    Args:
      count: number of images.
      values: settings by name, of any type.

    Raises:
      UserError: a value of the wrong type, outside the range of its control, or a text that is too long.
    """
    kinds = {**field_kinds(Request), "count": int}
    checked = {}
    for name, value in (*values.items(), ("count", count)):
        if value is None:
            raise UserError("A number is missing: fill in every field.")
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise UserError(
                f"{name} has {len(value):,} characters: it may have at most {MAX_TEXT:,}. Shorten it."
            )
        # A page may send 3.0 where the setting is 3.
        whole = kinds[name] is int and isinstance(value, float) and value.is_integer()
        checked[name] = int(value) if whole else value
    count = typed("count", int, checked.pop("count"))
    request = Request.from_dict(checked)
    bounds = {field.name: field.metadata.get("bounds", (None, None)) for field in dataclasses.fields(Request)}
    numbers = {name: getattr(request, name) for name in checked} | {"count": count}
    for name, (low, high) in (bounds | {"count": (1, MAX_IMAGES)}).items():
        if name in numbers and high is not None and not low <= numbers[name] <= high:
            raise UserError(f"{name} is {short(numbers[name])}: it must be between {low} and {high}.")
    if not request.prompt.strip():
        raise UserError("The prompt is empty: type one.")
    return request, count


def build_page(clicks: Clicks) -> Any:
    """Gradio's Blocks."""
    gr = _gradio()
    defaults, _ = clicks.pipe.resolve(Request(""))
    kinds = field_kinds(Request)

    def run(visitor, count, *values):
        with _shown_on_the_page(gr):
            settings, weights = values[: len(controls)], values[len(controls) :]
            paths = clicks.generate(visitor.session_hash, count, dict(zip(controls, settings)), weights)
            return paths, read_png_settings(paths[0])

    def show_settings(event):
        with _shown_on_the_page(gr):
            match event.value:
                case {"image": {"path": str(path)}} if path in clicks.pictures:
                    return read_png_settings(path)
            raise UserError("The page has no such image: click one of those that it shows.")

    # Gradio looks at the types, but could not resolve a name that is known only inside this function.
    run.__annotations__["visitor"] = gr.Request
    show_settings.__annotations__["event"] = gr.SelectData

    with gr.Blocks(title="pixart_jax", analytics_enabled=False) as page:
        gr.Markdown(f"## PixArt\n{html.escape(clicks.checkpoint)}")
        with gr.Row():
            with gr.Column():
                prompt = gr.Textbox(label="Prompt", lines=3, elem_id="prompt", autofocus=True)
                controls = {"prompt": prompt}
                with gr.Row():
                    for field in dataclasses.fields(Request):
                        if field.metadata.get("label") and field.name not in controls:
                            value = getattr(defaults, field.name)
                            controls[field.name] = _control(gr, field, kinds[field.name], value)
                    count = gr.Number(
                        1, label="Images", precision=0, minimum=1, maximum=MAX_IMAGES, elem_id="count"
                    )
                sliders = [
                    gr.Slider(
                        *bounds,
                        step=0.05,
                        value=clicks.pipe.adapters.weights[name],
                        label=f"Weight of {Path(name).name}",
                        elem_id=f"adapter-{number}",
                    )
                    for number, (name, bounds) in enumerate(clicks.adapters.items())
                ]
                button = gr.Button("Generate", variant="primary", elem_id="generate")
            with gr.Column():
                gallery = gr.Gallery(
                    label="Images",
                    format="png",
                    columns=2,
                    height=460,
                    object_fit="contain",
                    interactive=False,
                    elem_id="gallery",
                )
                shown = gr.JSON(label="Settings stored in the image", elem_id="settings")
        # preprocess=False: `clicks` checks the values, and says in one line what is wrong.
        gr.on(
            [button.click, prompt.submit],
            run,
            [count, *controls.values(), *sliders],
            [gallery, shown],
            api_name="generate",
            preprocess=False,
            # There is only one pipeline.
            concurrency_limit=1,
        )
        gallery.select(show_settings, None, shown, api_name=False)
    return page.queue(max_size=MAX_WAITING, api_open=False)


@contextlib.contextmanager
def _shown_on_the_page(gr: Any) -> Iterator[None]:
    """Turns errors of a function into messages on the page."""
    try:
        yield
    except UserError as error:
        message = str(error)
    except OutputError as error:
        message = "The image cannot be written: see the messages of the server."
        report(f"error: {error}")
    except _Dropped:
        message = "The click was dropped."
    else:
        return
    # The page shows messages as HTML.
    raise gr.Error(html.escape(message), print_exception=False)


def _control(gr: Any, field: dataclasses.Field, kind: type, value: Any) -> Any:
    """The control of a setting, by the type of its field."""
    common = {"value": value, "label": field.metadata["label"], "elem_id": field.name}
    if field.metadata["choices"]:
        return gr.Dropdown(list(field.metadata["choices"]), **common)
    if kind is str:
        # A row of its own.
        return gr.Textbox(**common, min_width=10_000)
    low, high = field.metadata["bounds"]
    # On a longer slider, a value cannot be set exactly.
    if high is not None and high <= 100:
        return gr.Slider(low, high, step=1 if kind is int else 0.1, **common)
    return gr.Number(precision=0 if kind is int else None, minimum=low, maximum=high, **common)


def _listen(host: str, port: int) -> socket.socket:
    """Listens on a port.

    Raises:
      UserError: the port is in use, or there is no such host.
    """
    try:
        kind, _, _, _, address = socket.getaddrinfo(
            host.strip("[]") or "?", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=kind)
    except (OSError, UnicodeError) as error:
        numbered = isinstance(error, OSError) and not isinstance(error, socket.gaierror)
        # The numbers of `gaierror` are not those of the operating system.
        reason = system_reason(error) if numbered else str(error)
        fix = "give another --port, or 0 for any free one" if numbered else "give an address of this machine"
        raise UserError(f"--port={port} on --host={host} cannot be opened ({reason}): {fix}.") from None


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], None]]:
    """Within the block, SIGTERM and SIGHUP raise SystemExit, as Ctrl-C raises KeyboardInterrupt.

    Yields:
      a function that ignores all three from then on.
    """

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, end)
    try:
        yield lambda: [signal.signal(number, signal.SIG_IGN) for number in before]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Sets an environment variable within the block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        os.environ.update({} if before is None else {name: before})


@contextlib.contextmanager
def _temporary_folder() -> Iterator[str]:
    """A new folder that is removed after the block, together with those that killed processes have left.

    A process holds a lock on its folder, which the operating system releases when the process ends.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        _remove_unless_in_use(left)
    folder = tempfile.mkdtemp(prefix=_PREFIX)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_unless_in_use(folder: Path) -> None:
    """Removes a folder of this user that no process has locked."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # of another user, or gone
        return
    try:
        # A new folder is empty while it is not locked yet.
        if os.fstat(lock).st_uid == os.getuid() and os.listdir(lock):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # in use
        return
    finally:
        os.close(lock)


def _gradio() -> Any:
    # Gradio reads the first when it is imported, and would otherwise contact its makers. It would also keep
    # all prompts and images in the browser.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = os.environ["GRADIO_RUN_HISTORY"] = "False"
    try:
        import gradio
    except ImportError:
        raise UserError("--serve needs Gradio: pip install 'pixart_jax[app]'.") from None
    return gradio
