"""Measures how much time and memory each option of the training step costs or saves.

    JAX_PLATFORMS=cpu python benchmarks/options.py          # width 384, 4 blocks, 32x32 latents, batch 4
    python benchmarks/options.py --size=XL/2 --batch=16 --dtype=bfloat16    # one GPU
    JAX_PLATFORMS=cpu python benchmarks/options.py --topology=v5e:2x4 --size=XL/2 --batch=64 --dtype=bfloat16

With `--topology` the step is compiled but not run. The compiler reports the peak memory per device that each
option needs, with scanned blocks and the state sharded over all chips. This needs libtpu but no TPU, and
takes minutes of CPU time per option.

The first line is the step without options. The steps with and without options run in alternating rounds. A
ratio is the time without the option divided by the time with it; above 1 the option is faster. Memory is what
the compiler planned: state and batch, results that do not reuse their memory, and temporary memory.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax

from pixart_jax.benchmarking.compile import GIB, check
from pixart_jax.benchmarking.measuring import compile_timed, machine
from pixart_jax.benchmarking.throughput import synthetic_batch
from pixart_jax.config import DataConfig, FeaturesConfig, MeshConfig, PixArtConfig, TrainConfig
from pixart_jax.models.attention import target_platform
from pixart_jax.training.objectives import make_objective
from pixart_jax.training.optimizers import make_optimizer
from pixart_jax.training.state import TrainState, init_networks, new_state
from pixart_jax.training.step import make_train_step

# Part of the config -> changes. 'donate' is an argument of the compilation; 'softmax' selects the rule for
# the gradient of softmax.
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "no donation": {"donate": {}},
    "softmax as JAX differentiates it": {"softmax": {}},
    "scan over blocks": {"model": {"scan_layers": True}},
    "optimizer and average sharded": {"mesh": {"strategy": "zero1"}},
    "nothing sharded": {"mesh": {"fsdp": 1, "data": -1}},
    "splash attention": {"model": {"attention": "splash"}},
    "remat full": {"model": {"remat": "full"}},
    "remat dots": {"model": {"remat": "dots"}},
    "remat save_attention": {"model": {"remat": "save_attention"}},
    "two micro-batches": {"optimizer": {"accumulation": 2}},
    "Muon": {"optimizer": {"name": "muon"}},
    "half of the tokens routed": {"routing": {"rate": 0.5, "first_blocks": 1, "last_blocks": 1}},
    "no caption dropout": {"diffusion": {"condition_dropout": 0.0}},
    "min-SNR": {"diffusion": {"min_snr_gamma": 5.0}},
}


# Options that need several devices or TPUs; options that --topology cannot measure (no donation) or always
# uses (scan).
OF_TOPOLOGIES = ("optimizer and average sharded", "nothing sharded", "splash attention")
OF_MACHINES = ("no donation", "scan over blocks")


def with_changes(config: TrainConfig, changes: dict[str, dict[str, Any]]) -> TrainConfig:
    for part, values in changes.items():
        if values:
            changed = dataclasses.replace(getattr(config, part), **values)
            config = dataclasses.replace(config, **{part: changed})
    return config


def softmax_rule(changes: dict[str, dict[str, Any]]) -> contextlib.AbstractContextManager:
    """Makes `models/attention.py` use JAX's own gradient of softmax if `changes` ask for it."""
    if "softmax" not in changes:
        return contextlib.nullcontext()
    return mock.patch.object(jax, "softmax_custom_jvp", lambda _: contextlib.nullcontext())


def planned(config: TrainConfig, changes: dict[str, dict[str, Any]], topology: str) -> dict[str, Any]:
    """Compiles the step for a topology, and returns what the compiler reports."""
    start = time.perf_counter()
    with target_platform("tpu"), softmax_rule(changes):
        report = check(with_changes(config, changes), topology, search=False)
    names = ("fits", "peak", "needed", "limit_bytes", "mesh", "versions")
    return {name: report[name] for name in names} | {"seconds": time.perf_counter() - start}


def prepare(
    config: TrainConfig, changes: dict[str, dict[str, Any]], states: dict[str, TrainState]
) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Returns a function that runs one step, and what the compiler reports.

    `states` has one state per optimizer, because one state of XL/2 per option would not fit on a GPU.
    """
    donate = "donate" not in changes
    config = with_changes(config, changes)
    side = config.features.latent_side
    batch = jax.device_put(synthetic_batch(config, config.data.batch_size, side, side))
    objective = make_objective(config)
    optimizer = make_optimizer(config.optimizer, config.data.batch_size, objective)
    kind = config.optimizer.name
    if kind not in states:
        states[kind] = jax.jit(
            lambda: new_state(init_networks(objective, jax.random.key(0)), objective, optimizer)
        )()
    step = jax.jit(make_train_step(config, objective, optimizer), donate_argnums=(0,) if donate else ())
    with softmax_rule(changes):
        step, found = compile_timed(lambda: step.lower(states[kind], batch))
    memory = step.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    found["planned_GiB"] = (memory.argument_size_in_bytes + results + memory.temp_size_in_bytes) / GIB

    def update():
        states[kind], metrics = step(states[kind], batch)
        return metrics

    return update, found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="custom", help="published shape, such as XL/2")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--num_heads", type=int, default=6)
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--attention", default="auto")
    parser.add_argument(
        "--scan_layers", action=argparse.BooleanOptionalAction, help="by default only with --topology"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--topology", help="TPU topology to compile for; nothing is run")
    parser.add_argument("--only", nargs="+", choices=OPTIONS, help="options to compare with the plain step")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/options.json, or _tpu.json")
    arguments = parser.parse_args()
    if arguments.only and not arguments.out:
        parser.error("--only needs --out, because the default file holds the results of all options.")
    topology = arguments.topology
    if arguments.scan_layers is None:
        arguments.scan_layers = bool(topology)
    out = arguments.out or Path(f"benchmarks/results/options{'_tpu' if topology else ''}.json")
    left_out = OF_MACHINES if topology else OF_TOPOLOGIES
    if arguments.attention != "xla" and (topology or jax.default_backend() != "cpu"):
        # A fused kernel has its own gradient.
        left_out = (*left_out, "softmax as JAX differentiates it")
    chosen = ["plain", *(arguments.only or [name for name in list(OPTIONS)[1:] if name not in left_out])]

    names = ("size", "depth", "hidden_size", "num_heads", "dtype", "attention", "scan_layers")
    config = TrainConfig(
        model=PixArtConfig(**{name: getattr(arguments, name) for name in names}),
        features=FeaturesConfig(image_size=arguments.pixels),
        data=DataConfig(batch_size=arguments.batch),
        mesh=MeshConfig(data=1, fsdp=-1) if topology else MeshConfig(),
    )
    given = {name: value for name, value in vars(arguments).items() if name not in ("out", "only")}
    # A published size sets depth, width and heads.
    given |= {name: getattr(config.model, name) for name in names}
    if topology:
        plans = {}
        print("| option | peak per device, GiB | seconds |\n|---|---|---|")
        for name in chosen:
            plan = plans[name] = planned(config, OPTIONS[name], topology)
            fits = "" if plan["fits"] else f" (limit {plan['limit_bytes'] / GIB:.1f})"
            print(f"| {name} | {plan['needed'] / GIB:.2f}{fits} | {plan['seconds']:.0f} |", flush=True)
            out.write_text(json.dumps({"arguments": given, "options": plans}, indent=1) + "\n")
        return
    prepared, rows, states = {}, {}, {}
    for name in chosen:
        prepared[name], rows[name] = prepare(config, OPTIONS[name], states)
        print(name, rows[name], flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in prepared}
    for number in range(arguments.rounds + 1):
        for name, update in prepared.items():
            start = time.perf_counter()
            jax.block_until_ready(update())
            # The first round is a warm-up.
            if number:
                seconds[name].append(time.perf_counter() - start)
    for name, row in rows.items():
        ratios = [plain / other for plain, other in zip(seconds["plain"], seconds[name])]
        row |= {
            "median_seconds": statistics.median(seconds[name]),
            "times_as_fast": statistics.median(ratios),
            "times_as_fast_range": [min(ratios), max(ratios)],
        }
    print("| option | s per step | times as fast (range) | planned GiB | compile s |\n|---|---|---|---|---|")
    for name, row in rows.items():
        low, high = row["times_as_fast_range"]
        ratio = f"{row['times_as_fast']:.2f} ({low:.2f} to {high:.2f})"
        print(
            f"| {name} | {row['median_seconds']:.3f} | {ratio} | {row['planned_GiB']:.2f} | "
            f"{row['compile_seconds']:.0f} |"
        )
    report = {"arguments": given, "options": rows, "load_average": os.getloadavg(), "machine": machine()}
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
