"""Trains digits at several widths and learning rates, with and without muP: does the best rate stay the same?

    make demo                                    # or only its features: demo/features/stage2
    python benchmarks/mup_transfer.py            # about 45 minutes on two idle CPU cores
    python benchmarks/mup_transfer.py --smoke    # four short runs, to see that it works

Every run is stage 2 of the demo (configs/digits.py) from random weights, with heads of the same width. With
muP, the base width is the smallest one, so that both are nearly the same there. The table has the validation
loss after the last step of each run, the best rate of each width in bold. With muP it should be the same at
all widths. Runs that are in benchmarks/results/mup_transfer.json are not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from pixart_jax.config import (  # noqa: E402
    CheckpointConfig,
    InitConfig,
    LogConfig,
    TrainConfig,
    from_file,
)
from pixart_jax.errors import RunStopped  # noqa: E402
from pixart_jax.train import train  # noqa: E402

HEAD = 18
WIDTHS = (36, 72, 144)
# Powers of two, around the rate of the demo, 1e-3.
RATES = tuple(2.0**exponent for exponent in range(-12, -4))


def stage(arguments: argparse.Namespace, width: int, rate: float, mup: bool, seed: int) -> TrainConfig:
    """Returns the config of one run."""
    config = from_file(f"{ROOT}/configs/digits.py:stage2")
    base = min(arguments.widths) if mup else 0
    replace, data = dataclasses.replace, arguments.features
    return replace(
        config,
        steps=arguments.steps,
        seed=seed,
        model=replace(config.model, hidden_size=width, num_heads=width // HEAD, mup_base_width=base),
        data=replace(config.data, train=f"{data}/train", validation=f"{data}/test"),
        optimizer=replace(config.optimizer, learning_rate=rate, warmup_steps=arguments.steps // 10),
        init=InitConfig(),
        checkpoint=CheckpointConfig(every=arguments.steps, keep=1),
        log=LogConfig(
            every=arguments.steps,
            validate_every=arguments.steps,
            validation_samples=256,
            sample_every=0,
            tracker="none",
        ),
    )


def measure(config: TrainConfig) -> dict[str, Any]:
    """Trains and returns the validation loss, or None if the run diverges."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            train(config, folder)
            lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
            values = [json.loads(line) for line in lines]
            loss = [each["validation_loss"] for each in values if "validation_loss" in each][-1]
        except RunStopped as stopped:
            loss = None
            print(stopped, file=sys.stderr)
    return {"validation_loss": loss, "seconds": time.perf_counter() - start}


def table(runs: list[dict[str, Any]]) -> str:
    """Returns the mean losses over seeds as a Markdown table."""
    rates = sorted({run["rate"] for run in runs})
    lines = ["| | width | " + " | ".join(f"2^{math.log2(rate):.0f}" for rate in rates) + " |"]
    lines.append("|---|---|" + "---|" * len(rates))
    for mup, width in sorted({(run["mup"], run["width"]) for run in runs}):
        losses = []
        for rate in rates:
            at = [r for r in runs if (r["mup"], r["width"], r["rate"]) == (mup, width, rate)]
            found = [math.inf if r["validation_loss"] is None else r["validation_loss"] for r in at]
            losses.append(sum(found) / len(found) if found else math.nan)
        best = min((loss for loss in losses if loss == loss), default=math.nan)
        cells = ["diverged" if loss == math.inf else f"{loss:.4f}" for loss in losses]
        cells = [f"**{cell}**" if loss == best else cell for cell, loss in zip(cells, losses)]
        lines.append(f"| {'muP' if mup else 'plain'} | {width} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--widths", type=numbers, default=WIDTHS, help=f"multiples of {HEAD}")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=1, help="number of runs of each kind")
    parser.add_argument("--features", default="demo/features/stage2")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/mup_transfer.json")
    parser.add_argument("--smoke", action="store_true", help="four runs of 4 steps; writes nothing")
    arguments = parser.parse_args()
    rates = RATES
    if arguments.smoke:
        arguments.widths, arguments.steps, arguments.out, rates = (36, 72), 4, None, RATES[3:4]
    known = arguments.out is not None and arguments.out.is_file()
    runs = json.loads(arguments.out.read_text()) if known else []
    names = ("mup", "width", "rate", "seed", "steps")
    done = {tuple(run[name] for name in names) for run in runs}
    for seed in range(arguments.seeds):
        for width in arguments.widths:
            for mup in (False, True):
                for rate in rates:
                    key = (mup, width, rate, seed, arguments.steps)
                    if key in done:
                        continue
                    result = measure(stage(arguments, width, rate, mup, seed))
                    runs.append(dict(zip(names, key)) | result)
                    print(runs[-1], flush=True)
                    if arguments.out is not None:
                        arguments.out.write_text(json.dumps(runs, indent=1) + "\n")
    print(table([run for run in runs if run["steps"] == arguments.steps]))


if __name__ == "__main__":
    main()
