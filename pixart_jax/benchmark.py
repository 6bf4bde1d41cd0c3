"""Measures training and sampling, and plans for hardware that is not here.

    python -m pixart_jax.benchmark train --config=configs/stage2.py --batch=256 --config.model.attention=cudnn
    python -m pixart_jax.benchmark sample --config=configs/stage3.py:512 --batch=16 --steps=20
    python -m pixart_jax.benchmark compile --config=configs/stage3.py:1024 --topology=v5e:16x16
    python -m pixart_jax.benchmark compile --config=configs/stage2.py --topology=h100:8 \\
        --config.model.attention=cudnn
    python -m pixart_jax.benchmark recipe --stages=configs/stage1.py,configs/stage2.py --hardware=v5e:256 \\
        --rates=stage1=110,stage2=88 --price=1.2

Needs nothing but jax, flax, optax, einops, numpy, ml_collections and absl, so that it runs on a bare
accelerator machine.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from pixart_jax import config as configs
from pixart_jax.benchmarking import topology
from pixart_jax.config import TrainConfig
from pixart_jax.errors import UserError, did_you_mean, run_command
from pixart_jax.models.attention import target_platform
from pixart_jax.training.settings import apply_settings

# The flags of the command by name.
Given = Mapping[str, Any]


def compile_check(config: TrainConfig, given: Given) -> int:
    """Compiles the step for a topology; 1 when it does not fit its memory."""
    from pixart_jax.benchmarking import compile

    if not given["topology"]:
        raise UserError("--topology is missing: give one, such as --topology=v5e:16x16 or --topology=here.")
    memory, search = given["memory_gib"], given["search"]
    report = compile.check(config, given["topology"], memory_gib=memory, search=search)
    _tell(compile.summary(report), report, given["out"])
    return 0 if report["fits"] else 1


def train(config: TrainConfig, given: Given) -> None:
    """Measures training steps, on batches of noise and with `--data` on real shards too."""
    from pixart_jax.benchmarking import throughput

    config = throughput.with_batch(config, given["batch"])
    names = ("height", "width", "rounds", "calls", "data", "parts", "profile")
    result = throughput.benchmark_train(config, **{name: given[name] for name in names})
    _tell(throughput.summary(result), result, given["out"])


def sample(config: TrainConfig, given: Given) -> None:
    """Measures the sampling loop from text features to latents."""
    from pixart_jax.benchmarking import throughput

    config = throughput.with_batch(config, given["batch"])
    names = ("height", "width", "sampler", "steps", "rounds", "calls", "profile")
    result = throughput.benchmark_sample(
        config, scale=given["guidance_scale"], **{name: given[name] for name in names}
    )
    _tell(throughput.summary(result), result, given["out"])


def _tell(text: str, result: Mapping[str, Any], out: str | None) -> None:
    """The summary for who reads, the whole as JSON for who computes."""
    print(text)
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(result, indent=1) + "\n")
    else:
        print(json.dumps(result))


def recipe(given: Given) -> None:
    """Prints what the stages take on given hardware, beside the paper's days."""
    from pixart_jax.benchmarking import recipe

    for name in ("stages", "hardware", "rates"):
        if not given[name]:
            raise UserError(f"--{name} is missing: see --help.")
    stages = [configs.from_file(spec) for spec in given["stages"].split(",")]
    result = recipe.project(stages, recipe.read_rates(given["rates"]), given["hardware"], given["price"])
    _tell(recipe.table(result), result, given["out"])


# What a mode takes is (config, flags), `recipe` flags alone; what it returns is the exit status, None for 0.
MODES = {"train": train, "sample": sample, "compile": compile_check, "recipe": recipe}


def define_flags() -> dict[str, flags.FlagHolder]:
    """The flags of the command. Not at import: other commands have flags of the same names."""
    text, integer, real = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    return {
        "config": config_flags.DEFINE_config_file(
            "config", None, "Stage to run, such as configs/stage1.py or configs/stage3.py:512."
        ),
        "out": flags.DEFINE_string("out", None, "JSON file for the results; default none, text alone."),
        "batch": integer("batch", None, "train, sample: images of a batch; default data.batch_size."),
        "height": integer("height", None, "train, sample: pixels; default features.image_size."),
        "width": integer("width", None, "train, sample: pixels; default features.image_size."),
        "rounds": integer("rounds", 10, "train, sample: rounds that are timed.", lower_bound=1),
        "calls": integer("calls", 3, "train, sample: updates or batches in a round.", lower_bound=1),
        "profile": text(
            "profile", "", "train, sample: folder for the profile of one call, for XProf; default none."
        ),
        "data": text("data", "", "train: folder of feature shards to train on, too; default noise alone."),
        "parts": flags.DEFINE_bool(
            "parts", True, "train: time gradient, optimizer and moving average as programs of their own, too."
        ),
        "sampler": text("sampler", "dpm_solver", "sample: how noise becomes an image."),
        "steps": integer("steps", 20, "sample: model evaluations for each image.", lower_bound=1),
        "guidance_scale": real("guidance_scale", None, "sample: 1 for none; default the config's."),
        "topology": text(
            "topology",
            None,
            "compile: v4, v5e, v5p or v6e with a shape (v5e:16x16), a100, h100 or h200 with a number "
            "(h100:8), cpu:N, or 'here'.",
        ),
        "memory_gib": real("memory_gib", None, "compile: GiB of a device; default what it reports itself."),
        "stages": text("stages", None, "recipe: configs in their order, comma-separated."),
        "hardware": text("hardware", None, "recipe: kind and number of chips, such as v5e:256 or h100:64."),
        "rates": text(
            "rates", None, "recipe: images a second and chip, stage1=110,stage2=88; or a folder of results."
        ),
        "price": real("price", None, "recipe: dollars for a chip and hour; default none, no cost."),
        "search": flags.DEFINE_bool(
            "search", True, "compile: find the largest batch and the accumulation, too; some compilations."
        ),
    }


def main(holders: Mapping[str, flags.FlagHolder], argv: Sequence[str]) -> int | None:
    modes = argv[1:]
    if len(modes) != 1 or modes[0] not in MODES:
        given = " ".join(modes)
        raise UserError(
            f"benchmark takes one of {', '.join(MODES)}, not '{given}'.{did_you_mean(given, MODES)}"
        )
    values = {name: holder.value for name, holder in holders.items()}
    if modes[0] == "recipe":
        return recipe(values)
    if values["config"] is None:
        raise UserError("--config is missing: give a stage, such as --config=configs/stage3.py:512.")
    # What is compiled for another platform may ask for its kernels here.
    platform = topology.target(values["topology"]) if modes[0] == "compile" else None
    with target_platform(platform) if platform else contextlib.nullcontext():
        config = configs.from_config_dict(values["config"])
        if platform is None:
            apply_settings(config.compile.deterministic)
        print(f"attention: {config.model.attention_choice()}")
        return MODES[modes[0]](config, values)


if __name__ == "__main__":
    run_command(functools.partial(main, define_flags()))
