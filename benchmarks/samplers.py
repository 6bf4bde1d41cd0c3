"""Measures how fast each sampler converges to a known distribution (two Gaussians, `tests/mixture.py`).

    python benchmarks/samplers.py        # writes benchmarks/results/samplers.json and docs/samplers.png

For every sampler and number of steps, 20,000 samples are generated with the exact noise prediction in place
of a network, so that the remaining error is that of the sampler. It is reported as the mean distance to the
exact quantiles (1-Wasserstein), together with that of 20,000 exact samples, and as four moments with their
standard errors.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import mixture  # noqa: E402
import numpy as np  # noqa: E402

from pixart_jax.diffusion.samplers import SAMPLERS  # noqa: E402

STEPS = (4, 6, 10, 14, 20, 30, 50, 100, 200, 500)
# Label -> sampler, options, line style.
CURVES = {
    "dpm_solver": ("dpm_solver", {}, "C0-o"),
    "dpm_solver, linspace": ("dpm_solver", {"spacing": "linspace"}, "C0:s"),
    "dpm_solver, order 3": ("dpm_solver", {"order": 3}, "C0--^"),
    "ddim": ("ddim", {}, "C1-o"),
    "ddim, trailing": ("ddim", {"spacing": "trailing"}, "C1--^"),
    "ddim, eta 1": ("ddim", {"eta": 1.0}, "C1:s"),
    "iddpm, exact variance": ("iddpm", {}, "C2-o"),
    "iddpm, variance beta~": ("iddpm", {}, "C2:s"),
    "sa_solver": ("sa_solver", {}, "C3-o"),
    "sa_solver, tau 0": ("sa_solver", {"tau": 0.0}, "C3--^"),
    "lcm, exact consistency model": ("lcm", {}, "C4-o"),
}
# Number of independent sets of 20,000 exact samples. They give the band of distances that occur by chance.
EXACT_SETS = 200


def measure(label: str, name: str, options: dict, steps: int) -> dict[str, float]:
    model = mixture.exact_model
    if name == "lcm":
        model = mixture.consistency_model
    elif name == "iddpm":
        model = mixture.with_variance(model) if "beta" in label else mixture.exact_variance_model(steps)
    samples = mixture.draw(SAMPLERS[name], model, steps, **options)
    return {"steps": steps, "distance": mixture.distance(samples), **mixture.moments(samples)}


def exact_distances() -> list[float]:
    """Returns the 5th, 50th and 95th percentile of the distance of exact samples."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(EXACT_SETS):
        modes = rng.choice(2, size=mixture.COUNT, p=mixture.WEIGHTS)
        found.append(
            mixture.distance(np.sort(rng.normal(mixture.CENTRES[modes], mixture.WIDTH).astype(np.float32)))
        )
    return [float(value) for value in np.percentile(found, [5, 50, 95])]


def plot(report: dict, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(9.5, 4.4), layout="constrained")
    low, _, high = report["exact_samples"]
    axes.axhspan(low, high, color="0.85", label="20,000 exact samples, 90 % of sets")
    for label, rows in report["curves"].items():
        line = CURVES[label][2]
        axes.loglog(
            [row["steps"] for row in rows], [row["distance"] for row in rows], line, label=label, ms=4, lw=1.3
        )
    axes.set_xticks(STEPS, [str(steps) for steps in STEPS])
    axes.minorticks_off()
    axes.set_xlabel("steps (model calls per image)")
    axes.set_ylabel("distance to the data (1-Wasserstein)")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/samplers.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/samplers.png")
    parser.add_argument(
        "--curves", nargs="+", choices=CURVES, default=list(CURVES), help="curves to measure; others are kept"
    )
    arguments = parser.parse_args()
    known = json.loads(arguments.out.read_text())["curves"] if arguments.out.is_file() else {}
    for label in arguments.curves:
        name, options, _ = CURVES[label]
        # Consistency models are distilled on 50 steps.
        counts = [steps for steps in STEPS if name != "lcm" or steps <= 50]
        known[label] = [measure(label, name, options, steps) for steps in counts]
        print(label, " ".join(f"{row['steps']}:{row['distance']:.4f}" for row in known[label]), flush=True)
    report = {
        "samples": mixture.COUNT,
        "expected (value, standard error)": mixture.expected_moments(),
        "exact_samples": exact_distances(),
        "curves": {label: known[label] for label in CURVES if label in known},
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    plot(report, arguments.plot)


if __name__ == "__main__":
    main()
