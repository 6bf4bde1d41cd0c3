"""Plots and tables of docs/claims.md, from the JSON files that run.py and cost.py wrote.

    python benchmarks/claims/report.py

Effects are differences within a seed, since runs of one seed met the same images; shown are their mean and
their least and greatest value.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path("benchmarks/results/claims")
FIGURE = Path("docs/claims.png")
SCORES = ("colour", "shape", "number", "relation", "scene")

Result = dict[str, Any]


def read_results() -> dict[str, dict[int, Result]]:
    """Run name to seed to result."""
    out: dict[str, dict[int, Result]] = {}
    for path in sorted(RESULTS.glob("*-[0-9]*.json")):
        result = json.loads(path.read_text())
        out.setdefault(result["run"], {})[result["seed"]] = result
    return out


def milestone(result: Result, step: int | None = None) -> Result:
    """The evaluation on all prompts after a step; the last one by default."""
    return next(point for point in reversed(result["curve"]) if step in (None, point["step"]))


def spread(values: list[float], scale: float = 100, digits: int = 1) -> str:
    """mean (least … greatest)."""
    shown = [f"{scale * value:+.{digits}f}" for value in (np.mean(values), min(values), max(values))]
    return f"{shown[0]} ({shown[1]} … {shown[2]})"


def level(values: list[float]) -> str:
    """mean ± standard deviation, in per cent."""
    deviation = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{deviation}"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def scores_table(rows: dict[str, list[dict[str, float]]], names: tuple[str, ...] = SCORES) -> str:
    """Levels of every row over its seeds."""
    body = [
        [label, str(len(found)), *(level([scores[name] for scores in found]) for name in names)]
        for label, found in rows.items()
    ]
    return table(["", "seeds", *names], body)


def effect_table(
    pairs: dict[str, tuple[dict[int, Result], dict[int, Result]]], names: tuple[str, ...] = SCORES
) -> str:
    """Differences within a seed, in points, of (this, against that)."""
    body = []
    for label, (this, that) in pairs.items():
        seeds = sorted(this.keys() & that.keys())
        cells = [spread([this[s][name] - that[s][name] for s in seeds]) for name in names]
        body.append([label, str(len(seeds)), *cells])
    return table(["effect, points", "seeds", *names], body)


def on(split: str, results: dict[int, Result], step: int | None = None) -> dict[int, dict[str, float]]:
    """Seed to scores."""
    return {seed: milestone(result, step)[split] for seed, result in results.items()}


def plot_band(axes: Any, results: dict[int, Result], x: str, y: str, label: str) -> None:
    """Mean over the seeds, and the range between them."""
    curves = [result["curve"] for result in results.values()]
    across = [point[x] for point in curves[0]]
    values = np.array([[point[y] for point in curve] for curve in curves])
    if y != "loss":
        values = 100 * values
    (line,) = axes.plot(across, values.mean(axis=0), label=label)
    axes.fill_between(across, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.2)


def figure(results: dict[str, dict[int, Result]]) -> None:
    _, panels = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    plans: list[tuple[str, str, str, dict[str, str]]] = [
        ("a. adaLN-single and adaLN", "step", "scene", {"single": "adaLN-single", "adaln": "adaLN"}),
        (
            "b, d. stages",
            "flops",
            "scene",
            {"single": "from scratch", "staged": "DiT, then re-parameterized"},
        ),
        (
            "c. captions, each asked in its own",
            "step",
            "noun",
            {"single": "full", "attributes": "attributes", "noun": "noun"},
        ),
    ]
    titles = {"scene": "whole scene as asked, %", "noun": "the caption's noun is drawn, %"}
    for axes, (title, x, y, runs) in zip(panels, plans):
        for run, label in runs.items():
            if run in results:
                plot_band(axes, results[run], x, y, label)
        axes.set(
            title=title, xlabel={"step": "steps", "flops": "training compute, FLOPs"}[x], ylabel=titles[y]
        )
        axes.set_ylim(0, 100)
        axes.grid(alpha=0.3)
        axes.legend()
    plt.savefig(FIGURE, dpi=110)


def main() -> None:
    results = read_results()
    single = results["single"]
    show: Callable[[str, str], None] = lambda title, text: print(f"\n### {title}\n\n{text}")  # noqa: E731
    rows = {f"{name}, {split}": list(on(split, found).values()) for name, found in results.items()
            for split in ("test", "novel")}  # fmt: skip
    show("Levels at the last step, own captions", scores_table(rows, (*SCORES, "noun")))
    if "adaln" in results:
        pairs = {"adaLN-single − adaLN": (on("test", single), on("test", results["adaln"]))}
        show("a", effect_table(pairs))
    if "staged" in results:
        staged = results["staged"]
        step = next(iter(staged.values()))["steps"]
        pairs = {
            "b. staged − scratch, equal compute": (on("test", staged), on("test", single)),
            "d. re-parameterized − random, equal steps": (on("test", staged), on("test", single, step)),
        }
        show("b, d", effect_table(pairs))
    dense = {
        f"full − {name}": (on("test", single), on("test", results[name]))
        for name in ("attributes", "noun")
        if name in results
    }
    show("c, own captions", effect_table(dense, (*SCORES, "noun")))
    asked = {name: list(on("test_full_captions", results[name]).values())
             for name in ("attributes", "noun") if name in results}  # fmt: skip
    show("c, asked with full captions", scores_table(asked, (*SCORES, "noun")))
    figure(results)


if __name__ == "__main__":
    main()
