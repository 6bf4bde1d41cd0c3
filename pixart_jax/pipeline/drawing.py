"""The compiled program of a pipeline: from conditions to latents, on all devices.

Data parallel over images: every device runs the same program on its own images, with the whole backbone.

Axes: N images, S text tokens, T text width, h, w, C latent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

from pixart_jax.config import TrainConfig
from pixart_jax.denoiser import Denoiser
from pixart_jax.diffusion.guidance import guide
from pixart_jax.diffusion.multistep import Inpaint, initial_noise
from pixart_jax.diffusion.samplers import SAMPLERS
from pixart_jax.diffusion.schedule import NoiseSchedule
from pixart_jax.errors import UserError
from pixart_jax.sampling import image_keys

# Images on one accelerator at a time, unless told otherwise.
IMAGES_PER_DEVICE = 4


class Step(NamedTuple):
    """What a callback is told after a model call.

    Its `latents` are the clean ones predicted at this step, in the scale the model works in.
    """

    number: int  # of the model call of these images, from 1
    timestep: float  # 999 .. 0
    images: range  # rows of the result
    latents: np.ndarray  # [len(images), h, w, C]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a program is compiled for."""

    # Latent [h, w, C].
    shape: tuple[int, int, int]
    sampler: str
    steps: int
    # Further arguments of the sampler, as pairs.
    options: tuple[tuple[str, Any], ...] = ()
    # As `guide`.
    interval: tuple[float, float] | None = None
    rescale: float = 0.0
    # Part of the steps that is run from an image.
    strength: float = 1.0
    # Whether a callback is told of every step.
    watched: bool = False


class Drawer:
    """Runs a backbone's programs.

    Attributes:
      params: of the backbone, whole on every device.
      devices: the images are spread over these.
    """

    def __init__(self, model: nnx.Module, config: TrainConfig, devices: Sequence[jax.Device] | None = None):
        """Places the parameters.

        Args:
          model: the backbone.
          config: its conventions.
          devices: None for all local ones.
        """
        self.devices = list(devices or jax.local_devices())
        self._config = config
        mesh = jax.make_mesh(
            (len(self.devices),), ("images",), axis_types=(AxisType.Auto,), devices=self.devices
        )
        self._mesh, self._rows = mesh, NamedSharding(mesh, PartitionSpec("images"))
        self.graph, params = nnx.split(model)
        self._denoiser = Denoiser(config, self.graph)
        self.params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        self._compiled: dict[Settings, Callable] = {}
        self._checked: set[Settings] = set()
        self._report: Callable[..., None] | None = None

    def per_device(self, count: int, batch_size: int | None) -> int:
        """Images that a device draws at a time, when `count` are drawn in all.

        On a CPU always one: more are no faster there, and so an image has the same bits in every batch.
        """
        if self.devices[0].platform == "cpu":
            return 1
        return batch_size or min(IMAGES_PER_DEVICE, -(-count // len(self.devices)))

    def check(self, settings: Settings) -> None:
        """Runs the sampler without a model and without numbers, for what it says of its arguments.

        Raises:
          UserError: see `SAMPLERS` and `guide`.
        """
        if settings in self._checked:
            return
        out_channels = self._config.model.out_channels

        def dry(seeds: jax.Array, x: jax.Array) -> jax.Array:
            noise_fn = guide(
                lambda x, t, condition: jnp.zeros((*x.shape[:-1], out_channels)),
                x,
                x,
                jnp.float32(2),
                interval=settings.interval,
                rescale=settings.rescale,
            )
            return self._sample(settings, noise_fn, x, image_keys(seeds), x, None)

        x = jax.ShapeDtypeStruct((1, 1, 1, settings.shape[2]), jnp.float32)
        jax.eval_shape(dry, jax.ShapeDtypeStruct((1,), jnp.uint32), x)
        self._checked.add(settings)

    def __call__(
        self,
        settings: Settings,
        arrays: Mapping[str, Any],
        scale: float,
        *,
        batch_size: int | None = None,
        callback: Callable[[Step], None] | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        """Draws in batches of one size, the last one filled up with repeats.

        Args:
          settings: of the program.
          arrays: rows of N images: 'seeds' uint32; 'conditional' and, with guidance, 'unconditional', tuples
            of text [S, T] and mask [S]; and where they apply 'image_size' and 'aspect_ratio', 'noise'
            [h, w, C] to start from, 'init' [h, w, C] clean latents, 'mask' [h, w, 1] of what is redrawn.
          scale: of the guidance.
          batch_size: images a device draws at a time; see `per_device`.
          callback: told of every step; `settings.watched` must be set.
          progress: show a bar that counts images.

        Returns:
          [N, h, w, C] float32 latents in the scale the model works in.
        """
        draw = self._program(settings)
        count = len(arrays["seeds"])
        size = self.per_device(count, batch_size) * len(self.devices)
        out = []
        with tqdm(total=count, unit="image", disable=not progress) as bar:
            for start in range(0, count, size):
                rows = np.minimum(np.arange(start, start + size), count - 1)
                kept = min(size, count - start)
                batch = jax.tree.map(lambda array, rows=rows: np.asarray(array)[rows], dict(arrays))
                if callback is not None:
                    self._report = _Collector(callback, range(start, start + kept), len(self.devices))
                result = draw(self.params, jax.device_put(batch, self._rows), jnp.float32(scale))
                out.append(np.asarray(result)[:kept])
                if callback is not None:
                    jax.effects_barrier()
                bar.update(kept)
        return np.concatenate(out)

    def _program(self, settings: Settings) -> Callable[[Any, dict[str, Any], jax.Array], jax.Array]:
        """(parameters, rows of a batch, guidance scale) -> latents, compiled once for each kind of call."""
        if settings not in self._compiled:
            whole, rows = PartitionSpec(), PartitionSpec("images")
            self._compiled[settings] = jax.jit(
                jax.shard_map(
                    lambda params, batch, scale: self._draw(settings, params, batch, scale),
                    mesh=self._mesh,
                    in_specs=(whole, rows, whole),
                    out_specs=rows,
                    check_vma=False,
                )
            )
        return self._compiled[settings]

    def _draw(self, settings: Settings, params: Any, batch: dict[str, Any], scale: jax.Array) -> jax.Array:
        model = nnx.merge(self.graph, params)
        channels = self._config.guidance.channels
        sizes = tuple(batch[name] for name in ("image_size", "aspect_ratio") if name in batch)
        conditional, unconditional = (
            (*batch[name], *sizes) if name in batch else None for name in ("conditional", "unconditional")
        )
        noise_fn = guide(
            lambda x, t, condition: model(x, t, *condition),
            conditional,
            unconditional,
            1 if unconditional is None else scale,
            guided_channels=None if channels == 4 else channels,
            interval=settings.interval,
            rescale=settings.rescale,
        )
        if settings.watched:
            noise_fn = self._watch(noise_fn, self._denoiser.schedule)
        keys = image_keys(batch["seeds"])
        noise = batch["noise"] if "noise" in batch else initial_noise(keys, settings.shape)
        init, inpaint = batch.get("init"), None
        if "mask" in batch:
            inpaint = Inpaint(batch["mask"], init, noise)
            # Redrawn from the start, nothing of the original is to shine through.
            init = None if settings.strength == 1 else init
        return self._sample(settings, noise_fn, noise, keys, init, inpaint)

    def _sample(self, settings, noise_fn, noise, keys, init, inpaint) -> jax.Array:
        return SAMPLERS[settings.sampler](
            noise_fn,
            noise,
            self._denoiser.schedule,
            steps=settings.steps,
            keys=keys,
            init=init,
            strength=settings.strength,
            inpaint=inpaint,
            **dict(settings.options),
        )

    def _watch(self, noise_fn: Callable, schedule: NoiseSchedule) -> Callable:
        """The same function, which tells the host of every call."""
        log_alphas = 0.5 * np.log(schedule.alphas_cumprod)

        def watched(x: jax.Array, t: jax.Array) -> jax.Array:
            output = noise_fn(x, t)
            log_alpha = jnp.interp(t[0], jnp.arange(schedule.num_steps), jnp.asarray(log_alphas, jnp.float32))
            sigma = jnp.sqrt(-jnp.expm1(2 * log_alpha))
            clean = (x - sigma * output[..., : x.shape[-1]]) / jnp.exp(log_alpha)
            # The program outlives the call, so it must not hold the callback itself.
            device = jax.lax.axis_index("images")
            jax.debug.callback(lambda *told: self._report(*told), device, t[0], clean)
            return output

        return watched


class _Collector:
    """Puts the parts of a step together, which devices report in any order, and tells the callback."""

    def __init__(self, callback: Callable[[Step], None], images: range, devices: int):
        self._callback, self._images, self._devices = callback, images, devices
        self._parts: dict[float, dict[int, np.ndarray]] = {}
        self._done = 0

    def __call__(self, device: np.ndarray, timestep: np.ndarray, latents: np.ndarray) -> None:
        parts = self._parts.setdefault(float(timestep), {})
        parts[int(device)] = np.array(latents)
        if len(parts) == self._devices:
            del self._parts[float(timestep)]
            self._done += 1
            whole = np.concatenate([parts[i] for i in range(self._devices)])
            self._callback(Step(self._done, float(timestep), self._images, whole[: len(self._images)]))


# --- Rows


def seed_rows(seed: int | Sequence[int], prompts: int, images: int) -> np.ndarray:
    """[N] uint32: image k of a prompt has its seed + k.

    Args:
      seed: of the first image of a prompt, one for all or one for each.
      prompts, images: how many prompts, and images of each.

    Raises:
      UserError: a seed out of range, or another number of them.
    """
    seeds = np.atleast_1d(np.asarray(seed, object))
    if seeds.shape not in ((1,), (prompts,)):
        raise UserError(f"seed has {len(seeds)} numbers for {prompts} prompts: give 1 or {prompts}.")
    for each in seeds:
        if not 0 <= each <= 2**32 - images:
            raise UserError(f"seed is {each}: it must be between 0 and {2**32 - images}.")
    each = np.broadcast_to(seeds, (prompts,)).astype(np.int64)
    return (each[:, None] + np.arange(images)).reshape(-1).astype(np.uint32)


def condition_rows(
    conditions: Mapping[str, tuple[np.ndarray, np.ndarray]], images: int = 1
) -> dict[str, Any]:
    """One row of every embedding for each image, all of them padded to one length."""
    length = max(part[0].shape[1] for part in conditions.values())

    def rows(value: np.ndarray) -> np.ndarray:
        padding = [(0, 0), (0, length - value.shape[1])] + [(0, 0)] * (value.ndim - 2)
        return np.pad(value, padding).repeat(images, axis=0)

    return {name: tuple(rows(np.asarray(part)) for part in value) for name, value in conditions.items()}
