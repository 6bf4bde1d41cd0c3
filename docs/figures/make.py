"""Makes the figures of docs/how-it-works.md.

    python docs/figures/make.py                    # all figures
    python docs/figures/make.py schedule paths     # some of them
    python docs/figures/make.py --out=FOLDER       # elsewhere than docs/figures

`DEMO` lists the figures that need the weights of `make demo`, in demo/. All others need only this project.
Every figure calls the code that it explains, and always comes out the same on the same machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import mixture  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402

from pixart_jax.benchmarking.flops import forward_flops  # noqa: E402
from pixart_jax.config import TrainConfig  # noqa: E402
from pixart_jax.data.digits import caption_for, images_and_labels  # noqa: E402
from pixart_jax.denoiser import Denoiser  # noqa: E402
from pixart_jax.diffusion.multistep import initial_noise  # noqa: E402
from pixart_jax.diffusion.objective import diffusion_loss  # noqa: E402
from pixart_jax.diffusion.samplers import ddim, dpm_solver  # noqa: E402
from pixart_jax.diffusion.schedule import add_noise, linear_schedule  # noqa: E402
from pixart_jax.encoders.images import to_uint8  # noqa: E402
from pixart_jax.encoders.text import TextEncoder  # noqa: E402
from pixart_jax.evaluation.digits import train_reader  # noqa: E402
from pixart_jax.models.attention import compact_keys  # noqa: E402
from pixart_jax.models.configs import PixArtConfig  # noqa: E402
from pixart_jax.models.elementwise import add_gated, modulate  # noqa: E402
from pixart_jax.models.layers import position_table, sinusoid, split_modulation, unpatchify  # noqa: E402
from pixart_jax.sampling import guided_noise, image_keys, make_sampler, sample_in_batches  # noqa: E402
from pixart_jax.weights.checkpoints import read_weights  # noqa: E402

FOLDER = Path(__file__).parent
SCHEDULE = linear_schedule()

plt.rcParams.update(
    {
        "figure.dpi": 110,
        "savefig.facecolor": "white",
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
    }
)


# --- The trained demo ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Demo:
    """A stage of `make demo` with text: its weights, and what is needed to call its network."""

    params: dict[str, Any]
    config: TrainConfig

    @property
    def denoiser(self) -> Denoiser:
        return Denoiser.of(self.config.for_sampling())

    @property
    def size(self) -> int:
        """Side of an image in pixels."""
        return self.config.features.image_size

    def conditions(self, captions: Sequence[str]) -> dict[str, jax.Array]:
        """Encodes captions: the conditions of images of the stage's own size."""
        encoder = TextEncoder(self.config.features.text_encoder, self.config.features.text_length)
        text, lengths = encoder.encode(list(captions))
        count = len(captions)
        given = {
            "text": jnp.asarray(text),
            "text_mask": jnp.asarray(np.arange(text.shape[1]) < lengths[:, None]),
            "image_size": jnp.full((count, 2), float(self.size)),
            "aspect_ratio": jnp.ones((count, 1)),
        }
        return self.denoiser.conditions(given)


@functools.cache
def demo(stage: str) -> Demo:
    """Reads the moving average of a stage of `make demo`."""
    return Demo(*read_weights(ROOT / "demo" / stage))


def digits(split: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns scans [N, size, size, 1] with values in [-1, 1], and their labels [N]."""
    images, labels, _ = images_and_labels(split, size)
    return images / np.float32(127.5) - 1, labels


def recorded(sampler: Callable, fn: Callable, noise: jax.Array, schedule: Any, **options: Any):
    """Runs a sampler, and records what it passes to the network.

    Returns:
      timesteps [N], the sample before every step and after the last one [N + 1, B, ...], and the predictions
      of the clean sample [N, B, ...].
    """
    seen: list[tuple[float, np.ndarray]] = []

    def watching(x, t):
        jax.debug.callback(lambda x, t: seen.append((float(t[0]), np.asarray(x))), x, t, ordered=True)
        return fn(x, t)

    x, clean = jax.jit(lambda x: sampler(watching, x, schedule, return_x0=True, **options))(noise)
    jax.effects_barrier()
    times, samples = zip(*seen)
    return np.array(times), np.stack([*samples, np.asarray(x)]), np.asarray(clean)


def show(axes: plt.Axes, image: np.ndarray, title: str = "", **options: Any) -> None:
    """Shows one image with values in [-1, 1], white for ink."""
    axes.imshow(np.asarray(image).squeeze(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest", **options)
    axes.set(xticks=[], yticks=[], title=title)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color("0.7")


def row_label(axes: plt.Axes, text: str) -> None:
    axes.set_ylabel(text, rotation=0, ha="right", va="center", labelpad=8)


# --- Sections 1 to 3: noise ---------------------------------------------------------------------------

FORWARD_STEPS = (0, 50, 100, 200, 300, 400, 500, 700, 999)


def noisy(x0: np.ndarray, steps: Sequence[int], seed: int = 0) -> np.ndarray:
    """The same image with the same noise at several steps: x0 [H, W, C] -> [len(steps), H, W, C]."""
    noise = jax.random.normal(jax.random.key(seed), x0.shape)
    every = [jnp.broadcast_to(array, (len(steps), *x0.shape)) for array in (x0, noise)]
    return np.asarray(add_noise(SCHEDULE, *every, jnp.array(steps)))


def forward() -> plt.Figure:
    """A real digit at several steps of the forward process, and the distribution of its pixels."""
    images, labels = digits("test", 16)
    x0 = images[np.flatnonzero(labels == 3)[0]]
    figure, axes = plt.subplots(2, len(FORWARD_STEPS), figsize=(10, 2.6), height_ratios=(2, 1), sharey="row")
    bins = np.linspace(-3.5, 3.5, 29)
    for column, (step, x) in enumerate(zip(FORWARD_STEPS, noisy(x0, FORWARD_STEPS))):
        signal = np.sqrt(SCHEDULE.alphas_cumprod[step])
        show(axes[0, column], x, f"t = {step}\n{signal:.2f} image\n+ {np.sqrt(1 - signal**2):.2f} noise")
        axes[1, column].hist(x.ravel(), bins, density=True, color="C0")
        axes[1, column].plot(bins, np.exp(-(bins**2) / 2) / np.sqrt(2 * np.pi), "C1", lw=1)
        axes[1, column].set(yticks=[], ylim=(0, 1), xticks=(-2, 0, 2))
    row_label(axes[0, 0], "$x_t$")
    row_label(axes[1, 0], "values\nof the\npixels")
    return figure


def schedule() -> plt.Figure:
    """Signal and noise level, the SNR, and the SNR of the average of several pixels."""
    steps = np.arange(SCHEDULE.num_steps)
    alpha, sigma = SCHEDULE.marginal(steps)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.1))
    left.plot(steps, alpha, "C0", label=r"signal $\sqrt{\bar\alpha_t}$")
    left.plot(steps, sigma, "C3", label=r"noise $\sqrt{1-\bar\alpha_t}$")
    left.plot(steps, 25 * SCHEDULE.betas, "0.6", ls="--", label=r"$25\,\beta_t$, the noise added by one step")
    equal = int(np.searchsorted(-SCHEDULE.alphas_cumprod, -0.5))
    left.axvline(equal, color="0.6", lw=0.8)
    left.annotate(f"equal at t = {equal}", (equal + 10, 0.02), color="0.3", fontsize=8)
    left.set(xlabel="step t", title="Levels of signal and noise", xlim=(0, 999), ylim=(0, 1.05))
    left.legend(loc="center right", bbox_to_anchor=(1, 0.72), fontsize=8)
    for factor, style in ((1, "-"), (2, "--"), (4, ":")):
        label = "one pixel" if factor == 1 else f"average of {factor} × {factor} equal pixels"
        right.semilogy(steps, factor**2 * SCHEDULE.signal_noise_ratio, f"C2{style}", label=label)
    right.axhline(1, color="0.6", lw=0.8)
    right.set(xlabel="step t", title=r"Signal-to-noise ratio $\bar\alpha_t/(1-\bar\alpha_t)$", xlim=(0, 999))
    right.legend(fontsize=8)
    return figure


RESOLUTION_STEPS = (200, 400, 600, 700, 800)
ENLARGED = 8


def averaged(x: np.ndarray, factor: int) -> np.ndarray:
    """Averages factor x factor pixels: [N, H, W, C] -> [N, H / factor, W / factor, C]."""
    count, height, width, channels = x.shape
    cells = x.reshape(count, height // factor, factor, width // factor, factor, channels)
    return cells.mean(axis=(2, 4))


def stretched(x: np.ndarray) -> np.ndarray:
    """Moves the values of each image [N, ...] to mean 0 and standard deviation 0.8, only to show them."""
    axes = tuple(range(1, x.ndim))
    return 0.8 * (x - x.mean(axis=axes, keepdims=True)) / x.std(axis=axes, keepdims=True)


def resolution() -> plt.Figure:
    """The same picture with 8 x 8 and with 64 x 64 pixels, at the same steps."""
    images, labels = digits("test", 8)
    small = images[np.flatnonzero(labels == 4)[1]]
    large = small.repeat(ENLARGED, axis=0).repeat(ENLARGED, axis=1)
    rows = {
        "8 × 8 pixels": noisy(small, RESOLUTION_STEPS, seed=1),
        "64 × 64 pixels": noisy(large, RESOLUTION_STEPS, seed=1),
        "the same, averaged\nto 8 × 8 pixels\n(contrast stretched)": stretched(
            averaged(noisy(large, RESOLUTION_STEPS, seed=1), ENLARGED)
        ),
    }
    figure, axes = plt.subplots(3, 1 + len(RESOLUTION_STEPS), figsize=(8, 3.9))
    for row, ((name, pictures), clean) in enumerate(zip(rows.items(), (small, large, small))):
        row_label(axes[row, 0], name)
        show(axes[row, 0], clean, "clean" if row == 0 else "")
        for column, (step, picture) in enumerate(zip(RESOLUTION_STEPS, pictures), 1):
            show(axes[row, column], picture, f"t = {step}" if row == 0 else "")
    return figure


# --- Section 2: the loss ------------------------------------------------------------------------------

LOSS_STEPS = np.unique(np.r_[0, 3, 10, np.linspace(25, 999, 28).astype(int)])


def loss_by_step(trained: Demo, steps: Sequence[int], seed: int = 0) -> dict[str, np.ndarray]:
    """The terms of the loss on the held-out digits, without min-SNR weights: arrays [len(steps)]."""
    x0, labels = digits("test", trained.size)
    conditions = trained.conditions([caption_for(int(label), number) for number, label in enumerate(labels)])
    network = trained.denoiser

    @jax.jit
    def terms(params, step, key):
        noise = jax.random.normal(key, x0.shape)
        t = jnp.full(len(x0), step)
        output = network(params, add_noise(SCHEDULE, x0, noise, t), t, conditions)
        found = diffusion_loss(SCHEDULE, output, x0, noise, t)
        return {name: value.mean() for name, value in found.items()}

    every = [terms(trained.params, step, jax.random.fold_in(jax.random.key(seed), step)) for step in steps]
    return {name: np.array([float(found[name]) for found in every]) for name in every[0]}


def loss() -> plt.Figure:
    """The loss of the trained stages 2 and 3 at each step."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3.1))
    snr = SCHEDULE.signal_noise_ratio[LOSS_STEPS]
    for stage, color in (("stage2", "C0"), ("stage3", "C1")):
        trained = demo(stage)
        terms = loss_by_step(trained, LOSS_STEPS)
        label = f"{stage}, {trained.size} × {trained.size} px"
        left.semilogy(LOSS_STEPS, terms["mse"], f"{color}-", label=label)
        middle.semilogy(LOSS_STEPS, terms["mse"] / snr, f"{color}-", label=label)
        right.semilogy(LOSS_STEPS, terms["vb"], f"{color}-", label=label)
        train, _ = digits("train", trained.size)
        middle.axhline(train.var(axis=0).mean(), color=color, lw=0.8, ls=":")
    left.axhline(1, color="0.6", lw=0.8, ls=":")
    left.annotate("always answering 0", (990, 0.92), color="0.3", va="top", ha="right", fontsize=8)
    middle.annotate("dotted: always answering the mean digit", (25, 0.42), color="0.3", fontsize=8)
    left.set_title("Error of the predicted noise")
    middle.set_title("The same as error of the clean image")
    right.set_title("Variational bound (bits per value)")
    for axes in (left, middle, right):
        axes.set(xlabel="step t", xlim=(0, 999))
    right.legend(fontsize=8)
    return figure


# --- Section 4: sampling ------------------------------------------------------------------------------


def exact_path(start: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """The exact solution of the sampling equation of the mixture, from its values at step 999.

    The solution keeps the order of all values. So it maps each quantile of the distribution at one noise
    level to the same quantile at every other.

    Args:
      start: [n] values at step 999.
      steps: [N] steps; -1 is the clean data.

    Returns:
      [N, n].
    """
    levels = [mixture.SCHEDULE.marginal(step) if step >= 0 else (1.0, 0.0) for step in steps]
    probabilities = mixture.cdf(start, *mixture.SCHEDULE.marginal(999))
    return np.stack([mixture.quantiles(alpha, sigma, probabilities) for alpha, sigma in levels])


SOLVERS = {
    "DDIM": (functools.partial(ddim, spacing="trailing"), "C1"),
    "DPM-Solver++": (functools.partial(dpm_solver, spacing="linspace"), "C0"),
}
ERROR_STEPS = (3, 4, 6, 10, 15, 20, 30, 50, 100)


def solver_errors(count: int = 2000, steps: Sequence[int] = ERROR_STEPS) -> dict[str, list[float]]:
    """Mean distance of each solver to the exact solution, after each number of steps."""
    middles = (np.arange(count) + 0.5) / count
    start = mixture.quantiles(*mixture.SCHEDULE.marginal(999), middles)
    truth = exact_path(start, np.array([-1]))[0]
    x = jnp.asarray(start, jnp.float32).reshape(-1, 1, 1, 1)

    def error(solver, number):
        found = solver(mixture.exact_model, x, mixture.SCHEDULE, steps=number)
        return float(np.abs(np.asarray(found).ravel() - truth).mean())

    return {name: [error(solver, number) for number in steps] for name, (solver, _) in SOLVERS.items()}


def paths(few: int = 6) -> plt.Figure:
    """Few steps of DDIM and DPM-Solver++ on a known distribution, and the exact solution."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10.5, 3.6), width_ratios=(1.25, 1, 1))
    dense = np.arange(999, -2, -1)

    # One value: the probability of every value at every step, and four paths.
    values = np.linspace(-2.6, 2.6, 261)
    alpha, sigma = mixture.SCHEDULE.marginal(np.arange(1000))
    spread = np.sqrt((alpha * mixture.WIDTH) ** 2 + sigma**2)[:, None]
    density = sum(
        weight * np.exp(-((values - alpha[:, None] * centre) ** 2) / (2 * spread**2)) / spread
        for weight, centre in zip(mixture.WEIGHTS, mixture.CENTRES)
    )
    left.imshow(
        density[::-1].T, cmap="Greys", vmax=2.2, aspect="auto", origin="lower", extent=(999, 0, -2.6, 2.6)
    )
    starts = np.array([-1.5, -0.45, 0.25, 1.3])
    left.plot(dense, exact_path(starts, dense), "k", lw=1)
    for solver, color in SOLVERS.values():
        x = jnp.asarray(starts, jnp.float32).reshape(-1, 1, 1, 1)
        times, found, _ = recorded(solver, mixture.exact_model, x, mixture.SCHEDULE, steps=few)
        left.plot([*times, -1], found[:, :, 0, 0, 0], f"{color}o-", ms=3, lw=1)
    left.set(
        xlabel="step t, from noise to data", ylabel="value", xlim=(1010, -15), title="One value over time"
    )

    # Two independent values: a distribution with four modes.
    rng = np.random.default_rng(0)
    cloud = mixture.quantiles(probabilities=rng.uniform(size=800)).reshape(2, -1)
    middle.plot(*cloud, ".", color="0.8", ms=2)
    points = np.array([[0.45, -1.2], [-0.25, -0.55], [-1.3, 1.2], [1.6, 0.1], [0.35, 1.9]])
    exact = exact_path(points.ravel(), dense).reshape(len(dense), *points.shape)
    middle.plot(exact[:, :, 0], exact[:, :, 1], "k", lw=1)
    for solver, color in SOLVERS.values():
        x = jnp.asarray(points, jnp.float32).reshape(-1, 1, 1, 2)
        _, found, _ = recorded(solver, mixture.exact_model, x, mixture.SCHEDULE, steps=few)
        middle.plot(found[:, :, 0, 0, 0], found[:, :, 0, 0, 1], f"{color}o-", ms=3, lw=1)
    middle.plot(*points.T, "ks", ms=4)
    middle.set(title="Two values; squares: the noise", aspect="equal", xlim=(-2.3, 2.3), ylim=(-2.3, 2.3))

    for name, errors in solver_errors().items():
        right.loglog(ERROR_STEPS, errors, f"{SOLVERS[name][1]}o-", ms=3, label=name)
    right.plot([], [], "k", label="exact solution")
    right.set(xlabel="steps", title="Mean distance to the exact solution", xticks=(3, 10, 20, 50, 100))
    right.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    right.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    right.legend()
    return figure


def clean() -> plt.Figure:
    """The sample and the predicted clean image in every step of a sampling run of stage 3."""
    trained, steps = demo("stage3"), 10
    captions = [caption_for(digit, 0) for digit in (3, 9)]
    conditions = trained.conditions(captions)
    network = trained.denoiser
    null = network.null_conditions(trained.params, conditions)
    fn = guided_noise(network, trained.params, conditions, null, trained.config.guidance.scale)
    # The same noise for both captions.
    noise = initial_noise(image_keys(np.zeros(2, int)), (trained.size, trained.size, 1))
    times, samples, predictions = recorded(dpm_solver, fn, noise, SCHEDULE, steps=steps, spacing="linspace")
    figure, axes = plt.subplots(4, steps + 1, figsize=(10, 3.5))
    for index, caption in enumerate(captions):
        top, bottom = axes[2 * index : 2 * index + 2]
        row_label(top[0], f"“{caption}”\n$x_t$")
        row_label(bottom[0], r"predicted $\hat x_0$")
        for column in range(steps):
            title = f"t = {times[column]:.0f}" if index == 0 else ""
            show(top[column], samples[column, index], title)
            show(bottom[column], predictions[column, index])
        show(top[steps], samples[steps, index], "result" if index == 0 else "")
        bottom[steps].axis("off")
    return figure


# --- Section 5: guidance ------------------------------------------------------------------------------

GUIDANCE_SCALES = (1.0, 2.0, 4.0, 8.0, 16.0)


def guidance_sweep(trained: Demo, count: int = 200) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Generates `count` digits with each guidance scale, with the same seeds.

    Returns:
      images [scales, count, H, W, 1] uint8; the share [scales] that a classifier reads as requested; and the
      standard deviation [scales] of the pixels (0 to 255) among images of the same digit.
    """
    requested = np.arange(count) % 10
    conditions = trained.conditions([caption_for(int(d), i // 10) for i, d in enumerate(requested)])
    keys = image_keys(np.arange(count))
    reader = train_reader(trained.size)
    images, read, spread = [], [], []
    for scale in GUIDANCE_SCALES:
        sample = make_sampler(trained.denoiser, height=trained.size, width=trained.size, scale=scale)
        images.append(to_uint8(sample_in_batches(sample, trained.params, keys, conditions, 100)))
        read.append(np.mean(reader.read(images[-1]) == requested))
        each = [images[-1][requested == digit].std(axis=0).mean() for digit in range(10)]
        spread.append(np.mean(each))
    return np.stack(images), np.array(read), np.array(spread)


def guidance() -> plt.Figure:
    """Digits of stage 3 with several guidance scales."""
    images, read, spread = guidance_sweep(demo("stage3"))
    figure, axes = plt.subplots(len(GUIDANCE_SCALES), 10, figsize=(9, 4.3))
    for row, scale in enumerate(GUIDANCE_SCALES):
        row_label(
            axes[row, 0],
            f"scale {scale:g}\nread as requested {read[row]:.0%}\nspread {spread[row]:.0f}",
        )
        for digit in range(10):
            show(axes[row, digit], images[row, digit] / 127.5 - 1)
    return figure


# --- Sections 7 and 8: the network --------------------------------------------------------------------


def positions() -> plt.Figure:
    """The position table, the similarity of positions, and their interpolation."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10.5, 3.2), width_ratios=(1.2, 1, 1.3))
    width = 72
    table = position_table(16, 16, width, 16, 1.0).reshape(16, 16, width)
    left.imshow(table[5].T, cmap="RdBu", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    left.set(xlabel="column of the token (row 5)", ylabel="channel", title="Position table, D = 72")
    left.axhline(width / 2 - 0.5, color="k", lw=1)
    left.text(7.5, 0.25 * width, "column", ha="center", bbox={"fc": "white", "ec": "none", "pad": 1.5})
    left.text(7.5, 0.75 * width, "row", ha="center", bbox={"fc": "white", "ec": "none", "pad": 1.5})

    wide = position_table(32, 32, 1152, 32, 1.0)
    chosen = 9 * 32 + 20
    similar = (wide @ wide[chosen] / (wide[chosen] @ wide[chosen])).reshape(32, 32)
    shown = middle.imshow(similar, cmap="viridis", interpolation="nearest")
    middle.plot(20, 9, "w+", ms=9)
    figure.colorbar(shown, ax=middle, shrink=0.85)
    middle.set(title="Similarity to the token at +\n(32 × 32 tokens, D = 1152)")
    for axes in (left, middle):
        axes.grid(False)

    rows = {
        "8 × 8 px: 4 tokens\nbase 4, scale 1": (4, 4, 1.0),
        "16 × 16 px: 8 tokens\nbase 8, scale 1": (8, 8, 1.0),
        "16 × 16 px: 8 tokens\nbase 8, scale 2": (8, 8, 2.0),
    }
    for height, (tokens, base, scale) in enumerate(rows.values()):
        # The first channel of a table is the sine of the position itself, so it can be read off.
        table = position_table(1, tokens, 4, base, scale)
        where = np.unwrap(np.arctan2(table[:, 0], table[:, 1]))
        color = "C3" if height == 1 else "C0"
        right.plot(where, np.full(tokens, -height), f"{color}o")
    right.axvspan(-0.3, 3.3, color="C0", alpha=0.12)
    right.annotate("range that stage 2\nhas learned", (1.5, 0.62), ha="center", va="center", fontsize=8)
    right.set(
        yticks=(0, -1, -2), yticklabels=list(rows), xlabel="position", title="Interpolated positions",
        ylim=(-2.5, 1), xlim=(-0.5, 7.5),
    )  # fmt: skip
    return figure


def attention_maps(
    trained: Demo, latents: jax.Array, timesteps: jax.Array, conditions: dict[str, jax.Array]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs a PixArt block by block, and keeps the weights of attention.

    Returns:
      the network's output; the weights of self-attention [blocks, B, heads, tokens, tokens]; and those of
      cross-attention [blocks, B, heads, tokens, text tokens].
    """
    model = nnx.merge(trained.denoiser.graph, trained.params)
    model.blocks.unstack()
    height, width = latents.shape[1:3]

    def weights(query, key, lengths=None):
        logits = jnp.einsum("bnhk,bshk->bhns", query, key) / np.sqrt(query.shape[-1])
        if lengths is not None:
            valid = jnp.arange(key.shape[1]) < lengths[:, None, None, None]
            logits = jnp.where(valid, logits, -jnp.inf)
        return jax.nn.softmax(logits)

    x = model.patch_embed(latents)
    t = model.t_embedder(sinusoid(timesteps))
    if model.config.size_conditions:
        t = t + model._size_embedding(conditions["image_size"], conditions["aspect_ratio"])
    modulation = model.t_block(jax.nn.silu(t))
    text, lengths = compact_keys(model.text_proj(conditions["text"]), conditions["text_mask"])
    to_image, to_text = [], []
    for block in model.blocks.stacked:
        table = block.scale_shift_table + modulation
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = split_modulation(table)
        inner = modulate(x, shift_1, scale_1)
        query, key, _ = block.attn.qkv.heads(inner, separate=False)
        to_image.append(weights(query, key))
        x = add_gated(x, gate_1, block.attn(inner))
        (query,) = block.cross_attn.q.heads(x, separate=False)
        to_text.append(weights(query, block.cross_attn.kv.heads(text, separate=False)[0], lengths))
        x = x + block.cross_attn(x, text, lengths)
        x = add_gated(x, gate_2, block.mlp(modulate(x, shift_2, scale_2)))
    output = unpatchify(model.final_layer(x, t), height, width, model.config.patch_size)
    return tuple(np.asarray(a) for a in (output, jnp.stack(to_image), jnp.stack(to_text)))


def attention() -> plt.Figure:
    """Self-attention of two patches, and cross-attention to the letters of three captions, in stage 3."""
    trained = demo("stage3")
    images, labels = digits("test", trained.size)
    captions = [caption_for(digit, 2) for digit in (0, 3, 8)]
    x0 = jnp.asarray(np.stack([images[np.flatnonzero(labels == digit)[0]] for digit in (0, 3, 8)]))
    t = jnp.full(len(x0), 300)
    x = add_noise(SCHEDULE, x0, jax.random.normal(jax.random.key(0), x0.shape), t)
    _, to_image, to_text = attention_maps(trained, x, t, trained.conditions(captions))

    grid = trained.size // trained.config.model.patch_size
    figure = plt.figure(figsize=(10, 4.1))
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.3, 1))
    blocks = (0, 1, 3)
    axes = upper.subplots(2, 1 + 4 * len(blocks))
    for row, token in enumerate(((2, 5), (5, 2))):
        show(axes[row, 0], x[0], "input\nt = 300" if row == 0 else "")
        for column, (block, head) in enumerate(((b, h) for b in blocks for h in range(4)), 1):
            weights = to_image[block, 0, head, token[0] * grid + token[1]].reshape(grid, grid)
            axes[row, column].imshow(weights, cmap="magma", vmin=0, interpolation="nearest")
            title = f"block {block + 1}\nhead {head + 1}" if row == 0 else ""
            axes[row, column].set(xticks=[], yticks=[], title=title)
            axes[row, column].grid(False)
            axes[row, column].plot(token[1], token[0], "c+", ms=7)
        axes[row, 0].plot(2 * token[1] + 0.5, 2 * token[0] + 0.5, "c+", ms=9, mew=2)
    for index, panel in enumerate(lower.subplots(1, 3, sharey=True)):
        caption = captions[index]
        weights = 100 * to_text[:, index].mean(axis=(0, 1, 2))[: len(caption) + 1]
        panel.bar(range(len(weights)), weights, color="C0")
        panel.set(xticks=range(len(weights)), xticklabels=[*caption.replace(" ", "␣"), "end"])
        panel.set(title=f"“{caption}”", ylabel="weight, %" if index == 0 else "")
    return figure


def block() -> plt.Figure:
    """The network and one of its blocks, as a diagram."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5.6), width_ratios=(1.05, 1))
    for axes in (left, right):
        axes.set(xlim=(0, 10), ylim=(0, 12))
        axes.axis("off")
    blue, orange, green, grey = "#cfe2f3", "#fce5cd", "#d9ead3", "#eeeeee"

    def box(axes, x, y, text, color, width=3.4, height=0.9):
        patch = FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0.03", fc=color, ec="0.35"
        )
        axes.add_patch(patch)
        axes.text(x, y, text, ha="center", va="center", fontsize=8.5)

    def arrow(axes, start, end, **options):
        axes.annotate(
            "",
            end,
            start,
            arrowprops={"arrowstyle": "-|>", "color": "0.25", "shrinkA": 0, "shrinkB": 0, **options},
        )

    # The whole network, from bottom to top.
    left.set_title("PixArt")
    box(left, 2.6, 0.7, "noisy latent $x_t$\n[h, w, C]", grey)
    box(left, 2.6, 2.4, "patches → linear\n[N, D]", blue)
    box(left, 2.6, 4.0, "+ position table", blue, height=0.7)
    box(left, 2.6, 6.3, "block 1\n…\nblock L", blue, height=2.4)
    box(left, 2.6, 9.0, "final layer\nLN, shift, scale, linear", blue)
    box(left, 2.6, 10.8, "noise and variance\n[h, w, 2C]", grey)
    for start, end in ((1.15, 1.95), (2.85, 3.65), (4.35, 5.1), (7.5, 8.55), (9.45, 10.35)):
        arrow(left, (2.6, start), (2.6, end))
    box(left, 7.6, 0.7, "caption tokens (T5)\n[S, T], and mask", grey)
    box(left, 7.6, 2.4, "text_proj, MLP\n[S, D]", green)
    arrow(left, (7.6, 1.15), (7.6, 1.95))
    arrow(left, (7.6, 2.85), (4.35, 5.6), connectionstyle="arc3,rad=0.12")
    left.text(6.75, 4.55, "keys and values", fontsize=8, color="0.3", rotation=-38, ha="center", va="center")
    box(left, 7.6, 10.8, "step t", grey)
    box(left, 7.6, 9.0, "t_embedder\nsinusoid, MLP  [D]", orange)
    box(left, 7.6, 7.0, "t_block\nSiLU, linear  [6, D]", orange)
    arrow(left, (7.6, 10.35), (7.6, 9.45))
    arrow(left, (7.6, 8.55), (7.6, 7.45))
    arrow(left, (5.9, 9.0), (4.3, 9.0))
    arrow(left, (5.9, 7.0), (4.3, 6.8))
    left.text(5.1, 7.15, "to all blocks", fontsize=8, color="0.3", ha="center")

    # One block.
    right.set_title("One block")
    parts = (
        (1.9, "LN, × (1 + scale$_1$) + shift$_1$", orange),
        (3.1, "self-attention", blue),
        (4.3, "× gate$_1$", orange),
        (6.3, "cross-attention to the caption", green),
        (8.1, "LN, × (1 + scale$_2$) + shift$_2$", orange),
        (9.2, "MLP: D → 4D → D, GELU", blue),
        (10.3, "× gate$_2$", orange),
    )
    for y, text, color in parts:
        box(right, 5.2, y, text, color, width=4.9, height=0.75)
    stream = 1.4
    arrow(right, (stream, 0.3), (stream, 11.8))
    right.text(stream, 0.1, "tokens x  [N, D]", ha="center", va="top", fontsize=8.5)
    for first, last in ((1.9, 4.3), (6.3, 6.3), (8.1, 10.3)):
        enter, leave = first - 0.75, last + 0.75
        right.plot((stream, 5.2), (enter, enter), color="0.25", lw=1)
        arrow(right, (5.2, enter), (5.2, first - 0.4))
        right.plot((5.2, 5.2), (last + 0.4, leave), color="0.25", lw=1)
        arrow(right, (5.2, leave), (stream + 0.23, leave))
        right.text(stream, leave, "+", ha="center", va="center", fontsize=11,
                   bbox={"boxstyle": "circle,pad=0.12", "fc": "white", "ec": "0.35"})  # fmt: skip
        for y, *_ in parts:
            if first < y <= last:
                below = max(other for other, *_ in parts if other < y)
                arrow(right, (5.2, below + 0.4), (5.2, y - 0.4))
    right.text(8.0, 1.9, "shift, scale, gate =\nt_block(t) + the\nblock's own table", fontsize=8, color="0.3",
               va="center")  # fmt: skip
    right.text(
        8.0, 6.3, "no norm, no gate;\nthe last layer\nstarts at zero", fontsize=8, color="0.3", va="center"
    )
    return figure


# --- Section 10: training -----------------------------------------------------------------------------


def training() -> plt.Figure:
    """What stage 2 of the demo logged."""
    lines = [json.loads(line) for line in (ROOT / "demo/stage2/metrics.jsonl").read_text().splitlines()]

    def curve(name):
        found = [(line["step"], line[name]) for line in lines if name in line]
        return np.array(found).T

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 2.9))
    left.semilogy(*curve("loss"), "C0", label="training, min-SNR weights")
    left.semilogy(*curve("validation_loss"), "C3o-", label="validation, moving average")
    left.set(title="Loss")
    left.legend(fontsize=8)
    parts = 8
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, parts))
    for part in range(parts):
        middle.semilogy(
            *curve(f"validation_loss_part_{part}"), "o-", ms=3, color=colors[part],
            label=f"t = {125 * part + 62}",
        )  # fmt: skip
    middle.set(title="Validation loss by step t")
    middle.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    right.semilogy(*curve("gradient_norm"), "C0", label="gradient norm")
    right.axhline(1, color="0.6", lw=0.8, ls=":", label="clip_norm")
    right.set(title="Gradient norm")
    right.legend(fontsize=8)
    for axes in (left, middle, right):
        axes.set(xlabel="updates", xlim=(0, None))
    return figure


# --- Section 13: cost ---------------------------------------------------------------------------------

SIDES = (256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
PARTS = {
    "projections": "linear layers and MLPs of the blocks",
    "self_attention": "self-attention between image tokens",
    "cross_attention": "cross-attention to the caption",
    "embeddings": "embeddings and last layer",
}


def flops_by_part(**changes: Any) -> dict[str, np.ndarray]:
    """FLOPs of a forward pass of PixArt-Σ-XL/2 on one image of each of `SIDES`, by part."""
    model = PixArtConfig(text_length=300, **changes)
    counts = [forward_flops(model, side // 8, side // 8) for side in SIDES]
    return {part: np.array([getattr(count, part) for count in counts]) for part in PARTS}


def flops() -> plt.Figure:
    """Where the FLOPs of a forward pass go, by image size."""
    plain, compressed = flops_by_part(), flops_by_part(kv_compression="conv")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.3), width_ratios=(1.2, 1))
    total = sum(plain.values())
    left.stackplot(
        SIDES, *(100 * plain[part] / total for part in PARTS), labels=PARTS.values(),
        colors=("C0", "C3", "C2", "0.6"), alpha=0.85,
    )  # fmt: skip
    left.set(title="PixArt-Σ-XL/2: share of the FLOPs, %", ylim=(0, 100))
    left.legend(loc="lower left", fontsize=8, frameon=True, framealpha=0.9)
    right.loglog(SIDES, total / 1e12, "C3o-", ms=3, label="all keys and values")
    right.loglog(
        SIDES, sum(compressed.values()) / 1e12, "C0o-", ms=3, label="compressed in half of the blocks"
    )
    tokens = np.square(np.array(SIDES) / 16)
    right.loglog(
        SIDES, total[0] / 1e12 * tokens / tokens[0], "k:", lw=1, label="if proportional to the tokens"
    )
    right.set(title="TFLOP of a forward pass on one image")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.set(xscale="log", xlabel="side of the image in pixels", xticks=(256, 512, 1024, 2048, 4096))
        axes.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axes.set_xlim(256, 4096)
    return figure


FIGURES = {
    make.__name__: make
    for make in (
        forward, loss, schedule, resolution, paths, clean,
        guidance, positions, attention, block, training, flops,
    )
}  # fmt: skip
# Those that read demo/stage2 or demo/stage3.
DEMO = ("loss", "clean", "guidance", "attention", "training")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FIGURES)}; default: all")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the PNG files")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.names if name not in FIGURES]
    if unknown:
        parser.error(f"no figure {', '.join(map(repr, unknown))}: choose {', '.join(FIGURES)}")
    names = arguments.names or list(FIGURES)
    missing = [name for name in names if name in DEMO and not (ROOT / "demo" / "stage3").exists()]
    if missing:
        parser.error(f"{', '.join(missing)}: need the weights in demo/; run 'make demo' first")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        figure = FIGURES[name]()
        # No date and no version in the file, so that the same picture is the same file.
        figure.savefig(arguments.out / f"{name}.png", metadata={"Software": None})
        plt.close(figure)
        print(arguments.out / f"{name}.png")


if __name__ == "__main__":
    main()
