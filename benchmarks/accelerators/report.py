"""Writes the tables and the figure of docs/cost.md from the results of run.py.

    python benchmarks/accelerators/report.py --figure=docs/cost.png

A run's score is the mean, over new wordings and held-out combinations, of the share of pictures in which the
reader finds the concept. The factor of a run says how many times fewer FLOPs it needs than the plain run with
the same seed to reach that run's final score; its curve is interpolated linearly between evaluations. For a
run that ends below this score, it is the share of its FLOPs with which the plain run reaches the score at
which it ended.

The FLOPs of a step are without those of Muon's orthogonalization (see run.py). Where they matter, the table
also has both figures with them.

The validation losses of runs with min-SNR weights are left out, because these weights are part of them.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/accelerators"
SETS = ("wordings", "compositions")
PLAIN, TOGETHER = "plain", "together"
# What the page calls the runs.
LABELS = {
    "repa": "REPA",
    "muon": "Muon",
    "speed": "SpeeD, λ = 0.6",
    "logit-normal": "logit-normal timesteps",
    "min-snr": "min-SNR weights",
    "nearest-noise": "nearest of four noises",
    "routing": "token routing (TREAD), half of the tokens",
    "together": "together: REPA, Muon, logit-normal",
    "together-without-repa": "together, without REPA",
    "together-min-snr": "together, and min-SNR weights",
    "together-routing": "together, and routing",
    "double-rate": "twice the learning rate",
    "half-rate": "half the learning rate",
    "half-batch": "half the batch, twice the steps",
}
# Checks of the plain recipe. They come last in the table and are not in the figure.
CHECKS = ("double-rate", "half-rate", "half-batch")

# Results by run and seed.
Runs = dict[str, dict[int, dict[str, Any]]]


def read(folder: Path = RESULTS) -> Runs:
    """Returns the results of all runs, those of a seed that has no plain run left out."""
    runs: Runs = collections.defaultdict(dict)
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        runs[result["run"]][result["seed"]] = result
    return {
        name: {seed: result for seed, result in sorted(seeds.items()) if seed in runs[PLAIN]}
        for name, seeds in runs.items()
    }


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


def factors(runs: Runs, name: str) -> dict[int, float]:
    """Returns the factor of each seed of a run."""
    return {seed: factor(result, runs[PLAIN][seed]) for seed, result in runs[name].items()}


def ordered(runs: Runs) -> list[str]:
    """Returns the names of the runs: the plain one, the others by the mean of their factors, the checks."""
    means = {name: np.mean(list(factors(runs, name).values())) for name in runs}
    return sorted(runs, key=lambda name: (name != PLAIN, name in CHECKS, -means[name]))


def table(runs: Runs) -> str:
    """Returns the scores and factors of all runs as a Markdown table."""
    seeds = sorted(runs[PLAIN])

    def by_seed(values: dict[int, float], form: str) -> str:
        return ", ".join(format(values[seed], form) if seed in values else "–" for seed in seeds)

    every = f"seeds {', '.join(map(str, seeds))}"
    lines = [
        "| run | steps | GFLOP per step | new wordings | held-out combinations | validation loss "
        f"| score, {every} | factor: mean | factor, {every} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in ordered(runs):
        last = {seed: result["curve"][-1] for seed, result in runs[name].items()}
        one = next(iter(runs[name].values()))
        found = factors(runs, name)
        mean = np.mean(list(found.values()))
        parts = [np.mean([point[part]["concept"] for point in last.values()]) for part in SETS]
        flops, whole = one["flops_per_step"], one["flops_per_step_with_optimizer"]
        gflop, gain = f"{flops / 1e9:.1f}", f"{mean:.2f}"
        if whole > 1.1 * flops:
            gflop += f" ({whole / 1e9:.1f} with Muon's)"
            gain += f" ({mean * flops / whole:.2f} with Muon's)"
        weighted = "min_snr_gamma" in json.dumps(one["changes"])
        loss = "" if weighted else f"{np.mean([point['validation_loss'] for point in last.values()]):.4f}"
        lines.append(
            f"| {LABELS.get(name, name)} | {one['steps']:,} | {gflop} "
            f"| {parts[0]:.1%} | {parts[1]:.1%} | {loss} "
            f"| {by_seed({seed: score(point) for seed, point in last.items()}, '.1%')} "
            + ("| | |" if name == PLAIN else f"| {gain} | {by_seed(found, '.2f')} |")
        )
    return "\n".join(lines)


def averages(runs: Runs) -> str:
    """Returns the scores of the averages of the plain runs as a Markdown table."""
    plain = runs[PLAIN]
    lines = ["| average of the plain run | " + " | ".join(f"seed {seed}" for seed in plain) + " |"]
    lines.append("|---|" + "---|" * len(plain))
    rows = {"moving average": [score(result["curve"][-1]) for result in plain.values()]}
    for result in plain.values():
        for average in result["averages"]:
            rows.setdefault(f"relative width {average['width']}", []).append(score(average))
    lines += [f"| {name} | {' | '.join(f'{value:.1%}' for value in row)} |" for name, row in rows.items()]
    return "\n".join(lines)


def draw(runs: Runs, path: Path) -> None:
    """Draws the mean score of each run against its FLOPs, with the range over seeds for the main two."""
    colors = itertools.cycle(
        ["tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:olive"]
    )
    # Variations of the methods together are dashed.
    variations = itertools.cycle(["tab:red", "tab:cyan", "gold"])
    plt.figure(figsize=(7, 5))
    for name in ordered(runs):
        if name in CHECKS:
            continue
        curves = [curve(result) for result in runs[name].values()]
        flops, scores = curves[0][0] / 1e12, np.stack([scores for _, scores in curves])
        style = dict(label=LABELS.get(name, name), linewidth=1.3)
        if name in (PLAIN, TOGETHER):
            style |= dict(color="black" if name == PLAIN else "tab:red", linewidth=2.5)
            plt.fill_between(
                flops, scores.min(axis=0), scores.max(axis=0), color=style["color"], alpha=0.15, linewidth=0
            )
        elif name.startswith(TOGETHER):
            style |= dict(color=next(variations), linestyle="--")
        else:
            style |= dict(color=next(colors))
        plt.plot(flops, scores.mean(axis=0), **style)
    plt.xlabel("TFLOP of training")
    plt.ylabel("share of the pictures that show the concept")
    plt.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    plt.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--figure", type=Path, help="PNG file for the figure")
    arguments = parser.parse_args()
    runs = read()
    print(table(runs), averages(runs), sep="\n\n")
    if arguments.figure:
        draw(runs, arguments.figure)


if __name__ == "__main__":
    main()
