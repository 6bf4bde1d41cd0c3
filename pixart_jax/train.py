"""Trains one stage.

    python -m pixart_jax.train --config=configs/stage2.py --workdir=runs/stage2

The run directory is the run: start the same command again after any interruption and it continues from the
newest checkpoint, to the same bits (on GPUs with `compile.deterministic`). On several machines the same
command is started on each. Sections, in order: devices, data, agreement, optimizer and shapes, weights,
compiled functions, loop.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from flax import nnx
from ml_collections import ConfigDict, config_flags
from PIL import Image

from pixart_jax import config as configs
from pixart_jax.config import TrainConfig
from pixart_jax.data.features import FeatureDataset
from pixart_jax.data.loader import FeatureLoader
from pixart_jax.encoders import make_codec
from pixart_jax.errors import EXIT_PREEMPTED, EXIT_STORAGE, RunStopped, UserError
from pixart_jax.flags import CommandFlags, flag, run
from pixart_jax.loading import read_any
from pixart_jax.models.layers import activation_sharding
from pixart_jax.models.pixart import NULL_TEXT, PixArtConfig
from pixart_jax.on_the_fly import OnTheFlyDataset
from pixart_jax.sampling import image_keys, make_sampler, picture_grid, sample_in_batches
from pixart_jax.training import distributed, sharding, stages
from pixart_jax.training.checkpoints import Checkpoints, absolute, package_versions, read_weights
from pixart_jax.training.compilation import compile_ahead, keep_compiled
from pixart_jax.training.distributed import Cluster
from pixart_jax.training.divergence import DivergenceGuard, StepRecord
from pixart_jax.training.goodput import Goodput
from pixart_jax.training.metrics import MetricWriter
from pixart_jax.training.optimizers import learning_rate_schedule, make_optimizer
from pixart_jax.training.preemption import stop_requests
from pixart_jax.training.settings import apply_settings, say_how_a_run_resumes
from pixart_jax.training.state import TrainState, abstract_model, abstract_state, init_params, new_state
from pixart_jax.training.step import check_trainable, make_train_step, without_routing
from pixart_jax.training.validation import check_features, held_out_batches, make_validation, open_dataset
from pixart_jax.training.watchdog import Watchdog

# What writing to a folder that is full, read-only or gone bad ends with.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
# Updates that may be under way on the devices: enough to hide the host, few enough to stop soon.
IN_FLIGHT = 2


def train(
    config: TrainConfig,
    workdir: str | Path,
    config_file: str = "CONFIG",
    cluster: Cluster | None = None,
) -> TrainState:
    """Runs `config` to its last step in `workdir`, continuing whatever is there.

    Args:
      config: the stage.
      workdir: run directory, local or in a bucket; the same for all processes.
      config_file: where the config came from, for messages.
      cluster: the processes that run this together; None for this one alone.

    Raises:
      UserError: data, mesh, checkpoint or the stage before do not fit, or the compute dtype is no dtype for
        training.
      RunStopped: stopped by a signal, diverged, or a checkpoint could not be written.
    """
    check_trainable(config)
    cluster = cluster or Cluster()
    say, workdir = cluster.say, absolute(workdir)

    # --- Devices ------------------------------------------------------------------------------------
    apply_settings(config.compile.deterministic, say)
    if config.compile.cache:
        keep_compiled(config.compile.cache)
    mesh = sharding.make_mesh(config.mesh, config)
    sharding.check_batch(config, mesh)
    say(f"{jax.device_count()} x {jax.devices()[0].device_kind}, mesh {dict(mesh.shape)}")
    say(f"attention: {config.model.attention_choice()}")
    say_how_a_run_resumes(config.compile.deterministic, say)

    # --- Data ---------------------------------------------------------------------------------------
    loader, datasets = open_training_data(config, config_file, mesh)
    held_out = open_data(config.data.validation, config, config_file) if config.data.validation else None
    say(f"{sum(len(dataset) for dataset in datasets):,} records, batches of {config.data.batch_size}")

    # --- Agreement of all processes -----------------------------------------------------------------
    facts = {"config": _hash(configs.to_json(config)), "data": loader.fingerprint, **package_versions()}
    cluster.check_agreement(facts)

    # --- Optimizer and shapes -----------------------------------------------------------------------
    optimizer = make_optimizer(config.optimizer, config.data.batch_size)
    graph, _ = abstract_model(config.model)
    target, shardings = abstract_state(config.model, optimizer, mesh, config.mesh.strategy)
    say(sharding.table(target.params, shardings.params))
    say(sharding.totals(target, shardings))

    # --- Weights: newest checkpoint, else the stage before, else random ------------------------------
    checkpoints = Checkpoints(workdir, config.checkpoint)
    first_step = checkpoints.latest_step() or 0
    step = first_step
    goodput = Goodput(
        workdir,
        first_step=first_step,
        active=cluster.first,
        observe=lambda phase: cluster.progress(step, phase),
    )
    if first_step:
        state, loader_state, saved = checkpoints.restore(first_step, target)
        check_continuation(config, saved, loader, loader_state)
        say(f"continuing {workdir} at step {first_step}")
    else:
        params = initial_params(config, datasets, say)
        state = jax.jit(lambda tree: new_state(tree, optimizer), out_shardings=shardings)(
            distributed.place(params, shardings.params)
        )
        del params
    if first_step >= config.steps:
        say(f"{workdir} is complete at step {first_step}")
        checkpoints.close()
        return state

    # --- Compiled functions -------------------------------------------------------------------------
    draw_pictures = held_out and cluster.first and make_pictures(config, graph, held_out, workdir)
    with activation_sharding(sharding.activation_rule(mesh)):
        # One step, or with token routing two: the finish of the stage is without.
        steps = [
            jax.jit(
                make_train_step(stage, graph, optimizer, shardings),
                donate_argnums=0,
                out_shardings=(shardings, sharding.replicated(mesh)),
            )
            for stage in dict.fromkeys((config, without_routing(config)))
        ]
        if config.compile.ahead:
            with goodput.measure("compile"):
                steps = [compile_ahead(program, target, loader.shapes(), mesh) for program in steps]
            say(f"compiled the steps of {len(loader.buckets)} buckets")
        train_step, finish_step = steps[0], steps[-1]
        validate = held_out and make_validation(config, graph, mesh, held_out)

        # --- Loop -----------------------------------------------------------------------------------
        writer = MetricWriter(workdir, first_step=first_step, total_steps=config.steps, active=cluster.first)
        rate = learning_rate_schedule(config.optimizer, config.data.batch_size)
        guard = DivergenceGuard(config.divergence, workdir, cluster.gather, cluster.first)
        pending: list[StepRecord] = []
        compiled = set()
        batches = loader.iterate(first_step)
        clock, clock_step = time.monotonic(), first_step
        goodput.begin()
        stop = cluster.stop_requested(0)
        while step < config.steps and not stop:
            with goodput.measure("data"):
                batch = next(batches)
            with goodput.measure("step" if batch.bucket in compiled else "compile"):
                compiled.add(batch.bucket)
                update = train_step if batch.step < config.steps - config.routing.finish else finish_step
                state, metrics = update(state, sharding.global_batch(mesh, batch.arrays))
                step = batch.step + 1
                pending.append(StepRecord(step, batch.keys, metrics))
                if len(pending) > IN_FLIGHT:
                    jax.block_until_ready(pending[-1 - IN_FLIGHT].metrics)

            last = step == config.steps
            stop = cluster.stop_requested(step - first_step) and not last
            save_now = checkpoints.due(step, config.steps) or stop
            best_now = config.checkpoint.keep_best > 0 and save_now and not stop
            validate_now = validate and (_every(config.log.validate_every, step, last) or best_now)
            draw_now = _every(config.log.sample_every, step, last)
            if not (step % config.log.every == 0 or validate_now or draw_now or save_now):
                continue
            # Values reach the host here alone: between these steps the devices are hardly waited for.
            with goodput.measure("step"):
                values = guard.means(pending)
                pending.clear()
            elapsed = time.monotonic() - clock
            values["learning_rate"] = float(rate(step - 1))
            values["steps_per_second"] = (step - clock_step) / elapsed
            values["images_per_second"] = values["steps_per_second"] * config.data.batch_size
            shown = {"loss": values["loss"], "img/s": values["images_per_second"]}
            with goodput.measure("evaluation"):
                if validate_now:
                    values |= validate(state.ema)
                    shown["val"] = values["validation_loss"]
                if draw_now and held_out:
                    # Every process takes part in gathering the weights; the first one draws.
                    whole = distributed.host_copy(state.ema, mesh)
                    if draw_pictures:
                        writer.image(step, "samples", draw_pictures(whole, step))
                    del whole
            with goodput.measure("checkpoint"):
                checkpoints.check()
                if save_now:
                    checkpoints.save(state, loader.state(step), config, values.get("validation_loss"))
                if last or stop:
                    checkpoints.wait()
            values |= goodput.shares()
            writer.progress(step, shown)
            writer.write(step, values)
            goodput.write(step, values)
            clock, clock_step = time.monotonic(), step
        checkpoints.close()
        writer.close()
    if step < config.steps:
        raise RunStopped(
            f"asked to stop: {f'step {step}' if step else 'no step'} of {config.steps} is saved, the same "
            "command continues",
            EXIT_PREEMPTED,
            everywhere=True,
        )
    say(f"{workdir} is complete at step {config.steps}")
    return state


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _every(interval: int, step: int, last: bool) -> bool:
    return interval > 0 and (step % interval == 0 or last)


def open_training_data(
    config: TrainConfig, config_file: str, mesh: jax.sharding.Mesh
) -> tuple[FeatureLoader, list[FeatureDataset]]:
    """The loader of this process's part of the batches over all training folders."""
    paths = [path for path in config.data.train.split(",") if path]
    if not paths:
        raise UserError("data.train is empty: give a folder that `python -m pixart_jax.precompute` made.")
    datasets = [open_data(path, config, config_file) for path in paths]
    weights = [float(weight) for weight in config.data.weights.split(",") if weight]
    if weights and len(weights) != len(datasets):
        raise UserError(f"data.weights has {len(weights)} values for {len(datasets)} folders: give one each.")
    part, parts = distributed.batch_part(mesh, config.data.batch_size)
    loader = FeatureLoader(
        datasets,
        weights or [float(len(dataset)) for dataset in datasets],
        batch_size=config.data.batch_size,
        seed=config.seed,
        text_length=config.features.text_length,
        aspect_ratio=config.guidance.aspect_ratio,
        process_index=part,
        process_count=parts,
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
            # An official file does not tell its heads, nor a diffusers folder the length of its captions.
            facts = {name: getattr(config.model, name, None) for name in ("num_heads", "text_length")}
            read = read_any(config.init.path, **facts)
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


def make_pictures(
    config: TrainConfig, graph: nnx.GraphDef, held_out: FeatureDataset, workdir: epath.Path
) -> Callable[[dict[str, Any], int], np.ndarray] | None:
    """(params on one device, step) -> a grid of pictures for held-out conditions, from fixed noise."""
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
        with activation_sharding(None):  # on one device, outside the mesh
            images = codec.decode(sample_in_batches(sample, params, keys, conditions, count))
        magnify = max(1, 64 // images.shape[1])
        grid = picture_grid(images, columns=max(1, round(count**0.5)), magnify=magnify)
        with (folder / f"{step:08d}.png").open("wb") as file:
            Image.fromarray(grid).save(file, format="PNG")
        return grid

    return draw


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags(CommandFlags):
    config: ConfigDict | None = flag(
        None, "Stage to train, such as configs/stage1.py or configs/stage3.py:512."
    )
    workdir: str | None = flag(
        None, "Run directory, local or gs://…, new or to be resumed; default: runs/NAME of the config."
    )
    coordinator: str | None = flag(
        None,
        "HOST:PORT of process 0. Not needed on TPU pods, Slurm, Open MPI and Kubernetes, where JAX finds it.",
    )
    num_processes: int | None = flag(
        None, "Number of processes in the run; 1 for a single process, whatever the environment says."
    )
    process_id: int | None = flag(None, "Index of this process, from 0.")


def main(given: Flags) -> None:
    given.no_words()
    given.require("config", hint="give a stage, such as --config=configs/digits.py:stage1.")
    config = configs.from_config_dict(given.config)
    workdir = given.workdir or f"runs/{config.name}"
    config_file = config_flags.get_config_filename(flags.FLAGS["config"])
    cluster = distributed.connect(given.coordinator, given.num_processes, given.process_id, config.watchdog)
    try:
        with Watchdog(cluster, config.watchdog), stop_requests(cluster):
            try:
                train(config, workdir, config_file, cluster)
            except OSError as error:
                if error.errno not in UNWRITABLE:
                    raise
                raise RunStopped(
                    f"run directory {workdir} cannot be written ({error}): make room or mend the folder and "
                    "start the same command again; it continues from the newest checkpoint.",
                    EXIT_STORAGE,
                ) from error
    finally:
        cluster.close()


if __name__ == "__main__":
    run(main, Flags)
