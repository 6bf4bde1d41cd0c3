"""Trains one stage.

    python -m pixart_jax.train --config=configs/stage2.py --workdir=runs/stage2

All state of a run is in its run directory. After an interruption, run the same command again: it resumes from
the newest checkpoint and computes the same bits (on GPUs with `compile.deterministic`). On several machines,
start the same command on each. The sections of `_train` are: devices, data, optimizer and shapes, weights,
compiled functions, loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import ConfigDict, config_flags

from pixart_jax import config as configs
from pixart_jax.config import TrainConfig
from pixart_jax.errors import EXIT_PREEMPTED, RunStopped
from pixart_jax.files import sha256_of_bytes
from pixart_jax.flags import CommandFlags, flag, run
from pixart_jax.training.goodput import Goodput
from pixart_jax.versions import package_versions

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from pixart_jax.training.distributed import Cluster
    from pixart_jax.training.divergence import StepRecord
    from pixart_jax.training.metrics import MetricWriter
    from pixart_jax.training.objectives import Objective
    from pixart_jax.training.state import TrainState

# Maximum number of updates in flight: enough to keep the devices busy, few enough to stop soon.
IN_FLIGHT = 2


def train(
    config: TrainConfig,
    workdir: str | Path,
    config_file: str = "CONFIG",
    cluster: Cluster | None = None,
    make_objective: Callable[[TrainConfig], Objective] | None = None,
) -> TrainState:
    """Trains `config` to its last step, starting from the newest checkpoint in `workdir` if there is one.

    Args:
      config: the stage.
      workdir: run directory, local or in a bucket; the same for all processes.
      config_file: name of the config file, for messages.
      cluster: the processes of the run; None for a single process.
      make_objective: decides what is trained and with which loss; None for the objective that
        `config.objective` names.

    Returns:
      the state after the last step.

    Raises:
      UserError: the data, the mesh, a checkpoint or the weights to start from do not match the config, the
        compute dtype is only for sampling, or another run uses `workdir`.
      RunStopped: a signal stopped the run, it diverged, or an output could not be written.
    """
    from pixart_jax.training import objectives
    from pixart_jax.training.distributed import Cluster
    from pixart_jax.weights.checkpoints import absolute

    make_objective = make_objective or objectives.make_objective
    # `held` finishes checkpoints and unlocks the run directory, also after an error.
    with contextlib.ExitStack() as held:
        return _train(config, absolute(workdir), config_file, cluster or Cluster(), make_objective, held)


def _train(config: TrainConfig, workdir: Path, config_file: str, cluster: Cluster, make_objective, held):
    # JAX is imported here, because it takes a second, which `train --help` need not wait for.
    import jax

    from pixart_jax.models.layers import activation_sharding
    from pixart_jax.training import resuming, sharding
    from pixart_jax.training.checkpoints import Checkpoints, lock_run
    from pixart_jax.training.data import check_continuation, open_held_out, open_prompts, open_training_data
    from pixart_jax.training.divergence import DivergenceGuard, StepRecord
    from pixart_jax.training.metrics import MetricWriter, check_trackers, device_memory
    from pixart_jax.training.optimizers import learning_rate_schedule, make_optimizer
    from pixart_jax.training.settings import apply_settings, say_how_a_run_resumes
    from pixart_jax.training.snapshots import Snapshots
    from pixart_jax.training.state import abstract_state, start_state
    from pixart_jax.training.step import check_trainable, device_part, jit_train_step, whole_step
    from pixart_jax.weights.checkpoints import FOLDER, read_metadata

    check_trainable(config)
    check_trackers(config.log.trackers)
    config = resuming.with_pinned_paths(config, workdir)
    say = cluster.say

    # --- Devices ------------------------------------------------------------------------------------
    apply_settings(config.compile.deterministic, say)
    if config.compile.cache:
        from pixart_jax.training.compilation import keep_compiled

        keep_compiled(config.compile.cache)
    mesh = sharding.make_mesh(config.mesh, config)
    sharding.check_batch(config, mesh)
    sharding.check_host_memory(config, mesh)
    say(f"{jax.device_count()} x {jax.devices()[0].device_kind}, mesh {dict(mesh.shape)}")
    say(f"attention: {config.model.attention_choice()}")
    say_how_a_run_resumes(config.compile.deterministic, say)
    for line in configs.without_effect(config):
        say(line)

    # --- Data ---------------------------------------------------------------------------------------
    objective = make_objective(config)
    loader, datasets = open_training_data(config, config_file, objective, mesh)
    held_out = open_held_out(config, config_file, say)
    prompts = open_prompts(config) if cluster.first else []
    say(f"{sum(len(dataset) for dataset in datasets):,} records, batches of {config.data.batch_size}")
    digest = sha256_of_bytes(configs.to_json(config).encode())[:16]
    cluster.check_agreement({"config": digest, "data": loader.fingerprint, **package_versions()})

    # --- Optimizer and shapes -----------------------------------------------------------------------
    optimizer = make_optimizer(
        config.optimizer, config.data.batch_size, objective, config.steps, config.seed, mesh
    )
    target, shardings = abstract_state(
        objective, optimizer, mesh, config.mesh.strategy, config.optimizer.on_host
    )
    say(sharding.totals(target, shardings))

    # --- Weights: newest checkpoint, else the previous stage, else random ----------------------------
    lock_run(workdir, cluster, held)
    checkpoints = held.enter_context(Checkpoints(workdir, config.checkpoint))
    first_step = step = checkpoints.latest_step() or 0
    goodput = Goodput(
        workdir,
        first_step=first_step,
        active=cluster.first,
        observe=lambda phase: cluster.progress(step, phase),
    )
    if first_step:
        check_continuation(config, read_metadata(workdir / FOLDER / str(first_step)), loader, say)
    sampled = bool(config.log.sample_every and (held_out or config.log.prompts))
    generate = None
    if sampled and cluster.first and first_step < config.steps:
        from pixart_jax.training.samples import make_sample_grid  # loads samplers and encoders

        # Before the state takes the memory of the devices, which the text encoder needs for a moment.
        generate = make_sample_grid(config, held_out, prompts, workdir, say)
    if first_step:
        state, _, _ = checkpoints.restore(first_step, target)
        say(f"continuing {workdir} at step {first_step}")
    else:
        from pixart_jax.training.initialization import initial_params  # not needed to resume

        record = functools.partial(cluster.write, workdir / "initialization.txt")
        params = initial_params(config, objective, datasets[0], say, record)
        state = start_state(params, objective, optimizer, shardings)
        del params
    if first_step >= config.steps:
        say(f"{workdir} is complete at step {first_step}")
        return state
    snapshots = Snapshots(workdir, config, first_step, cluster.first)
    cluster.write(workdir / "parameters.txt", sharding.table(target.weights(None), shardings.weights(None)))

    # --- Compiled functions -------------------------------------------------------------------------
    validate = None
    if held_out:
        from pixart_jax.training.validation import make_validation

        validate = make_validation(config, objective, mesh, held_out)
    with activation_sharding(sharding.activation_rule(mesh)):
        # One program for each part of the run: token routing and alignment end before the last step.
        programs = {
            start: jit_train_step(stage, make_objective(stage), optimizer, shardings)
            for start, stage in config.phases().items()
        }
        if config.compile.ahead:
            from pixart_jax.training.compilation import compile_ahead

            with goodput.measure("compile"):
                part, shapes = device_part(config, target), loader.shapes()
                programs = {n: compile_ahead(each, part, shapes, mesh) for n, each in programs.items()}
            say(f"compiled the steps of {len(loader.buckets)} buckets")
        programs = {n: whole_step(each, config, objective, shardings) for n, each in programs.items()}

        # --- Loop -----------------------------------------------------------------------------------
        writer = held.enter_context(
            MetricWriter(workdir, config, first_step=first_step, active=cluster.first)
        )
        cluster.write(workdir / "config.json", configs.to_json(config))
        rate = learning_rate_schedule(config.optimizer, config.data.batch_size, config.steps)
        guard = DivergenceGuard(config.divergence, workdir, cluster.gather, cluster.first, first_step)
        pending: list[StepRecord] = []
        compiled = set()
        batches = loader.iterate(first_step)
        if config.compares_samples and first_step == 0:
            with goodput.measure("evaluation"):
                _sample(generate, state, 0, mesh, writer)
        clock, clock_step = time.monotonic(), first_step
        goodput.begin()
        stop = cluster.stop_requested(0)
        while step < config.steps and not stop:
            with goodput.measure("data"):
                batch = next(batches)
            with goodput.measure("step" if batch.bucket in compiled else "compile"):
                compiled.add(batch.bucket)
                update = programs[max(start for start in programs if start <= batch.step)]
                state, metrics = update(state, sharding.global_batch(mesh, batch.arrays), batch.step)
                step = batch.step + 1
                pending.append(StepRecord(step, batch.keys, metrics))
                if len(pending) > IN_FLIGHT:
                    jax.block_until_ready(pending[-1 - IN_FLIGHT].metrics)

            last = step == config.steps
            stop = cluster.stop_requested(step - first_step) and not last
            save_now = checkpoints.due(step, config.steps) or stop
            best_now = config.checkpoint.keep_best > 0 and save_now and not stop
            validate_now = validate and (_every(config.log.validate_every, step, last) or best_now)
            sample_now = sampled and _every(config.log.sample_every, step, last)
            if snapshots.due(step):
                with goodput.measure("checkpoint"):
                    snapshots.save(state, step)  # before the checkpoint of this step
            if not (step % config.log.every == 0 or validate_now or sample_now or save_now):
                continue
            # The host fetches values only here; between these steps it hardly waits for the devices.
            with goodput.measure("step"):
                values = guard.means(pending)
                pending.clear()
            elapsed = time.monotonic() - clock
            values["learning_rate"] = float(rate(step - 1))
            values["steps_per_second"] = (step - clock_step) / elapsed
            values["images_per_second"] = values["steps_per_second"] * config.data.batch_size
            values |= device_memory()
            with goodput.measure("evaluation"):
                if validate_now:
                    values |= validate(state.weights())
                if sample_now:
                    _sample(generate, state, step, mesh, writer)
            values["seconds_left"] = goodput.seconds_left(step, config.steps)
            values |= goodput.shares()
            writer.write(step, values)
            goodput.write(step, values)
            with goodput.measure("checkpoint"):
                checkpoints.check()
                if save_now:
                    writer.sync()  # a run that resumes here does not repeat this step, nor its metrics
                    checkpoints.save(state, loader.state(step), config, values.get("validation_loss"))
                if last or stop:
                    checkpoints.wait()
            if last or stop:
                goodput.write(step, values)
            clock, clock_step = time.monotonic(), step
        writer.close()
    if step < config.steps:
        raise RunStopped(
            f"a stop was requested: {f'step {step}' if step else 'no step'} of {config.steps} is saved; run "
            "the same command again to resume",
            EXIT_PREEMPTED,
            everywhere=True,
        )
    say(f"{workdir} is complete at step {config.steps}")
    return state


def _sample(generate, state: TrainState, step: int, mesh: Mesh, writer: MetricWriter) -> None:
    """Every process takes part in gathering the weights; the first one generates the images."""
    from pixart_jax.denoiser import NETWORK
    from pixart_jax.training import distributed

    weights = state.weights()[NETWORK]
    if mesh.size > 1:  # a single device has all of them
        weights = distributed.host_copy(weights, mesh)
    if generate:
        writer.image(step, "samples", generate(weights, step))


def _every(interval: int, step: int, last: bool) -> bool:
    return interval > 0 and (step % interval == 0 or last)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags(CommandFlags):
    config: ConfigDict | None = flag(None, "Stage to train, such as configs/stage3.py:512.")
    workdir: str | None = flag(
        None,
        "Run directory, local or gs://…; resumed if it exists. Default: runs/NAME of the config.",
        path="output",
    )
    coordinator: str | None = flag(
        None,
        "HOST:PORT of process 0. Not needed on TPU pods, Slurm, Open MPI and Kubernetes, where JAX finds it.",
    )
    num_processes: int | None = flag(
        None, "Number of processes in the run; 1 for one process, whatever the environment says.", minimum=1
    )
    process_id: int | None = flag(None, "Index of this process, from 0.", minimum=0)


def main(given: Flags) -> None:
    from pixart_jax.training import distributed

    given.no_words()
    given.require("config", hint="give a stage, such as --config=configs/digits.py:stage1.")
    config = configs.from_config_dict(given.config)
    workdir = given.workdir or configs.default_workdir(config)
    config_file = config_flags.get_config_filename(flags.FLAGS["config"])
    cluster = distributed.connect(given.coordinator, given.num_processes, given.process_id, config.watchdog)
    from pixart_jax.training.supervision import supervised  # only a command is supervised

    with supervised(cluster, config.watchdog):
        train(config, workdir, config_file, cluster)


if __name__ == "__main__":
    run(main, Flags, configs.describe_fields)
