"""Decides which requests reach the web page: those that the page itself sends, from users who may use it.

Gradio's server has routes for uploads, downloads of files, other servers and more. The guard stands before
Gradio as an ASGI application and lets only a few routes through. It answers uploads and downloads itself.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import collections
import functools
import hashlib
import hmac
import ipaddress
import json
import os
import re
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pixart_jax.errors import OutputError, UserError, report, short
from pixart_jax.pipeline.page.uploads import MAX_BYTES, MAX_MASK, Uploads

# Names of this machine that no other machine has.
LOOPBACK = ("localhost", "127.0.0.1", "::1")

# Largest body of a call in bytes: a mask, and two texts of the longest kind, each character written as two
# escapes.
MAX_BODY = 256 * 1024 + MAX_MASK
# Largest body of an upload in bytes, which has one file.
MAX_UPLOAD = MAX_BYTES + 4096

# Longest password in bytes.
_MAX_PASSWORD = 1024

# Seconds that each wrong password takes. They are answered one after another, so that guessing stays slow
# however many connections it has.
WRONG_PASSWORD_SECONDS = 0.5

# Seconds within which a request must arrive. A browser sends it at once.
REQUEST_SECONDS = 20.0
# Seconds within which an upload must arrive.
UPLOAD_SECONDS = 120.0
# Maximum number of uploads that arrive at the same time. Each is in memory.
MAX_UPLOADS = 4

# What a page asks for; a route that ends in "/" stands for all below it.
_GET = ("/", "/assets/", "/static/", "/theme.css", "/favicon.ico", "/config", "/gradio_api/info")
_STREAM, _JOIN, _FILE = "/gradio_api/queue/data", "/gradio_api/queue/join", "/gradio_api/file="
_UPLOAD, _ARCHIVE = "/gradio_api/upload", "/images.zip"

# The names that Gradio's page gives to its sessions.
_SESSION = re.compile(r"[0-9A-Za-z_-]{1,100}", re.ASCII)

# A host in a header: a name or an address, IPv6 in brackets, and perhaps a port.
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:/@?#*\s]+))(?::\d+)?", re.IGNORECASE)

_HEADERS = {
    "x-content-type-options": "nosniff",
    # No other page may show this one in a frame, or its pictures.
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "same-origin",
    # Gradio needs scripts inside the page. Handlers in attributes, as in <img onerror=...>, never run.
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; script-src-attr 'none'; "
        "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
        "connect-src 'self' data: blob:; object-src 'none'; base-uri 'self'; form-action 'self'; "
        "frame-ancestors 'none'"
    ),
}

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Refused(Exception):
    """A request that is not answered.

    Args:
      status: HTTP status.
      reason: one line for the user.
    """

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class Hosts:
    """The names under which the page may be opened.

    A page of another site can make its own name point to this machine ("DNS rebinding"). The browser then
    lets it read what this server answers, so the server answers only under names of its own.
    """

    def __init__(self, host: str, address: str, more: Sequence[str] = ()):
        """Collects the names.

        Args:
          host: the name or address that the server was told to listen on.
          address: the IP address that it listens on.
          more: further names, such as that of a proxy.

        Raises:
          UserError: a further name that is not the name of a host.
        """
        ip = ipaddress.ip_address(address)
        self.loopback = ip.is_loopback
        # A server that listens on all addresses of the machine may be opened under each of them. An address
        # cannot be made to point elsewhere.
        self._any_address = ip.is_unspecified
        own = LOOPBACK if ip.is_loopback or ip.is_unspecified else ()
        check_names(more)
        self._more = {name.lower() for name in more}
        self._names = {host.lower().strip("[]"), address, *own, *self._more}

    def check(self, headers: Mapping[str, str]) -> None:
        """Raises `Refused` if a request was sent to another name, or by a page of another site."""
        hosts = [headers.get("host", "")]
        if "x-forwarded-host" in headers:  # Gradio would put it into the page
            hosts += [each.strip() for each in headers["x-forwarded-host"].split(",")]
        for host in hosts:
            name = _host_name(host)
            if not (name in self._names or (self._any_address and _is_address(name))):
                raise Refused(403, f"Host '{short(host)}' is not served: start with --allow_host=NAME.")
        origin = headers.get("origin")
        if origin is not None:
            try:
                place = urllib.parse.urlsplit(origin).netloc
            except ValueError:  # such as http://[
                place = ""
            if place not in hosts and _host_name(place) not in self._more:
                raise Refused(403, f"Pages of '{short(origin)}' may not use this server.")


def check_names(names: Sequence[str]) -> None:
    """Raises a `UserError` unless these are names of hosts."""
    for name in names:
        if not _HOST.fullmatch(name) or _host_name(name) != name.lower():
            raise UserError(
                f"--allow_host={name}: give the name of a host, such as images.example.org, without a port."
            )


def _host_name(host: str) -> str:
    """The name or address in a Host header, "" if it has none."""
    match = _HOST.fullmatch(host)
    return (match[1] or match[2]).lower() if match else ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def read_users(entries: Sequence[str]) -> list[tuple[str, str]]:
    """Reads the users who may use the page.

    Args:
      entries: USER:PASSWORD_FILE for each user; the file holds the password in one line.

    Returns:
      The names and passwords.

    Raises:
      UserError: an entry of another form, two of the same user, or a file that cannot be read or does not
        hold one line.
    """
    users: dict[str, str] = {}
    for entry in entries:
        user, _, path = entry.partition(":")
        if not user or not path or not user.isprintable():
            raise UserError(f"--auth={entry}: give USER:PASSWORD_FILE, with the password in the file.")
        if user in users:
            raise UserError(f"--auth: user '{user}' is given twice: give each user once.")
        try:
            with Path(os.path.expanduser(path)).open("rb") as file:  # may be a pipe
                content = file.read(_MAX_PASSWORD + 3)
            password = content.decode().removesuffix("\n").removesuffix("\r")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise UserError(
                f"--auth: the password file '{path}' of user '{user}' cannot be read: {reason}."
            ) from None
        if not password or not password.isprintable() or len(password.encode()) > _MAX_PASSWORD:
            raise UserError(
                f"--auth: the password file '{path}' of user '{user}' must hold one line, of 1 to "
                f"{_MAX_PASSWORD} bytes, without tabs, a byte order mark and other invisible characters."
            )
        users[user] = password
    return list(users.items())


def bounded(protocol: type, connections: int) -> type:
    """A protocol of Uvicorn that also closes connections on which no request arrives.

    Uvicorn waits for the first request without end, and counts connections only when it answers. Whoever
    opened connections without sending anything would shut out the users.

    Args:
      protocol: Uvicorn's class.
      connections: maximum number of connections; a further one is closed at once.
    """

    class Bounded(protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._answered = None
            if len(self.connections) > connections:
                transport.close()
            else:
                self.loop.call_later(REQUEST_SECONDS, self._close_if_silent)

        def _close_if_silent(self) -> None:
            if self.transport.is_closing():
                return
            waiting = self.cycle is None or self.cycle.response_complete
            if waiting and self.cycle is self._answered:  # nothing new since the last time
                self.transport.close()
                return
            self._answered = self.cycle
            self.loop.call_later(REQUEST_SECONDS, self._close_if_silent)

    return Bounded


class Guard:
    """An ASGI application that answers for another one, or refuses in one line.

    Attributes:
      ending: True ends the connections that wait for results.
    """

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        hosts: Hosts,
        users: Sequence[tuple[str, str]],
        functions: Mapping[int, int],
        pictures: Container[str],
        listeners: collections.Counter[str],
        uploads: Uploads,
        archive: Callable[[str], Iterator[bytes] | None],
    ):
        """Stands before an application.

        Args:
          app: Gradio's application.
          hosts: the names under which the page may be opened.
          users: names and passwords; none if everyone may use the page.
          functions: number of arguments of each function that a page may call, by its number.
          pictures: paths of the PNG files that may be read. May grow.
          listeners: is kept up to date with the number of connections that wait for results, by session.
          uploads: takes the images that visitors send; they may be read, and named in calls.
          archive: the parts of the ZIP of a visitor's images; None if there are none.
        """
        self._app, self._hosts, self._functions = app, hosts, functions
        self._pictures, self._listeners = pictures, listeners
        self._uploads, self._archive = uploads, archive
        self.ending = False
        self._uploading = 0
        self._wrong = asyncio.Lock()
        self._users = [_digest(f"{user}:{password}".encode()) for user, password in users]

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)  # start and end of the server
            return

        started = unfinished = False

        async def send_safely(message: Message) -> None:
            nonlocal started, unfinished
            started = True
            unfinished = message["type"] == "http.response.start" or message.get("more_body", False)
            if message["type"] == "http.response.start":
                given = [pair for pair in message.get("headers", ()) if pair[0].decode() not in _HEADERS]
                message["headers"] = [*given, *_encoded(_HEADERS)]
            await send(message)

        try:
            await self._answer(scope, receive, send_safely)
        except Refused as refused:
            body, kind = json.dumps({"detail": str(refused)}).encode(), "application/json"
            if scope["path"] == _UPLOAD:  # the page shows the body as it is
                body, kind = str(refused).encode(), "text/plain; charset=utf-8"
            more = {"www-authenticate": 'Basic realm="pixart_jax", charset="UTF-8"'}
            await _respond(send_safely, refused.status, body, kind, more if refused.status == 401 else {})
        except Exception as error:  # of Gradio, such as for a name that is too long for a file
            place = short(f"{scope['method']} {scope['path']}", quote=True)
            reason = " ".join(str(error).split())
            report(f"error: {place} could not be answered ({type(error).__name__}: {short(reason)})")
            if not started:
                body = b'{"detail": "The server could not answer: see its messages."}'
                await _respond(send_safely, 500, body, "application/json", {})
        if unfinished:  # `_receive` ended it, or an error
            await send({"type": "http.response.body"})

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        self._hosts.check(headers)
        await self._check_user(headers.get("authorization", ""))
        method, path = scope["method"], scope["path"]
        if method == "POST" and path == _JOIN:
            body = await _read(receive, headers)
            body = self._checked_call(body)
            given = [pair for pair in scope["headers"] if pair[0].lower() != b"content-length"]
            length = _encoded({"content-length": str(len(body))})
            await self._app(scope | {"headers": given + length}, _replay(body, receive), send)
        elif method == "POST" and path == _UPLOAD:
            await self._take_upload(scope, receive, headers, send)
        elif method not in ("GET", "HEAD"):
            raise Refused(405, f"{short(method)} is not allowed here.")
        elif path == _STREAM:
            session = _argument(scope, "session_hash")
            self._listeners[session] += 1
            try:
                await self._app(scope, functools.partial(self._receive, receive), send)
            finally:
                self._listeners[session] -= 1
                if not self._listeners[session]:
                    del self._listeners[session]
        elif path.startswith(_FILE):
            await self._send_file(path.removeprefix(_FILE), method, send)
        elif path == _ARCHIVE:
            await self._send_archive(_argument(scope, "visitor"), method, send)
        elif path in _GET or path.startswith(tuple(each for each in _GET[1:] if each.endswith("/"))):
            await self._app(scope, receive, send)
        else:
            raise Refused(404, f"There is no '{short(path)}'.")

    async def _receive(self, receive: Receive) -> Message:
        """What a client that waits for results sends: nothing, until it leaves or the server ends."""
        received = asyncio.ensure_future(receive())
        try:
            while not self.ending:
                if (await asyncio.wait([received], timeout=0.2))[0]:
                    return received.result()
            return {"type": "http.disconnect"}
        finally:
            received.cancel()

    async def _check_user(self, authorization: str) -> None:
        if not self._users:
            return
        scheme, _, token = authorization.partition(" ")
        try:
            given = _digest(base64.b64decode(token.strip(), validate=True))
        except (binascii.Error, ValueError):
            given = b""
        # Takes the same time whether or not the user exists.
        known = [hmac.compare_digest(given, each) for each in self._users]
        if scheme.lower() != "basic" or not any(known):
            if authorization:
                async with self._wrong:
                    await asyncio.sleep(WRONG_PASSWORD_SECONDS)
            raise Refused(401, "Give your user name and password.")

    def _checked_call(self, body: bytes) -> bytes:
        """Returns the parts of a call that the page needs, as a new call.

        Gradio would copy the file that an object in `data` names, whatever it is.

        Raises:
          Refused: it does not call a function of the page with as many texts, numbers and uploads as it has
            arguments.
        """
        try:
            call = json.loads(body)
        except (ValueError, RecursionError):
            raise Refused(400, "The body is not valid JSON.") from None
        session = call.get("session_hash") if isinstance(call, dict) else None
        if not isinstance(session, str) or not _SESSION.fullmatch(session):
            raise Refused(400, "The body is not a call: give session_hash, fn_index and data.")
        function, data = call.get("fn_index"), call.get("data")
        if type(function) is not int or function not in self._functions:
            raise Refused(400, f"There is no function {short(function, quote=True)}.")
        count = self._functions[function]
        if not isinstance(data, list) or len(data) != count:
            raise Refused(400, f"Function {function} takes {count} values in data.")
        data = [self._checked_value(each) for each in data]
        # The image that was clicked.
        match call.get("event_data"):
            case {"value": {"image": {"path": str(path)}}} if path in self._pictures:
                event = {"index": None, "value": {"image": {"path": path}}}
            case _:
                event = {"index": None, "value": None}
        checked = {"session_hash": session, "fn_index": function, "data": data, "event_data": event}
        return json.dumps(checked).encode()

    def _checked_value(self, value: Any) -> Any:
        """A value of a call: a text or a number, or the path of an upload in place of the object with it."""
        match value:
            case {"path": str(path)} if self._uploads.find(path):
                return path
            case {"path": _, "meta": {"_type": "gradio.FileData"}}:
                raise Refused(400, "The server does not have this image, or not any longer: upload it again.")
            case list() | dict():
                raise Refused(
                    400, f"{short(value)} is neither text nor a number: give texts and numbers in data."
                )
        return value

    async def _take_upload(
        self, scope: Message, receive: Receive, headers: Mapping[str, str], send: Send
    ) -> None:
        if self._uploading >= MAX_UPLOADS:
            raise Refused(503, "Other images are being uploaded: try again.")
        self._uploading += 1
        try:
            too_large = f"The file is too large: it may have at most {MAX_BYTES:,} bytes."
            body = await _read(receive, headers, MAX_UPLOAD, too_large, UPLOAD_SECONDS)
            data = await _only_file(scope, body)
            # Decodes, which takes seconds for a large image.
            path = await asyncio.to_thread(self._uploads.add, data)
        except UserError as error:
            raise Refused(400, str(error)) from None
        except OutputError as error:
            report(f"error: {error}")
            raise Refused(500, "The image cannot be stored: see the messages of the server.") from None
        finally:
            self._uploading -= 1
        await _respond(send, 200, json.dumps([path]).encode(), "application/json", {})

    async def _send_file(self, path: str, method: str, send: Send) -> None:
        upload = self._uploads.find(path)
        if upload is None and path not in self._pictures:
            raise Refused(404, "There is no such image.")
        try:
            body = await asyncio.to_thread(Path(path).read_bytes)
        except OSError:
            raise Refused(404, "This image has been removed.") from None
        kind = upload.media_type if upload else "image/png"
        await _respond(send, 200, body, kind, {"cache-control": "private"}, method == "HEAD")

    async def _send_archive(self, visitor: str, method: str, send: Send) -> None:
        parts = self._archive(visitor)
        if parts is None:
            raise Refused(404, "There are no images.")
        headers = {
            "content-type": "application/zip",
            "content-disposition": 'attachment; filename="images.zip"',
            "cache-control": "no-store",
        }
        await send({"type": "http.response.start", "status": 200, "headers": _encoded(headers)})
        while method != "HEAD" and (part := await asyncio.to_thread(next, parts, None)) is not None:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body"})


def _digest(credentials: bytes) -> bytes:
    return hashlib.sha256(credentials).digest()


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


async def _respond(
    send: Send, status: int, body: bytes, kind: str, headers: Mapping[str, str], head: bool = False
) -> None:
    """Sends a complete answer."""
    all_headers = {"content-type": kind, "content-length": str(len(body)), **headers}
    await send({"type": "http.response.start", "status": status, "headers": _encoded(all_headers)})
    await send({"type": "http.response.body", "body": b"" if head else body})


def _argument(scope: Message, name: str) -> str:
    """An argument in the address of a request; "" if there is none."""
    return urllib.parse.parse_qs(scope["query_string"].decode("latin-1")).get(name, [""])[0]


async def _read(
    receive: Receive,
    headers: Mapping[str, str],
    limit: int = MAX_BODY,
    too_large: str = f"The request has more than {MAX_BODY:,} bytes: shorten the texts.",
    seconds: float | None = None,
) -> bytes:
    """Reads the body of a request.

    Args:
      receive, headers: of the request.
      limit: largest number of bytes.
      too_large: what to say about a larger one.
      seconds: in which it must arrive; None for `REQUEST_SECONDS`.
    """
    length = headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 15 or int(length) > limit:
        raise Refused(413, too_large)
    body, more = bytearray(), True
    end = time.monotonic() + (REQUEST_SECONDS if seconds is None else seconds)
    while more:
        try:
            message = await asyncio.wait_for(receive(), end - time.monotonic())
        except TimeoutError:
            raise Refused(408, "The request did not arrive in time: send it again.") from None
        if message["type"] != "http.request":
            raise Refused(400, "The request ended too early.")  # the client has left
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > limit:
            raise Refused(413, too_large)
    return bytes(body)


async def _only_file(scope: Message, body: bytes) -> bytes:
    """The file in the body of an upload. Its name does not matter.

    Raises:
      Refused: a body of another form, or not one file.
    """
    # Gradio needs these.
    from starlette.datastructures import UploadFile
    from starlette.formparsers import MultiPartException
    from starlette.requests import Request

    refused = Refused(400, "The body is not an upload: give one file as multipart/form-data.")
    try:
        request = Request(scope, _replay(body, _nothing))
        async with request.form(max_files=1, max_fields=0) as form:
            files = [each for each in form.values() if isinstance(each, UploadFile)]
            if len(files) != 1:
                raise refused
            return await files[0].read()
    except MultiPartException:
        raise refused from None


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def _replay(body: bytes, receive: Receive) -> Receive:
    """Receives a body that has been read, then what follows it."""
    messages = collections.deque([{"type": "http.request", "body": body}])

    async def replayed() -> Message:
        return messages.popleft() if messages else await receive()

    return replayed
