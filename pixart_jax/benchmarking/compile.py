"""Compiles the training step for devices that may not be on this machine; reports memory and collectives.

The compiler plans the memory of the whole step; the TPU compiler rejects a program that does not fit. The
compiled program contains every collective, and the time of a step can be estimated from it (`estimate.py`).
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from pixart_jax.benchmarking.collectives import count_collectives
from pixart_jax.benchmarking.estimate import Estimate, estimate_step, find_chip
from pixart_jax.benchmarking.flops import stage_flops
from pixart_jax.benchmarking.topology import CUDA_PLUGINS, GIB, memory_limit, topology_devices
from pixart_jax.config import TrainConfig
from pixart_jax.models.layers import activation_sharding
from pixart_jax.training import sharding
from pixart_jax.training.batches import batch_shapes
from pixart_jax.training.objectives import make_objective
from pixart_jax.training.optimizers import make_optimizer
from pixart_jax.training.state import abstract_state
from pixart_jax.training.step import device_part, jit_train_step
from pixart_jax.versions import package_versions


def abstract_batch(config: TrainConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and shardings of a batch of square images, which have the most tokens."""
    side = config.features.latent_side
    placed = sharding.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=placed)
        for name, spec in batch_shapes(config, side, side).items()
    }


def lower_step(config: TrainConfig, mesh: Mesh, *, share_update: bool = True) -> jax.stages.Lowered:
    """Lowers the training step of a stage for the devices of `mesh`.

    `share_update` False is for comparisons: the devices then do not share the work of Muon.
    """
    objective = make_objective(config)
    optimizer = make_optimizer(
        config.optimizer,
        config.data.batch_size,
        objective,
        config.steps,
        config.seed,
        mesh if share_update else None,
    )
    target, shardings = abstract_state(
        objective, optimizer, mesh, config.mesh.strategy, config.optimizer.on_host
    )
    with activation_sharding(sharding.activation_rule(mesh)):
        step = jit_train_step(config, objective, optimizer, shardings)
        return step.lower(device_part(config, target), abstract_batch(config, mesh))


def compile_step(config: TrainConfig, mesh: Mesh) -> jax.stages.Compiled:
    """Compiles the training step of a stage for the devices of `mesh`."""
    device = mesh.devices.flat[0]
    options = {}
    if jax.__version_info__ < (0, 11) and device.platform == "gpu" and device not in jax.local_devices():
        # Without a GPU to tune on, Triton fails to tile some products ("Couldn't find output tile sizes").
        # Use cuBLAS instead.
        options["xla_gpu_enable_triton_gemm"] = False
    return lower_step(config, mesh).compile(compiler_options=options)


@dataclasses.dataclass(frozen=True)
class Fit:
    """The result of one compilation. Memory is in bytes per device."""

    fits: bool
    # Peak memory during a run; None if the compiler rejected the program.
    peak: int | None
    # Memory of state and batch, and of temporary arrays; None if the compiler rejected the program.
    arguments: int | None
    temporaries: int | None
    # The peak or, if the compiler rejected the program, the memory that it says the program needs.
    needed: int
    compile_seconds: float
    collectives: dict[str, dict[str, int]]
    # Message of the compiler if it rejected the program.
    refusal: str = ""
    # None if the compiler rejected the program, or for devices without an estimate.
    estimate: Estimate | None = None


def try_fit(config: TrainConfig, mesh: Mesh, limit: int | None) -> Fit:
    """Compiles the step and checks whether it fits into `limit` bytes per device.

    A program that the compiler rejects because it needs too much memory does not fit.
    """
    start = time.monotonic()
    try:
        compiled = compile_step(config, mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refusal = str(error).splitlines()[0]
        return Fit(False, None, None, None, _needed(str(error)), time.monotonic() - start, {}, refusal)
    seconds = time.monotonic() - start
    memory = compiled.memory_analysis()
    peak = memory.peak_memory_in_bytes
    text = compiled.as_text()
    chip = find_chip(mesh.devices.flat[0].device_kind)
    return Fit(
        fits=limit is None or peak <= limit,
        peak=peak,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        needed=peak,
        compile_seconds=seconds,
        collectives=count_collectives(text),
        estimate=chip and estimate_step(text, chip),
    )


def _needed(message: str) -> int:
    """Parses the bytes that a rejected program needs from the message of the compiler."""
    found = re.search(r"(?:Used |required for [^(]*\()([\d.]+)([GMT])", message)
    if not found:
        raise RuntimeError(f"the compiler rejected the program without naming its size: {message[:400]}")
    return int(float(found[1]) * {"M": 2**20, "G": 2**30, "T": 2**40}[found[2]])


def with_parts(config: TrainConfig, batch_size: int, accumulation: int) -> TrainConfig:
    """Returns the stage with another batch size and number of micro-batches."""
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, batch_size=batch_size),
        optimizer=dataclasses.replace(config.optimizer, accumulation=accumulation),
    )


def largest_rows(
    measure: Callable[[int], Fit], first: Fit, rows: int, limit: int
) -> tuple[int, dict[int, Fit]]:
    """Finds the largest number of rows per device that fits, to within an eighth.

    Memory grows almost linearly with the number of rows, so each trial is the number at which a line through
    the known points reaches the limit.

    Args:
      measure: compiles the step for a number of rows.
      first: result of `measure(rows)`.
      rows: first trial.
      limit: memory of a device in bytes.

    Returns:
      The largest number of rows, 0 if not even one row fits, and all trials.
    """
    trials = {rows: first}
    while True:
        fitting = max((n for n, fit in trials.items() if fit.fits), default=0)
        too_many = min((n for n, fit in trials.items() if not fit.fits), default=None)
        if too_many is not None and too_many - fitting <= max(1, fitting // 8):
            return fitting, trials
        guess = _meets(trials, limit)
        if too_many is None:
            guess = max(fitting + 1, min(guess, 4 * fitting))
        else:
            guess = min(max(guess, fitting + 1), too_many - 1)
        trials[guess] = measure(guess)


def _meets(trials: dict[int, Fit], limit: int) -> int:
    """Estimates the number of rows at which memory reaches the limit.

    The estimate is on a line through the two trials closest to the limit or, with a single trial, through
    that trial and the origin.
    """
    points = sorted(((n, fit.needed) for n, fit in trials.items()), key=lambda at: abs(at[1] - limit))[:2]
    (rows, needed), (other, base) = points if len(points) == 2 else (points[0], (0, 0))
    slope = (needed - base) / (rows - other)
    return int(rows + (limit - needed) / slope) if slope > 0 else max(rows, other) + 1


def check(
    config: TrainConfig, topology: str, *, memory_gib: float | None = None, search: bool = True
) -> dict[str, Any]:
    """Compiles a stage for a topology and reports memory, collectives and the estimated time.

    Args:
      config: config of the stage, with its mesh, batch size and accumulation.
      topology: see `topology_devices`.
      memory_gib: memory of a device in GiB; by default the value that the compiler or the device reports.
      search: also find the largest batch without accumulation, and the accumulation that the batch size of
        the stage needs.

    Returns:
      A dict of plain values, for JSON.

    Raises:
      UserError: if topology, mesh and batch size do not fit together.
    """
    devices = topology_devices(topology, max(config.mesh.slices, 1))
    mesh = sharding.make_mesh(config.mesh, config, devices)
    sharding.check_batch(config, mesh)
    limit = memory_limit(devices[0]) if memory_gib is None else int(memory_gib * GIB)
    batch, parts = config.data.batch_size, config.optimizer.accumulation
    shards = sharding.batch_shards(mesh)
    fit = try_fit(config, mesh, limit)
    model = config.model
    values = dataclasses.asdict(fit)
    del values["estimate"]
    report = {
        "stage": config.name,
        "topology": topology,
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "mesh": dict(mesh.shape),
        "slices": max(config.mesh.slices, 1),
        "strategy": config.mesh.strategy,
        "remat": model.remat,
        "attention": model.attention,
        "dtype": model.dtype,
        "image_size": config.features.image_size,
        "batch_size": batch,
        "accumulation": parts,
        # Rows of a micro-batch per group of sequence x tensor devices.
        "rows": batch // (shards * parts),
        "limit_bytes": limit,
        "versions": compiler_versions(devices[0].platform),
        "flops_per_step": batch * stage_flops(config),
        **values,
    }
    if fit.estimate:
        report |= _estimated(fit.estimate, report)
    if search and limit is not None:
        report |= _search(config, mesh, limit, fit)
    return report


def compiler_versions(platform: str) -> dict[str, str]:
    """Returns the versions of the packages that compile for a platform."""
    packages = {"tpu": ("libtpu",), "gpu": (*CUDA_PLUGINS, "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")}
    found = package_versions(("jaxlib", *packages.get(platform, ())))
    return {name: version for name, version in found.items() if version}


def _estimated(estimate: Estimate, report: dict[str, Any]) -> dict[str, Any]:
    """Returns the entries of the report for an estimate. Every key contains the word "estimate"."""
    seconds, devices = estimate.seconds, report["devices"]
    rate = report["flops_per_step"] / devices / seconds
    # The peak in the datasheet is for bfloat16.
    peak = find_chip(report["device_kind"]).peak if report["dtype"] == "bfloat16" else None
    return {
        "estimated_seconds": seconds,
        "estimated_seconds_by_group": estimate.groups,
        "estimated_images_per_second_and_device": report["batch_size"] / devices / seconds,
        "estimated_share_of_datasheet_peak": peak and rate / peak,
        "estimate_assumes": estimate.assumptions,
        "estimate_leaves_out": estimate.left_out,
    }


def _search(config: TrainConfig, mesh: Mesh, limit: int, fit: Fit) -> dict[str, Any]:
    batch, parts = config.data.batch_size, config.optimizer.accumulation
    shards = sharding.batch_shards(mesh)
    share = batch // shards

    def measure(rows: int) -> Fit:
        return try_fit(with_parts(config, rows * shards, 1), mesh, limit)

    rows = share // parts
    first = fit if parts == 1 else measure(rows)
    largest, trials = largest_rows(measure, first, rows, limit)
    accumulation, chosen = None, None
    for count in (n for n in range(1, share + 1) if share % n == 0 and share // n <= max(largest, 1)):
        # Compile with the whole batch: accumulation also needs memory for it and for the sum of gradients.
        chosen = fit if count == parts else try_fit(with_parts(config, batch, count), mesh, limit)
        if chosen.fits:
            accumulation = count
            break
    return {
        "largest_batch": largest * shards,
        "largest_rows": largest,
        "trials": {str(n): trial.needed for n, trial in sorted(trials.items())},
        "accumulation_needed": accumulation,
        "peak_with_accumulation": chosen.peak if accumulation else None,
    }


def _estimate_lines(report: dict[str, Any]) -> list[str]:
    seconds, share = report["estimated_seconds"], report["estimated_share_of_datasheet_peak"]
    rate = f"{report['estimated_images_per_second_and_device']:,.1f} img/s per device"
    groups = sorted(report["estimated_seconds_by_group"].items(), key=lambda item: -item[1])
    lines = [
        f"  estimate      {seconds * 1e3:,.1f} ms per step, {rate}"
        + (f", {share:.1%} of the datasheet's peak" if share else "")
        + ": estimated, not measured",
        "                " + ", ".join(f"{name.replace('_', ' ')} {s / seconds:.0%}" for name, s in groups),
        f"                assumes {report['estimate_assumes']}",
    ]
    if report["estimate_leaves_out"]:
        left_out = ", ".join(f"{name} x {times}" for name, times in report["estimate_leaves_out"].items())
        lines.append(f"                leaves out {left_out}")
    return lines


def summary(report: dict[str, Any]) -> str:
    """Formats the report as text."""
    mesh = " ".join(f"{axis}={size}" for axis, size in report["mesh"].items() if size > 1) or "of one device"
    limit = report["limit_bytes"]
    of = f" of {limit / GIB:.2f}" if limit else ""
    verdict = "fits" if report["fits"] else "DOES NOT FIT"
    lines = [
        f"{report['stage']} on {report['topology']}: {report['devices']} x {report['device_kind']}, "
        f"mesh {mesh}, {report['strategy']}, remat {report['remat']}, attention {report['attention']}",
        f"  batch         {report['batch_size']} in {report['accumulation']} micro-batches of "
        f"{report['batch_size'] // report['accumulation']}",
        f"  memory        {report['needed'] / GIB:.2f}{of} GiB per device: {verdict}",
    ]
    if report["peak"]:
        lines.append(
            f"                peak; state and batch {report['arguments'] / GIB:.2f}, temporaries "
            f"{report['temporaries'] / GIB:.2f}"
        )
        counts = report["collectives"].items()
        each = (f"{kind} {v['count']} ({v['bytes'] / 1e9:.2f} GB)" for kind, v in counts)
        lines.append(f"  collectives   {', '.join(each) or 'none'} per step per device")
    lines.append(
        f"  arithmetic    {report['flops_per_step'] / 1e12:,.1f} TFLOP per step, "
        f"{report['flops_per_step'] / report['devices'] / 1e12:,.2f} per device, without rematerialization"
    )
    if "estimated_seconds" in report:
        lines += _estimate_lines(report)
    if "largest_batch" in report:
        parts = report["accumulation_needed"]
        lines += [
            f"  largest       batch {report['largest_batch']} without accumulation, to within an eighth",
            f"  accumulation  {parts} for a batch of {report['batch_size']}"
            if parts
            else f"  accumulation  none makes a batch of {report['batch_size']} fit on this mesh",
        ]
    lines.append(f"  compiled in   {report['compile_seconds']:.0f} s")
    return "\n".join(lines)
