"""Measures the speed of attention alone, forward and with its gradient, at the shapes of XL/2.

    python benchmarks/gpu/attention.py --implementation=cudnn --out=attention.json
    python benchmarks/gpu/attention.py --implementation=tokamax --out=tokamax.json

The cases are self-attention at 256, 512 and 1024 px, and cross-attention of the tokens of 512 px with
captions that are padded to 120 tokens and given with their lengths. There are 16 heads of width 72, and the
number of images is chosen to give 16,384 tokens. FLOPs are those of two products forward and five backward,
counted without padding of the head width. tokamax is Google's kernel library, which must be installed
separately.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pixart_jax.benchmarking.measuring import compile_timed, machine, matrix_peak, measure
from pixart_jax.models.attention import attention
from pixart_jax.training.settings import apply_settings

# Name -> number of image tokens, number of keys, whether the keys have lengths.
SHAPES = {
    "self 256 px": (256, 256, False),
    "self 512 px": (1024, 1024, False),
    "self 1024 px": (4096, 4096, False),
    "cross 512 px": (1024, 120, True),
}
TOKENS = 16_384
HEADS, WIDTH = 16, 72
# Five rounds are enough to show how much they vary.
ROUNDS, CALLS = 5, 10


def implementation(name: str) -> Callable[..., jax.Array]:
    """Returns an attention function, (query, key, value, key_lengths) -> output, all [B, N, H, K]."""
    if name != "tokamax":
        return lambda *arrays: attention(*arrays[:3], key_lengths=arrays[3], implementation=name)
    import tokamax  # not a dependency of this project

    return lambda *arrays: tokamax.dot_product_attention(*arrays[:3], key_value_seq_lengths=arrays[3])


def forward(call, query, key, value, lengths, cotangent):
    return call(query, key, value, lengths)


def gradient(call, query, key, value, lengths, cotangent):
    return jax.vjp(lambda *arrays: call(*arrays, lengths), query, key, value)[1](cotangent)


def run(name: str, small: bool) -> dict[str, Any]:
    call = implementation(name)
    dtype = jnp.float32 if name == "xla" and jax.default_backend() == "cpu" else jnp.bfloat16
    peak = matrix_peak(jnp.dtype(dtype).name)["flops_per_second"]
    results = {}
    for shape, (tokens, keys, ragged) in SHAPES.items():
        batch = 1 if small else TOKENS // tokens
        heads = 2 if small else HEADS
        if small:
            tokens, keys = tokens // 16, max(8, keys // 16)
        query, key, value, cotangent = (
            jax.random.normal(jax.random.key(i), (batch, n, heads, WIDTH), dtype)
            for i, n in enumerate((tokens, keys, keys, tokens))
        )
        lengths = jnp.full((batch,), keys // 2, jnp.int32) if ragged else None

        arrays = (query, key, value, lengths, cotangent)
        product = 2 * batch * heads * tokens * keys * WIDTH
        for label, function, products in (("forward", forward, 2), ("forward and backward", gradient, 7)):
            program = jax.jit(functools.partial(function, call))
            program, compilation = compile_timed(functools.partial(program.lower, *arrays))
            rounds, calls = (1, 1) if small else (ROUNDS, CALLS)
            timing = measure(functools.partial(program, *arrays), rounds=rounds, calls=calls)
            rate = products * product / timing.median
            results[f"{shape}, {label}"] = {
                "batch": batch,
                "seconds": dataclasses.asdict(timing),
                "flops_per_second": rate,
                "share_of_matrix_peak": rate / peak,
                "compilation": compilation,
            }
    return {"implementation": name, "dtype": jnp.dtype(dtype).name, "shapes": results, "machine": machine()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--implementation", choices=("xla", "cudnn", "splash", "tokamax"), required=True)
    parser.add_argument("--small", action="store_true", help="short sequences, two heads")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    apply_settings()
    result = run(arguments.implementation, arguments.small)
    for name, row in result["shapes"].items():
        milliseconds, rate = row["seconds"]["median"] * 1e3, row["flops_per_second"] / 1e12
        print(f"{name}: {milliseconds:.3f} ms, {rate:.4g} TFLOP/s")
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
