"""Compiles every stage of the paper for TPU slices of 16, 64 and 256 chips, and records what fits.

    pip install -e '.[tpu]'
    JAX_PLATFORMS=cpu python benchmarks/compile_grid.py            # benchmarks/results/compile/*.json

The cases are XL/2 at 256, 512 and 1024 px with the paper's global batch sizes on v4, v5e, v5p and v6e. For
each case the script tries several plans and keeps the first that fits. It first tries plans whose backward
pass keeps the results of matrix products ('dots'), then plans that recompute everything ('full'), each with
the largest micro-batch that the memory model below expects to fit. Cases whose result file exists are
skipped, so an interrupted script can be resumed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path

from pixart_jax.benchmarking.compile import check, with_parts
from pixart_jax.benchmarking.topology import GIB, memory_limit, topology_devices
from pixart_jax.config import TrainConfig, from_file
from pixart_jax.training import sharding

ROOT = Path(__file__).resolve().parent
STAGES = {"256": "stage2.py", "512": "stage3.py:512", "1024": "stage3.py:1024"}
SLICES = {
    "v4": ("2x2x4", "4x4x4", "4x8x8"),
    "v5e": ("4x4", "8x8", "16x16"),
    "v5p": ("2x2x4", "4x4x4", "4x8x8"),
    "v6e": ("4x4", "8x8", "16x16"),
}
# Memory per 1,024 image tokens, and additional memory of the attention logits at 1024 px, in GiB. Both are
# estimated from compiled programs, and only decide what to compile first.
GIB_PER_KILOTOKEN = {"dots": 0.95, "full": 0.26}
LOGITS_GIB = {"256": 0.0, "512": 0.0, "1024": 1.6}
# With fewer tokens per chip in a micro-batch, the matrix unit waits for weights.
MIN_TOKENS = 4096


def plans(config: TrainConfig, pixels: str, topology: str) -> list[TrainConfig]:
    """Returns the plans to try, best first."""
    devices = topology_devices(topology)
    mesh = sharding.make_mesh(config.mesh, config, devices)
    limit = memory_limit(devices[0]) / GIB
    share = config.data.batch_size // sharding.batch_shards(mesh)
    group = mesh.shape["sequence"] * mesh.shape["tensor"]
    tokens = (int(pixels) // 16) ** 2
    found = []
    for remat in ("dots", "full"):
        a_row = (GIB_PER_KILOTOKEN[remat] * tokens / 1024 + LOGITS_GIB[pixels]) / group
        model = dataclasses.replace(config.model, remat=remat)
        expected = [
            parts
            for parts in range(1, share + 1)
            if share % parts == 0
            and share // parts * a_row < 0.9 * (limit - 1)
            and share // parts * tokens / group >= MIN_TOKENS
        ]
        for parts in expected[:2]:
            found.append(with_parts(dataclasses.replace(config, model=model), config.data.batch_size, parts))
    return found


def table(folder: Path) -> str:
    """Returns the results as a Markdown table, ordered by image size, chips and TPU generation."""
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    lines = [
        "| px | batch | chips | TPU | mesh | remat | rows per group² | accumulation | peak / limit, GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    order = ("image_size", "devices", "topology")
    for report in sorted(found, key=lambda report: [report[name] for name in order]):
        mesh = " ".join(f"{axis}={size}" for axis, size in report["mesh"].items() if size > 1)
        lines.append(
            f"| {report['image_size']} | {report['batch_size']:,} | {report['devices']} | "
            f"{report['topology']} | {mesh} | {report['remat']} | {report['rows']} | "
            f"{report['accumulation']} | {report['peak'] / GIB:.1f} of {report['limit_bytes'] / GIB:.1f} |"
        )
    return "\n".join(lines) + "\n\n² devices along `sequence` x `tensor`, which work on the same rows."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "compile")
    parser.add_argument("--only", default="", help="Cases whose name contains this, such as v5e or 1024px.")
    parser.add_argument("--table", action="store_true", help="Print the results as a table, and stop.")
    args = parser.parse_args()
    if args.table:
        print(table(args.out))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    cases = [
        (kind, pixels, topology)
        for size in (1, 0, 2)
        for pixels in STAGES
        for kind, shapes in SLICES.items()
        for topology in [f"{kind}:{shapes[size]}"]
    ]
    for kind, pixels, topology in cases:
        chips = math.prod(int(side) for side in topology.partition(":")[2].split("x"))
        name = f"{kind}-{chips}-{pixels}px"
        path = args.out / f"{name}.json"
        if path.exists() or args.only not in name:
            continue
        refused = []
        for config in plans(from_file(f"{ROOT.parent / 'configs' / STAGES[pixels]}"), pixels, topology):
            start = time.monotonic()
            report = check(config, topology, search=False)
            print(
                f"{name}: {report['remat']} rows {report['rows']} x {report['accumulation']} "
                f"{'fits' if report['fits'] else 'does not fit'}: {report['needed'] / GIB:.2f} of "
                f"{report['limit_bytes'] / GIB:.2f} GiB, {time.monotonic() - start:.0f} s",
                flush=True,
            )
            if report["fits"]:
                path.write_text(json.dumps({**report, "refused": refused}, indent=1) + "\n")
                break
            keys = ("remat", "rows", "accumulation", "needed")
            refused.append({key: report[key] for key in keys})


if __name__ == "__main__":
    main()
