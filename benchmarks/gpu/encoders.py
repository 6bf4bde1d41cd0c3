"""Measures the speed of the encoders of `precompute`: a T5 of XXL's size and the VAE, with random weights.

    python benchmarks/gpu/encoders.py --what=t5 --batch=64
    python benchmarks/gpu/encoders.py --what=decode --batch=16

Weights and matrix products are in bfloat16, as in `precompute` on an accelerator: 4.76 billion parameters
take 9.5 GB. Captions have 120 tokens, and images are 512 x 512 px.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pixart_jax.benchmarking.measuring import (
    compile_timed,
    datasheet_peak,
    machine,
    matrix_peak,
    measure,
    peak_memory,
)
from pixart_jax.models.t5 import T5Config, T5Encoder
from pixart_jax.models.vae import VAE, VAEConfig
from pixart_jax.training.settings import apply_settings

TOKENS = 120
# Five rounds are enough to show how much they vary.
ROUNDS, CALLS = 5, 3


def random_params(make: Any, dtype: str) -> tuple[Any, dict[str, Any]]:
    """Returns the structure of a model, and parameters N(0, 0.02) of `dtype`, created on the device."""
    graph, state = nnx.split(nnx.eval_shape(make))
    leaves, tree = jax.tree.flatten(nnx.to_pure_dict(state))
    # One program per shape, because a single program for all takes longer to compile than to run.
    normal = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, dtype), static_argnums=1)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return graph, jax.tree.unflatten(tree, [normal(key, leaf.shape) for key, leaf in zip(keys, leaves)])


def cases(what: str, batch: int, small: bool) -> tuple[Any, str, int, Any, tuple[Any, ...]]:
    """Returns the model, the unit that is counted, its number per call, the call, and its arguments."""
    dtype = "float32" if small else "bfloat16"
    key = jax.random.key(1)
    if what == "t5":
        shape = dict(d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=2) if small else {}
        config = T5Config(**shape, dtype=dtype)
        ids = jax.random.randint(key, (batch, TOKENS), 0, config.vocab_size)
        arguments = (ids, jnp.ones((batch, TOKENS), bool))
        return config, "tokens", batch * TOKENS, lambda model, *given: model(*given), arguments
    config = VAEConfig(**(dict(block_out_channels=(32,) * 4) if small else {}), dtype=dtype)
    side = 64 if small else 512
    if what == "encode":
        images = jax.random.uniform(key, (batch, side, side, 3), minval=-1.0, maxval=1.0)
        return config, "images", batch, lambda model, images: model.encode(images), (images,)
    side //= config.downsampling
    latents = jax.random.normal(key, (batch, side, side, config.latent_channels))
    return config, "images", batch, lambda model, latents: model.decode(latents), (latents,)


def counted(make: Any, call: Any, arguments: tuple[Any, ...]) -> float:
    """Returns the FLOPs of one call, as counted by XLA before it optimizes the program."""
    graph, state = nnx.split(nnx.eval_shape(make))
    program = jax.jit(lambda state, *given: call(nnx.merge(graph, state), *given)).lower(state, *arguments)
    return float((program.cost_analysis() or {}).get("flops", 0.0))


def run(what: str, batch: int, small: bool) -> dict[str, Any]:
    config, unit, count, call, arguments = cases(what, batch, small)
    model = T5Encoder if what == "t5" else VAE
    graph, params = random_params(lambda: model(config, rngs=nnx.Rngs(0)), config.dtype)
    program = jax.jit(lambda params, *given: call(nnx.merge(graph, params), *given))
    compiled, compilation = compile_timed(lambda: program.lower(params, *arguments))
    rounds, calls = (1, 1) if small else (ROUNDS, CALLS)
    timing = measure(lambda: compiled(params, *arguments), rounds=rounds, calls=calls)
    # Scanned blocks would be counted only once.
    whole = dataclasses.replace(config, scan_layers=False) if what == "t5" else config
    flops = counted(lambda: model(whole, rngs=nnx.Rngs(0)), call, arguments)
    peak, stated = matrix_peak(config.dtype)["flops_per_second"], datasheet_peak(jax.devices()[0])
    rate = flops / timing.median
    return {
        "what": what,
        "model": dataclasses.asdict(config),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "batch": batch,
        "unit": unit,
        f"{unit}_per_second": count / timing.median,
        "seconds": dataclasses.asdict(timing),
        "tflop_per_call": flops / 1e12,
        "share_of_matrix_peak": rate / peak,
        "share_of_datasheet": stated and rate / stated,
        "compilation": compilation,
        "memory": peak_memory(compiled),
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", choices=("t5", "encode", "decode"), required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="tiny models in float32, images of 64 px")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    apply_settings()
    result = run(arguments.what, arguments.batch, arguments.small)
    print(f"{result['unit']} per second: {result[result['unit'] + '_per_second']:.4g}")
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
