"""Every flag and config field that names a path says what one of the hub means, and the commands open it."""

import dataclasses
import importlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from command_line import parse
from etils import epath
from feature_folders import three_shards
from foreign import SIZES, diffusers_model, save_pipeline
from hub_server import HubServer, in_process
from PIL import Image

import pixart_jax
from pixart_jax import hub
from pixart_jax.config import (
    AdapterConfig,
    FeaturesConfig,
    InitConfig,
    TextEncoderConfig,
    TrainConfig,
    all_fields,
    with_pinned_paths,
)
from pixart_jax.convert import convert
from pixart_jax.data.sources import open_source
from pixart_jax.encoders.identity import encoder_files
from pixart_jax.encoders.text import load_tokenizer
from pixart_jax.errors import UserError
from pixart_jax.flags import fetched, flag
from pixart_jax.hub import downloads
from pixart_jax.pipeline.image_files import read_record
from pixart_jax.pipeline.requests import read_requests
from pixart_jax.training.data import open_dataset
from pixart_jax.training.resuming import with_pinned_paths as pinned_as_before
from pixart_jax.weights.adapter_export import write_kohya, write_peft
from pixart_jax.weights.adapter_files import parse_spec, read_adapter, read_adapters
from pixart_jax.weights.checkpoints import write_weights
from pixart_jax.weights.loading import licence_of, read_any

COMMANDS = ("benchmark", "caption", "convert", "evaluate", "precompute", "sample", "train")
# What every path is for. A new flag needs a line here, and a decision.
TABLE = {
    "benchmark": {
        **{"out": "output", "profile": "output", "data": True, "stages": "local", "rates": True},
    },
    "caption": {"images": "images", "out": "output", "source_option": True, "model": "weights"},
    "convert": {
        "input": "weights",
        "output": "output",
        "adapter": "weights",
        "pipeline": "weights",
        "push_images": True,
        "push_metrics": True,
    },
    "evaluate": {
        **{"checkpoint": "weights", "out": "output", "features": True, "captions": True, "images": True},
        **{"reference": True, "statistics": "output", "inception": True, "clip": "weights", "prompts": True},
        **{"results": True, "pipeline": "weights"},
    },
    "precompute": {
        **{"images": "images", "out": "output", "captions": True, "source_option": True, "masks": True},
        "features": True,
    },
    "sample": {
        **{"checkpoint": "weights", "pipeline": "weights", "adapter": "weights", "prompts": "text"},
        **{"out": "output", "contact_sheet": "output", "embeddings": True, "save_embeddings": "output"},
        **{"latents": True, "from_image": True, "image": True, "mask": True},
    },
    "train": {"workdir": "output"},
    "config": {
        **{"features.vae": "weights", "features.image_encoder": "weights", "compile.cache": "output"},
        **{"features.text_encoder.tokenizer": "weights", "features.text_encoder.weights": "weights"},
        **{
            "data.train": "images",
            "data.validation": "images",
            "init.path": "weights",
            "init.adapter": "weights",
        },
    },
}
NUMBERS = {**SIZES["small"], "sizes": False}
# A command line that passes all cheap checks, and flags that exclude others.
ARGUMENTS = {
    "benchmark": ("recipe", "--hardware=v5e:8", "--stages=configs/stage1.py", "--rates=stage1=1"),
    "caption": ("--images=i", "--out=o"),
    "convert": ("--input=i", "--output=o", "--to=official", "--push=hub:me/x", "--push_dry_run"),
    "evaluate": ("fid", "--out=o"),
    "precompute": ("--config=configs/digits.py:stage1", "--images=digits", "--out=o"),
    "sample": ("--checkpoint=c",),
}


def flags_of(command):
    return importlib.import_module(f"pixart_jax.{command}").Flags


def paths_of(command):
    if command == "config":
        fields = {name: info.field for name, info in all_fields().items()}
    else:
        fields = {field.name: field for field in dataclasses.fields(flags_of(command))}
    return {name: field.metadata["path"] for name, field in fields.items() if field.metadata.get("path")}


@pytest.mark.parametrize("command", [*COMMANDS, "config"])
def test_every_path_says_what_it_is_for(command):
    assert paths_of(command) == TABLE[command]


@pytest.mark.parametrize(
    ("command", "name", "kind"),
    [(command, name, kind) for command in COMMANDS for name, kind in TABLE[command].items()],
)
def test_every_flag_takes_a_path_of_the_hub_or_refuses_it(command, name, kind, monkeypatch, tmp_path):
    """Commands ask the hub before they open it; outputs and programs are refused when flags are parsed."""

    def asked(place, cache):
        raise UserError(f"asked for {place}")

    monkeypatch.setattr(downloads, "_found", asked)
    monkeypatch.setenv("PWD", str(tmp_path))
    module = importlib.import_module(f"pixart_jax.{command}")
    given = [each for each in ARGUMENTS.get(command, ()) if not each.startswith(f"--{name}=")]
    value = "image_root=hub:a/b" if name == "source_option" else "hub:a/b"
    arguments = (
        ["verify", f"--{name}={value}"]
        if (command, name) == ("precompute", "features")
        else [*given, f"--{name}={value}"]
    )
    if kind in ("output", "local"):
        with pytest.raises(UserError, match=f"--{name} is 'hub:a/b', and "):
            parse(module.Flags, *arguments)
        return
    with pytest.raises(UserError, match="asked for hub:a/b"):
        module.main(parse(module.Flags, *arguments))
    with (
        pytest.raises(UserError, match=f"--{name} is 'hub:a': write a path of the hub")
        if kind != "text"
        else pytest.raises(UserError)
    ):
        module.main(parse(module.Flags, *given, f"--{name}=hub:a"))


@pytest.mark.parametrize("name", TABLE["config"])
def test_every_config_field_is_pinned_or_refuses_the_hub(name, monkeypatch):
    monkeypatch.setattr(
        hub, "pinned", lambda text, like="": f"{text}@{'0' * 40}" + (" like " + like) * bool(like)
    )
    *sections, field = name.split(".")

    def config(value):
        also = {"init.path": {"method": "weights"}, "init.adapter": {"method": "weights", "path": "x"}}
        part = all_fields()[name].section(**{field: value, **also.get(name, {})})
        for section in reversed(sections[:-1]):
            part = FeaturesConfig(**{"text_encoder": part}) if section == "features" else part
        adapter = AdapterConfig(kind="lora" if name == "init.adapter" else "none")
        return TrainConfig(**{sections[0]: part}, adapter=adapter)

    if TABLE["config"][name] == "output":
        with pytest.raises(UserError, match=f"{name} is 'hub:a/b', and results are written"):
            config("hub:a/b")
        return
    found = with_pinned_paths(config("hub:a/b"))
    for section in name.split("."):
        found = getattr(found, section)
    assert found == f"hub:a/b@{'0' * 40}"


def test_a_prompt_is_not_a_path():
    @dataclasses.dataclass(frozen=True)
    class Given:
        prompts: str = flag("", "", path="text")

    text = Given("hub: a station, in the style of hub:a/b")
    assert fetched(text) == text


def test_weights_of_adapters_follow_the_path():
    assert parse_spec("hub:a/b/x.safetensors:0.8") == ("hub:a/b/x.safetensors", 0.8)
    assert parse_spec("hub:a/b@v1") == ("hub:a/b@v1", None)
    with pytest.raises(UserError, match="is not a number: give PATH or PATH:WEIGHT"):
        parse_spec("hub:a/b:strong")


# --- With files


@pytest.fixture(scope="module")
def files(tmp_path_factory, random_params):
    """A pipeline of diffusers, a run, an adapter and images."""
    root = tmp_path_factory.mktemp("files")
    save_pipeline(root / "pipeline", diffusers_model(**NUMBERS))
    write_weights(root / "run", random_params(tiny.MODEL)[1], tiny.CONFIG)
    write_peft(root / "peft", tiny.make_adapter())
    write_kohya(root / "kohya.safetensors", tiny.make_adapter())
    (root / "images").mkdir()
    for number in range(3):
        Image.fromarray(np.full((32, 32, 3), 80 * number, np.uint8)).save(root / "images" / f"{number}.png")
    lines = [{"file_name": f"{number}.png", "text": f"image {number}"} for number in range(3)]
    (root / "images" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


@pytest.fixture
def server(tmp_path, files):
    with HubServer() as found, in_process(found, tmp_path / "home"):
        found.add("me/pipeline", files / "pipeline")
        found.add("me/run", files / "run")
        found.add("me/lora", files / "peft")
        found.add(
            "me/loras", {"a.safetensors": (files / "kohya.safetensors").read_bytes(), "b.safetensors": b"x"}
        )
        found.add("datasets/me/images", files / "images")
        yield found


def test_networks_and_pipelines(server, files, capsys):
    local = read_any(files / "pipeline")
    read = read_any("hub:me/pipeline")
    assert {name for name in server.files_read() if name.endswith(".safetensors")} == {
        "transformer/diffusion_pytorch_model.safetensors"
    }
    jax.tree.map(np.testing.assert_array_equal, read.params, local.params)
    assert (
        read.config.init.path.startswith("hub:me/pipeline@") and read.config.features == local.config.features
    )
    assert (
        pixart_jax.load_model("hub:me/pipeline/transformer").config
        == pixart_jax.load_model(files / "pipeline" / "transformer").config
    )
    capsys.readouterr()
    pipe = pixart_jax.load_pipeline("hub:me/pipeline")
    said = capsys.readouterr().err
    assert "memory of the weights: transformer " in said and "downloading " in said
    assert pipe.fingerprint == pixart_jax.load_pipeline(files / "pipeline").fingerprint
    assert (
        pixart_jax.load_pipeline("hub:me/run", adapters={"hub:me/lora": 0.5})
        .adapters.record()[0]["path"]
        .startswith("hub:me/lora@")
    )


def test_a_release_of_sigma_is_read_as_one(server, files):
    transformer = {
        f"transformer/{path.name}": path.read_bytes()
        for path in (files / "pipeline" / "transformer").iterdir()
    }
    for name in ("PixArt-Sigma-XL-2-512-MS", "PixArt-XL-2-256x256"):
        server.add(f"PixArt-alpha/{name}", transformer)
    sigma, alpha = (
        read_any(f"hub:PixArt-alpha/{name}").config
        for name in ("PixArt-Sigma-XL-2-512-MS", "PixArt-XL-2-256x256")
    )
    assert (sigma.model.text_length, alpha.model.text_length) == (300, 120)
    assert (sigma.features.latent_scale, alpha.features.latent_scale) == (0.13025, 0.18215)
    # Also when it has been downloaded before, and its folder in the cache is given.
    folder = hub.local("hub:PixArt-alpha/PixArt-Sigma-XL-2-512-MS") / "transformer"
    assert read_any(folder).config.model.text_length == 300


def test_adapters(server, files):
    one, other = read_adapter("hub:me/lora"), read_adapter(files / "peft")
    assert one.digest == other.digest and hub.is_hub(one.name)
    ((adapter, weight),) = read_adapters("hub:me/loras/a.safetensors:0.25")
    assert weight == 0.25 and adapter.name.endswith("/a.safetensors")
    with pytest.raises(UserError, match="several files of weights: give one of 'hub:me/loras"):
        read_adapter("hub:me/loras")


def test_encoders(server, files):
    text = TextEncoderConfig(tokenizer="hub:me/pipeline", weights="hub:me/pipeline/text_encoder")
    assert load_tokenizer(text)("a")["input_ids"]
    assert not any(name.endswith(".safetensors") for name in server.files_read())
    features = FeaturesConfig(vae="hub:me/pipeline/vae", text_encoder=text)
    at = files / "pipeline"
    local = TextEncoderConfig(tokenizer=str(at), weights=str(at / "text_encoder"))
    # Features that were made with the same encoder from a folder are the same.
    assert encoder_files(features) == encoder_files(FeaturesConfig(vae=str(at / "vae"), text_encoder=local))
    assert len(encoder_files(features)) == 3


def test_data(server, files, tmp_path):
    folder = hub.local("hub:datasets/me/images", everything=True)
    source = open_source("auto", folder)
    assert [source[index].captions[0].text for index in range(3)] == ["image 0", "image 1", "image 2"]
    assert source[0].decode().shape == (32, 32, 3)
    # A list brings the images beside it.
    shutil.rmtree(tmp_path / "home")
    downloads._found.cache_clear()
    listed = hub.local("hub:datasets/me/images/metadata.jsonl", everything=True, with_folder=True)
    assert (listed.parent / "2.png").is_file()


def test_the_weights_of_a_run_and_their_licence(server, files, tmp_path, random_params):
    run = dataclasses.replace(tiny.CONFIG, init=InitConfig("weights", "hub:PixArt-alpha/PixArt-XL-2-512x512"))
    write_weights(tmp_path / "tuned", random_params(tiny.MODEL)[1], run)
    # The base is not downloaded to read its licence.
    assert licence_of(tmp_path / "tuned") == "openrail++" and not server.sent
    run = dataclasses.replace(run, init=InitConfig("weights", "hub:me/pipeline"))
    write_weights(tmp_path / "other", random_params(tiny.MODEL)[1], run)
    assert licence_of(tmp_path / "other") == "other"
    hub.local("hub:me/pipeline", parts=("transformer",))
    assert licence_of(tmp_path / "other") == "openrail++"


def test_a_run_that_resumes_keeps_its_commits(server, tmp_path, random_params):
    (old,) = server.repositories["models/me/pipeline"].commits
    config = dataclasses.replace(
        tiny.CONFIG, features=dataclasses.replace(tiny.CONFIG.features, vae="hub:me/pipeline/vae")
    )
    first = with_pinned_paths(config)
    assert first.features.vae == f"hub:me/pipeline@{old}/vae"
    write_weights(tmp_path / "run", random_params(tiny.MODEL)[1], first)
    server.add("me/pipeline", {"README.md": b"new"})
    downloads._found.cache_clear()
    assert pinned_as_before(config, epath.Path(tmp_path / "run")) == first
    new = pinned_as_before(config, epath.Path(tmp_path / "empty"))
    assert hub.is_hub(new.features.vae) and new != first


def test_an_image_names_the_commits_and_is_generated_again(server, tmp_path, monkeypatch, capsys):
    sample = importlib.import_module("pixart_jax.sample")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        sample.main(parse(sample.Flags, *arguments, "--noprogress"))

    (commit,) = server.repositories["models/me/run"].commits
    run(
        *("--checkpoint=hub:me/run", "--prompts=a corgi", "--steps=2", "--adapter=hub:me/lora:0.5"),
        *("--image=hub:datasets/me/images/1.png", "--strength=0.6"),
    )
    (picture,) = Path("images").glob("*.png")  # the default of --out
    record = read_record(picture)
    assert record["source"]["checkpoint"] == f"hub:me/run@{commit}"
    assert record["request"]["image"].startswith("hub:datasets/me/images@")
    assert set(record["files"]) == {record["request"]["image"]}
    assert record["adapters"][0]["path"].startswith("hub:me/lora@")
    assert str(tmp_path) not in json.dumps(record)
    # Other commits since then do not matter.
    server.add("me/run", {"README.md": b"broken"})
    downloads._found.cache_clear()
    with pytest.raises(UserError, match=r"names files, .*--checkpoint=hub:me/run@"):
        run(f"--from_image={picture}", "--out=again")
    run(f"--from_image={picture}", "--open_recorded_paths", "--out=again")
    assert (tmp_path / "again" / picture.name).read_bytes() == picture.read_bytes()
    # The same command continues in the same folder.
    capsys.readouterr()
    run(f"--from_image={picture}", "--open_recorded_paths", "--out=again")
    assert "1 existed already" in capsys.readouterr().out


def test_prompts_and_the_images_that_they_name(server, files):
    line = {"prompt": "a", "image": "hub:datasets/me/images/0.png"}
    server.add("datasets/me/prompts", {"x.jsonl": json.dumps(line).encode()})
    path = hub.local("hub:datasets/me/prompts/x.jsonl", everything=True)
    ((request,),) = read_requests(str(path))
    assert Path(request.image).read_bytes() == (files / "images" / "0.png").read_bytes()


def test_conversion(server, files, tmp_path):
    said = []
    convert("hub:me/pipeline", tmp_path / "official", "official", say=said.append)
    (commit,) = server.repositories["models/me/pipeline"].commits
    card = (tmp_path / "official" / "README.md").read_text()
    assert f"hub:me/pipeline@{commit}" in card and str(tmp_path) not in card
    convert(files / "run", tmp_path / "d", "diffusers", adapter="hub:me/lora:0.5", say=said.append)
    assert any("merged the adapter" in line and "0.5" in line for line in said)


def test_features_of_the_hub(server, tmp_path):
    folder = three_shards(tmp_path / "features")
    server.add("datasets/me/features", folder)
    found = open_dataset(str(hub.local("hub:datasets/me/features", everything=True)))
    assert found.fingerprint == open_dataset(str(folder)).fingerprint
