"""Counts what follows from shapes alone: FLOPs, the memory of weights and training states, and the like.

    JAX_PLATFORMS=cpu python benchmarks/counted.py         # all figures, in the words of the pages in docs/

Nothing is measured or compiled, so the figures are the same on every machine. A test checks that the pages
have them (tests/benchmarks/test_counted.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh

from pixart_jax.benchmarking.fit import Memory, sampling_plans
from pixart_jax.benchmarking.flops import forward_flops, train_flops
from pixart_jax.config import MeshConfig, OptimizerConfig, PixArtConfig, TrainConfig, from_file
from pixart_jax.denoiser import abstract_model
from pixart_jax.models.activations import decoding_bytes
from pixart_jax.models.t5 import T5Config, abstract_t5
from pixart_jax.models.vae import VAEConfig, abstract_vae
from pixart_jax.training import sharding
from pixart_jax.training.objectives import make_objective
from pixart_jax.training.optimizers import make_optimizer
from pixart_jax.training.settings import MEMORY_FRACTION
from pixart_jax.training.state import abstract_state
from pixart_jax.weights.power_averages import Profile, fit_profile

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
GIB = 2**30
# What the driver of a T4 of 16 GB reports.
T4_GIB = 14.7


def rows(cells: Iterable[Sequence[str]]) -> str:
    """The rows of a table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def parameters(tree: Any) -> int:
    """The number of values in a tree of arrays or of their shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def xl2(tokens: int = 120, **fields) -> PixArtConfig:
    return PixArtConfig(size="XL/2", text_dim=4096, text_length=tokens, base_size=16, **fields)


def flops() -> str:
    """TFLOP of a forward pass and of a training step on one image."""
    compressed = dict(kv_compression="conv")
    cases = (
        ("256 px", 256, xl2()),
        ("512 px", 512, xl2()),
        ("1024 px", 1024, xl2()),
        ("PixArt-Σ (300 tokens), 1024 px", 1024, xl2(300)),
        ("the same with compressed keys and values in 14 of 28 blocks", 1024, xl2(300, **compressed)),
        ("2048 px", 2048, xl2(300)),
        ("the same, compressed", 2048, xl2(300, **compressed)),
        ("4096 px", 4096, xl2(300)),
        ("the same, compressed", 4096, xl2(300, **compressed)),
    )

    def digits(count: float) -> str:
        tera = count / 1e12
        return f"{tera:,.{3 if tera < 5 else 2 if tera < 20 else 1 if tera < 200 else 0}f}"

    found = []
    for name, pixels, model in cases:
        latent = (pixels // 8, pixels // 8)
        counts = (forward_flops(model, *latent).total, train_flops(model, *latent))
        found.append((name, *map(digits, counts)))
    return rows(found)


def meshes() -> str:
    """GiB of the training state of XL/2 on each device, by mesh."""
    config = TrainConfig(model=xl2(size_conditions=True))
    objective = make_objective(config)
    optimizer = make_optimizer(config.optimizer, config.data.batch_size, objective, config.steps, config.seed)

    def state(strategy: str = "fsdp", **axes: int) -> str:
        if config.model.num_heads % axes.get("tensor", 1):
            return "–"
        mesh = AbstractMesh(tuple(axes.get(axis, 1) for axis in sharding.MESH_AXES), sharding.MESH_AXES)
        target, shardings = abstract_state(objective, optimizer, mesh, strategy)
        return f"{sharding.bytes_per_device(target, shardings) / GIB:.2f}"

    return rows(
        (str(n), state(data=n), state("zero1", fsdp=n), state(fsdp=n), state(tensor=n))
        for n in (1, 8, 16, 64, 128)
    )


def states() -> str:
    """Millions of trained parameters, and GB of the training state on a device."""

    def row(name: str, spec: str, adapter: Mapping[str, str] = {}, optimizer: Mapping[str, str] = {}):
        config = from_file(f"{CONFIGS}/{spec}")
        changed = {
            "adapter": dataclasses.replace(config.adapter, **adapter),
            "optimizer": dataclasses.replace(config.optimizer, **optimizer),
        }
        memory = Memory.of(dataclasses.replace(config, **changed))
        parts = (memory.frozen, memory.trained + memory.rest, memory.state)
        sizes = (f"{part / 1e9:.{2 if part > 1e7 else 3}f}" for part in parts)
        return name, f"{memory.trained / 4e6:.1f} M", *sizes

    lora, on_device = "lora.py:512", {"moments": "float32", "ema_device": "device"}
    float32, int8 = {"base_dtype": "float32"}, {"base_dtype": "int8"}
    sigma = "the same for PixArt-Σ, whose optimizer is CAME (`configs/finetune.py:sigma-512`)"
    plain = "LoRA of rank 16 in attention and MLP, base in float32, all state on the device"
    as_configured = "the same, moments in bfloat16, average on the host (`configs/lora.py:512`)"
    return rows(
        (
            row("whole network (`configs/finetune.py:512`)", "finetune.py:512"),
            row(sigma, "finetune.py:sigma-512"),
            row(plain, lora, float32, on_device),
            row("the same, base in bfloat16", lora, {}, on_device),
            row(as_configured, lora),
            row("the same, base in int8 (`--config.adapter.base_dtype=int8`)", lora, int8),
        )
    )


def optimizers() -> str:
    """GiB of the state of each optimizer for XL/2."""

    def size(name: str, moments: str = "float32") -> str:
        config = TrainConfig(model=xl2(), optimizer=OptimizerConfig(name=name, moments=moments))
        objective = make_objective(config)
        optimizer = make_optimizer(
            config.optimizer, config.data.batch_size, objective, config.steps, config.seed
        )
        mesh = sharding.make_mesh(MeshConfig(data=1), devices=jax.local_devices()[:1])
        state, shardings = abstract_state(objective, optimizer, mesh)
        gib = sharding.bytes_per_device(state.optimizer, shardings.optimizer) / GIB
        return f"{gib:.2f}" if gib >= 0.01 else f"{gib:.3f}"

    smaller = {name: [size(name, moments) for moments in ("bfloat16", "int8")] for name in ("adamw", "lion")}
    parts = [
        f"`adamw` {size('adamw')} (`bfloat16` {smaller['adamw'][0]}, `int8` {smaller['adamw'][1]})",
        f"`lion` {size('lion')} ({', '.join(smaller['lion'])})",
        *(f"`{name}` {size(name)}" for name in ("came", "adafactor", "muon", "schedule_free", "prodigy")),
    ]
    return f"{', '.join(parts)}."


def averages() -> str:
    """Relative error of averages that are combined from snapshots of the widths 0.05 and 0.1."""

    def error(snapshots: int, width: float) -> str:
        steps = [1000 * (n + 1) for n in range(snapshots)]
        stored = [Profile(step, each) for step in steps for each in (0.05, 0.1)]
        percent = 100 * fit_profile(stored, Profile(steps[-1], width)).error
        return f"{percent:.0f} %" if percent >= 9.95 else f"{percent:.1f} %"

    widths = (0.02, 0.03, 0.075, 0.15, 0.2, 0.25)
    return rows((str(count), *(error(count, width) for width in widths)) for count in (2, 8, 32))


def emoji() -> str:
    """Parameters of the network of `make emoji`."""
    network = abstract_model(from_file(f"{CONFIGS}/emoji.py:stage3").model)[1]
    return f"a network of {parameters(network) / 1e6:.2f} million parameters"


def networks() -> str:
    """Parameters, and GB on a device that samples."""

    def row(name: str, tree: Any, itemsize: int, dtypes: str) -> tuple[str, str, str]:
        count = parameters(tree)
        return name, f"{count / 1e9:.2f} B", f"{count * itemsize / 1e9:.1f} GB, {dtypes}"

    t5, vae = nnx.state(abstract_t5(T5Config(), "auto")), nnx.state(abstract_vae(VAEConfig()))
    network = abstract_model(xl2())[1]
    return rows(
        (
            row("T5-XXL encoder", t5, 2, "bfloat16 or float16"),
            row("PixArt-XL/2, α or Σ", network, 4, "float32, computing in bfloat16 or float16"),
            row("VAE", vae, 4, "float32"),
        )
    )


def decoding() -> str:
    """Memory that the VAE's decoder needs, by image size."""

    def gib(side: int) -> float:
        return decoding_bytes(VAEConfig(), (side, side), 1) / GIB

    tile, large, largest = (f"{gib(side):.0f} GiB" for side in (1024, 2048, 4096))
    return (
        f"Decoding an image of 1024x1024 px takes {tile}, one of 2048x2048 px {large}, one of 4096x4096 px "
        f"{largest}"
    )


def small_gpu() -> str:
    """Memory of sampling on a T4, and how many images fit at a time."""

    def plan(size: int) -> Mapping[str, Any]:
        config = from_file(f"{CONFIGS}/finetune.py:{size}")
        model = dataclasses.replace(config.model, attention="xla")
        limit = int(T4_GIB * float(MEMORY_FRACTION) * GIB)
        return sampling_plans(dataclasses.replace(config, model=model), limit)[0]

    plans = plan(512), plan(1024)
    peak = f"{plans[0]['peak'] / GIB:.2f} GiB"
    medium, large = (each["largest_batch"] for each in plans)
    return (
        f"Sampling takes at most {peak}, while the prompts are encoded. Then the encoder is freed, and "
        f"{medium} images of 512 px fit at a time ({large} of 1024 px, with `finetune:1024`)."
    )


# What each page has, by the name of the page.
FIGURES: dict[str, tuple[Callable[[], str], ...]] = {
    "performance.md": (flops,),
    "scaling.md": (meshes,),
    "fine-tuning.md": (states,),
    "own-images.md": (optimizers,),
    "evaluation.md": (averages, emoji),
    "sampling.md": (networks, decoding, small_gpu),
}


def main() -> None:
    for page, figures in FIGURES.items():
        for figure in figures:
            print(f"{figure.__doc__} (docs/{page})\n\n{figure()}\n")


if __name__ == "__main__":
    main()
