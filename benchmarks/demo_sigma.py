"""What switching on the compression of keys and values does to a trained network, on handwritten digits.

    make demo-sigma        # after `make demo`; writes benchmarks/results/demo_sigma.json

`configs/digits.py:sigma` starts from `sigma-16px` and compresses keys and values in half of its blocks. This
measures the validation loss, and the share of generated digits that a classifier of real scans reads as
requested: before, at step 0 of that run, and at its end. Two variants at step 0 tell apart the averaging of
2 x 2 tokens and the LayerNorm behind it: averages without the LayerNorm, and one token of each 2 x 2.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from pixart_jax.config import MeshConfig, TrainConfig  # noqa: E402
from pixart_jax.data.features import FeatureDataset  # noqa: E402
from pixart_jax.denoiser import NETWORK  # noqa: E402
from pixart_jax.evaluation.digits import Reader, generate_digits, train_reader  # noqa: E402
from pixart_jax.models.layers import LayerNorm  # noqa: E402
from pixart_jax.training import sharding  # noqa: E402
from pixart_jax.training.initialization import resize  # noqa: E402
from pixart_jax.training.objectives import make_objective  # noqa: E402
from pixart_jax.training.validation import make_validation  # noqa: E402
from pixart_jax.weights.checkpoints import read_weights  # noqa: E402

WITHOUT_NORM = mock.patch.object(LayerNorm, "__call__", lambda self, x: x)


def measure(params: dict, config: TrainConfig, held_out: FeatureDataset, reader: Reader, count: int) -> dict:
    """Returns the validation loss, and the share of `count` generated digits that are as requested."""
    mesh = sharding.make_mesh(MeshConfig())
    replicated = {NETWORK: jax.device_put(params, sharding.replicated(mesh))}
    values = make_validation(config, make_objective(config), mesh, held_out)(replicated)
    images, digits = generate_digits(params, config, count)
    return {
        "validation loss": values["validation_loss"],
        "as requested": float(np.mean(reader.read(images) == digits)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="Folder of `make demo-sigma`.")
    parser.add_argument("--count", type=int, default=500, help="Images for each network.")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/demo_sigma.json")
    given = parser.parse_args()
    before, config = read_weights(given.demo / "sigma-16px")
    after, compressed = read_weights(given.demo / "sigma")
    fresh = nnx.to_pure_dict(nnx.state(compressed.model.make(rngs=nnx.Rngs(0))))
    start, _ = resize(before, config.model, fresh, compressed.model)
    nearest = dataclasses.replace(
        compressed, model=dataclasses.replace(compressed.model, kv_compression="nearest")
    )
    held_out = FeatureDataset(given.demo / "features/sigma-16px/test")
    reader = train_reader(config.features.image_size)
    results = {"reader accuracy on held-out scans": reader.accuracy, "images": given.count}
    networks = {
        "not compressed": (before, config, contextlib.nullcontext()),
        "step 0": (start, compressed, contextlib.nullcontext()),
        "step 0, without the LayerNorm": (start, compressed, WITHOUT_NORM),
        "step 0, one of 2 x 2 tokens": (start, nearest, contextlib.nullcontext()),
        f"step {compressed.steps}": (after, compressed, contextlib.nullcontext()),
    }
    for name, (params, its_config, context) in networks.items():
        with context:
            results[name] = measure(params, its_config, held_out, reader, given.count)
        print(name, results[name], flush=True)
    given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
