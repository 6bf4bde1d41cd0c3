"""Writes the table and the figure of the accelerators from the results of run.py.

    python benchmarks/accelerators/report.py --figure=docs/cost.png

A run's score is the mean, over new wordings and held-out combinations, of the share of pictures in which the
reader finds the concept. The factor of a run is by how much fewer FLOPs it needs to reach the final score of
the plain run with the same seed: its curve is interpolated linearly between evaluations.
"""

from __future__ import annotations

import argparse
import collections
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

RESULTS = Path("benchmarks/results/accelerators")
SETS = ("wordings", "compositions")
PLAIN = "plain"


def curve(result: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns FLOPs and scores of the evaluations of a run, starting from (0, 0)."""
    flops = [0.0, *(point["flops"] for point in result["curve"])]
    scores = [0.0, *(np.mean([point[name]["concept"] for name in SETS]) for point in result["curve"])]
    return np.array(flops), np.array(scores)


def factor(result: dict[str, Any], plain: dict[str, Any]) -> float:
    """Returns by how much fewer FLOPs a run reaches the plain run's final score; nan if it never does."""
    wanted = curve(plain)[1][-1]
    flops, scores = curve(result)
    for i in range(1, len(flops)):
        if scores[i] >= wanted:
            share = (wanted - scores[i - 1]) / (scores[i] - scores[i - 1])
            return curve(plain)[0][-1] / (flops[i - 1] + share * (flops[i] - flops[i - 1]))
    return float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--figure", type=Path, help="PNG file for the figure")
    arguments = parser.parse_args()
    runs: dict[str, dict[int, dict[str, Any]]] = collections.defaultdict(dict)
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        runs[result["run"]][result["seed"]] = result
    print("| run | seeds | steps | GFLOP per step | score | range | validation loss | FLOPs saved, factor |")
    print("|---|---|---|---|---|---|---|---|")
    for name, seeds in sorted(runs.items(), key=lambda item: item[0] != PLAIN):
        scores = [curve(result)[1][-1] for result in seeds.values()]
        losses = [result["curve"][-1]["validation_loss"] for result in seeds.values()]
        one = next(iter(seeds.values()))
        factors = [factor(result, runs[PLAIN][seed]) for seed, result in seeds.items() if seed in runs[PLAIN]]
        ends = f"{min(scores):.1%} to {max(scores):.1%}"
        saved = ", ".join("not reached" if np.isnan(value) else f"{value:.2f}" for value in factors)
        print(
            f"| {name} | {len(seeds)} | {one['steps']} | {one['flops_per_step'] / 1e9:.1f} | "
            f"{np.mean(scores):.1%} | {ends} | {np.mean(losses):.4f} | {saved} |"
        )
        flops, _ = curve(one)
        plt.plot(flops / 1e12, np.mean([curve(result)[1] for result in seeds.values()], axis=0), label=name)
    if arguments.figure:
        plt.xlabel("TFLOP of training")
        plt.ylabel("concepts found")
        plt.legend()
        plt.savefig(arguments.figure, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
