"""Generates images for prompts.

    python -m pixart_jax.sample --checkpoint=hub:PixArt-alpha/PixArt-XL-2-512x512 --prompts="a corgi reading"
    python -m pixart_jax.sample --checkpoint=PixArt-XL-2-1024-MS --prompts="a corgi reading" --out=images
    python -m pixart_jax.sample --checkpoint=PixArt-Sigma-XL-2-1024-MS --prompts="a corgi" --out=images
    python -m pixart_jax.sample --checkpoint=demo/stage3 --prompts=prompts.jsonl --out=images
    python -m pixart_jax.sample --from_image=images/00000-0-a-corgi.png --open_recorded_paths --out=again
    python -m pixart_jax.sample --checkpoint=PixArt-XL-2-1024-MS --serve
    python -m pixart_jax.sample --checkpoint=PixArt-XL-2-1024-MS --adapter=pixel-art.safetensors:0.8 ...

Image k of a prompt has seed SEED + k. It depends only on its prompt, its seed and the settings, not on the
other prompts of the command. Each PNG stores its settings, and --from_image generates the image again from
them. The weights and files that a PNG names are only opened if you name them again, or with
--open_recorded_paths. To resume an interrupted command, run it again: existing images are kept.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from pixart_jax.constants import LARGEST_BATCH
from pixart_jax.errors import UserError, short
from pixart_jax.files import make_folder
from pixart_jax.flags import CommandFlags, fetched, flag, run, values_for
from pixart_jax.hub import local, pinned
from pixart_jax.models.configs import TEXT_WEIGHTS_DTYPES, WEIGHTS_DTYPES
from pixart_jax.pipeline.page.guard import check_names, read_users
from pixart_jax.pipeline.requests import MOST_IMAGES, Request, Settings, read_requests
from pixart_jax.weights.hub import pipeline_for

if TYPE_CHECKING:
    from pixart_jax.pipeline.pipeline import Pipeline

# Folder of the images without --out.
DEFAULT_OUT = "images"
# Flags that select the weights and encoders; all other inputs of an image are its settings.
SOURCE = ("checkpoint", "weights", "pipeline")
# Flags of how texts are encoded, and of how the weights of the network are kept in memory; recorded if they
# are given. The fingerprint of the weights depends on the latter.
TEXT_AS = ("text_weights_dtype", "clean_caption", "lower_case")
LOADED_AS = ("weights_dtype", *TEXT_AS)

# Settings that are in every record.
_DEFAULTS = {name: value for name, value in vars(Settings()).items() if value is not None}

# Flags that name the files of an image.
FILES = ("image", "mask", "embeddings", "latents")

# Flags that neither --serve nor --from_image reads. --serve does not read `FILES` either.
UNREAD = (
    *(field.name for field in dataclasses.fields(Settings) if field.name not in FILES),
    *("prompts", "images_per_prompt", "save_embeddings"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags(Settings, CommandFlags):
    """The flags of the command: all settings, and these."""

    checkpoint: str | None = flag(
        None,
        "Run directory, weights file or diffusers pipeline folder, or hub:OWNER/NAME. The weights of a run "
        "that trained an adapter contain it.",
        path="weights",
    )
    weights: str | None = flag(
        None, "Exponential moving average (default) or raw weights.", choices=("ema", "raw")
    )
    pipeline: str | None = flag(
        None, "Pipeline folder that provides the text encoder and the VAE.", path="weights"
    )
    adapter: tuple[str, ...] = flag(
        (),
        "LoRA or DoRA to merge into the weights: PATH or PATH:WEIGHT, of a file, of peft's folder or of a "
        "run that trained one; may be given several times, and then they add up. WEIGHT is 1 by default.",
        path="weights",
    )
    adapter_alpha: float | None = flag(
        None, "alpha of adapters whose files do not state their scale.", above=0, maximum=1e6
    )
    weights_dtype: str | None = flag(
        None,
        "How the weights of the network are kept in memory: 'float32' (default) or 'int8' (the kernels of "
        "its blocks; a quarter of the memory).",
        choices=WEIGHTS_DTYPES,
    )
    text_weights_dtype: str | None = flag(
        None,
        "How the weights of the text encoder are kept in memory: 'auto' (in its compute dtype) or 'int8'; "
        "default: as in the config of the run, otherwise 'auto'.",
        choices=TEXT_WEIGHTS_DTYPES,
    )
    clean_caption: bool | None = flag(
        None,
        "Clean prompts as diffusers does; default: as captions were in training (PixArt-alpha: cleaned; "
        "PixArt-Sigma: not). diffusers cleans those of both by default.",
    )
    lower_case: bool | None = flag(
        None,
        "Convert prompts that are not cleaned to lower case, as diffusers does; default: as captions were in "
        "training (PixArt-Sigma: not).",
    )
    prompts: str | None = flag(
        None,
        "A prompt; a file with one prompt per line; or a .jsonl, .json, .csv or .tsv file, whose entries may "
        "override the settings.",
        path="text",
    )
    images_per_prompt: int = flag(1, "Number of images for each prompt.", minimum=1, maximum=MOST_IMAGES)
    batch_size: int | None = flag(
        None, "Number of images in each device's batch; default: at most 4.", minimum=1, maximum=LARGEST_BATCH
    )
    out: str | None = flag(
        None,
        f"Folder for the images; default: {DEFAULT_OUT}, and with --save_embeddings or --serve none.",
        path="output",
    )
    contact_sheet: str | None = flag(
        None, "File for a contact sheet of all images of this command.", path="output"
    )
    embeddings: str | None = flag(None, "File that --save_embeddings wrote, instead of --prompts.", path=True)
    save_embeddings: str | None = flag(
        None, "Write the text features of the prompts to this .npz file.", path="output"
    )
    latents: str | None = flag(None, "Noise to start from: a .npy file, [images, h, w, C].", path=True)
    save_latents: bool = flag(False, "Also write the latents of each image, as .npy beside it.")
    from_image: str | None = flag(
        None,
        "PNG that this command wrote: generate it again from the settings in it. Also give the weights and "
        "files that it names, or --open_recorded_paths.",
        path=True,
    )
    open_recorded_paths: bool = flag(
        False,
        "--from_image: also open the weights and files that the PNG names. Without it, give each of them "
        "again, because a PNG that somebody else wrote can name any file.",
    )
    serve: bool = flag(False, "Serve a web page instead (extra 'app').")
    host: str = flag("127.0.0.1", "--serve: address to listen on; 0.0.0.0 for the whole network.")
    port: int = flag(7860, "--serve: port to listen on; 0 for any free one.", minimum=0, maximum=65535)
    auth: tuple[str, ...] = flag(
        (),
        "--serve: USER:PASSWORD_FILE, who may use the page; may be given several times. Default: everyone "
        "who reaches the port.",
    )
    allow_host: tuple[str, ...] = flag(
        (),
        "--serve: name under which the page may be opened besides --host, such as that of a proxy; may be "
        "given several times.",
    )
    progress: bool = flag(True, "Show a progress bar.")


def main(given: Flags) -> None:
    import jax

    from pixart_jax.models.dtypes import default_dtype
    from pixart_jax.pipeline.array_files import save_embeddings
    from pixart_jax.pipeline.image_files import (
        check_contact_sheet,
        contact_sheet,
        file_name,
        make_record,
        save_image,
    )
    from pixart_jax.pipeline.loading import load_pipeline
    from pixart_jax.pipeline.memory import Work, check_host_memory, check_memory, file_bytes, saved_text_bytes
    from pixart_jax.pipeline.page.server import serve
    from pixart_jax.training.settings import apply_settings

    given.no_words()
    _check(given)
    if not given.serve and not given.save_embeddings:
        given = dataclasses.replace(given, out=given.out or DEFAULT_OUT)
    given = fetched(given)
    origin = _read_origin(given) if given.from_image else {}
    given = dataclasses.replace(given, **origin.get("flags", {}))
    prompts = None if given.serve or origin else _read_prompts(given)
    users = read_users(given.auth)
    check_names(given.allow_host)
    given.require("checkpoint")
    pipeline = pinned(str(pipeline_for(given.checkpoint, given.pipeline) or "")) or None
    given = dataclasses.replace(given, pipeline=pipeline)
    apply_settings()
    pipe = load_pipeline(
        given.checkpoint,
        weights=given.weights,
        pipeline=given.pipeline,
        weights_dtype=given.weights_dtype,
        text_weights_dtype=given.text_weights_dtype,
        clean_caption=given.clean_caption,
        lower_case=given.lower_case,
        # Each text is encoded only once. Several devices shard the text encoder and have room for the shards.
        keep_text_encoder=given.serve or len(jax.local_devices()) > 1,
        adapters=given.adapter,
        adapter_alpha=given.adapter_alpha,
    )
    print(f"dtype {default_dtype()}; attention {pipe.model.config.attention_choice()}", flush=True)
    source = {name: getattr(given, name) for name in SOURCE}
    if given.adapter_alpha is not None:
        source["adapter_alpha"] = given.adapter_alpha
    source |= {name: getattr(given, name) for name in LOADED_AS if getattr(given, name) is not None}
    if given.serve:
        serve(
            pipe,
            source,
            out=given.out,
            host=given.host,
            port=given.port,
            users=users,
            allow_host=given.allow_host,
        )
        return
    if origin:
        _check_adapters(given.from_image, origin["adapters"], pipe)
        if origin["fingerprint"] != pipe.fingerprint:
            raise UserError(
                f"'{given.from_image}' was generated with other weights than those in '{given.checkpoint}': "
                "give the original weights with --checkpoint."
            )
        prompts = [[origin["request"]]]
    resolved = [[pipe.resolve(request) for request in images] for images in prompts]
    prompts = [[request for request, _ in images] for images in resolved]
    requests = [request for images in prompts for request in images if request.embeddings is None]
    texts = {request.prompt for request in requests} | {request.negative_prompt for request in requests}
    if given.save_embeddings:
        size = saved_text_bytes(pipe.model.config, len(prompts), len(texts))
        check_host_memory(f"--save_embeddings of {len(prompts)} prompts", size)
        save_embeddings(Path(given.save_embeddings), pipe, prompts)
        print(f"text features of {len(prompts)} prompts in {given.save_embeddings}")
        if not given.out:
            return
    names = [[file_name(n, r.seed, r.prompt) for r in images] for n, images in enumerate(prompts)]
    if origin:
        names = [[Path(given.from_image).name]]
    count = sum(map(len, prompts))
    batch_size = pipe.generator.per_device(count, given.batch_size)
    print(f"Memory of each device (there are {len(pipe.generator.devices)}), batch size {batch_size}:")
    sizes = collections.Counter(size for images in resolved for _, size in images)
    sheet = count if given.contact_sheet else 0
    columns = len(prompts[0]) if len(prompts[0]) > 1 else math.ceil(math.sqrt(count))
    if sheet:
        check_contact_sheet(given.contact_sheet, count, columns)
    requests = [request for images in prompts for request in images]
    files = file_bytes(
        [path for request in requests for path in (request.image, request.mask) if path],
        [request.embeddings[0] for request in requests if request.embeddings],
    )
    plans = [
        check_memory(pipe, size, batch_size, Work(total, len(texts), sheet, files))
        for size, total in sizes.items()
    ]
    print(max(plans, key=lambda plan: (plan.peak, plan.host)), flush=True)
    watched = origin.get("watched", False)
    jobs = [
        Job(request, Path(given.out) / name, make_record(pipe, request, source, batch_size, watched=watched))
        for images, line in zip(prompts, names)
        for request, name in zip(images, line)
    ]
    _run_jobs(pipe, jobs, batch_size, given, watched)
    if given.contact_sheet:
        save_image(Path(given.contact_sheet), contact_sheet([job.path for job in jobs], columns))


def _check(given: Flags) -> None:
    """Raises a `UserError` for flags that do not go together."""
    for mode, unread in (("serve", (*UNREAD, *FILES, "from_image")), ("from_image", UNREAD)):
        also = next((name for name in unread if name in given.present), None)
        if getattr(given, mode) and also:
            raise UserError(f"--{also} has no effect with --{mode}: leave one of them out.")
    if given.open_recorded_paths and not given.from_image:
        raise UserError("--open_recorded_paths has no effect without --from_image: leave it out.")
    also = next((name for name in ("host", "port", "auth", "allow_host") if name in given.present), None)
    if also and not given.serve:
        raise UserError(f"--{also} has no effect without --serve: leave it out.")
    sheet = given.contact_sheet
    if sheet and Path(sheet).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--contact_sheet={sheet}: give a name that ends in .png, .jpg or .webp.")


class Job(NamedTuple):
    """An image to generate."""

    request: Request
    path: Path
    # What the PNG stores.
    record: dict[str, Any]


def _run_jobs(pipe: Pipeline, jobs: Sequence[Job], batch_size: int, given: Flags, watched: bool) -> None:
    """Generates the images that do not exist yet; with `watched`, by the program that reports its steps."""
    from pixart_jax.pipeline.batching import generate
    from pixart_jax.pipeline.image_files import save_latents, save_png

    make_folder(given.out)
    todo = [job for job in jobs if not _is_done(job, given.save_latents)]
    # disable=None: a progress bar only on a terminal.
    with tqdm(total=len(todo), unit="image", disable=None if given.progress else True) as bar:
        callback = (lambda step: None) if watched else None
        for index, pixels, latents in generate(pipe, [job.request for job in todo], batch_size, callback):
            job = todo[index]
            # The image is written last, so that it exists only if everything else does.
            if given.save_latents:
                save_latents(job.path.with_suffix(".npy"), latents)
            save_png(job.path, pixels, job.record)
            bar.update()
    kept = len(jobs) - len(todo)
    print(f"{len(todo)} images generated in {given.out}" + (f", {kept} existed already" if kept else ""))


def _is_done(job: Job, with_latents: bool) -> bool:
    """Whether the image exists.

    Raises:
      UserError: another image has its name.
    """
    from pixart_jax.pipeline.image_files import read_record

    if not job.path.exists():
        return False
    try:
        found = read_record(job.path)
    except UserError:
        raise UserError(f"'{job.path}' exists, and this command did not write it: move it away.") from None
    found_as, asked_as = ([each["source"].get(name) for name in TEXT_AS] for each in (found, job.record))
    if found["fingerprint"] != job.record["fingerprint"]:
        what = "weights"
    elif found["files"] != job.record["files"]:
        what = "input files"
    elif found_as != asked_as:
        what = ", ".join(f"--{name}" for name, old, new in zip(TEXT_AS, found_as, asked_as) if old != new)
    else:
        # An older version may not have had all settings. It behaved as their defaults do now.
        old, new = {**_DEFAULTS, **found["request"]}, job.record["request"]
        what = ", ".join(name for name in {**old, **new} if old.get(name) != new.get(name))
    if what:
        raise UserError(
            f"'{job.path}' exists and was generated with different {what}: give another --out, or remove it."
        )
    return not with_latents or job.path.with_suffix(".npy").exists()


def _read_prompts(given: Flags) -> list[list[Request]]:
    from pixart_jax.pipeline.array_files import requests_of_embeddings, with_latents
    from pixart_jax.pipeline.memory import check_host_memory, file_bytes

    if bool(given.prompts) == bool(given.embeddings):
        raise UserError("give either --prompts or --embeddings: see --help.")
    settings, count = values_for(Settings, given), given.images_per_prompt
    if given.embeddings:
        check_host_memory(f"--embeddings={given.embeddings}", file_bytes([], [given.embeddings]))
        prompts = requests_of_embeddings(given.embeddings, settings, count)
    else:
        prompts = read_requests(given.prompts, settings, count)
    return with_latents(prompts, given.latents) if given.latents else prompts


def _read_origin(given: Flags) -> Mapping[str, Any]:
    """Reads the settings in --from_image.

    Nothing that they name is opened, unless the user names it too or asks for it: anybody can write a path
    into a PNG.

    Returns:
      `request` and `fingerprint` of the image; `flags`, with the stored values of flags that are not given;
      `watched`, whether the program that made it reported its steps.

    Raises:
      UserError: not the settings of an image, a file that is not named again, or one that has changed since.
    """
    from pixart_jax.pipeline.image_files import read_record, sha256_of

    picture = given.from_image
    record = read_record(picture)
    source, request = record["source"], dict(record["request"])
    recorded = {name: source.get(name) for name in ("checkpoint", "pipeline")}
    recorded |= {name: request.get(name) for name in ("image", "mask")}
    recorded |= {name: (request.get(name) or [None])[0] for name in ("embeddings", "latents")}
    paths = {name: getattr(given, name) or path for name, path in recorded.items()}
    for name in FILES:
        if paths[name] and recorded[name] is None:
            raise UserError(f"--{name} has no effect: '{picture}' was generated without it. Leave it out.")
    adapters = record.get("adapters", [])
    again = [(name, path) for name, path in recorded.items() if path is not None and not getattr(given, name)]
    again += [("adapter", each["path"]) for each in adapters if not given.adapter]
    if again and not given.open_recorded_paths:
        # Quoted, because users copy this into a shell.
        listed = " ".join(f"--{name}={shlex.quote(short(path))}" for name, path in again)
        raise UserError(
            f"'{picture}' names files, and a PNG of somebody else can name any file: also give {listed}, or "
            "--open_recorded_paths if you trust it."
        )
    for name in FILES:
        if paths[name] is None:
            continue
        path = str(local(paths[name], everything=True))
        if sha256_of(path) != record["files"].get(recorded[name]):
            raise UserError(
                f"'{path}' is not the file that '{picture}' was generated with: give that file with --{name}."
            )
        request[name] = path if isinstance(request[name], str) else [path, request[name][1]]
    flags = {name: paths[name] for name in ("checkpoint", "pipeline")}
    flags |= {
        name: source.get(name) if getattr(given, name) is None else getattr(given, name)
        for name in ("weights", *LOADED_AS)
    }
    flags["adapter"] = _recorded_adapters(given, adapters)
    if given.adapter_alpha is None:
        flags["adapter_alpha"] = source.get("adapter_alpha")
    flags["batch_size"] = given.batch_size or record["made_with"]["batch_size"]
    request = Request.from_dict(request, f"the settings in '{picture}': ")
    return {
        **{"request": request, "fingerprint": record["fingerprint"], "flags": flags},
        "adapters": adapters,
        "watched": record["made_with"].get("watched", False),
    }


def _recorded_adapters(given: Flags, recorded: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """--adapter of an image: the paths that the user gives, or those recorded, with the recorded weights.

    Raises:
      UserError: another number of adapters, or another weight.
    """
    from pixart_jax.weights.adapter_files import parse_spec

    picture, paths = given.from_image, [each["path"] for each in recorded]
    if given.adapter:
        if len(given.adapter) != len(recorded):
            raise UserError(
                f"'{picture}' was generated with {len(recorded)} adapters, and --adapter is given "
                f"{len(given.adapter)} times: give each of them, in the same order."
            )
        specs = [parse_spec(spec) for spec in given.adapter]
        paths = [path for path, _ in specs]
        for (path, weight), each in zip(specs, recorded):
            if weight not in (None, each["weight"]):
                raise UserError(
                    f"--adapter={path}:{weight}: '{picture}' was generated with the weight {each['weight']}: "
                    "leave it out."
                )
    return tuple(f"{path}:{each['weight']}" for path, each in zip(paths, recorded))


def _check_adapters(picture: str, recorded: Sequence[Mapping[str, Any]], pipe: Pipeline) -> None:
    """Raises a `UserError` unless the pipeline has the adapters that an image was generated with."""
    for old, new in zip(recorded, pipe.adapters.record() if pipe.adapters else ()):
        if old["sha256"] != new["sha256"]:
            raise UserError(
                f"'{new['path']}' is not the adapter that '{picture}' was generated with: give that one with "
                "--adapter."
            )


if __name__ == "__main__":
    run(main, Flags)
