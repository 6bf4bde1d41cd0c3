"""Runs tiny trainings on the digits, in this process and as commands."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import xla_flags

from pixart_jax.config import (
    CheckpointConfig,
    DataConfig,
    InitConfig,
    LogConfig,
    TrainConfig,
    from_file,
)
from pixart_jax.data.planning import open_images
from pixart_jax.precompute import precompute

ROOT = Path(__file__).parent.parent
# One device per process.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags.ONE_DEVICE}


def published_config(stage: str) -> TrainConfig:
    """Returns a stage of `configs/digits.py`, unchanged."""
    return from_file(f"digits:{stage}")


def tiny_config(folder: Path, stage: str = "stage1", **changes) -> TrainConfig:
    """Returns a digits stage that trains in seconds, on the features in `folder`."""
    config = published_config(stage)
    values = dict(
        steps=4,
        model=dataclasses.replace(config.model, depth=1, hidden_size=24, num_heads=2),
        data=DataConfig(train=str(folder), validation=str(folder), batch_size=16, threads=1),
        init=InitConfig(),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=0),
        checkpoint=CheckpointConfig(every=2, keep=3),
        log=LogConfig(every=1, validate_every=4, validation_samples=64, sample_every=0),
    )
    return dataclasses.replace(config, **{**values, **changes})


def make_features(folder: Path, stage: str) -> None:
    """Computes features of the digits' held-out scans."""
    config = published_config(stage).features
    precompute(open_images("digits", "digits", config, {"split": "test"}), config, folder)


def flags_of(config: TrainConfig, stage: str) -> list[str]:
    """Returns the flags that change a stage of `configs/digits.py` to `config`."""
    return _differences(config, published_config(stage), "--config.")


def _differences(config: object, base: object, prefix: str) -> list[str]:
    flags = []
    for field in dataclasses.fields(config):
        value, other = getattr(config, field.name), getattr(base, field.name)
        if dataclasses.is_dataclass(value):
            flags += _differences(value, other, f"{prefix}{field.name}.")
        elif value != other:
            flags.append(f"{prefix}{field.name}={value}")
    return flags


def losses(workdir: Path, name: str = "loss") -> dict[int, float]:
    """Returns step -> loss (or another metric) of all complete lines that a run has logged so far."""
    file = workdir / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return {line["step"]: line[name] for line in map(json.loads, lines) if name in line}


def metrics(workdir: Path) -> list[dict[str, float]]:
    """Returns all logged metrics except times, which differ from run to run."""

    def is_time(name: str) -> bool:
        return name.endswith("_per_second") or name.startswith("goodput_") or name == "seconds_left"

    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if not is_time(name)} for line in lines]


def free_port() -> int:
    """Returns a free port of this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(
    count: int,
    stage: str,
    workdir: Path,
    config: TrainConfig,
    last: tuple[str, ...] = (),
    environment: Mapping[str, str] = MappingProxyType({}),
) -> list[subprocess.Popen]:
    """Starts the processes of one run, the last one also with flags `last` and variables `environment`.

    Their standard error is in `workdir`-INDEX.log.
    """
    port = free_port()
    return [
        subprocess.Popen(
            [
                sys.executable, "-m", "pixart_jax.train", f"--config=configs/digits.py:{stage}",
                f"--workdir={workdir}", f"--coordinator=localhost:{port}", f"--num_processes={count}",
                f"--process_id={index}", *flags_of(config, stage),
                *(last if index == count - 1 else ()),
            ],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | (dict(environment) if index == count - 1 else {}),
            stdout=subprocess.DEVNULL,
            stderr=log_of(workdir, index).open("w"),
        )
        for index in range(count)
    ]  # fmt: skip


def log_of(workdir: Path, index: int) -> Path:
    return workdir.with_name(f"{workdir.name}-{index}.log")


def wait_for_step(workdir: Path, step: int, processes: list[subprocess.Popen], seconds: int = 900) -> None:
    """Waits until the run has logged `step`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if step in losses(workdir):
            return
        if any(process.poll() is not None for process in processes):
            break
        time.sleep(0.2)
    logs = [log_of(workdir, index).read_text() for index in range(len(processes))]
    raise AssertionError(f"no step {step} in {workdir}: " + "\n".join(logs))


def stop(processes: list[subprocess.Popen]) -> None:
    """Kills all processes that are still running, also after a test has failed."""
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
