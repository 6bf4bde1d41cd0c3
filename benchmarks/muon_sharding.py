"""Compares the compiled step of AdamW with that of Muon, unshared and shared among the devices.

    pip install -e '.[tpu]'
    JAX_PLATFORMS=cpu python benchmarks/muon_sharding.py --topology=v5e:4x4

Nothing is run: the script compiles stage 2 (XL/2 at 256 px) for devices that are not on this machine, and
reads arithmetic, memory and collectives of one device from the program. 'muon, unshared' is Muon as the
compiler shards it without help; 'muon' is what training runs (`training/optimizers/muon.py`). Results are
added to benchmarks/results/muon_sharding.json. A program takes minutes to
compile. The 14 all-to-alls of 'muon' have one channel, so `count_collectives` counts them as one; together
their results have 340 MB with the defaults below.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from pixart_jax.benchmarking.collectives import count_collectives
from pixart_jax.benchmarking.compile import compiler_versions, lower_step, with_parts
from pixart_jax.benchmarking.estimate import estimate_step, find_chip
from pixart_jax.benchmarking.topology import topology_devices
from pixart_jax.config import MeshConfig, TrainConfig, from_file
from pixart_jax.training import sharding

OPTIMIZERS = ("adamw", "muon, unshared", "muon")


def stage(arguments: argparse.Namespace, devices: int) -> TrainConfig:
    """Returns the stage with the batch and the mesh to compile for."""
    config = from_file(arguments.config)
    model = dataclasses.replace(config.model, remat=arguments.remat)
    if arguments.depth:
        model = dataclasses.replace(model, size="custom", depth=arguments.depth)
    mesh = MeshConfig(data=devices // arguments.fsdp, fsdp=arguments.fsdp)
    config = dataclasses.replace(config, model=model, mesh=mesh)
    return with_parts(config, arguments.rows * devices, 1)


def measure(config: TrainConfig, name: str, devices: list[Any]) -> dict[str, Any]:
    """Compiles the step with one optimizer; all numbers are of one device."""
    optimizer = dataclasses.replace(config.optimizer, name=name.partition(",")[0])
    config = dataclasses.replace(config, optimizer=optimizer)
    mesh = sharding.make_mesh(config.mesh, config, devices)
    start = time.perf_counter()
    compiled = lower_step(config, mesh, share_update=name != "muon, unshared").compile()
    text = compiled.as_text()
    memory = compiled.memory_analysis()
    chip = find_chip(devices[0].device_kind)
    estimate = chip and estimate_step(text, chip)
    return {
        # Of the matrix products and the update; the compiler counts the blocks, a loop, only once.
        "counted_tflop": compiled.cost_analysis()["flops"] / 1e12,
        "collectives": count_collectives(text),
        "peak_gib": memory.peak_memory_in_bytes / 2**30,
        "temporary_gib": memory.temp_size_in_bytes / 2**30,
        "estimated_ms": estimate and 1e3 * estimate.seconds,
        "estimated_ms_by_group": estimate and {k: 1e3 * v for k, v in estimate.groups.items()},
        "compile_seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/stage2.py")
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--fsdp", type=int, default=16, help="devices that share the parameters")
    parser.add_argument("--rows", type=int, default=16, help="images per device")
    parser.add_argument("--remat", default="full")
    parser.add_argument("--depth", type=int, help="number of blocks, for a quick run")
    parser.add_argument(
        "--only", choices=OPTIMIZERS, help="compile one of them, and keep the results of the others"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/muon_sharding.json"))
    arguments = parser.parse_args()
    devices = topology_devices(arguments.topology)
    config = stage(arguments, len(devices))
    report = {
        "config": arguments.config,
        "topology": arguments.topology,
        "mesh": {"data": config.mesh.data, "fsdp": config.mesh.fsdp},
        "rows": arguments.rows,
        "remat": arguments.remat,
        "depth": config.model.depth,
        "versions": compiler_versions(devices[0].platform),
    }
    known = json.loads(arguments.out.read_text()) if arguments.out.is_file() else []
    names = ("config", "topology", "mesh", "rows", "remat", "depth")
    for old in known:
        if all(old[name] == report[name] for name in names):
            known.remove(old)
            report = old | report
            break
    for name in [arguments.only] if arguments.only else OPTIMIZERS:
        report[name] = measure(config, name, devices)
        print(name, json.dumps(report[name], indent=1), flush=True)
        arguments.out.write_text(json.dumps([*known, report], indent=1) + "\n")


if __name__ == "__main__":
    main()
