"""Paths of the hub, against a stand-in on the loopback interface."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_server import READ, HubServer, in_process
from huggingface_hub import constants

from pixart_jax import hub
from pixart_jax.errors import EXIT_STORAGE, RunStopped, UserError
from pixart_jax.hub import (
    HubPath,
    Wanted,
    cached,
    check_paths,
    local,
    local_all,
    name_of,
    needed_files,
    pinned,
)

ROOT = Path(__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def server(tmp_path):
    with HubServer() as found, in_process(found, tmp_path / "home"):
        yield found


# --- Syntax


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("hub:a/b", HubPath("a/b")),
        ("hub:models/a/b", HubPath("a/b")),
        ("hub:a/b/", HubPath("a/b")),
        ("hub:a/b@v1", HubPath("a/b", revision="v1")),
        (f"hub:a/b@{COMMIT}/vae", HubPath("a/b", revision=COMMIT, path="vae")),
        ("hub:a/b@refs/pr/3/x/y.bin", HubPath("a/b", revision="refs/pr/3", path="x/y.bin")),
        ("hub:a/b@feature%2Fx/y", HubPath("a/b", revision="feature/x", path="y")),
        ("hub:datasets/a/b@v1/train", HubPath("a/b", True, "v1", "train")),
        ("hub:a/b/my lora.safetensors", HubPath("a/b", path="my lora.safetensors")),
    ],
)
def test_a_path_is_read_and_written_in_one_form(text, place):
    assert HubPath.parse(text) == place
    assert HubPath.parse(str(place)) == place


@pytest.mark.parametrize(
    "text", ["hub:", "hub:a", "hub:/a/b", "hub:a//b", "hub:a/b@", "hub:a/b/../c", "hub:a b/c", "hub:a/b//c"]
)
def test_another_form_is_one_line_with_the_rule(text):
    with pytest.raises(UserError, match=r"--x is 'hub:.*write a path of the hub as hub:OWNER/NAME"):
        check_paths("--x", text)


def test_what_was_probably_meant_is_named():
    with pytest.raises(UserError, match=r"Did you mean 'hub:PixArt-alpha/PixArt-XL-2-512x512'\?"):
        HubPath.parse("hub:PixArt-XL-2-512x512")
    for address in (
        "https://huggingface.co/a/b/tree/v1/vae",
        "https://hf.co/a/b/blob/v1/vae",
        "hf://a/b@v1/vae",
    ):
        with pytest.raises(UserError, match=r"write it as 'hub:a/b"):
            check_paths("--x", address)


def test_outputs_are_local():
    check_paths("--x", "runs/a", output=True)
    with pytest.raises(UserError, match="give a local path"):
        check_paths("--x", "hub:a/b", output=True)


# --- Choosing files


def chosen(names, path="", **options):
    return set(needed_files(dict.fromkeys(names, 1), HubPath("a/b", path=path), **options))


PIPELINE = (
    *("model_index.json", "README.md", ".gitattributes", "sample.png", "scheduler/scheduler_config.json"),
    *("transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"),
    *("transformer/diffusion_pytorch_model.fp16.safetensors", "transformer/diffusion_pytorch_model.bin"),
    *(
        "text_encoder/config.json",
        "text_encoder/model.safetensors.index.json",
        "text_encoder/flax_model.msgpack",
    ),
    *("text_encoder/model-00001-of-00002.safetensors", "text_encoder/model-00002-of-00002.safetensors"),
    *("text_encoder/pytorch_model-00001-of-00002.bin", "text_encoder/pytorch_model-00002-of-00002.bin"),
    *("text_encoder/pytorch_model.bin.index.json", "text_encoder/model.safetensors.index.fp16.json"),
    "text_encoder/model.fp16-00001-of-00001.safetensors",
    *("tokenizer/spiece.model", "tokenizer/tokenizer_config.json"),
    *("vae/config.json", "vae/diffusion_pytorch_model.safetensors", "PixArt.safetensors", "optimizer.bin"),
)
SMALL = {"model_index.json", "README.md", "scheduler/scheduler_config.json", "tokenizer/spiece.model"}
SMALL |= {"tokenizer/tokenizer_config.json", *(f"{part}/config.json" for part in hub.PARTS)}
NETWORK = {"transformer/diffusion_pytorch_model.safetensors"}
T5 = {f"text_encoder/model-0000{number}-of-00002.safetensors" for number in (1, 2)}
T5 |= {"text_encoder/model.safetensors.index.json"}
VAE = {"vae/diffusion_pytorch_model.safetensors"}


def test_of_a_pipeline_each_part_has_one_format_and_no_variants():
    found = chosen(PIPELINE)
    indices = {name for name in found if name.endswith(".index.json")}
    assert found - indices == (SMALL | NETWORK | T5 | VAE) - indices
    assert "text_encoder/model.safetensors.index.json" in found


@pytest.mark.parametrize(
    ("parts", "weights"), [(("transformer",), NETWORK), (("text_encoder", "vae"), T5 | VAE), ((), set())]
)
def test_only_the_wanted_parts_have_weights(parts, weights):
    suffixes = (".safetensors", ".bin")
    found = {name for name in chosen(PIPELINE, parts=parts) if name.endswith(suffixes)}
    assert found == {name for name in weights if name.endswith(suffixes)}
    assert chosen(PIPELINE, parts=parts) >= SMALL


def test_a_subfolder_is_all_that_is_read():
    found = chosen(PIPELINE, "vae", parts=("transformer",))
    assert found == {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        # Formats, in the order in which they are preferred.
        ("model.safetensors pytorch_model.bin tf_model.h5", "model.safetensors"),
        ("pytorch_model.bin tf_model.h5", "pytorch_model.bin"),
        # A variant only if there is nothing else, as when a folder is opened.
        ("model.fp16.safetensors pytorch_model.bin", "pytorch_model.bin"),
        ("model.fp16.safetensors", "model.fp16.safetensors"),
        # Known names before others.
        ("model.safetensors model_ema.safetensors", "model.safetensors"),
        ("lora.safetensors optimizer.bin training_args.bin", "lora.safetensors"),
        ("x-00001-of-00002.safetensors x-00002-of-00002.safetensors",) * 2,
    ],
)
def test_of_a_folder_with_several_weights(names, wanted):
    assert chosen(names.split()) == set(wanted.split())


def test_a_folder_of_several_networks_is_not_downloaded():
    names = ("PixArt-XL-2-512x512.pth", "PixArt-XL-2-1024-MS.pth", "README.md")
    with pytest.raises(UserError, match=r"several files of weights: give one of 'hub:a/b/PixArt-XL"):
        chosen(names)
    assert chosen(names, names[0]) == {names[0], "README.md"}
    with pytest.raises(UserError, match=r"several variants \('model.bf16.safetensors', 'model.fp16"):
        chosen(("model.bf16.safetensors", "model.fp16.safetensors"))


def test_of_a_file_what_is_read_with_it_comes_along():
    assert chosen(
        ("a/adapter_model.safetensors", "a/adapter_config.json", "a/x.png"), "a/adapter_model.safetensors"
    ) == {
        "a/adapter_model.safetensors",
        "a/adapter_config.json",
    }
    index = "text_encoder/model.safetensors.index.json"
    assert chosen(PIPELINE, index) == {*T5, "text_encoder/config.json"}
    assert chosen(("captions.jsonl", "README.md"), "captions.jsonl") == {"captions.jsonl"}


def test_of_data_everything_is_read():
    names = ("README.md", "a/1.png", "a/1.txt", "train-00000-of-00001.parquet", ".gitattributes")
    assert chosen(names, everything=True) == set(names[:-1])
    assert set(needed_files(dict.fromkeys(names, 1), HubPath("a/b", True, None, "a"))) == {
        "a/1.png",
        "a/1.txt",
    }


def test_a_path_that_is_not_there_names_what_is():
    with pytest.raises(UserError, match=r"a/b has PixArt.safetensors, .*vae. Did you mean 'transformer'\?"):
        chosen(PIPELINE, "transfomer")
    with pytest.raises(UserError, match=r"folder 'vae' of a/b has config.json, diffusion"):
        chosen(PIPELINE, "vae/confg.json")


# --- Downloading


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
    hub._found.cache_clear()
    assert pinned("hub:a/b/vae", like=f"hub:a/b@{commit}/vae") == f"hub:a/b@{commit}/vae"
    assert pinned("hub:a/b@main/vae", like=f"hub:a/b@{commit}/vae") != f"hub:a/b@{commit}/vae"
    assert pinned("hub:a/b/vae", like=f"hub:a/c@{commit}/vae") != f"hub:a/b@{commit}/vae"


def test_everything_is_announced_before_the_first_download(server, capsys):
    for name in ("a/b", "a/c"):
        server.add(name, {"x.json": b"1"})
    seen = []
    original = hub._download

    def download(*plan):
        seen.append(capsys.readouterr().err)
        original(*plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "_download", download)
        local_all([Wanted("hub:a/b"), Wanted("here"), Wanted("hub:a/c")])
    assert "hub:a/b" in seen[0] and "hub:a/c" in seen[0]


def test_offline_the_cache_is_enough(server, tmp_path, monkeypatch):
    server.add("a/b", {"vae/config.json": b"{}", "unet/config.json": b"{}"})
    folder = local("hub:a/b/vae")
    hub._found.cache_clear()
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
    hub._found.cache_clear()
    assert local("hub:a/b/vae") == folder


def test_without_network_the_cache_is_enough(server, monkeypatch):
    server.add("a/b", {"x.json": b"{}"})
    folder = local("hub:a/b")
    hub._found.cache_clear()
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


# --- Errors


def test_errors_say_what_to_do(server, monkeypatch):
    commit = server.add("a/b", {"x.json": b"{}"})
    server.add("a/gated", {"x.json": b"{}"}, gated=True)
    server.add("a/private", {"x.json": b"{}"}, private=True)
    page = server.endpoint

    def fails(path, text):
        hub._found.cache_clear()
        with pytest.raises(UserError, match=text) as error:
            local(path)
        assert "\n" not in str(error.value)

    fails("hub:a/none", rf"'hub:a/none': {page}/a/none does not exist, or .*not logged in: .*hf auth login")
    fails("hub:PixArt-alpha/PixArt-XL-2-512", r"Did you mean 'hub:PixArt-alpha/PixArt-XL-2-512x512'\?")
    fails("hub:a/private", "it is private and you are not logged in")
    fails("hub:a/gated", rf"accepted its licence: accept it on {page}/a/gated with your account, and log in")
    fails("hub:a/b@v9", "there is no revision 'v9'; it has main")
    fails(f"hub:a/b@{'0' * 40}", "there is no revision '0000")
    fails("hub:a/b/y.json", r"no such folder or file; a/b has x.json. Did you mean 'x.json'\?")
    monkeypatch.setenv("HF_TOKEN", READ)
    fails("hub:a/none", "or your token may not see it")
    fails("hub:a/gated", "with the account of your token")
    hub._found.cache_clear()
    assert local("hub:a/private").is_dir()
    server.accepted.add(READ)
    assert local("hub:a/gated").is_dir()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    fails("hub:a/b@main", "does not accept your token")
    assert pinned(f"hub:a/b@{commit}")
