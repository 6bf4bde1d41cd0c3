"""Evaluates the weights of a run, as described in docs/evaluation.md.

    python -m pixart_jax.evaluate val-loss --checkpoint=runs/stage2 --features=data/sam-256-test
    python -m pixart_jax.evaluate fid --preset=mjhq-30k --checkpoint=PixArt-XL-2-1024-MS \\
        --captions=meta_data.json --reference=mjhq30k_imgs --inception=inception-2015-12-05.pt --out=mjhq
    python -m pixart_jax.evaluate clip --images=mjhq/images --captions=meta_data.json --clip=clip-vit-large
    python -m pixart_jax.evaluate layout --benchmark=geneval --prompts=geneval/prompts \\
        --checkpoint=runs/stage3-512 --out=geneval-512
    python -m pixart_jax.evaluate table --benchmark=geneval --results=geneval-512
    python -m pixart_jax.evaluate digits --checkpoint=demo/stage1,demo/stage2,demo/stage3 --out=demo
    python -m pixart_jax.evaluate emoji --checkpoint=demo/emoji/stage3 --out=demo/emoji
    python -m pixart_jax.evaluate ema --checkpoint=runs/stage2 --widths=0.075 --out=stage2-0.075
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from pixart_jax.config import MeshConfig, parse_widths
from pixart_jax.constants import LARGEST_BATCH, LARGEST_SIDE, MOST_STEPS, SAMPLER_NAMES
from pixart_jax.data.openmoji import LARGEST_PART
from pixart_jax.data.sources.options import parse_part
from pixart_jax.errors import UserError
from pixart_jax.evaluation import layouts, tables
from pixart_jax.evaluation.clip import Clip, clip_score, images_of_captions
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
    check_planned,
    generate_images,
    read_captions,
    read_run_settings,
)
from pixart_jax.evaluation.protocol import PRESETS, Preset, Protocol, Result
from pixart_jax.evaluation.scores import read_scores
from pixart_jax.files import make_folder, sha256_of_file, write_json, write_text
from pixart_jax.flags import LARGEST_SEED, CommandFlags, fetched, flag, run
from pixart_jax.hub import is_hub, name_of, pinned
from pixart_jax.pipeline.requests import Settings
from pixart_jax.weights.hub import pipeline_for

# Fields of a protocol that flags and presets set, with their defaults: how images are generated, and how they
# are prepared for the feature network.
_GENERATION = {
    name: getattr(Settings(), name)
    for name in ("sampler", "steps", "guidance_scale", "seed", "height", "width")
}
_PREPARATION = {"crop": "none", "size": None, "filter": "bicubic", "rounding": True, "resize": "clean"}
# Defaults: number of images or records, images generated per device at a time, and images measured at a time.
_SAMPLES, _GENERATED, _MEASURED = 500, 4, 32


# --- Flags ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags(CommandFlags):
    checkpoint: str | None = flag(
        None,
        "Run directory, weights file or pipeline folder; for digits and emoji several, comma-separated.",
        path="weights",
    )
    weights: str | None = flag(
        None, "Exponential moving average (default) or raw weights.", choices=("ema", "raw")
    )
    out: str | None = flag(None, "Folder for the results.", path="output")
    samples: int | None = flag(
        None,
        "Number of images or records; default: 500 (emoji: 200 of each kind), and all captions for fid and "
        "clip.",
        minimum=1,
    )
    batch_size: int | None = flag(
        None,
        f"Batch size; default: generate {_GENERATED} images per device and measure {_MEASURED} at a time.",
        minimum=1,
        maximum=LARGEST_BATCH,
    )
    features: str | None = flag(None, "val-loss: folder of held-out features.", path=True)
    # fid, clip
    preset: str | None = flag(None, "fid, clip: a named protocol.", choices=tuple(PRESETS))
    captions: str | None = flag(
        None, "fid, clip: file of captions, .txt, .tsv, .csv, .json or .jsonl.", path=True
    )
    images: str | None = flag(
        None, "fid, clip: folder of images to measure instead of generating them.", path=True
    )
    reference: str | None = flag(None, "fid: folder of real images, or .npz with mu and sigma.", path=True)
    statistics: str | None = flag(
        None, "fid, without --reference: .npz to write mu and sigma to.", path="output"
    )
    inception: str | None = flag(None, "fid: inception-2015-12-05.pt.", path=True)
    clip: str | None = flag(
        None, "clip: folder of a CLIP model in the format of transformers.", path="weights"
    )
    crop: str | None = flag(
        None, "fid: crop both sets to the centre square, or not; default: none.", choices=("none", "centre")
    )
    size: int | None = flag(
        None,
        "fid: pixels that both sets are resized to; default: as they are.",
        minimum=1,
        maximum=LARGEST_SIDE,
    )
    filter: str | None = flag(None, "fid: filter of that resize; default: bicubic.", choices=tuple(FILTERS))
    rounding: bool | None = flag(None, "fid: whether that resize rounds to uint8; default: yes.")
    resize: str | None = flag(
        None, "fid: resize to the network's input size; default: clean.", choices=tuple(RESIZES)
    )
    # ema
    widths: str | None = flag(None, "ema: relative width of the average; several, comma-separated.")
    step: int | None = flag(None, "ema: step of a snapshot; default: the last.", minimum=1)
    # emoji
    one_in: int | None = flag(
        None,
        "emoji: --source_option=one_in of the features that the model was trained on; default: 1.",
        minimum=1,
        maximum=LARGEST_PART,
    )
    # layout, table
    benchmark: str | None = flag(None, "layout, table: which benchmark.", choices=tuple(layouts.BENCHMARKS))
    prompts: str | None = flag(None, "layout: the benchmark's own prompt file or folder.", path=True)
    results: str | None = flag(None, "table: --out of layout, or result files, comma-separated.", path=True)
    name: str | None = flag(None, "table, fid, clip: name of the model in the results.")
    # sampling
    pipeline: str | None = flag(
        None, "Pipeline folder that provides the text encoder and the VAE.", path="weights"
    )
    sampler: str | None = flag(None, "Sampling algorithm; default: dpm_solver.", choices=SAMPLER_NAMES)
    steps: int | None = flag(None, "Model evaluations per image; default: 20.", minimum=1, maximum=MOST_STEPS)
    guidance_scale: float | None = flag(
        None,
        "1 or less for no guidance; default: the scale stored with the weights.",
        minimum=0,
    )
    seed: int | None = flag(
        None, "Seed of the first image; default: the benchmark's own, or 0.", minimum=0, maximum=LARGEST_SEED
    )
    height: int | None = flag(
        None, "Pixels; default: the size the model was trained at.", minimum=1, maximum=LARGEST_SIDE
    )
    width: int | None = flag(
        None, "Pixels; default: the size the model was trained at.", minimum=1, maximum=LARGEST_SIDE
    )
    shard: str = flag("0/1", "I/N: generate every N-th image, starting with image I (counted from 0).")


# --- Loss, digits -----------------------------------------------------------------------------------


def val_loss(given: Flags) -> None:
    """Prints and stores the validation loss, as a mean and per timestep."""
    import jax

    from pixart_jax.denoiser import NETWORK
    from pixart_jax.encoders.batches import round_up
    from pixart_jax.training import sharding
    from pixart_jax.training.data import open_dataset
    from pixart_jax.training.objectives import make_objective
    from pixart_jax.training.objectives.diffusion import VALIDATION_PARTS, validation_timesteps
    from pixart_jax.training.validation import make_validation
    from pixart_jax.weights.checkpoints import read_weights

    given.require("checkpoint", "features")
    weights = given.weights or "ema"
    params, config = read_weights(given.checkpoint, weights)
    held_out = open_dataset(given.features)
    records = min(given.samples or _SAMPLES, len(held_out))
    # Not the batch size of training, which may be too large for this machine. The loss does not depend on it.
    batch = round_up(min(given.batch_size or _MEASURED, records), jax.device_count())
    config = dataclasses.replace(
        config,
        log=dataclasses.replace(config.log, validation_samples=records),
        data=dataclasses.replace(config.data, batch_size=batch),
        optimizer=dataclasses.replace(config.optimizer, accumulation=1),
    )
    mesh = sharding.make_mesh(MeshConfig())
    params = {NETWORK: jax.device_put(params, sharding.replicated(mesh))}
    values = make_validation(config, make_objective(config), mesh, held_out)(params)
    _check_finite("validation_loss", values["validation_loss"])
    timesteps = validation_timesteps(config)
    curve = {
        int(timesteps[part]): values[f"validation_loss_part_{part}"]
        for part in range(VALIDATION_PARTS)
        if f"validation_loss_part_{part}" in values
    }
    stored = {
        "checkpoint": _identity(given.checkpoint),
        "weights": weights,
        "features": name_of(given.features),
        "features_fingerprint": held_out.fingerprint,
        "records": records,
        "validation_loss": values["validation_loss"],
        "validation_loss_at_timestep": curve,
    }
    for timestep, value in curve.items():
        print(f"t = {timestep:<6} {value:.6f}")
    print(f"{'all':<10} {values['validation_loss']:.6f}")
    write_json(_out(given) / "val_loss.json", stored)


def digits(given: Flags) -> None:
    """Prints the share of generated digits that a classifier reads as requested, and saves a grid of them."""
    from pixart_jax.evaluation import digits as digit_images
    from pixart_jax.pipeline.image_files import save_image
    from pixart_jax.weights.checkpoints import read_weights

    given.require("checkpoint")
    rows, grids = [], []
    for path in given.checkpoint.split(","):
        params, config = read_weights(path, given.weights or "ema")
        row, grid = digit_images.measure(params, config, given.samples or _SAMPLES, seed=given.seed or 0)
        rows.append(row)
        grids.append(grid)
    print(digit_images.table(rows))
    out = _out(given)
    write_json(out / "digits.json", rows)
    height = max(grid.shape[0] for grid in grids)
    gap = np.full((height, 16, 3), 255, np.uint8)
    wide = np.concatenate([part for grid in grids for part in (grid, gap)][:-1], axis=1)
    save_image(out / "samples.png", wide)


def emoji(given: Flags) -> None:
    """Prints the share of generated pictures that readers find as requested, and saves a sheet of them."""
    from pixart_jax.evaluation import emoji as emoji_images
    from pixart_jax.pipeline.image_files import save_image
    from pixart_jax.weights.checkpoints import read_weights

    given.require("checkpoint")
    rows, sheets = [], []
    for path in given.checkpoint.split(","):
        params, config = read_weights(path, given.weights or "ema")
        found, sheet = emoji_images.measure(
            params,
            config,
            given.samples or emoji_images.SAMPLES,
            seed=given.seed or 0,
            steps=given.steps or 20,
            scale=given.guidance_scale,
            one_in=given.one_in or 1,
        )
        rows += found
        sheets.append(sheet)
    print(emoji_images.table(rows))
    write_json(_out(given) / "emoji.json", rows)
    save_image(_out(given) / "emoji.png", np.concatenate(sheets))


def ema(given: Flags) -> None:
    """Reconstructs averages of the weights of a run from its snapshots, and writes them as checkpoints."""
    from pixart_jax.weights.checkpoints import check_new, write_weights
    from pixart_jax.weights.snapshots import reconstruct

    given.require("checkpoint", "widths", "out")
    widths = parse_widths("--widths", given.widths)
    outs = [f"{given.out}/{width:g}" if len(widths) > 1 else given.out for width in widths]
    for out in outs:
        check_new(out)
    for width, out in zip(widths, outs):
        params, config, fit = reconstruct(given.checkpoint, width, given.step)
        write_weights(out, params, config)
        print(f"width {width:g} from {len(fit.weights)} averages, error {fit.error:.2%}, in {out}")


# --- FID, CLIP --------------------------------------------------------------------------------------


def fid(given: Flags) -> None:
    """Prints and stores the FID of images; without --reference, writes their statistics instead."""
    given.require("inception")
    preset = _preset(given)
    inception = Inception(given.inception)
    protocol = _protocol(given, preset, metric="fid", network=inception.digest)
    images = _images(given, preset)
    if images is None:
        return
    count = len(image_files(images))
    if given.samples is not None and count != given.samples:
        raise UserError(
            f"--samples is {given.samples}, but '{images}' holds {count} images, and fid measures all images "
            "of a folder: leave out --samples, or give a folder that holds only these."
        )
    if not given.reference:
        given.require("statistics")
        statistics = image_statistics(images, inception, protocol, batch_size=given.batch_size or _MEASURED)
        write_statistics(given.statistics, statistics, protocol)
        print(f"statistics of {statistics.images} images in {given.statistics}")
        return
    reference = reference_statistics(given.reference, inception, protocol)
    measured = image_statistics(images, inception, protocol, batch_size=given.batch_size or _MEASURED)
    value = frechet_distance(measured, reference)
    protocol = dataclasses.replace(protocol, reference=reference.digest)
    _report(given, preset, images, protocol, value, measured.images)


def clip(given: Flags) -> None:
    """Prints and stores the CLIP score of generated or given images and their captions."""
    given.require("clip", "captions")
    preset = _preset(given)
    model = Clip(given.clip)
    # CLIP has its own image processor, which crops and resizes.
    protocol = Protocol("clip", 0, resize="clip", network=model.digest)
    captions = read_captions(given.captions)
    images = _images(given, preset)
    if images is None:
        return
    files = images_of_captions(images, captions, samples=given.samples)
    texts = captions.texts[: len(files)]
    value = clip_score(files, texts, model, batch_size=given.batch_size or _MEASURED)
    _report(given, preset, images, protocol, value, len(files))


def _preset(given: Flags) -> Preset | None:
    """The preset of --preset. Flags must not contradict it, because its name is stored with the result."""
    if not given.preset:
        return None
    preset = PRESETS[given.preset]
    for name, value in preset.values.items():
        requested = getattr(given, name)
        if requested not in (None, value):
            raise UserError(
                f"--{name}={requested} contradicts preset {given.preset}, which has {value}: leave one "
                "of them out."
            )
    return preset


def _fields(given: Flags, preset: Preset | None, defaults: Mapping[str, Any]) -> dict[str, Any]:
    fixed = {} if preset is None else preset.values
    return {
        name: getattr(given, name) if getattr(given, name) is not None else fixed.get(name, default)
        for name, default in defaults.items()
    }


def _protocol(given: Flags, preset: Preset | None, **known: Any) -> Protocol:
    return Protocol(images=0, **_fields(given, preset, _PREPARATION), **known)


def _images(given: Flags, preset: Preset | None) -> Path | None:
    """The folder of --images or of generated images; None if only one shard of them was generated."""
    if given.images:
        images = Path(given.images)
        stored = read_run_settings(images.parent).get("captions")
        if given.captions and stored and stored != sha256_of_file(given.captions):
            raise UserError(
                f"'{images}' was not generated from --captions '{given.captions}': give the file that it was "
                "generated from, unchanged."
            )
        return images
    given.require("captions")
    captions = read_captions(given.captions).texts[: given.samples]
    generation = _fields(given, preset, _GENERATION)
    planned = [
        PlannedImage(f"{index:06d}.png", caption, generation["seed"] + index)
        for index, caption in enumerate(captions)
    ]
    known = {"captions": sha256_of_file(given.captions)}
    if not _generate(given, planned, generation, known):
        return None
    return Path(given.out) / IMAGES


def _report(
    given: Flags, preset: Preset | None, images: Path, protocol: Protocol, value: float, count: int
) -> None:
    """Adds what is known about the `count` images to the protocol, then stores and prints the result."""
    _check_finite(protocol.metric, value)
    sizes = set()
    for file in image_files(images):
        with Image.open(file) as image:
            sizes.add(image.size)
    width, height = sizes.pop() if len(sizes) == 1 else (None, None)
    settings = read_run_settings(images.parent)
    captions = sha256_of_file(given.captions) if given.captions else settings.get("captions")
    known = {name: settings.get(name) for name in ("sampler", "steps", "guidance_scale", "seed", "weights")}
    protocol = dataclasses.replace(
        protocol, images=count, captions=captions, height=height, width=width, **known
    )
    # The name of the preset is stored with the result only if the images follow all settings of the preset.
    followed = preset is not None and count == preset.images
    if preset is not None and not followed:
        print(f"preset {given.preset} does not apply: {count} images instead of {preset.images}")
    for name, wanted in () if preset is None else preset.values.items():
        if name in _GENERATION and getattr(protocol, name) != wanted:
            followed = False
            found = getattr(protocol, name)
            print(f"preset {given.preset} does not apply: {name} {found} instead of {wanted}")
    model = given.name or settings.get("model") or name_of(images)
    result = Result(model, value, protocol, given.preset if followed else "")
    out = Path(given.out or images.parent)
    print(f"{protocol.metric} {value:.4f} of {count} images, protocol {protocol.id}, in {out}")
    result.write(out / f"{protocol.metric}.json")


# --- Layouts, tables --------------------------------------------------------------------------------


def layout(given: Flags) -> None:
    """Generates the images of a benchmark, and prints the commands that run the benchmark's own scripts."""
    given.require("benchmark", "prompts", "out")
    benchmark = layouts.find_benchmark(given.benchmark)
    generation = _fields(given, None, {**_GENERATION, "seed": benchmark.seed})
    plan = benchmark.plan(Path(given.prompts), generation["seed"])
    known = {
        "benchmark": given.benchmark,
        "prompts": {source.name: sha256_of_file(source) for source in plan.sources},
    }
    check_planned(plan.images)
    if not _generate(given, plan.images, generation, known, plan.files):
        return
    out = Path(given.out)
    first = plan.images[0]
    with Image.open(out / IMAGES / first.file) as image:
        size = image.height // (2 if first.tiles == 4 else 1)
    print(f"# {len(plan.images)} of {benchmark.images} images of {given.benchmark} are in {out / IMAGES}")
    print(f"# In a checkout of github.com/{benchmark.repository}:")
    for line in benchmark.commands((out / IMAGES).absolute(), size, plan):
        print(line)
    print(f"# Then: python -m pixart_jax.evaluate table --benchmark={given.benchmark} --results={out}")


def table(given: Flags) -> None:
    """Prints and stores a table: of a benchmark with published rows, or of FIDs and CLIP scores."""
    given.require("results")
    paths = given.results.split(",")
    if not given.benchmark:
        text, values = tables.result_table([Result.read(path) for path in paths])
        out = Path(given.out or Path(paths[0]).parent)
    else:
        layouts.find_benchmark(given.benchmark)
        if len(paths) > 1:
            raise UserError(f"--benchmark takes one folder, but --results names {len(paths)}: give one.")
        (path,) = paths
        settings = read_run_settings(Path(path))
        if settings.get("benchmark", given.benchmark) != given.benchmark:
            raise UserError(
                f"the images of '{path}' are of {settings['benchmark']}, not of {given.benchmark}, and the "
                f"two are not comparable: use --benchmark={settings['benchmark']}, or give other --results."
            )
        scores, counts = read_scores(given.benchmark, path)
        model = given.name or settings.get("model") or "measured"
        text, values = tables.benchmark_table(
            given.benchmark, scores, counts, model=model, source=f"measured: {name_of(path)}"
        )
        values["settings"] = settings
        out = Path(given.out or (path if Path(path).is_dir() else Path(path).parent))
    print(text, end="")
    write_text(out / "table.md", text)
    write_json(out / "table.json", values)


def _generate(
    given: Flags,
    planned: Sequence[PlannedImage],
    generation: dict[str, Any],
    known: Mapping[str, Any],
    files: Mapping[str, str] = MappingProxyType({}),
) -> bool:
    """Generates images with --checkpoint in --out; returns whether all planned images exist afterwards."""
    from pixart_jax.pipeline import load_pipeline

    given.require("out", "checkpoint")
    out, checkpoint = Path(given.out), given.checkpoint
    shard = parse_part(given.shard)
    pipeline = pinned(str(pipeline_for(checkpoint, given.pipeline) or "")) or None
    pipe = load_pipeline(checkpoint, weights=given.weights, pipeline=pipeline)
    arguments = {name: value for name, value in generation.items() if name != "seed"}
    # Before anything is written: an invalid setting must not be stored as that of the folder.
    resolved, _ = pipe.resolve(Settings(**arguments))
    arguments["guidance_scale"] = generation["guidance_scale"] = resolved.guidance_scale
    model = _identity(checkpoint)
    # Without --weights the pipeline uses the moving average of a run, but a weight file may not have one.
    weights = given.weights or ("ema" if model != checkpoint else "ema if there is one")
    settings = {"model": model, "weights": weights, **generation, **known}
    number = generate_images(
        pipe,
        planned,
        out,
        settings,
        arguments=arguments,
        shard=shard,
        batch_size=given.batch_size or _GENERATED,
        files=files,
    )
    print(f"{number} images generated, shard {given.shard}")
    if shard[1] > 1:
        print("when all shards are done, run the same command without --shard")
        return False
    check_complete(planned, out)
    return True


# --- Command ----------------------------------------------------------------------------------------


def _identity(checkpoint: str) -> str:
    """The path that identifies the weights: for a run directory, its newest step."""
    from pixart_jax.weights.checkpoints import FOLDER, checkpoint_folder

    return str(checkpoint_folder(checkpoint)) if (Path(checkpoint) / FOLDER).is_dir() else checkpoint


def _check_finite(name: str, value: float) -> None:
    """Raises a `UserError` for a result that is no number."""
    if not np.isfinite(value):
        raise UserError(
            f"{name} is {value}: the weights, the features or the network that measures have values that are "
            "NaN or infinite, or there are too few images. No result is stored."
        )


def _out(given: Flags) -> Path:
    return make_folder(given.out or given.checkpoint.split(",")[0])


MODES = {
    "val-loss": val_loss,
    "fid": fid,
    "clip": clip,
    "layout": layout,
    "table": table,
    "digits": digits,
    "emoji": emoji,
    "ema": ema,
}


def main(given: Flags) -> None:
    mode = given.mode(MODES)
    if not given.out and (source := next((each for each in _beside_inputs(given) if is_hub(each)), None)):
        raise UserError(
            f"--out is missing: results cannot be written beside '{source}'. Give a local folder."
        )
    mode(fetched(given))


def _beside_inputs(given: Flags) -> Sequence[str]:
    """The inputs beside which results are written without --out."""
    return [each for each in (given.checkpoint, given.images, given.results) if each]


if __name__ == "__main__":
    run(main, Flags)
