"""Measures what a run has learned.

python -m pixart_jax.evaluate val-loss --checkpoint=runs/stage2 --features=data/sam-256-test
python -m pixart_jax.evaluate digits --checkpoint=demo/stage1,demo/stage2,demo/stage3 --out=demo
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from PIL import Image

from pixart_jax.config import MeshConfig
from pixart_jax.errors import UserError, did_you_mean, run_command
from pixart_jax.evaluation.digits import generate_digits, train_reader
from pixart_jax.sampling import picture_grid
from pixart_jax.training import sharding
from pixart_jax.training.checkpoints import read_weights
from pixart_jax.training.state import abstract_model
from pixart_jax.training.validation import make_validation, open_dataset

# The flags of the command by name.
Given = Mapping[str, Any]


def val_loss(given: Given) -> None:
    """Prints and stores the validation loss, in all and per part of the timesteps."""
    params, config = read_weights(_required(given, "checkpoint"), given["weights"])
    log = dataclasses.replace(config.log, validation_samples=given["samples"])
    config = dataclasses.replace(config, log=log)
    graph, _ = abstract_model(config.model)
    mesh = sharding.make_mesh(MeshConfig())
    held_out = open_dataset(_required(given, "features"))
    params = jax.device_put(params, sharding.replicated(mesh))
    values = make_validation(config, graph, mesh, held_out)(params)
    _store(given, "val_loss.json", {"weights": given["weights"], "records": given["samples"], **values})
    for name, value in values.items():
        print(f"{name:<24} {value:.6f}")


def digits(given: Given) -> None:
    """Prints the share of digits that are read as asked for, per run, and draws a picture of them."""
    rows, pictures = [], []
    for path in _required(given, "checkpoint").split(","):
        params, config = read_weights(path, given["weights"])
        size = config.features.image_size
        reader = train_reader(size)
        images, asked = generate_digits(params, config, given["samples"], seed=given["seed"])
        agreement = float(np.mean(reader.read(images) == asked))
        rows.append(
            {
                "stage": config.name,
                "pixels": size,
                "samples": len(images),
                "agreement": agreement,
                "reader_on_held_out_scans": reader.accuracy,
            }
        )
        # Rows are digits, columns ten samples of each.
        pictures.append(picture_grid(_by_digit(images, asked, 10), columns=10, magnify=48 // size))
    _store(given, "digits.json", rows)
    height = max(picture.shape[0] for picture in pictures)
    gap = np.full((height, 16, 3), 255, np.uint8)
    wide = np.concatenate([part for picture in pictures for part in (picture, gap)][:-1], axis=1)
    Image.fromarray(wide).save(_out(given) / "samples.png")
    print(table(rows))


def table(rows: list[dict]) -> str:
    """The rows of `digits` as a Markdown table."""
    lines = [
        "| stage | pixels | samples | read as asked | the same reader on held-out real scans |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['stage']} | {row['pixels']} | {row['samples']} | {row['agreement']:.1%} | "
        f"{row['reader_on_held_out_scans']:.1%} |"
        for row in rows
    ]
    return "\n".join(lines)


def _by_digit(images: np.ndarray, asked: np.ndarray, columns: int) -> np.ndarray:
    return np.concatenate([images[asked == digit][:columns] for digit in range(10)])


def _required(given: Given, name: str) -> str:
    if not given[name]:
        raise UserError(f"--{name} is missing: see --help.")
    return given[name]


def _out(given: Given) -> Path:
    folder = Path(given["out"] or given["checkpoint"].split(",")[0])
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _store(given: Given, name: str, values: Any) -> None:
    (_out(given) / name).write_text(json.dumps(values, indent=1) + "\n")


MODES = {"val-loss": val_loss, "digits": digits}


def define_flags() -> dict[str, flags.FlagHolder]:
    """The flags of the command. Not at import: other commands have flags of the same names."""
    return {
        "checkpoint": flags.DEFINE_string(
            "checkpoint", None, "Run directory; several, comma-separated, for digits."
        ),
        "weights": flags.DEFINE_enum("weights", "ema", ["ema", "raw"], "Moving average or trained weights."),
        "features": flags.DEFINE_string("features", None, "val-loss: folder of held-out features."),
        "samples": flags.DEFINE_integer("samples", 500, "Images (digits) or records (val-loss) to measure."),
        "seed": flags.DEFINE_integer("seed", 0, "digits: seed of the first image."),
        "out": flags.DEFINE_string("out", None, "Folder for the results; default the first run directory."),
    }


def main(holders: Mapping[str, flags.FlagHolder], argv: Sequence[str]) -> None:
    modes = argv[1:]
    if len(modes) != 1 or modes[0] not in MODES:
        given = " ".join(modes)
        raise UserError(
            f"evaluate takes one of {', '.join(MODES)}, not '{given}'.{did_you_mean(given, MODES)}"
        )
    MODES[modes[0]]({name: holder.value for name, holder in holders.items()})


if __name__ == "__main__":
    run_command(functools.partial(main, define_flags()))
