"""Compares the compiler's own FLOP count of a training step with the analytic one, without a TPU.

    JAX_PLATFORMS=cpu python benchmarks/compiled_flops.py --config=configs/stage3.py:512

Compiles the whole update with unrolled blocks, without rematerialization and with plain attention, because
the compiler counts the body of a loop only once and custom kernels not at all. The state is replicated on all
chips, because the compiler may turn products with sharded weights into loops that gather while they multiply
(use `--fsdp` to see this). Needs libtpu (extra 'tpu') and takes minutes of CPU time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import runpy
import time
from pathlib import Path

import jax

from pixart_jax.benchmarking.compile import lower_step
from pixart_jax.benchmarking.flops import stage_flops
from pixart_jax.benchmarking.topology import topology_devices
from pixart_jax.config import MeshConfig, from_config_dict
from pixart_jax.training import sharding


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/stage3.py:512")
    parser.add_argument("--topology", default="v4:2x2x1", help="topology of the TPU slice")
    parser.add_argument("--fsdp", action="store_true", help="shard the state over the chips")
    parser.add_argument("--per_device", type=int, default=1, help="images per device")
    parser.add_argument("--depth", type=int, help="number of blocks, for a quick run")
    parser.add_argument("--remat", default="none")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/compiled_flops.json"))
    arguments = parser.parse_args()

    file, _, argument = arguments.config.partition(":")
    get_config = runpy.run_path(file)["get_config"]
    config = from_config_dict(get_config(argument) if argument else get_config())
    model = dataclasses.replace(config.model, remat=arguments.remat, scan_layers=False, attention="xla")
    if arguments.depth:
        model = dataclasses.replace(model, size="custom", depth=arguments.depth)
    devices = topology_devices(arguments.topology)
    batch_size = arguments.per_device * len(devices)
    config = dataclasses.replace(
        config,
        model=model,
        data=dataclasses.replace(config.data, batch_size=batch_size),
        mesh=MeshConfig(data=1, fsdp=-1) if arguments.fsdp else MeshConfig(data=-1, fsdp=1),
    )
    start = time.perf_counter()
    lowered = lower_step(config, sharding.make_mesh(config.mesh, config, devices))
    lowering = time.perf_counter() - start
    start = time.perf_counter()
    compiled = lowered.compile()
    counted = compiled.cost_analysis()["flops"] / arguments.per_device
    analytic = stage_flops(config)
    report = {
        "config": arguments.config,
        "topology": arguments.topology,
        "fsdp": arguments.fsdp,
        "depth": model.depth,
        "remat": model.remat,
        "images_per_device": arguments.per_device,
        "compiler_tflop_per_image": counted / 1e12,
        "analytic_tflop_per_image": analytic / 1e12,
        "compiler_over_analytic": counted / analytic,
        "peak_GiB_per_device": compiled.memory_analysis().peak_memory_in_bytes / 2**30,
        "lowering_seconds": lowering,
        "compile_seconds": time.perf_counter() - start,
        "jax": jax.__version__,
    }
    print(json.dumps(report, indent=1))
    known = json.loads(arguments.out.read_text()) if arguments.out.is_file() else []
    names = ("config", "topology", "fsdp", "depth", "remat", "images_per_device")
    known = [one for one in known if any(one[name] != report[name] for name in names)]
    arguments.out.write_text(json.dumps([*known, report], indent=1) + "\n")


if __name__ == "__main__":
    main()
