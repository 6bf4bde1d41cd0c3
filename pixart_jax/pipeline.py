"""From prompts to images: a backbone with its text encoder, image codec and conventions.

Axes: P prompts, N images (prompt by prompt), S text tokens, T text width, h, w, C latent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from pixart_jax.config import DiffusionConfig, TextEncoderConfig, TrainConfig, from_dict, to_dict
from pixart_jax.diffusion.guidance import guide
from pixart_jax.diffusion.multistep import initial_noise
from pixart_jax.diffusion.samplers import SAMPLERS
from pixart_jax.encoders import Codec, TextEncoder, VAECodec, make_codec
from pixart_jax.errors import UserError, did_you_mean
from pixart_jax.loading import Weights, build_model, read_any
from pixart_jax.models.pixart import PixArt, PixArtConfig
from pixart_jax.sampling import image_keys
from pixart_jax.training.step import make_schedule
from pixart_jax.weights.files import read_json

OUTPUTS = ("images", "latents")
_PIPELINE_CLASSES = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")

# What the scheduler of a pipeline folder may ask of DPM-Solver++ here.
_SOLVER_VALUES = {
    "algorithm_type": ("dpmsolver++",),
    "beta_schedule": ("linear",),
    "final_sigmas_type": ("zero",),
    "lower_order_final": (True,),
    "euler_at_final": (False,),
    "prediction_type": ("epsilon",),
    "rescale_betas_zero_snr": (False,),
    "solver_type": ("midpoint",),
    "thresholding": (False,),
    "timestep_spacing": ("linspace",),
    "trained_betas": (None,),
    "use_beta_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_flow_sigmas": (False, None),
    "use_karras_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
}


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
    """

    def __init__(
        self,
        model: PixArt,
        config: TrainConfig,
        text_encoder: TextEncoder | None,
        codec: Codec,
        solver: Mapping[str, Any] | str | None = None,
    ):
        """Puts a pipeline together; `load_pipeline` does it from files.

        Args:
          model: the backbone.
          config: of the run that trained it, or what a file tells.
          text_encoder: for prompts and negative prompts.
          codec: for images.
          solver: arguments of `dpm_solver` that the weights come with; a text says why there can be none.
        """
        self.model, self.config = model, config
        self.text_encoder, self.codec = text_encoder, codec
        self._solver = solver or {}
        self._graph, self._params = nnx.split(model)
        self._compiled: dict[Any, Callable] = {}

    def __call__(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] = "",
        seed: int | Sequence[int] = 0,
        steps: int = 20,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        images_per_prompt: int = 1,
        batch_size: int = 4,
        sampler: str = "dpm_solver",
        sampler_options: Mapping[str, Any] | None = None,
        embeddings: Embeddings | None = None,
        negative_embeddings: Embeddings | None = None,
        latents: np.ndarray | None = None,
        output: str = "images",
    ) -> np.ndarray:
        """Draws `images_per_prompt` images for each prompt.

        Image k of a prompt has seed `seed + k`, whatever prompts are drawn beside it.

        Args:
          prompts: texts; None with `embeddings`.
          negative_prompt: what to guide away from, one text or one for each prompt; "" is the null caption
            the model was trained with.
          seed: of the first image of a prompt, one for all or one for each: of its starting noise, and of
            samplers that draw more.
          steps: model calls with each image.
          guidance_scale: 1 for none; None for the one stored with the weights.
          height, width: in pixels; None for the size the model was trained at.
          images_per_prompt: how many.
          batch_size: images at a time; the last batch is filled up.
          sampler: a name in `diffusion.samplers.SAMPLERS`.
          sampler_options: further arguments of it, such as {"order": 3}.
          embeddings: instead of prompts, as `encode` gives them.
          negative_embeddings: instead of `negative_prompt`, one for each prompt or one for all.
          latents: [N, h, w, C] standard normal noise to start from.
          output: 'images' or 'latents'.

        Returns:
          uint8 [N, height, width, 3]; or float32 latents [N, h, w, C] in the scale the model works in.

        Raises:
          UserError: an argument that does not fit, by its name.
        """
        height, width = self._size(height, width)
        if output not in OUTPUTS:
            raise UserError(
                f"output '{output}': choose 'images' or 'latents'.{did_you_mean(output, OUTPUTS)}"
            )
        for name, value in (
            ("images_per_prompt", images_per_prompt),
            ("batch_size", batch_size),
            ("steps", steps),
        ):
            if value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1.")
        options = self._options(sampler, sampler_options)
        scale = self.config.guidance.scale if guidance_scale is None else guidance_scale
        if (prompts is None) == (embeddings is None):
            raise UserError("give either prompts or embeddings.")
        if embeddings is None:
            embeddings = self.encode([prompts] if isinstance(prompts, str) else prompts)
        count = len(embeddings.text)
        if not count:
            raise UserError("there are 0 prompts: give at least one.")
        conditions = {"conditional": embeddings}
        if scale != 1:
            conditions["unconditional"] = self._negative(negative_prompt, negative_embeddings, embeddings)
        arrays = _as_rows(conditions, images_per_prompt)

        side = self.codec.downsampling
        shape = (height // side, width // side, self.model.config.in_channels)
        total = count * images_per_prompt
        arrays["keys"] = _image_keys(seed, count, images_per_prompt)
        if latents is not None:
            latents = np.asarray(latents, np.float32)
            if latents.shape != (total, *shape):
                raise UserError(f"latents are {latents.shape}: this call takes {(total, *shape)}.")
            arrays["noise"] = latents
        if self.model.config.size_conditions:
            arrays |= self._size_conditions(total, height, width)

        draw = self._sampler(shape, sampler, steps, options)
        result = _in_batches(
            lambda batch: draw(self._params, batch, jnp.float32(scale)), arrays, min(batch_size, total)
        )
        if output == "latents":
            return result
        return self.codec.decode(result / self.config.features.latent_scale)

    def encode(self, prompts: Sequence[str]) -> Embeddings:
        """Text features of prompts, each distinct one encoded once.

        Raises:
          UserError: this pipeline has no text encoder.
        """
        if self.text_encoder is None:
            raise UserError("this pipeline has no text encoder: give embeddings and negative_embeddings.")
        distinct = list(dict.fromkeys(prompts))
        first_cut = len(self.text_encoder.cut)
        text, lengths = self.text_encoder.encode(distinct)
        for cut in self.text_encoder.cut[first_cut:]:
            logging.warning(
                "prompt of %d tokens is cut to %d, without: %s", cut.tokens, text.shape[1], cut.removed
            )
        rows = [distinct.index(prompt) for prompt in prompts]
        mask = np.arange(text.shape[1]) < lengths[:, None]
        return Embeddings(text[rows], mask[rows])

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
        rows = _as_rows({"texts": self.encode(prompts), "null": null})
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
            length = len(null)
        else:
            if self.text_encoder is None:
                raise UserError("this pipeline has no text encoder: give negative_embeddings.")
            null, length = self.text_encoder.null_text()
        mask = positive.mask
        if guidance.null_mask == "own":
            mask = np.broadcast_to(np.arange(len(null)) < length, (count, len(null)))
        elif mask.shape[1] > len(null):
            raise UserError(
                f"embeddings have {mask.shape[1]} tokens, the null caption {len(null)}: cut them to that."
            )
        return Embeddings(np.broadcast_to(null[: mask.shape[1]], (*mask.shape, null.shape[1])), mask)

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        model = self.model.config
        step = model.patch_size * self.codec.downsampling
        sides = [model.base_size * step if side is None else side for side in (height, width)]
        for name, side in zip(("height", "width"), sides):
            if side < 1 or side % step:
                below = max(side // step, 1) * step
                raise UserError(
                    f"{name} is {side} px: it must be a multiple of {step}, such as {below} or "
                    f"{below + step}."
                )
        return sides[0], sides[1]

    def _size_conditions(self, count: int, height: int, width: int) -> dict[str, np.ndarray]:
        ratio = height / width
        if self.config.guidance.aspect_ratio == "bucket":
            ratio = round(ratio, 2)  # the keys of the official tables
        return {
            "image_size": np.full((count, 2), (height, width), np.float32),
            "aspect_ratio": np.full((count, 1), ratio, np.float32),
        }

    def _options(self, sampler: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
        if sampler not in SAMPLERS:
            raise UserError(
                f"sampler '{sampler}' is unknown: choose one of "
                f"{', '.join(SAMPLERS)}.{did_you_mean(sampler, SAMPLERS)}"
            )
        if sampler != "dpm_solver" or options is not None:
            return dict(options or {})
        if isinstance(self._solver, str):
            raise UserError(self._solver)
        return dict(self._solver)

    def _sampler(
        self, shape: tuple[int, int, int], sampler: str, steps: int, options: Mapping[str, Any]
    ) -> Callable[[Any, dict[str, Any], jax.Array], jax.Array]:
        """(parameters, arrays of a batch, guidance scale) -> latents, compiled once for each kind of call."""
        key = (shape, sampler, steps, tuple(sorted(options.items())))
        if key in self._compiled:
            return self._compiled[key]
        channels = self.config.guidance.channels
        schedule = make_schedule(self.config)

        @jax.jit
        def draw(params: Any, batch: dict[str, Any], scale: jax.Array) -> jax.Array:
            model = nnx.merge(self._graph, params)
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
            )
            start = batch["noise"] if "noise" in batch else initial_noise(batch["keys"], shape)
            return SAMPLERS[sampler](noise_fn, start, schedule, steps=steps, keys=batch["keys"], **options)

        self._compiled[key] = draw
        return draw


def load_pipeline(
    path: str | Path,
    *,
    weights: str | None = None,
    pipeline: str | Path | None = None,
    text_dtype: str | None = None,
    dtype: str | None = None,
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
      text_dtype, dtype: compute dtype of the text encoder and of the backbone; None for bfloat16 on
        accelerators and float32 on a CPU.
      overrides: see `loading.read_any`.

    Raises:
      UserError: see `loading.read_any`; a folder that is no pipeline, or whose parts do not fit each other.
    """
    default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    read = read_any(path, weights, dtype=dtype or default, **overrides)
    for note in read.notes:
        logging.warning("%s", note)
    model = read.config.model
    if not isinstance(model, PixArtConfig):
        raise UserError(f"'{path}' is a DiT, which reads classes and no text: train stage 2 from it.")
    folder = Path(pipeline) if pipeline is not None else Path(path)
    if pipeline is None and not (folder / "model_index.json").is_file():
        features = read.config.features
        encoder = dataclasses.replace(features.text_encoder, dtype=text_dtype or features.text_encoder.dtype)
        text_encoder = TextEncoder(encoder, model.text_length, batch_size=1)
        return _assemble(read, text_encoder, make_codec(features), {})
    kind = read_json(folder / "model_index.json").get("_class_name")
    if kind not in _PIPELINE_CLASSES:
        raise UserError(f"'{folder}' is a {kind}: give the folder of a {_PIPELINE_CLASSES[0]}.")
    encoder = TextEncoderConfig(
        tokenizer=str(folder / "tokenizer"),
        tokenizer_subfolder="",
        weights=str(folder / "text_encoder"),
        dtype=text_dtype or default,
    )
    text_encoder = TextEncoder(encoder, model.text_length, batch_size=1)
    codec = VAECodec(str(folder / "vae"), read.config.features.latent_scale, batch_size=1)
    diffusion, solver = _scheduler(folder, read.config)
    read = dataclasses.replace(read, config=dataclasses.replace(read.config, diffusion=diffusion))
    return _assemble(read, text_encoder, codec, solver)


def _assemble(
    read: Weights, text_encoder: TextEncoder, codec: Codec, solver: Mapping[str, Any] | str
) -> Pipeline:
    model = read.config.model
    if text_encoder.width != model.text_dim:
        raise UserError(
            f"the text encoder gives {text_encoder.width} features, the model takes {model.text_dim}: take "
            "the encoder it was trained with."
        )
    return Pipeline(build_model(read), read.config, text_encoder, codec, solver)


def _scheduler(folder: Path, config: TrainConfig) -> tuple[DiffusionConfig, dict[str, Any] | str]:
    """Noise schedule, and the arguments of `dpm_solver` that a pipeline folder asks for.

    Returns:
      the schedule; and the arguments, or a text that says why `dpm_solver` cannot follow them.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return config.diffusion, {}
    values = read_json(file)
    kind = values.get("_class_name", "DPMSolverMultistepScheduler")
    told = {
        "num_timesteps": values.get("num_train_timesteps", 1000),
        "beta_start": values.get("beta_start", 1e-4),
        "beta_end": values.get("beta_end", 0.02),
    }
    diffusion = from_dict({**to_dict(config.diffusion), **told}, DiffusionConfig, f"{file}: ")
    if kind != "DPMSolverMultistepScheduler":
        wrong = [f"_class_name {kind}"]
    else:
        wrong = [
            f"{name} {values[name]!r}"
            for name, known in _SOLVER_VALUES.items()
            if values.get(name, known[0]) not in known
        ]
    if wrong:
        return diffusion, (
            f"the scheduler of '{folder}' asks for {', '.join(wrong)}, which dpm_solver does not have: give "
            f"sampler_options ({{}} for its own defaults) or another sampler."
        )
    return diffusion, {"order": values.get("solver_order", 2), "spacing": "linspace"}


# --- Rows -------------------------------------------------------------------------------------------


def _image_keys(seed: int | Sequence[int], prompts: int, images: int) -> jax.Array:
    """[N] keys: image k of a prompt has that of its seed + k."""
    first = np.broadcast_to(np.asarray(seed), (prompts,))
    return image_keys((first[:, None] + np.arange(images)).ravel())


def _as_rows(conditions: Mapping[str, Embeddings], images: int = 1) -> dict[str, Any]:
    """One row of every embedding for each image, all of them padded to one length."""
    length = max(part.text.shape[1] for part in conditions.values())

    def rows(value: np.ndarray) -> np.ndarray:
        padding = [(0, 0), (0, length - value.shape[1])] + [(0, 0)] * (value.ndim - 2)
        return np.pad(value, padding).repeat(images, axis=0)

    return {name: tuple(rows(np.asarray(part)) for part in value) for name, value in conditions.items()}


def _in_batches(function: Callable[[Any], jax.Array], arrays: Any, size: int) -> np.ndarray:
    """Runs `function` on batches of one size, so that there is one compiled program."""
    count = len(jax.tree.leaves(arrays)[0])
    out = []
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        batch = jax.tree.map(lambda array, rows=rows: array[rows], arrays)
        out.append(np.asarray(function(batch))[: count - start])
    return np.concatenate(out)
