"""Compiled sampling programs: from text features to latents, on all devices.

Generation is data parallel over images: every device holds all parameters and runs the same program on its
own images.

Axes: N images, S text tokens, T text width, h, w, C latent.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from pixart_jax.diffusion.multistep import initial_noise
from pixart_jax.diffusion.samplers import SAMPLERS
from pixart_jax.diffusion.schedule import NoiseSchedule
from pixart_jax.errors import UserError, did_you_mean, one_of
from pixart_jax.pipeline.requests import PROGRAM, ROUTING, Settings, names_of, typed
from pixart_jax.sampling import guided_noise, image_keys, run_sampler

# Default number of images in an accelerator's batch.
IMAGES_PER_DEVICE = 4

# Arguments that all samplers have; `sampler_options` are the others.
_COMMON = ("fn", "x_T", "schedule", "steps", "keys", "init", "strength", "inpaint", "return_x0")


class Step(NamedTuple):
    """What a callback receives after each evaluation of the model.

    The `latents` are the clean latents predicted at this step, scaled as the model sees them.
    """

    number: int  # number of the evaluation for these images, from 1
    timestep: float  # 999 .. 0
    images: range  # rows of the result
    latents: np.ndarray  # [len(images), h, w, C]


@dataclasses.dataclass(frozen=True)
class Program:
    """What determines a compiled program."""

    # Latent [h, w, C].
    shape: tuple[int, int, int]
    # Settings of scope PROGRAM; all others have their default values.
    settings: Settings
    # Whether a callback is called after each step.
    watched: bool = False

    @classmethod
    def of(cls, shape: tuple[int, int, int], settings: Settings, *, watched: bool = False) -> Program:
        """The program for settings of any scope, hashable."""
        values = {name: _hashable(getattr(settings, name)) for name in names_of(PROGRAM)}
        return cls(shape, Settings(**values), watched)


def _hashable(value: Any) -> Any:
    """Replaces dictionaries by sorted pairs and lists by tuples, so that the value is hashable."""
    if isinstance(value, Mapping):
        value = sorted(value.items())
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def images_per_device(platform: str, devices: int, count: int, batch_size: int | None) -> int:
    """Number of images in a device's batch.

    On a CPU it is always 1: larger batches are not faster there, and an image then has the same bits in any
    batch.

    Args:
      platform: platform of the devices, such as 'cpu'.
      devices: number of devices.
      count: total number of images to generate.
      batch_size: the number that the user requested; None for as many as needed, up to `IMAGES_PER_DEVICE`.
    """
    if platform == "cpu":
        return 1
    return batch_size or min(IMAGES_PER_DEVICE, -(-count // devices))


class Generator:
    """Runs the sampling programs of a network.

    Attributes:
      params: parameters of the network, replicated on every device.
      devices: the images are distributed over these.
    """

    def __init__(self, model: nnx.Module, config: TrainConfig, devices: Sequence[jax.Device] | None = None):
        """Places the parameters.

        Args:
          model: the network.
          config: config with the noise schedule and guidance conventions of the network.
          devices: None for all local devices.
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
        self._compiled: dict[Program, Callable] = {}
        self._checked: set[Program] = set()
        self._report: Callable[..., None] | None = None

    def per_device(self, count: int, batch_size: int | None) -> int:
        """Number of images in a device's batch; see `images_per_device`."""
        return images_per_device(self.devices[0].platform, len(self.devices), count, batch_size)

    def check(self, program: Program) -> None:
        """Checks names and types of the sampler's options, and their values by a trace without the network.

        Raises:
          UserError: an unknown sampler or option, and see `SAMPLERS` and `guide`.
        """
        if program in self._checked:
            return
        _check_options(program.settings.sampler, dict(program.settings.sampler_options or ()))
        out_channels = self._config.model.out_channels

        def trace(seeds: jax.Array, x: jax.Array) -> jax.Array:
            noise_fn = guide(
                lambda x, t, condition: jnp.zeros((*x.shape[:-1], out_channels)),
                x,
                x,
                jnp.float32(2),
                interval=program.settings.guidance_interval,
                rescale=program.settings.guidance_rescale,
            )
            return self._sample(program.settings, noise_fn, x, image_keys(seeds), x)

        x = jax.ShapeDtypeStruct((1, 1, 1, program.shape[2]), jnp.float32)
        jax.eval_shape(trace, jax.ShapeDtypeStruct((1,), jnp.uint32), x)
        self._checked.add(program)

    def __call__(
        self,
        program: Program,
        arrays: Mapping[str, Any],
        scale: float,
        *,
        batch_size: int | None = None,
        callback: Callable[[Step], None] | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        """Generates images in batches of equal size. The last batch is filled up with repeated images.

        Args:
          program: what to run.
          arrays: rows of N images: 'seeds' uint32; 'conditional' and, with guidance, 'unconditional', tuples
            of text [S, T] and mask [S]; and where they apply 'image_size' and 'aspect_ratio', 'noise'
            [h, w, C] to start from, 'init' [h, w, C] clean latents, 'mask' [h, w, 1], 1 where the image is
            regenerated.
          scale: guidance scale.
          batch_size: images in a device's batch; see `images_per_device`.
          callback: called after each step; needs `program.watched`. What it raises ends the call, after the
            batch.
          progress: show a progress bar that counts images.

        Returns:
          [N, h, w, C] float32 latents, scaled as the model sees them.
        """
        generate = self.compiled(program)
        # All batches of a call have the same parameters, even if `replace` is called in another thread.
        params = self.params
        count = len(arrays["seeds"])
        size = self.per_device(count, batch_size) * len(self.devices)
        out = []
        with tqdm(total=count, unit="image", disable=not progress) as bar:
            for start in range(0, count, size):
                rows = np.minimum(np.arange(start, start + size), count - 1)
                kept = min(size, count - start)
                batch = jax.tree.map(lambda array, rows=rows: np.asarray(array)[rows], dict(arrays))
                if callback is not None:
                    collector = _Collector(callback, range(start, start + kept), len(self.devices))
                    self._report = collector
                result = generate(params, jax.device_put(batch, self._rows), jnp.float32(scale))
                out.append(np.asarray(result)[:kept])
                if callback is not None:
                    jax.effects_barrier()
                    if collector.error is not None:
                        raise collector.error
                bar.update(kept)
        return np.concatenate(out)

    def replace(self, arrays: Iterable[tuple[tuple[str | int, ...], np.ndarray]]) -> None:
        """Replaces parameters, given with their paths.

        Compiled programs remain valid. A call that runs meanwhile goes on with the old parameters.
        """
        flat = dict(nnx.to_flat_state(self.params))
        for path, array in arrays:
            flat[path] = flat[path].replace(jax.device_put(array, flat[path].sharding))
        self.params = nnx.from_flat_state(flat)

    def compiled(self, program: Program) -> Callable[[Any, dict[str, Any], jax.Array], jax.Array]:
        """The jitted function (parameters, rows of a batch, guidance scale) -> latents, one per program."""
        if program not in self._compiled:
            replicated, rows = PartitionSpec(), PartitionSpec("images")
            self._compiled[program] = jax.jit(
                jax.shard_map(
                    lambda params, batch, scale: self._generate(program, params, batch, scale),
                    mesh=self._mesh,
                    in_specs=(replicated, rows, replicated),
                    out_specs=rows,
                    check_vma=False,
                )
            )
        return self._compiled[program]

    def _generate(self, program: Program, params: Any, batch: dict[str, Any], scale: jax.Array) -> jax.Array:
        settings = program.settings
        sizes = {name: batch[name] for name in ("image_size", "aspect_ratio") if name in batch}
        conditions, null = (
            dict(zip(("text", "text_mask"), batch[name])) | sizes if name in batch else None
            for name in ("conditional", "unconditional")
        )
        keys = image_keys(batch["seeds"])
        noise_fn = guided_noise(
            self._denoiser,
            params,
            conditions,
            null,
            scale,
            interval=settings.guidance_interval,
            rescale=settings.guidance_rescale,
            routed=keys if settings.guidance_by == ROUTING else None,
        )
        if program.watched:
            noise_fn = self._watch(noise_fn, self._denoiser.schedule)
        noise = batch["noise"] if "noise" in batch else initial_noise(keys, program.shape)
        return self._sample(settings, noise_fn, noise, keys, batch.get("init"), batch.get("mask"))

    def _sample(self, settings: Settings, noise_fn, noise, keys, init=None, mask=None) -> jax.Array:
        return run_sampler(
            noise_fn,
            self._denoiser.schedule,
            noise,
            keys,
            sampler=settings.sampler,
            steps=settings.steps,
            options=dict(settings.sampler_options or ()),
            strength=1.0 if settings.strength is None else settings.strength,
            init=init,
            mask=mask,
        )

    def _watch(self, noise_fn: Callable, schedule: NoiseSchedule) -> Callable:
        """Returns a function that computes `noise_fn` and also reports each call to the host."""
        log_alphas = 0.5 * np.log(schedule.alphas_cumprod)

        def watched(x: jax.Array, t: jax.Array) -> jax.Array:
            output = noise_fn(x, t)
            log_alpha = jnp.interp(t[0], jnp.arange(schedule.num_steps), jnp.asarray(log_alphas, jnp.float32))
            sigma = jnp.sqrt(-jnp.expm1(2 * log_alpha))
            clean = (x - sigma * output[..., : x.shape[-1]]) / jnp.exp(log_alpha)
            # The program outlives this call, so it must not hold the callback itself.
            device = jax.lax.axis_index("images")
            jax.debug.callback(lambda *values: self._report(*values), device, t[0], clean)
            return output

        return watched


class Option(NamedTuple):
    """An option of a sampler."""

    kind: Any
    default: Any


def options_of(sampler: str) -> dict[str, Option]:
    """The `sampler_options` that a sampler has, by name."""
    kinds = typing.get_type_hints(SAMPLERS[sampler])
    parameters = inspect.signature(SAMPLERS[sampler]).parameters
    return {
        name: Option(kinds[name], parameter.default)
        for name, parameter in parameters.items()
        if name not in _COMMON
    }


def _check_options(sampler: str, options: Mapping[str, Any]) -> None:
    one_of("sampler", sampler, SAMPLERS)
    known = options_of(sampler)
    for name, value in options.items():
        if name not in known:
            raise UserError(
                f"sampler_options: {sampler} has no '{name}', only {', '.join(known) or 'none'}."
                f"{did_you_mean(name, known)}"
            )
        typed(f"sampler_options.{name}", known[name].kind, value)


class _Collector:
    """Joins the parts of a step, which the devices report in any order, and calls the callback."""

    def __init__(self, callback: Callable[[Step], None], images: range, devices: int):
        self._callback, self._images, self._devices = callback, images, devices
        self._parts: dict[float, dict[int, np.ndarray]] = {}
        self._done = 0
        # What the callback raised. JAX would replace it by an error of its own.
        self.error: BaseException | None = None

    def __call__(self, device: np.ndarray, timestep: np.ndarray, latents: np.ndarray) -> None:
        if self.error is not None:
            return
        parts = self._parts.setdefault(float(timestep), {})
        parts[int(device)] = np.array(latents)
        if len(parts) == self._devices:
            del self._parts[float(timestep)]
            self._done += 1
            joined = np.concatenate([parts[i] for i in range(self._devices)])
            try:
                self._callback(Step(self._done, float(timestep), self._images, joined[: len(self._images)]))
            except BaseException as error:
                self.error = error


# --- Rows


def seed_rows(seed: int | Sequence[int], prompts: int, images: int) -> np.ndarray:
    """The seed of each image, uint32 [N]: image k of a prompt has the prompt's seed + k.

    Args:
      seed: seed of the first image of each prompt; one for all prompts or one for each.
      prompts, images: number of prompts, and of images per prompt.

    Raises:
      UserError: a seed that is no whole number or out of range, or a wrong number of seeds.
    """
    seeds = np.atleast_1d(np.asarray(seed, object))
    if seeds.shape not in ((1,), (prompts,)):
        raise UserError(f"seed has {len(seeds)} numbers for {prompts} prompts: give 1 or {prompts}.")
    for each in seeds:
        if not isinstance(each, int | np.integer) or not 0 <= each <= 2**32 - images:
            raise UserError(
                f"seed is {each!r:.200}: it must be a whole number between 0 and {2**32 - images}."
            )
    each = np.broadcast_to(seeds, (prompts,)).astype(np.int64)
    return (each[:, None] + np.arange(images)).reshape(-1).astype(np.uint32)


def float_rows(name: str, values: Any, rows: Sequence[str] | None = None) -> np.ndarray:
    """Values as float32.

    Args:
      name: what they are, for messages.
      values: an array [N, ...].
      rows: what each row belongs to, for messages.

    Raises:
      UserError: the values are not real numbers, or not finite.
    """
    values = np.asarray(values)
    if not (values.dtype.kind in "fiu" or jnp.issubdtype(values.dtype, jnp.floating)):
        raise UserError(f"{name} are {values.dtype}: give real numbers, such as float32.")
    with np.errstate(over="ignore"):
        values = values.astype(np.float32, copy=False)
    bad = rows_not_finite(values)
    if len(bad):
        of = f" ({rows[bad[0]]:.200})" if rows is not None else ""
        raise UserError(
            f"{name} have values that are NaN or infinite in row {bad[0]}{of}: give finite numbers."
        )
    return values


def text_rows(
    name: str, text: Any, mask: Any, rows: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Text features float32 [P, S, T] and the mask of their valid tokens bool [P, S].

    Args:
      name: what they are, for messages.
      text, mask: arrays; the mask is 1 for a valid token and 0 for another.
      rows: the prompts, for messages.

    Raises:
      UserError: another shape, features that are not finite real numbers, a mask of other numbers, or one
        without a valid token.
    """
    text, mask = float_rows(name, text, rows), np.asarray(mask)
    if text.ndim != 3 or mask.shape != text.shape[:2]:
        raise UserError(
            f"{name} are {list(text.shape)}, their mask is {list(mask.shape)}: give features [prompts, "
            "tokens, width] and a mask [prompts, tokens]."
        )
    if mask.dtype.kind not in "biuf" or not np.isin(mask, (0, 1)).all():
        raise UserError(f"the mask of {name} has other values than 0 and 1: give 1 for each valid token.")
    empty = np.flatnonzero(~mask.astype(bool).any(axis=1))
    if len(empty):
        of = f" ({rows[empty[0]]:.200})" if rows is not None else ""
        raise UserError(
            f"the mask of {name} is 0 everywhere in row {empty[0]}{of}: give 1 for each valid token."
        )
    return text, mask.astype(bool)


def rows_not_finite(values: np.ndarray) -> np.ndarray:
    """Indices of the rows of [N, ...] that have values that are NaN or infinite."""
    return np.flatnonzero([not np.isfinite(row).all() for row in values])


def condition_rows(
    conditions: Mapping[str, tuple[np.ndarray, np.ndarray]], images: int = 1
) -> dict[str, Any]:
    """A row of every embedding for each image, all padded to the same length."""
    length = max(part[0].shape[1] for part in conditions.values())

    def rows(value: np.ndarray) -> np.ndarray:
        padding = [(0, 0), (0, length - value.shape[1])] + [(0, 0)] * (value.ndim - 2)
        return np.pad(value, padding).repeat(images, axis=0)

    return {name: tuple(rows(np.asarray(part)) for part in value) for name, value in conditions.items()}
