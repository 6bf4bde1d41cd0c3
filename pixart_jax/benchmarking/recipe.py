"""Projects the days and the cost of all stages on given hardware, and compares them with the paper's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pixart_jax.benchmarking.flops import run_flops, stage_flops
from pixart_jax.benchmarking.measuring import DATASHEET
from pixart_jax.config import TrainConfig
from pixart_jax.errors import UserError, did_you_mean
from pixart_jax.flags import whole_number
from pixart_jax.readers import read_json

# V100-days of the stages in the paper (Table 4), without extracting VAE and T5 features.
PAPER_V100_DAYS = {"stage1": 88, "stage2": 672, "stage3-256": 416, "stage3-512": 320, "stage3-1024": 160}
# Sum of these days, the paper's conversion to A100-days (footnote 6: an A100 is 2.2 V100s), and its cost.
PAPER_SUM = "1,656 V100-days, which the paper counts as 753 A100-days and $28,400"
KINDS = {
    "v100": "V100",
    "a100": "A100",
    "h100": "H100",
    "h200": "H200",
    "v4": "TPU v4",
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
}


def read_rates(text: str) -> dict[str, float]:
    """Reads the images per second per chip of each stage.

    Args:
      text: 'stage1=110,stage2=88', or a folder of results of `benchmark train --out`.

    Raises:
      UserError: if `text` is neither of the two.
    """
    folder = Path(text)
    if folder.is_dir():
        shape = {"images_per_second?": float, "config?": str, "machine?": {"devices": range(1, 2**31)}}
        found = [
            read_json(path, "remove it, or measure again", shape) for path in sorted(folder.glob("*.json"))
        ]
        rates = {
            result["config"]: result["images_per_second"] / result["machine"]["devices"]
            for result in found
            if {"images_per_second", "config", "machine"} <= result.keys()
        }
        if not rates:
            raise UserError(
                f"rates '{text}': the folder has no results of `benchmark train --out={text}/STAGE.json`."
            )
    else:
        try:
            rates = {name: float(value) for name, value in (part.split("=") for part in text.split(","))}
        except ValueError as error:
            raise UserError(f"rates '{text}': pass stage1=110,stage2=88 or a folder of results.") from error
    if not all(0 < rate < math.inf for rate in rates.values()):
        raise UserError(f"rates '{text}': images per second per chip must be above 0.")
    return rates


def project(
    stages: Sequence[TrainConfig], rates: Mapping[str, float], hardware: str, price: float | None
) -> dict[str, Any]:
    """Projects the days of each stage: steps x batch size / (images per second per chip x chips).

    With token routing or alignment, the rate is that of the first steps, as `benchmark train` measures it.
    Later steps without one of them take longer or shorter in proportion to their FLOPs.

    Args:
      stages: configs of the stages, in order.
      rates: images per second per chip, by name of the stage.
      hardware: kind and number of chips, such as 'v5e:256'.
      price: dollars per chip-hour; None for no cost.

    Returns:
      A dict of plain values, for JSON.

    Raises:
      UserError: if the hardware is unknown, a stage has no rate, or a rate exceeds the peak of the chip.
    """
    kind, _, count = hardware.partition(":")
    if kind not in KINDS or whole_number(count, 1, 1_000_000) is None:
        raise UserError(
            f"hardware '{hardware}': pass one of {', '.join(KINDS)} and the number of chips, such as v5e:256."
            f"{did_you_mean(kind, KINDS)}"
        )
    rows = []
    for stage in stages:
        if stage.name not in rates:
            raise UserError(
                f"rates lack '{stage.name}': measure it with `benchmark train`, or pass {stage.name}=IMAGES."
                + did_you_mean(stage.name, rates)
            )
        rate = rates[stage.name]
        flops = stage_flops(stage)
        share = rate * flops / DATASHEET[KINDS[kind]]
        if share > 1:
            raise UserError(
                f"rate {stage.name}={rate:g} is {share:.0%} of the peak of one {kind}: pass images per "
                "second for one chip, not for all."
            )
        images = stage.steps * stage.data.batch_size
        all_flops = run_flops(stage)
        days = all_flops / flops / (rate * int(count)) / 86_400
        rows.append(
            {
                "stage": stage.name,
                "size": stage.model.size,
                "pixels": stage.features.image_size,
                "images": images,
                "flops": all_flops,
                "rate": rate,
                "share_of_peak": share,
                "days": days,
                "chip_days": days * int(count),
                "cost": price and days * int(count) * 24 * price,
                # The figures of the paper are for XL/2.
                "paper_v100_days": PAPER_V100_DAYS.get(stage.name) if stage.model.size == "XL/2" else None,
            }
        )
    return {"hardware": hardware, "price": price, "stages": rows}


def table(projection: Mapping[str, Any]) -> str:
    """Formats the projection as a table."""
    rows = projection["stages"]
    total = {
        name: sum(row[name] or 0 for row in rows)
        for name in ("images", "flops", "days", "chip_days", "cost", "paper_v100_days")
    }
    lines = [f"{'stage':<12} {'px':>5} {'images':>9} {'EFLOP':>7} {'img/s/chip':>10} {'of peak':>8} "]
    lines[0] += f"{'days':>8} {'chip-days':>10} {'cost':>10} {'paper, V100-days':>17}"
    for row in [*rows, {"stage": "sum", **total}]:
        rate = f"{row['rate']:>10.4g} {row['share_of_peak']:>8.1%}" if "rate" in row else f"{'':>19}"
        cost = f"${row['cost']:,.0f}" if projection["price"] else "-"
        lines.append(
            f"{row['stage']:<12} {row.get('pixels', ''):>5} {_short(row['images']):>9} "
            f"{row['flops'] / 1e18:>7,.4g} {rate} "
            f"{row['days']:>8.2f} {row['chip_days']:>10,.1f} {cost:>10} {row['paper_v100_days'] or '-':>17}"
        )
    head = f"The recipe on {projection['hardware']}, without features, validation, sample images and restarts"
    if projection["price"]:
        head += f", at ${projection['price']:g} per chip-hour"
    # The figures of the paper are for XL/2.
    foot = f"The paper: {PAPER_SUM}." if any(row["size"] == "XL/2" for row in rows) else ""
    return "\n".join([head, *lines, foot]).strip()


def _short(images: int) -> str:
    return f"{images / 1e6:,.1f} M" if images >= 1e6 else f"{images:,}"
