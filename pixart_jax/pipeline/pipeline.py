"""From prompts to images: a network with its text encoder, image codec and conventions.

Axes: P prompts, N images (prompt by prompt), S text tokens, T text width, h, w, C latent.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from flax import nnx

from pixart_jax.config import TrainConfig
from pixart_jax.data.captions import cleaning_loss
from pixart_jax.denoiser import null_caption
from pixart_jax.diffusion.guidance import uses_guidance
from pixart_jax.encoders.images import Codec
from pixart_jax.encoders.text import TextEncoder
from pixart_jax.errors import UserError, at_least, finite, in_utf8, one_of, short
from pixart_jax.models.pixart import PixArt
from pixart_jax.pipeline.adapters import Adapters
from pixart_jax.pipeline.editing import default_strength, edited_rows, resize_back
from pixart_jax.pipeline.generation import (
    Generator,
    Program,
    Step,
    condition_rows,
    float_rows,
    rows_not_finite,
    seed_rows,
    text_rows,
)
from pixart_jax.pipeline.requests import CAPTION, MIN_TILE, ROUTING, Settings, numbers_of, takes_settings
from pixart_jax.pipeline.sizes import Size, choose_size
from pixart_jax.weights.adapters import Adapter

OUTPUTS = ("images", "latents", "both")

# Side in pixels of the tiles in which images are decoded that do not fit into a device's memory.
TILE = 1024
# Number of texts whose features a pipeline keeps, so that each is encoded once. With T5-XXL: 2 MB each at
# most.
TEXTS_KEPT = 1024

SettingsT = typing.TypeVar("SettingsT", bound=Settings)


class Embeddings(NamedTuple):
    """Text features, and the mask of their valid tokens."""

    text: np.ndarray  # [P, S, T]
    mask: np.ndarray  # [P, S], 1 for a valid token


class Pipeline:
    """Generates images for prompts.

        images = pipe(["a corgi reading"], seed=0, steps=20, guidance_scale=4.5, height=512, width=512)

    Attributes:
      model: the `PixArt`; `model.config` describes it.
      config: its conventions: guidance, noise schedule, latent scale.
      text_encoder: None if none was loaded; prompts must then come as embeddings.
      codec: latents to images.
      generator: the compiled programs, and the devices they run on.
      keep_text_encoder: False frees the text encoder's memory once the texts of a call are encoded.
      adapters: the adapters of the network; None if there are none.
    """

    def __init__(
        self,
        model: PixArt,
        config: TrainConfig,
        text_encoder: TextEncoder | None,
        codec: Codec,
        solver: Mapping[str, Any] | str | None = None,
        *,
        devices: Sequence[jax.Device] | None = None,
        keep_text_encoder: bool = True,
        adapters: Sequence[tuple[Adapter, float]] = (),
        params: Mapping[str, Any] | None = None,
    ):
        """Assembles a pipeline; `load_pipeline` does it from files.

        Args:
          model: the network.
          config: config of the run that trained the network, or the one that a weights file implies.
          text_encoder: for prompts and negative prompts.
          codec: for images.
          solver: default arguments of `dpm_solver` for these weights; or the error message if there are none.
          devices: devices to distribute the images over; None for all local devices.
          keep_text_encoder: see the class.
          adapters: adapters to merge into the network, each with its weight.
          params: its float32 parameters; needed with adapters if its kernels are in int8.

        Raises:
          UserError: an adapter does not fit the network.
        """
        self.config, self.text_encoder, self.codec = config, text_encoder, codec
        self.keep_text_encoder = keep_text_encoder
        self._solver = solver or {}
        self.generator = Generator(model, config, devices)
        self.adapters = Adapters(self.generator, config.model, adapters, params) if adapters else None
        # Shares the generator's arrays, so that no device holds the weights twice.
        self.model = nnx.merge(self.generator.graph, self.generator.params)
        self._features: dict[str, np.ndarray] = {}  # [L, T] of each text, valid tokens only
        self._null_text: np.ndarray | None = None

    @takes_settings
    def __call__(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        images_per_prompt: int = 1,
        batch_size: int | None = None,
        embeddings: Embeddings | None = None,
        negative_embeddings: Embeddings | None = None,
        latents: np.ndarray | None = None,
        output: str = "images",
        callback: Callable[[Step], None] | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Generates `images_per_prompt` images for each prompt.

        Image k of a prompt has seed `seed + k`, whichever prompts it is generated with. On CPUs it has the
        same bits in any batch and on any number of devices; on accelerators it has the same bits only with
        the same `batch_size`.

        Args:
          prompts: texts; None with `embeddings`.
          images_per_prompt: number of images for each prompt.
          batch_size: images in a device's batch; the last batch is filled up. None for as many as needed, at
            most 4. On a CPU it is always 1.
          embeddings: text features in place of prompts, as `encode` returns them.
          negative_embeddings: the same in place of `negative_prompt`, one for each prompt or one for all.
          latents: [N, h, w, C] standard normal noise to start from.
          output: 'images', 'latents' or 'both'.
          callback: called with a `Step` after each evaluation of the model, while the device continues. It
            must be short and must not run JAX. A call with a callback compiles a separate program. What the
            callback raises ends the call, once the device has finished the batch.
          progress: show a progress bar that counts images.
          settings: see below. `negative_prompt`, `seed`, `image` and `mask` may be lists, with one value for
            each prompt. `image` and `mask` may be files, PIL images or arrays: uint8 [H, W, 3] for an image,
            which is resized and cropped to the size of the output; [H, W] for a mask, which must have the
            size of its image.

        Returns:
          uint8 [N, height, width, 3]; or float32 latents [N, h, w, C] as the model sees them; or both as a
          pair.

        Raises:
          UserError: an argument is invalid, and the message names it; or the latents are not finite, and the
            message names the prompt and the step.
        """
        one_of("output", output, OUTPUTS)
        for name, value in (("images_per_prompt", images_per_prompt), ("batch_size", batch_size)):
            if value is not None:
                at_least(name, value, 1)
        given, size = self.resolve(Settings.from_arguments(settings))
        scale = given.guidance_scale
        guided = uses_guidance(scale)
        if (prompts is None) == (embeddings is None):
            raise UserError("give either prompts or embeddings.")
        embeddings = self._checked("embeddings", embeddings)
        negative_embeddings = self._checked("negative_embeddings", negative_embeddings)
        prompts = [prompts] if isinstance(prompts, str) else prompts
        for name, texts in (("prompts", prompts), ("negative_prompt", given.negative_prompt)):
            _check_texts(name, texts)
        count = len(embeddings.text) if prompts is None else len(prompts)
        if not count:
            raise UserError("there are 0 prompts: give at least one.")
        arrays = {"seeds": seed_rows(given.seed, count, images_per_prompt)}
        if not guided:
            # Only the dense prediction is needed.
            given = dataclasses.replace(given, guidance_by=CAPTION)
        by_caption = guided and given.guidance_by == CAPTION
        conditions = self._conditions(
            prompts, embeddings, given.negative_prompt, negative_embeddings, by_caption
        )
        arrays |= condition_rows(conditions, images_per_prompt)

        shape = self.latent_shape(size)
        total = count * images_per_prompt
        if latents is not None:
            latents = float_rows("latents", latents)
            if latents.shape != (total, *shape):
                raise UserError(f"latents are {latents.shape}: this call takes {(total, *shape)}.")
            arrays["noise"] = latents
        if self.model.config.size_conditions:
            arrays |= self._size_conditions(total, size.height, size.width)
        edited = edited_rows(given.image, given.mask, count, size, self.codec, shape[2])
        if edited:
            edited["init"] *= self.config.features.latent_scale
        arrays |= {name: rows.repeat(images_per_prompt, axis=0) for name, rows in edited.items()}

        program = Program.of(shape, given, watched=callback is not None)
        generated = self.generator(
            program, arrays, scale, batch_size=batch_size, callback=callback, progress=progress
        )
        bad = rows_not_finite(generated)
        if len(bad):
            row = int(bad[0])
            text = "embeddings" if prompts is None else f"prompt {prompts[row // images_per_prompt]!r:.200}"
            one = jax.tree.map(lambda rows: rows[row : row + 1], arrays)
            raise UserError(
                f"{text}, seed {arrays['seeds'][row]}: the latents are NaN or infinite "
                f"{self._first_bad_step(program, one, scale)}. The guidance scale or the sampler options are "
                f"too extreme for these weights, or {self.model.config.dtype} too narrow: change them."
            )
        if output == "latents":
            return generated
        images = resize_back(self.decode(generated, size.tile), size.out_height, size.out_width)
        return images if output == "images" else (images, generated)

    def _first_bad_step(self, program: Program, arrays: dict[str, Any], scale: float) -> str:
        """The step from which the latents of one image are not finite, found by generating it again."""
        steps: list[Step] = []
        watched = dataclasses.replace(program, watched=True)
        self.generator(watched, arrays, scale, callback=steps.append)
        for step in steps:
            if not np.isfinite(step.latents).all():
                return f"from step {step.number} of {len(steps)} (timestep {step.timestep:.0f})"
        return f"after step {len(steps)}, the last one"

    def decode(self, latents: np.ndarray, tile: int = 0) -> np.ndarray:
        """Latents [N, h, w, C] as the model sees them -> uint8 [N, H, W, 3]; `tile` as in `Codec.decode`."""
        return self.codec.decode(np.asarray(latents) / self.config.features.latent_scale, tile)

    def resolve(self, settings: SettingsT) -> tuple[SettingsT, Size]:
        """Fills in the defaults that depend on these weights, and checks all settings. Generates nothing.

        Returns:
          The settings, which do not change if they are resolved again; and the size of the image.

        Raises:
          UserError: a setting is invalid. The message names it.
        """
        if settings.image is None and settings.strength is not None:
            raise UserError(
                f"strength is {settings.strength}, and there is no image to start from: give one."
            )
        if settings.image is None and settings.mask is not None:
            raise UserError("mask is given without image: also give the image that it belongs to.")
        for field in dataclasses.fields(Settings):
            for name, number in numbers_of(field.name, getattr(settings, field.name)):
                finite(name, number)
        at_least("steps", settings.steps, 1)
        if settings.guidance_by == ROUTING:
            self._check_routing(settings.negative_prompt)
        seed_rows(settings.seed, np.size(settings.seed), 1)
        size = self._size(settings)
        self._check_size(size)
        size = size._replace(tile=self._tile(settings.tile, size))
        filled: dict[str, Any] = {"sampler_options": self._sampler_options(settings)}
        if size.tile:
            filled["tile"] = size.tile
        if settings.guidance_scale is None:
            filled["guidance_scale"] = self.config.guidance.scale
        if settings.image is not None and settings.strength is None:
            filled["strength"] = default_strength(settings.mask)
        if settings.aspect_ratio is None:
            filled |= {"height": size.out_height, "width": size.out_width}
        resolved = dataclasses.replace(settings, **filled)
        uses_guidance(resolved.guidance_scale)
        self.generator.check(Program.of(self.latent_shape(size), resolved))
        return resolved, size

    def _sampler_options(self, settings: Settings) -> Mapping[str, Any]:
        """The given options, or those that the weights come with."""
        if settings.sampler != "dpm_solver" or settings.sampler_options is not None:
            return settings.sampler_options or {}
        if isinstance(self._solver, str):
            raise UserError(self._solver)
        return self._solver

    def _size(self, settings: Settings) -> Size:
        model = self.model.config
        step = model.patch_size * self.codec.downsampling
        # The buckets that the aspect ratio in the size conditions comes from.
        bins = "official" if self.config.guidance.aspect_ratio == "bucket" else "diffusers"
        return choose_size(
            settings.height,
            settings.width,
            settings.aspect_ratio,
            base=model.base_size * step,
            step=step,
            bins=bins,
            binning=settings.binning,
        )

    def _check_size(self, size: Size) -> None:
        try:
            self.model.config.check_size(*self.latent_shape(size)[:2])
        except UserError as error:
            raise UserError(f"for images of {size.height}x{size.width} px, {error}") from error

    def _check_routing(self, negative_prompt: str | Sequence[str]) -> None:
        if negative_prompt if isinstance(negative_prompt, str) else any(negative_prompt):
            raise UserError(
                f"negative_prompt is given and guidance_by '{ROUTING}', which has none: leave it out, or set "
                f"guidance_by to '{CAPTION}'."
            )
        try:
            self.config.check_routing(self.config.guidance_routing)
        except UserError as error:
            raise UserError(f"guidance_by is '{ROUTING}', but {error} Set it to '{CAPTION}'.") from error

    def _tile(self, given: int | None, size: Size) -> int:
        """The given side of the tiles, or the one that the memory of a device asks for."""
        if given is None:
            # That module imports this one.
            from pixart_jax.pipeline.memory import plan_memory

            return 0 if plan_memory(self, size, 1).decodes_at_once else TILE
        side = self.codec.downsampling
        if given and side == 1:
            raise UserError(f"tile is {given}, and this network has no VAE that decodes: leave it out.")
        if given and (given % side or given < MIN_TILE):
            raise UserError(
                f"tile is {given} px: it must be 0 or a multiple of {side} of at least {MIN_TILE}, such as "
                f"{TILE}."
            )
        return given

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """(h, w, C)."""
        side = self.codec.downsampling
        return size.height // side, size.width // side, self.model.config.in_channels

    def set_adapter_weights(self, weights: Mapping[str, float]) -> None:
        """Changes the weights of adapters. A call that runs in another thread is finished with the old ones.

        Args:
          weights: by the path that the adapter was given with. Other adapters keep their weights. With 0 for
            all, the network has the bits that it has without adapters.

        Raises:
          UserError: an unknown adapter, or a weight that is not a finite number. Nothing has changed then.
        """
        if self.adapters is None:
            raise UserError("this pipeline has no adapters: give them to load_pipeline (adapters=…).")
        self.adapters.set(weights)
        self.model = nnx.merge(self.generator.graph, self.generator.params)
        self.__dict__.pop("fingerprint", None)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies the weights: a hash of the first values of every parameter, and of the adapters."""
        digest = hashlib.sha256()
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.generator.params):
            # A training step changes all parameters everywhere.
            values = np.asarray(leaf.addressable_data(0)).reshape(-1)[:256]
            digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape}".encode() + values.tobytes())
        for each in self.adapters.record() if self.adapters else ():
            # An adapter need not change the first values of a parameter.
            if each["weight"]:
                digest.update(f"{each['sha256']} {each['weight']}".encode())
        return digest.hexdigest()[:16]

    # --- Texts

    def encode(self, prompts: Sequence[str]) -> Embeddings:
        """Text features of prompts. Each distinct prompt is encoded only once, even across several calls.

        Raises:
          UserError: this pipeline has no text encoder, a prompt is not valid Unicode, or its features are not
            finite.
        """
        if self.text_encoder is None:
            raise UserError("this pipeline has no text encoder: give embeddings and negative_embeddings.")
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._features]
        for prompt in new:
            in_utf8("the prompt", prompt, "remove the characters that are not Unicode")
        first_cut, first_unknown = len(self.text_encoder.cut), len(self.text_encoder.unknown)
        for i, valid in self.text_encoder.encode_each(new):
            if not np.isfinite(valid).all():
                raise UserError(
                    f"prompt {new[i]!r:.200}: its text features are NaN or infinite. The text encoder "
                    f"computes in {self.text_encoder.network.dtype}: give its own weights, or another "
                    "text_dtype."
                )
            self._features[new[i]] = valid
        for cut in self.text_encoder.cut[first_cut:]:
            logging.warning(
                "prompt of %d tokens was truncated to %d; removed: %s",
                cut.tokens,
                self.text_encoder.text_length,
                short(cut.removed),
            )
        for line in self.text_encoder.unknown[first_unknown:]:
            logging.warning(
                "%d of the %d tokens of the prompt '%s' are unknown to the text encoder, and the network "
                "cannot tell them apart; translate it",
                line.unknown,
                line.tokens,
                short(line.caption),
            )
        for prompt in new:
            loss = cleaning_loss(prompt, self.text_encoder.clean_caption)
            if loss:
                logging.warning(
                    "cleaning removed '%s' from the prompt '%s'%s; only weights that were trained with "
                    "features.text_encoder.clean_caption=False get such words",
                    short(loss.removed),
                    short(prompt),
                    ", which is now empty" if loss.emptied else "",
                )
        text = np.zeros((len(prompts), self.text_encoder.text_length, self.text_encoder.width), np.float32)
        mask = np.zeros(text.shape[:2], bool)
        for row, prompt in enumerate(prompts):
            valid = self._features[prompt]
            text[row, : len(valid)], mask[row, : len(valid)] = valid, True
        for prompt in list(self._features)[:-TEXTS_KEPT]:
            del self._features[prompt]
        return Embeddings(text, mask)

    def prepare(
        self, prompts: Sequence[str], negative_prompts: Sequence[str]
    ) -> tuple[Embeddings, Embeddings]:
        """Encodes the texts of later calls together, so that the text encoder is loaded once for all of them.

        Returns:
          Features of the prompts, and of their negative prompts.
        """
        return tuple(self._conditions(prompts, None, negative_prompts, None, guided=True).values())

    def _conditions(
        self,
        prompts: Sequence[str] | None,
        embeddings: Embeddings | None,
        negative_prompt: str | Sequence[str],
        negative_embeddings: Embeddings | None,
        guided: bool,
    ) -> dict[str, Embeddings]:
        conditions = {"conditional": self.encode(prompts) if embeddings is None else embeddings}
        if guided:
            conditions["unconditional"] = self._negative(
                negative_prompt, negative_embeddings, conditions["conditional"]
            )
        if self.text_encoder is not None and not self.keep_text_encoder:
            self.text_encoder.release()
        return conditions

    def _checked(self, name: str, given: Any) -> Embeddings | None:
        """Embeddings that a caller gives, as float32 and bool."""
        if given is None:
            return None
        if not isinstance(given, tuple | list) or len(given) != 2:
            raise UserError(f"{name} are a {type(given).__name__}: give (features, mask), as encode returns.")
        text, mask = text_rows(name, *given)
        width = self.model.config.text_dim
        if text.shape[2] != width:
            raise UserError(f"{name} have {text.shape[2]} features for each token, the model takes {width}.")
        return Embeddings(text, mask)

    def _negative(
        self, prompt: str | Sequence[str], given: Embeddings | None, positive: Embeddings
    ) -> Embeddings:
        """Features of the negative prompts, one row for each prompt."""
        count = len(positive.text)
        if given is not None:
            if len(given.text) not in (1, count):
                raise UserError(
                    f"negative_embeddings are {len(given.text)} for {count} prompts: give 1 or {count}."
                )
            return Embeddings(*(np.broadcast_to(part, (count, *part.shape[1:])) for part in given))
        prompts = [prompt] * count if isinstance(prompt, str) else list(prompt)
        if len(prompts) != count:
            raise UserError(
                f"negative_prompt has {len(prompts)} texts for {count} prompts: give 1 or {count}."
            )
        guidance = self.config.guidance
        if all(prompts) or (guidance.null_text, guidance.null_mask) == ("t5_empty", "own"):
            return self.encode(prompts)
        null = self._null(positive)
        if not any(prompts):
            return null
        # A text keeps its own features and tokens, whatever the null caption is.
        rows = condition_rows({"texts": self.encode(prompts), "null": null})
        has_text = np.array([bool(prompt) for prompt in prompts])
        return Embeddings(
            *(
                np.where(has_text.reshape(-1, *[1] * (text.ndim - 1)), text, empty)
                for text, empty in zip(rows["texts"], rows["null"])
            )
        )

    def _null(self, positive: Embeddings) -> Embeddings:
        """The null caption of the weights, in place of each of the captions in `positive`."""
        guidance, count = self.config.guidance, len(positive.text)
        if guidance.null_text == "token":
            null = np.asarray(self.model.null_text[...])
        else:
            if self.text_encoder is None:
                raise UserError("this pipeline has no text encoder: give negative_embeddings.")
            self._null_text = self.text_encoder.null_text()[0] if self._null_text is None else self._null_text
            null = self._null_text
        mask = positive.mask
        if guidance.null_mask == "own":
            mask = np.ones((count, len(null)), bool)
        elif mask.shape[1] > len(null):
            raise UserError(
                f"embeddings have {mask.shape[1]} tokens, the null caption {len(null)}: truncate them."
            )
        text, mask = null_caption(guidance, null, mask)
        return Embeddings(np.broadcast_to(text, (*mask.shape, text.shape[1])), mask)

    # --- Other arguments of a program

    def _size_conditions(self, count: int, height: int, width: int) -> dict[str, np.ndarray]:
        ratio = height / width
        if self.config.guidance.aspect_ratio == "bucket":
            ratio = round(ratio, 2)  # the keys of the official tables
        return {
            "image_size": np.full((count, 2), (height, width), np.float32),
            "aspect_ratio": np.full((count, 1), ratio, np.float32),
        }


def _check_texts(name: str, texts: Any) -> None:
    """Raises a `UserError` unless `texts` is a text, a sequence of texts, or None."""
    if texts is None or isinstance(texts, str):
        return
    one = isinstance(texts, bytes) or not isinstance(texts, Iterable)
    wrong = [texts] if one else [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise UserError(f"{name}: {short(wrong[0], quote=True)} is not text; give a text or a list of texts.")
