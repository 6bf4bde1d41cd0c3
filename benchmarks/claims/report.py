"""Writes the results and the figure of docs/claims.md from the JSON files of run.py and cost.py.

    python benchmarks/claims/report.py

An effect is a difference between two runs with the same seed, because these were trained on the same images.
The report shows its mean, minimum and maximum over the seeds. The verdicts follow from these by the rules in
`verdict`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path("benchmarks/results/claims")
PAGE = Path("docs/claims.md")
FIGURE = Path("docs/claims.png")
BEGIN, END = "<!-- results: written by benchmarks/claims/report.py -->", "<!-- end of results -->"

SCORES = ("agreement", "colour", "shape", "number", "relation", "scene", "noun")
# Minimum number of seeds for a verdict, and the scores that the run on full captions should reach.
LEAST_SEEDS = 3
MARK = 0.9
# For claim a, scores that differ by less than this many points count as equal.
MARGIN = 2.0

Scores = dict[int, dict[str, float]]
Results = dict[str, dict[int, dict[str, Any]]]


def read_results() -> Results:
    """Reads the files of all runs: name of the run -> seed -> contents."""
    out: Results = {}
    for path in sorted(RESULTS.glob("*-[0-9]*.json")):
        result = json.loads(path.read_text())
        out.setdefault(result["run"], {})[result["seed"]] = result
    return out


def scores(results: Results, run: str, prompts: str = "test", step: int | None = None) -> Scores:
    """Returns the scores of a run on 1,000 prompts after a step (default: the last), by seed.

    Agreement is the mean of colour and shape.
    """
    out = {}
    for seed, result in results.get(run, {}).items():
        point = next(p for p in reversed(result["curve"]) if step in (None, p["step"]))
        found = point[prompts]
        out[seed] = {**found, "agreement": (found["colour"] + found["shape"]) / 2}
    return out


def effects(this: Scores, that: Scores, name: str) -> list[float]:
    """Returns the differences this − that, in points, for each seed that both have."""
    return [100 * (this[seed][name] - that[seed][name]) for seed in sorted(this.keys() & that.keys())]


def verdict(values: list[float], *, not_worse: bool = False) -> str:
    """Returns the verdict on a claim, given its effects.

    held: above 0 with every seed; or, for a claim that nothing is lost, the mean is above -`MARGIN`.
    did not hold: not above 0 with any seed; or, for a claim that nothing is lost, the mean is not above it.
    unclear: the seeds disagree.
    """
    if len(values) < LEAST_SEEDS:
        return f"open: {len(values)} of {LEAST_SEEDS} seeds"
    if not_worse:
        return "held" if np.mean(values) > -MARGIN else "did not hold"
    if min(values) > 0:
        return "held"
    return "did not hold" if max(values) <= 0 else "unclear"


def spread(values: list[float]) -> str:
    """Formats values as mean (minimum … maximum)."""
    if not values:
        return "–"
    return f"{np.mean(values):+.1f} ({min(values):+.1f} … {max(values):+.1f})"


def level(values: list[float]) -> str:
    """Formats values as mean ± standard deviation, in per cent."""
    deviation = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{deviation}"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def claims_table(results: Results) -> str:
    """Returns the table of the four claims: what was compared, the effect, the verdict."""
    single, staged = scores(results, "single"), scores(results, "staged")
    text_steps = next((result["steps"] for result in results.get("staged", {}).values()), None)
    halfway = scores(results, "single", step=text_steps) if staged else {}
    plans = [
        (
            "a. adaLN-single is as good as adaLN",
            "adaLN-single − adaLN",
            single,
            scores(results, "adaln"),
            "agreement",
        ),
        ("b. stages help", "stages − from scratch, equal compute", staged, single, "agreement"),
        ("c. dense captions help", "full − noun, equal steps", single, scores(results, "noun"), "noun"),
        ("c.", "full − attributes, equal steps", single, scores(results, "attributes"), "noun"),
        ("d. re-parameterization helps", "from DiT − random, equal steps", staged, halfway, "agreement"),
    ]
    rows = []
    for claim, compared, this, that, name in plans:
        values = effects(this, that, name)
        result = verdict(values, not_worse=claim.startswith("a"))
        rows.append([claim, compared, name, str(len(values)), spread(values), result])
    return table(["claim", "compared", "score", "seeds", "effect, points", "verdict"], rows)


def levels_table(results: Results) -> str:
    """Returns the table with the scores of all runs."""
    rows = []
    for run, found in results.items():
        for prompts in ("test", "novel", "test_full_captions"):
            if all(prompts in result["curve"][-1] for result in found.values()):
                values = scores(results, run, prompts).values()
                cells = [level([scores_of[name] for scores_of in values]) for name in SCORES]
                steps = next(iter(found.values()))["steps"]
                rows.append([run, f"{steps:,}", prompts.replace("_", " "), str(len(found)), *cells])
    return table(["run", "steps", "prompts", "seeds", *SCORES], rows)


def mark_line(results: Results) -> str:
    """Describes whether the run on full captions reached the target scores."""
    run = "longer" if "longer" in results else "single"
    found = scores(results, run)
    steps = next(iter(results[run].values()))["steps"]
    reached = {name: np.mean([one[name] for one in found.values()]) for name in ("colour", "shape")}
    words = " and ".join(f"{name} {100 * value:.1f} %" for name, value in reached.items())
    outcome = "reached" if min(reached.values()) >= MARK else "not reached"
    seeds = "seed" if len(found) == 1 else "seeds"
    return (
        f"The target of {100 * MARK:.0f} % colour and shape agreement on 1,000 unseen prompts, full captions"
        f": **{outcome}** after {steps:,} steps ({words}; {len(found)} {seeds})."
    )


def cost_table(cost: dict[str, Any]) -> str:
    """Returns the table with the costs of claim a."""
    labels = {"single": "adaLN-single", "adaln": "adaLN"}
    rows = []
    for kind, label in labels.items():
        small, large = cost[kind], cost[kind]["XL/2"]
        rows.append([f"{label}, here", f"{small['parameters']:,}", f"{small['arguments_MiB']:,.1f}",
                     f"{small['temporary_MiB']:,.1f}", f"{small['ms_per_step']:.1f}"])  # fmt: skip
        rows.append([f"{label}, XL/2", f"{large['parameters']:,}", f"{large['arguments_MiB']:,.1f}",
                     f"{large['temporary_MiB']:,.1f}", "–"])  # fmt: skip
    ratio, rounds = cost["adaln_times_single"], len(cost["single"]["all_ms_per_step"])
    low, high = ratio["quartiles"]
    columns = ["model", "parameters", "state and batch, MiB", "temporary, MiB", "ms per step"]
    return (
        f"{table(columns, rows)}\n\nA step with adaLN takes {ratio['median']:.2f} times as long as one with "
        f"adaLN-single (quartiles {low:.2f} to {high:.2f} over {rounds} alternating rounds)."
    )


def costs(results: Results) -> str:
    """Returns the costs of claim a, or the reason why there are none."""
    path, subject = RESULTS / "cost.json", "Memory and time of adaLN-single and adaLN"
    if not path.is_file():
        return f"{subject}: not measured yet (`cost.py`)."
    cost = json.loads(path.read_text())
    measured = {
        kind: (cost[kind]["parameters"], cost[kind]["flops_per_step"]) for kind in ("single", "adaln")
    }
    for kind, expected in measured.items():
        for result in results.get(kind, {}).values():
            if (result["parameters"], result["flops_per_step"]) != expected:
                return f"{subject}: measured on other models; run `cost.py` again."
    return cost_table(cost)


def figure(results: Results) -> None:
    """Plots the scores during training: the mean over the seeds, and their range."""
    _, panels = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    captions = {"single": "full", "attributes": "attributes", "noun": "noun"}
    plans = [
        ("a. adaLN", "step", "agreement", {"single": "adaLN-single", "adaln": "adaLN"}),
        ("b, d. stages", "flops", "agreement", {"single": "from scratch", "staged": "DiT, re-parameterized"}),
        ("c. captions, each sampled with its own captions", "step", "noun", captions),
    ]
    words = {"step": "steps", "flops": "training compute, FLOPs"}
    words |= {"agreement": "colour and shape agreement, %", "noun": "the first noun appears, %"}
    for axes, (title, x, y, runs) in zip(panels, plans):
        for run, label in runs.items():
            curves = [result["curve"] for result in results.get(run, {}).values()]
            if not curves:
                continue
            across = [point[x] for point in curves[0]]
            names = ("colour", "shape") if y == "agreement" else (y,)
            values = 100 * np.array([[np.mean([p[n] for n in names]) for p in curve] for curve in curves])
            (line,) = axes.plot(across, values.mean(axis=0), label=label)
            axes.fill_between(
                across, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.2
            )
        axes.set(title=title, xlabel=words[x], ylabel=words[y], ylim=(0, 100))
        axes.grid(alpha=0.3)
        axes.legend()
    plt.savefig(FIGURE, dpi=110)


def main() -> None:
    results = read_results()
    if "single" not in results:
        raise SystemExit(f"{RESULTS} holds no run of 'single': start benchmarks/claims/run.py first.")
    parts = [mark_line(results), claims_table(results), levels_table(results), costs(results)]
    figure(results)
    text = "\n\n".join(parts)
    page = PAGE.read_text()
    between = re.compile(re.escape(BEGIN) + ".*" + re.escape(END), re.DOTALL)
    PAGE.write_text(between.sub(lambda _: f"{BEGIN}\n\n{text}\n\n{END}", page))
    print(text)


if __name__ == "__main__":
    main()
