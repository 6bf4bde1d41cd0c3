"""Projects the cost of the whole recipe from the configs: FLOPs of each stage, and days on one chip.

    JAX_PLATFORMS=cpu python benchmarks/projection.py --shares 0.25 0.4 0.5
    JAX_PLATFORMS=cpu python benchmarks/projection.py --recipe=fast

Days are FLOPs / (datasheet peak x share): a projection, not a measurement. The computation of the features,
which is done once, is not included.
"""

from __future__ import annotations

import argparse
import runpy

from pixart_jax.benchmarking.flops import run_flops
from pixart_jax.benchmarking.measuring import DATASHEET
from pixart_jax.config import from_config_dict

RECIPES = {
    "paper": ("stage1.py", "stage2.py", "stage3.py:256", "stage3.py:512", "stage3.py:1024"),
    "fast": ("fast.py:stage1", "fast.py:256", "fast.py:512", "fast.py:1024"),
}
CHIPS = {
    "A100": "A100",
    "H100, H200": "H200",
    "TPU v4": "TPU v4",
    "TPU v5e": "TPU v5 lite",
    "TPU v5p": "TPU v5",
    "TPU v6e": "TPU v6 lite",
}
PAPER_A100_DAYS = 753


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="paper", choices=RECIPES, help="default: paper")
    parser.add_argument("--configs", default="configs", help="folder with the configs of the stages")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.25, 0.4, 0.5], help="assumed shares of the peak"
    )
    arguments = parser.parse_args()

    total = samples = 0.0
    print("| stage | steps | batch | images | TFLOP per image | EFLOP |\n|---|---|---|---|---|---|")
    for stage in RECIPES[arguments.recipe]:
        file, _, argument = stage.partition(":")
        get_config = runpy.run_path(f"{arguments.configs}/{file}")["get_config"]
        config = from_config_dict(get_config(argument) if argument else get_config())
        images = config.steps * config.data.batch_size
        flops = run_flops(config)
        total += flops
        samples += images
        print(
            f"| {config.name} | {config.steps:,} | {config.data.batch_size:,} | {images / 1e6:,.1f}M | "
            f"{flops / images / 1e12:.3f} | {flops / 1e18:,.0f} |"
        )
    print(f"| sum | | | {samples / 1e6:,.0f}M | | {total / 1e18:,.0f} |\n")
    heads = " | ".join(f"days at {share:.0%}" for share in arguments.shares)
    print(f"| chip | peak, TFLOP/s | {heads} |\n|---|---|{'---|' * len(arguments.shares)}")
    for chip, name in CHIPS.items():
        days = (total / (DATASHEET[name] * share) / 86400 for share in arguments.shares)
        row = " | ".join(f"{value:,.0f}" for value in days)
        print(f"| {chip} | {DATASHEET[name] / 1e12:,.0f} | {row} |")
    if arguments.recipe == "paper":
        share = total / (DATASHEET["A100"] * PAPER_A100_DAYS * 86400)
        print(f"\nThe paper's {PAPER_A100_DAYS} A100-days are a share of {share:.1%}.")


if __name__ == "__main__":
    main()
