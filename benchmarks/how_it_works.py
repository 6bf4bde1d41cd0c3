"""Computes the numbers of docs/how-it-works.md that follow from shapes and schedules, or from the demo.

    make demo
    python benchmarks/how_it_works.py    # writes benchmarks/results/how_it_works.json

It runs the Python snippets of the page, so the numbers are those that a reader gets. It runs the commands of
exercises 9b and 10, which train one more network, in demo/stage2-scratch. What a figure shows is computed by
the functions that make the figure (docs/figures/make.py, which needs matplotlib). A test checks that the page
has these numbers (tests/benchmarks/test_how_it_works.py).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402
from jax.sharding import AbstractMesh  # noqa: E402

from pixart_jax.benchmarking.fit import Memory  # noqa: E402
from pixart_jax.benchmarking.flops import ForwardFlops, forward_flops  # noqa: E402
from pixart_jax.benchmarking.measuring import machine  # noqa: E402
from pixart_jax.config import PixArtConfig, TrainConfig, from_file  # noqa: E402
from pixart_jax.denoiser import abstract_model  # noqa: E402
from pixart_jax.diffusion.multistep import uniform_grid  # noqa: E402
from pixart_jax.diffusion.schedule import NoiseSchedule, linear_schedule, respace  # noqa: E402
from pixart_jax.files import write_json  # noqa: E402
from pixart_jax.training import sharding  # noqa: E402

PAGE = ROOT / "docs" / "how-it-works.md"
DIGITS = ROOT / "configs" / "digits.py"
RESULTS = ROOT / "benchmarks" / "results" / "how_it_works.json"
SCHEDULE = linear_schedule()
Numbers = dict[str, Any]


@functools.cache
def figures() -> ModuleType:
    """docs/figures/make.py as a module."""
    spec = importlib.util.spec_from_file_location("docs_figures", ROOT / "docs/figures/make.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- What needs no training ---------------------------------------------------------------------------


def noise_levels() -> Numbers:
    """Sections 1 to 3: the schedule, and the bounds of the learned variance."""
    snr, left = SCHEDULE.signal_noise_ratio, SCHEDULE.alphas_cumprod

    def ratios(schedule: NoiseSchedule) -> list[float]:
        return np.sqrt(schedule.posterior_variance / schedule.betas).tolist()

    every = ratios(SCHEDULE)
    return {
        "image level at t = 999": float(np.sqrt(left[999])),
        "noise level at t = 500": float(np.sqrt(1 - left[500])),
        "first step with more noise than image": int(np.argmax(left < 0.5)),
        "SNR": {"0": float(snr[0]), "999": float(snr[999])},
        "first step with a quarter of the SNR of t = 500": int(np.argmax(snr < snr[500] / 4)),
        "ratio of the bounds, 1000 steps": {str(t): every[t] for t in (1, 10, 100)},
        "ratio of the bounds, 20 steps": ratios(respace(SCHEDULE, 20)),
    }


def sampling() -> Numbers:
    """Sections 4 and 5: the error of 20 steps on a known distribution, and what an interval saves."""
    errors = figures().solver_errors(steps=(20,))
    # Of `dpm_solver` as the page calls it.
    timesteps = uniform_grid(SCHEDULE, 20, "time_uniform", final_sigma_zero=True).t
    return {
        "error of 20 steps": {name: error for name, (error,) in errors.items()},
        "standard deviation of a mode": figures().mixture.WIDTH,
        "steps above t = 700": int(np.sum(timesteps > 700)),
        "steps": len(timesteps),
    }


def flops() -> Numbers:
    """Sections 6, 12 and 13."""

    def of(side: int, **fields: Any) -> ForwardFlops:
        return forward_flops(PixArtConfig(**fields), side, side)

    def sigma(pixels: int, **fields: Any) -> ForwardFlops:
        return of(pixels // 8, text_length=300, **fields)

    def share(pixels: int) -> float:
        return sigma(pixels).self_attention / sigma(pixels).total

    without_vae = of(512, in_channels=3)
    sides = range(256, 4097, 16)  # of images of whole patches
    saved = {
        str(side): 1 - sigma(side, kv_compression="conv").total / sigma(side).total
        for side in (1024, 2048, 4096)
    }
    return {
        "TFLOP without a VAE": without_vae.total / 1e12,
        "TFLOP with a VAE": of(64).total / 1e12,
        "share of self-attention without a VAE": without_vae.self_attention / without_vae.total,
        "share of self-attention": {str(side): share(side) for side in (256, 1024, 2048)},
        "pixels where self-attention takes half": float(np.interp(0.5, list(map(share, sides)), sides)),
        "share that compression saves": saved,
    }


def parameters() -> Numbers:
    """Sections 8, 11 and 14: parameters, the memory of a training state, and an array on four devices."""

    def count(tree: Any) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    model = PixArtConfig()
    network = abstract_model(model)[1]
    matrix, tables = count(network["t_block"]), count(network["blocks"]["stacked"]["scale_shift_table"])
    trained = count(network) - count(network["null_text"])
    separate = trained - matrix - tables + model.depth * matrix

    axes = {"data": 2, "fsdp": 2}
    mesh = AbstractMesh(tuple(axes.get(axis, 1) for axis in sharding.MESH_AXES), sharding.MESH_AXES)
    first = abstract_model(from_file(f"{DIGITS}:stage1").model)[1]
    kernels = [
        tree["blocks"]["stacked"]["attn"]["qkv"]["kernel"]
        for tree in (nnx.to_pure_dict(first), sharding.parameter_shardings(mesh, first))
    ]
    return {
        "matrix of a block": matrix,
        "adaLN-single": matrix + tables,
        "XL/2": trained,
        "one matrix per block": model.depth * matrix,
        "share that adaLN-single saves": 1 - trained / separate,
        "GiB of the training state of XL/2": Memory.of(TrainConfig(model=model)).state / 2**30,
        "stage 3": Memory.of(from_file(f"{DIGITS}:stage3")).trained // 4,
        "LoRA of stage 3": Memory.of(from_file(f"{DIGITS}:lora")).trained // 4,
        "bytes of attn.qkv.kernel": 4 * count(kernels[0]),
        "bytes of attn.qkv.kernel on a device": sharding.bytes_per_device(*kernels),
    }


def counted() -> Numbers:
    return {make.__name__: make() for make in (noise_levels, sampling, flops, parameters)}


# --- What needs the demo ------------------------------------------------------------------------------


def run_snippets(page: str) -> Numbers:
    """Runs the Python snippets of a page in one namespace, and returns it."""
    names: Numbers = {"__name__": "__main__"}
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL), 1):
        exec(compile(code, f"snippet {number}", "exec"), names)
    return names


def page_commands(page: str, word: str) -> list[str]:
    """The commands of a page that contain a word: lines of shell snippets, and code in the text."""
    shell = "\n".join(re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    in_text = [" ".join(code.split()) for code in re.findall(r"(?<!`)`(python [^`]+)`", page)]
    return [line for line in [*shell.replace("\\\n", "").splitlines(), *in_text] if word in line]


def exercises() -> Numbers:
    """Exercises 2a, 5a and 5b, from the snippets of the page."""
    names = run_snippets(PAGE.read_text())
    return {
        "increase of the error by a wrong caption": {str(t): v for t, v in names["increase"].items()},
        "read as requested": {
            name: names["share_read"](names[name]) for name in ("drawn", "without", "late")
        },
    }


def errors_by_step() -> Numbers:
    """Section 2, as in the figure `loss`: the error at t = 0, and from where on the mean digit is better."""
    found = {"error at t = 0": {}, "first step where the mean digit is better": {}}
    steps = np.array([0, *range(700, SCHEDULE.num_steps, 10)])
    for stage in ("stage2", "stage3"):
        trained = figures().demo(stage)
        errors = figures().loss_by_step(trained, steps)["mse"]
        train, _ = figures().digits("train", trained.size)
        worse = errors / SCHEDULE.signal_noise_ratio[steps] > train.var(axis=0).mean()
        found["error at t = 0"][stage] = float(errors[0])
        found["first step where the mean digit is better"][stage] = int(steps[np.argmax(worse)])
    return found


def guidance() -> Numbers:
    """Section 5, as in the figure `guidance`: what a classifier reads, and the spread, by scale."""
    _, read, spread = figures().guidance_sweep(figures().demo("stage3"))
    scales = [f"{scale:g}" for scale in figures().GUIDANCE_SCALES]
    return {
        "read as requested": dict(zip(scales, read.tolist())),
        "spread": dict(zip(scales, spread.tolist())),
    }


def last_validation_loss(metrics: str) -> float:
    """The last validation loss in the text of a metrics.jsonl."""
    lines = map(json.loads, metrics.splitlines())
    return [line["validation_loss"] for line in lines if "validation_loss" in line][-1]


def runs() -> Numbers:
    """Exercises 9b and 10: runs the commands of the page, and reads what they have written."""
    page = PAGE.read_text()
    (val_loss,) = page_commands(page, "evaluate val-loss")
    options = {"ema": "", "raw": " --weights=raw"}
    commands = [
        *page_commands(page, "stage2-scratch"),
        *(f"{val_loss}{option} --out=demo/val-loss/{name}" for name, option in options.items()),
    ]
    for command in commands:
        print(f"$ {command}", flush=True)
        subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True)
    rows = json.loads(Path("demo/comparison/digits.json").read_text())
    found: Numbers = {"commands": commands, "9b": {}, "10": {}}
    for name, row in zip(("stage2", "stage2-scratch"), rows, strict=True):
        loss = last_validation_loss(Path("demo", name, "metrics.jsonl").read_text())
        found["9b"][name] = {"validation loss": loss, "read as requested": row["agreement"]}
    for name in options:
        stored = json.loads(Path("demo/val-loss", name, "val_loss.json").read_text())
        by_step = stored["validation_loss_at_timestep"]
        found["10"][name] = {"validation loss": stored["validation_loss"], "by step": by_step}
    return found


def measured() -> Numbers:
    return {make.__name__: make() for make in (exercises, errors_by_step, guidance, runs)}


# --- The page -----------------------------------------------------------------------------------------


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def percentages(shares: Mapping[str, float]) -> list[str]:
    """Shares by a number, in the order of the numbers: JSON files have another."""
    return [percent(shares[key]) for key in sorted(shares, key=int)]


def counted_passages(numbers: Numbers) -> list[str]:
    """The passages of the page with the numbers of `counted`, with single spaces."""
    levels, sampled, cost, sizes = (
        numbers[name] for name in ("noise_levels", "sampling", "flops", "parameters")
    )
    snr, every, few = (
        levels[name] for name in ("SNR", "ratio of the bounds, 1000 steps", "ratio of the bounds, 20 steps")
    )
    error, width = sampled["error of 20 steps"]["DPM-Solver++"], sampled["standard deviation of a mode"]
    part = {3: "a third", 4: "a quarter", 5: "a fifth"}[round(width / error)]
    skipped, steps = sampled["steps above t = 700"], sampled["steps"]
    spared = percent(skipped / (2 * steps))
    without, with_vae = cost["TFLOP without a VAE"], cost["TFLOP with a VAE"]
    attention = percentages(cost["share of self-attention"])
    saved = percentages(cost["share that compression saves"])
    matrix, qkv = sizes["matrix of a block"], "bytes of attn.qkv.kernel"
    return [
        f"only {100 * levels['image level at t = 999']:.1f} % of the image is left",
        rf"$\sqrt{{1-\bar\alpha_{{500}}}} = {levels['noise level at t = 500']:.2f}$",
        f"From $t = {levels['first step with more noise than image']}$ on",
        f"falls from {round(snr['0'], -1):,.0f} to {snr['999']:.5f}.",
        f"is {every['1']:.2f} at $t = 1$, {every['10']:.2f} at 10 and {every['100']:.2f} at 100",
        f"With {len(few)} steps it is {few[1]:.2f}, {few[2]:.2f} and {few[3]:.2f} in three of them",
        f"$t = {levels['first step with a quarter of the SNR of t = 500']}$, where the SNR is a quarter",
        f"they leave an error of {error:.2f}, {part} of the standard deviation of a mode",
        f"The second prediction of {skipped} of the {steps} steps: {spared} of the cost",
        f"{without:.0f} instead of {with_vae:.2f} TFLOP, {without / with_vae:.0f} times as many. "
        f"{percent(cost['share of self-attention without a VAE'])} of them are self-attention",
        "Self-attention takes {} of the FLOPs at 256 px, {} at 1024 px and {} at 2048 px".format(*attention),
        "**12.** {}, {} and {}.".format(*saved),
        f"At about {round(cost['pixels where self-attention takes half'], -1):,.0f} px",
        f"| {sizes['one matrix per block']:,} (28 × {matrix:,}) |",
        f"| adaLN-single: one matrix, 28 tables | {sizes['adaLN-single']:,} |",
        f"{sizes['XL/2']:,}, which is {percent(sizes['share that adaLN-single saves'])} less",
        f"take 16 bytes per parameter, {sizes['GiB of the training state of XL/2']:.1f} GiB in all",
        f"Four blocks have {sizes['LoRA of stage 3']:,}, beside the {sizes['stage 3']:,} of the network",
        f"such as {sizes[f'{qkv} on a device']:,} of the {sizes[qkv]:,} bytes of `attn.qkv.kernel`",
    ]


def measured_passages(numbers: Numbers) -> list[str]:
    """The passages of the page with the numbers of `measured`, with single spaces."""
    exercises, errors, commands = (numbers[name] for name in ("exercises", "errors_by_step", "runs"))
    low, middle, high = percentages(exercises["increase of the error by a wrong caption"])
    read = {name: percent(share) for name, share in exercises["read as requested"].items()}
    first_error = statistics.mean(errors["error at t = 0"].values())
    mean_digit = statistics.mean(errors["first step where the mean digit is better"].values())
    by_scale = numbers["guidance"]["read as requested"]
    scales = sorted(by_scale, key=by_scale.get)
    best = " to ".join(sorted(scales[-2:], key=float))
    scratch, stage2 = (commands["9b"][name] for name in ("stage2-scratch", "stage2"))
    raw, ema = (commands["10"][name] for name in ("raw", "ema"))
    ratios = {t: loss / ema["by step"][t] for t, loss in raw["by step"].items()}
    most = max(ratios, key=ratios.get)
    return [
        f"at $t = 0$ the error is {first_error:.1f}, worse than",
        rf"Above $t \approx {round(mean_digit, -1):.0f}$ the mean of all digits",
        f"A wrong caption increases the error by {low} at $t = 100$, where $x_t$ shows the digit, "
        f"{middle} at 500 and {high} at 900.",
        f"Scales of {best} are best here",
        f"reads {read['without']} of them as requested, and {read['drawn']} of those in `drawn`",
        f"The classifier reads {read['late']} of the digits",
        f"the validation loss is {scratch['validation loss']:.3f} instead of "
        f"{stage2['validation loss']:.3f}. "
        f"A classifier reads {100 * scratch['read as requested']:.1f} % of the digits instead of "
        f"{100 * stage2['read as requested']:.1f} %",
        f"The loss of the trained weights is {raw['validation loss']:.3f} instead of "
        f"{ema['validation loss']:.3f}. They differ most at the noisiest step, $t = {most}$: "
        f"{raw['by step'][most]:.5f} instead of {ema['by step'][most]:.5f}.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    out = parser.parse_args().out.absolute()
    missing = [stage for stage in ("stage1", "stage2", "stage3") if not (ROOT / "demo" / stage).is_dir()]
    if missing:
        parser.error(f"no {', '.join(f'demo/{stage}' for stage in missing)}: run 'make demo' first")
    with contextlib.chdir(ROOT):  # the page names paths from here
        write_json(out, {"machine": machine(), **counted(), **measured()})


if __name__ == "__main__":
    main()
