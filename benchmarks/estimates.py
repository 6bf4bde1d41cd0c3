"""Estimates the time of a training step with the width of XL/2 from compiled programs, without the chips.

    pip install -e '.[tpu]'                             # or '.[cuda]' for GPUs
    JAX_PLATFORMS=cpu python benchmarks/estimates.py    # writes benchmarks/results/estimates.json, prints it
    JAX_PLATFORMS=cpu python benchmarks/estimates.py --attention=splash --sizes 512 --topologies v5e:2x2
    JAX_PLATFORMS=cpu python benchmarks/estimates.py --table

The figures are not measured; `pixart_jax/benchmarking/estimate.py` describes how they are computed. The model
has two blocks of PixArt-XL/2 instead of 28, so that they can be compiled unrolled. Embeddings, optimizer and
moving average therefore take a larger share than in the full model. The state is sharded over the chips. A
compilation takes one to two minutes on two idle cores. Earlier results of the same case are replaced.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from pixart_jax.benchmarking import topology
from pixart_jax.benchmarking.compile import check
from pixart_jax.benchmarking.estimate import GROUPS
from pixart_jax.config import MeshConfig, TrainConfig, from_file
from pixart_jax.models.attention import target_platform
from pixart_jax.models.configs import ATTENTION_IMPLEMENTATIONS
from pixart_jax.models.layers import REMAT_POLICIES

ROOT = Path(__file__).resolve().parent
STAGES = {256: "stage2.py", 512: "stage3.py:512", 1024: "stage3.py:1024"}
# Images per chip, chosen so that the number of tokens is about the same at each image size.
ROWS = {256: 32, 512: 8, 1024: 2}
TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
# Two results belong to the same case if they agree in all of these.
KEY = ("label", "topology", "image_size", "rows", "attention", "remat", "scan", "depth")


def stage(arguments: argparse.Namespace, pixels: int, chips: int) -> TrainConfig:
    """Returns the paper's stage for an image size, with few blocks."""
    config = from_file(f"{ROOT.parent / 'configs' / STAGES[pixels]}")
    model = dataclasses.replace(
        config.model,
        size="custom",
        depth=arguments.depth,
        attention=arguments.attention,
        remat=arguments.remat,
        scan_layers=arguments.scan,
    )
    return dataclasses.replace(
        config,
        model=model,
        data=dataclasses.replace(config.data, batch_size=chips * (arguments.rows or ROWS[pixels])),
        optimizer=dataclasses.replace(config.optimizer, accumulation=1),
        mesh=MeshConfig(data=1, fsdp=-1),
    )


def measure(arguments: argparse.Namespace, pixels: int, name: str) -> dict[str, Any]:
    """Compiles one case and returns its report."""
    with target_platform(topology.target(name)):
        chips = len(topology.topology_devices(name))
        report = check(stage(arguments, pixels, chips), name, search=False)
    return {"label": arguments.label, "scan": arguments.scan, "depth": arguments.depth} | report


def table(results: list[Mapping[str, Any]]) -> str:
    """Returns the results as a Markdown table."""
    shares = [name.replace("_", " ") for name in GROUPS]
    head = ["chips", "px", "rows per chip", "blocks", "attention", "remat", "label", "estimate, ms"]
    head += ["img/s per chip", "share of peak", *shares, "peak, GiB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in results:
        blocks = f"{row['depth']}, {'scanned' if row['scan'] else 'unrolled'}"
        cells = [row["topology"], row["image_size"], row["rows"], blocks, row["attention"], row["remat"]]
        cells.append(row["label"] or "-")
        if "estimated_seconds" in row:
            seconds, groups = row["estimated_seconds"], row["estimated_seconds_by_group"]
            cells += [
                f"{seconds * 1e3:.1f}",
                f"{row['estimated_images_per_second_and_device']:,.0f}",
                f"{row['estimated_share_of_datasheet_peak']:.2f}",
                *(f"{groups.get(name, 0) / seconds:.0%}" for name in GROUPS),
            ]
        else:
            cells += ["does not fit"] + ["-"] * (len(GROUPS) + 2)
        cells.append(f"{row['needed'] / topology.GIB:.2f}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--topologies", nargs="+", default=TOPOLOGIES, help="in the syntax of `benchmark compile`"
    )
    parser.add_argument("--sizes", nargs="+", type=int, choices=STAGES, default=list(STAGES), help="pixels")
    parser.add_argument("--rows", type=int, help="images per chip; default: 32, 8 and 2 for the three sizes")
    parser.add_argument("--attention", choices=ATTENTION_IMPLEMENTATIONS, default="xla")
    parser.add_argument("--remat", choices=REMAT_POLICIES, default="none")
    parser.add_argument("--scan", action="store_true", help="scan the blocks; default unrolled")
    parser.add_argument("--depth", type=int, default=2, help="number of blocks")
    parser.add_argument(
        "--label", default="", help="distinguishes results of the same case, such as before and after"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "estimates.json")
    parser.add_argument("--table", action="store_true", help="print the results as a table, and stop")
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text()) if arguments.out.is_file() else []
    cases = (
        []
        if arguments.table
        else [(pixels, name) for pixels in arguments.sizes for name in arguments.topologies]
    )
    for pixels, name in cases:
        result = measure(arguments, pixels, name)
        result["versions"] |= {"jax": jax.__version__}
        results = [one for one in results if any(one[field] != result[field] for field in KEY)]
        results = sorted([*results, result], key=lambda one: [str(one[field]).zfill(9) for field in KEY])
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        print(table([result]).splitlines()[-1], flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
