"""Measures what weights in int8 change: text features of T5-XXL, the output of PixArt-XL/2, and the memory.

    python benchmarks/int8_weights.py                           # random weights
    python benchmarks/int8_weights.py --pipeline=PixArt-XL-2-512x512 --out=real.json

Errors are relative root mean square errors, compared with the weights in float32. Everything is computed in
float32, so that they come from the weights alone; rounding the weights to bfloat16 is measured for
comparison. T5 runs block by block, so that it needs the memory of one block.

Random weights come in two kinds. `normal`: the kernels are N(0, 1 / inputs). `uneven`: the input channels of
every kernel also differ in size, by factors exp(n / 2), n ~ N(0, 1), so that a few inputs have much larger
weights than the others; and 8 channels of every norm of T5 are 20 times larger, as released T5s have a few
very large channels. With --pipeline (a local diffusers folder), the released weights are used.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from pixart_jax.config import TextEncoderConfig, TrainConfig
from pixart_jax.encoders.text import load_tokenizer
from pixart_jax.models.configs import PixArtConfig
from pixart_jax.models.quantization import SCALE, T5_KEPT, kernels, quantize_blocks, quantize_parameters
from pixart_jax.models.t5 import T5Config, T5Encoder
from pixart_jax.readers import read_json
from pixart_jax.weights.files import COPY, open_tensors
from pixart_jax.weights.loading import Weights, build_model, read_any
from pixart_jax.weights.t5 import t5_table

CAPTIONS = (
    "a corgi reading a newspaper on a wooden bench in the park, morning light",
    "An old harbour at dusk. Fishing boats lie in still water, and lanterns glow along the quay.",
)
TOKENS = 32
LARGE_CHANNELS, LARGE = 8, 20.0
LATENT_SIDE = 32  # 256 px
TIMESTEPS = (100, 500, 900)

Parameters = dict[tuple[str, ...], np.ndarray]
flatten, unflatten = nnx.traversals.flatten_mapping, nnx.traversals.unflatten_mapping


def error(found: np.ndarray, exact: np.ndarray) -> float:
    """Returns the relative root mean square error."""
    return float(np.sqrt(np.mean(np.square(found - exact)) / np.mean(np.square(exact))))


def as_bfloat16(values: np.ndarray) -> np.ndarray:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def random_kernel(rng: np.random.Generator, shape: tuple[int, ...], inputs: int, uneven: bool) -> np.ndarray:
    """N(0, 1 / number of inputs), with `inputs` input axes first."""
    fan = int(np.prod(shape[:inputs]))
    factors = np.full(fan, fan**-0.5)
    if uneven:
        uneven_factors = np.exp(0.5 * rng.standard_normal(fan))
        factors *= uneven_factors / np.sqrt(np.mean(np.square(uneven_factors)))
    values = rng.standard_normal((fan, int(np.prod(shape[inputs:]))), np.float32)
    values *= factors[:, None].astype(np.float32)
    return values.reshape(shape)


# --- T5 ---------------------------------------------------------------------------------------------


class Blocks:
    """One block of T5 at a time, with its weights in float32, bfloat16 and int8."""

    def __init__(self, config: T5Config):
        self.config = dataclasses.replace(config, num_layers=1, vocab_size=8)
        encoder = self._make(None)
        self.shapes = {
            path: leaf.shape[1:]
            for path, leaf in nnx.to_flat_state(nnx.state(encoder))
            if path[:2] == ("blocks", "stacked")
        }
        self.variants = {"bfloat16": None, "int8": T5_KEPT, "int8, wo too": ()}
        self._run = jax.jit(self._forward, static_argnums=0)

    def _make(self, kept: tuple[str, ...] | None) -> T5Encoder:
        def make() -> T5Encoder:
            encoder = T5Encoder(self.config, rngs=nnx.Rngs(0))
            if kept is not None:
                quantize_blocks(encoder, kept)
            return encoder

        return nnx.eval_shape(make)

    @staticmethod
    def _forward(graph: nnx.GraphDef, state: Any, x: Any, bias: Any, mask: Any) -> jax.Array:
        return nnx.merge(graph, state)(x, bias, mask)

    def __call__(
        self, name: str, layer: Parameters, x: np.ndarray, bias: np.ndarray, mask: np.ndarray
    ) -> np.ndarray:
        """Runs a block with its weights stored as a variant says; 'float32' is the exact one."""
        kept = self.variants.get(name)
        encoder = self._make(kept)
        stored = {path: value[None] for path, value in layer.items()}
        if kept is not None:
            stored = dict(quantize_parameters(stored.items(), kernels(self._make(None), kept)))
        if name == "bfloat16":
            stored = {path: as_bfloat16(value) for path, value in stored.items()}
        graph, state = nnx.split(encoder.blocks)
        nnx.replace_by_pure_dict(state, unflatten({path[1:]: value for path, value in stored.items()}))
        return np.asarray(self._run(graph, state, x, bias, mask))


def measure_t5(
    config: T5Config,
    layer_of: Callable[[int, Mapping[tuple[str, ...], tuple[int, ...]]], Parameters],
    embedded: np.ndarray,
    mask: np.ndarray,
    buckets: np.ndarray,
    final_scale: np.ndarray,
) -> dict[str, Any]:
    """Returns the errors of the features after the last block, and of the residual stream after some blocks.

    Args:
      config: the encoder.
      layer_of: the weights of a block, by its number.
      embedded: [B, S, D] embedded tokens.
      mask: [B, S].
      buckets: [H, S, S] position bias.
      final_scale: [D] of the last norm.
    """
    blocks = Blocks(config)
    streams = dict.fromkeys(("float32", *blocks.variants), embedded)
    kept = mask.astype(bool)
    by_block = {}
    for index in range(config.num_layers):
        start = time.perf_counter()
        layer = layer_of(index, blocks.shapes)
        for name in streams:
            streams[name] = blocks(name, layer, streams[name], buckets, mask)
        by_block[index + 1] = {
            name: error(streams[name][kept], streams["float32"][kept]) for name in blocks.variants
        }
        print(
            f"block {index + 1}: {time.perf_counter() - start:.1f} s {by_block[index + 1]}", file=sys.stderr
        )

    def features(x: np.ndarray) -> np.ndarray:
        return (x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-6) * final_scale)[kept]

    exact = features(streams["float32"])
    report = {}
    for name in blocks.variants:
        found = features(streams[name])
        cosine = np.sum(found * exact, -1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(exact, axis=-1)
        report[name] = {"error": error(found, exact), "lowest_cosine_of_a_token": float(cosine.min())}
    return {"features": report, "residual_stream": {n: by_block[n] for n in by_block if n in (1, 8, 16, 24)}}


def random_t5(config: T5Config, uneven: bool) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    norm = np.ones(config.d_model, np.float32)
    if uneven:
        norm[rng.choice(config.d_model, LARGE_CHANNELS, replace=False)] = LARGE

    def layer_of(index: int, shapes: Mapping[tuple[str, ...], tuple[int, ...]]) -> Parameters:
        del index
        layer = {}
        for path, shape in shapes.items():
            if path[-1] == "scale":
                layer[path] = norm
                continue
            layer[path] = random_kernel(rng, shape, 2 if path[-1] == "o" else 1, uneven)
            if path[-1] == "q":
                layer[path] *= np.float32(config.d_kv**-0.5)
        return layer

    embedded = rng.standard_normal((len(CAPTIONS), TOKENS, config.d_model), np.float32)
    bias = rng.standard_normal((config.num_heads, TOKENS, TOKENS), np.float32)
    mask = np.ones((len(CAPTIONS), TOKENS), bool)
    return measure_t5(config, layer_of, embedded, mask, bias * config.d_model**-0.5, np.ones_like(norm))


def real_t5(pipeline: Path) -> dict[str, Any]:
    from pixart_jax.models.t5 import relative_buckets

    config = T5Config.from_hf(read_json(pipeline / "text_encoder" / "config.json", COPY))
    tensors = open_tensors(pipeline / "text_encoder")
    table = t5_table(config)

    def read(path: tuple[str, ...], index: tuple[int, ...] = ()) -> np.ndarray:
        entry = next(entry for entry in table.entries if (entry.path, entry.index) == (path, index))
        theirs = next(tensors[key] for key in entry.keys if key in tensors)
        return np.asarray(entry.layout.to_ours(theirs, table.part_shape(entry)), np.float32)

    tokenizer = load_tokenizer(
        TextEncoderConfig(tokenizer=str(pipeline / "tokenizer"), tokenizer_subfolder="")
    )
    rows = tokenizer(list(CAPTIONS), padding="max_length", max_length=TOKENS, truncation=True)
    buckets = relative_buckets(
        TOKENS, config.relative_attention_num_buckets, config.relative_attention_max_distance
    )
    return measure_t5(
        config,
        lambda index, shapes: {path: read(path, (index,)) for path in shapes},
        read(("embed",))[np.array(rows["input_ids"])],
        np.array(rows["attention_mask"], bool),
        read(("position_bias",))[buckets].transpose(2, 0, 1),
        read(("final_norm", "scale")),
    )


# --- PixArt -----------------------------------------------------------------------------------------


def random_network(uneven: bool) -> Weights:
    config = PixArtConfig(size="XL/2", scan_layers=True)
    rng = np.random.default_rng(0)
    abstract = nnx.eval_shape(lambda: config.make(rngs=nnx.Rngs(0)))
    params = {}
    for path, leaf in nnx.to_flat_state(nnx.state(abstract)):
        stacked = path[0] == "blocks"
        shape = leaf.shape[1:] if stacked else leaf.shape
        matrix = leaf.get_metadata().get("matrix")
        count = leaf.shape[0] if stacked else 1
        if path[-1] == "kernel":
            inputs = len(matrix.inputs) if matrix else len(shape) - 1
            layers = [random_kernel(rng, shape, inputs, uneven) for _ in range(count)]
        else:
            layers = [np.float32(0.1) * rng.standard_normal(shape, np.float32) for _ in range(count)]
        params[path] = np.stack(layers) if stacked else layers[0]
    return Weights(unflatten(params), TrainConfig(model=config), "random", "other")


def measure_network(read: Weights) -> dict[str, Any]:
    """Returns the errors of the predicted noise (and variance) by timestep."""
    config = read.config.model
    rng = np.random.default_rng(1)
    latents = rng.standard_normal((1, LATENT_SIDE, LATENT_SIDE, config.in_channels), np.float32)
    text = rng.standard_normal((1, config.text_length, config.text_dim), np.float32)
    mask = np.ones((1, config.text_length), bool)
    sizes = ()
    if config.size_conditions:
        side = np.full((1, 2), 8.0 * LATENT_SIDE, np.float32)
        sizes = side, np.ones((1, 1), np.float32)
    run = jax.jit(lambda graph, state, *inputs: nnx.merge(graph, state)(*inputs), static_argnums=0)

    def outputs(weights: Weights, weights_dtype: str) -> list[np.ndarray]:
        split = nnx.split(build_model(weights, weights_dtype))
        times = (jnp.full(1, timestep, jnp.float32) for timestep in TIMESTEPS)
        return [np.asarray(run(*split, latents, t, text, mask, *sizes)) for t in times]

    exact = outputs(read, "float32")
    rounded = dataclasses.replace(read, params=jax.tree.map(as_bfloat16, read.params))
    found = {"bfloat16": outputs(rounded, "float32"), "int8": outputs(read, "int8")}
    return {
        name: {f"t={t}": error(*pair) for t, *pair in zip(TIMESTEPS, values, exact)}
        for name, values in found.items()
    }


# --- Memory -----------------------------------------------------------------------------------------


def gigabytes(network: Callable[[], nnx.Module], kept: tuple[str, ...] | None, rest: int) -> float:
    """Returns the size of the weights in GB.

    Args:
      network: makes it.
      kept: kernels that stay as they are; None quantizes nothing.
      rest: bytes of a parameter that is neither quantized nor a scale.
    """

    def make() -> nnx.Module:
        made = network()
        if kept is not None:
            quantize_blocks(made, kept)
        return made

    size = 0
    for path, leaf in nnx.to_flat_state(nnx.state(nnx.eval_shape(make))):
        size += leaf.size * (1 if leaf.dtype == jnp.int8 else 4 if str(path[-1]).endswith(SCALE) else rest)
    return round(size / 1e9, 3)


def memory() -> dict[str, Any]:
    t5 = lambda: T5Encoder(T5Config(), rngs=nnx.Rngs(0))  # noqa: E731
    network = lambda: PixArtConfig().make(rngs=nnx.Rngs(0))  # noqa: E731
    return {
        "T5-XXL": {
            "bfloat16": gigabytes(t5, None, 2),
            "int8": gigabytes(t5, T5_KEPT, 2),
            "int8, wo too": gigabytes(t5, (), 2),
        },
        "XL/2": {"float32": gigabytes(network, None, 4), "int8": gigabytes(network, (), 4)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pipeline", type=Path, help="local diffusers pipeline folder with released weights")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/int8_weights.json"))
    arguments = parser.parse_args()
    report: dict[str, Any] = {"gigabytes": memory(), "jax": jax.__version__}
    if arguments.pipeline:
        report["weights"] = str(arguments.pipeline)
        report["t5"] = real_t5(arguments.pipeline)
        report["network"] = measure_network(read_any(arguments.pipeline, scan_layers=True))
    else:
        report["weights"] = "random"
        for kind in ("normal", "uneven"):
            report[kind] = {
                "t5": random_t5(T5Config(), kind == "uneven"),
                "network": measure_network(random_network(kind == "uneven")),
            }
    text = json.dumps(report, indent=1)
    print(text)
    arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
