"""Serves the web page of `sample --serve`.

The page is made with Gradio (extra 'app'). It loads nothing from other servers: no fonts, no scripts, no
analytics.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
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

from pixart_jax.errors import UserError, report, system_reason
from pixart_jax.files import make_folder
from pixart_jax.pipeline.page import browser
from pixart_jax.pipeline.page.clicks import Clicks
from pixart_jax.pipeline.page.guard import Guard, Hosts, bounded
from pixart_jax.pipeline.page.layout import build_page, import_gradio, theme
from pixart_jax.pipeline.page.uploads import MAX_BYTES
from pixart_jax.pipeline.pipeline import Pipeline

# While this many connections are open, requests are answered with status 503. Beyond twice as many,
# connections are closed.
MAX_CONNECTIONS = 256

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
            gr = import_gradio()
            import fastapi
            import uvicorn
            from uvicorn.protocols.http.auto import AutoHTTPProtocol

            folder = make_folder(Path(temporary if out is None else out).absolute())
            # Later, it copies each image into this folder unless it is there.
            opened.enter_context(_environment("GRADIO_TEMP_DIR", str(folder)))
            self._clicks = clicks = Clicks(pipe, source, folder, Path(temporary))
            opened.callback(clicks.close)
            blocks = build_page(clicks)
            app = gr.mount_gradio_app(
                fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
                blocks,
                path="/",
                theme=theme(),
                footer_links=[],
                show_error=False,
                enable_monitoring=False,
                max_file_size=MAX_BYTES,  # the browser refuses larger files, and so does the guard
                css=browser.STYLE,
                js=browser.KEYS,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
            )
            functions = {number: len(function.inputs) for number, function in blocks.fns.items()}
            self._guard = Guard(
                app,
                hosts,
                users,
                functions,
                clicks.pictures,
                clicks.listeners,
                clicks.uploads,
                clicks.archive,
            )
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
        return self._clicks.computing

    def _stop_server(self) -> None:
        self._guard.ending = self._server.should_exit = True
        self._thread.join(timeout=5)


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
