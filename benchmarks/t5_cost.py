"""Counts the FLOPs per image of encoding captions with T5-XXL. Needs no weights and runs no encoder.

    python benchmarks/t5_cost.py        # writes benchmarks/results/t5_cost.json

The encoder is lowered for every padded length (multiples of `encoders.text.LENGTH_STEP`), and XLA counts its
operations (a multiplication and an addition count as two). As a check, a token costs 2 x (4 D I + 3 D F) for
the projections of a layer and 2 x 2 L I for its attention to L tokens, with width D = 4096, I = 64 heads x
64, and F = 10240.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pixart_jax.encoders.batches import round_up
from pixart_jax.encoders.text import LENGTH_STEP
from pixart_jax.models.t5 import T5Config, T5Encoder

XXL = T5Config(
    vocab_size=32128, d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, scan_layers=False
)
TEXT_LENGTH = 120
# Captions have 20 to 120 tokens, all lengths equally likely, as in `benchmarks/loader.py`.
CAPTIONS = np.arange(20, TEXT_LENGTH + 1)


def counted(length: int) -> float:
    """Returns the FLOPs of one caption padded to `length` tokens, as counted by XLA."""
    graph, params = nnx.split(nnx.eval_shape(lambda: T5Encoder(XXL, rngs=nnx.Rngs(0))))
    ids, mask = (jax.ShapeDtypeStruct((1, length), kind) for kind in (jnp.int32, bool))
    program = jax.jit(lambda params, *inputs: nnx.merge(graph, params)(*inputs)).lower(params, ids, mask)
    return float(program.cost_analysis()["flops"])


def by_hand(length: int) -> float:
    """Returns the FLOPs of the matrix products alone."""
    inner = XXL.num_heads * XXL.d_kv
    token = 2 * XXL.d_model * (4 * inner + 3 * XXL.d_ff) + 4 * length * inner
    return float(XXL.num_layers * length * token)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="benchmarks/results/t5_cost.json", help="JSON to write")
    out = Path(parser.parse_args().out)
    padded = [min(round_up(int(length), LENGTH_STEP), TEXT_LENGTH) for length in CAPTIONS]
    lengths = sorted({LENGTH_STEP, *padded})
    flop = {length: counted(length) for length in lengths}
    result = {
        "encoder": "T5-XXL (24 layers, width 4096, 64 heads of 64, feed-forward 10240, gated)",
        "jax": jax.__version__,
        "tflop_of_a_caption_by_padded_length": {n: round(value / 1e12, 4) for n, value in flop.items()},
        "by_hand": {n: round(by_hand(n) / 1e12, 4) for n in lengths},
        "tflop_an_image_20_to_120_tokens": round(np.mean([flop[n] for n in padded]) / 1e12, 4),
        "tflop_an_image_padded_to_120": round(flop[TEXT_LENGTH] / 1e12, 4),
        "gflop_a_token": round(flop[TEXT_LENGTH] / TEXT_LENGTH / 1e9, 3),
    }
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
