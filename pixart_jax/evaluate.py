"""Evaluates the weights of a run, as described in docs/evaluation.md.

python -m pixart_jax.evaluate val-loss --checkpoint=runs/stage2 --features=data/sam-256-test
python -m pixart_jax.evaluate fid --preset=mjhq-30k --checkpoint=PixArt-XL-2-1024-MS --captions=meta_data.json
    --reference=mjhq30k_imgs --inception=inception-2015-12-05.pt --out=mjhq
python -m pixart_jax.evaluate clip --images=mjhq/images --captions=meta_data.json --clip=clip-vit-large
python -m pixart_jax.evaluate layout --benchmark=geneval --prompts=geneval/prompts
    --checkpoint=runs/stage3-512 --out=geneval-512
python -m pixart_jax.evaluate table --benchmark=geneval --results=geneval-512
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
from pixart_jax.data.sources.options import parse_part
from pixart_jax.diffusion.samplers import SAMPLERS
from pixart_jax.encoders.batches import round_up
from pixart_jax.errors import UserError, did_you_mean, run_command
from pixart_jax.evaluation import layouts, tables
from pixart_jax.evaluation.clip import Clip, clip_score
from pixart_jax.evaluation.digits import generate_digits, train_reader
from pixart_jax.evaluation.fid import (
    FILTERS,
    RESIZES,
    Inception,
    frechet_distance,
    image_files,
    measure,
    reference_statistics,
    write_statistics,
)
from pixart_jax.evaluation.generation import (
    IMAGES,
    PlannedImage,
    check_complete,
    generate_images,
    read_captions,
    read_run_settings,
)
from pixart_jax.evaluation.protocol import PRESETS, Preset, Protocol, Result, file_hash, write_text
from pixart_jax.evaluation.scores import read_scores
from pixart_jax.pipeline import load_pipeline
from pixart_jax.sampling import picture_grid
from pixart_jax.training import sharding
from pixart_jax.training.checkpoints import FOLDER, checkpoint_folder, read_weights
from pixart_jax.training.state import abstract_model
from pixart_jax.training.step import VALIDATION_PARTS, validation_timesteps
from pixart_jax.training.validation import make_validation, open_dataset

# The values of the command's flags by name.
Given = Mapping[str, Any]

# Fields of a protocol that flags and presets set, with their defaults: how images are generated, and how they
# are prepared for the feature network.
_GENERATION = {
    "sampler": "dpm_solver", "steps": 20, "guidance_scale": None, "seed": 0, "height": None, "width": None,
}  # fmt: skip
_PREPARATION = {"crop": "none", "size": None, "filter": "bicubic", "rounding": True, "resize": "clean"}
# Defaults: number of images or records, images generated per device at a time, and images measured at a time.
_SAMPLES, _GENERATED, _MEASURED = 500, 4, 32


# --- Loss, digits -----------------------------------------------------------------------------------


def val_loss(given: Given) -> None:
    """Prints and stores the validation loss, as a mean and per timestep."""
    weights = given["weights"] or "ema"
    params, config = read_weights(_required(given, "checkpoint"), weights)
    held_out = open_dataset(_required(given, "features"))
    records = min(given["samples"] or _SAMPLES, len(held_out))
    # Not the batch size of training, which may be too large for this machine. The loss does not depend on it.
    batch = round_up(min(given["batch_size"] or _MEASURED, records), jax.device_count())
    config = dataclasses.replace(
        config,
        log=dataclasses.replace(config.log, validation_samples=records),
        data=dataclasses.replace(config.data, batch_size=batch),
        optimizer=dataclasses.replace(config.optimizer, accumulation=1),
    )
    graph, _ = abstract_model(config.model)
    mesh = sharding.make_mesh(MeshConfig())
    params = jax.device_put(params, sharding.replicated(mesh))
    values = make_validation(config, graph, mesh, held_out)(params)
    timesteps = validation_timesteps(config)
    curve = {
        int(timesteps[part]): values[f"validation_loss_part_{part}"]
        for part in range(VALIDATION_PARTS)
        if f"validation_loss_part_{part}" in values
    }
    stored = {
        "checkpoint": _identity(given["checkpoint"]),
        "weights": weights,
        "features": given["features"],
        "features_fingerprint": held_out.fingerprint,
        "records": records,
        "validation_loss": values["validation_loss"],
        "validation_loss_at_timestep": curve,
    }
    _store(_out(given), "val_loss.json", stored)
    for timestep, value in curve.items():
        print(f"t = {timestep:<6} {value:.6f}")
    print(f"{'all':<10} {values['validation_loss']:.6f}")


def digits(given: Given) -> None:
    """Prints the share of generated digits that a classifier reads as requested, and saves a grid of them."""
    rows, grids = [], []
    for path in _required(given, "checkpoint").split(","):
        params, config = read_weights(path, given["weights"] or "ema")
        size = config.features.image_size
        reader = train_reader(size)
        count = given["samples"] or _SAMPLES
        images, requested = generate_digits(params, config, count, seed=given["seed"] or 0)
        agreement = float(np.mean(reader.read(images) == requested))
        rows.append(
            {
                "stage": config.name,
                "pixels": size,
                "samples": len(images),
                "agreement": agreement,
                "reader_on_held_out_scans": reader.accuracy,
            }
        )
        # One row per digit, with ten images of it.
        grids.append(picture_grid(_by_digit(images, requested, 10), columns=10, magnify=48 // size))
    out = _out(given)
    _store(out, "digits.json", rows)
    height = max(grid.shape[0] for grid in grids)
    gap = np.full((height, 16, 3), 255, np.uint8)
    wide = np.concatenate([part for grid in grids for part in (grid, gap)][:-1], axis=1)
    Image.fromarray(wide).save(out / "samples.png")
    print(digits_table(rows))


def digits_table(rows: list[dict]) -> str:
    """The results of `digits` as a Markdown table."""
    lines = [
        "| stage | pixels | samples | read as requested | the same reader on held-out real scans |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['stage']} | {row['pixels']} | {row['samples']} | {row['agreement']:.1%} | "
        f"{row['reader_on_held_out_scans']:.1%} |"
        for row in rows
    ]
    return "\n".join(lines)


def _by_digit(images: np.ndarray, requested: np.ndarray, columns: int) -> np.ndarray:
    return np.concatenate([images[requested == digit][:columns] for digit in range(10)])


# --- FID, CLIP --------------------------------------------------------------------------------------


def fid(given: Given) -> None:
    """Prints and stores the FID of images; without --reference, writes their statistics instead."""
    preset = _preset(given)
    inception = Inception(_required(given, "inception"))
    protocol = _protocol(given, preset, metric="fid", network=inception.digest)
    images = _images(given, preset)
    if images is None:
        return
    if not given["reference"]:
        statistics = measure(images, inception, protocol, batch_size=given["batch_size"] or _MEASURED)
        path = _required(given, "statistics")
        write_statistics(path, statistics, protocol)
        print(f"statistics of {statistics.images} images in {path}")
        return
    reference = reference_statistics(given["reference"], inception, protocol)
    measured = measure(images, inception, protocol, batch_size=given["batch_size"] or _MEASURED)
    value = frechet_distance(measured, reference)
    _report(given, preset, images, dataclasses.replace(protocol, reference=reference.digest), value)


def clip(given: Given) -> None:
    """Prints and stores the CLIP score of generated or given images and their captions."""
    preset = _preset(given)
    model = Clip(_required(given, "clip"))
    # CLIP has its own image processor, which crops and resizes.
    protocol = Protocol("clip", 0, resize="clip", network=model.digest)
    captions = read_captions(_required(given, "captions"))[: given["samples"]]
    images = _images(given, preset)
    if images is None:
        return
    value = clip_score(image_files(images), captions, model, batch_size=given["batch_size"] or _MEASURED)
    _report(given, preset, images, protocol, value)


def _preset(given: Given) -> Preset | None:
    """The preset of --preset. Flags must not contradict it, because its name is stored with the result."""
    if not given["preset"]:
        return None
    preset = PRESETS[given["preset"]]
    for name, value in preset.values.items():
        if given[name] not in (None, value):
            raise UserError(
                f"--{name}={given[name]} contradicts preset {given['preset']}, which has {value}: leave one "
                "of them out."
            )
    return preset


def _fields(given: Given, preset: Preset | None, defaults: Mapping[str, Any]) -> dict[str, Any]:
    fixed = {} if preset is None else preset.values
    return {
        name: given[name] if given[name] is not None else fixed.get(name, default)
        for name, default in defaults.items()
    }


def _protocol(given: Given, preset: Preset | None, **known: Any) -> Protocol:
    return Protocol(images=0, **_fields(given, preset, _PREPARATION), **known)


def _images(given: Given, preset: Preset | None) -> Path | None:
    """The folder to measure: --images, or images generated with --checkpoint; None if only a shard was."""
    if given["images"]:
        return Path(given["images"])
    captions = read_captions(_required(given, "captions"))[: given["samples"]]
    generation = _fields(given, preset, _GENERATION)
    planned = [
        PlannedImage(f"{index:06d}.png", caption, generation["seed"] + index)
        for index, caption in enumerate(captions)
    ]
    if not _generate(given, planned, generation, {"captions": file_hash(given["captions"])}):
        return None
    return Path(given["out"]) / IMAGES


def _report(given: Given, preset: Preset | None, images: Path, protocol: Protocol, value: float) -> None:
    """Adds what is known about the images to the protocol, then stores and prints the result."""
    files = image_files(images)
    sizes = set()
    for file in files:
        with Image.open(file) as image:
            sizes.add(image.size)
    width, height = sizes.pop() if len(sizes) == 1 else (None, None)
    settings = read_run_settings(images.parent)
    captions = file_hash(given["captions"]) if given["captions"] else settings.get("captions")
    known = {name: settings.get(name) for name in ("sampler", "steps", "guidance_scale", "seed", "weights")}
    protocol = dataclasses.replace(
        protocol, images=len(files), captions=captions, height=height, width=width, **known
    )
    # The name of the preset is stored with the result only if the images follow all of it.
    followed = preset is not None and len(files) == preset.images
    if preset is not None and not followed:
        print(f"not preset {given['preset']}: {len(files)} images instead of {preset.images}")
    for name, wanted in () if preset is None else preset.values.items():
        if name in _GENERATION and getattr(protocol, name) != wanted:
            followed = False
            print(f"not preset {given['preset']}: {name} {getattr(protocol, name)} instead of {wanted}")
    model = given["name"] or settings.get("model") or str(images)
    result = Result(model, value, protocol, given["preset"] if followed else "")
    out = Path(given["out"] or images.parent)
    result.write(out / f"{protocol.metric}.json")
    print(f"{protocol.metric} {value:.4f} of {len(files)} images, protocol {protocol.id}, in {out}")


# --- Layouts, tables --------------------------------------------------------------------------------


def layout(given: Given) -> None:
    """Generates the images of a benchmark, and prints the commands that run the benchmark's own scripts."""
    name = _required(given, "benchmark")
    benchmark = layouts.find_benchmark(name)
    generation = _fields(given, None, {**_GENERATION, "seed": benchmark.seed})
    plan = benchmark.plan(Path(_required(given, "prompts")), generation["seed"])
    prompts = {source.name: file_hash(source) for source in plan.sources}
    out = Path(_required(given, "out"))
    for file, text in plan.files.items():
        write_text(out / IMAGES / file, text)
    if not _generate(given, plan.images, generation, {"benchmark": name, "prompts": prompts}):
        return
    first = plan.images[0]
    with Image.open(out / IMAGES / first.file) as image:
        size = image.height // (2 if first.tiles == 4 else 1)
    print(f"# {len(plan.images)} of {benchmark.images} images of {name} are in {out / IMAGES}")
    print(f"# In a checkout of github.com/{benchmark.repository}:")
    for line in benchmark.commands((out / IMAGES).absolute(), size, plan):
        print(line)
    print(f"# Then: python -m pixart_jax.evaluate table --benchmark={name} --results={out}")


def table(given: Given) -> None:
    """Prints and stores a table: of a benchmark with published rows, or of FIDs and CLIP scores."""
    paths = _required(given, "results").split(",")
    if not given["benchmark"]:
        text, values = tables.result_table([Result.read(path) for path in paths])
        out = Path(given["out"] or Path(paths[0]).parent)
    else:
        layouts.find_benchmark(given["benchmark"])
        (path,) = paths
        settings = read_run_settings(Path(path))
        if settings.get("benchmark", given["benchmark"]) != given["benchmark"]:
            raise UserError(
                f"the images of '{path}' are of {settings['benchmark']}, not of {given['benchmark']}, and "
                f"the two are not comparable: use --benchmark={settings['benchmark']}, or give other "
                "--results."
            )
        scores, counts = read_scores(given["benchmark"], path)
        model = given["name"] or settings.get("model") or "measured"
        text, values = tables.benchmark_table(
            given["benchmark"], scores, counts, model=model, source=f"measured: {path}"
        )
        values["settings"] = settings
        out = Path(given["out"] or (path if Path(path).is_dir() else Path(path).parent))
    write_text(out / "table.md", text)
    _store(out, "table.json", values)
    print(text, end="")


def _generate(
    given: Given, planned: Sequence[PlannedImage], generation: dict[str, Any], known: Mapping[str, Any]
) -> bool:
    """Generates images with --checkpoint into --out; returns whether all of them are there now."""
    out, checkpoint = Path(_required(given, "out")), _required(given, "checkpoint")
    shard = parse_part(given["shard"])
    pipe = load_pipeline(checkpoint, weights=given["weights"], pipeline=given["pipeline"])
    if generation["guidance_scale"] is None:
        generation["guidance_scale"] = pipe.config.guidance.scale
    model = _identity(checkpoint)
    # Without --weights the pipeline uses the moving average of a run, but a weight file may not have one.
    weights = given["weights"] or ("ema" if model != checkpoint else "ema if there is one")
    settings = {"model": model, "weights": weights, **generation, **known}
    arguments = {name: value for name, value in generation.items() if name != "seed"}
    number = generate_images(
        pipe,
        planned,
        out,
        settings,
        arguments=arguments,
        shard=shard,
        batch_size=given["batch_size"] or _GENERATED,
    )
    print(f"{number} images generated, shard {given['shard']}")
    if shard[1] > 1:
        print("when all shards are done, run the same command without --shard")
        return False
    check_complete(planned, out)
    return True


# --- Flags ------------------------------------------------------------------------------------------


def _required(given: Given, name: str) -> str:
    if not given[name]:
        raise UserError(f"--{name} is missing: see --help.")
    return given[name]


def _identity(checkpoint: str) -> str:
    """The path that identifies the weights: for a run directory, its newest step."""
    return str(checkpoint_folder(checkpoint)) if (Path(checkpoint) / FOLDER).is_dir() else checkpoint


def _out(given: Given) -> Path:
    folder = Path(given["out"] or given["checkpoint"].split(",")[0])
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _store(folder: Path, name: str, values: Any) -> None:
    write_text(folder / name, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


MODES = {"val-loss": val_loss, "fid": fid, "clip": clip, "layout": layout, "table": table, "digits": digits}


def define_flags() -> dict[str, flags.FlagHolder]:
    """Defines the flags. Not at import, because other commands define flags with the same names."""
    text, integer, real = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    choice = flags.DEFINE_enum
    return {
        "checkpoint": text(
            "checkpoint", None, "Run directory, weight file or pipeline folder; for digits, several."
        ),
        "weights": choice("weights", None, ["ema", "raw"], "Moving average (default) or raw weights."),
        "out": text("out", None, "Folder for the results."),
        "samples": integer(
            "samples", None, "Number of images or records; default 500, or all captions for fid and clip."
        ),
        "batch_size": integer(
            "batch_size",
            None,
            f"Images at a time; default {_GENERATED} per device to generate, {_MEASURED} to measure.",
        ),
        "features": text("features", None, "val-loss: folder with held-out features."),
        # fid, clip
        "preset": choice("preset", None, list(PRESETS), "fid, clip: a named protocol."),
        "captions": text("captions", None, "fid, clip: captions as .txt, .tsv, .csv, .json or .jsonl."),
        "images": text("images", None, "fid, clip: folder of images to measure, instead of generating them."),
        "reference": text(
            "reference", None, "fid: folder of real images, or an .npz file with mu and sigma."
        ),
        "statistics": text(
            "statistics", None, "fid without --reference: .npz file to write mu and sigma to."
        ),
        "inception": text("inception", None, "fid: path of inception-2015-12-05.pt."),
        "clip": text("clip", None, "clip: folder of a CLIP model in the format of transformers."),
        "crop": choice(
            "crop", None, ["none", "centre"], "fid: crop images to the centre square; default none."
        ),
        "size": integer(
            "size", None, "fid: side in pixels to which both sets are resized; default: no resize."
        ),
        "filter": choice("filter", None, list(FILTERS), "fid: filter of that resize; default bicubic."),
        "rounding": flags.DEFINE_bool(
            "rounding", None, "fid: round the resized images to uint8; default yes."
        ),
        "resize": choice(
            "resize", None, list(RESIZES), "fid: how an image becomes the network's input; default clean."
        ),
        # layout, table
        "benchmark": choice("benchmark", None, list(layouts.BENCHMARKS), "layout, table: the benchmark."),
        "prompts": text("prompts", None, "layout: prompt file or folder of the benchmark."),
        "results": text("results", None, "table: --out folder of layout, or result files."),
        "name": text("name", None, "table, fid, clip: name of the model."),
        # generating images
        "pipeline": text("pipeline", None, "Pipeline folder with the text encoder and the VAE."),
        "sampler": choice("sampler", None, list(SAMPLERS), "Sampler; default dpm_solver."),
        "steps": integer("steps", None, "Sampling steps; default 20."),
        "guidance_scale": real(
            "guidance_scale", None, "Guidance scale, 1 for none; default: that stored with the weights."
        ),
        "seed": integer("seed", None, "Seed of the first image; default: that of the benchmark, or 0."),
        "height": integer("height", None, "Height in pixels; default: that of the training images."),
        "width": integer("width", None, "Width in pixels; default: that of the training images."),
        "shard": text("shard", "0/1", "I/N: generate every N-th image from the I-th, counted from 0."),
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
