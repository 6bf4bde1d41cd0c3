"""Runs the shell commands of the README in order, in a new environment, as a newcomer would.

What differs: the wheel is installed in place of the release, a tiny random pipeline is in the cache of the
hub, and flags for its sizes and for few steps are added to the commands.
"""

import re
import shlex
from pathlib import Path

import foreign
import newcomer
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
REPOSITORY, COMMIT = "PixArt-alpha/PixArt-XL-2-512x512", "0123456789abcdef0123456789abcdef01234567"
# Added to the commands whose arguments contain the first text.
ADDED = (
    ("--config=lora:512", [f"--config.{flag}" for flag in foreign.PIPELINE_FLAGS]),
    ("--workdir=runs/lora", ["--config.steps=10", "--config.log.sample_every=0"]),
    ("--workdir=demo/stage", ["--config.steps=2"]),
    ("--prompts=", ["--steps=2"]),
)


def commands(title):
    """The commands of the shell block of a section."""
    section = README.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    (block,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    return [shlex.split(line) for line in block.splitlines() if not line.startswith("#")]


@pytest.fixture(scope="module")
def scripts(wheel_files, tmp_path_factory):
    """The scripts of an environment that the first command of the README makes."""
    ((pip, verb, requirement),) = commands("Install")
    assert (pip, verb) == ("pip", "install") and requirement.startswith("pixart_jax[")
    return newcomer.install(wheel_files[1], tmp_path_factory.mktemp("newcomer"))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A cache of the hub that has a tiny pipeline."""
    cache = tmp_path_factory.mktemp("hub")
    repository = cache / f"models--{REPOSITORY.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    foreign.save_pipeline(
        repository / "snapshots" / COMMIT, foreign.diffusers_model(**foreign.PIPELINE_NUMBERS, sizes=False)
    )
    return cache


@pytest.fixture
def folder(tmp_path):
    """The folder of a newcomer, with eight captioned photos."""
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.jpg")
        (tmp_path / "photos" / f"{i}.txt").write_text("a corgi reading a book")
    return tmp_path


@pytest.mark.parametrize(
    ("title", "made"),
    [
        ("Generate images", ["pictures/*.png"]),
        ("Adapt the weights to your images", ["adapted/*.png", "my-lora/adapter_model.safetensors"]),
        ("Train from scratch", ["demo/stage2/checkpoints/2", "demo/pictures/*.png"]),
    ],
)
def test_the_three_tasks(scripts, hub, folder, title, made):
    for script, *arguments in commands(title):
        more = [flag for text, flags in ADDED if text in " ".join(arguments) for flag in flags]
        environment = {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
        newcomer.run(scripts, script, *arguments, *more, cwd=folder, **environment)
    for pattern in made:
        assert len(list(folder.glob(pattern))) == 1, pattern


def test_the_readme_is_short():
    """Five lines say what the project is, before anything else."""
    first = README.split("\n\n")[1]
    assert len(first.splitlines()) <= 5 and len(README.splitlines()) <= 160
