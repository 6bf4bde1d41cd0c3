"""Writes the tables and the figure of docs/cost.md from the results of run.py.

    python benchmarks/accelerators/report.py --figure=docs/cost.png

A run's score is the mean, over new wordings and held-out combinations, of the share of pictures in which the
reader finds the concept. The factor of a run says how many times fewer FLOPs it needs than the plain run with
the same seed to reach that run's final score; its curve is interpolated linearly between evaluations. For a
run that ends below this score, the inverse is given: how many times fewer FLOPs the plain run needs to reach
the score at which it ended.

The validation losses of runs with min-SNR weights are left out, because these weights are part of them.
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
# Not in the figure.
CHECKS = ("double-rate", "half-rate", "half-batch")


def score(point: dict[str, Any]) -> float:
    """The score of an evaluation."""
    return float(np.mean([point[name]["concept"] for name in SETS]))


def curve(result: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns FLOPs and scores of the evaluations of a run, starting from (0, 0)."""
    points = result["curve"]
    return (
        np.array([0.0, *(point["flops"] for point in points)]),
        np.array([0.0, *map(score, points)]),
    )


def flops_to(result: dict[str, Any], wanted: float) -> float:
    """Returns the FLOPs at which a run first reaches a score."""
    flops, scores = curve(result)
    for i in range(1, len(flops)):
        if scores[i] >= wanted:
            share = (wanted - scores[i - 1]) / (scores[i] - scores[i - 1])
            return flops[i - 1] + share * (flops[i] - flops[i - 1])
    return float("nan")


def factor(result: dict[str, Any], plain: dict[str, Any]) -> float:
    """Returns how many times fewer FLOPs a run needs than the plain one; below 1 if it needs more."""
    wanted = curve(plain)[1][-1]
    if not np.isnan(flops := flops_to(result, wanted)):
        return curve(plain)[0][-1] / flops
    return flops_to(plain, curve(result)[1][-1]) / curve(result)[0][-1]


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

    def final(name: str) -> float:
        return np.mean([curve(result)[1][-1] for result in runs[name].values()])

    print(
        "| run | steps | GFLOP per step | new wordings | held-out combinations | score, by seed "
        "| validation loss | times fewer FLOPs, by seed |\n|---|---|---|---|---|---|---|---|"
    )
    for name in sorted(runs, key=lambda name: (name != PLAIN, -final(name))):
        seeds = runs[name]
        last = [result["curve"][-1] for result in seeds.values()]
        one = next(iter(seeds.values()))
        means = [np.mean([point[part]["concept"] for point in last]) for part in SETS]
        factors = [factor(result, runs[PLAIN][seed]) for seed, result in seeds.items() if seed in runs[PLAIN]]
        gflop = f"{one['flops_per_step'] / 1e9:.1f}"
        if (whole := one["flops_per_step_with_optimizer"]) > 1.1 * one["flops_per_step"]:
            gflop += f" ({whole / 1e9:.1f} with the optimizer)"
        weighted = "min_snr_gamma" in json.dumps(one["changes"])
        loss = "" if weighted else f"{np.mean([point['validation_loss'] for point in last]):.4f}"
        print(
            f"| {name} | {one['steps']:,} | {gflop} | {means[0]:.1%} | {means[1]:.1%} | "
            f"{', '.join(f'{score(point):.1%}' for point in last)} | "
            f"{loss} | "
            f"{', '.join(f'{value:.2f}' for value in factors) if name != PLAIN else ''} |"
        )
        if name in CHECKS:
            continue
        plt.plot(
            curve(one)[0] / 1e12,
            np.mean([curve(result)[1] for result in seeds.values()], axis=0),
            label=name,
            linewidth=2.5 if name in (PLAIN, "together") else 1.2,
        )
    print("\n| average of the plain run | " + " | ".join(f"seed {seed}" for seed in runs[PLAIN]) + " |")
    print("|---|" + "---|" * len(runs[PLAIN]))
    rows = {"moving average": [score(result["curve"][-1]) for result in runs[PLAIN].values()]}
    for result in runs[PLAIN].values():
        for average in result["averages"]:
            rows.setdefault(f"relative width {average['width']}", []).append(score(average))
    for name, scores in rows.items():
        print(f"| {name} | {' | '.join(f'{value:.1%}' for value in scores)} |")
    if arguments.figure:
        plt.xlabel("TFLOP of training")
        plt.ylabel("share of the pictures that show the concept")
        plt.legend()
        plt.savefig(arguments.figure, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
