"""T5 and mT5 in Flax as the network of a `TextEncoder`.

It runs on all local devices: the batch is sharded over them, and the weights can be sharded too.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from pixart_jax.config import TextEncoderConfig
from pixart_jax.encoders.batches import local_sharding, round_up
from pixart_jax.errors import UserError
from pixart_jax.models.activations import encoding_bytes
from pixart_jax.models.layers import activation_sharding
from pixart_jax.models.quantization import T5_KEPT, kernels, quantize_parameters
from pixart_jax.models.t5 import T5Config, T5Encoder, abstract_t5
from pixart_jax.readers import read_json
from pixart_jax.weights.files import COPY, open_tensors
from pixart_jax.weights.hub import local_folder
from pixart_jax.weights.t5 import t5_table
from pixart_jax.weights.tables import import_parameters

# Width of T5-XXL, the text encoder that PixArt was trained with.
T5_XXL_WIDTH = 4096


class T5Network:
    """A T5 encoder on the local devices.

    Attributes:
      width: D.
      vocab_size: number of token ids.
      dtype: name of the compute dtype.
      batch_size: captions encoded at a time.
      bytes_per_device: size of the weights on one device while they are loaded.
      bytes_of_largest: size of the largest parameter in the compute dtype, if it is quantized; otherwise 0.
      host_bytes: memory of the host that the encoder takes while it is loaded, besides that of devices: 0.
      encoding_bytes: an estimate of the activations on one device.
    """

    host_bytes = 0

    def __init__(
        self,
        config: TextEncoderConfig,
        vocab_size: int,
        text_length: int,
        batch_size: int,
        sharded: bool,
    ):
        """Prepares the encoder; `load` reads its weights.

        Args:
          config: names the weights.
          vocab_size: size of the tokenizer's vocabulary, used with random weights.
          text_length: S, the length of the longest rows.
          batch_size: captions encoded at a time, rounded up to a multiple of the number of local devices.
          sharded: whether the weights are sharded, see `TextEncoder`.

        Raises:
          UserError: see `t5_config`; or the config scales the features.
        """
        if config.scale != 1:
            raise UserError(
                f"features.text_encoder.scale is {config.scale:g}, and '{config.weights}' is a T5, whose "
                "features are used as they are: leave it out."
            )
        t5 = t5_config(config, vocab_size)
        self.width, self.vocab_size, self.dtype = t5.d_model, t5.vocab_size, t5.dtype
        self._rows, _ = local_sharding()
        self.batch_size = round_up(batch_size, self._rows.mesh.size)
        self._config, self._tokens, self._params = config, vocab_size, None
        graph, abstract = nnx.split(abstract_t5(t5, config.weights_dtype))
        self._shardings = _text_shardings(self._rows.mesh, abstract, sharded)
        self.bytes_per_device = sum(
            math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf, sharding in zip(jax.tree.leaves(abstract), jax.tree.leaves(self._shardings))
        )
        quantized = (leaf.size for leaf in jax.tree.leaves(abstract) if leaf.dtype == jnp.int8)
        self.bytes_of_largest = max(quantized, default=0) * t5.compute_dtype.itemsize
        self.encoding_bytes = encoding_bytes(t5, self.batch_size // self._rows.mesh.size, text_length)

        @functools.partial(
            jax.jit, in_shardings=(self._shardings, self._rows, self._rows), out_shardings=self._rows
        )
        def encode(params: Any, token_ids: jax.Array, mask: jax.Array) -> jax.Array:
            # Constraining the activations to the batch axis makes XLA gather the weights of a layer instead
            # of splitting its matrix products, so that features do not depend on `sharded`.
            with activation_sharding(self._of_activations):
                return nnx.merge(graph, params)(token_ids, mask)

        self._encode = encode

    def load(self) -> None:
        """Loads the weights onto the devices, if they are not loaded yet.

        Raises:
          UserError: the weights cannot be found, or do not fit the config.
        """
        if self._params is None:
            self._params = jax.device_put(load_t5(self._config, self._tokens)[1], self._shardings)

    def release(self) -> None:
        """Frees the memory of the weights."""
        self._params = None

    def run(self, token_ids: np.ndarray, mask: np.ndarray) -> jax.Array:
        """Encodes a batch; the result may still be computed when this returns.

        Args:
          token_ids: [batch_size, L] int32.
          mask: [batch_size, L] bool.

        Returns:
          [batch_size, L, D] float32 on the devices.
        """
        self.load()
        return self._encode(self._params, *jax.device_put((token_ids, mask), self._rows))

    def _of_activations(self, axes: tuple[str | None, ...]) -> NamedSharding:
        spread = ("rows" if axis == "batch" else None for axis in axes)
        return NamedSharding(self._rows.mesh, PartitionSpec(*spread))


def _text_shardings(mesh: jax.sharding.Mesh, abstract: nnx.State, sharded: bool) -> dict[str, Any]:
    """The sharding of every weight, as a nested dict.

    With `sharded`, a weight is split along its 'embed' axis if the number of devices divides it.
    """

    def spread(axis: str | None, size: int) -> str | None:
        return "rows" if sharded and axis == "embed" and size % mesh.size == 0 else None

    shardings = {}
    for path, variable in nnx.to_flat_state(abstract):
        axes = variable.get_metadata().get("out_sharding") or ()
        spec = (spread(axis, size) for axis, size in zip(axes, variable.shape))
        shardings[path] = NamedSharding(mesh, PartitionSpec(*spec))
    return nnx.traversals.unflatten_mapping(shardings)


def t5_config(config: TextEncoderConfig, vocab_size: int) -> T5Config:
    """The T5 config of a text encoder.

    Args:
      config: its `weights` are a folder in HuggingFace's layout, or 'random'.
      vocab_size: size of the tokenizer's vocabulary, used with 'random'.

    Raises:
      UserError: the folder cannot be found, or does not hold a T5.
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
            "features.text_encoder.weights is empty: give a folder that holds a T5 encoder (config.json and "
            "safetensors), or 'random'."
        )
    folder = local_folder(config.weights, "features.text_encoder.weights")
    return T5Config.from_hf(read_json(folder / "config.json", COPY), dtype=config.dtype)


def load_t5(config: TextEncoderConfig, vocab_size: int) -> tuple[T5Config, Any]:
    """The T5 config of a text encoder and its parameters, on the host.

    They are in the compute dtype. With `config.weights_dtype` 'int8', each kernel is quantized as soon as it
    is read, so that the host never holds all of them in the compute dtype.

    Args: as `t5_config`.

    Raises:
      UserError: as `t5_config`, or the weights do not fit the config.
    """
    t5 = t5_config(config, vocab_size)
    if config.weights == "random":
        parameters = nnx.traversals.flatten_mapping(random_t5(t5, config.seed)).items()
    else:
        folder = local_folder(config.weights, "features.text_encoder.weights")
        parameters = import_parameters(t5_table(t5), open_tensors(folder), t5.compute_dtype)
    if config.weights_dtype == "int8":
        parameters = quantize_parameters(parameters, kernels(abstract_t5(t5, "auto"), T5_KEPT))
    return t5, nnx.traversals.unflatten_mapping(dict(parameters))


def random_t5(t5: T5Config, seed: int) -> dict[str, Any]:
    """Random parameters with the scales of `T5Encoder`, in the compute dtype, the same on every machine.

    The features of a token have norm sqrt(4096), as T5-XXL's have, whatever the width. PixArt's caption
    projection is initialized from N(0, 0.02) for features of that norm; smaller features would have little
    effect on the network.

    The numbers come from numpy's `RandomState`, whose stream is frozen, and not from `jax.random`, which
    compiles a program for every shape: that would take longer than encoding a small data set.
    """
    inner = t5.num_heads * t5.d_kv
    fan = {"embed": 1, "position_bias": t5.d_model, "q": t5.d_model * t5.d_kv, "o": inner, "wo": t5.d_ff}
    generator = np.random.RandomState(seed)

    def initialize(path: Any, leaf: Any) -> np.ndarray:
        name = path[-1].key
        if path[0].key == "final_norm":
            return np.full(leaf.shape, math.sqrt(T5_XXL_WIDTH / t5.d_model), t5.compute_dtype)
        if name == "scale":
            return np.ones(leaf.shape, t5.compute_dtype)
        values = generator.standard_normal(leaf.shape) * fan.get(name, t5.d_model) ** -0.5
        return values.astype(t5.compute_dtype)

    abstract = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: T5Encoder(t5, rngs=nnx.Rngs(0)))))
    return jax.tree_util.tree_map_with_path(initialize, abstract)
