"""Downloads from a stand-in of the hub on the loopback interface."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_server import HubServer, in_process
from huggingface_hub import constants

from pixart_jax.errors import EXIT_STORAGE, RunStopped, UserError
from pixart_jax.hub import downloads
from pixart_jax.hub.downloads import Wanted, cached, local, local_all, pinned
from pixart_jax.hub.paths import name_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def server(tmp_path):
    with HubServer() as found, in_process(found, tmp_path / "home"):
        yield found


def test_a_folder_is_downloaded_once_and_said_before(server, capsys):
    commit = server.add(
        "a/b", {"vae/config.json": b"{}", "vae/model.safetensors": b"x" * 5000, "x.json": b"1"}
    )
    assert local("some/folder") == Path("some/folder")
    folder = local("hub:a/b/vae")
    assert folder.name == "vae" and (folder / "model.safetensors").read_bytes() == b"x" * 5000
    assert not (folder.parent / "x.json").exists()
    text = capsys.readouterr().err
    assert f"downloading 2 files, 5.0 kB, of hub:a/b (commit {commit[:12]} of 'main')" in text
    assert name_of(folder) == f"hub:a/b@{commit}/vae" == pinned("hub:a/b/vae")
    assert name_of(folder.parent) == f"hub:a/b@{commit}"
    server.requests.clear()
    assert local("hub:a/b/vae") == folder
    assert server.requests == [] and capsys.readouterr().err == ""
    # The rest of the repository.
    assert (local("hub:a/b") / "x.json").read_text() == "1"
    assert "5.0 kB are there already" in capsys.readouterr().err


def test_a_revision_and_a_data_set(server):
    old = server.add("datasets/a/b", {"x.txt": b"old"})
    server.repositories["datasets/a/b"].refs["v1"] = old
    server.add("datasets/a/b", {"x.txt": b"new"})
    assert local("hub:datasets/a/b/x.txt").read_text() == "new"
    assert local("hub:datasets/a/b@v1/x.txt").read_text() == "old"
    assert pinned("hub:datasets/a/b@v1/x.txt") == f"hub:datasets/a/b@{old}/x.txt"
    assert name_of(local(f"hub:datasets/a/b@{old}/x.txt")) == f"hub:datasets/a/b@{old}/x.txt"


def test_pinning_keeps_everything_else(server):
    commit = server.add("a/b", {"x.safetensors": b"1"})
    assert pinned("x,hub:a/b,root=hub:a/b/c") == f"x,hub:a/b@{commit},root=hub:a/b@{commit}/c"
    assert pinned("hub:a/b/x.safetensors:0.8") == f"hub:a/b@{commit}/x.safetensors:0.8"
    assert pinned("/a,~/b:0.8") == "/a,~/b:0.8"
    # A run keeps the commit that it was started with, unless a revision is given.
    server.add("a/b", {"x.safetensors": b"2"})
    downloads._found.cache_clear()
    assert pinned("hub:a/b/vae", like=f"hub:a/b@{commit}/vae") == f"hub:a/b@{commit}/vae"
    assert pinned("hub:a/b@main/vae", like=f"hub:a/b@{commit}/vae") != f"hub:a/b@{commit}/vae"
    assert pinned("hub:a/b/vae", like=f"hub:a/c@{commit}/vae") != f"hub:a/b@{commit}/vae"


def test_everything_is_announced_before_the_first_download(server, capsys):
    for name in ("a/b", "a/c"):
        server.add(name, {"x.json": b"1"})
    seen = []
    original = downloads._download

    def download(*plan):
        seen.append(capsys.readouterr().err)
        original(*plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(downloads, "_download", download)
        local_all([Wanted("hub:a/b"), Wanted("here"), Wanted("hub:a/c")])
    assert "hub:a/b" in seen[0] and "hub:a/c" in seen[0]


def test_offline_the_cache_is_enough(server, tmp_path, monkeypatch):
    server.add("a/b", {"vae/config.json": b"{}", "unet/config.json": b"{}"})
    folder = local("hub:a/b/vae")
    downloads._found.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local("hub:a/b/vae") == folder == cached("hub:a/b/vae")
    assert cached("hub:a/c") is None and cached(tmp_path) == tmp_path
    with pytest.raises(
        UserError, match=r"'hub:a/b@\w+/unet' is not complete in the cache \(1 files are missing"
    ):
        local("hub:a/b/unet")
    with pytest.raises(
        UserError, match=r"'hub:a/c' is not in the cache, and HF_HUB_OFFLINE forbids downloads"
    ):
        local("hub:a/c")
    # A cache without the list of files, as older versions of huggingface_hub write it.
    shutil.rmtree(Path(constants.HF_HUB_CACHE) / "models--a--b" / "trees")
    from huggingface_hub import _tree_cache

    _tree_cache._IN_MEMORY_TREE_CACHE.clear()
    downloads._found.cache_clear()
    assert local("hub:a/b/vae") == folder


def test_without_network_the_cache_is_enough(server, monkeypatch):
    server.add("a/b", {"x.json": b"{}"})
    folder = local("hub:a/b")
    downloads._found.cache_clear()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert local("hub:a/b") == folder
    with pytest.raises(
        UserError, match=r"'hub:a/c' is not in the cache, and http://127.0.0.1:9 cannot be reached"
    ):
        local("hub:a/c")


def test_a_connection_that_breaks_continues_where_it_was(server):
    content = bytes(range(256)) * 200_000  # the library reads parts of 10 MB
    server.add("a/b", {"model.safetensors": content})
    server.break_after = 30_000_000
    assert (local("hub:a/b") / "model.safetensors").read_bytes() == content
    (sent,) = server.sent.values()
    assert len(content) < sent < len(content) + 11_000_000


def test_a_killed_download_keeps_the_files_that_are_complete(tmp_path):
    code = "from pixart_jax.hub import local; print(local('hub:a/b'))"
    with HubServer() as server:
        server.add("a/b", {"config.json": b"{}", "model.safetensors": b"x" * 5000})
        environment = {**os.environ, **server.environment(tmp_path), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code]
        server.stop_after = 3000
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
            assert server.stopped.wait(60)
            while not list(Path(tmp_path, "hub", "models--a--b", "snapshots").glob("*/config.json")):
                time.sleep(0.05)
            process.kill()
        assert "/config.json" in "".join(server.sent)
        server.sent.clear()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert server.files_read() == {"model.safetensors"} and "downloading 1 file, 5.0 kB" in done.stderr
    assert (Path(done.stdout.strip()) / "model.safetensors").read_bytes() == b"x" * 5000


def test_no_room_is_said_before_the_download(server, monkeypatch):
    server.add("a/b", {"x.json": b"x" * 5000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10_000, 6_000, 4_000))
    with pytest.raises(RunStopped, match=r"takes 5.0 kB, .* has 4.0 kB free: .*HF_HOME") as error:
        local("hub:a/b")
    assert error.value.status == EXIT_STORAGE and not server.sent
