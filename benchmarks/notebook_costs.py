"""Estimates the time and memory of the cells of the notebooks, and writes them into the notebooks.

    JAX_PLATFORMS=cpu python benchmarks/notebook_costs.py       # replaces the lines "**Time and memory:** …"

Nothing is run on the devices. A time is the FLOPs of the matrix products divided by `SHARE` of the peak in
the datasheet. Memory is that of `pixart-benchmark fit`. Sizes of files follow from the numbers of parameters:
the releases are in float32. A test checks that the notebooks have these lines (tests/test_notebooks.py).
"""

from __future__ import annotations

import ast
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from pixart_jax.benchmarking import fit
from pixart_jax.benchmarking.flops import forward_flops, train_flops
from pixart_jax.config import from_file
from pixart_jax.models.activations import decoding_bytes, sampling_bytes
from pixart_jax.models.attention import target_platform
from pixart_jax.models.t5 import T5Config, abstract_t5
from pixart_jax.models.vae import VAEConfig, abstract_vae

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARK = "**Time and memory:**"
GIB = 2**30
# Assumed share of the peak. At 512 px, an H200 reached 0.28 to 0.43 of it (benchmarks/results/gpu).
SHARE = 0.3
# Assumed rate of a download, in bytes per second.
DOWNLOAD = 100e6
# A step of a LoRA takes less than this share of the FLOPs of full training (docs/fine-tuning.md).
LORA_SHARE = 0.72
# Memory for JAX, and the peak in FLOP/s for generating images and for training: datasheets, dense products.
# The T4 generates images in float16 and trains in float32, the others compute in bfloat16. JAX gets 0.9 of
# what CUDA reports, and 15.75 GiB of a v5e.
DEVICES = {
    "T4": (0.9 * 14.7, 65e12, 8.1e12),
    "L4": (0.9 * 22.0, 121e12, 121e12),
    "A100": (0.9 * 39.5, 312e12, 312e12),
    "TPU v5e": (15.75, 197e12, 197e12),
}


def platform(device: str) -> str:
    return "tpu" if device.startswith("TPU") else "gpu"


def times(flops: float) -> str:
    """The time on each device to compute in the dtype that it generates images in."""
    return ", ".join(f"{name} {duration(flops / (SHARE * peak))}" for name, (_, peak, _) in DEVICES.items())


def settings(name: str) -> dict[str, Any]:
    """The default settings of a notebook."""
    notebook = json.loads((ROOT / "notebooks" / name).read_text())
    cells = (cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", ()))
    tree = ast.parse("".join(next(cells)["source"]))
    return {each.targets[0].id: ast.literal_eval(each.value) for each in tree.body}


def duration(seconds: float) -> str:
    """A time for people."""
    for limit, size, unit in ((90, 1, "s"), (90 * 60, 60, "min"), (math.inf, 3600, "h")):
        if seconds < limit:
            value = seconds / size
            return f"{value:.1f} {unit}" if unit == "h" else f"{max(1, math.ceil(value))} {unit}"
    raise AssertionError


def sizes() -> tuple[int, int, int]:
    """Numbers of parameters of T5-XXL, XL/2 and the VAE."""
    trees = (abstract_t5(T5Config(), "auto"), abstract_vae(VAEConfig()))
    t5, vae = (sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(tree))) for tree in trees)
    return t5, fit.Memory.of(from_file("finetune:512")).trained // 4, vae


def generating(calls: float) -> str:
    """Model calls on single images of 512 px, at most four in a batch, after the text encoder was freed."""
    config = from_file("lora:512").for_sampling()
    # In XLA's attention, as on a T4, which takes the most memory.
    model = dataclasses.replace(config.model, dtype="float16", attention="xla")
    with target_platform("gpu"):
        peak = max(sampling_bytes(model, (64, 64), 4), decoding_bytes(VAEConfig(), (512, 512), 1))
    _, network, vae = sizes()
    gib = (4 * (network + vae) + peak) / GIB
    return f"{times(calls * forward_flops(model, 64, 64).total)}; at most {gib:.1f} GiB"


def download() -> str:
    total = 4 * sum(sizes())
    return f"a download of {total / 1e9:.0f} GB ({duration(total / DOWNLOAD)} at 100 MB/s)"


def encoding_peaks() -> dict[str, float]:
    """GiB while prompts are encoded, by the dtype of T5's weights."""
    with target_platform("gpu"):
        plans = fit.sampling_plans(from_file("lora:512"), 0)
    return {p["text_weights_dtype"]: p["peak"] / GIB for p in plans if p["weights_dtype"] == "float32"}


def loading() -> str:
    t5, peaks = sizes()[0] / 1e9, encoding_peaks()
    return (
        f"{download()}, of which the text encoder is {4 * t5:.0f} GB; {peaks['auto']:.1f} GiB while the "
        f"prompts are encoded ({peaks['int8']:.1f} GiB with `TEXT_WEIGHTS` in int8); {2 * t5:.1f} GB of host "
        "memory while the text encoder is loaded."
    )


def features() -> str:
    """Features of 100 images, whose captions have 20 to 120 tokens."""
    tflop = json.loads((RESULTS / "t5_cost.json").read_text())["tflop_an_image_20_to_120_tokens"]
    t5, _, vae = sizes()
    return (
        f"{download()}; {(2 * t5 + 4 * vae) / GIB:.1f} GiB for the text encoder and the VAE, and their "
        f"activations; for the captions of 100 images {times(100 * tflop * 1e12)}."
    )


def training(name: str) -> str:
    """A run at 512 px, with the fastest plan that fits on each device."""
    given = settings(f"{name}.ipynb")
    parts = []
    for device, (gib, _, peak) in DEVICES.items():
        with target_platform(platform(device)):
            config = from_file(f"{name}:512")
            if device == "T4":
                model = dataclasses.replace(config.model, dtype="float32", attention="xla")
                config = dataclasses.replace(config, model=model)
            plans = [plan for plan, _ in fit.plans(config, int(gib * GIB))]
        memory = plans[fit.fastest(plans, config)].peak / GIB
        flops = given["STEPS"] * given["BATCH_SIZE"] * train_flops(config.model, 64, 64)
        flops *= LORA_SHARE if name == "lora" else 1
        parts.append(f"{device} {duration(flops / (SHARE * peak))}, {memory:.1f} GiB")
    return f"{'; '.join(parts)}."


def on_cpu(forward_passes: float) -> str:
    """Time of diffusers at 512 px on two cores, from the step (two passes) that was measured at 256 px."""
    measured = json.loads((RESULTS / "sampling_cpu.json").read_text())["results"][0]
    seconds = measured["median_seconds_a_step"]["diffusers"] / 2
    model = from_file("lora:512").model
    ratio = forward_flops(model, 64, 64).total / forward_flops(model, 32, 32).total
    return f"{duration(forward_passes * ratio * seconds)} for diffusers on two CPU cores"


def digits() -> str:
    """The stages on digits, from the step of stage 2 that was measured on two CPU cores."""
    measured = json.loads((RESULTS / "digits_step.json").read_text())
    per_flop = measured["seconds"]["median"] / (
        measured["batch_size"] * measured["model_tflop_per_image"] * 1e12
    )
    seconds = 0.0
    for stage, count in settings("train.ipynb")["STEPS"].items():
        config = from_file(f"digits:{stage}")
        side = config.features.latent_side
        seconds += count * config.data.batch_size * train_flops(config.model, side, side) * per_flop
    memory = sum(value for name, value in measured["memory"].items() if name.startswith("planned"))
    return (
        f"{duration(seconds)} on two CPU cores (from the measured step of stage 2), and "
        f"{duration(measured['compilation']['compile_seconds'])} to compile each stage; a step takes "
        f"{memory:.2f} GiB."
    )


def lines() -> dict[str, list[str]]:
    """The costs of each notebook's cells, in their order."""
    sample, tuned, lora, export = (
        settings(f"{name}.ipynb") for name in ("sample", "finetune", "lora", "export_to_pytorch")
    )
    prompts, calls = len(sample["PROMPTS"]), 2 * sample["STEPS"]
    grid = sum(n * (1 + (scale > 1)) for n in sample["STEP_COUNTS"] for scale in sample["GUIDANCE_SCALES"])
    before = generating(2 * len(tuned["PROMPTS"]) * tuned["SAMPLE_STEPS"])
    _, network, _ = sizes()
    adapter = fit.Memory.of(from_file("lora:512")).trained
    int8 = encoding_peaks()["int8"]
    again = f", after {encoding_peaks()['auto']:.1f} GiB for the text encoder."
    return {
        "sample.ipynb": [
            loading(),
            generating(calls * prompts * sample["SEEDS"]) + ".",
            generating(calls) + ".",
            generating(grid) + ".",
            generating(2 * sum(sample["SAMPLERS"].values())) + ".",
            generating(calls * prompts) + ".",
            generating(calls * 3) + ".",
            # The strengths are shares of the steps.
            generating(calls * (0.4 + 0.7)) + ".",
            generating(calls * prompts) + ".",
        ],
        "finetune.ipynb": [
            features(),
            before + again,
            training("finetune"),
            before + again,
            f"{2 * 4 * network / 1e9:.1f} GB on the disk, and half as much host memory.",
        ],
        "lora.ipynb": [
            features(),
            training("lora"),
            f"{2 * adapter / 1e6:.0f} MB on the disk.",
            generating(2 * 2 * len(lora["PROMPTS"]) * lora["SAMPLE_STEPS"]) + again,
        ],
        "export_to_pytorch.ipynb": [
            f"a download of {4 * network / 1e9:.1f} GB, and as much host memory.",
            f"{download()}, and as much on the disk for the copy.",
            f"{on_cpu(2)}, and {2 * 4 * network / 1e9:.1f} GB of memory for the two networks.",
            f"{on_cpu(2 * export['STEPS'] * len(export['PROMPTS']))}; {int8:.1f} GiB on the device "
            "while the prompts are encoded.",
            f"{2 * 4 * network / 1e9:.1f} GB on the disk, and half as much host memory.",
            f"{4 * network / 1e9:.1f} GB of host memory.",
        ],
        "train.ipynb": [digits()],
    }


def main() -> None:
    for name, costs in lines().items():
        path = ROOT / "notebooks" / name
        notebook = json.loads(path.read_text())
        costs = iter(costs)
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = [
                    f"{MARK} {next(costs)}{text[len(text.rstrip()) :]}" if text.startswith(MARK) else text
                    for text in cell["source"]
                ]
        if next(costs, None) is not None:
            raise SystemExit(f"{name} has fewer lines '{MARK}' than costs")
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
