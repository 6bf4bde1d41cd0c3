"""Measures the speed of training steps and sampling, in images and model TFLOP per second.

This module imports only jax, flax, optax, einops, numpy, ml_collections and absl, so that it runs on a bare
accelerator machine. The data loader is imported only if real shards are used.

Each time is the median over several rounds, together with the fastest and the slowest round. A round consists
of a few calls without waiting in between, as in the trainer; it ends when the devices have finished.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from pixart_jax.benchmarking.flops import forward_flops, latent_size, stage_flops
from pixart_jax.benchmarking.measuring import (
    Timing,
    compile_timed,
    datasheet_peak,
    machine,
    matrix_peak,
    measure,
    peak_memory,
)
from pixart_jax.config import TrainConfig
from pixart_jax.denoiser import Denoiser
from pixart_jax.errors import UserError
from pixart_jax.models.layers import activation_sharding
from pixart_jax.models.memory import device_shardings
from pixart_jax.models.quantization import quantize_blocks
from pixart_jax.sampling import image_keys, make_sampler, uses_guidance
from pixart_jax.training import sharding
from pixart_jax.training.batches import batch_shapes
from pixart_jax.training.compilation import keep_compiled
from pixart_jax.training.objectives import make_objective
from pixart_jax.training.optimizers import make_optimizer, update_ema
from pixart_jax.training.state import abstract_state, init_networks, new_state
from pixart_jax.training.step import device_part, jit_train_step, make_gradient


def with_batch(config: TrainConfig, batch_size: int | None) -> TrainConfig:
    """Returns the stage with another batch size, unless `batch_size` is None."""
    if batch_size is None:
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=batch_size))


def synthetic_batch(config: TrainConfig, batch_size: int, height: int, width: int) -> dict[str, np.ndarray]:
    """Makes a batch of noise with the arrays that the loader would produce.

    Args:
      config: config of the stage.
      batch_size: number of rows.
      height, width: size of the latent.
    """
    rng = np.random.default_rng(0)
    shapes = batch_shapes(config, height, width, batch_size)
    batch = {name: rng.normal(size=spec.shape).astype(spec.dtype) for name, spec in shapes.items()}
    batch["latent_std"][:] = 0.1
    batch["index"] = np.arange(batch_size, dtype=np.uint32)
    if "weight" in batch:
        batch["weight"][:] = 1
    if "label" in batch:
        batch["label"] = rng.integers(0, config.model.num_classes, batch_size).astype(np.int32)
    if "text_mask" in batch:
        tokens = batch["text_mask"].shape[1]
        batch["text_mask"] = np.arange(tokens) < rng.integers(1, tokens + 1, size=(batch_size, 1))
    if "image_size" in batch:
        batch["image_size"][:], batch["aspect_ratio"][:] = config.features.image_size, 1
    return batch


# --- Training ---------------------------------------------------------------------------------------


def benchmark_train(
    config: TrainConfig,
    *,
    height: int | None = None,
    width: int | None = None,
    rounds: int = 10,
    calls: int = 3,
    data: str = "",
    parts: bool = True,
    profile: str = "",
) -> dict[str, Any]:
    """Measures the training step of a stage.

    Args:
      config: config of the stage. `data.batch_size` is the batch of one update over all devices.
      height, width: size of the images in pixels; by default `features.image_size`.
      rounds, calls: number of timed rounds, and updates per round.
      data: folder of feature shards to train on after the synthetic batches; '' for none.
      parts: also time gradient, optimizer and moving average, each compiled as a separate program.
      profile: folder for a profile of one update; '' for none.

    Returns:
      A dict for JSON: the entries of `report`, the latent size, and the times of the parts, of the transfer
      to the devices and of the shards.

    Raises:
      UserError: if the batch size does not fit the mesh, or the image size does not fit the model.
    """
    if config.compile.cache:
        keep_compiled(config.compile.cache)
    mesh = sharding.make_mesh(config.mesh, config)
    rows = sharding.batch_shards(mesh) * config.optimizer.accumulation
    batch_size = config.data.batch_size
    if batch_size % rows:
        raise UserError(
            f"batch size {batch_size} cannot be divided among {rows} devices and micro-batches: choose a "
            f"multiple of {rows}."
        )
    flops = stage_flops(config, height, width)
    height, width = latent_size(config.features, height, width)
    objective = make_objective(config)
    optimizer = make_optimizer(config.optimizer, batch_size, objective, config.steps, config.seed, mesh)
    target, shardings = abstract_state(
        objective, optimizer, mesh, config.mesh.strategy, config.optimizer.on_host
    )
    host_batch = synthetic_batch(config, batch_size, height, width)

    with activation_sharding(sharding.activation_rule(mesh)):
        step = jit_train_step(config, objective, optimizer, shardings)
        target = device_part(config, target)
        batch = sharding.global_batch(mesh, host_batch)
        step, compilation = compile_timed(functools.partial(step.lower, target, batch))
        make_state = jax.jit(
            lambda: new_state(init_networks(objective, jax.random.key(config.seed)), objective, optimizer),
            out_shardings=shardings,
        )
        state = [jax.block_until_ready(device_part(config, make_state()))]

        def update():
            state[0], metrics = step(state[0], batch)
            return state[0], metrics

        timing = measure(update, rounds=rounds, calls=calls, profile=profile)
        memory = peak_memory(step)
        transfer = measure(lambda: sharding.global_batch(mesh, host_batch), rounds=rounds, calls=calls)
        shards = None
        if data:
            shards = _train_on_shards(config, data, mesh, step, state, host_batch, rounds * calls)
        part_timings = {}
        if parts:
            part_timings = _parts(config, objective, optimizer, shardings, state, batch, rounds, calls)
    return report(
        config,
        timing=timing,
        images=batch_size,
        flops=flops * batch_size,
        compilation=compilation,
        memory=memory,
    ) | {
        "latent": [height, width],
        "host_to_device": dataclasses.asdict(transfer),
        "parts": {name: dataclasses.asdict(value) for name, value in part_timings.items()},
        "shards": shards,
    }


def _parts(config, objective, optimizer, shardings, state, batch, rounds, calls) -> dict[str, Timing]:
    """Times gradient, optimizer and moving average, each compiled separately. Consumes `state`."""
    timings = {}
    start = state.pop()
    # The average has the sharding of gradient and moments, even if the parameters are replicated (ZeRO-1).
    moments = device_shardings(shardings.ema["ema"])
    gradient = jax.jit(make_gradient(config, objective, shardings), out_shardings=(moments, None))
    trained, frozen = start.trained, start.frozen
    timings["gradient"] = measure(lambda: gradient(trained, frozen, batch), rounds=rounds, calls=calls)
    gradients, _ = gradient(trained, frozen, batch)

    @functools.partial(
        jax.jit, donate_argnums=(0, 2), out_shardings=(shardings.trained, shardings.optimizer, None)
    )
    def apply(trained, gradients, opt_state):
        opt_state = jax.device_put(opt_state, device_shardings(shardings.optimizer))
        updates, opt_state = optimizer.update(gradients, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state, optax.tree.norm(gradients)

    carry, averages, step = [trained, start.optimizer], list(start.ema.values()), start.step
    del start

    def optimize():
        carry[0], carry[1], norm = apply(carry[0], gradients, carry[1])
        return carry, norm

    timings["optimizer"] = measure(optimize, rounds=rounds, calls=calls)
    if not averages:  # it is in host memory
        return timings
    average = jax.jit(
        lambda ema, params, step: update_ema(ema, params, config.optimizer.ema_decay, step),
        donate_argnums=0,
        out_shardings=moments,
    )

    def follow():
        averages[0] = average(averages[0], carry[0], step)
        return averages[0]

    timings["ema"] = measure(follow, rounds=rounds, calls=calls)
    return timings


def _train_on_shards(config, data, mesh, step, state, host_batch, steps) -> dict[str, Any]:
    """Trains on real records and measures the share of time that the devices wait for batches.

    The benchmark waits for the devices after each update, so they are idle while it gets the next batch. The
    share is an upper bound for the trainer, which dispatches updates ahead of the devices.
    """
    loader = _open_shards(config, data, host_batch)
    batches = iter(loader.iterate(0))
    next(batches)
    waited = moved = 0.0
    start = time.perf_counter()
    for _ in range(steps):
        mark = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - mark
        mark = time.perf_counter()
        arrays = sharding.global_batch(mesh, batch.arrays)
        moved += time.perf_counter() - mark
        state[0], metrics = step(state[0], arrays)
        jax.block_until_ready((state[0], metrics))
    seconds = time.perf_counter() - start
    # Measure the loader alone, without training.
    batches = iter(loader.iterate(steps + 1))
    next(batches)
    mark = time.perf_counter()
    for _ in range(steps):
        next(batches)
    alone = time.perf_counter() - mark
    return {
        "folder": data,
        "steps": steps,
        "seconds": seconds,
        "waiting_share": waited / seconds,
        "host_to_device_share": moved / seconds,
        "loader_alone_samples_per_second": steps * config.data.batch_size / alone,
    }


def _open_shards(config: TrainConfig, data: str, host_batch: Mapping[str, np.ndarray]):
    """Opens the loader of a folder and checks that its batches match the compiled step."""
    from pixart_jax.data.loader import FeatureLoader  # only this function needs the data libraries
    from pixart_jax.training.data import open_dataset

    loader = FeatureLoader(
        [open_dataset(data)],
        batch_size=config.data.batch_size,
        seed=config.seed,
        arrays=tuple(name for name in host_batch if name != "weight"),
        text_length=config.features.text_length,
        aspect_ratio=config.guidance.aspect_ratio,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        threads=config.data.threads,
        prefetch=config.data.prefetch,
    )
    if len(loader.buckets) > 1:
        raise UserError(
            f"--data '{data}' has {len(loader.buckets)} image sizes: pass a folder with a single size."
        )
    shapes = loader.shapes()[0]
    for name, value in host_batch.items():
        found = shapes.get(name)
        if found is None or found.shape != value.shape or found.dtype != value.dtype:
            raise UserError(
                f"--data '{data}' has {name} {found and (found.shape, str(found.dtype))}, the step needs "
                f"{(value.shape, str(value.dtype))}: pass the config that the features were made with."
            )
    return loader


# --- Sampling ---------------------------------------------------------------------------------------


def sampling_network(config: TrainConfig, weights_dtype: str) -> nnx.Module:
    """Makes the network of a stage with random weights, kept in 'float32' or 'int8'."""
    network = config.model.make(rngs=nnx.Rngs(jax.random.key(config.seed)))
    if weights_dtype == "int8":
        quantize_blocks(network)
    return network


def benchmark_sample(
    config: TrainConfig,
    *,
    height: int | None = None,
    width: int | None = None,
    sampler: str = "dpm_solver",
    steps: int = 20,
    scale: float | None = None,
    weights_dtype: str = "float32",
    rounds: int = 5,
    calls: int = 1,
    profile: str = "",
) -> dict[str, Any]:
    """Measures sampling, from text features to latents, on one device.

    Args:
      config: config of the stage. A batch has `data.batch_size` images.
      height, width: size of the images in pixels; by default `features.image_size`.
      sampler, steps, scale: see `sampling.make_sampler`.
      weights_dtype: how the weights are kept, 'float32' or 'int8' (`models/quantization.py`).
      rounds, calls: number of timed rounds, and batches per round.
      profile: folder for a profile of one batch; '' for none.

    Returns:
      A dict for JSON: the entries of `report` and the settings.
    """
    config = config.for_sampling()
    batch_size = config.data.batch_size
    height, width = latent_size(config.features, height, width)

    make = functools.partial(sampling_network, config, weights_dtype)
    denoiser = Denoiser(config, nnx.split(nnx.eval_shape(make))[0])
    sample = make_sampler(denoiser, height=height, width=width, sampler=sampler, steps=steps, scale=scale)
    host = synthetic_batch(config, batch_size, height, width)
    conditions = {name: jnp.asarray(host[name]) for name in config.model.conditions}
    params = jax.jit(lambda: nnx.to_pure_dict(nnx.state(make())))()
    keys = image_keys(np.arange(batch_size))
    sample, compilation = compile_timed(functools.partial(sample.lower, params, keys, conditions))
    timing = measure(lambda: sample(params, keys, conditions), rounds=rounds, calls=calls, profile=profile)
    scale = config.guidance.scale if scale is None else scale
    evaluations = steps * (2 if uses_guidance(scale) else 1)
    flops = forward_flops(config.model, height, width, config.features.text_length).total
    return report(
        config,
        timing=timing,
        images=batch_size,
        flops=flops * evaluations * batch_size,
        compilation=compilation,
        memory=peak_memory(sample),
        devices=1,
    ) | {
        **{"latent": [height, width], "sampler": sampler, "steps": steps, "guidance_scale": scale},
        "weights_dtype": weights_dtype,
    }


# --- Reports ----------------------------------------------------------------------------------------


def report(
    config: TrainConfig,
    *,
    timing: Timing,
    images: int,
    flops: float,
    compilation: Mapping[str, Any],
    memory: Mapping[str, Any],
    devices: int | None = None,
) -> dict[str, Any]:
    """Returns images and model TFLOP per second, their share of the peaks, and a description of the machine.

    Args:
      config: config of the stage.
      timing: time of a call.
      images, flops: images and FLOPs of a call, over all devices.
      compilation: result of `compile_timed`.
      memory: result of `peak_memory`.
      devices: number of devices that were used; by default all.
    """
    devices = devices or jax.device_count()
    measured = matrix_peak(config.model.dtype)
    rate = flops / timing.median
    stated = datasheet_peak(jax.devices()[0])
    stated = stated if config.model.dtype == "bfloat16" else None
    return {
        "config": config.name,
        "model": {
            name: getattr(config.model, name)
            for name in ("size", "depth", "hidden_size", "dtype", "remat", "scan_layers", "attention")
        },
        "batch_size": images,
        "images_per_second": images / timing.median,
        "seconds": dataclasses.asdict(timing),
        "model_tflop_per_image": flops / images / 1e12,
        "model_tflops": rate / 1e12,
        "matrix_peak_tflops": measured["flops_per_second"] * devices / 1e12,
        "matrix_peak": measured,
        "share_of_matrix_peak": rate / (measured["flops_per_second"] * devices),
        "datasheet_tflops": stated and stated * devices / 1e12,
        "share_of_datasheet": stated and rate / (stated * devices),
        "compilation": dict(compilation),
        "memory": dict(memory),
        "machine": machine(),
    }


def summary(result: Mapping[str, Any]) -> str:
    """Formats the report of a run in a few lines."""
    seconds, compilation = result["seconds"], result["compilation"]
    share = f"{result['share_of_matrix_peak']:.1%} of the {result['matrix_peak_tflops']:.4g} measured here"
    if result["share_of_datasheet"]:
        share += f", {result['share_of_datasheet']:.1%} of the datasheet's {result['datasheet_tflops']:.4g}"
    lines = [
        f"{result['images_per_second']:.4g} img/s: {result['batch_size']} images in {seconds['median']:.4g}"
        f" s ({seconds['fastest']:.4g} to {seconds['slowest']:.4g})",
        f"{result['model_tflops']:.4g} model TFLOP/s, {share}",
        f"compiled in {compilation['lowering_seconds']:.1f} + {compilation['compile_seconds']:.1f} s"
        + (" (from the cache)" if compilation["from_cache"] else ""),
    ]
    held = result["memory"]["device_peak_GiB"] or result["memory"]["process_peak_GiB"]
    lines.append(f"{held:.2f} GiB peak memory")
    lines += [f"{name} alone: {value['median']:.4g} s" for name, value in result.get("parts", {}).items()]
    if result.get("shards"):
        lines.append(f"{result['shards']['waiting_share']:.2%} of the time waiting for shards")
    return "\n".join(lines)
