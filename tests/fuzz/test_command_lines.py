"""Command lines: all flags of all commands, up to where the heavy work begins."""

import contextlib
import dataclasses
import json
from pathlib import Path

import jax
import pytest
from fuzzing import ROOT, fuzz, stop_here
from hostile import NUMBERS, TEXTS
from hypothesis import strategies as st

from pixart_jax import caption, evaluate, pipeline, precompute, train
from pixart_jax.benchmarking import compile as compiling
from pixart_jax.benchmarking import throughput
from pixart_jax.evaluation import digits, emoji
from pixart_jax.pipeline import loading
from pixart_jax.training import distributed, supervision
from pixart_jax.training.distributed import Cluster
from pixart_jax.weights import checkpoints
from pixart_jax.weights import loading as weights

# What begins the heavy work of each command.
HEAVY = (
    *((train, "train"), (loading, "load_pipeline"), (precompute, "precompute"), (caption, "caption_images")),
    *(
        (weights, "read_any"),
        (checkpoints, "read_weights"),
        (pipeline, "load_pipeline"),
        (evaluate, "Inception"),
    ),
    *((evaluate, "Clip"), (digits, "measure"), (emoji, "measure"), (compiling, "check")),
    *((throughput, "benchmark_train"), (throughput, "benchmark_sample")),
)
OLD = Path(__file__).parent.parent / "data" / "v0_1"
# Files that exist in the sandbox.
FILES = {
    "prompts.jsonl": '{"prompt": "a fox", "seed": 3}\n"two"\n',
    "prompts.txt": "a fox\n# no\n\nß 🙂\n",
    "prompts.csv": "prompt,seed\na,1\n",
    "list.json": json.dumps([{"path": "a.png", "caption": "a"}]),
    "geneval.jsonl": '{"prompt": "a", "tag": "single_object"}\n',
    "fid.json": "{}",
    "empty": "",
    "model.safetensors": (OLD / "diffusers" / "diffusion_pytorch_model.safetensors").read_bytes(),
    "image.png": (OLD / "samples" / "00000-3-red-1.png").read_bytes(),
    "folder/a.png": (OLD / "start.png").read_bytes(),
    "folder/a.txt": "a caption",
}
VALUES = st.sampled_from(
    (
        *map(str, NUMBERS),
        *TEXTS,
        *FILES,
        "folder",
        "true",
        "false",
        "9" * 5_000,
        "0/1",
        "1/2",
        "3/2",
        "a=b",
        '{"a":1}',
    )
)
WORDS = {
    "train": ((),),
    "sample": ((),),
    "precompute": ((), ("verify",)),
    "caption": ((), ("stats", "prompts.txt"), ("stats", "list.json"), ("stats",)),
    "convert": ((),),
    "evaluate": tuple((mode,) for mode in evaluate.MODES),
    "benchmark": (("train",), ("sample",), ("compile",), ("recipe",)),
}
CONFIGS = [
    f"--config={ROOT / 'configs' / name}"
    for name in ("digits.py:stage1", "digits.py:stage2", "stage3.py:512")
]
# Command lines that are valid up to the heavy work, so that most examples get behind the first checks.
USUAL = {
    "train": (),
    "sample": ("--checkpoint=model.safetensors", "--prompts=prompts.jsonl", "--out=out"),
    "precompute": ("--images=folder", "--out=out", "--features=folder"),
    "caption": ("--images=folder", "--out=out"),
    "convert": ("--input=model.safetensors", "--output=out", "--to=official"),
    "evaluate": (
        *("--checkpoint=model.safetensors", "--out=out", "--captions=prompts.txt", "--inception=empty"),
        *("--benchmark=geneval", "--prompts=geneval.jsonl", "--results=fid.json", "--features=folder"),
        *("--clip=folder", "--images=folder"),
    ),
    "benchmark": ("--hardware=h100:8", "--rates=stage1=1", f"--stages={ROOT / 'configs' / 'stage1.py'}"),
}


@pytest.fixture(scope="module")
def without_work():
    def no_cluster(*_, **__):
        raise ValueError("no cluster")

    with pytest.MonkeyPatch.context() as patch:
        for module, name in HEAVY:
            patch.setattr(module, name, stop_here)
        patch.setattr(distributed, "connect", lambda *_: Cluster())
        # The watchdog ends the process, which here runs many examples.
        patch.setattr(supervision, "supervised", lambda *_: contextlib.nullcontext())
        patch.setattr(jax.distributed, "initialize", no_cluster)
        yield


@st.composite
def command_lines(draw):
    command = draw(st.sampled_from(sorted(WORDS)))
    module = {name: value for name, value in globals().items() if name in WORDS}.get(command)
    names = [field.name for field in dataclasses.fields((module or benchmark_module()).Flags)]
    names = [name for name in names if name not in ("words", "present", "config")]
    words = list(draw(st.sampled_from(WORDS[command])))
    usual = [flag for flag in USUAL[command] if draw(st.integers(0, 5))]
    config = [draw(st.sampled_from(CONFIGS))] if command in ("train", "precompute", "benchmark") else []
    flags = []
    for name in draw(st.lists(st.sampled_from(names), max_size=4)):
        match draw(st.integers(0, 9)):
            case 0:
                flags.append(f"--{name}")
            case 1:
                flags.append(f"--no{name}")
            case 2:
                flags.append(f"-{name.replace('_', '-')}={draw(VALUES)}")
            case _:
                flags.append(f"--{name}={draw(VALUES)}")
    if draw(st.integers(0, 9)) == 0:
        flags.append(
            draw(
                st.sampled_from(
                    ["--flagfile=empty", "--flagfile=/dev/null", "--undefok=x", "--", "-", "x", ""]
                )
            )
        )
    if draw(st.integers(0, 19)) == 0:
        flags.append(draw(VALUES))
    return [command, *words, *config, *usual, *flags]


def benchmark_module():
    from pixart_jax import benchmark

    return benchmark


@fuzz(200, "without_work", line=command_lines())
def test_command_lines(sandbox, _, line):
    for name, data in FILES.items():
        sandbox.write(name, data)
    # `benchmark recipe`, `evaluate table` and `caption stats` are complete without heavy work.
    sandbox.command(*line).check(outputs=(outputs_of(line),) if outputs_of(line) else (), allowed={0, 2, 74})


def outputs_of(line):
    """The output of a command line: the last --out, or what stands for it."""
    given = [flag.partition("=")[2] for flag in line if flag.partition("=")[0].replace("--", "-") == "-out"]
    if given:
        return given[-1].strip("/").removeprefix("./")
    return "table" if line[:2] == ["evaluate", "table"] else ""
