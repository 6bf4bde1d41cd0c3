"""From prompts to images: a backbone with its text encoder, image codec and conventions.

Axes: P prompts, N images (prompt by prompt), S text tokens, T text width, h, w, C latent.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from flax import nnx

from pixart_jax.config import DiffusionConfig, TextEncoderConfig, TrainConfig
from pixart_jax.denoiser import null_caption
from pixart_jax.diffusion.samplers import SAMPLERS
from pixart_jax.encoders.images import Codec, VAECodec, make_codec
from pixart_jax.encoders.text import TextEncoder
from pixart_jax.errors import UserError, at_least, did_you_mean, one_of
from pixart_jax.models.dtypes import default_dtype
from pixart_jax.models.pixart import PixArt
from pixart_jax.pipeline.drawing import Drawer, Settings, Step, condition_rows, seed_rows
from pixart_jax.pipeline.editing import ImageSource, default_strength, edited_rows, resize_back
from pixart_jax.pipeline.scheduler import read_scheduler
from pixart_jax.pipeline.sizes import Size, choose_size
from pixart_jax.weights.files import read_json
from pixart_jax.weights.loading import Weights, build_model, read_any

OUTPUTS = ("images", "latents", "both")
_PIPELINE_CLASSES = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")

# Texts whose features a pipeline keeps, so that each is encoded once: 2 MB each at most with T5-XXL.
TEXTS_KEPT = 1024

# Arguments that every sampler has; `sampler_options` are the others.
_COMMON = ("fn", "x_T", "schedule", "steps", "keys", "init", "strength", "inpaint", "return_x0")


class Embeddings(NamedTuple):
    """Text features and the tokens of them that count."""

    text: np.ndarray  # [P, S, T]
    mask: np.ndarray  # [P, S], 1 for a token


class Pipeline:
    """Draws images for prompts.

        images = pipe(["a corgi reading"], seed=0, steps=20, guidance_scale=4.5, height=512, width=512)

    Attributes:
      model: the `PixArt`; `model.config` describes it.
      config: its conventions: guidance, noise schedule, latent scale.
      text_encoder: None where none was loaded; then prompts come as embeddings.
      codec: latents to images.
      drawer: the compiled programs, and the devices they run on.
      keep_text_encoder: False frees the text encoder's memory once the texts of a call are encoded.
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
    ):
        """Puts a pipeline together; `load_pipeline` does it from files.

        Args:
          model: the backbone.
          config: of the run that trained it, or what a file tells.
          text_encoder: for prompts and negative prompts.
          codec: for images.
          solver: arguments of `dpm_solver` that the weights come with; a text says why there can be none.
          devices: that the images are spread over; None for all local ones.
          keep_text_encoder: see the class.
        """
        self.config, self.text_encoder, self.codec = config, text_encoder, codec
        self.keep_text_encoder = keep_text_encoder
        self._solver = solver or {}
        self.drawer = Drawer(model, config, devices)
        # The drawer's arrays, so that no device holds the weights twice.
        self.model = nnx.merge(self.drawer.graph, self.drawer.params)
        self._features: dict[str, np.ndarray] = {}  # [L, T] of each text, its tokens alone
        self._null_text: np.ndarray | None = None

    def __call__(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] = "",
        seed: int | Sequence[int] = 0,
        steps: int = 20,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: str | None = None,
        binning: bool = True,
        images_per_prompt: int = 1,
        batch_size: int | None = None,
        sampler: str = "dpm_solver",
        sampler_options: Mapping[str, Any] | None = None,
        image: ImageSource | Sequence[ImageSource] | None = None,
        mask: ImageSource | Sequence[ImageSource] | None = None,
        strength: float | None = None,
        embeddings: Embeddings | None = None,
        negative_embeddings: Embeddings | None = None,
        latents: np.ndarray | None = None,
        output: str = "images",
        callback: Callable[[Step], None] | None = None,
        progress: bool = False,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Draws `images_per_prompt` images for each prompt.

        Image k of a prompt has seed `seed + k`, whatever prompts are drawn beside it. On CPUs it has the same
        bits in any batch and on any number of devices; elsewhere with the same `batch_size`.

        Args:
          prompts: texts; None with `embeddings`.
          negative_prompt: what to guide away from, one text or one for each prompt; "" is the null caption
            the model was trained with.
          seed: of the first image of a prompt, one for all or one for each: of its starting noise, and of
            samplers that draw more.
          steps: model calls with each image.
          guidance_scale: 1 for none; None for the one stored with the weights.
          guidance_interval: (low, high) timesteps, 0 .. 999, that are guided; None for all.
          guidance_rescale: 0 .. 1, how far guided noise is brought back to the spread of the unguided.
          height, width: in pixels; None for the size the model was trained at.
          aspect_ratio: 'WIDTH:HEIGHT' in place of both.
          binning: draw at the nearest bucket and resize back; False draws at height x width itself.
          images_per_prompt: how many.
          batch_size: images a device draws at a time, the last batch filled up; None for as many as there
            are, at most 4. A CPU draws one by one.
          sampler: a name in `diffusion.samplers.SAMPLERS`.
          sampler_options: further arguments of it, such as {"order": 3}.
          image: to start from (image to image), or that `mask` is for: a file or uint8 [H, W, 3], one for all
            or a list with one for each prompt. Resized and cropped to the size that is drawn.
          mask: what is redrawn (inpainting): a file, light there, or [H, W]. As large as its image.
          strength: in (0, 1], the part of the steps that is run from `image`; None for 0.8, and for 1 with a
            mask.
          embeddings: instead of prompts, as `encode` gives them.
          negative_embeddings: instead of `negative_prompt`, one for each prompt or one for all.
          latents: [N, h, w, C] standard normal noise to start from.
          output: 'images', 'latents' or 'both'.
          callback: told a `Step` after every model call, while the device goes on: it must be short, and must
            not run JAX. Compiles a program of its own.
          progress: show a bar that counts images.

        Returns:
          uint8 [N, height, width, 3]; or float32 latents [N, h, w, C] in the scale the model works in; or
          both as a pair.

        Raises:
          UserError: an argument that does not fit, by its name.
        """
        one_of("output", output, OUTPUTS)
        for name, value in (("images_per_prompt", images_per_prompt), ("batch_size", batch_size)):
            if value is not None:
                at_least(name, value, 1)
        if strength is not None and image is None:
            raise UserError(f"strength is {strength}, and there is no image to start from: give one.")
        size, settings = self.settings(
            steps=steps,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
            height=height,
            width=width,
            aspect_ratio=aspect_ratio,
            binning=binning,
            sampler=sampler,
            sampler_options=sampler_options,
            strength=default_strength(image, mask) if strength is None else strength,
        )
        scale = self.config.guidance.scale if guidance_scale is None else guidance_scale
        if (prompts is None) == (embeddings is None):
            raise UserError("give either prompts or embeddings.")
        prompts = [prompts] if isinstance(prompts, str) else prompts
        count = len(embeddings.text) if prompts is None else len(prompts)
        if not count:
            raise UserError("there are 0 prompts: give at least one.")
        arrays = {"seeds": seed_rows(seed, count, images_per_prompt)}
        conditions = self._conditions(
            prompts, embeddings, negative_prompt, negative_embeddings, guided=scale != 1
        )
        arrays |= condition_rows(conditions, images_per_prompt)

        shape = settings.shape
        total = count * images_per_prompt
        if latents is not None:
            latents = np.asarray(latents, np.float32)
            if latents.shape != (total, *shape):
                raise UserError(f"latents are {latents.shape}: this call takes {(total, *shape)}.")
            arrays["noise"] = latents
        if self.model.config.size_conditions:
            arrays |= self._size_conditions(total, size.height, size.width)
        edited = edited_rows(image, mask, count, size, self.codec, shape[2])
        if edited:
            edited["init"] *= self.config.features.latent_scale
        arrays |= {name: rows.repeat(images_per_prompt, axis=0) for name, rows in edited.items()}

        settings = dataclasses.replace(settings, watched=callback is not None)
        drawn = self.drawer(
            settings, arrays, scale, batch_size=batch_size, callback=callback, progress=progress
        )
        if output == "latents":
            return drawn
        images = resize_back(self.decode(drawn), size.out_height, size.out_width)
        return images if output == "images" else (images, drawn)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents [N, h, w, C] in the scale the model works in -> uint8 [N, H, W, 3]."""
        return self.codec.decode(np.asarray(latents) / self.config.features.latent_scale)

    def settings(
        self,
        *,
        steps: int = 20,
        guidance_interval: Sequence[float] | None = None,
        guidance_rescale: float = 0.0,
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: str | None = None,
        binning: bool = True,
        sampler: str = "dpm_solver",
        sampler_options: Mapping[str, Any] | None = None,
        strength: float = 1.0,
    ) -> tuple[Size, Settings]:
        """The size and the program of a call with these arguments, checked; nothing is drawn.

        Raises:
          UserError: an argument that does not fit, by its name.
        """
        at_least("steps", steps, 1)
        model, step = self.model.config, self.model.config.patch_size * self.codec.downsampling
        # The tables of whoever reads the aspect ratio: the key of the official one, or as diffusers.
        bins = "official" if self.config.guidance.aspect_ratio == "bucket" else "diffusers"
        size = choose_size(
            height, width, aspect_ratio, base=model.base_size * step, step=step, bins=bins, binning=binning
        )
        settings = Settings(
            self.latent_shape(size),
            sampler,
            steps,
            self._options(sampler, sampler_options),
            interval=None if guidance_interval is None else tuple(guidance_interval),
            rescale=guidance_rescale,
            strength=strength,
        )
        self.drawer.check(settings)
        return size, settings

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """(h, w, C)."""
        side = self.codec.downsampling
        return size.height // side, size.width // side, self.model.config.in_channels

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells weights apart: a hash over the start of every parameter of the backbone."""
        digest = hashlib.sha256()
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.drawer.params):
            # A training step changes all of them everywhere.
            values = np.asarray(leaf.addressable_data(0)).reshape(-1)[:256]
            digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape}".encode() + values.tobytes())
        return digest.hexdigest()[:16]

    # --- Texts

    def encode(self, prompts: Sequence[str]) -> Embeddings:
        """Text features of prompts; each distinct one is encoded once, also over several calls.

        Raises:
          UserError: this pipeline has no text encoder.
        """
        if self.text_encoder is None:
            raise UserError("this pipeline has no text encoder: give embeddings and negative_embeddings.")
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._features]
        first_cut = len(self.text_encoder.cut)
        for i, valid in self.text_encoder.encode_each(new):
            self._features[new[i]] = valid
        for cut in self.text_encoder.cut[first_cut:]:
            logging.warning(
                "prompt of %d tokens is cut to %d, without: %s",
                cut.tokens,
                self.text_encoder.text_length,
                cut.removed,
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
        """Encodes the texts of coming calls at once, so that the text encoder is loaded once for all of them.

        Returns:
          features of the prompts, and of what they are guided away from.
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

    def _negative(
        self, prompt: str | Sequence[str], given: Embeddings | None, positive: Embeddings
    ) -> Embeddings:
        """What the guidance leads away from, one for each prompt."""
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
        # A text has its own features and tokens, whatever stands in for no text at all.
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
                f"embeddings have {mask.shape[1]} tokens, the null caption {len(null)}: cut them to that."
            )
        text, mask = null_caption(guidance, null, mask)
        return Embeddings(np.broadcast_to(text, (*mask.shape, text.shape[1])), mask)

    # --- What else a program reads

    def _size_conditions(self, count: int, height: int, width: int) -> dict[str, np.ndarray]:
        ratio = height / width
        if self.config.guidance.aspect_ratio == "bucket":
            ratio = round(ratio, 2)  # the keys of the official tables
        return {
            "image_size": np.full((count, 2), (height, width), np.float32),
            "aspect_ratio": np.full((count, 1), ratio, np.float32),
        }

    def _options(self, sampler: str, options: Mapping[str, Any] | None) -> tuple[tuple[str, Any], ...]:
        one_of("sampler", sampler, SAMPLERS)
        if sampler == "dpm_solver" and options is None:
            if isinstance(self._solver, str):
                raise UserError(self._solver)
            options = self._solver
        known = [name for name in inspect.signature(SAMPLERS[sampler]).parameters if name not in _COMMON]
        for name in options or {}:
            if name not in known:
                raise UserError(
                    f"sampler_options: {sampler} has no '{name}', only {', '.join(known) or 'none'}."
                    f"{did_you_mean(name, known)}"
                )
        hashable = ((name, _frozen(value)) for name, value in (options or {}).items())
        return tuple(sorted(hashable))


def load_pipeline(
    path: str | Path,
    *,
    weights: str | None = None,
    pipeline: str | Path | None = None,
    text_dtype: str | None = None,
    dtype: str | None = None,
    devices: Sequence[jax.Device] | None = None,
    keep_text_encoder: bool = True,
    **overrides: Any,
) -> Pipeline:
    """Loads a backbone with its text encoder, VAE, tokenizer and scheduler settings.

        pipe = load_pipeline("PixArt-XL-2-512x512")                              # a diffusers pipeline folder
        pipe = load_pipeline("runs/finetune", pipeline="PixArt-XL-2-512x512")    # own weights, its encoders

    Args:
      path: the folder of a diffusers pipeline, or whatever `loading.read_any` takes.
      weights: 'ema' or 'raw', where there are both.
      pipeline: the pipeline folder that text encoder, VAE, tokenizer and scheduler come from; None for `path`
        itself or, where that is no pipeline, for those its config names.
      text_dtype, dtype: compute dtype of the text encoder and of the backbone; None for
        `models.dtypes.default_dtype`: float32 on a CPU, float16 on NVIDIA GPUs without bfloat16 (T4, V100),
        otherwise bfloat16. The text encoder of a run keeps the dtype of its config where the device has it.
        The VAE computes in float32.
      devices: that the images are spread over; None for all local ones.
      keep_text_encoder: False frees its memory once the texts of a call are encoded.
      overrides: see `loading.read_any`.

    Raises:
      UserError: see `loading.read_any`; a folder that is no pipeline, or whose parts do not fit each other.
    """
    default = default_dtype().dtype
    read = read_any(path, weights, dtype=dtype or default, **overrides)
    for note in read.notes:
        logging.warning("%s", note)
    model = read.config.model
    if "text" not in model.conditions:
        raise UserError(f"'{path}' is a DiT, which reads classes and no text: train stage 2 from it.")
    assemble = functools.partial(_assemble, read, devices=devices, keep_text_encoder=keep_text_encoder)
    folder = Path(pipeline) if pipeline is not None else Path(path)
    if pipeline is None and not (folder / "model_index.json").is_file():
        features = read.config.features
        of_run = features.text_encoder.dtype
        of_run = default if (of_run, default) == ("bfloat16", "float16") else of_run
        encoder = dataclasses.replace(features.text_encoder, dtype=text_dtype or of_run)
        return assemble(encoder, make_codec(features, batch_size=1), {})
    kind = read_json(folder / "model_index.json").get("_class_name")
    if kind not in _PIPELINE_CLASSES:
        raise UserError(f"'{folder}' is a {kind}: give the folder of a {_PIPELINE_CLASSES[0]}.")
    encoder = TextEncoderConfig(
        tokenizer=str(folder / "tokenizer"),
        tokenizer_subfolder="",
        weights=str(folder / "text_encoder"),
        dtype=text_dtype or default,
    )
    codec = VAECodec(str(folder / "vae"), read.config.features.latent_scale, batch_size=1)
    diffusion, solver = read_scheduler(folder, read.config)
    return assemble(encoder, codec, solver, diffusion=diffusion)


def _assemble(
    read: Weights,
    encoder: TextEncoderConfig,
    codec: Codec,
    solver: Mapping[str, Any] | str,
    *,
    diffusion: DiffusionConfig | None = None,
    **kwargs: Any,
) -> Pipeline:
    config = dataclasses.replace(read.config, diffusion=diffusion or read.config.diffusion)
    model = config.model
    text_encoder = TextEncoder(encoder, model.text_length, batch_size=1, sharded=True, load=False)
    if text_encoder.width != model.text_dim:
        raise UserError(
            f"the text encoder gives {text_encoder.width} features, the model takes {model.text_dim}: take "
            "the encoder it was trained with."
        )
    return Pipeline(build_model(read), config, text_encoder, codec, solver, **kwargs)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
