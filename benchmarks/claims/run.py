"""Tests the paper's claims on rendered shapes, in about 35 minutes of CPU time and without any download.

    python benchmarks/claims/run.py                   # all runs of all seeds that are not finished yet
    python benchmarks/claims/run.py --runs=noun --seeds=0,1
    python benchmarks/claims/cost.py                  # parameters, memory and speed of claim a
    python benchmarks/claims/report.py                # plots, and the tables of docs/claims.md

Each run writes one JSON file when it ends. Runs whose file exists are skipped, and a run that was killed
resumes from its last evaluation. Several processes can work at the same time, on different runs or seeds.

    single      the reference: adaLN-single, random initial weights, full captions
    adaln       the same with adaLN: one modulation layer per block                                  (claim a)
    staged      starts from a class-conditional DiT, re-parameterized; in total it takes as
                much compute as the reference                                                   (claims b, d)
    attributes  like the reference, with captions without relations                                  (claim c)
    noun        like the reference, with captions of a single noun                                   (claim c)
    longer      the reference, trained for more steps to see which scores this model reaches

The runs of one seed get the same images in the same order, and start from the same weights in all arrays that
they have in common.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from adaln import AdaLNConfig
from captions import Captions
from flax import nnx
from PIL import Image

from pixart_jax.config import (
    DataConfig,
    DiffusionConfig,
    DiTConfig,
    FeaturesConfig,
    GuidanceConfig,
    OptimizerConfig,
    PixArtConfig,
    TrainConfig,
)
from pixart_jax.data.shapes import DENSITIES, IMAGE_SIZE, SHAPES, Scene, all_scenes, draw, random_scene
from pixart_jax.denoiser import NETWORK, Denoiser
from pixart_jax.encoders.images import to_uint8
from pixart_jax.evaluation.shapes import read_scene, score_all
from pixart_jax.files import replacing, write_text
from pixart_jax.models.configs import NULL_TEXT
from pixart_jax.sampling import image_keys, make_sampler, picture_grid, sample_in_batches
from pixart_jax.training.initialization import reparameterize
from pixart_jax.training.objectives import Objective, make_objective
from pixart_jax.training.optimizers import make_optimizer
from pixart_jax.training.state import TrainState, new_state
from pixart_jax.training.step import make_train_step

RESULTS = Path("benchmarks/results/claims")
# States of unfinished runs, and the last weights of finished ones; not under version control.
WORK = Path("demo/claims")
RUNS = ("single", "staged", "adaln", "noun", "attributes", "longer")
SEEDS = (0, 1, 2)

# Steps of the reference, of the second stage of 'staged' (the first takes the remaining FLOPs), and of
# 'longer'.
STEPS = 2400
SECOND_STAGE_STEPS = 1600
LONGER_STEPS = 13600
BATCH_SIZE = 64
EVALUATE_EVERY = 400

# Number of prompts for each point of the curves and for the last evaluation, and the sampling settings.
CURVE_PROMPTS, LAST_PROMPTS = 200, 1000
SAMPLER_STEPS = 12
SAMPLER_BATCH = 200
GUIDANCE_SCALE = 2.0

# A token is a cell of the grid. This takes a third of the time per image compared with patches of 2.
BACKBONE = dict(size="custom", depth=3, hidden_size=96, num_heads=4, patch_size=4, in_channels=3)
BACKBONE |= dict(base_size=2, scan_layers=False)
CONFIGS = {"single": PixArtConfig, "adaln": AdaLNConfig, "dit": DiTConfig}


def model_config(kind: str, captions: Captions) -> PixArtConfig | DiTConfig:
    if kind == "dit":
        return DiTConfig(**BACKBONE, num_classes=len(SHAPES))
    return CONFIGS[kind](**BACKBONE, text_dim=captions.width, text_length=captions.length)


def train_config(model: PixArtConfig | DiTConfig) -> TrainConfig:
    """The values are those of configs/digits.py, except gamma and beta2, which were chosen in trials."""
    return TrainConfig(
        name="claims",
        model=model,
        features=FeaturesConfig(image_size=IMAGE_SIZE, codec="pixels", vae="", latent_scale=1.0),
        data=DataConfig(batch_size=BATCH_SIZE),
        diffusion=DiffusionConfig(condition_dropout=0.1, min_snr_gamma=0.1),
        guidance=GuidanceConfig(null_text="t5_empty", null_mask="caption", scale=GUIDANCE_SCALE),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            warmup_steps=100,
            beta2=0.99,
            eps=1e-8,
            weight_decay=0.01,
            clip_norm=1.0,
            ema_decay=0.995,
        ),
    )


# --- Data -------------------------------------------------------------------------------------------


def draw_batch(seed: int, step: int, captions: Captions, density: str) -> dict[str, np.ndarray]:
    """Returns the batch of a step. Apart from the caption density, it depends only on (seed, step)."""
    rng = np.random.default_rng([seed, step])
    scenes = [random_scene(rng) for _ in range(BATCH_SIZE)]
    pixels = np.stack([draw(scene, rng) for scene in scenes])
    text, mask = captions.features([scene.caption(density) for scene in scenes])
    # Noise, timesteps and dropout of the step depend on the index, so one compiled step works for all seeds.
    index = (seed << 28) + step * BATCH_SIZE + np.arange(BATCH_SIZE)
    return {
        "latent_mean": pixels.astype(np.float32) / 127.5 - 1,
        "latent_std": np.zeros(pixels.shape, np.float32),
        "text": text,
        "text_mask": mask,
        "label": np.array([SHAPES.index(scene.things[0].shape) for scene in scenes], np.int32),
        "index": index.astype(np.uint32),
    }


def prompts(split: str, count: int) -> list[Scene]:
    """Returns distinct scenes of a held-out split. Every run gets the same ones."""
    _, pairs = all_scenes(split)
    return [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))[:count]]


# --- Training ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Program:
    """A kind of model, compiled once for all seeds and captions.

    Attributes:
      kind: a name in `CONFIGS`.
      model: its config.
      objective: its loss.
      optimizer: its optimizer.
      step: (state, batch) -> (state, metrics), compiled.
      flops: of one step, as the compiler counts them.
      sample: (params of the network, keys, conditions) -> images in [-1, 1], compiled at its first call.
    """

    kind: str
    model: PixArtConfig | DiTConfig
    objective: Objective
    optimizer: Any
    step: Any
    flops: float
    sample: Callable[..., jax.Array]

    def random_params(self, seed: int, captions: Captions) -> dict[str, Any]:
        """Returns the initial weights."""
        model = self.model
        params = jax.jit(lambda: nnx.to_pure_dict(nnx.state(model.make(rngs=nnx.Rngs(seed)))))()
        if NULL_TEXT in params:
            params[NULL_TEXT] = jnp.asarray(captions.null)
        return {NETWORK: params}


def compile_program(kind: str, captions: Captions) -> Program:
    """Compiles the training step of a kind of model."""
    config = train_config(model_config(kind, captions))
    objective = make_objective(config)
    optimizer = make_optimizer(config.optimizer, BATCH_SIZE)
    sample = make_sampler(Denoiser.of(config), height=IMAGE_SIZE, width=IMAGE_SIZE, steps=SAMPLER_STEPS)
    program = Program(kind, config.model, objective, optimizer, None, 0.0, sample)
    state = jax.eval_shape(lambda: new_state(program.random_params(0, captions), objective, optimizer))
    batch = jax.eval_shape(lambda: draw_batch(0, 0, captions, "full"))
    step = (
        jax.jit(make_train_step(config, objective, optimizer), donate_argnums=0).lower(state, batch).compile()
    )
    return dataclasses.replace(program, step=step, flops=step.cost_analysis()["flops"])


def train(
    program: Program,
    params: dict[str, Any],
    batch_of: Callable[[int], dict[str, np.ndarray]],
    steps: int,
    saved: Path,
    look: Callable[[int, TrainState, float], dict[str, Any]],
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Trains for `steps` steps, or resumes from a saved state.

    Args:
      program: the model.
      params: weights of step 0.
      batch_of: step, from 0 -> batch.
      steps: number of updates.
      saved: file to which the state is saved after every evaluation.
      look: the evaluation, (step, state, mean loss since the last evaluation) -> entry of the curve; called
        every `EVALUATE_EVERY` steps.

    Returns:
      the last state, and all entries of the curve.
    """
    state = jax.jit(lambda tree: new_state(tree, program.objective, program.optimizer))(params)
    notes = []
    if saved.is_file():
        with np.load(saved) as file:
            leaves = [jnp.asarray(file[str(i)]) for i in range(len(jax.tree.leaves(state)))]
            notes = json.loads(str(file["notes"]))
        state = jax.tree.unflatten(jax.tree.structure(state), leaves)
    losses = []
    for step in range(int(state.step), steps):
        state, metrics = program.step(state, batch_of(step))
        losses.append(metrics["loss"])
        if (step + 1) % EVALUATE_EVERY == 0 or step + 1 == steps:
            loss = float(np.mean(jax.device_get(losses)))
            if not np.isfinite(loss):
                raise FloatingPointError(f"loss is {loss} before step {step + 1}")
            losses.clear()
            notes.append(look(step + 1, state, loss))
            with replacing(saved) as temporary, temporary.open("wb") as file:
                leaves = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
                np.savez(file, notes=json.dumps(notes), **leaves)
    return state, notes


# --- Evaluation -------------------------------------------------------------------------------------


def generate(program: Program, params: dict[str, Any], captions: Captions, texts: list[str]) -> np.ndarray:
    """Generates an image for every caption, image i from seed i; uint8 [n, 8, 8, 3]."""
    text, mask = captions.features(texts)
    conditions = {"text": jnp.asarray(text), "text_mask": jnp.asarray(mask)}
    keys = image_keys(np.arange(len(texts)))
    return to_uint8(sample_in_batches(program.sample, params, keys, conditions, SAMPLER_BATCH))


def evaluate(
    program: Program, params: dict[str, Any], captions: Captions, density: str, scenes: Sequence[Scene]
) -> dict[str, float]:
    """Generates an image for each scene from its caption of the given density, and returns the scores.

    Every score compares the image with the whole scene, even if the caption describes only a part of it.
    `noun` only checks whether the first noun of the caption is in the image, because captions of every
    density have it.
    """
    images = generate(program, params, captions, [scene.caption(density) for scene in scenes])
    nouns = [
        scene.things[0].shape in {found.shape for found in read_scene(image)}
        for scene, image in zip(scenes, images)
    ]
    return {**score_all(scenes, images), "noun": float(np.mean(nouns))}


# --- Runs -------------------------------------------------------------------------------------------


def run(name: str, seed: int, programs: Callable[[str], Program], captions: Captions) -> dict[str, Any]:
    """Trains and evaluates one run; returns the contents of its JSON file."""
    program = programs("adaln" if name == "adaln" else "single")
    density = name if name in DENSITIES else "full"
    params = program.random_params(seed, captions)
    steps, first_stage = STEPS, {"steps": 0, "flops": 0.0, "losses": []}
    saved = WORK / f"{name}-{seed}.npz"
    if name == "longer":
        steps, reference = LONGER_STEPS, WORK / f"single-{seed}.npz"
        if reference.is_file() and not saved.is_file():
            shutil.copyfile(reference, saved)
    clock, cpu = time.perf_counter(), time.process_time()

    if name == "staged":
        dit = programs("dit")
        steps = SECOND_STAGE_STEPS
        count = round((STEPS - SECOND_STAGE_STEPS) * program.flops / dit.flops)
        # Stage 1 trains on images that the second stage does not get, with their nouns as classes.
        before, losses = train(
            dit,
            dit.random_params(seed, captions),
            lambda step: draw_batch(seed, STEPS + step, captions, "noun"),
            count,
            WORK / f"stage1-{seed}.npz",
            lambda step, state, loss: {"step": step, "loss": loss},
        )
        first_stage = {"steps": count, "flops": count * dit.flops, "losses": losses}
        params, _ = reparameterize(before.weights()[NETWORK], dit.model, params[NETWORK], program.model)
        params = {NETWORK: params}

    def look(step: int, state: TrainState, loss: float) -> dict[str, Any]:
        def measure(density: str, split: str, count: int) -> dict[str, float]:
            return evaluate(program, state.weights()[NETWORK], captions, density, prompts(split, count))

        seconds = {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - cpu}
        note = {"step": step, "flops": first_stage["flops"] + step * program.flops, "loss": loss, **seconds}
        note |= measure(density, "test", CURVE_PROMPTS)
        # For claim d the reference is also evaluated after the steps of the second stage.
        if step == steps or (name == "single" and step == SECOND_STAGE_STEPS):
            note["test"] = measure(density, "test", LAST_PROMPTS)
            note["novel"] = measure(density, "novel", LAST_PROMPTS)
            if density != "full":
                note["test_full_captions"] = measure("full", "test", LAST_PROMPTS)
        print(f"{name} {seed} {json.dumps(note)}", flush=True)
        return note

    state, curve = train(
        program, params, lambda step: draw_batch(seed, step, captions, density), steps, saved, look
    )
    texts = [scene.caption(density) for scene in prompts("test", 64)]
    pictures = generate(program, state.weights()[NETWORK], captions, texts)
    Image.fromarray(picture_grid(pictures, columns=16, magnify=6)).save(RESULTS / f"{name}-{seed}.png")
    return {
        "run": name,
        "seed": seed,
        "captions": density,
        "steps": steps,
        "batch_size": BATCH_SIZE,
        "flops_per_step": program.flops,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "first_stage": first_stage,
        "curve": curve,
        "prompts": {"curve": CURVE_PROMPTS, "test": LAST_PROMPTS},
        "sampler": {
            "name": "dpm_solver",
            "steps": SAMPLER_STEPS,
            "guidance": GUIDANCE_SCALE,
            "weights": "ema",
        },
        "machine": {"cpus": os.cpu_count(), "machine": platform.machine(), "jax": jax.__version__},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", default=",".join(RUNS), help="comma-separated; default all")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="comma-separated; default 0,1,2")
    arguments = parser.parse_args()
    names, seeds = arguments.runs.split(","), [int(seed) for seed in arguments.seeds.split(",")]
    if unknown := set(names) - set(RUNS):
        parser.error(f"--runs has {', '.join(sorted(unknown))}: choose among {', '.join(RUNS)}")

    for folder in (RESULTS, WORK):
        folder.mkdir(parents=True, exist_ok=True)
    captions = Captions()
    programs = functools.cache(lambda kind: compile_program(kind, captions))
    for seed in seeds:
        for name in names:
            path = RESULTS / f"{name}-{seed}.json"
            if path.is_file():
                print(f"{path} is there")
                continue
            result = run(name, seed, programs, captions)
            write_text(path, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
