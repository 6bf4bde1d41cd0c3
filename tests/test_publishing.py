import dataclasses
import importlib
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from command_line import parse
from hub_server import READ, WRITE, HubServer, in_process

from pixart_jax.config import InitConfig
from pixart_jax.convert import Flags, main
from pixart_jax.errors import UserError
from pixart_jax.evaluation.protocol import Protocol, Result
from pixart_jax.files import write_json
from pixart_jax.hub import downloads
from pixart_jax.pipeline.image_files import read_png_settings, save_png
from pixart_jax.weights.adapter_export import write_kohya
from pixart_jax.weights.checkpoints import write_weights
from pixart_jax.weights.loading import read_any

COMMIT = "0" * 40
REQUEST = {"prompt": "a | <b>corgi</b>", "steps": 20}


@pytest.fixture
def server(tmp_path):
    with HubServer() as found, in_process(found, tmp_path / "home", token=WRITE):
        yield found


@pytest.fixture(scope="module")
def run(tmp_path_factory, random_params):
    """A run that was trained from weights of the hub, with a VAE in a folder of this machine."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = dataclasses.replace(
        tiny.CONFIG,
        features=dataclasses.replace(tiny.CONFIG.features, vae=f"{folder.parent}/my-vae"),
        init=InitConfig("weights", f"hub:PixArt-alpha/PixArt-XL-2-512x512@{COMMIT}"),
    )
    write_weights(folder, random_params(tiny.MODEL)[1], config)
    return folder


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(2):
        record = {
            "request": {
                "prompt": "a | <b>corgi</b>",
                "steps": 20,
                "seed": seed,
                "image": str(tmp_path / "x.png"),
            },
            "source": {"checkpoint": str(tmp_path / "run")},
            "fingerprint": "f",
            "files": {str(tmp_path / "x.png"): "0"},
            "made_with": {
                "pixart_jax": "1",
                "jax": "1",
                "device": "cpu",
                "dtype": "float32",
                "batch_size": 1,
            },
        }
        save_png(folder / f"{seed}.png", np.full((8, 8, 3), seed, np.uint8), record)
    return folder


@pytest.fixture
def metrics(tmp_path):
    protocol = Protocol("fid", 500, sampler="dpm_solver", steps=20, height=256, width=256, reference="abc")
    Result(str(tmp_path / "run"), 12.345, protocol, "mjhq-30k").write(tmp_path / "fid.json")
    rows = [{"stage": "stage1", "accuracy": 0.985}, {"stage": "stage2", "accuracy": 0.5}]
    write_json(tmp_path / "digits.json", rows)
    return [tmp_path / "fid.json", tmp_path / "digits.json"]


def push(source, *arguments, to="diffusers"):
    main(parse(Flags, f"--input={source}", f"--to={to}", *arguments))


def files_of(server, name="me/pixart", branch="main"):
    repository = server.repositories[f"models/{name}"]
    return repository.commits[repository.refs[branch]]


def test_weights_with_card_pictures_and_metrics(server, run, pictures, metrics, tmp_path, capsys):
    arguments = [f"--push_images={pictures}", *(f"--push_metrics={each}" for each in metrics)]
    push(run, "--push=hub:me/pixart", *arguments)
    said = capsys.readouterr().out
    files = files_of(server)
    assert {"README.md", "config.json", "diffusion_pytorch_model.safetensors", "images/0.png"} <= set(files)
    card = files["README.md"].decode()
    assert card.startswith("---\nlicense: openrail++\n")
    front = card.split("\n---\n")[0].splitlines()
    assert "pipeline_tag: text-to-image" in front and "base_model: PixArt-alpha/PixArt-XL-2-512x512" in front
    assert (
        "| ![](images/1.png) | a \\| &lt;b&gt;corgi&lt;/b&gt; | 20 steps, guidance 1, seed 1, 8 x 8 |" in card
    )
    assert "| fid | 12.345 | 500 | dpm_solver | 20 | 256 | 256 | mjhq-30k |" in card
    assert "| accuracy | stage |\n|---|---|\n| 0.985 | stage1 |" in card
    # Nothing of this machine: neither in the card nor in the pictures and weights.
    assert not [name for name, content in files.items() if str(tmp_path.parent).encode() in content]
    (tmp_path / "0.png").write_bytes(files["images/0.png"])
    assert read_png_settings(tmp_path / "0.png")["request"] == {
        "prompt": "a | <b>corgi</b>",
        "steps": 20,
        "seed": 0,
    }
    # What was uploaded can be read, and the last line says how.
    path = re.search(r"(hub:me/pixart@[0-9a-f]{40})\n$", said)[1]
    downloads._found.cache_clear()
    uploaded, exported = read_any(path).params["blocks"], read_any(run).params["blocks"]
    jax.tree.map(np.testing.assert_array_equal, uploaded, exported)


def test_an_interrupted_upload_is_repeated(server, run, monkeypatch, capsys):
    monkeypatch.setattr(server, "refuse_commits", 1)
    with pytest.raises(UserError, match=r"hub:me/pixart"):
        push(run, "--push=hub:me/pixart")
    uploaded = [request for request in server.requests if request.startswith("PUT")]
    push(run, "--push=hub:me/pixart", "--push_private")
    assert [request for request in server.requests if request.startswith("PUT")] == uploaded != []
    assert "config.json" in files_of(server)
    # A third time changes nothing.
    commits = len(server.repositories["models/me/pixart"].commits)
    push(run, "--push=hub:me/pixart")
    assert len(server.repositories["models/me/pixart"].commits) == commits


def test_a_dry_run_needs_no_hub(run, pictures, monkeypatch, tmp_path, capsys):
    """HF_HUB_OFFLINE is set, and there is no token."""
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda *_: pytest.fail("asked"))
    push(run, "--push=hub:me/pixart@dev", "--push_dry_run", "--push_private", f"--push_images={pictures}")
    said = capsys.readouterr().out
    assert re.search(
        r"would upload 5 files, [\d.]+ kB, to https://huggingface.co/me/pixart \(private .*branch dev\)", said
    )
    assert re.search(r" [\d.]+ kB  diffusion_pytorch_model.safetensors\n", said)
    assert "README.md:\n---\nlicense: openrail++" in said and "## Training manifest" in said
    assert str(tmp_path) not in said


def test_a_branch_and_a_private_repository(server, run):
    push(run, "--push=hub:me/pixart@dev", "--push_private", to="official")
    assert server.repositories["models/me/pixart"].private
    assert {"model.safetensors", "README.md"} <= set(files_of(server, branch="dev"))
    assert "model.safetensors" not in files_of(server)


def test_a_checkpoint_is_published_without_folders(server, run, tmp_path):
    push(run, "--push=hub:me/run", f"--output={tmp_path / 'kept'}", to="checkpoint")
    files = files_of(server, "me/run")
    metadata = json.loads(files["checkpoints/0/metadata/metadata"])
    assert metadata["config"]["features"]["vae"] == "my-vae" and "working_directory" not in metadata
    assert metadata["config"]["init"]["path"].startswith("hub:PixArt-alpha/")
    assert (tmp_path / "kept" / "README.md").is_file()
    read = read_any("hub:me/run")
    assert read.source == "checkpoint" and read.licence == "openrail++"


@pytest.mark.parametrize("to", ["peft", "comfyui"])
def test_an_adapter(server, tmp_path, to):
    adapter = dataclasses.replace(tiny.make_adapter(), base="PixArt-XL-2-512x512")
    write_kohya(tmp_path / "a.safetensors", adapter)
    with pytest.raises(
        UserError, match=r"licence of the weights is not known: choose one with --licence=openrail"
    ):
        push(tmp_path / "a.safetensors", "--push=hub:me/lora", to=to)
    push(tmp_path / "a.safetensors", "--push=hub:me/lora", "--licence=openrail++", to=to)
    files = files_of(server, "me/lora")
    name = "adapter_model.safetensors" if to == "peft" else "lora.safetensors"
    assert {name, "README.md"} <= set(files)
    card = files["README.md"].decode()
    assert "license: openrail++\n" in card and "base_model: PixArt-alpha/PixArt-XL-2-512x512" in card


def test_private_text_in_a_file_is_an_error(server, run, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "PixArtTransformer2DModel")
    with pytest.raises(UserError, match=r"'config.json' names 'PixArtTransformer2DModel' of this machine"):
        push(run, "--push=hub:me/pixart")
    assert not any(request.startswith("POST") for request in server.requests)


def test_folders_that_libraries_store_are_replaced(tmp_path):
    publishing = importlib.import_module("pixart_jax.publishing")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"_name_or_path": "/home/me/PixArt/text_encoder", "d_model": 3}))
    cleaned = {"_name_or_path": "PixArt/text_encoder", "d_model": 3}
    assert json.loads(publishing._files(tmp_path)["config.json"]) == cleaned
    file.write_text(json.dumps(cleaned))
    assert publishing._files(tmp_path)["config.json"] == file


@pytest.mark.parametrize(
    ("token", "arguments", "message"),
    [
        ("", ["--push=hub:me/x"], "needs a token with write rights: log in with `hf auth login`"),
        ("hf_wrong", ["--push=hub:me/x"], "does not accept your token"),
        (READ, ["--push=hub:me/x"], "the token has no right to write there"),
        (
            WRITE,
            ["--push=hub:you/x"],
            "of 'me', which may not write to 'you': give one of hub:me/…",
        ),
        (WRITE, ["--push=me/x"], "--push is 'me/x': give the repository, hub:OWNER/NAME"),
        (WRITE, ["--push=hub:me/x/folder"], r"weights are uploaded to hub:OWNER/NAME\[@BRANCH\]"),
        (WRITE, ["--push_dry_run"], "--push_dry_run has no effect without --push"),
        (WRITE, ["--push=hub:me/x", "--push_images=none"], "--push_images=none is not a folder"),
        (WRITE, ["--push=hub:me/x", "--push_metrics=none.json"], "--push_metrics=none.json cannot be read"),
    ],
)
def test_errors_say_what_to_do(server, run, token, arguments, message, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", token)
    arguments = (
        arguments if arguments[0].startswith("--push=") else [*arguments, f"--output={tmp_path / 'o'}"]
    )
    with pytest.raises(UserError, match=message) as error:
        push(run, *arguments)
    assert "\n" not in str(error.value)


def test_a_licence_that_is_not_known_has_to_be_chosen(server, tmp_path, random_params):
    write_weights(tmp_path / "scratch", random_params(tiny.MODEL)[1], tiny.CONFIG)
    with pytest.raises(UserError, match="the licence of the weights is not known"):
        push(tmp_path / "scratch", "--push=hub:me/scratch")
    push(tmp_path / "scratch", "--push=hub:me/scratch", "--licence=apache-2.0")
    assert b"license: apache-2.0" in files_of(server, "me/scratch")["README.md"]
    assert not list(Path(tmp_path).glob("pixart-push-*"))
