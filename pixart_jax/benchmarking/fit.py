"""Finds out which batch, rematerialization, precision and rank of adapters fit on a GPU, for one device.

The memory of the training state is exact. That of activations is estimated (`models/activations.py`), so the
answer takes seconds on any machine. With a topology, the best plan is also compiled for it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from pixart_jax.benchmarking import compile
from pixart_jax.benchmarking.throughput import sampling_network
from pixart_jax.benchmarking.topology import GIB, topology_devices
from pixart_jax.config import MeshConfig, TrainConfig
from pixart_jax.constants import LARGEST_BATCH
from pixart_jax.denoiser import NETWORK
from pixart_jax.errors import UserError
from pixart_jax.models.activations import (
    decoding_bytes,
    encoding_bytes,
    generation_peak,
    projector_bytes,
    sampling_bytes,
    training_bytes,
    working_bytes,
)
from pixart_jax.models.configs import TEXT_WEIGHTS_DTYPES, WEIGHTS_DTYPES
from pixart_jax.models.t5 import T5Config, abstract_t5
from pixart_jax.models.vae import VAEConfig, abstract_vae
from pixart_jax.training import sharding
from pixart_jax.training.batches import batch_shapes
from pixart_jax.training.objectives import make_objective
from pixart_jax.training.optimizers import make_optimizer
from pixart_jax.training.settings import MEMORY_FRACTION
from pixart_jax.training.state import abstract_state

# Rematerialization, fastest first (docs/performance.md, section 5).
REMATS = ("none", "dots", "full")
# With fewer tokens in a micro-batch, a GPU is not busy.
ENOUGH_TOKENS = 4096
RANKS = (4, 8, 16, 32, 64, 128, 256, 512)


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a training run keeps on a device, in bytes.

    Attributes:
      frozen: the frozen parameters.
      trained: the trained parameters, and so the size of their gradient.
      rest: averages and optimizer state on the device.
      fetched: optimizer state that is in host memory between updates.
      average: an average that is in host memory, and is copied to the device to generate images.
      ranks: sum of the ranks of the adapters in a block.
    """

    frozen: int
    trained: int
    rest: int
    fetched: int
    average: int
    ranks: int

    @property
    def state(self) -> int:
        return self.frozen + self.trained + self.rest

    @classmethod
    @functools.lru_cache(maxsize=32)  # several devices are asked about the same stage
    def of(cls, config: TrainConfig) -> Memory:
        """Returns the memory of the training state of a stage on a single device."""
        objective = make_objective(config)
        optimizer = make_optimizer(
            config.optimizer, config.data.batch_size, objective, config.steps, config.seed
        )
        mesh = sharding.make_mesh(MeshConfig(data=1), devices=jax.local_devices()[:1])
        state, _ = abstract_state(objective, optimizer, mesh)
        on_host = {name: _bytes(getattr(state, name)) for name in config.optimizer.on_host}
        frozen, trained = _bytes(state.frozen), _bytes(state.trained)
        ranks = 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.trained[NETWORK]):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            if name.startswith("blocks.") and name.endswith(".adapter.down"):
                ranks += math.prod(leaf.shape[-2:])
        return cls(
            frozen=frozen,
            trained=trained,
            rest=_bytes(state) - frozen - trained - sum(on_host.values()),
            fetched=on_host.get("optimizer", 0),
            average=on_host.get("ema", 0) // len(state.ema),
            ranks=ranks,
        )

    def scaled(self, factor: float) -> Memory:
        """Returns the memory with adapters of `factor` times the rank, which scales all but `frozen`."""
        names = ("trained", "rest", "fetched", "average", "ranks")
        return dataclasses.replace(self, **{name: int(factor * getattr(self, name)) for name in names})

    def peak(self, config: TrainConfig, images: int, parts: int) -> int:
        """Returns the peak of training, in bytes.

        In the backward pass, the gradient grows as activations are freed, so the larger of the two counts.
        Without rematerialization, the blocks also keep the trained kernels in the compute dtype. The update
        holds the gradient and the optimizer state that is fetched from the host. Images are generated between
        steps, by a VAE that stays on the device.

        Args:
          config: config of the stage.
          images: number of images in a micro-batch.
          parts: number of micro-batches.
        """
        model, side = config.model, config.features.latent_side
        shapes = batch_shapes(config, side, side, images * parts)
        batch = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in shapes.values())
        text = config.features.text_length if "text" in model.conditions else 0
        activations = training_bytes(model, (side, side), images, text, self.ranks)
        if model.remat == "none" and model.dtype != "float32":
            activations += self.trained // 2
        if config.objective == "alignment":
            widths = config.alignment.width, config.alignment.target_width
            activations += projector_bytes(model, (side, side), images, *widths)
        working = working_bytes(model, (side, side), images)
        total = self.trained if parts > 1 else 0
        step = batch + self.trained + max(total + working, self.fetched)
        step = max(step, batch + total + activations)
        if not config.log.sample_every:
            return self.state + step
        vae, decoding = _vae_bytes(config)
        drawn = sampling_bytes(model, (side, side), min(images, config.log.samples))
        return self.state + vae + max(step, self.average + max(drawn, decoding))


@dataclasses.dataclass(frozen=True)
class Plan:
    """One way to train a stage on a device.

    Attributes:
      settings: fields of the config that it changes, with their values.
      state: bytes that stay on the device between steps.
      largest: the largest micro-batch that fits without accumulation, 0 if not even one image does.
      parts: the smallest number of micro-batches that the batch of the stage needs; None if none is enough.
      peak: bytes of a step with `parts` or, if it is None, with micro-batches of one image.
      largest_rank: the largest of `RANKS` that adapters can have with `parts`; None without adapters.
    """

    settings: dict[str, Any]
    state: int
    largest: int
    parts: int | None
    peak: int
    largest_rank: int | None = None


def storages(config: TrainConfig) -> Iterator[tuple[dict[str, Any], TrainConfig]]:
    """Yields ways to store the training state: as configured, then with less and less on the device."""
    yield {}, config
    settings: dict[str, Any] = {}
    less = [("optimizer.ema_device", "host"), ("optimizer.offload", True)]
    if config.adapter:
        less = [("adapter.base_dtype", "int8")]
    for name, value in less:
        section, field = name.split(".")
        part = getattr(config, section)
        if getattr(part, field) != value:
            settings = {**settings, name: value}
            config = dataclasses.replace(config, **{section: dataclasses.replace(part, **{field: value})})
            yield settings, config


def plans(config: TrainConfig, limit: int) -> Iterator[tuple[Plan, TrainConfig]]:
    """Yields the plans of a stage, and its config with each of them.

    The first keep most in memory and compute least.

    Args:
      config: config of the stage. Its batch size stays the same.
      limit: memory of the device in bytes.
    """
    batch = config.data.batch_size
    for settings, stored in storages(config):
        memory = Memory.of(stored)
        for remat in REMATS:
            changed = dataclasses.replace(stored, model=dataclasses.replace(stored.model, remat=remat))
            peak = functools.partial(memory.peak, changed)
            divisors = (parts for parts in range(1, batch + 1) if batch % parts == 0)
            found = next((parts for parts in divisors if peak(batch // parts, parts) <= limit), None)
            parts = found or batch
            rank = None
            if config.adapter and found:
                rank = max(
                    (
                        rank
                        for rank in RANKS
                        if memory.scaled(rank / config.adapter.rank).peak(changed, batch // parts, parts)
                        <= limit
                    ),
                    default=0,
                )
            plan = Plan(
                settings={**settings, "model.remat": remat, "optimizer.accumulation": parts},
                state=memory.state,
                largest=_largest(lambda images, peak=peak: peak(images, 1) <= limit),
                parts=found,
                peak=peak(batch // parts, parts),
                largest_rank=rank,
            )
            yield plan, compile.with_parts(changed, batch, parts)


def _largest(fits: Callable[[int], bool]) -> int:
    """Returns the largest number that fits, by bisection; 0 if not even 1 does."""
    low, high = 0, 1
    while high <= LARGEST_BATCH and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fastest(found: Sequence[Plan], config: TrainConfig) -> int | None:
    """Returns the index of the plan to choose, or None if the batch of the stage fits with none of them.

    This is the first plan that fits with the whole batch, or with micro-batches that keep a GPU busy. If
    there is none, it is the one with the largest micro-batches.
    """
    batch = config.data.batch_size
    side = config.features.latent_side // config.model.patch_size
    enough = min(batch, -(-ENOUGH_TOKENS // side**2))
    fitting = [index for index, plan in enumerate(found) if plan.parts]
    first = next((index for index in fitting if batch // found[index].parts >= enough), None)
    return min(fitting, key=lambda index: found[index].parts, default=None) if first is None else first


def sampling_plans(config: TrainConfig, limit: int) -> list[dict[str, Any]]:
    """Returns what sampling needs, with the network and the text encoder in each of their dtypes.

    The text encoder has the shape in `features.text_encoder`, by default that of T5-XXL. It leaves the device
    when the texts are encoded.

    Args:
      config: config of the stage.
      limit: memory of the device in bytes.

    Returns:
      for each combination `weights_dtype`, `text_weights_dtype`, the bytes of the weights (`network`,
      `text_encoder`, `vae`), the peak for one image, and the largest batch that fits.
    """
    config = config.for_sampling()
    side = config.features.latent_side
    vae, decoding = _vae_bytes(config)
    given = config.features.text_encoder
    shape = {name: getattr(given, name) for name in ("d_model", "d_ff", "d_kv", "num_heads", "num_layers")}
    t5 = T5Config(**shape, dtype=given.dtype)
    found = []
    for dtype, text_dtype in itertools.product(WEIGHTS_DTYPES, TEXT_WEIGHTS_DTYPES):
        network = _bytes(nnx.state(nnx.eval_shape(functools.partial(sampling_network, config, dtype))))
        encoder = _bytes(nnx.state(abstract_t5(t5, text_dtype)))
        encoding = encoding_bytes(t5, 1, config.features.text_length)

        def peak(images: int, network=network, encoder=encoder, encoding=encoding) -> int:
            after = max(sampling_bytes(config.model, (side, side), images), decoding)
            return generation_peak(network + vae, encoder, encoding, after, keeps=False)

        found.append(
            {
                "weights_dtype": dtype,
                "text_weights_dtype": text_dtype,
                "network": network,
                "text_encoder": encoder,
                "vae": vae,
                "peak": peak(1),
                "largest_batch": _largest(lambda images, peak=peak: peak(images) <= limit),
            }
        )
    return found


def report(config: TrainConfig, memory_gib: float, topology: str | None = None) -> dict[str, Any]:
    """Returns which plans of training and of sampling fit on a device, for JSON.

    Args:
      config: config of the stage.
      memory_gib: memory of the device in GiB. JAX gets `settings.MEMORY_FRACTION` of it.
      topology: one device (see `topology_devices`), to compile the chosen plan for; None to estimate only.

    Raises:
      UserError: the topology has several devices, or its compiler is not installed.
    """
    mesh = None
    if topology:
        devices = topology_devices(topology)
        if len(devices) > 1:
            raise UserError(
                f"topology '{topology}' has {len(devices)} devices: fit plans for one; `benchmark compile` "
                "checks a stage on several."
            )
        mesh = sharding.make_mesh(MeshConfig(data=1), config, devices)
    limit = int(memory_gib * float(MEMORY_FRACTION) * GIB)
    found, stages = zip(*plans(config, limit))
    chosen = fastest(found, config)
    result = {
        "stage": config.name,
        "image_size": config.features.image_size,
        "batch_size": config.data.batch_size,
        "memory_gib": memory_gib,
        "limit_bytes": limit,
        "plans": [dataclasses.asdict(plan) for plan in found],
        "chosen": chosen,
        "fits": chosen is not None,
        "compiled": None,
        "sampling": sampling_plans(config, limit) if "text" in config.model.conditions else [],
    }
    if mesh and chosen is not None:
        stage = dataclasses.replace(stages[chosen], mesh=MeshConfig(data=1))
        fit = compile.try_fit(stage, mesh, limit)
        result["compiled"] = {
            "topology": topology,
            "versions": compile.compiler_versions(mesh.devices.flat[0].platform),
            **{name: getattr(fit, name) for name in ("fits", "needed", "arguments", "compile_seconds")},
        }
        result["fits"] = fit.fits
    return result


def summary(result: Mapping[str, Any]) -> str:
    """Formats the report as text."""
    gib = result["limit_bytes"] / GIB
    lines = [
        f"{result['stage']} at {result['image_size']} px on a device of {result['memory_gib']:g} GiB, of "
        f"which JAX gets {gib:.2f}: estimated",
        f"  training, batch {result['batch_size']}",
    ]
    adapters = any(plan["largest_rank"] is not None for plan in result["plans"])
    header = f"    {'remat':<6}{'state GiB':>10}{'peak GiB':>10}{'micro-batch':>13}{'accumulation':>14}"
    lines.append(header + (f"{'largest rank':>14}" if adapters else ""))
    storage = None
    for index, plan in enumerate(result["plans"]):
        settings, remat = {**plan["settings"]}, plan["settings"]["model.remat"]
        del settings["model.remat"], settings["optimizer.accumulation"]
        if settings != storage:
            storage = settings
            lines.append("    " + (flags(settings) or "as configured"))
        numbers = f"{plan['largest'] or 'none':>13}{plan['parts'] or '-':>14}"
        numbers += f"{plan['largest_rank'] or '-':>14}" if adapters else ""
        mark = "  <- fastest" if index == result["chosen"] else ""
        lines.append(f"    {remat:<6}{plan['state'] / GIB:>10.2f}{plan['peak'] / GIB:>10.2f}{numbers}{mark}")
    lines.append(
        "    peak: with the accumulation in the row, and with sample images if log.sample_every is set; "
        "micro-batch: the largest one that fits"
    )
    if result["chosen"] is None:
        lines.append(
            "  does not fit: use a smaller image size, adapters (configs/lora.py), or several devices"
        )
    else:
        lines.append(f"  train with {flags(result['plans'][result['chosen']]['settings'])}")
    if result["compiled"]:
        compiled = result["compiled"]
        lines.append(
            f"  compiled for {compiled['topology']}: {compiled['needed'] / GIB:.2f} GiB, "
            + ("fits" if compiled["fits"] else "DOES NOT FIT")
        )
    if result["sampling"]:
        lines.append("  sampling")
        lines.append(f"    {'--weights_dtype':<17}{'--text_weights_dtype':<22}{'peak GiB':>9}{'batch':>7}")
    for plan in result["sampling"]:
        lines.append(
            f"    {plan['weights_dtype']:<17}{plan['text_weights_dtype']:<22}{plan['peak'] / GIB:>9.2f}"
            f"{plan['largest_batch'] or 'none':>7}"
        )
    return "\n".join(lines)


def flags(settings: Mapping[str, Any]) -> str:
    """Returns the flags that set these fields of the config."""
    return " ".join(f"--config.{name}={value}" for name, value in settings.items())


@functools.lru_cache(maxsize=32)  # it is asked for each number of micro-batches
def _vae_bytes(config: TrainConfig) -> tuple[int, int]:
    """The weights of the VAE, which are those of Stable Diffusion's, and the activations for one image."""
    if config.features.codec != "vae":
        return 0, 0
    side = config.features.latent_side * config.features.downsampling
    vae = VAEConfig()
    return _bytes(nnx.state(abstract_vae(vae))), decoding_bytes(vae, (side, side), 1)


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
