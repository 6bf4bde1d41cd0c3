"""Trains PixArt on OpenMoji with each training accelerator, all for the same FLOPs, and scores the results.

    python benchmarks/emoji_vae.py --out=demo/emoji/vae            # as `make emoji` does
    python benchmarks/accelerators/classifier.py --out=demo/accelerators/classifier
    python benchmarks/accelerators/run.py                          # all runs that are not finished
    python benchmarks/accelerators/run.py --runs=plain,repa --seeds=0
    python benchmarks/accelerators/report.py                       # the table and the figure of docs/cost.md

A run is a stage 2 of configs/emoji.py from random weights, with a constant learning rate, until it has spent
`PETAFLOP`. The FLOPs of a step are those that the compiler counts (`flops_per_step`). At each of
`EVALUATIONS` equal shares of the FLOPs the moving average of the weights generates pictures from new wordings
and of held-out combinations, which the readers of `evaluate emoji` score. Each run writes one JSON file when
it ends. Runs whose file exists are skipped; one that was killed resumes.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from pixart_jax.benchmarking.compile import lower_step
from pixart_jax.benchmarking.measuring import machine
from pixart_jax.config import TrainConfig, from_dict, from_file, to_dict
from pixart_jax.data.planning import open_images
from pixart_jax.evaluation.emoji import captions, make_generator, score
from pixart_jax.files import write_text
from pixart_jax.precompute import precompute
from pixart_jax.train import train
from pixart_jax.training import sharding
from pixart_jax.weights.checkpoints import read_weights
from pixart_jax.weights.snapshots import reconstruct

RESULTS = Path("benchmarks/results/accelerators")
# Features and run directories; not under version control.
WORK = Path("demo/accelerators")
CLASSIFIER = WORK / "classifier"
# The runs of seed 0 in `RESULTS` used other weights of the autoencoder and of the image encoder.
SEEDS = (1, 2, 3)
PETAFLOP = 0.03
EVALUATIONS = 4
# The runs train on one in four of the subjects, so that short runs learn something: 977 pictures.
ONE_IN = 4
# Pictures of each set in an evaluation. There are 64 held-out combinations, for each of which four are drawn.
CAPTIONS = 256
SETS = ("wordings", "compositions")
GUIDANCE_SCALE, SAMPLER_STEPS = 4.0, 12

# What all runs have in common, by the name of the field.
COMMON = {
    "init": {"method": "none", "path": ""},
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 100,
    # The evaluations are 300 steps apart.
    "optimizer.ema_decay": 0.99,
    "data.train": str(WORK / "features" / "train"),
    "data.validation": str(WORK / "features" / "validation"),
    "features.image_encoder": str(CLASSIFIER),
    # As in the paper's recipe, whatever configs/emoji.py has.
    "diffusion": {"timestep_density": "uniform", "min_snr_gamma": 0.0},
    "optimizer.learning_rate": 1e-3,
    "data.batch_size": 64,
    "log.every": 50,
}
# Widths of the averages that are reconstructed after the plain run.
WIDTHS = (0.05, 0.1, 0.2)
# A third of the depth, and a projector twice as wide as the network.
REPA = {
    "objective": "alignment",
    "alignment": {"block": 2, "width": 384, "target_width": 192},
}
ROUTING = {"routing": {"rate": 0.5, "first_blocks": 1, "last_blocks": 1}}
WITHOUT_REPA = {"optimizer.name": "muon", "diffusion.timestep_density": "logit_normal"}
TOGETHER = {**REPA, **WITHOUT_REPA}
# What each run changes.
RUNS: dict[str, dict[str, Any]] = {
    # It also keeps the averages from which `averages` reconstructs others. They do not change its training.
    "plain": {"optimizer.power_ema": "0.05,0.1"},
    "repa": REPA,
    "muon": {"optimizer.name": "muon"},
    "speed": {"diffusion": {"timestep_density": "speed", "change_weighting": 0.6}},
    "logit-normal": {"diffusion.timestep_density": "logit_normal"},
    "min-snr": {"diffusion.min_snr_gamma": 5.0},
    "nearest-noise": {"diffusion.noise_candidates": 4},
    "routing": ROUTING,
    "together": TOGETHER,
    "together-without-repa": WITHOUT_REPA,
    "together-min-snr": {**TOGETHER, "diffusion.min_snr_gamma": 5.0},
    "together-routing": {**TOGETHER, **ROUTING},
    # Whether another learning rate or batch size would have been a better plain recipe.
    "double-rate": {"optimizer.learning_rate": 2e-3},
    "half-rate": {"optimizer.learning_rate": 5e-4},
    "half-batch": {"data.batch_size": 32},
}


def config_of(name: str, seed: int, steps: int) -> TrainConfig:
    """Returns the config of a run."""
    values = to_dict(from_file("configs/emoji.py:stage2"))
    for field, value in {**COMMON, **RUNS[name]}.items():
        *sections, last = field.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[last] = {**place[last], **value} if isinstance(value, dict) else value
    values["features"]["token_size"] = 0
    every = max(1, -(-steps // EVALUATIONS))
    values |= {"name": f"{name}-{seed}", "seed": seed, "steps": every * EVALUATIONS}
    values["checkpoint"] |= {"every": every, "keep_every": every}
    if values["optimizer"]["power_ema"]:
        values["checkpoint"]["snapshot_every"] = max(1, every // 2)
    values["log"] |= {"validate_every": every}
    return from_dict(values)


def flops_per_step(config: TrainConfig, optimizer: str = "adamw") -> float:
    """Returns what the compiler counts for one training step, without further averages of the weights.

    By default the step has AdamW, because the FLOPs of Muon depend on the batch size: here, with 64 images of
    16 tokens, they are 40 % of a step, for XL/2 with 2,048 images of 256 tokens 1 %.
    """
    config = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, name=optimizer, muon_learning_rate=0, power_ema=""),
        checkpoint=dataclasses.replace(config.checkpoint, snapshot_every=0),
    )
    mesh = sharding.make_mesh(config.mesh, config, jax.devices()[:1])
    return float(lower_step(config, mesh).compile().cost_analysis()["flops"])


def digests() -> dict[str, str]:
    """Returns the SHA-256 of the weights of the autoencoder and of the image encoder.

    Runs can be compared if these are the same: on other machines their training gives other weights.
    """
    folders = {"autoencoder": Path(config_of("plain", 0, 1).features.vae), "image_encoder": CLASSIFIER}
    return {
        name: hashlib.sha256(next(folder.glob("*.safetensors")).read_bytes()).hexdigest()
        for name, folder in folders.items()
    }


def prepare() -> None:
    """Computes the features of all runs, unless they are there."""
    features = config_of("plain", 0, 1).features
    for split in ("train", "validation"):
        precompute(
            open_images("openmoji", "openmoji", features, {"split": split, "one_in": ONE_IN}),
            features,
            WORK / "features" / split,
        )


def evaluate(weights: Iterable[dict[str, Any]], config: TrainConfig) -> list[dict[str, Any]]:
    """Scores the pictures that each of several weights generate."""
    generate = make_generator(config, steps=SAMPLER_STEPS, scale=GUIDANCE_SCALE)
    wanted = {}
    for name in SETS:
        distinct = captions(name, CAPTIONS, one_in=ONE_IN)
        wanted[name] = (distinct * -(-CAPTIONS // len(distinct)))[:CAPTIONS]
    found = []
    for params in weights:
        found.append(
            {
                name: score([emoji for emoji, _ in pairs], generate(params, [text for _, text in pairs]))
                for name, pairs in wanted.items()
            }
        )
    return found


def run(name: str, seed: int) -> dict[str, Any]:
    """Trains and evaluates a run; returns its result."""
    flops = flops_per_step(config_of(name, seed, 1))
    config = config_of(name, seed, round(PETAFLOP * 1e15 / flops))
    workdir = WORK / f"{name}-{seed}"
    start, resumed = time.perf_counter(), workdir.exists()
    train(config, workdir)
    # The time of a run that was killed is not known.
    seconds = None if resumed else time.perf_counter() - start
    every = config.checkpoint.every
    losses = {
        line["step"]: line["validation_loss"]
        for line in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        if "validation_loss" in line
    }
    steps = range(every, config.steps + 1, every)
    curve = [
        {"step": step, "flops": step * flops, "validation_loss": losses.get(step)} | scores
        for step, scores in zip(
            steps,
            evaluate((read_weights(workdir / "checkpoints" / str(step))[0] for step in steps), config),
        )
    ]
    widths = WIDTHS if config.optimizer.power_ema else ()
    averages = [
        {"width": width} | scores
        for width, scores in zip(
            widths, evaluate((reconstruct(workdir, width)[0] for width in widths), config)
        )
    ]
    for point in curve:
        print(f"{name} {seed} {json.dumps(point)}", flush=True)
    shutil.rmtree(workdir)
    return {
        "run": name,
        "seed": seed,
        "changes": RUNS[name],
        "steps": config.steps,
        "batch_size": config.data.batch_size,
        "flops_per_step": flops,
        "flops_per_step_with_optimizer": flops_per_step(config, config.optimizer.name),
        "seconds_of_training": seconds,
        "captions": CAPTIONS,
        "guidance_scale": GUIDANCE_SCALE,
        "sampler_steps": SAMPLER_STEPS,
        "curve": curve,
        "averages": averages,
        "weights": digests(),
        "machine": machine(),
        "model": dataclasses.asdict(config.model),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", default=",".join(RUNS), help="comma-separated; default all")
    parser.add_argument(
        "--seeds", default=",".join(map(str, SEEDS)), help="comma-separated; default %(default)s"
    )
    arguments = parser.parse_args()
    names, seeds = arguments.runs.split(","), [int(seed) for seed in arguments.seeds.split(",")]
    if unknown := set(names) - set(RUNS):
        parser.error(f"--runs has {', '.join(sorted(unknown))}: choose among {', '.join(RUNS)}")
    for folder in (RESULTS, WORK):
        folder.mkdir(parents=True, exist_ok=True)
    # The runs of an option with other seeds need not compile again.
    jax.config.update("jax_compilation_cache_dir", str(WORK / "compiled"))
    prepare()
    for seed in seeds:
        for name in names:
            path = RESULTS / f"{name}-{seed}.json"
            if path.is_file():
                print(f"{path} is there")
                continue
            write_text(path, json.dumps(run(name, seed), indent=1) + "\n")


if __name__ == "__main__":
    main()
