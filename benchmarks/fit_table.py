"""Estimates what fits on GPUs of 8 to 80 GB, for the table in docs/fine-tuning.md.

    JAX_PLATFORMS=cpu python benchmarks/fit_table.py       # benchmarks/results/fit.json, and prints the table

Each entry is the result of `python -m pixart_jax.benchmark fit --config=CONFIG:SIZE --memory_gib=GIB`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pixart_jax.benchmarking.fit import report
from pixart_jax.config import from_file
from pixart_jax.models.attention import target_platform
from pixart_jax.versions import package_versions

ROOT = Path(__file__).resolve().parent
CONFIGS = ("lora", "finetune")
SIZES = (256, 512, 1024)
CARDS = (8, 12, 16, 24, 40, 80)
SHORT = {"optimizer.ema_device": "average on the host", "optimizer.offload": "moments too"}


def training_cell(result: dict[str, Any]) -> str:
    """Returns images in a micro-batch, rematerialization, and what is stored elsewhere."""
    if result["chosen"] is None:
        return "–"
    settings = result["plans"][result["chosen"]]["settings"]
    rows = result["batch_size"] // settings["optimizer.accumulation"]
    stored = [SHORT.get(name, str(value)) for name, value in settings.items() if name not in _SHOWN]
    return ", ".join([f"{rows} × {settings['optimizer.accumulation']}, {settings['model.remat']}", *stored])


_SHOWN = ("model.remat", "optimizer.accumulation")


def sampling_cell(result: dict[str, Any]) -> str:
    """Returns the largest batch of the first combination of dtypes that fits, and what is int8 in it."""
    for plan in result["sampling"]:
        if plan["largest_batch"]:
            names = [("network", "weights_dtype"), ("T5", "text_weights_dtype")]
            int8 = " and ".join(what for what, name in names if plan[name] == "int8")
            return f"{plan['largest_batch']}" + (f", {int8} in int8" if int8 else "")
    return "–"


def table(results: dict[str, dict[str, Any]]) -> str:
    """Returns the table in Markdown."""
    lines = ["| | " + " | ".join(f"{gib} GiB" for gib in CARDS) + " |", "|---" * (len(CARDS) + 1) + "|"]
    rows = [(f"`{name}.py:{size}`", name, size, training_cell) for name in CONFIGS for size in SIZES]
    rows += [(f"sampling, {size} px", "lora", size, sampling_cell) for size in SIZES]
    for title, name, size, cell in rows:
        cells = (cell(results[f"{name}:{size}:{gib}"]) for gib in CARDS)
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    results = {}
    with target_platform("gpu"):
        for name in CONFIGS:
            for size in SIZES:
                config = from_file(f"{ROOT.parent / 'configs' / name}.py:{size}")
                for gib in CARDS:
                    results[f"{name}:{size}:{gib}"] = report(config, gib)
    versions = {name: version for name, version in package_versions(("jax", "flax")).items() if version}
    out = ROOT / "results" / "fit.json"
    out.write_text(json.dumps({"versions": versions, "results": results}, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
