"""Compiles training steps of PixArt-Σ at 2048 and 4096 px, with and without compressed keys and values.

    pip install -e '.[tpu]'                                # or '.[cuda]' for GPUs
    JAX_PLATFORMS=cpu python benchmarks/sigma_sizes.py     # benchmarks/results/sigma/*.json, and the table
    JAX_PLATFORMS=cpu python benchmarks/sigma_sizes.py --only=h100
    JAX_PLATFORMS=cpu python benchmarks/sigma_sizes.py --table

Nothing is run: memory is what the compiler plans, and the time is estimated (`benchmarking/estimate.py`). The
stages are '2048' and '2048-kv' of configs/sigma.py; for 4096 px they have a base size of 256 tokens, the
position scale 8 and single squares, because the official code has no buckets for that size. Cases whose
result file exists are skipped, so an interrupted script can be resumed. A compilation takes three to eight
minutes on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from pixart_jax.benchmarking import compile, topology
from pixart_jax.benchmarking.topology import GIB
from pixart_jax.config import MeshConfig, TrainConfig, from_file
from pixart_jax.data.buckets import SIZES
from pixart_jax.models.attention import target_platform

ROOT = Path(__file__).resolve().parent
# The batch of the official 2K stage: 8 GPUs with 4 images each.
BATCH = 32
# Pixels, topology, accumulation and mesh; None for the mesh that the config plans.
CASES = (
    (2048, "v5e:16x16", 1, None),
    (2048, "v5p:4x4x4", 1, None),
    (2048, "h100:8", 8, MeshConfig(sequence=8)),
    # The planned mesh, fsdp=32 sequence=8, needs 18.1 GiB.
    (4096, "v5e:16x16", 2, MeshConfig(fsdp=16, sequence=16)),
    (4096, "h100:8", 32, MeshConfig(sequence=8)),
)
COMPRESSIONS = ("none", "conv")


def stage(pixels: int, parts: int, mesh: MeshConfig | None, compression: str) -> TrainConfig:
    """Returns the config of a case."""
    name = "2048" if compression == "none" else "2048-kv"
    config = from_file(f"{ROOT.parent / 'configs' / 'sigma.py'}:{name}")
    model = dataclasses.replace(config.model, base_size=pixels // 16, position_scale=pixels / 512)
    buckets = "official" if pixels in SIZES else "single"
    features = dataclasses.replace(config.features, image_size=pixels, buckets=buckets)
    return compile.with_parts(
        dataclasses.replace(config, model=model, features=features, mesh=mesh or config.mesh), BATCH, parts
    )


def table(folder: Path) -> str:
    """Returns the results as a Markdown table, with what compression saves of the case without it."""
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    head = ["px", "devices", "mesh", "micro-batches", "compression", "peak / limit, GiB"]
    head += ["TFLOP per step and device", "estimated s per step"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    plain: dict[str, Any] = {}
    for report in sorted(found, key=lambda one: (one["image_size"], one["topology"], one["compressed"])):
        mesh = " ".join(f"{axis}={size}" for axis, size in report["mesh"].items() if size > 1)
        limit = f"{report['needed'] / GIB:.1f} of {report['limit_bytes'] / GIB:.1f}"
        cells = [report["image_size"], report["topology"], mesh, report["accumulation"]]
        cells += [report["compressed"] or "–", limit if report["fits"] else f"{limit}: does not fit"]
        if not report["compressed"]:
            plain = report
        for name, unit, digits in (
            ("flops_per_step", 1e12 * report["devices"], 0),
            ("estimated_seconds", 1, 2),
        ):
            if name not in report:
                cells.append("–")
                continue
            saved = (
                f" ({report[name] / plain[name] - 1:+.0%})" if report["compressed"] and name in plain else ""
            )
            cells.append(f"{report[name] / unit:,.{digits}f}{saved}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "sigma")
    parser.add_argument("--only", default="", help="Cases whose name contains this, such as v5e or 2048px.")
    parser.add_argument("--table", action="store_true", help="Print the results as a table, and stop.")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    cases = [] if arguments.table else [(case, compression) for case in CASES for compression in COMPRESSIONS]
    for (pixels, name, parts, mesh), compression in cases:
        label = f"{name.replace(':', '-')}-{pixels}px-{compression}"
        path = arguments.out / f"{label}.json"
        if path.exists() or arguments.only not in label:
            continue
        with target_platform(topology.target(name)):
            config = stage(pixels, parts, mesh, compression)
            report = compile.check(config, name, search=False)
        compressed = "" if compression == "none" else f"{compression} in {config.model.kv_compression_layers}"
        report |= {"compressed": compressed, "versions": report["versions"] | {"jax": jax.__version__}}
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{label}: {report['needed'] / GIB:.2f} GiB, {report['compile_seconds']:.0f} s", flush=True)
    print(table(arguments.out))


if __name__ == "__main__":
    main()
