"""Draws images for prompts.

    python -m pixart_jax.sample --checkpoint=PixArt-XL-2-1024-MS --prompts="a corgi reading" --out=pictures
    python -m pixart_jax.sample --checkpoint=demo/stage3 --prompts=prompts.jsonl --out=pictures
    python -m pixart_jax.sample --from-image=pictures/00000-0-a-corgi-reading.png --out=again
    python -m pixart_jax.sample --checkpoint=PixArt-XL-2-1024-MS --serve

Image k of a prompt has seed SEED + k. It depends on its prompt, its seed and the settings alone, not on the
batch or the file it is drawn with. Each PNG carries its settings, and --from-image repeats them. The same
command continues an interrupted one: pictures that are there are kept.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags
from PIL import Image
from tqdm import tqdm

from pixart_jax.diffusion.samplers import SAMPLERS
from pixart_jax.errors import UserError, at_least, run_command
from pixart_jax.models.dtypes import default_dtype
from pixart_jax.pipeline import Pipeline, load_pipeline
from pixart_jax.pipeline.memory import check_memory
from pixart_jax.pipeline.pictures import contact_sheet, file_name, read_settings, save_latents, save_png
from pixart_jax.pipeline.requests import (
    Request,
    draw,
    make_record,
    read_requests,
    requests_of_embeddings,
    resolve,
    save_embeddings,
    sha256_of,
    with_latents,
)
from pixart_jax.training.settings import apply_settings

# The flags that are fields of a request: a line of a JSONL file goes before them.
FIELDS = (
    "negative_prompt",
    "seed",
    "steps",
    "guidance_scale",
    "guidance_interval",
    "guidance_rescale",
    "sampler",
    "sampler_options",
    "height",
    "width",
    "aspect_ratio",
    "binning",
    "image",
    "mask",
    "strength",
)

# What neither the page reads nor a picture that is drawn again.
NOT_ALONE = (
    *FIELDS,
    "prompts",
    "images_per_prompt",
    "embeddings",
    "latents",
    "save_embeddings",
    "from_image",
)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> dict[str, flags.FlagHolder]:
    """The flags of the command. Not at import: other commands have flags of the same names."""
    text, integer, real, switch, choice = (
        functools.partial(define, flag_values=values)
        for define in (
            flags.DEFINE_string,
            flags.DEFINE_integer,
            flags.DEFINE_float,
            flags.DEFINE_bool,
            flags.DEFINE_enum,
        )
    )
    return {
        "checkpoint": text("checkpoint", None, "Run directory, weights file or diffusers pipeline folder."),
        "weights": choice("weights", None, ["ema", "raw"], "Which weights; default ema."),
        "pipeline": text("pipeline", None, "Pipeline folder to take text encoder and VAE from."),
        "prompts": text(
            "prompts",
            None,
            "A prompt; a file with one on each line; or .jsonl, whose lines set flags of their own.",
        ),
        "negative_prompt": text("negative_prompt", "", "What to guide away from."),
        "out": text("out", None, "Folder for the pictures."),
        "seed": integer("seed", 0, "Seed of the first image of every prompt."),
        "images_per_prompt": integer("images_per_prompt", 1, "Images drawn for each prompt."),
        "steps": integer("steps", 20, "Model evaluations for each image."),
        "guidance_scale": real("guidance_scale", None, "1 for none; default as stored with the weights."),
        "guidance_interval": text(
            "guidance_interval", None, "LOW,HIGH timesteps (0 to 999) that are guided; default all."
        ),
        "guidance_rescale": real("guidance_rescale", 0.0, "0 to 1: bring guided noise back to its spread."),
        "sampler": choice("sampler", "dpm_solver", list(SAMPLERS), "How noise becomes an image."),
        "sampler_options": text("sampler_options", None, 'Further options of it as JSON: {"order": 3}.'),
        "height": integer("height", None, "Pixels; default the size the model was trained at."),
        "width": integer("width", None, "Pixels; default the size the model was trained at."),
        "aspect_ratio": text("aspect_ratio", None, "WIDTH:HEIGHT, such as 16:9, in place of both."),
        "binning": switch("binning", True, "Draw at the nearest bucket and resize back."),
        "image": text("image", None, "Picture to start from, or that --mask is for."),
        "mask": text("mask", None, "Picture that is light where --image is redrawn."),
        "strength": real(
            "strength", None, "0 to 1, part of the steps run from --image; default 0.8, with a mask 1."
        ),
        "batch_size": integer("batch_size", None, "Images a device draws at a time; default at most 4."),
        "embeddings": text("embeddings", None, "File of --save_embeddings, in place of --prompts."),
        "save_embeddings": text("save_embeddings", None, "Write the prompts' features to this .npz file."),
        "latents": text("latents", None, ".npy [images, h, w, C]: noise to start from."),
        "save_latents": switch("save_latents", False, "Write each image's latents beside it, as .npy."),
        "contact_sheet": text("contact_sheet", None, "Write all pictures of this call on one, to this file."),
        "from_image": text("from_image", None, "PNG of this command, drawn again as its settings say."),
        "serve": switch("serve", False, "Open a web page instead (extra 'app')."),
        "host": text("host", "127.0.0.1", "--serve: address to listen on; 0.0.0.0 for all of the network."),
        "port": integer("port", 7860, "--serve: port to listen on."),
        "progress": switch("progress", True, "Show a bar."),
    }


def main(holders: Mapping[str, flags.FlagHolder], argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"argument '{argv[1]}' is not a flag: see --help.")
    given = {name: holder.value for name, holder in holders.items()}
    for alone in ("serve", "from_image"):
        also = next((name for name in NOT_ALONE if name != alone and holders[name].present), None)
        if given[alone] and also:
            raise UserError(f"--{also} comes with --{alone}, which does not read it: leave one out.")
    origin = _read_origin(given) if given["from_image"] else {}
    prompts = None if given["serve"] or origin else _read_prompts(given)
    sheet = given["contact_sheet"]
    if sheet and Path(sheet).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--contact_sheet={sheet}: give a name that ends in .png, .jpg or .webp.")
    if given["batch_size"] is not None:
        at_least("--batch_size", given["batch_size"], 1)
    needed = "checkpoint" if given["serve"] or given["save_embeddings"] else "out"
    for name in ("checkpoint", needed):
        if not given[name]:
            raise UserError(f"--{name} is missing: see --help.")
    apply_settings()
    pipe = load_pipeline(
        given["checkpoint"],
        weights=given["weights"],
        pipeline=given["pipeline"],
        # Each text is encoded once; several devices share the encoder and can keep their part.
        keep_text_encoder=given["serve"] or len(jax.local_devices()) > 1,
    )
    print(f"dtype {default_dtype()}; attention {pipe.model.config.attention_choice()}", flush=True)
    source = {name: given[name] for name in ("checkpoint", "weights", "pipeline")}
    if given["serve"]:
        from pixart_jax.pipeline.app import serve  # Gradio is an extra

        serve(pipe, source, out=given["out"], host=given["host"], port=given["port"])
        return
    if origin:
        if origin["fingerprint"] != pipe.fingerprint:
            raise UserError(
                f"'{given['from_image']}' was drawn with other weights than '{given['checkpoint']}' has now: "
                "give those with --checkpoint."
            )
        prompts = [[Request.from_dict(origin["request"])]]
    resolved = [[resolve(pipe, request) for request in images] for images in prompts]
    prompts = [[request for request, _ in images] for images in resolved]
    if given["save_embeddings"]:
        save_embeddings(Path(given["save_embeddings"]), pipe, prompts)
        print(f"features of {len(prompts)} prompts in {given['save_embeddings']}")
        if not given["out"]:
            return
    names = [[file_name(n, r.seed, r.prompt) for r in images] for n, images in enumerate(prompts)]
    if origin:
        names = [[Path(given["from_image"]).name]]
    largest = max(
        (size for images in resolved for _, size in images), key=lambda size: size.height * size.width
    )
    count = sum(map(len, prompts))
    batch_size = pipe.drawer.per_device(count, given["batch_size"])
    print(f"Memory on a device ({len(pipe.drawer.devices)} here), images at a time: {batch_size}")
    print(check_memory(pipe, largest, batch_size), flush=True)
    jobs = [
        Job(request, Path(given["out"]) / name, make_record(pipe, request, source, batch_size))
        for images, line in zip(prompts, names)
        for request, name in zip(images, line)
    ]
    _draw_jobs(pipe, jobs, batch_size, given)
    if sheet:
        columns = len(prompts[0]) if len(prompts[0]) > 1 else math.ceil(math.sqrt(count))
        Path(sheet).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(contact_sheet([job.path for job in jobs], columns)).save(sheet)


class Job(NamedTuple):
    """A picture to be made."""

    request: Request
    path: Path
    # What the PNG carries.
    record: dict[str, Any]


def _draw_jobs(pipe: Pipeline, jobs: Sequence[Job], batch_size: int, given: Mapping[str, Any]) -> None:
    """Draws what is not there yet."""
    todo = [job for job in jobs if not _is_done(job, given["save_latents"])]
    Path(given["out"]).mkdir(parents=True, exist_ok=True)
    # Without a terminal no bar.
    with tqdm(total=len(todo), unit="image", disable=None if given["progress"] else True) as bar:
        for index, pixels, latents in draw(pipe, [job.request for job in todo], batch_size):
            job = todo[index]
            # The picture last: where it is, all is.
            if given["save_latents"]:
                save_latents(job.path.with_suffix(".npy"), latents)
            save_png(job.path, pixels, job.record)
            bar.update()
    kept = len(jobs) - len(todo)
    print(f"{len(todo)} images in {given['out']}" + (f", {kept} were there" if kept else ""))


def _is_done(job: Job, with_latents: bool) -> bool:
    """Whether the picture is there.

    Raises:
      UserError: another one is there.
    """
    if not job.path.exists():
        return False
    try:
        found = read_settings(job.path)
    except UserError:
        raise UserError(f"'{job.path}' is there and is no picture of this command: move it away.") from None
    for part in ("fingerprint", "files", "request"):
        if found.get(part) == job.record[part]:
            continue
        what = "weights" if part == "fingerprint" else "input files"
        if part == "request":
            old, new = dict(found.get(part) or {}), job.record[part]
            what = ", ".join(name for name in {**old, **new} if old.get(name) != new.get(name))
        raise UserError(f"'{job.path}' is there, drawn with other {what}: give another --out, or remove it.")
    return not with_latents or job.path.with_suffix(".npy").exists()


def _read_prompts(given: Mapping[str, Any]) -> list[list[Request]]:
    fields = {name: given[name] for name in FIELDS}
    if given["guidance_interval"] is not None:
        try:
            fields["guidance_interval"] = [float(t) for t in given["guidance_interval"].split(",")]
        except ValueError:
            raise UserError(f"--guidance_interval={given['guidance_interval']}: give LOW,HIGH.") from None
    if given["sampler_options"] is not None:
        try:
            fields["sampler_options"] = json.loads(given["sampler_options"])
        except ValueError:
            raise UserError(f"--sampler_options={given['sampler_options']}: give JSON.") from None
    at_least("--images_per_prompt", given["images_per_prompt"], 1)
    if bool(given["prompts"]) == bool(given["embeddings"]):
        raise UserError("give --prompts, or --embeddings in their place: see --help.")
    read = requests_of_embeddings if given["embeddings"] else read_requests
    prompts = read(given["embeddings"] or given["prompts"], fields, given["images_per_prompt"])
    return with_latents(prompts, given["latents"]) if given["latents"] else prompts


def _read_origin(given: dict[str, Any]) -> dict[str, Any]:
    """The settings of --from-image; puts the weights it names in place of flags that were not given."""
    settings = read_settings(given["from_image"])
    try:
        for name in ("checkpoint", "weights", "pipeline"):
            given[name] = given[name] or settings["source"][name]
        given["batch_size"] = given["batch_size"] or settings["made_with"]["batch_size"]
        for path, digest in settings["files"].items():
            if sha256_of(path) != digest:
                raise UserError(f"'{path}' is not the file that '{given['from_image']}' was drawn with.")
        return {"request": settings["request"], "fingerprint": settings["fingerprint"]}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"the settings of '{given['from_image']}' are not those of a picture.") from None


if __name__ == "__main__":
    run_command(functools.partial(main, define_flags()))
