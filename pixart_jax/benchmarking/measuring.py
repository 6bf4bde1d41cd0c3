"""Measures the time and memory of programs, and the peak performance of the machine.

This module needs only jax and absl, so that it runs on a bare accelerator machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from pixart_jax.errors import writing
from pixart_jax.files import make_folder, temporary
from pixart_jax.versions import package_versions

# Dense bfloat16 FLOP/s of one chip according to its datasheet. A key is a part of JAX's name for the chip.
DATASHEET = {
    "V100": 125e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "TPU v3": 123e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}
# Clock of TPUs in Hz. v4: Jouppi et al. 2023 (arXiv 2304.01433, table 4). The others follow from
# peak = matrix units per chip x side^2 x 2 x clock, with 4 units of side 128 (v5e), 8 of 128 (v5p) and 4 of
# 256 (v6e).
TPU_CLOCK = {
    "TPU v4": 1.05e9,
    "TPU v5 lite": 1.5e9,
    "TPU v5": 1.75e9,
    "TPU v6 lite": 1.75e9,
}
# Vector operations per second of TPUs: cores x 8 x 128 lanes x 4 units x clock. v4 and v5p have two cores.
TPU_VECTOR = {
    name: clock * 4096 * (2 if name in ("TPU v4", "TPU v5") else 1) for name, clock in TPU_CLOCK.items()
}


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call: median, fastest and slowest round."""

    median: float
    fastest: float
    slowest: float
    rounds: int
    calls_per_round: int


def measure(
    call: Callable[[], Any], *, rounds: int, calls: int, warmup: int = 1, profile: str = ""
) -> Timing:
    """Times `call` in rounds of several calls.

    Args:
      call: returns all arrays that it computes, so that the end of a round can wait for them.
      rounds: number of rounds.
      calls: number of calls per round.
      warmup: number of calls before the first round.
      profile: folder for a profile of one further call, which is not timed; '' for none.

    Raises:
      OutputError: the profile cannot be written.
    """
    for _ in range(warmup):
        jax.block_until_ready(call())
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            out = call()
        jax.block_until_ready(out)
        seconds.append((time.perf_counter() - start) / calls)
    if profile:
        _write_profile(lambda: jax.block_until_ready(call()), make_folder(profile))
    return Timing(statistics.median(seconds), min(seconds), max(seconds), rounds, calls)


def _write_profile(call: Callable[[], Any], folder: Path) -> None:
    """Adds a profile of a call to `folder`/plugins/profile, where XProf finds it.

    Raises:
      OutputError: it cannot be written.
    """
    with writing(folder), temporary(folder, is_folder=True) as new:
        jax.profiler.start_trace(str(new))
        try:
            call()
        finally:
            with writing(folder, RuntimeError):
                jax.profiler.stop_trace()
        for profile in (new / "plugins" / "profile").iterdir():
            make_folder(folder / "plugins" / "profile")
            os.rename(profile, folder / "plugins" / "profile" / profile.name)


def matrix_peak(dtype: str, *, size: int | None = None, seconds: float | None = None) -> dict[str, Any]:
    """Measures the FLOP/s of one device in a chain of large matrix products, as an attainable peak.

    Args:
      dtype: dtype of the factors. The precision of the sums is the default of the backend.
      size: side length of the square matrices; by default 8192, or 2048 on a CPU.
      seconds: approximate length of one measurement; by default 1, or 0.1 on a CPU, where one product takes
        about as long. The result is the best of five.
    """
    on_cpu = jax.default_backend() == "cpu"
    size = size or (2048 if on_cpu else 8192)
    seconds = seconds or (0.1 if on_cpu else 1.0)
    keys = jax.random.split(jax.random.key(0))
    left, right = (jax.random.normal(key, (size, size), dtype) / math.sqrt(size) for key in keys)

    @jax.jit
    def chain(left, right, count):
        # Each product depends on the previous one, so that the compiler cannot remove any.
        return jax.lax.fori_loop(0, count, lambda _, x: x @ right, left)

    def run(count: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(chain(left, right, count))
        return time.perf_counter() - start

    run(1)
    count = max(2, math.ceil(seconds / (run(2) / 2)))
    best = min(run(count) for _ in range(5)) / count
    return {"size": size, "dtype": dtype, "flops_per_second": 2 * size**3 / best}


def datasheet_peak(device: jax.Device) -> float | None:
    """Returns the dense bfloat16 FLOP/s in the datasheet, or None for a device that is not in the table."""
    return DATASHEET.get(chip_name(device.device_kind))


def chip_name(device_kind: str) -> str | None:
    """Returns the key in `DATASHEET` for JAX's name of a device, or None if it is not in the table."""
    return max((name for name in DATASHEET if name in device_kind), key=len, default=None)


def machine() -> dict[str, Any]:
    """Describes the devices, the versions and the settings of this machine."""
    device = jax.devices()[0]
    return {
        "backend": jax.default_backend(),
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "cpus": os.cpu_count(),
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        **package_versions(("jax", "flax", "optax")),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "jax_optimization_level": jax.config.jax_optimization_level,
    }


def compile_timed(lower: Callable[[], jax.stages.Lowered]) -> tuple[jax.stages.Compiled, dict[str, Any]]:
    """Lowers and compiles a program, and returns it with the time this took and its FLOPs."""
    start = time.perf_counter()
    lowered = lower()
    lowering = time.perf_counter() - start
    start = time.perf_counter()
    with _cache_hits() as hits:
        compiled = lowered.compile()
    seconds = time.perf_counter() - start
    # Not every backend counts FLOPs, and the body of a scan counts only once.
    cost = compiled.cost_analysis() or {}
    return compiled, {
        "lowering_seconds": lowering,
        "compile_seconds": seconds,
        "from_cache": bool(hits),
        "compiler_tflop": cost.get("flops", 0.0) / 1e12 or None,
    }


@contextlib.contextmanager
def _cache_hits() -> Iterator[list[str]]:
    """Lists the compilations within this context that were loaded from the persistent cache."""
    hits: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(listen)


def peak_memory(compiled: Any) -> dict[str, Any]:
    """Returns the memory that the compiler planned, and the peak memory of device and process, in GiB."""
    planned = compiled.memory_analysis()
    held = jax.local_devices()[0].memory_stats() or {}
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return {
        "planned_arguments_GiB": planned.argument_size_in_bytes / 2**30,
        "planned_temporary_GiB": planned.temp_size_in_bytes / 2**30,
        "planned_peak_GiB": getattr(planned, "peak_memory_in_bytes", 0) / 2**30 or None,
        "device_peak_GiB": held["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in held else None,
        "process_peak_GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte / 2**30,
    }
