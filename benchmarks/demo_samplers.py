"""Compares samplers, steps and guidance scales on the demo's model: images, legible digits, time per step.

    make demo
    python benchmarks/demo_samplers.py   # writes demo_samplers.json and docs/demo-samplers.png

Every cell shows the same digits generated from the same seeds. A classifier that was trained on the real
scans reads them (`pixart_jax/evaluation/digits.py`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import jax.numpy as jnp  # noqa: E402
import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from pixart_jax.data.digits import caption_for  # noqa: E402
from pixart_jax.denoiser import Denoiser  # noqa: E402
from pixart_jax.encoders.images import make_codec  # noqa: E402
from pixart_jax.encoders.text import TextEncoder  # noqa: E402
from pixart_jax.evaluation.digits import train_reader  # noqa: E402
from pixart_jax.sampling import image_keys, make_sampler, picture_grid  # noqa: E402
from pixart_jax.weights.checkpoints import read_weights  # noqa: E402

SAMPLERS = ("dpm_solver", "sa_solver", "ddim", "iddpm")
STEPS = (2, 3, 5, 10, 20)
GUIDANCE_SCALES = (1.0, 2.0, 4.0, 7.0, 12.0)
GUIDANCE_STEPS = TIMED_STEPS = 10
ROUNDS = 3


class Demo:
    """The weights of a run, and a batch of prompts that ask for digits."""

    def __init__(self, checkpoint: Path, count: int):
        self.params, self.config = read_weights(checkpoint)
        self.denoiser = Denoiser.of(self.config)
        self.size = self.config.features.image_size
        self.asked = np.arange(count) % 10
        encoder = TextEncoder(self.config.features.text_encoder, self.config.features.text_length)
        text, lengths = encoder.encode([caption_for(digit, 0) for digit in self.asked])
        self.conditions = {
            "text": jnp.asarray(text),
            "text_mask": jnp.asarray(np.arange(text.shape[1]) < lengths[:, None]),
            "image_size": jnp.full((count, 2), float(self.size)),
            "aspect_ratio": jnp.ones((count, 1)),
        }
        self.keys = image_keys(np.arange(count))
        self.codec, self.reader = make_codec(self.config.features), train_reader(self.size)

    def sampler(self, name: str, steps: int, scale: float | None = None):
        sample = make_sampler(
            self.denoiser,
            height=self.size,
            width=self.size,
            sampler=name,
            steps=steps,
            scale=scale,
        )
        return lambda: np.asarray(sample(self.params, self.keys, self.conditions))

    def draw(self, name: str, steps: int, scale: float | None = None) -> tuple[np.ndarray, float]:
        """Generates images; also returns the share that the classifier reads as the requested digit."""
        images = self.codec.decode(self.sampler(name, steps, scale)())
        return images, float(np.mean(self.reader.read(images) == self.asked))


def time_a_step(demo: Demo) -> dict[str, dict[str, float]]:
    """Measures CPU milliseconds per step and image in alternating rounds: median, fastest, slowest round.

    The CPU time of all threads is used because other work on the machine affects it least.
    """
    runs = {name: demo.sampler(name, TIMED_STEPS) for name in SAMPLERS}
    for run in runs.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in SAMPLERS}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds = time.process_time() - start
            found[name].append(1e3 * seconds / TIMED_STEPS / len(demo.asked))
    return {
        name: {"median": statistics.median(values), "fastest": min(values), "slowest": max(values)}
        for name, values in found.items()
    }


def draw_all(demo: Demo, plot: Path) -> dict:
    """Returns the shares that are read as the requested digit, and writes the images to `plot`."""
    by_sampler: dict[str, dict[int, float]] = {name: {} for name in SAMPLERS}
    by_scale: dict[float, float] = {}
    figure, axes = plt.subplots(len(SAMPLERS) + 1, len(STEPS), figsize=(10, 5.4), layout="constrained")
    for row, name in zip(axes, SAMPLERS):
        for axis, steps in zip(row, STEPS):
            images, by_sampler[name][steps] = demo.draw(name, steps)
            show(axis, images, f"{steps} steps: {by_sampler[name][steps]:.0%}")
        row[0].set_ylabel(name, fontsize=9)
        print(name, by_sampler[name], flush=True)
    for axis, scale in zip(axes[-1], GUIDANCE_SCALES):
        images, by_scale[scale] = demo.draw("dpm_solver", GUIDANCE_STEPS, scale)
        show(axis, images, f"scale {scale:g}: {by_scale[scale]:.0%}")
    axes[-1, 0].set_ylabel("guidance", fontsize=9)
    print("guidance", by_scale, flush=True)
    figure.savefig(plot, dpi=100)
    Image.open(plot).convert("L").save(plot, optimize=True)  # grayscale takes half the bytes
    return {
        "samples": len(demo.asked),
        "reader_on_held_out_scans": demo.reader.accuracy,
        "read as asked, by sampler and steps": by_sampler,
        f"read as asked, by guidance scale, dpm_solver, {GUIDANCE_STEPS} steps": by_scale,
    }


def show(axis: plt.Axes, images: np.ndarray, title: str) -> None:
    axis.imshow(picture_grid(images[:10], columns=5, magnify=3))
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(title, fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "demo/stage3")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--part", choices=("all", "pictures", "time"), default="all")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "benchmarks/results/demo_samplers.json",
        help="JSON file; results of the other part are kept",
    )
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/demo-samplers.png")
    arguments = parser.parse_args()
    demo = Demo(arguments.checkpoint, arguments.samples)
    report = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    if arguments.part != "time":
        report |= draw_all(demo, arguments.plot)
    if arguments.part != "pictures":
        report["CPU milliseconds a step and image"] = time_a_step(demo)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
