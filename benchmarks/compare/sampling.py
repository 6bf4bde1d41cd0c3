"""Compares the sampling speed of this project and diffusers in one process, with equal weights and threads.

    python benchmarks/compare/sampling.py                  # CPU: 256 px, 10 steps, float32
    python benchmarks/compare/sampling.py --platform=gpu   # 512, 1024 px, 20 steps, bfloat16, torch.compile

Both sides run PixArt-XL/2 with classifier-free guidance and DPM-Solver++, from text features to latents: this
project with the compiled loop of `dpm_solver` over the guided model, diffusers with `PixArtAlphaPipeline`.
Results are only written if both produce the same latents. Rounds alternate. A ratio is the time of diffusers
divided by ours, for the medians and for single rounds; above 1 this project is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

# Set before any import that reads them. Spinning threads of PyTorch would slow JAX down.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

DEFAULTS = {
    "cpu": dict(sizes=[256], steps=10, dtype="float32", rounds=3, compile=False),
    "gpu": dict(sizes=[512, 1024], steps=20, dtype="bfloat16", rounds=10, compile=True),
}
GUIDANCE_SCALE = 4.5
TOKENS, PROMPT_TOKENS = 120, 40
# Maximum difference between the sides relative to the largest latent. In bfloat16 they round differently.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


def model_config(size: int, arguments: argparse.Namespace) -> Any:
    from pixart_jax.models.configs import PixArtConfig

    shape = dict(size="XL/2")
    if arguments.depth:
        width = dict(hidden_size=72 * arguments.heads, num_heads=arguments.heads)
        shape = dict(size="custom", depth=arguments.depth, **width)
    return PixArtConfig(
        **shape,
        base_size=size // 16,
        position_scale=2.0 if size == 1024 else 1.0,
        dtype=arguments.dtype,
        attention=arguments.attention,
        scan_layers=arguments.scan_layers,
    )


def random_weights(config: Any) -> dict[str, Any]:
    """Returns a state dict with the names of diffusers, in which no tensor is zero."""
    import numpy as np
    from flax import nnx, traverse_util

    from pixart_jax.models.pixart import PixArt
    from pixart_jax.weights.backbones import export_backbone
    from pixart_jax.weights.tables import parameter_shapes

    paths = parameter_shapes(nnx.eval_shape(lambda: PixArt(config, rngs=nnx.Rngs(0))))
    zeros = {path: np.broadcast_to(np.float32(0), shape) for path, shape in paths.items()}
    shapes, _ = export_backbone("diffusers", traverse_util.unflatten_dict(zeros), config)
    rng = np.random.default_rng(0)
    out = {}
    for name, shape in shapes.items():
        fan_in = np.prod(shape[1:]) if len(shape) > 1 else 100
        out[name] = rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(fan_in))
    return out


def inputs(config: Any, batch: int) -> dict[str, Any]:
    """Returns noise, and text features of a prompt and of the empty prompt, for each image."""
    import numpy as np

    rng = np.random.default_rng(1)
    side = config.base_size * config.patch_size
    mask = np.arange(TOKENS) < np.array([PROMPT_TOKENS, 1])[:, None, None]
    return {
        "noise": rng.standard_normal((batch, side, side, config.in_channels), np.float32),
        "text": rng.standard_normal((2, batch, TOKENS, config.text_dim), np.float32),
        "mask": np.repeat(mask.astype(np.int32), batch, axis=1),
    }


def make_ours(config: Any, weights: dict[str, Any], arrays: dict[str, Any], steps: int) -> tuple[Any, float]:
    """Returns () -> latents NHWC, and the seconds that compilation took."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from pixart_jax.denoiser import abstract_model
    from pixart_jax.diffusion.guidance import guide
    from pixart_jax.diffusion.samplers import dpm_solver
    from pixart_jax.diffusion.schedule import linear_schedule
    from pixart_jax.weights.backbones import import_backbone
    from pixart_jax.weights.files import Tensors

    tensors = Tensors(
        Path("random"), {name: value.shape for name, value in weights.items()}, weights.__getitem__
    )
    graph, _ = abstract_model(config)
    dtype = jnp.dtype(config.dtype)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, dtype), import_backbone("diffusers", tensors, config)
    )
    schedule = linear_schedule()

    def draw(params, noise, text, mask):
        model = nnx.merge(graph, params)
        fn = guide(
            lambda x, t, condition: model(x, t, *condition),
            (text[0], mask[0]),
            (text[1], mask[1]),
            GUIDANCE_SCALE,
        )
        return dpm_solver(fn, noise, schedule, steps=steps, spacing="linspace")

    given = jax.device_put([arrays["noise"], arrays["text"], arrays["mask"]])
    start = time.perf_counter()
    compiled = jax.jit(draw).lower(params, *given).compile()
    seconds = time.perf_counter() - start
    return lambda: jax.block_until_ready(compiled(params, *given)), seconds


def make_theirs(config: Any, weights: dict[str, Any], arrays: dict[str, Any], arguments: Any) -> Any:
    """Returns () -> latents NHWC."""
    import diffusers
    import torch

    from pixart_jax.weights.configs import to_diffusers_config

    torch.set_num_threads(arguments.threads)
    device = "cuda" if arguments.platform == "gpu" else "cpu"
    dtype = getattr(torch, config.dtype)
    values = {name: value for name, value in to_diffusers_config(config).items() if not name.startswith("_")}
    with torch.device("meta"):
        transformer = diffusers.PixArtTransformer2DModel(**values)
    # On a CPU diffusers uses these arrays themselves; this project has stacked copies.
    state = {name: torch.from_numpy(value).to(device, dtype) for name, value in weights.items()}
    missing = transformer.load_state_dict(state, strict=False, assign=True).missing_keys
    if any(parameter.is_meta for parameter in transformer.parameters()):
        raise SystemExit(f"diffusers has parameters that were not given: {missing}")
    # The position table is a buffer created in the constructor; on the device `meta` it has no values.
    side = config.base_size
    transformer.pos_embed.pos_embed = torch.tensor(
        positions(side, config.hidden_size, config.position_scale), device=device
    )[None]
    transformer.eval()
    if arguments.compile:
        transformer = torch.compile(transformer, mode=arguments.torch_mode)
    pipe = diffusers.PixArtAlphaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    text = torch.tensor(arrays["text"], dtype=dtype, device=device)
    mask = torch.tensor(arrays["mask"], device=device)
    noise = torch.tensor(arrays["noise"], dtype=dtype, device=device).permute(0, 3, 1, 2)

    @torch.inference_mode()
    def draw():
        out = pipe(
            negative_prompt=None,
            prompt_embeds=text[0],
            prompt_attention_mask=mask[0],
            negative_prompt_embeds=text[1],
            negative_prompt_attention_mask=mask[1],
            num_inference_steps=arguments.steps,
            guidance_scale=GUIDANCE_SCALE,
            height=8 * side * config.patch_size,
            width=8 * side * config.patch_size,
            latents=noise,
            output_type="latent",
            use_resolution_binning=False,
        ).images
        if device == "cuda":
            torch.cuda.synchronize()
        return out.permute(0, 2, 3, 1)

    return draw


def positions(side: int, width: int, scale: float) -> Any:
    import numpy as np

    from pixart_jax.models.layers import position_table

    return np.asarray(position_table(side, side, width, side, scale), np.float32)


def compare(size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    config = model_config(size, arguments)
    weights, arrays = random_weights(config), inputs(config, arguments.batch)
    ours, compile_seconds = make_ours(config, weights, arrays, arguments.steps)
    theirs = make_theirs(config, weights, arrays, arguments)
    del weights
    sides = {"pixart_jax": ours, "diffusers": theirs}
    # On a GPU the first call compiles and tunes. On a CPU a warm-up would only cost minutes.
    if arguments.platform == "gpu":
        for draw in sides.values():
            draw()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    # CPU time of all threads, because other work on the machine affects it least.
    cpu_seconds: dict[str, list[float]] = {name: [] for name in sides}
    results = {}
    for number in range(arguments.rounds):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            start, start_cpu = time.perf_counter(), time.process_time()
            results[name] = sides[name]()
            seconds[name].append(time.perf_counter() - start)
            cpu_seconds[name].append(time.process_time() - start_cpu)
        line = {name: round(times[-1], 2) for name, times in seconds.items()}
        print(f"{size} px, round {number + 1}: {line}", flush=True)
    here = np.asarray(results["pixart_jax"], np.float32)
    there = results["diffusers"].float().cpu().numpy()
    difference = float(np.abs(here - there).max() / np.abs(there).max())
    if not difference < TOLERANCE[config.dtype]:
        raise SystemExit(f"the latents differ by {difference:.1e} of the largest: no fair comparison.")
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rounds = [there / here for here, there in zip(seconds["pixart_jax"], seconds["diffusers"])]
    work = {name: statistics.median(times) for name, times in cpu_seconds.items()}
    report = {
        "pixels": size,
        "batch": arguments.batch,
        "tflop_per_image": tflop_per_image(config, arguments.steps),
        "seconds": seconds,
        "median_seconds": medians,
        "images_per_second": {name: arguments.batch / value for name, value in medians.items()},
        "median_seconds_a_step": {name: value / arguments.steps for name, value in medians.items()},
        "cpu_seconds": cpu_seconds,
        "compile_seconds": compile_seconds,
        "largest_difference": difference,
        "times_as_fast_as_diffusers": {
            "of_medians": medians["diffusers"] / medians["pixart_jax"],
            "of_single_rounds": [min(rounds), max(rounds)],
            "of_median_cpu_seconds": work["diffusers"] / work["pixart_jax"],
        },
    }
    return report


def tflop_per_image(config: Any, steps: int) -> float:
    """Counts two forward passes per step, because of guidance."""
    from pixart_jax.benchmarking.flops import forward_flops

    side = config.base_size * config.patch_size
    return 2 * steps * forward_flops(config, side, side, TOKENS).total / 1e12


def cpu_name() -> str:
    """Returns the CPU name that Linux reports, or else the architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--platform", choices=DEFAULTS, default="cpu")
    parser.add_argument(
        "--sizes", type=int, nargs="+", help="pixels; default 256 on a CPU, 512 1024 on a GPU"
    )
    parser.add_argument("--batch", type=int, default=1, help="images sampled at a time")
    parser.add_argument("--steps", type=int, help="default 10 on a CPU, 20 on a GPU")
    parser.add_argument("--rounds", type=int, help="batches of each side; default 3 on a CPU, 10 on a GPU")
    parser.add_argument("--dtype", choices=TOLERANCE, help="default float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--attention", default="auto", help="attention implementation of pixart_jax")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default on a GPU"
    )
    parser.add_argument(
        "--torch_mode",
        choices=("default", "max-autotune-no-cudagraphs"),
        default="max-autotune-no-cudagraphs",
        help="mode of torch.compile; max-autotune compiles for more than five minutes",
    )
    parser.add_argument("--scan_layers", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--threads", type=int, help="threads of each side on a CPU; default: all cores")
    parser.add_argument("--depth", type=int, help="number of blocks, for a quick run; default: that of XL/2")
    parser.add_argument(
        "--heads", type=int, default=16, help="with --depth: attention heads, each of width 72"
    )
    parser.add_argument(
        "--out", type=Path, help="JSON file; default benchmarks/results/sampling_PLATFORM.json"
    )
    arguments = parser.parse_args()
    for name, value in DEFAULTS[arguments.platform].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.threads = arguments.threads or len(os.sched_getaffinity(0))
    arguments.out = arguments.out or ROOT / f"benchmarks/results/sampling_{arguments.platform}.json"
    return arguments


def main() -> None:
    arguments = parse()
    # XLA uses as many threads as the process has cores.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    from pixart_jax.training.settings import apply_settings

    apply_settings()
    os.environ["JAX_PLATFORMS"] = {"cpu": "cpu", "gpu": "cuda"}[arguments.platform]
    import jax
    import torch

    if arguments.platform == "gpu":
        if not torch.cuda.is_available():
            raise SystemExit(
                "--platform=gpu needs an NVIDIA GPU, jax[cuda12] and PyTorch with CUDA: none here."
            )
        torch.backends.cuda.matmul.allow_tf32 = True
    import diffusers

    report = {
        "steps": arguments.steps,
        "guidance_scale": GUIDANCE_SCALE,
        "model": {
            name: getattr(arguments, name)
            for name in ("depth", "dtype", "attention", "scan_layers", "compile", "torch_mode")
        },
        "results": [compare(size, arguments) for size in arguments.sizes],
        "device": jax.devices()[0].device_kind if arguments.platform == "gpu" else cpu_name(),
        "threads": arguments.threads,
        "load_average_at_the_end": os.getloadavg(),
        "versions": {"jax": jax.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    print(json.dumps(report, indent=1))
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
