import dataclasses
import json
from pathlib import Path

import jax
import pytest

from pixart_jax.benchmark import Flags, main
from pixart_jax.benchmarking import fit, machine
from pixart_jax.benchmarking.topology import GIB
from pixart_jax.config import from_file
from pixart_jax.errors import UserError
from pixart_jax.models.attention import target_platform
from pixart_jax.models.dtypes import DtypeChoice

ROOT = Path(__file__).parents[2]
T4 = int(0.9 * 14.7 * GIB)


@pytest.fixture
def t4(monkeypatch):
    """The functions of `machine` see a GPU of 14.7 GiB without bfloat16."""
    monkeypatch.setattr(machine, "default_dtype", lambda: DtypeChoice("float16", "compute capability 7.5"))
    monkeypatch.setattr(machine, "memory_limit", lambda device: T4)
    with target_platform("gpu"):
        yield


def test_the_command_describes_this_machine(capsys):
    main(Flags(words=("machine",)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"devices: {jax.device_count()} x cpu (cpu)"
    assert "GiB of memory" in lines[1] and "jax " + jax.__version__ in lines[2]
    assert "Runtime > Change runtime type" in lines[-1]
    assert not any("NVIDIA" in line for line in lines)


def test_a_gpu_that_jax_does_not_use_is_mentioned(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_DRIVER", tmp_path)
    assert "pixart_jax[cuda12]" in next(machine.advice(None))


def test_the_advice_is_what_fit_says():
    stored = json.loads((ROOT / "benchmarks/results/fit.json").read_text())["results"]
    with target_platform("gpu"):
        lines = list(machine.advice(stored["lora:512:8"]["limit_bytes"]))
    for line, size in zip(lines, (512, 1024)):
        plans = stored[f"lora:{size}:8"]["sampling"]
        batch = next(plan["largest_batch"] for plan in plans if plan["largest_batch"])
        expected = f"{size} px: up to {batch} at a time with --weights_dtype=int8 --text_weights_dtype=int8."
        assert line.endswith(expected)
    lora = stored["lora:512:8"]
    assert lines[2].endswith(f": {fit.flags(lora['plans'][lora['chosen']]['settings'])}.")
    assert lines[3].endswith("does not fit.")


def test_a_t4_trains_in_float32(t4):
    advice = next(machine.advice(T4))
    flags = {"--config.model.dtype=float32", "--config.features.text_encoder.dtype=float16."}
    assert "train in float32" in advice and flags <= set(advice.split())
    config = machine.for_this_machine(from_file("lora:1024"))
    assert (config.model.dtype, config.features.text_encoder.dtype) == ("float32", "float16")
    assert machine.for_this_machine(config) == config
    assert machine.fitting_settings(config)["optimizer.accumulation"] > 1
    too_large = dataclasses.replace(config, features=dataclasses.replace(config.features, image_size=4096))
    with pytest.raises(UserError, match=r"'lora-1024' does not fit into the 13.2 GiB of cpu: use a smaller"):
        machine.fitting_settings(too_large)


def test_a_cpu_changes_nothing():
    config = from_file("lora:512")
    assert machine.fitting_settings(config) == {} and machine.for_this_machine(config) == config
