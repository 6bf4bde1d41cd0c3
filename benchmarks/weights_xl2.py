"""Measures weight conversions at full size: XL/2 at 1024 px, random weights, float32.

    python benchmarks/weights_xl2.py --out=benchmarks/results/weights_xl2.json
    python benchmarks/weights_xl2.py --family=sigma --out=benchmarks/results/weights_xl2_sigma.json

The conversions are official .safetensors -> checkpoint -> diffusers -> official, which must give the bits of
the first file (except for the null caption, which diffusers cannot hold), and official .pth -> checkpoint.
Each runs in its own process, whose peak memory is measured. Then one forward pass at 256 px is compared
between this project and diffusers. PixArt-alpha has size conditions, PixArt-Sigma has none and longer
captions. Needs 15 GB of disk, and the test extra for diffusers. The exit status is 1 if a figure exceeds its
bound.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

LIMIT_GIB = 12.0
TOLERANCE = 1e-4
SIDE = 32  # side of the latent: 256 px
# Tokens of a caption, and the number of parameters of the official networks, without the null caption.
TOKENS = {"alpha": 120, "sigma": 300}
PARAMETERS = {"alpha": 611_349_152, "sigma": 610_856_096}
NULL_CAPTION = "y_embedder.y_embedding"


def write_random_weights(path: Path, family: str) -> int:
    """Writes a random official state dict; returns its number of parameters without the null caption."""
    from flax import nnx, traverse_util

    from pixart_jax.models.configs import PixArtConfig
    from pixart_jax.models.pixart import PixArt
    from pixart_jax.weights.backbones import POSITIONS, export_backbone
    from pixart_jax.weights.files import write_safetensors
    from pixart_jax.weights.tables import parameter_shapes

    config = PixArtConfig(
        size="XL/2",
        base_size=64,
        position_scale=2.0,
        size_conditions=family == "alpha",
        text_length=TOKENS[family],
    )
    # Broadcast zeros take no memory; only their names and shapes are used.
    paths = parameter_shapes(nnx.eval_shape(lambda: PixArt(config, rngs=nnx.Rngs(0))))
    zeros = {path: np.broadcast_to(np.float32(0), shape) for path, shape in paths.items()}
    shapes, tensors = export_backbone("official", traverse_util.unflatten_dict(zeros), config)
    rng = np.random.default_rng(0)

    def random():
        for name, value in tensors:
            fan_in = np.prod(value.shape[1:]) if value.ndim > 1 else 100
            scale = np.float32(1 / np.sqrt(fan_in))
            yield name, value if name == POSITIONS else scale * rng.standard_normal(value.shape, np.float32)

    write_safetensors(path, shapes, random(), {"format": "pt"})
    buffers = (POSITIONS, NULL_CAPTION)
    return sum(int(np.prod(shape)) for name, shape in shapes.items() if name not in buffers)


def different_tensors(first: Path, second: Path) -> list[str]:
    """Names of the tensors that do not have the same bits; the null caption of `second` must be zero."""
    from safetensors import safe_open

    with safe_open(first, "np") as one, safe_open(second, "np") as other:
        names = {*one.keys(), *other.keys()}
        common = {*one.keys()} & {*other.keys()}
        return sorted(
            name
            for name in names
            if name not in common
            or (
                np.any(other.get_tensor(name))
                if name == NULL_CAPTION
                else one.get_tensor(name).tobytes() != other.get_tensor(name).tobytes()
            )
        )


def write_pth(source: Path, path: Path, family: str) -> None:
    """Writes the same weights in the format of the official trainer."""
    import torch
    from safetensors.torch import load_file

    torch.save({"state_dict": load_file(source)}, path)


def run_ours(folder: Path, out: Path, family: str) -> None:
    import jax
    from flax import nnx

    import pixart_jax

    graph, params = nnx.split(pixart_jax.load_model(folder))
    forward = jax.jit(lambda params, arguments: nnx.merge(graph, params)(**arguments))
    np.save(out, np.asarray(forward(params, forward_inputs(family))))


def run_diffusers(folder: Path, out: Path, family: str) -> None:
    import diffusers
    import torch

    model = diffusers.PixArtTransformer2DModel.from_pretrained(folder).eval()
    tensors = {name: torch.from_numpy(value) for name, value in forward_inputs(family).items()}
    with torch.no_grad():
        result = model(
            tensors["latents"].permute(0, 3, 1, 2),
            encoder_hidden_states=tensors["text"],
            encoder_attention_mask=tensors["text_mask"],
            timestep=tensors["timesteps"],
            added_cond_kwargs={
                "resolution": tensors.get("image_size"),
                "aspect_ratio": tensors.get("aspect_ratio"),
            },
            return_dict=False,
        )[0]
    np.save(out, result.permute(0, 2, 3, 1).numpy())


def forward_inputs(family: str) -> dict[str, np.ndarray]:
    rng, tokens = np.random.default_rng(1), TOKENS[family]
    inputs = {
        "latents": rng.standard_normal((2, SIDE, SIDE, 4), np.float32),
        "timesteps": np.array([999.0, 123.4], np.float32),
        "text": rng.standard_normal((2, tokens, 4096), np.float32),
        "text_mask": (np.arange(tokens) < np.array([[tokens], [7]])).astype(np.int32),
    }
    if family == "alpha":
        inputs["image_size"] = np.array([[1024, 1024], [768, 1344]], np.float32)
        inputs["aspect_ratio"] = np.array([[1.0], [0.57]], np.float32)
    return inputs


PARTS = {
    "random": write_random_weights,
    "pth": write_pth,
    "ours": run_ours,
    "diffusers": run_diffusers,
}


def measured(*command: str | Path) -> dict[str, float]:
    """Runs a command in a new process; returns its seconds and its peak resident memory."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"failed: {' '.join(map(str, command))}")
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "peak_gib": round(usage.ru_maxrss / 2**20, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--folder", type=Path, help="folder for temporary files; default: that of the system")
    parser.add_argument("--family", choices=TOKENS, default="alpha", help="whose weights; default: alpha")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("paths", nargs="*", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    family = arguments.family
    if arguments.part:
        PARTS[arguments.part](*arguments.paths, family)
        return

    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        official, pth = folder / "official.safetensors", folder / "official.pth"
        checkpoint, diffusers = folder / "checkpoint", folder / "diffusers"

        def convert(source: Path, output: Path, to: str, *more: str) -> dict[str, float]:
            flags = [f"--input={source}", f"--output={output}", f"--to={to}", *more]
            return measured("-m", "pixart_jax.convert", *flags)

        def part(name: str, *paths: Path) -> dict[str, float]:
            return measured(__file__, "--family", family, "--part", name, *paths)

        parameters = write_random_weights(official, family)
        figures = {
            "official .safetensors -> checkpoint": convert(official, checkpoint, "checkpoint"),
            "checkpoint -> diffusers": convert(checkpoint, diffusers, "diffusers"),
            # The folder of a transformer does not state the length of captions.
            "diffusers -> official .safetensors": convert(
                diffusers, folder / "again.safetensors", "official", f"--text_length={TOKENS[family]}"
            ),
        }
        different = different_tensors(official, folder / "again.safetensors")
        (folder / "again.safetensors").unlink()
        part("pth", official, pth)
        figures["official .pth -> checkpoint"] = convert(pth, folder / "from_pth", "checkpoint")
        pth.unlink()
        figures["forward at 256 px, ours"] = part("ours", checkpoint, folder / "ours.npy")
        figures["forward at 256 px, diffusers"] = part("diffusers", diffusers, folder / "theirs.npy")
        ours, theirs = np.load(folder / "ours.npy"), np.load(folder / "theirs.npy")

    peak = max(figure["peak_gib"] for name, figure in figures.items() if "->" in name)
    report = {
        "family": family,
        "parameters": parameters,
        "different_tensors": different,
        "figures": figures,
        "peak_gib": peak,
        "limit_gib": LIMIT_GIB,
        "forward_max_abs_difference": float(np.abs(ours - theirs).max()),
        "forward_output_std": float(theirs.std()),
        "tolerance": TOLERANCE,
        "machine": f"{os.cpu_count()} x {platform.processor() or platform.machine()}, {platform.system()}",
        "python": platform.python_version(),
    }
    text = json.dumps(report, indent=1)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")
    right = parameters == PARAMETERS[family] and not different
    if peak > LIMIT_GIB or report["forward_max_abs_difference"] > TOLERANCE or not right:
        sys.exit(1)


if __name__ == "__main__":
    main()
