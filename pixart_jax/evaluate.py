"""Measures what a run has learned: see docs/evaluation.md.

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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from PIL import Image

from pixart_jax.config import MeshConfig
from pixart_jax.data.sources.options import parse_part
from pixart_jax.denoiser import NETWORK
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
    image_statistics,
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
from pixart_jax.evaluation.protocol import PRESETS, Preset, Protocol, Result
from pixart_jax.evaluation.scores import read_scores
from pixart_jax.files import sha256_of_file, write_json, write_text
from pixart_jax.pipeline import load_pipeline
from pixart_jax.sampling import picture_grid
from pixart_jax.training import sharding
from pixart_jax.training.data import open_dataset
from pixart_jax.training.objectives import make_objective
from pixart_jax.training.objectives.diffusion import VALIDATION_PARTS, validation_timesteps
from pixart_jax.training.validation import make_validation
from pixart_jax.weights.checkpoints import FOLDER, checkpoint_folder, read_weights

# The flags of the command by name.
Given = Mapping[str, Any]

# Fields of a protocol that flags and presets set, and what they are if neither does.
_DRAWING = {
    "sampler": "dpm_solver", "steps": 20, "guidance_scale": None, "seed": 0, "height": None, "width": None,
}  # fmt: skip
_PREPARATION = {"crop": "none", "size": None, "filter": "bicubic", "rounding": True, "resize": "clean"}
# What to measure, and at a time, where no flag tells.
_SAMPLES, _DRAWN, _READ = 500, 4, 32


# --- Loss, digits -----------------------------------------------------------------------------------


def val_loss(given: Given) -> None:
    """Prints and stores the validation loss, in all and per timestep."""
    weights = given["weights"] or "ema"
    params, config = read_weights(_required(given, "checkpoint"), weights)
    held_out = open_dataset(_required(given, "features"))
    records = min(given["samples"] or _SAMPLES, len(held_out))
    # The batch of training may be that of a whole pod; the loss does not depend on it.
    batch = round_up(min(given["batch_size"] or _READ, records), jax.device_count())
    config = dataclasses.replace(
        config,
        log=dataclasses.replace(config.log, validation_samples=records),
        data=dataclasses.replace(config.data, batch_size=batch),
        optimizer=dataclasses.replace(config.optimizer, accumulation=1),
    )
    mesh = sharding.make_mesh(MeshConfig())
    params = {NETWORK: jax.device_put(params, sharding.replicated(mesh))}
    values = make_validation(config, make_objective(config), mesh, held_out)(params)
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
    write_json(_out(given) / "val_loss.json", stored)
    for timestep, value in curve.items():
        print(f"t = {timestep:<6} {value:.6f}")
    print(f"{'all':<10} {values['validation_loss']:.6f}")


def digits(given: Given) -> None:
    """Prints the share of digits that are read as asked for, per run, and draws a picture of them."""
    rows, pictures = [], []
    for path in _required(given, "checkpoint").split(","):
        params, config = read_weights(path, given["weights"] or "ema")
        size = config.features.image_size
        reader = train_reader(size)
        images, asked = generate_digits(params, config, given["samples"] or _SAMPLES, seed=given["seed"] or 0)
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
    out = _out(given)
    write_json(out / "digits.json", rows)
    height = max(picture.shape[0] for picture in pictures)
    gap = np.full((height, 16, 3), 255, np.uint8)
    wide = np.concatenate([part for picture in pictures for part in (picture, gap)][:-1], axis=1)
    Image.fromarray(wide).save(out / "samples.png")
    print(digits_table(rows))


def digits_table(rows: list[dict]) -> str:
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


# --- FID, CLIP --------------------------------------------------------------------------------------


def fid(given: Given) -> None:
    """Prints and stores the FID of drawn or given images; or, without --reference, their statistics."""
    preset = _preset(given)
    inception = Inception(_required(given, "inception"))
    protocol = _protocol(given, preset, metric="fid", network=inception.digest)
    images = _images(given, preset)
    if images is None:
        return
    if not given["reference"]:
        statistics = image_statistics(images, inception, protocol, batch_size=given["batch_size"] or _READ)
        path = _required(given, "statistics")
        write_statistics(path, statistics, protocol)
        print(f"statistics of {statistics.images} images in {path}")
        return
    reference = reference_statistics(given["reference"], inception, protocol)
    measured = image_statistics(images, inception, protocol, batch_size=given["batch_size"] or _READ)
    value = frechet_distance(measured, reference)
    _report(given, preset, images, dataclasses.replace(protocol, reference=reference.digest), value)


def clip(given: Given) -> None:
    """Prints and stores the CLIP score of drawn or given images with their captions."""
    preset = _preset(given)
    model = Clip(_required(given, "clip"))
    # CLIP's own image processor crops and resizes.
    protocol = Protocol("clip", 0, resize="clip", network=model.digest)
    captions = read_captions(_required(given, "captions"))[: given["samples"]]
    images = _images(given, preset)
    if images is None:
        return
    value = clip_score(image_files(images), captions, model, batch_size=given["batch_size"] or _READ)
    _report(given, preset, images, protocol, value)


def _preset(given: Given) -> Preset | None:
    """The preset, which no flag may contradict: its name stands beside the number."""
    if not given["preset"]:
        return None
    preset = PRESETS[given["preset"]]
    for name, value in preset.values.items():
        if given[name] not in (None, value):
            raise UserError(
                f"--{name}={given[name]} contradicts preset {given['preset']}, which has {value}: leave one."
            )
    return preset


def _fields(given: Given, preset: Preset | None, defaults: Mapping[str, Any]) -> dict[str, Any]:
    fixed = {} if preset is None else preset.values
    return {
        name: given[name] if given[name] is not None else fixed.get(name, default)
        for name, default in defaults.items()
    }


def _protocol(given: Given, preset: Preset | None, **told: Any) -> Protocol:
    return Protocol(images=0, **_fields(given, preset, _PREPARATION), **told)


def _images(given: Given, preset: Preset | None) -> Path | None:
    """The folder to measure: --images, or what --checkpoint draws; None after one shard of several."""
    if given["images"]:
        return Path(given["images"])
    captions = read_captions(_required(given, "captions"))[: given["samples"]]
    drawing = _fields(given, preset, _DRAWING)
    planned = [
        PlannedImage(f"{index:06d}.png", caption, drawing["seed"] + index)
        for index, caption in enumerate(captions)
    ]
    told = {"captions": sha256_of_file(given["captions"])}
    if not _generate(given, planned, drawing, told):
        return None
    return Path(given["out"]) / IMAGES


def _report(given: Given, preset: Preset | None, images: Path, protocol: Protocol, value: float) -> None:
    """Completes the protocol by what is known of the images, stores the number and prints it."""
    files = image_files(images)
    sizes = set()
    for file in files:
        with Image.open(file) as image:
            sizes.add(image.size)
    width, height = sizes.pop() if len(sizes) == 1 else (None, None)
    drawn = read_run_settings(images.parent)
    captions = sha256_of_file(given["captions"]) if given["captions"] else drawn.get("captions")
    known = {name: drawn.get(name) for name in ("sampler", "steps", "guidance_scale", "seed", "weights")}
    protocol = dataclasses.replace(
        protocol, images=len(files), captions=captions, height=height, width=width, **known
    )
    # The preset's name stands beside a number only if all of it was followed.
    followed = preset is not None and len(files) == preset.images
    if preset is not None and not followed:
        print(f"{len(files)} images: not {given['preset']}, which has {preset.images}")
    for name, wanted in () if preset is None else preset.values.items():
        if name in _DRAWING and getattr(protocol, name) != wanted:
            followed = False
            print(f"{name} {getattr(protocol, name)}: not {given['preset']}, which has {wanted}")
    model = given["name"] or drawn.get("model") or str(images)
    result = Result(model, value, protocol, given["preset"] if followed else "")
    out = Path(given["out"] or images.parent)
    result.write(out / f"{protocol.metric}.json")
    print(f"{protocol.metric} {value:.4f} of {len(files)} images, protocol {protocol.id}, in {out}")


# --- Layouts, tables --------------------------------------------------------------------------------


def layout(given: Given) -> None:
    """Draws what a benchmark's scripts read, and prints the commands to run them."""
    name = _required(given, "benchmark")
    benchmark = layouts.find_benchmark(name)
    drawing = _fields(given, None, {**_DRAWING, "seed": benchmark.seed})
    plan = benchmark.plan(Path(_required(given, "prompts")), drawing["seed"])
    told = {"benchmark": name, "prompts": {source.name: sha256_of_file(source) for source in plan.sources}}
    out = Path(_required(given, "out"))
    for file, text in plan.files.items():
        write_text(out / IMAGES / file, text)
    if not _generate(given, plan.images, drawing, told):
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
    """Prints and stores results: of a benchmark beside published rows, or FIDs and CLIP scores."""
    paths = _required(given, "results").split(",")
    if not given["benchmark"]:
        text, values = tables.result_table([Result.read(path) for path in paths])
        out = Path(given["out"] or Path(paths[0]).parent)
    else:
        layouts.find_benchmark(given["benchmark"])
        (path,) = paths
        drawn = read_run_settings(Path(path))
        if drawn.get("benchmark", given["benchmark"]) != given["benchmark"]:
            raise UserError(
                f"the images of '{path}' are of {drawn['benchmark']}, not of {given['benchmark']}: the two "
                "never share a row."
            )
        scores, counts = read_scores(given["benchmark"], path)
        model = given["name"] or drawn.get("model") or "measured"
        text, values = tables.benchmark_table(
            given["benchmark"], scores, counts, model=model, source=f"measured: {path}"
        )
        values["settings"] = drawn
        out = Path(given["out"] or (path if Path(path).is_dir() else Path(path).parent))
    write_text(out / "table.md", text)
    write_json(out / "table.json", values)
    print(text, end="")


def _generate(
    given: Given, planned: Sequence[PlannedImage], drawing: dict[str, Any], told: Mapping[str, Any]
) -> bool:
    """Generates images with --checkpoint into --out; returns whether all of them are there now."""
    out, checkpoint = Path(_required(given, "out")), _required(given, "checkpoint")
    shard = parse_part(given["shard"])
    pipe = load_pipeline(checkpoint, weights=given["weights"], pipeline=given["pipeline"])
    if drawing["guidance_scale"] is None:
        drawing["guidance_scale"] = pipe.config.guidance.scale
    model = _identity(checkpoint)
    # Weights without an average are taken as they are.
    weights = given["weights"] or ("ema" if model != checkpoint else "ema if there is one")
    settings = {"model": model, "weights": weights, **drawing, **told}
    arguments = {name: value for name, value in drawing.items() if name != "seed"}
    number = generate_images(
        pipe,
        planned,
        out,
        settings,
        arguments=arguments,
        shard=shard,
        batch_size=given["batch_size"] or _DRAWN,
    )
    print(f"{number} images generated, shard {given['shard']}")
    if shard[1] > 1:
        print("run the same without --shard when every shard is done")
        return False
    check_complete(planned, out)
    return True


# --- Flags ------------------------------------------------------------------------------------------


def _required(given: Given, name: str) -> str:
    if not given[name]:
        raise UserError(f"--{name} is missing: see --help.")
    return given[name]


def _identity(checkpoint: str) -> str:
    """What tells a checkpoint from others: of a run, its newest step."""
    return str(checkpoint_folder(checkpoint)) if (Path(checkpoint) / FOLDER).is_dir() else checkpoint


def _out(given: Given) -> Path:
    folder = Path(given["out"] or given["checkpoint"].split(",")[0])
    folder.mkdir(parents=True, exist_ok=True)
    return folder


MODES = {"val-loss": val_loss, "fid": fid, "clip": clip, "layout": layout, "table": table, "digits": digits}


def define_flags() -> dict[str, flags.FlagHolder]:
    """The flags of the command. Not at import: other commands have flags of the same names."""
    text, integer, real = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    choice = flags.DEFINE_enum
    return {
        "checkpoint": text("checkpoint", None, "Run, weights file or pipeline folder; several for digits."),
        "weights": choice("weights", None, ["ema", "raw"], "Moving average (default) or trained weights."),
        "out": text("out", None, "Folder for the results."),
        "samples": integer(
            "samples", None, "Images or records; default 500, and all captions for fid, clip."
        ),
        "batch_size": integer(
            "batch_size", None, f"At a time: {_DRAWN} drawn by a device, {_READ} measured."
        ),
        "features": text("features", None, "val-loss: folder of held-out features."),
        # fid, clip
        "preset": choice("preset", None, list(PRESETS), "fid, clip: a named protocol."),
        "captions": text("captions", None, "fid, clip: .txt, .tsv, .csv, .json or .jsonl."),
        "images": text("images", None, "fid, clip: images to measure, in place of drawing some."),
        "reference": text("reference", None, "fid: folder of real images, or .npz with mu and sigma."),
        "statistics": text("statistics", None, "fid, without --reference: .npz to write mu and sigma to."),
        "inception": text("inception", None, "fid: inception-2015-12-05.pt."),
        "clip": text("clip", None, "clip: folder of a CLIP model in the format of transformers."),
        "crop": choice("crop", None, ["none", "centre"], "fid: the centred square, or all; default none."),
        "size": integer("size", None, "fid: pixels that both sets are resized to; default as they are."),
        "filter": choice("filter", None, list(FILTERS), "fid: of that resize; default bicubic."),
        "rounding": flags.DEFINE_bool("rounding", None, "fid: whether it rounds to uint8; default yes."),
        "resize": choice("resize", None, list(RESIZES), "fid: to the network's input; default clean."),
        # layout, table
        "benchmark": choice("benchmark", None, list(layouts.BENCHMARKS), "layout, table: which one."),
        "prompts": text("prompts", None, "layout: the benchmark's own prompt file or folder."),
        "results": text("results", None, "table: --out of layout, or result files."),
        "name": text("name", None, "table, fid, clip: what to call the model."),
        # drawing
        "pipeline": text("pipeline", None, "Pipeline folder to take text encoder and VAE from."),
        "sampler": choice("sampler", None, list(SAMPLERS), "Default dpm_solver."),
        "steps": integer("steps", None, "Model evaluations for each image; default 20."),
        "guidance_scale": real("guidance_scale", None, "1 for none; default as stored with the weights."),
        "seed": integer("seed", None, "Of the first image; default the benchmark's own, or 0."),
        "height": integer("height", None, "Pixels; default the size the model was trained at."),
        "width": integer("width", None, "Pixels; default the size the model was trained at."),
        "shard": text("shard", "0/1", "I/N generates every N-th image from the I-th, counted from 0."),
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
