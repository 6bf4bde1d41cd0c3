import asyncio
import base64
import collections
import json
import time
from pathlib import Path

import numpy as np
import pytest
from web_page import png

from pixart_jax.errors import UserError
from pixart_jax.pipeline.page import guard
from pixart_jax.pipeline.page.guard import MAX_BODY, Guard, Hosts, read_users
from pixart_jax.pipeline.page.uploads import Uploads

CALL = {"session_hash": "abc", "fn_index": 0, "data": [1, 2]}


class Site:
    """A guard before an application that notes what reaches it."""

    def __init__(self, hosts=None, users=(), pictures=(), uploads=None):
        self.reached = []
        self.listeners = collections.Counter()
        hosts = hosts or Hosts("127.0.0.1", "127.0.0.1")
        uploads = uploads or Uploads(Path("none"), Path("none"))
        parts = {"a b": [b"first", b"second"]}
        self.guard = Guard(
            self.app,
            hosts,
            users,
            {0: 2},
            set(pictures),
            self.listeners,
            uploads,
            lambda visitor: iter(parts[visitor]) if visitor in parts else None,
        )

    async def app(self, scope, receive, send):
        body = (await receive())["body"] if scope["method"] == "POST" else b""
        self.reached.append((scope["path"], body, dict(self.listeners)))
        headers = [(b"content-type", b"text/html"), (b"x-frame-options", b"ALLOWALL")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"page"})

    def ask(self, *args, **kwargs):
        """Returns the status, the headers and the body."""
        return asyncio.run(self.answer(*args, **kwargs))

    async def answer(self, path="/", method="GET", body=b"", chunks=1, **headers):
        headers = {"host": "127.0.0.1:7860"} | {name.replace("_", "-"): v for name, v in headers.items()}
        path, _, query = path.partition("?")
        scope = {"type": "http", "method": method, "path": path, "query_string": query.encode()}
        scope["headers"] = [
            (name.encode("latin-1"), value.encode()) for name, value in headers.items() if value
        ]
        parts = [{"type": "http.request", "body": body, "more_body": k + 1 < chunks} for k in range(chunks)]
        sent = []

        async def receive():
            return parts.pop(0) if parts else {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        await self.guard(scope, receive, send)
        got = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], got, b"".join(message.get("body", b"") for message in sent[1:])

    def refuses(self, status, words, *args, **kwargs):
        found, _, body = self.ask(*args, **kwargs)
        detail = body.decode()
        if "/gradio_api/upload" not in args:  # its answers are plain text
            detail = json.loads(detail)["detail"]
        assert found == status and words in detail and "\n" not in detail and len(detail) < 400
        assert not self.reached


@pytest.mark.parametrize("path", ["/", "/assets/index.js", "/config", "/theme.css"])
def test_what_the_page_asks_for_is_answered_with_safe_headers(path):
    site = Site()
    status, headers, body = site.ask(path)
    assert (status, body) == (200, b"page") and site.reached
    assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
    assert "script-src-attr 'none'" in headers["content-security-policy"]


@pytest.mark.parametrize(
    "path",
    [
        *(
            "upload_progress",
            "proxy=https://example.org",
            "stream/a/b/1/playlist.m3u8",
            "call/generate/1",
            "reset",
        ),
        *(
            "component_server",
            "custom_component/a/client/b/c.js",
            "heartbeat/abc",
            "startup-events",
            "cancel",
        ),
        *("file=/etc/passwd", "file=https://example.org/x.png", "file/etc/passwd", "run/generate", "token"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_other_routes_are_shut(path, method):
    Site().refuses(404 if method == "GET" else 405, "", f"/gradio_api/{path}", method)


@pytest.mark.parametrize(
    "path", ["/monitoring", "/monitoring/summary", "/docs", "/openapi.json", "/config/x"]
)
def test_pages_of_gradio_that_are_not_needed_are_shut(path):
    Site().refuses(404, path, path)
    Site().refuses(405, "DELETE", "/", "DELETE")


def test_only_listed_images_are_served_as_png(tmp_path):
    for name in ("a.png", "b.png", "gone.png"):
        (tmp_path / name).write_bytes(b"<script>alert(1)</script>")
    site = Site(pictures=[str(tmp_path / "a.png"), str(tmp_path / "gone.png")])
    (tmp_path / "gone.png").unlink()
    status, headers, body = site.ask(f"/gradio_api/file={tmp_path}/a.png", range="bytes=0-3")
    assert (status, body) == (200, (tmp_path / "a.png").read_bytes())
    assert headers["content-type"] == "image/png" and headers["x-content-type-options"] == "nosniff"
    assert site.ask(f"/gradio_api/file={tmp_path}/a.png", "HEAD")[::2] == (200, b"")
    for other in (
        f"{tmp_path}/b.png",
        f"{tmp_path}/./a.png",
        f"{tmp_path}/../{tmp_path.name}/a.png",
        "",
        "\0",
    ):
        site.refuses(404, "no such image", f"/gradio_api/file={other}")
    site.refuses(404, "removed", f"/gradio_api/file={tmp_path}/gone.png")


@pytest.mark.parametrize(
    "host",
    ["", "example.org", "127.0.0.1.example.org", "localhost@example.org", "192.168.1.5", "[::1", "a b"],
)
def test_other_hosts_are_refused(host):
    Site().refuses(403, f"Host '{host}' is not served", host=host)
    if host:
        Site().refuses(403, f"Host '{host}' is not served", x_forwarded_host=f"localhost, {host}")


def test_names_of_the_server_are_answered():
    def answers(site, **headers):
        return site.ask(**headers)[0] == 200

    for host in ("localhost", "LOCALHOST:7860", "127.0.0.1", "[::1]:7860"):
        assert answers(Site(), host=host)
    everywhere = Site(Hosts("0.0.0.0", "0.0.0.0", ["images.example.org"]))
    for host in ("192.168.1.5:7860", "[fe80::1]", "localhost", "Images.Example.org"):
        assert answers(everywhere, host=host)
    everywhere.reached.clear()
    everywhere.refuses(403, "example.org", host="example.org")
    named = Site(Hosts("gpu.lan", "192.168.1.5"))
    assert answers(named, host="gpu.lan:7860") and answers(named, host="192.168.1.5:7860")
    named.reached.clear()
    named.refuses(403, "localhost", host="localhost")


@pytest.mark.parametrize("name", ["http://example.org", "example.org:80", "", "a/b", "a b", "*"])
def test_a_further_name_must_be_one(name):
    with pytest.raises(UserError, match="without a port"):
        Hosts("127.0.0.1", "127.0.0.1", [name])


def test_pages_of_other_sites_may_not_ask():
    site = Site()
    for origin in (
        "http://example.org",
        "null",
        "http://127.0.0.1:3000",
        "http://127.0.0.1:7860@example.org",
        "http://[",
        "http://[zz]",
    ):
        site.refuses(403, "may not use", origin=origin)
    assert site.ask(origin="http://127.0.0.1:7860")[0] == 200
    # A proxy tells the server its own name, or sends the name of the server.
    behind = Site(Hosts("127.0.0.1", "127.0.0.1", ["images.example.org"]))
    for forwarded in ("images.example.org", ""):
        asked = behind.ask(origin="https://images.example.org", x_forwarded_host=forwarded)
        assert asked[0] == 200


def test_a_refusal_allows_other_sites_nothing():
    headers = Site().ask("/gradio_api/queue/join", "OPTIONS", origin="http://example.org")[1]
    assert not [name for name in headers if name.startswith("access-control")]


PICTURE = {"index": 0, "value": {"image": {"path": "/a.png", "url": "http://example.org"}, "caption": None}}


@pytest.mark.parametrize(
    "event, value",
    [
        (PICTURE, {"image": {"path": "/a.png"}}),
        ({"value": {"image": {"path": "/etc/passwd"}}}, None),
        ({"value": {"image": {"path": ["/a.png"]}}}, None),
        (None, None),
        ([], None),
    ],
)
def test_of_a_call_only_what_the_page_needs_is_passed_on(event, value):
    site = Site(pictures=["/a.png"])
    more = {"event_data": event, "event_id": "x", "batched": True, "request": {}, "trigger_id": 10**30}
    body = json.dumps(CALL | more).encode()
    assert site.ask("/gradio_api/queue/join", "POST", body, content_length=str(len(body)))[0] == 200
    ((_, passed, _),) = site.reached
    assert json.loads(passed) == CALL | {"event_data": {"index": None, "value": value}}


def test_an_error_of_the_application_is_one_line(capfd):
    site = Site()

    async def app(scope, receive, send):
        if "late" in scope["path"]:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise OSError("a\nb")

    site.guard._app = app
    assert site.ask("/assets/" + "x" * 5000)[0] == 500
    assert site.ask("/assets/late\n")[0] == 200
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and all("could not be answered (OSError: a b)" in line for line in lines)


def test_a_body_must_arrive_in_time(monkeypatch):
    monkeypatch.setattr(guard, "REQUEST_SECONDS", 0.05)

    async def read():
        await guard._read(asyncio.Event().wait, {})

    with pytest.raises(guard.Refused, match="in time") as caught:
        asyncio.run(read())
    assert caught.value.status == 408


@pytest.mark.parametrize(
    "change, words",
    [
        ({"fn_index": 5}, "no function 5"),
        ({"fn_index": None}, "no function"),
        ({"fn_index": True}, "no function"),
        ({"fn_index": "x" * 1000}, "characters"),
        ({"data": [1]}, "takes 2 values"),
        ({"data": "ab"}, "takes 2 values"),
        ({"data": [1, {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]}, "upload it again"),
        ({"data": [1, {"path": "/etc/passwd"}]}, "is neither text nor a number"),
        ({"data": [1, {"url": "http://example.org/a.png"}]}, "is neither text nor a number"),
        ({"data": [[1], 2]}, "is neither text nor a number"),
        ({"session_hash": 1}, "not a call"),
        ({"session_hash": ""}, "not a call"),
        ({"session_hash": "\ud800"}, "not a call"),
        ({"session_hash": "a" * 1000}, "not a call"),
    ],
)
def test_calls_of_another_form_are_refused(change, words):
    Site().refuses(400, words, "/gradio_api/queue/join", "POST", json.dumps(CALL | change).encode())


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000, b"\xff", b"1" * 5000, b"[]", b"null"])
def test_bodies_that_are_no_call_are_refused(body):
    Site().refuses(400, "", "/gradio_api/queue/join", "POST", body)


def test_an_upload_in_a_call_is_passed_on_as_its_path(tmp_path):
    uploads = Uploads(tmp_path / "a", tmp_path / "b")
    path = uploads.add(png(np.zeros((4, 4, 3), np.uint8)))
    site = Site(uploads=uploads)
    value = {
        "path": path,
        "url": "http://example.org",
        "orig_name": "../x",
        "meta": {"_type": "gradio.FileData"},
    }
    body = json.dumps(CALL | {"data": [value, "text"]}).encode()
    assert site.ask("/gradio_api/queue/join", "POST", body)[0] == 200
    assert json.loads(site.reached[0][1])["data"] == [path, "text"]


def multipart(*files, boundary="x"):
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        + data
        + b"\r\n"
        for name, data in files
    ]
    return b"".join(parts) + f"--{boundary}--\r\n".encode()


KIND = "multipart/form-data; boundary=x"
FIELD = b'--x\r\nContent-Disposition: form-data; name="files"\r\n\r\ntext\r\n--x--\r\n'


def test_the_guard_answers_uploads_itself(tmp_path):
    pytest.importorskip("starlette")
    site, image = Site(uploads=Uploads(tmp_path / "a", tmp_path / "b")), png(np.zeros((4, 4, 3), np.uint8))
    status, headers, body = site.ask(
        "/gradio_api/upload?upload_id=1", "POST", multipart(("../../x.svg", image)), content_type=KIND
    )
    (path,) = json.loads(body)
    assert status == 200 and headers["x-content-type-options"] == "nosniff" and not site.reached
    assert [str(each) for each in (tmp_path / "a").iterdir()] == [path]
    status, headers, body = site.ask(f"/gradio_api/file={path}")
    assert (status, headers["content-type"], body) == (200, "image/png", image)
    (tmp_path / "a" / "other.png").write_bytes(image)
    site.refuses(404, "no such image", f"/gradio_api/file={tmp_path}/a/other.png")


@pytest.mark.parametrize(
    "status, words, body, kind",
    [
        (400, "give a PNG, a JPEG or a WebP", multipart(("a.png", b"<svg/>")), KIND),
        (400, "one file", multipart(("a.png", b"1"), ("b.png", b"2")), KIND),
        (400, "one file", multipart(), KIND),
        (400, "one file", FIELD, KIND),
        (400, "one file", b"", KIND),
        (400, "one file", multipart(("a.png", b"1"))[:-20], KIND),
        (400, "one file", multipart(("a.png", b"1")), "multipart/form-data"),
        (400, "one file", multipart(("a.png", b"1")), "application/x-www-form-urlencoded"),
        (400, "one file", b"\0" * 5000, "multipart/form-data; boundary=" + "y" * 5000),
        (413, "at most 16,777,216 bytes", multipart(("a.png", b"1" * guard.MAX_UPLOAD)), KIND),
    ],
)
def test_bodies_that_are_no_upload_are_refused(tmp_path, status, words, body, kind):
    pytest.importorskip("starlette")
    site = Site(uploads=Uploads(tmp_path / "a", tmp_path / "b"))
    site.refuses(status, words, "/gradio_api/upload", "POST", body, content_type=kind)
    assert not list(tmp_path.iterdir()) and site.guard._uploading == 0


def test_only_users_and_this_page_may_upload(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "WRONG_PASSWORD_SECONDS", 0)
    uploads, body = Uploads(tmp_path / "a", tmp_path / "b"), multipart(("a.png", b"1"))
    site = Site(users=[("ada", "secret")], uploads=uploads)
    site.refuses(401, "password", "/gradio_api/upload", "POST", body, content_type=KIND)
    Site(uploads=uploads).refuses(
        403, "may not use", "/gradio_api/upload", "POST", body, origin="http://x.org"
    )
    monkeypatch.setattr(guard, "MAX_UPLOADS", 0)
    Site(uploads=uploads).refuses(503, "try again", "/gradio_api/upload", "POST", body, content_type=KIND)


def test_the_archive_of_a_visitor_is_sent_in_parts():
    site = Site()
    status, headers, body = site.ask("/images.zip?visitor=a%20b")
    assert (status, body) == (200, b"firstsecond") and headers["content-type"] == "application/zip"
    assert headers["content-disposition"].startswith("attachment") and not site.reached
    assert site.ask("/images.zip?visitor=a%20b", "HEAD")[2] == b""
    for query in ("", "?visitor=", "?visitor=other"):
        site.refuses(404, "no images", f"/images.zip{query}")


@pytest.mark.parametrize("length", ["x", "-1", "1e3", "9" * 100, "²"])
def test_lengths_that_are_none_are_refused(length):
    Site().refuses(413, "", "/gradio_api/queue/join", "POST", b"{}", content_length=length)


def test_large_bodies_are_refused_before_they_are_read():
    long = str(MAX_BODY + 1)
    Site().refuses(413, "shorten", "/gradio_api/queue/join", "POST", content_length=long)
    Site().refuses(413, "shorten", "/gradio_api/queue/join", "POST", b" " * 1000, chunks=MAX_BODY // 1000 + 1)


def test_listeners_are_counted_while_they_wait():
    site = Site()
    site.ask("/gradio_api/queue/data?session_hash=abc")
    assert site.reached[0][2] == {"abc": 1} and site.listeners == {}


def basic(text):
    return f"Basic {base64.b64encode(text.encode()).decode()}"


def test_only_users_are_answered(monkeypatch):
    monkeypatch.setattr(guard, "WRONG_PASSWORD_SECONDS", 0)
    site = Site(users=[("ada", "pa:ss wörd"), ("bob", "x")])
    for header in (
        "",
        basic("ada:x"),
        basic("bob:"),
        basic("ada"),
        "Basic !",
        "Basic",
        "Bearer x",
        "Basic é",
    ):
        for path in ("/", "/assets/a.js", "/gradio_api/queue/join"):
            site.refuses(401, "user name and password", path, authorization=header)
    assert site.ask()[1]["www-authenticate"].startswith("Basic")
    assert site.ask(authorization=basic("ada:pa:ss wörd"))[0] == 200
    assert site.ask(authorization=basic("bob:x").replace("Basic", "basic"))[0] == 200


def test_guessing_passwords_is_slow_and_does_not_keep_users_waiting(monkeypatch):
    monkeypatch.setattr(guard, "WRONG_PASSWORD_SECONDS", 0.1)
    site, answered = Site(users=[("ada", "secret")]), []

    async def ask(password):
        status, _, _ = await site.answer(authorization=basic(f"ada:{password}") if password else "")
        answered.append((password, status))

    async def ask_together():
        await asyncio.gather(*map(ask, ["a", "b", "c", "secret", ""]))

    begin = time.monotonic()
    asyncio.run(ask_together())
    assert time.monotonic() - begin >= 0.3
    assert answered == [("secret", 200), ("", 401), ("a", 401), ("b", 401), ("c", 401)]


def test_passwords_are_read_from_files(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("pa:ss wörd\r\n")
    (tmp_path / "b").write_text("x")
    entries = [f"ada:{tmp_path / 'a'}", f"bob:{tmp_path / 'b'}"]
    assert read_users(entries) == [("ada", "pa:ss wörd"), ("bob", "x")]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_users([]) == [] and read_users(["bob:~/b"]) == [("bob", "x")]
    with pytest.raises(UserError, match="'ada' is given twice"):
        read_users([entries[0], entries[0]])


@pytest.mark.parametrize("entry", ["ada", "ada:", ":file", "", "a\nb:file"])
def test_a_user_without_a_file_is_one_line(entry):
    with pytest.raises(UserError, match="give USER:PASSWORD_FILE"):
        read_users([entry])


@pytest.mark.parametrize("content", [b"", b"\n", b"a\nb\n", b"\xff", b"x" * 2000, b"a\0b", None])
def test_a_bad_password_file_is_one_line_without_the_password(tmp_path, content):
    path = tmp_path / "password"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"password file .* of user 'ada'") as caught:
        read_users([f"ada:{path}"])
    assert "\n" not in str(caught.value) and "xxx" not in str(caught.value)
