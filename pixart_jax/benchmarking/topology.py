"""Devices to compile for, which may not be on this machine: TPU slices, GPUs and simulated CPU devices.

The TPU compiler runs on any machine with libtpu (extra 'tpu'), the GPU compiler on any machine with JAX's
CUDA plugin (extra 'cuda').
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pixart_jax.errors import UserError, did_you_mean
from pixart_jax.flags import whole_number
from pixart_jax.training.settings import apply_tpu_flags

GIB = 2**30
# Largest number of simulated devices, or GPUs.
_MOST_DEVICES = 4096
# Environment variables to use libtpu only as a compiler: do not query the metadata server of the cloud, and
# do not take the lock that protects the chips.
_COMPILER_ALONE = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
# Number of dimensions of a slice, and its compiler options. TPUs with two cores per chip are used as a single
# device ('megacore').
TPUS: dict[str, tuple[int, dict[str, str]]] = {
    "v4": (3, {"chip_config_name": "megacore"}),
    "v5e": (2, {}),
    "v5p": (3, {"chip_config_name": "megacore"}),
    "v6e": (2, {}),
}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Properties of a GPU for XLA's compiler, with the values of `xla/backends/gpu/target_config/specs`."""

    # Name that the device reports.
    name: str
    # Compute capability, number of streaming multiprocessors (SMs), and float32 lanes per SM.
    capability: tuple[int, int]
    cores: int
    lanes: int
    # Bytes of shared memory per SM, and per block that opts in to more than the default 48 KB.
    shared_memory: int
    shared_memory_of_a_block: int
    # Bytes of L2 cache and of memory, memory bandwidth in bytes per second, clock in GHz.
    l2_cache: int
    memory: int
    bandwidth: int
    clock: float

    def target_config(self) -> str:
        """Returns a `stream_executor.GpuTargetConfigProto` in text format."""
        major, minor = self.capability
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024
              threads_per_warp: 32
              shared_memory_per_block: 49152
              shared_memory_per_core: {self.shared_memory}
              threads_per_core_limit: 2048
              core_count: {self.cores}
              fpus_per_core: {self.lanes}
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              memory_bandwidth: {self.bandwidth}
              l2_cache_size: {self.l2_cache}
              clock_rate_ghz: {self.clock}
              device_memory_size: {self.memory}
              shared_memory_per_block_optin: {self.shared_memory_of_a_block}
              cuda_compute_capability {{ major: {major} minor: {minor} }}
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
            device_description_str: "{self.name}"
        """


_HOPPER = dict(
    capability=(9, 0),
    cores=132,
    lanes=128,
    shared_memory=233_472,
    shared_memory_of_a_block=232_448,
    l2_cache=52_428_800,
    clock=1.98,
)
GPUS = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        cores=108,
        lanes=64,
        shared_memory=167_936,
        shared_memory_of_a_block=166_912,
        l2_cache=41_943_040,
        memory=85_100_068_864,
        bandwidth=2_039_040_000_000,
        clock=1.41,
    ),
    "h100": Gpu("NVIDIA H100 80GB HBM3", memory=84_942_979_072, bandwidth=3_352_320_000_000, **_HOPPER),
    "h200": Gpu("NVIDIA H200 141GB HBM3e", memory=151_397_597_184, bandwidth=4_800_000_000_000, **_HOPPER),
}
# JAX's CUDA plugins. The extra 'cuda' installs one of them.
CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


def target(topology: str | None) -> str | None:
    """Returns the platform of a topology, for `models.attention.target_platform`.

    Returns None for devices of this process.
    """
    kind = (topology or "").partition(":")[0]
    return "tpu" if kind in TPUS else "gpu" if kind in GPUS else None


def topology_devices(topology: str, slices: int = 1) -> list[jax.Device]:
    """Returns the devices of a topology.

    Args:
      topology: 'v5e:16x16' (a TPU slice of this shape), 'h100:8' (8 GPUs of one host), 'cpu:8' (simulated
        devices) or 'here' (the devices of this machine).
      slices: number of TPU slices, which are connected by a slower network.

    Raises:
      UserError: if the kind or the shape is unknown, or if the compiler is not installed.
    """
    kind, _, shape = topology.partition(":")
    kinds = (*TPUS, *GPUS, "cpu", "here")
    if topology == "here":
        return jax.devices()
    count = whole_number(shape, 1, _MOST_DEVICES)
    if kind == "cpu" and count:
        return _simulated_devices(count)
    if kind in GPUS and count:
        return _gpus(GPUS[kind], count, topology)
    if kind not in TPUS:
        raise UserError(
            f"topology '{topology}' is unknown: pass v4, v5e, v5p or v6e with a shape (v5e:16x16), a100, "
            f"h100 or h200 with a number (h100:8), cpu:N, or 'here'.{did_you_mean(kind, kinds)}"
        )
    axes, options = TPUS[kind]
    if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3})" + f"{{{axes - 1}}}", shape):
        example = "16x16" if axes == 2 else "4x4x4"
        raise UserError(
            f"topology '{topology}': a {kind} slice has {axes} dimensions, such as {kind}:{example}."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"topology '{topology}' needs the TPU compiler: pip install 'pixart_jax[tpu]'.")
    for name, value in _COMPILER_ALONE.items():
        os.environ.setdefault(name, value)
    # Compile with the same flags as a run on the chips.
    apply_tpu_flags()
    if slices > 1:
        options = {**options, "num_slices": slices}
    try:
        return topologies.get_topology_desc(topology, platform="tpu", **options).devices
    except (RuntimeError, ValueError) as error:
        raise UserError(f"topology '{topology}': the TPU compiler rejects it: {error}") from error


def _gpus(gpu: Gpu, count: int, topology: str) -> list[jax.Device]:
    if not any(importlib.util.find_spec(plugin) for plugin in CUDA_PLUGINS):
        raise UserError(f"topology '{topology}' needs the GPU compiler: pip install 'pixart_jax[cuda]'.")
    # Partitions x hosts x GPUs per host.
    shape = f"1x1x{count}"
    try:
        described = topologies.get_topology_desc(
            platform="cuda", target_config=gpu.target_config(), topology=shape
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"topology '{topology}': the GPU compiler rejects it: {error}") from error
    return described.devices


def _simulated_devices(count: int) -> list[jax.Device]:
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"topology 'cpu:{count}': this process has {len(devices)} CPU devices; set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}."
        )
    return devices[:count]


def memory_limit(device: jax.Device) -> int | None:
    """Returns the bytes that a program may use on a device, from the compiler or the device; None for a CPU.

    For a GPU that is not in this machine, this is the full memory of the GPU. A process on that GPU gets
    less: JAX reserves three quarters of the memory by default (XLA_PYTHON_CLIENT_MEM_FRACTION).
    """
    if device.platform == "tpu":
        # The compiler reports its limit only when it rejects a program, so compile one that no device can
        # hold.
        here = SingleDeviceSharding(device)
        huge = jax.ShapeDtypeStruct((2**42,), jnp.float32, sharding=here)
        try:
            jax.jit(lambda x: x + 1, out_shardings=here).lower(huge).compile()
        except jax.errors.JaxRuntimeError as error:
            found = re.search(r"exceeds available HBM \(([\d.]+)G\)", str(error))
            if found:
                return int(float(found[1]) * GIB)
        raise RuntimeError(f"the compiler for {device.device_kind} does not report its memory limit")
    absent = next((gpu for gpu in GPUS.values() if gpu.name == device.device_kind), None)
    if absent and device not in jax.local_devices():
        return absent.memory
    stats = device.memory_stats() if device.platform != "cpu" else None
    return stats["bytes_limit"] if stats else None
