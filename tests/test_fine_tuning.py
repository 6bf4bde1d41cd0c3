"""Runs the commands of docs/fine-tuning.md on a tiny random pipeline, and opens their results with peft."""

import re
import shlex
import sys
from pathlib import Path

import foreign
import numpy as np
import pytest
from command_line import parse
from PIL import Image

from pixart_jax import convert, precompute, sample, train
from pixart_jax.config import default_workdir, from_config_dict

peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")

ROOT = Path(__file__).parents[1]
PIPELINE = "PixArt-XL-2-512x512"
# The flags that the page gives for another pipeline, and some for speed.
SIZES = (
    *foreign.PIPELINE_FLAGS,
    "steps=10",  # the average follows every tenth step
    "data.batch_size=8",  # one for each simulated device
    "optimizer.accumulation=1",
    "mesh.data=-1",
    "mesh.fsdp=1",
    "log.sample_every=0",
)
COMMANDS = {"convert": convert, "precompute": precompute, "sample": sample, "train": train}


def commands(title):
    """The commands of all blocks of a section of the page: name and arguments."""
    page = (ROOT / "docs" / "fine-tuning.md").read_text()
    section = page.split(f"\n## {title}", 1)[1].split("\n## ", 1)[0]
    lines = "".join(re.findall(r"```sh\n(.*?)```", section, re.DOTALL)).splitlines()
    found = [shlex.split(line) for line in lines]
    assert all(line[:2] == ["python", "-m"] for line in found)
    return [(line[2].removeprefix("pixart_jax."), line[3:]) for line in found]


def run(name, arguments):
    arguments = [word.replace("--config=configs/", f"--config={ROOT}/configs/") for word in arguments]
    if any(word.startswith("--config=") for word in arguments):
        arguments += [f"--config.{flag}" for flag in SIZES]
    if name == "sample":
        arguments = [word.replace("per_prompt=100", "per_prompt=4") for word in arguments] + ["--steps=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])  # where ml_collections looks for --config.NAME
        given = parse(COMMANDS[name].Flags, *arguments)
    if name == "train":
        config = from_config_dict(given.config)
        train.train(config, given.workdir or default_workdir(config))
    else:
        COMMANDS[name].main(given)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A tiny pipeline, and photos under the names that the page uses."""
    foreign.save_pipeline(
        tmp_path / PIPELINE, foreign.diffusers_model(**foreign.PIPELINE_NUMBERS, sizes=False)
    )
    rng = np.random.default_rng(0)
    for name in ("photos", "instance"):
        (tmp_path / name).mkdir()
        for i in range(8):
            pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
            if name == "photos":
                (tmp_path / name / f"{i}.txt").write_text("a corgi reading a book")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("title", "adapter"), [("LoRA, step by step", "my-lora"), ("DreamBooth, from ten photos", "my-dog")]
)
def test_the_commands_of_the_page(folder, title, adapter):
    for name, arguments in commands(title):
        run(name, arguments)
    for pictures in ("pictures", *(["pictures-full"] if adapter == "my-dog" else [])):
        assert len(list((folder / pictures).glob("*.png"))) == 1
    base = diffusers.PixArtTransformer2DModel.from_pretrained(folder / PIPELINE / "transformer")
    plain = {name: value.clone() for name, value in base.state_dict().items()}
    model = peft.PeftModel.from_pretrained(base, folder / adapter).merge_and_unload()
    changed = {name for name, value in model.state_dict().items() if not value.equal(plain[name])}
    # Four and four projections of attention, and the two layers of the MLP.
    assert len(changed) == 10 and all(".attn" in name or ".ff." in name for name in changed)
