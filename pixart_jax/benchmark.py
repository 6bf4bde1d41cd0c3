"""Measures training and sampling, and plans for hardware that this machine does not have.

    python -m pixart_jax.benchmark train --config=configs/stage2.py --batch=256 --config.model.attention=cudnn
    python -m pixart_jax.benchmark sample --config=configs/stage3.py:512 --batch=16 --steps=20
    python -m pixart_jax.benchmark compile --config=configs/stage3.py:1024 --topology=v5e:16x16
    python -m pixart_jax.benchmark compile --config=configs/stage2.py --topology=h100:8 \\
        --config.model.attention=cudnn
    python -m pixart_jax.benchmark fit --config=configs/lora.py:512 --memory_gib=12
    python -m pixart_jax.benchmark machine
    python -m pixart_jax.benchmark recipe --stages=configs/stage1.py,configs/stage2.py --hardware=v5e:256 \\
        --rates=stage1=110,stage2=88 --price=1.2

The command needs only jax, flax, optax, einops, numpy, ml_collections and absl, so that it runs on a bare
accelerator machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from pixart_jax import config as configs
from pixart_jax.config import TrainConfig
from pixart_jax.constants import LARGEST_BATCH, LARGEST_SIDE, MOST_STEPS
from pixart_jax.files import write_text
from pixart_jax.flags import CommandFlags, fetched, flag, run
from pixart_jax.models.configs import WEIGHTS_DTYPES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags(CommandFlags):
    config: ConfigDict | None = flag(
        None, "Stage to measure, such as configs/stage3.py:512. train --help lists its fields."
    )
    out: str | None = flag(None, "JSON file for the results; default: only print them.", path="output")
    batch: int | None = flag(
        None,
        "train, sample: number of images in a batch; default: data.batch_size.",
        minimum=1,
        maximum=LARGEST_BATCH,
    )
    height: int | None = flag(
        None, "train, sample: pixels; default: features.image_size.", minimum=1, maximum=LARGEST_SIDE
    )
    width: int | None = flag(
        None, "train, sample: pixels; default: features.image_size.", minimum=1, maximum=LARGEST_SIDE
    )
    rounds: int = flag(10, "train, sample: number of timed rounds.", minimum=1, maximum=1_000_000)
    calls: int = flag(
        3, "train, sample: number of updates or batches in a round.", minimum=1, maximum=1_000_000
    )
    profile: str = flag(
        "",
        "train, sample: write a profile of one call to this folder, for XProf; default: none.",
        path="output",
    )
    data: str = flag(
        "", "train: also train on the feature shards in this folder; default: only on noise.", path=True
    )
    parts: bool = flag(True, "train: also time the gradient, the optimizer and the EMA as separate programs.")
    sampler: str = flag("dpm_solver", "sample: sampling algorithm.")
    steps: int = flag(20, "sample: model evaluations per image.", minimum=1, maximum=MOST_STEPS)
    guidance_scale: float | None = flag(
        None,
        "sample: 1 or less for no guidance; default: as in the config.",
        minimum=0,
    )
    weights_dtype: str = flag(
        "float32",
        "sample: how the weights are kept in memory, 'float32' or 'int8' (the kernels of the blocks).",
        choices=WEIGHTS_DTYPES,
    )
    topology: str | None = flag(
        None,
        "compile: v4, v5e, v5p or v6e with a shape (v5e:16x16); a100, h100 or h200 with a number "
        "(h100:8); cpu:N; or 'here'. fit: one device to compile the chosen plan for; default: only estimate.",
    )
    memory_gib: float | None = flag(
        None,
        "compile, fit: memory of a device in GiB; default of compile: what the device reports. fit leaves a "
        "tenth of it to other libraries, as training does.",
        above=0,
        maximum=1e6,
    )
    search: bool = flag(
        True, "compile: also find the largest batch and the accumulation that fit; takes a few compilations."
    )
    stages: str | None = flag(None, "recipe: configs in their order, comma-separated.", path="local")
    hardware: str | None = flag(None, "recipe: kind and number of chips, such as v5e:256 or h100:64.")
    rates: str | None = flag(
        None, "recipe: images per second per chip, stage1=110,stage2=88; or a folder of results.", path=True
    )
    price: float | None = flag(
        None, "recipe: dollars per chip-hour; default: print no cost.", minimum=0, maximum=1e6
    )


def compile_check(config: TrainConfig, given: Flags) -> int:
    """Compiles the step for a topology and returns 1 if the step does not fit in the memory of a device."""
    from pixart_jax.benchmarking import compile

    given.require("topology", hint="give one, such as --topology=v5e:16x16 or --topology=here.")
    report = compile.check(config, given.topology, memory_gib=given.memory_gib, search=given.search)
    _print_and_write(compile.summary(report), report, given.out)
    return 0 if report["fits"] else 1


def fit(config: TrainConfig, given: Flags) -> int:
    """Says which batch, rematerialization, precision and rank of adapters fit on one device.

    Returns 1 if the batch size of the stage does not fit.
    """
    from pixart_jax.benchmarking import fit

    given.require("memory_gib", hint="give the memory of the GPU, such as --memory_gib=24.")
    report = fit.report(config, given.memory_gib, given.topology)
    _print_and_write(fit.summary(report), report, given.out)
    return 0 if report["fits"] else 1


def train(config: TrainConfig, given: Flags) -> None:
    """Measures training steps on batches of noise and, with `--data`, also on real shards."""
    from pixart_jax.benchmarking import throughput

    config = throughput.with_batch(config, given.batch)
    names = ("height", "width", "rounds", "calls", "data", "parts", "profile")
    result = throughput.benchmark_train(config, **{name: getattr(given, name) for name in names})
    _print_and_write(throughput.summary(result), result, given.out)


def sample(config: TrainConfig, given: Flags) -> None:
    """Measures sampling, from text features to latents."""
    from pixart_jax.benchmarking import throughput

    config = throughput.with_batch(config, given.batch)
    names = ("height", "width", "sampler", "steps", "weights_dtype", "rounds", "calls", "profile")
    result = throughput.benchmark_sample(
        config, scale=given.guidance_scale, **{name: getattr(given, name) for name in names}
    )
    _print_and_write(throughput.summary(result), result, given.out)


def _print_and_write(text: str, result: Mapping[str, Any], out: str | None) -> None:
    """Prints the summary, and writes the full result as JSON, to the file or to standard output."""
    print(text)
    if out:
        write_text(out, json.dumps(result, indent=1) + "\n")
    else:
        print(json.dumps(result))


def recipe(given: Flags) -> None:
    """Prints the days and the cost of the stages on given hardware, next to the days in the paper."""
    from pixart_jax.benchmarking import recipe

    given.require("stages", "hardware", "rates")
    stages = [configs.from_file(spec) for spec in given.stages.split(",")]
    result = recipe.project(stages, recipe.read_rates(given.rates), given.hardware, given.price)
    _print_and_write(recipe.table(result), result, given.out)


def machine(given: Flags) -> None:
    """Prints the devices of this machine, its memory, and what of the releases fits."""
    from pixart_jax.benchmarking.machine import describe

    describe()


# A mode is called with (config, flags), those of `WITHOUT_CONFIG` only with the flags. It returns the exit
# status, None for 0.
MODES = {
    **{"train": train, "sample": sample, "compile": compile_check, "fit": fit},
    **{"recipe": recipe, "machine": machine},
}
WITHOUT_CONFIG = (recipe, machine)


def main(given: Flags) -> int | None:
    from pixart_jax.benchmarking import topology
    from pixart_jax.models.attention import target_platform
    from pixart_jax.training.settings import apply_settings

    mode = given.mode(MODES)
    given = fetched(given)
    if mode in WITHOUT_CONFIG:
        return mode(given)
    given.require("config", hint="give a stage, such as --config=configs/stage3.py:512.")
    # A program that is compiled for another platform may use that platform's kernels.
    platform = topology.target(given.topology) if mode in (compile_check, fit) else None
    if mode is fit and not given.topology:
        platform = "gpu"
    with target_platform(platform) if platform else contextlib.nullcontext():
        config = configs.from_config_dict(given.config)
        if platform is None:
            apply_settings(config.compile.deterministic)
        print(f"attention: {config.model.attention_choice()}")
        return mode(config, given)


if __name__ == "__main__":
    run(main, Flags)
