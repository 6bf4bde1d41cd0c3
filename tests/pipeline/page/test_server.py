"""Tests the web page over HTTP, with a tiny model."""

import io
import os
import signal
import socket
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from web_page import Slow, Visitor, drawn, png, uploaded, wait_for

from pixart_jax.errors import UserError
from pixart_jax.pipeline.image_files import read_png_settings
from pixart_jax.pipeline.page import clicks, guard, server


def test_only_the_images_of_the_page_are_served(served, tmp_path):
    out = tmp_path / "out"
    for name in ("secret.txt", "page.html", "00000-0-earlier.png"):
        (out / name).write_text("<script>alert(1)</script>")
    paths = served.images(count=2)
    assert [Path(path).name for path in paths] == ["00001-0-a-corgi.png", "00001-1-a-corgi.png"]
    for path in paths:
        status, headers, body = served.ask(f"/gradio_api/file={path}")
        assert (status, body) == (200, Path(path).read_bytes())
        assert headers["content-type"] == "image/png" and headers["x-content-type-options"] == "nosniff"
    for name in ("secret.txt", "page.html", "00000-0-earlier.png", "", f"../{tmp_path.name}"):
        assert served.ask(f"/gradio_api/file={out / name}")[0] == 404
        picture = {"index": 0, "value": {"image": {"path": str(out / name)}}}
        assert "no such image" in served.error(function="select_gallery", event=picture)
    picture = {"index": 0, "value": {"image": {"path": paths[1]}}}
    shown = served.result(function="select_gallery", event=picture)["data"]
    assert [each["request"]["seed"] for each in shown if isinstance(each, dict) and "request" in each] == [1]
    # Gradio would copy a file that a value names into the folder.
    file = {"path": str(out / "secret.txt"), "meta": {"_type": "gradio.FileData"}}
    assert served.call(prompt=file)[0] == 400
    for path in ("/gradio_api/run/generate", "/gradio_api/call/generate", "/gradio_api/component_server"):
        assert served.ask(path, "POST", b"x" * 1000)[0] == 405
    assert len(list(out.iterdir())) == 5  # nothing is copied


def test_other_sites_are_refused(served):
    for header in ({"Host": "example.org"}, {"Origin": "http://example.org"}, {"Origin": "null"}):
        for method, path in (("GET", "/"), ("GET", "/config"), ("OPTIONS", "/gradio_api/queue/join")):
            status, headers, _ = served.ask(path, method, **header)
            assert status == 403 and not [name for name in headers if name.startswith("access-control")]
    assert served.ask("/", Origin=f"http://{served.address}")[0] == 200


def test_a_refused_value_is_shown_and_not_logged(served, tmp_path, capfd):
    assert "prompt has 5,000 characters" in served.error(prompt="<b>" + "x" * 4997)
    assert served.error(sampler="<b>").startswith("sampler is &#x27;&lt;b&gt;&#x27;")
    assert served.call(prompt="x" * 2_000_000)[0] == 413
    assert capfd.readouterr() == ("", "") and not list((tmp_path / "out").iterdir())


def test_an_image_that_cannot_be_written_is_one_line(served, tmp_path, capfd):
    (tmp_path / "out").rmdir()
    (tmp_path / "out").write_text("a file")
    assert "cannot be written" in served.error()
    err = capfd.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_an_unexpected_error_goes_to_the_log_and_not_to_the_page(served, pipe, monkeypatch, capfd):
    def fail(*_, **__):
        raise RuntimeError("the secret of the server")

    monkeypatch.setattr(clicks, "make_record", fail)
    assert served.error() == "Something went wrong on the server: see its messages."
    assert capfd.readouterr().err.count("RuntimeError: the secret of the server") == 1
    monkeypatch.setattr(pipe, "resolve", fail)
    assert served.error() == "Something went wrong on the server: see its messages."


IMAGE = np.random.default_rng(0).integers(0, 256, (48, 32, 3), np.uint8)


def test_an_upload_is_the_start_of_an_image(served, pipe, tmp_path):
    data = png(IMAGE, "JPEG", quality=95)
    status, (path,) = served.upload(data, name="../../etc/x.jpg")
    assert status == 200 and ".." not in path and "x.jpg" not in path
    status, headers, body = served.ask(f"/gradio_api/file={path}")
    assert (status, headers["content-type"], body) == (200, "image/jpeg", data)
    assert not list((tmp_path / "out").iterdir())  # it lies in the temporary folder
    mask = np.zeros((48, 32), bool)
    mask[:24] = True
    size = {"width": 32, "height": 48}
    (plain,) = served.images(image=uploaded(path), strength="0.6", **size)
    (inpainted,) = served.images(image=uploaded(path), mask=drawn(mask), **size)
    records = [read_png_settings(each) for each in (plain, inpainted)]
    assert records[0]["request"]["strength"] == 0.6 and "mask" not in records[0]["request"]
    inputs = tmp_path / "out" / "inputs"
    assert {Path(name).parent for record in records for name in record["files"]} == {inputs}
    # The copy has the bytes of the visitor's file, so that the image can be generated again from that.
    assert Path(records[0]["request"]["image"]).read_bytes() == data
    (tmp_path / "start.jpg").write_bytes(data)
    common = {"steps": 2, "guidance_scale": 1.0, **size, "image": str(tmp_path / "start.jpg")}
    for file, settings in ((plain, {"strength": 0.6}), (inpainted, {"mask": mask})):
        np.testing.assert_array_equal(Image.open(file), pipe("a corgi", **common, **settings)[0])


def test_the_settings_of_an_image_can_be_put_back(served):
    (path,) = served.upload(png(IMAGE))[1]
    served.images(image=uploaded(path), seed=7, steps=3, width=32, height=48, **{"sampler": "ddim"})
    call = next(each for each in served.config["dependencies"] if each["api_name"] == "use")
    names = {each["id"]: each["props"].get("elem_id") for each in served.config["components"]}
    values = dict(zip((names[number] for number in call["outputs"]), served.result(function="use")["data"]))
    assert (values["seed"], values["steps"], values["sampler"], values["height"]) == (7, 3, "ddim", 48)
    copy = values["image"]["path"]
    assert Path(copy).parent.name == "inputs" and values["strength"] == "0.8"
    assert copy.replace("/", "") in values["mask"].replace("/", "")
    assert len(served.images(image=uploaded(copy), width=32, height=48)) == 1


def test_a_new_visitor_has_one_history_whichever_call_comes_first(served):
    images = served.images("new") + served.images("other")
    images += served.images("new")
    name = served.result("new", function="start")["data"][0]
    assert len(name) == 22 and served.page._clicks.history[name] == [images[0], images[2]]
    # Later pages of this visitor send the name.
    images += served.images("later", visitor=name)
    assert served.page._clicks.history[name] == [images[0], *images[2:]]
    shown = served.result("later", function="start", visitor=name)["data"][1]
    assert [each["image"]["path"] for each in shown] == [images[3], images[2], images[0]]
    for strange in ("../../../etc/passwd!!!", 5, None, "x" * 1000):
        assert served.result("later", function="start", visitor=strange)["data"][0] not in (strange, name)


def test_uploads_that_are_none_are_one_line(served, tmp_path, capfd):
    assert served.upload(b"<svg onload='alert(1)'/>", "a.svg")[0] == 400
    assert "PNG" in served.upload(b"<html>", "a.html")[1]
    assert served.upload(png(IMAGE), count=2)[0] == 400
    assert served.upload(b"\x89PNG\r\n\x1a\n" + b"\0" * (guard.MAX_UPLOAD + 1))[0] == 413
    for kind in ("application/json", "multipart/form-data", "multipart/form-data; boundary=", ""):
        status, _, body = served.ask("/gradio_api/upload", "POST", b"x", **{"content-type": kind})
        assert status == 400 and b"one file" in body
    for other in (
        "/etc/passwd",
        str(tmp_path / "out"),
        "data:image/png;base64,AAAA",
        "http://example.org/a.png",
    ):
        assert served.call(image=uploaded(other))[0] == 400
        assert "upload it again" in served.error(image=other)
    assert capfd.readouterr() == ("", "")


def test_a_visitor_who_leaves_during_an_upload_leaves_nothing(served, monkeypatch):
    monkeypatch.setattr(guard, "MAX_UPLOADS", 1)
    kind = "multipart/form-data; boundary=x"
    connection = served.connect()
    connection.putrequest("POST", "/gradio_api/upload")
    connection.putheader("content-type", kind)
    connection.putheader("content-length", "100000")
    connection.endheaders(b"--x\r\n")
    wait_for(lambda: served.page._guard._uploading)
    assert served.upload(png(IMAGE))[0] == 503
    connection.close()
    wait_for(lambda: not served.page._guard._uploading)
    assert served.upload(png(IMAGE))[0] == 200


def test_a_visitor_gets_all_images_in_a_zip(served, tmp_path):
    ada, bob = "a" * 22, "b" * 22
    assert served.ask(f"/images.zip?visitor={ada}")[0] == 404
    (path,) = served.upload(png(IMAGE))[1]
    images = served.images(visitor=ada, count=2)
    images += served.images("second", visitor=ada, image=uploaded(path), width=32, height=48)
    served.images("third", visitor=bob)
    status, headers, body = served.ask(f"/images.zip?visitor={ada}")
    assert status == 200 and "attachment" in headers["content-disposition"]
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        names = archive.namelist()
        assert [name for name in names if "/" not in name] == [Path(each).name for each in images]
        assert len(names) == 4 and names[3] == f"inputs/{Path(path).name}"
        assert archive.read(names[0]) == Path(images[0]).read_bytes()
    Path(images[0]).unlink()
    with zipfile.ZipFile(io.BytesIO(served.ask(f"/images.zip?visitor={ada}")[2])) as archive:
        assert archive.namelist() == names[1:]
    for other in ("", "../x", ada[:-1]):
        assert served.ask(f"/images.zip?visitor={other}")[0] == 404


def test_closing_removes_the_temporary_folder_while_a_click_is_computed(pipe, gradio, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    slow = Slow(monkeypatch)
    page = server.serve(pipe, {}, port=0, block=False)
    visitor = Visitor(page)
    assert visitor.call(count=2)[0] == 200
    waiting = visitor.wait()
    slow.ready.release()
    assert slow.started.acquire(timeout=60) and slow.started.acquire(timeout=60)
    assert [path.name for path in tmp_path.rglob("*.png")] == ["00000-0-a-corgi.png"] and page.computing
    page.close()
    assert not list(tmp_path.iterdir())
    slow.ready.release()
    assert slow.ended.acquire(timeout=60)
    assert not list(tmp_path.iterdir())
    waiting.close()
    page.close()  # may be called again


SERVER = """
import sys
from pixart_jax.pipeline.page import server
from pixart_jax.pipeline.requests import Request
from pixart_jax.pipeline.sizes import Size

class Pipe:
    def resolve(self, request):
        return Request("", width=32, height=32, guidance_scale=1.0), Size(32, 32, 32, 32)

server.serve(Pipe(), {}, port=0)
"""


@pytest.mark.parametrize(
    "ends", [(signal.SIGKILL, signal.SIGTERM), (signal.SIGINT,)], ids=["killed, then SIGTERM", "Ctrl-C"]
)
def test_nothing_stays_in_the_temporary_folder(gradio, tmp_path, ends):
    status = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 0}
    for number in ends:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            env=os.environ | {"TMPDIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert server.stdout.readline().startswith(f"images in {tmp_path}")
        assert len(list(tmp_path.iterdir())) == 1  # that of a killed process is gone
        server.send_signal(number)
        assert server.communicate(timeout=60) == ("", "")
        assert server.returncode == status[number]
        assert bool(list(tmp_path.iterdir())) == (number == signal.SIGKILL)


def test_folders_in_use_and_of_others_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "file").touch()
    (tmp_path / f"{server._PREFIX}link").symlink_to(tmp_path / "else")
    (tmp_path / f"{server._PREFIX}file").touch()
    with server._temporary_folder() as first:
        (Path(first) / "picture.png").touch()
        with server._temporary_folder() as second:
            assert (Path(first) / "picture.png").exists() and first != second
    assert (tmp_path / "else" / "file").exists()
    assert sorted(path.name[-4:] for path in tmp_path.iterdir()) == ["else", "file", "link"]


@pytest.mark.parametrize(
    "host, users, warned",
    [("0.0.0.0", [], True), ("0.0.0.0", [("ada", "secret")], False), ("localhost", [], False)],
)
def test_an_open_page_without_users_is_warned_about(pipe, gradio, tmp_path, capsys, host, users, warned):
    with server.serve(pipe, {}, out=str(tmp_path), host=host, port=0, users=users, block=False) as page:
        assert Visitor(page).ask("/")[0] == (401 if users else 200)
    out, err = capsys.readouterr()
    assert err.startswith("warning: everyone who reaches port") == warned and err.count("\n") == warned
    assert "secret" not in out + err


def test_requests_are_refused_while_too_many_connections_are_open(pipe, gradio, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 3)
    with server.serve(pipe, {}, out=str(tmp_path), port=0, block=False) as page:
        visitor = Visitor(page)
        assert visitor.ask("/")[0] == 200
        opened = [visitor.connect() for _ in range(3)]
        for connection in opened:
            connection.connect()
        wait_for(lambda: visitor.ask("/")[0] == 503)
        for connection in opened:
            connection.close()
        wait_for(lambda: visitor.ask("/")[0] == 200)


def is_closed(connection):
    connection.sock.settimeout(0.1)
    try:
        return not connection.sock.recv(1)
    except TimeoutError:
        return False


def test_connections_without_a_request_are_closed(pipe, gradio, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(guard, "REQUEST_SECONDS", 1.0)
    with server.serve(pipe, {}, out=str(tmp_path), port=0, block=False) as page:
        visitor = Visitor(page)
        opened = [visitor.connect() for _ in range(5)]
        for connection in opened:
            connection.connect()
        assert is_closed(opened[4]) and not is_closed(opened[0])
        opened[0].sock.sendall(b"GET / HTTP/1.1\r\nX-")
        wait_for(lambda: all(map(is_closed, opened[:4])))
        assert visitor.ask("/")[0] == 200


def test_a_port_in_use_is_one_line(pipe, gradio, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port={port}.*give another --port"):
            server.serve(pipe, {}, out=str(tmp_path), port=port, block=False)
    assert not list(Path(tmp_path).iterdir())


def test_without_gradio_the_extra_is_named(pipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"pip install 'pixart_jax\[app\]'"):
        server.serve(pipe, {}, out=str(tmp_path / "out"), block=False)
    assert not (tmp_path / "out").exists()
