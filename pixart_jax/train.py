"""Trains one stage.

    python -m pixart_jax.train --config=configs/stage2.py --workdir=runs/stage2

The run directory is the run: start the same command again after any interruption and it continues from the
newest checkpoint, to the same bits. Sections, in order: devices, data, optimizer and shapes, weights,
compiled functions, loop.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from ml_collections import config_flags
from PIL import Image

from pixart_jax import config as configs
from pixart_jax.config import TrainConfig
from pixart_jax.data.features import FeatureDataset
from pixart_jax.data.loader import FeatureLoader
from pixart_jax.encoders import make_codec
from pixart_jax.errors import UserError, run_command
from pixart_jax.loading import read_any
from pixart_jax.models.layers import activation_sharding
from pixart_jax.models.pixart import NULL_TEXT, PixArtConfig
from pixart_jax.on_the_fly import OnTheFlyDataset
from pixart_jax.sampling import image_keys, make_sampler, picture_grid, sample_in_batches
from pixart_jax.training import sharding, stages
from pixart_jax.training.checkpoints import Checkpoints, read_weights
from pixart_jax.training.compilation import compile_ahead, keep_compiled
from pixart_jax.training.metrics import MetricWriter
from pixart_jax.training.optimizers import learning_rate_schedule, make_optimizer
from pixart_jax.training.state import TrainState, abstract_model, abstract_state, init_params, new_state
from pixart_jax.training.step import make_train_step
from pixart_jax.training.validation import check_features, held_out_batches, make_validation, open_dataset


def train(config: TrainConfig, workdir: Path, config_file: str = "CONFIG") -> TrainState:
    """Runs `config` to its last step in `workdir`, continuing whatever is there.

    `config_file` is where the config came from, for messages.

    Raises:
      UserError: data, mesh, checkpoint or the stage before do not fit.
      FloatingPointError: the loss is no longer finite; the message names the step.
    """
    say = print if jax.process_index() == 0 else lambda *_: None

    # --- Devices ------------------------------------------------------------------------------------
    if config.compile.cache:
        keep_compiled(config.compile.cache)
    mesh = sharding.make_mesh(config.mesh)
    rows = sharding.batch_shards(mesh) * config.optimizer.accumulation
    if config.data.batch_size % rows:
        raise UserError(
            f"data.batch_size {config.data.batch_size} does not divide over {sharding.batch_shards(mesh)} "
            f"devices x {config.optimizer.accumulation} micro-batches: choose a multiple of {rows}."
        )
    say(f"{jax.device_count()} x {jax.devices()[0].device_kind}, mesh {dict(mesh.shape)}")

    # --- Data ---------------------------------------------------------------------------------------
    loader, datasets = open_training_data(config, config_file)
    held_out = open_data(config.data.validation, config, config_file) if config.data.validation else None
    say(f"{sum(len(dataset) for dataset in datasets):,} records, batches of {config.data.batch_size}")

    # --- Optimizer and shapes -----------------------------------------------------------------------
    optimizer = make_optimizer(config.optimizer, config.data.batch_size)
    graph, _ = abstract_model(config.model)
    target, shardings = abstract_state(config.model, optimizer, mesh)
    trained = sum(leaf.size for leaf in jax.tree.leaves(target.params))
    say(sharding.table(target.params, shardings.params))
    held = sharding.bytes_per_device(target, shardings) / 2**20
    say(f"{trained:,} parameters, {held:,.1f} MiB of state a device")

    # --- Weights: newest checkpoint, else the stage before, else random ------------------------------
    checkpoints = Checkpoints(workdir, config.checkpoint)
    first_step = checkpoints.latest_step()
    if first_step is not None:
        state, loader_state, saved = checkpoints.restore(first_step, target)
        check_continuation(config, saved, loader, loader_state)
        say(f"continuing {workdir} at step {first_step}")
    else:
        first_step = 0
        params = initial_params(config, datasets, say)
        state = jax.jit(lambda tree: new_state(tree, optimizer), out_shardings=shardings)(
            jax.device_put(params, shardings.params)
        )
        del params
    if first_step >= config.steps:
        say(f"{workdir} is complete at step {first_step}")
        checkpoints.close()
        return state

    # --- Compiled functions -------------------------------------------------------------------------
    with activation_sharding(sharding.activation_rule(mesh)):
        train_step = jax.jit(
            make_train_step(config, graph, optimizer),
            donate_argnums=0,
            out_shardings=(shardings, sharding.replicated(mesh)),
        )
        if config.compile.ahead:
            train_step = compile_ahead(train_step, target, loader.shapes(), mesh)
            say(f"compiled the steps of {len(loader.buckets)} buckets")
        validate = held_out and make_validation(config, graph, mesh, held_out)
        draw_pictures = held_out and make_pictures(config, graph, mesh, held_out, workdir)

        # --- Loop -----------------------------------------------------------------------------------
        writer = MetricWriter(
            workdir, first_step=first_step, total_steps=config.steps, active=jax.process_index() == 0
        )
        rate = learning_rate_schedule(config.optimizer, config.data.batch_size)
        pending: list[tuple[int, dict[str, jax.Array]]] = []
        clock, clock_step = time.monotonic(), first_step
        for batch in loader.iterate(first_step):
            state, metrics = train_step(state, sharding.global_batch(mesh, batch.arrays))
            step = batch.step + 1
            pending.append((step, metrics))

            last = step == config.steps
            validate_now = validate and _every(config.log.validate_every, step, last)
            draw_now = draw_pictures and _every(config.log.sample_every, step, last)
            save_now = checkpoints.due(step, config.steps)
            if step % config.log.every == 0 or validate_now or draw_now or save_now:
                # Values reach the host here alone: between these steps the devices are never waited for.
                values = finite_means(pending)
                pending.clear()
                elapsed = time.monotonic() - clock
                values["learning_rate"] = float(rate(step - 1))
                values["steps_per_second"] = (step - clock_step) / elapsed
                values["images_per_second"] = values["steps_per_second"] * config.data.batch_size
                shown = {"loss": values["loss"], "img/s": values["images_per_second"]}
                if validate_now:
                    values |= validate(state.ema)
                    shown["val"] = values["validation_loss"]
                writer.progress(step, shown)
                writer.write(step, values)
                if draw_now:
                    writer.image(step, "samples", draw_pictures(state.ema, step))
                if save_now:
                    checkpoints.save(state, loader.state(step), config)
                clock, clock_step = time.monotonic(), step
            if last:
                break
        checkpoints.wait()
        checkpoints.close()
        writer.close()
    say(f"{workdir} is complete at step {config.steps}")
    return state


def _every(interval: int, step: int, last: bool) -> bool:
    return interval > 0 and (step % interval == 0 or last)


def open_training_data(config: TrainConfig, config_file: str) -> tuple[FeatureLoader, list[FeatureDataset]]:
    """The loader of this process over all training folders."""
    paths = [path for path in config.data.train.split(",") if path]
    if not paths:
        raise UserError("data.train is empty: give a folder that `python -m pixart_jax.precompute` made.")
    datasets = [open_data(path, config, config_file) for path in paths]
    weights = [float(weight) for weight in config.data.weights.split(",") if weight]
    if weights and len(weights) != len(datasets):
        raise UserError(f"data.weights has {len(weights)} values for {len(datasets)} folders: give one each.")
    loader = FeatureLoader(
        datasets,
        weights or [float(len(dataset)) for dataset in datasets],
        batch_size=config.data.batch_size,
        seed=config.seed,
        text_length=config.features.text_length,
        aspect_ratio=config.guidance.aspect_ratio,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        threads=config.data.threads,
        prefetch=config.data.prefetch,
        text=isinstance(config.model, PixArtConfig),
    )
    return loader, datasets


def open_data(path: str, config: TrainConfig, config_file: str) -> FeatureDataset:
    """Features, or images that are encoded in the loop, as the config needs them."""
    if config.data.on_the_fly:
        say = print if jax.process_index() == 0 else lambda _: None
        dataset = OnTheFlyDataset(path, config.features, say=say)
    else:
        dataset = open_dataset(path, config_file)
    check_features(config, dataset)
    return dataset


def check_continuation(
    config: TrainConfig, saved: TrainConfig, loader: FeatureLoader, loader_state: dict[str, Any]
) -> None:
    """A checkpoint continues only the run it came from: same model, seed, batch and data."""
    for name, now, then in (
        ("seed", config.seed, saved.seed),
        ("data.batch_size", config.data.batch_size, saved.data.batch_size),
        ("data (fingerprint)", loader.fingerprint, loader_state["fingerprint"]),
    ):
        if now != then:
            raise UserError(
                f"{name} is {now}, the checkpoint has {then}: it would not continue the same run. Restore "
                "the value or start another --workdir."
            )


def initial_params(
    config: TrainConfig, datasets: list[FeatureDataset], say: Callable[[str], None]
) -> dict[str, Any]:
    """The weights of step 0: random, or handed over from the stage before."""
    params = jax.jit(lambda: init_params(config.model, config.seed))()
    if config.init.handover == "none":
        say("a fresh start: random weights")
    else:
        if config.init.handover == "weights":
            read = read_any(config.init.path)
            old, before = read.params, read.config
            for note in read.notes:
                say(note)
        else:
            old, before = read_weights(config.init.path)
        # Weights of any kind fit a model of the same shape, at any size of images.
        hand_over = stages.reparameterize if config.init.handover == "reparameterize" else stages.resize
        params, report = hand_over(old, before.model, params, config.model)
        say(f"{config.init.handover} from {config.init.path}:\n{report}")
    if isinstance(config.model, PixArtConfig) and config.guidance.null_text == "t5_empty":
        null = datasets[0].null_text()
        if null.shape != params[NULL_TEXT].shape:
            raise UserError(
                f"the null caption of {config.data.train} is {null.shape}, the model takes "
                f"{params[NULL_TEXT].shape}: precompute with the same features.text_length and encoder."
            )
        params[NULL_TEXT] = jnp.asarray(null, jnp.float32)
    return params


def finite_means(pending: list[tuple[int, dict[str, jax.Array]]]) -> dict[str, float]:
    """Means over the steps since the last line; raises on the first step whose loss is not finite."""
    fetched = jax.device_get([metrics for _, metrics in pending])
    for (step, _), metrics in zip(pending, fetched):
        if not np.isfinite(metrics["loss"]):
            raise FloatingPointError(
                f"loss is {metrics['loss']} at step {step}; the last checkpoint before it is intact"
            )
    return {name: float(np.mean([metrics[name] for metrics in fetched])) for name in fetched[0]}


def make_pictures(
    config: TrainConfig,
    graph: nnx.GraphDef,
    mesh: jax.sharding.Mesh,
    held_out: FeatureDataset,
    workdir: Path,
) -> Callable[[dict[str, Any], int], np.ndarray]:
    """(params, step) -> a grid of pictures for the first held-out conditions, from fixed noise."""
    if not config.log.sample_every:
        return None
    codec = make_codec(config.features)
    first = next(iter(held_out_batches(config, held_out))).arrays
    count = min(config.log.samples, len(first["index"]))
    names = ("text", "text_mask", "image_size", "aspect_ratio", "label")
    conditions = {name: jnp.asarray(first[name][:count]) for name in names if name in first}
    height, width = first["latent_mean"].shape[1:3]
    sample = make_sampler(config, graph, height=height, width=width, steps=config.log.sample_steps)
    keys = image_keys(np.arange(count))
    folder = workdir / "samples"
    folder.mkdir(parents=True, exist_ok=True)

    def draw(params: dict[str, Any], step: int) -> np.ndarray:
        params = jax.device_put(params, sharding.replicated(mesh))
        images = codec.decode(sample_in_batches(sample, params, keys, conditions, count))
        magnify = max(1, 64 // images.shape[1])
        grid = picture_grid(images, columns=max(1, round(count**0.5)), magnify=magnify)
        if jax.process_index() == 0:
            Image.fromarray(grid).save(folder / f"{step:08d}.png")
        return grid

    return draw


def define_flags() -> dict[str, flags.FlagHolder]:
    """The flags of the command. Not at import: other commands have flags of the same names."""
    return {
        "config": config_flags.DEFINE_config_file(
            "config", None, "Stage to train, such as configs/stage1.py or configs/stage3.py:512."
        ),
        "workdir": flags.DEFINE_string(
            "workdir", None, "Run directory, new or to be continued; default runs/NAME of the config."
        ),
    }


def main(holders: dict[str, flags.FlagHolder], argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"argument '{argv[1]}' is not a flag: see --help.")
    if holders["config"].value is None:
        raise UserError("--config is missing: give a stage, such as --config=configs/digits.py:stage1.")
    config = configs.from_config_dict(holders["config"].value)
    workdir = Path(holders["workdir"].value or f"runs/{config.name}")
    train(config, workdir, config_flags.get_config_filename(flags.FLAGS["config"]))


if __name__ == "__main__":
    run_command(functools.partial(main, define_flags()))
