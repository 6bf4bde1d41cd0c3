"""Measures the start-up of a training step: tracing, compilation, and loading from the compile cache.

    JAX_PLATFORMS=cpu python benchmarks/startup.py --config=configs/stage2.py --batch=8

Compiles the whole update twice, each time in a new process; the second process finds the program of the first
in the cache. No weights are allocated. The batch size only changes shapes.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STARTED = time.perf_counter()


def compile_once(arguments: argparse.Namespace) -> dict:
    from pixart_jax.benchmarking import measuring, throughput
    from pixart_jax.benchmarking.compile import lower_step
    from pixart_jax.config import from_config_dict
    from pixart_jax.training import sharding
    from pixart_jax.training.compilation import keep_compiled

    keep_compiled(arguments.cache)
    file, _, argument = arguments.config.partition(":")
    get_config = runpy.run_path(file)["get_config"]
    config = throughput.with_batch(
        from_config_dict(get_config(argument) if argument else get_config()), arguments.batch
    )
    mesh = sharding.make_mesh(config.mesh, config)
    _, found = measuring.compile_timed(functools.partial(lower_step, config, mesh))
    return {
        "ready_seconds": time.perf_counter() - STARTED,
        "cpu_seconds": time.process_time(),
        **found,
        "model": {
            name: getattr(config.model, name) for name in ("size", "depth", "dtype", "remat", "scan_layers")
        },
        "machine": measuring.machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/stage2.py")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--cache", help=argparse.SUPPRESS)  # passed to the processes that compile
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/startup.json"))
    arguments = parser.parse_args()
    if arguments.cache:
        print(json.dumps(compile_once(arguments)))
        return
    runs = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("first_start", "second_start"):
            command = [sys.executable, __file__, f"--config={arguments.config}", f"--batch={arguments.batch}"]
            done = subprocess.run(
                [*command, f"--cache={cache}"], stdout=subprocess.PIPE, text=True, check=True, env=os.environ
            )
            runs[name] = json.loads(done.stdout.splitlines()[-1])
            print(name, json.dumps(runs[name], indent=1))
    report = {"config": arguments.config, "batch": arguments.batch, **runs}
    report["load_average_at_the_end"] = os.getloadavg()
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
