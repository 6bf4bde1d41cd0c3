"""What this machine has, and what of the releases fits on its devices.

    from pixart_jax.benchmarking.machine import describe
    describe()                                  # in a notebook, before anything uses a device

`pixart-benchmark machine` prints the same. What fits is estimated, see `fit`.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from pixart_jax.benchmarking import fit
from pixart_jax.benchmarking.topology import GIB, memory_limit
from pixart_jax.config import TrainConfig, from_file
from pixart_jax.errors import UserError
from pixart_jax.models.dtypes import default_dtype
from pixart_jax.training.settings import apply_settings
from pixart_jax.versions import package_versions

# Exists if the driver of an NVIDIA GPU is loaded.
_DRIVER = Path("/proc/driver/nvidia/version")


def describe(say: Callable[[str], None] = print) -> None:
    """Applies the settings of XLA and libtpu, and prints the devices, the memory, the disk and what fits.

    Args:
      say: prints a line.
    """
    apply_settings(say=lambda line: None)
    device = jax.local_devices()[0]
    limit = memory_limit(device)
    versions = package_versions(("pixart_jax", "jax"))
    memory = f", each with {limit / GIB:.1f} GiB for JAX" if limit else ""
    say(f"devices: {jax.local_device_count()} x {device.device_kind} ({device.platform}){memory}")
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = shutil.disk_usage(".").free
    say(f"host: {os.cpu_count()} CPUs, {host / GIB:.1f} GiB of memory, {free / 1e9:.0f} GB free on the disk")
    say("versions: " + ", ".join(f"{name} {version}" for name, version in versions.items() if version))
    for line in advice(limit):
        say(line)


def advice(limit: int | None) -> Iterator[str]:
    """Yields lines about what fits on a device.

    Args:
      limit: the bytes that JAX may use on it; None for a CPU.
    """
    if limit is None:
        if _DRIVER.exists():
            yield (
                "JAX does not use the NVIDIA GPU of this machine: install 'pixart_jax[cuda]', or "
                "'pixart_jax[cuda12]' if the driver is older than 580, and restart Python."
            )
        yield (
            "Without a GPU or TPU, the releases are too slow: use the digits or a tiny model. "
            "On Colab, choose an accelerator: Runtime > Change runtime type."
        )
        return
    dtype = default_dtype()
    if dtype.dtype == "float16":
        yield (
            f"Generate images in float16, the default here, and train in float32 ({dtype.reason}): give "
            "pixart-precompute and pixart-train --config.model.dtype=float32 "
            "--config.features.text_encoder.dtype=float16."
        )
    for size in (512, 1024):
        yield f"Generating images of {size} px: {_sampling(size, limit)}."
    for name, what in (("lora:512", "Training a LoRA"), ("finetune:512", "Fine-tuning the network")):
        settings = _fitting(for_this_machine(from_file(name)), limit)
        fits = "does not fit" if settings is None else fit.flags(settings)
        yield f"{what} at 512 px (--config={name}): {fits}."


def _sampling(size: int, limit: int) -> str:
    """The largest batch, with the widest weights that fit."""
    for plan in fit.sampling_plans(for_this_machine(from_file(f"lora:{size}")), limit):
        if plan["largest_batch"]:
            names = ("weights_dtype", "text_weights_dtype")
            int8 = " ".join(f"--{name}=int8" for name in names if plan[name] == "int8")
            return f"up to {plan['largest_batch']} at a time{int8 and f' with {int8}'}"
    return "does not fit"


def for_this_machine(config: TrainConfig) -> TrainConfig:
    """Returns a config whose dtypes the devices can compute in.

    GPUs without bfloat16, such as the T4, train in float32 and encode captions in float16.
    """
    if default_dtype().dtype != "float16":
        return config
    encoder = dataclasses.replace(config.features.text_encoder, dtype="float16")
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dtype="float32"),
        features=dataclasses.replace(config.features, text_encoder=encoder),
    )


def fitting_settings(config: TrainConfig) -> dict[str, Any]:
    """Returns the fields of a config to change so that training fits on a device of this machine.

    Args:
      config: config of the stage. Its batch size stays the same.

    Returns:
      values by the names of fields, such as {"model.remat": "dots"}; nothing on a CPU.

    Raises:
      UserError: the stage does not fit.
    """
    device = jax.local_devices()[0]
    limit = memory_limit(device)
    settings = {} if limit is None else _fitting(config, limit)
    if settings is None:
        raise UserError(
            f"'{config.name}' does not fit into the {limit / GIB:.1f} GiB of {device.device_kind}: use a "
            "smaller image size, a LoRA instead of the whole network, or a larger device."
        )
    return settings


def _fitting(config: TrainConfig, limit: int) -> dict[str, Any] | None:
    """The settings of the fastest plan that fits; None if nothing does."""
    found = [plan for plan, _ in fit.plans(config, limit)]
    chosen = fit.fastest(found, config)
    return None if chosen is None else found[chosen].settings
