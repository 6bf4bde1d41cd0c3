"""From captions to text features and from images to latents, and back to images.

`precompute`, `sample` and `evaluate` all encode through these classes, so that a prompt and a training
caption meet the same cleaning, tokenizer, cut and padding. Both encoders run on all local devices, the batch
spread over them; the weights of the text encoder can be spread too.

Axes: n captions or images, S text_length, D text width, L valid tokens; H, W pixels, h, w, C latent.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pixart_jax.config import FeaturesConfig, TextEncoderConfig
from pixart_jax.data.captions import prepare_caption
from pixart_jax.errors import UserError
from pixart_jax.models.layers import activation_sharding
from pixart_jax.models.t5 import T5Config, T5Encoder
from pixart_jax.models.vae import VAE, VAEConfig
from pixart_jax.weights.files import open_tensors, read_json
from pixart_jax.weights.tables import import_tensors, t5_table, vae_table

# Lengths are padded to multiples of this: few programs are compiled, and little is computed for nothing.
LENGTH_STEP = 16
TEXT_BATCH = 64
IMAGE_BATCH = 16


def local_sharding() -> tuple[NamedSharding, NamedSharding]:
    """(rows spread over the devices of this process, whole on each of them)."""
    devices = jax.local_devices()
    mesh = jax.make_mesh((len(devices),), ("rows",), axis_types=(AxisType.Auto,), devices=devices)
    return NamedSharding(mesh, PartitionSpec("rows")), NamedSharding(mesh, PartitionSpec())


def round_up(count: int, multiple: int) -> int:
    """The least multiple that is at least count."""
    return -(-count // multiple) * multiple


# ---------------------------------------------------------------------------------------------------- text


@dataclasses.dataclass(frozen=True)
class CutCaption:
    """A caption that was longer than S tokens.

    Attributes:
      caption: as it was given.
      removed: the text of the tokens that were cut off.
      tokens: its length before the cut.
    """

    caption: str
    removed: str
    tokens: int


class TextEncoder:
    """Tokenizer and T5 encoder.

    Attributes:
      text_length: S.
      width: D.
      t5: shape of the encoder.
      bytes_per_device: of the weights while they are loaded.
      rows_per_device: captions a device encodes at a time.
      cut: `CutCaption`s so far, one for each caption that was encoded.
    """

    def __init__(
        self,
        config: TextEncoderConfig,
        text_length: int,
        batch_size: int = TEXT_BATCH,
        *,
        sharded: bool = False,
        load: bool = True,
    ):
        """Loads the tokenizer and the weights.

        Args:
          config: who encodes.
          text_length: S, the most tokens of a caption, its end token included.
          batch_size: captions at a time, rounded up to a multiple of the local devices.
          sharded: spread the weights over the local devices, each layer gathered when it runs: T5-XXL's
            9.5 GB then fit eight devices of 16 GB beside everything else. False holds them whole on each,
            which is faster where many captions are encoded.
          load: False leaves the weights for `load`, or the first caption.

        Raises:
          UserError: a tokenizer or weights that are not there, or do not fit each other.
        """
        self.text_length = text_length
        self._clean = config.clean_caption
        self._tokenizer = load_tokenizer(config)
        t5 = t5_config(config, len(self._tokenizer))
        if t5.vocab_size < len(self._tokenizer):
            raise UserError(
                f"tokenizer '{config.tokenizer}' has {len(self._tokenizer)} tokens, the text encoder "
                f"'{config.weights}' only {t5.vocab_size}: give the tokenizer that belongs to it."
            )
        self.width = t5.d_model
        self.cut: list[CutCaption] = []
        self._rows, _ = local_sharding()
        self._batch_size = round_up(batch_size, self._rows.mesh.size)
        self.rows_per_device = self._batch_size // self._rows.mesh.size
        self.t5, self._config, self._params = t5, config, None
        graph, abstract = nnx.split(nnx.eval_shape(lambda: T5Encoder(t5, rngs=nnx.Rngs(0))))
        self._shardings = _text_shardings(self._rows.mesh, abstract, sharded)
        self.bytes_per_device = sum(
            math.prod(sharding.shard_shape(leaf.shape)) * t5.compute_dtype.itemsize
            for leaf, sharding in zip(jax.tree.leaves(abstract), jax.tree.leaves(self._shardings))
        )

        @functools.partial(
            jax.jit, in_shardings=(self._shardings, self._rows, self._rows), out_shardings=self._rows
        )
        def encode(params: Any, token_ids: jax.Array, mask: jax.Array) -> jax.Array:
            # Captions stay where they are: weights are gathered, and no sum is split over devices.
            with activation_sharding(self._of_activations):
                return nnx.merge(graph, params)(token_ids, mask)

        self._encode = encode
        if load:
            self.load()

    def load(self) -> None:
        """Reads the weights onto the devices, where they are not there yet.

        Raises:
          UserError: weights that are not there, or do not fit.
        """
        if self._params is None:
            self._params = jax.device_put(load_t5(self._config, len(self._tokenizer))[1], self._shardings)

    def release(self) -> None:
        """Frees the memory of the weights; the next caption loads them again."""
        self._params = None

    def _of_activations(self, axes: tuple[str | None, ...]) -> NamedSharding:
        spread = ("rows" if axis == "batch" else None for axis in axes)
        return NamedSharding(self._rows.mesh, PartitionSpec(*spread))

    def tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        """Cleans captions and turns them into at most S token ids, the end token kept; counts cuts.

        Args:
          captions: any texts.

        Returns:
          For each caption the ids of its valid tokens, at least the end token.
        """
        if not captions:
            return []
        texts = [prepare_caption(caption, self._clean) for caption in captions]
        whole = self._tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        out = []
        for caption, ids in zip(captions, whole):
            if len(ids) > self.text_length:
                removed = self._tokenizer.decode(ids[self.text_length - 1 : -1])
                self.cut.append(CutCaption(caption, removed, len(ids)))
                ids = [*ids[: self.text_length - 1], ids[-1]]
            out.append(ids)
        return out

    def encode_each(self, captions: Sequence[str]) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (position in `captions`, features of its valid tokens, float32 [L, D]), shortest first.

        A batch holds captions that are padded to one length, their own rounded up, so that the features of a
        caption do not depend on which others are encoded beside it. While one batch is computed the one
        before is handed out.
        """
        ids = self.tokenize(captions)

        def padded(i: int) -> int:
            return min(round_up(len(ids[i]), LENGTH_STEP), self.text_length)

        order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
        batches = [
            (length, same[start : start + self._batch_size])
            for length, group in itertools.groupby(order, padded)
            for same in [list(group)]
            for start in range(0, len(same), self._batch_size)
        ]
        waiting = None
        for length, part in batches:
            features = self._run([ids[i] for i in part], length)
            if waiting is not None:
                yield from self._valid(*waiting, ids)
            waiting = part, features
        if waiting is not None:
            yield from self._valid(*waiting, ids)

    def encode(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes captions at their full width.

        Args:
          captions: n texts.

        Returns:
          features float32 [n, S, D], 0 past each caption's end, and lengths int32 [n].
        """
        features = np.zeros((len(captions), self.text_length, self.width), np.float32)
        lengths = np.zeros(len(captions), np.int32)
        for i, valid in self.encode_each(captions):
            features[i, : len(valid)] = valid
            lengths[i] = len(valid)
        return features, lengths

    def null_text(self) -> tuple[np.ndarray, int]:
        """What diffusers guides away from: the output for "" with its own mask.

        Returns:
          features float32 [S, D] at all positions, the padding's too, and the tokens of "".
        """
        ids = self.tokenize([""])
        return np.asarray(self._run(ids, self.text_length))[0], len(ids[0])

    def _run(self, ids: list[list[int]], length: int) -> jax.Array:
        """[rows, length, D] on the devices; rows past `ids` are repeats of the first."""
        token_ids = np.full((self._batch_size, length), self._tokenizer.pad_token_id, np.int32)
        mask = np.zeros((self._batch_size, length), bool)
        for row in range(self._batch_size):
            caption = ids[row if row < len(ids) else 0]
            token_ids[row, : len(caption)] = caption
            mask[row, : len(caption)] = True
        self.load()
        return self._encode(self._params, *jax.device_put((token_ids, mask), self._rows))

    @staticmethod
    def _valid(
        part: list[int], features: jax.Array, ids: list[list[int]]
    ) -> Iterator[tuple[int, np.ndarray]]:
        values = np.asarray(features)
        for row, i in enumerate(part):
            yield i, values[row, : len(ids[i])]


def _text_shardings(mesh: jax.sharding.Mesh, abstract: nnx.State, sharded: bool) -> dict[str, Any]:
    """The sharding of every weight, as a nested dict: along its 'embed' axis where the devices divide it."""

    def spread(axis: str | None, size: int) -> str | None:
        return "rows" if sharded and axis == "embed" and size % mesh.size == 0 else None

    shardings = {}
    for path, variable in nnx.to_flat_state(abstract):
        axes = variable.get_metadata().get("out_sharding") or ()
        spec = (spread(axis, size) for axis, size in zip(axes, variable.shape))
        shardings[path] = NamedSharding(mesh, PartitionSpec(*spec))
    return nnx.traversals.unflatten_mapping(shardings)


def load_tokenizer(config: TextEncoderConfig) -> Any:
    """Opens a tokenizer: 'byt5' (bytes), a folder, or a name on the HuggingFace hub.

    Raises:
      UserError: it is not there and cannot be fetched.
    """
    # Imported here: it takes seconds, and only text needs it.
    import transformers

    if config.tokenizer == "byt5":
        return transformers.ByT5Tokenizer()
    name, subfolder = config.tokenizer, config.tokenizer_subfolder
    # A folder may be the repository or the tokenizer itself.
    if Path(name).is_dir() and not (Path(name) / subfolder).is_dir():
        subfolder = ""
    try:
        return transformers.AutoTokenizer.from_pretrained(name, subfolder=subfolder)
    # Whatever the hub, the file formats and their optional packages raise, the user's remedy is the same.
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"tokenizer '{name}'{f' (subfolder {subfolder!r})' if subfolder else ''} cannot be opened "
            f"({reason}): give a folder or a HuggingFace name in features.text_encoder.tokenizer, or 'byt5'."
        ) from None


def t5_config(config: TextEncoderConfig, vocab_size: int) -> T5Config:
    """The shape of a config's encoder.

    Args:
      config: `weights` is a folder in HuggingFace's layout, or 'random'.
      vocab_size: of the tokenizer, for 'random'.

    Raises:
      UserError: no such folder, or a folder that holds no T5.
    """
    if config.weights == "random":
        return T5Config(
            vocab_size=vocab_size,
            d_model=config.d_model,
            d_ff=config.d_ff,
            d_kv=config.d_kv,
            num_heads=config.num_heads,
            num_layers=config.num_layers,
            dtype=config.dtype,
        )
    if not config.weights:
        raise UserError(
            "features.text_encoder.weights is empty: give a folder with a T5 encoder (config.json and "
            "safetensors), or 'random'."
        )
    folder = _folder(config.weights, "features.text_encoder.weights")
    return T5Config.from_hf(read_json(folder / "config.json"), dtype=config.dtype)


def load_t5(config: TextEncoderConfig, vocab_size: int) -> tuple[T5Config, Any]:
    """The encoder of a config: its shape and its parameters, in the compute dtype, on the host.

    Args, Raises: as `t5_config`; and weights that do not fit the shape.
    """
    t5 = t5_config(config, vocab_size)
    if config.weights == "random":
        return t5, random_t5(t5, config.seed)
    folder = _folder(config.weights, "features.text_encoder.weights")
    return t5, import_tensors(t5_table(t5), open_tensors(folder), t5.compute_dtype)


T5_XXL_WIDTH = 4096


def random_t5(t5: T5Config, seed: int) -> dict[str, Any]:
    """Parameters drawn as `T5Encoder` draws them, in the compute dtype, the same on every machine.

    Its features have the norm that T5-XXL's would have, sqrt(4096) a token, whatever the width: the caption
    projection of a PixArt starts from N(0, 0.02), which is made for that and lets little of less through.

    On the host, with a generator whose stream numpy has frozen: `jax.random` compiles a program for every
    shape, which takes longer than all the encoding of a small set.
    """
    inner = t5.num_heads * t5.d_kv
    fan = {"embed": 1, "position_bias": t5.d_model, "q": t5.d_model * t5.d_kv, "o": inner, "wo": t5.d_ff}
    generator = np.random.RandomState(seed)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        name = path[-1].key
        if path[0].key == "final_norm":
            return np.full(leaf.shape, math.sqrt(T5_XXL_WIDTH / t5.d_model), t5.compute_dtype)
        if name == "scale":
            return np.ones(leaf.shape, t5.compute_dtype)
        values = generator.standard_normal(leaf.shape) * fan.get(name, t5.d_model) ** -0.5
        return values.astype(t5.compute_dtype)

    abstract = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: T5Encoder(t5, rngs=nnx.Rngs(0)))))
    return jax.tree_util.tree_map_with_path(draw, abstract)


def load_vae(folder: Path) -> tuple[VAEConfig, Any]:
    """A VAE's shape and its float32 parameters, from a folder in diffusers' layout.

    Raises:
      UserError: not an AutoencoderKL, or an incomplete one.
    """
    vae = VAEConfig.from_hf(read_json(folder / "config.json"))
    return vae, import_tensors(vae_table(vae), open_tensors(folder))


def _folder(name: str, field: str) -> Path:
    """A local folder, or the copy of a HuggingFace repository that is fetched once."""
    if Path(name).is_dir():
        return Path(name)
    try:
        import huggingface_hub

        return Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    # Not a name, no such repository, no network, no package: the user's remedy is the same.
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"{field} is '{name}': no such folder, and HuggingFace does not give it ({reason}); give a "
            "folder in HuggingFace's layout."
        ) from None


# --------------------------------------------------------------------------------------------------- images


class Codec(Protocol):
    """Images to what the diffusion model works on, and back.

    Attributes:
      latent_scale: factor from unscaled latents to what the model sees.
      downsampling: pixels per latent position, along each side.
    """

    latent_scale: float
    downsampling: int

    def latent_shape(self, height: int, width: int, channels: int) -> tuple[int, int, int]:
        """(h, w, C) for an image of height x width pixels with the given colour channels."""

    def encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """uint8 [n, H, W, channels] -> unscaled posterior mean and std, or pixels as they are and None."""

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Unscaled latents [n, h, w, C] -> uint8 [n, H, W, channels]."""


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[-1, 1] -> 0 .. 255: rounded, and clipped beyond the ends."""
    return np.rint((np.asarray(images, np.float32).clip(-1, 1) + 1) * 127.5).astype(np.uint8)


class PixelCodec:
    """Latents are the pixels, x / 127.5 - 1."""

    downsampling = 1

    def __init__(self, latent_scale: float = 1.0):
        self.latent_scale = latent_scale

    def latent_shape(self, height: int, width: int, channels: int) -> tuple[int, int, int]:
        return height, width, channels

    def encode(self, images: np.ndarray) -> tuple[np.ndarray, None]:
        return images, None

    def decode(self, latents: np.ndarray) -> np.ndarray:
        return to_uint8(latents)


class VAECodec:
    """The VAE of Stable Diffusion or SDXL, on all local devices.

    Attributes:
      config: its shape.
      images_per_device: that it takes at a time.
      bytes_per_device: of its weights.
    """

    def __init__(self, folder: str, latent_scale: float, batch_size: int = IMAGE_BATCH):
        """Loads the weights.

        Args:
          folder: in diffusers' layout, or a HuggingFace name.
          latent_scale: as `Codec`.
          batch_size: images at a time, rounded up to a multiple of the local devices.

        Raises:
          UserError: no such VAE.
        """
        self.latent_scale = latent_scale
        vae, params = load_vae(_folder(folder, "features.vae"))
        self.downsampling, self._channels = vae.downscale, vae.latent_channels
        self._rows, whole = local_sharding()
        self._batch_size = round_up(batch_size, self._rows.mesh.size)
        self.config = vae
        self.images_per_device = self._batch_size // self._rows.mesh.size
        self.bytes_per_device = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        self._params = jax.device_put(params, whole)
        graph = nnx.graphdef(nnx.eval_shape(lambda: VAE(vae, rngs=nnx.Rngs(0))))
        jit = functools.partial(jax.jit, in_shardings=(whole, self._rows), out_shardings=self._rows)
        self._encode = jit(lambda params, x: nnx.merge(graph, params).encode(x))
        self._decode = jit(lambda params, z: nnx.merge(graph, params).decode(z))

    def latent_shape(self, height: int, width: int, channels: int) -> tuple[int, int, int]:
        if channels != 3:
            raise UserError(
                f"features.codec is 'vae' and the images have {channels} channels: a VAE takes 3."
            )
        return height // self.downsampling, width // self.downsampling, self._channels

    def encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scaled = np.asarray(images, np.float32) / np.float32(127.5) - 1
        mean, std = self._batched(self._encode, scaled)
        return mean, std

    def decode(self, latents: np.ndarray) -> np.ndarray:
        return to_uint8(self._batched(self._decode, np.asarray(latents, np.float32)))

    def _batched(self, function: Callable[[Any, jax.Array], Any], values: np.ndarray) -> Any:
        """Runs a function in batches of one size, the last one filled up with repeats."""
        out = []
        for start in range(0, len(values), self._batch_size):
            rows = np.minimum(np.arange(start, start + self._batch_size), len(values) - 1)
            result = function(self._params, jax.device_put(values[rows], self._rows))
            kept = len(values) - start
            out.append(jax.tree.map(lambda leaf, kept=kept: np.asarray(leaf)[:kept], result))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *out)


def make_codec(config: FeaturesConfig, batch_size: int = IMAGE_BATCH) -> Codec:
    """The codec of a config.

    Args:
      config: of the features.
      batch_size: images that a VAE takes at a time.

    Raises:
      UserError: a VAE that is not there.
    """
    if config.codec == "pixels":
        return PixelCodec(config.latent_scale)
    return VAECodec(config.vae, config.latent_scale, batch_size)
