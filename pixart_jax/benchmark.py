"""Measures training and sampling, and plans for hardware that is not here.

    python -m pixart_jax.benchmark compile --config=configs/stage3.py:1024 --topology=v5e:16x16

Needs nothing but jax, flax, optax, einops, numpy, ml_collections and absl, so that it runs on a bare
accelerator machine.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from pixart_jax import config as configs
from pixart_jax.config import TrainConfig
from pixart_jax.errors import UserError, did_you_mean, run_command

# The flags of the command by name.
Given = Mapping[str, Any]


def compile_check(config: TrainConfig, given: Given) -> int:
    """Compiles the step for a topology; 1 when it does not fit its memory."""
    from pixart_jax.benchmarking.compile import run_compile

    return run_compile(config, given["topology"], memory_gib=given["memory_gib"], out=given["out"])


# What a mode takes is (config, flags); what it returns is the exit status, None for 0.
MODES = {"compile": compile_check}


def define_flags() -> dict[str, flags.FlagHolder]:
    """The flags of the command. Not at import: other commands have flags of the same names."""
    return {
        "config": config_flags.DEFINE_config_file(
            "config", None, "Stage to run, such as configs/stage1.py or configs/stage3.py:512."
        ),
        "out": flags.DEFINE_string("out", None, "JSON file for the results; default none, text alone."),
        "topology": flags.DEFINE_string(
            "topology", None, "compile: v4|v5e|v5p|v6e:SHAPE (v5e:16x16), cpu:N, or 'here' for this machine."
        ),
        "memory_gib": flags.DEFINE_float(
            "memory_gib", None, "compile: memory of a device in GiB; default what compiler or device report."
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
    if values["config"] is None:
        raise UserError("--config is missing: give a stage, such as --config=configs/stage3.py:512.")
    return MODES[modes[0]](configs.from_config_dict(values["config"]), values)


if __name__ == "__main__":
    run_command(functools.partial(main, define_flags()))
