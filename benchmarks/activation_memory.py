"""Compiles training steps of XL/2 for an H100, and records the memory that the compiler plans.

    pip install -e '.[cuda]'
    JAX_PLATFORMS=cpu python benchmarks/activation_memory.py       # benchmarks/results/activation_memory.json

`models/activations.py` estimates the memory of activations with coefficients from these programs, and a test
compares the estimates of `pixart_jax.benchmark fit` with them. Nothing is run. Each program takes a minute or
two. Cases that the result file contains are skipped, so an interrupted script can be resumed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from pixart_jax.benchmarking.compile import compiler_versions, try_fit, with_parts
from pixart_jax.benchmarking.topology import topology_devices
from pixart_jax.config import MeshConfig, TrainConfig, from_file
from pixart_jax.models.attention import target_platform
from pixart_jax.training import sharding

ROOT = Path(__file__).resolve().parent
# Config, pixels (or variant), images in a micro-batch, micro-batches, remat, and other fields.
CASES = (
    ("lora", 512, 1, 1, "dots", {}),
    ("lora", 512, 4, 1, "dots", {}),
    ("lora", 512, 1, 1, "full", {}),
    ("lora", 512, 4, 1, "full", {}),
    ("finetune", 512, 1, 1, "dots", {}),
    ("finetune", 512, 4, 1, "dots", {}),
    ("lora", 512, 4, 1, "none", {}),
    ("lora", 512, 1, 1, "dots", {"base_dtype": "int8"}),
    ("finetune", 512, 1, 1, "full", {"ema_device": "host", "offload": True}),
    ("finetune", 512, 4, 1, "full", {}),
    ("finetune", 512, 4, 4, "dots", {}),
    ("lora", 1024, 1, 1, "full", {}),
    ("lora", 1024, 1, 1, "dots", {}),
    ("lora", 256, 4, 1, "dots", {}),
    ("finetune", 1024, 1, 1, "full", {}),
    ("finetune", 512, 4, 1, "none", {}),
    ("finetune", 256, 8, 1, "dots", {}),
    ("lora", 512, 1, 1, "dots", {"rank": 128}),
    ("sigma", "1024-kv", 1, 1, "dots", {}),
    ("sigma", "1024-kv", 1, 1, "none", {}),
)


def case_config(name: str, pixels: int | str, rows: int, parts: int, remat: str, fields: dict) -> TrainConfig:
    """Returns the config of a case. Call it under `target_platform('gpu')`."""
    config = from_file(f"{ROOT.parent / 'configs' / name}.py:{pixels}")
    of_adapter = {key: value for key, value in fields.items() if key in ("base_dtype", "rank")}
    of_optimizer = {key: value for key, value in fields.items() if key not in of_adapter}
    if "rank" in of_adapter:
        of_adapter["alpha"] = float(of_adapter["rank"])
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, remat=remat),
        mesh=MeshConfig(data=1, fsdp=1),
        adapter=dataclasses.replace(config.adapter, **of_adapter),
        optimizer=dataclasses.replace(config.optimizer, **of_optimizer),
    )
    return with_parts(config, rows * parts, parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "activation_memory.json")
    parser.add_argument("--topology", default="h100:1")
    args = parser.parse_args()
    devices = topology_devices(args.topology)
    result = {"topology": args.topology, "device": devices[0].device_kind, "programs": []}
    if args.out.exists():
        result = json.loads(args.out.read_text())
    result["versions"] = compiler_versions("gpu")
    names = ("config", "pixels", "rows", "accumulation", "remat", "fields")
    for values in CASES:
        case = dict(zip(names, values))
        if any(case.items() <= done.items() for done in result["programs"]):
            continue
        with target_platform("gpu"):
            config = case_config(*values)
            fit = try_fit(config, sharding.make_mesh(config.mesh, config, devices), None)
        sizes = {name: getattr(fit, name) for name in ("peak", "arguments", "temporaries")}
        result["programs"].append({**case, **sizes, "compile_seconds": round(fit.compile_seconds)})
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(case, sizes, f"{fit.compile_seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
