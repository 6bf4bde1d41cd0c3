"""Uploads an export to the Hugging Face hub, with a model card that shows pictures and metrics.

Nothing private is uploaded: absolute paths are replaced by their last names, and a file that still names a
folder of this machine, or the machine itself, is an error.
"""

from __future__ import annotations

import dataclasses
import html
import json
import os
import re
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pixart_jax.errors import UserError, listing, short
from pixart_jax.files import sha256_of_json
from pixart_jax.hub import BUGS, HubPath, explained, in_bytes, is_hub
from pixart_jax.pipeline.image_files import png_bytes, read_record
from pixart_jax.readers import parse_json, read_bytes, read_json
from pixart_jax.weights import cards
from pixart_jax.weights.adapter_export import card as adapter_card
from pixart_jax.weights.adapter_files import read_adapter
from pixart_jax.weights.checkpoints import PATHS
from pixart_jax.weights.files import CARD, COPY

# Pictures that a card shows at most.
MOST_PICTURES = 24
# Folder of the pictures in the repository.
_PICTURES = "images"
# Settings of a picture that a card names, with the words around them.
_SETTINGS = {
    **{"sampler": "{}", "steps": "{} steps", "guidance_scale": "guidance {:g}", "seed": "seed {}"},
    **{"negative_prompt": "negative prompt '{}'"},
}
# Orbax writes the path of a checkpoint into this file. Only its existence matters.
_COMMITTED = "commit_success.txt"
# Fields in which libraries store the folder that they opened.
_OPENED = ("_name_or_path", "name_or_path")
# Larger files are weights, of which only the header of safetensors is searched for private text.
_SEARCHED = 2**24

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Push:
    """What to upload besides the weights, and where to.

    Attributes:
      place: repository and branch.
      private: create the repository as a private one.
      dry_run: only print what would be uploaded.
      images: folder of pictures that `sample` wrote; None for none.
      metrics: results of `evaluate`.
      licence: a key of `cards.LICENCES`; None for that of the card.
    """

    place: HubPath
    private: bool = False
    dry_run: bool = False
    images: Path | None = None
    metrics: Sequence[Path] = ()
    licence: str | None = None


def parse_push(text: str) -> HubPath:
    """Reads hub:OWNER/NAME[@BRANCH].

    Raises:
      UserError: another form.
    """
    if not is_hub(text):
        raise UserError(f"--push is '{short(text)}': give the repository, hub:OWNER/NAME[@BRANCH].")
    place = HubPath.parse(text, "--push")
    if place.path or place.dataset:
        raise UserError(f"--push is '{short(text)}': weights are uploaded to hub:OWNER/NAME[@BRANCH].")
    return place


def check_rights(place: HubPath) -> None:
    """Checks, before weights are converted, that there is a token, and that its account may write.

    Raises:
      UserError: there is no token, it is not valid, or it is of another account.
    """
    from huggingface_hub import HfApi, get_token

    if not get_token():
        raise UserError(
            f"--push={place} needs a token with write rights: log in with `hf auth login`, or set HF_TOKEN. "
            "--push_dry_run needs none."
        )
    with explained(place):
        account = HfApi().whoami()
    names = [account.get("name"), *(each.get("name") for each in account.get("orgs") or ())]
    owner = place.repository.partition("/")[0]
    if owner not in names:
        raise UserError(
            f"--push={place}: the token is of '{account.get('name')}', which may not write to '{owner}': "
            f"give one of {listing(f'hub:{name}/…' for name in names if name)}, or another token."
        )


def publish(output: Path, push: Push, say: Say = print) -> None:
    """Uploads an export in one commit, or only prints what would be uploaded.

    What the hub has already is not sent again, so that an interrupted upload can be repeated.

    Args:
      output: file or folder that `convert` has written.
      push: see `Push`.
      say: called with each line of the report.

    Raises:
      UserError: a picture or result is not one, the licence is not known, a file has private text, or the
        hub does not accept the upload.
    """
    pictures, rows = _pictures(push.images)
    text = _card(output, push, rows)
    files = _files(output) | {f"{_PICTURES}/{name}": content for name, content in pictures.items()}
    files[CARD] = text.encode()
    _check_private(files, output)
    sizes = {
        name: content.stat().st_size if isinstance(content, Path) else len(content)
        for name, content in files.items()
    }
    total = f"{len(files)} files, {in_bytes(sum(sizes.values()))}"
    branch = push.place.revision or "main"
    if push.dry_run:
        private = "private if it is new, " if push.private else ""
        say(f"would upload {total}, to {push.place.page} ({private}branch {branch}):")
        for name, size in sorted(sizes.items()):
            say(f"  {in_bytes(size):>12}  {name}")
        say(f"{CARD}:\n{text}")
        return
    say(f"uploading {total}, to {push.place.page} (branch {branch})")
    commit = _upload(push, files)
    say(f"uploaded {push.place.page}, commit {commit}: hub:{push.place.repository}@{commit}")


def _upload(push: Push, files: Mapping[str, Path | bytes]) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api, place = HfApi(), push.place
    operations = [
        CommitOperationAdd(name, str(content) if isinstance(content, Path) else content)
        for name, content in sorted(files.items())
    ]
    try:
        api.create_repo(place.repository, private=push.private or None, exist_ok=True)
        if place.revision:
            api.create_branch(place.repository, branch=place.revision, exist_ok=True)
        return api.create_commit(
            place.repository,
            operations,
            commit_message="Upload weights with pixart_jax",
            revision=place.revision,
        ).oid
    except BUGS:
        raise
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if isinstance(error, HfHubHTTPError) and status in (401, 403):
            raise UserError(
                f"--push={place}: the token has no right to write there: log in with `hf auth login` and a "
                "token with write rights, or set HF_TOKEN."
            ) from error
        reason = short(next(iter(str(error).strip().splitlines()), "") or type(error).__name__)
        raise UserError(
            f"--push={place}: the upload failed ({reason}): run the same command again, which sends "
            "only what is missing."
        ) from error


# --- Files ------------------------------------------------------------------------------------------


def _files(output: Path) -> dict[str, Path | bytes]:
    """The files of an export by their names in the repository, without its card; JSON without folders."""
    if output.is_file():
        return {output.name: output}
    files: dict[str, Path | bytes] = {}
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        if path.is_file() and name != CARD:
            content = _without_folders(path)
            files[name] = path if content is None else content
    return files


def _without_folders(path: Path) -> bytes | None:
    """The content of a file of text with names in place of absolute paths; None if it is as it is."""
    if path.parts[-2:] == ("metadata", "metadata"):
        return _published_metadata(path)
    if path.name == _COMMITTED:
        return b""
    if path.suffix != ".json" or path.stat().st_size > _SEARCHED:
        return None
    values = parse_json(read_bytes(path), lenient=True)
    if not isinstance(values, dict):
        return None
    cleaned = {
        name: cards.without_folders(value) if name in _OPENED and isinstance(value, str) else value
        for name, value in values.items()
    }
    return None if cleaned == values else (json.dumps(cleaned, indent=2) + "\n").encode()


def _published_metadata(path: Path) -> bytes:
    """The metadata of one of our checkpoints, without the folders of this machine."""
    values = read_json(path, COPY, lenient=True)
    values.pop("sha256", None)
    values.pop("working_directory", None)
    for name in PATHS:
        *sections, field = name.split(".")
        place: Any = values["config"]
        for section in sections:
            place = place.get(section, {})
        if isinstance(place.get(field), str):
            place[field] = cards.without_folders(place[field])
    return json.dumps({**values, "sha256": sha256_of_json(values)}).encode()


def _check_private(files: Mapping[str, Path | bytes], output: Path) -> None:
    """Raises a `UserError` for a file that names a folder of this machine, or the machine."""
    names = {str(Path.home()), os.getcwd(), str(output.absolute().parent), socket.gethostname()}
    names = {name for name in names if len(name) > 4 and name != "localhost"}
    searched = re.compile(b"|".join(re.escape(name.encode()) + rb"(?![\w.-])" for name in sorted(names)))
    for name, content in files.items():
        if found := searched.search(_text_of(content)):
            raise UserError(
                f"'{name}' names '{found[0].decode()}' of this machine, and everybody could read that: "
                "remove it from what the weights were made from."
            )


def _text_of(content: Path | bytes) -> bytes:
    """The part of a file that can hold text."""
    if isinstance(content, bytes):
        return content
    with content.open("rb") as file:
        if content.suffix == ".safetensors":
            (length,) = struct.unpack("<Q", file.read(8))
            return file.read(min(length, _SEARCHED))
        return file.read(_SEARCHED) if content.stat().st_size <= _SEARCHED else b""


# --- Card -------------------------------------------------------------------------------------------


def _card(output: Path, push: Push, pictures: Sequence[str]) -> str:
    """The card of an export, with pictures and metrics."""
    beside = output.with_name(f"{output.name}.md")
    file = output / CARD if output.is_dir() else beside
    if file.is_file():
        text = file.read_text(encoding="utf-8")
    else:  # an adapter in a single file
        adapter = read_adapter(output)
        text = adapter_card(adapter, adapter.base)
    licence = re.search(r"^license: (\S+)\n", text, re.MULTILINE)
    if push.licence:
        text = text.replace(licence[0], "", 1) if licence else text
        text = text.replace("---\n", f"---\nlicense: {push.licence}\n", 1)
    elif licence is None or licence[1] == "other":
        raise UserError(
            f"--push={push.place}: the licence of the weights is not known: choose one with --licence="
            f"{'|'.join(cards.LICENCES)}."
        )
    if "text-to-image" in text.partition("\n---\n")[0]:
        text = text.replace("\n---\n", "\npipeline_tag: text-to-image\n---\n", 1)
    sections = _picture_section(pictures) + _metric_section(push.metrics)
    before = "## Licence\n" if "## Licence\n" in text else "## Training manifest\n"
    return text.replace(before, sections + before, 1)


def _pictures(folder: Path | None) -> tuple[dict[str, bytes], list[str]]:
    """The pictures as they are uploaded, and the rows of their table."""
    if folder is None:
        return {}, []
    if not folder.is_dir():
        raise UserError(f"--push_images={folder} is not a folder: give the folder that sample wrote to.")
    paths = sorted(folder.glob("*.png"))
    if not 0 < len(paths) <= MOST_PICTURES:
        raise UserError(
            f"--push_images={folder} has {len(paths)} PNG files: give a folder with 1 to {MOST_PICTURES}."
        )
    files, rows = {}, []
    for path in paths:
        record = read_record(path)
        # A picture may start from another one, whose path is private.
        request = {
            name: value for name, value in record["request"].items() if name not in record_paths(record)
        }
        settings = {"request": request, "made_with": record.get("made_with", {})}
        with Image.open(path) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        files[path.name] = png_bytes(pixels, cards.published(settings))
        shown = {**request, "guidance_scale": request.get("guidance_scale") or 1}
        words = [
            form.format(shown[name]) for name, form in _SETTINGS.items() if shown.get(name) not in (None, "")
        ]
        words.append(f"{pixels.shape[1]} x {pixels.shape[0]}")
        prompt = _cell(cards.without_folders(str(request.get("prompt", ""))))
        rows.append(f"| ![]({_PICTURES}/{path.name}) | {prompt} | {_cell(', '.join(words))} |")
    return files, rows


def record_paths(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The settings of a picture that name files."""
    return tuple(name for name in ("image", "mask", "embeddings", "latents") if name in record["request"])


def _picture_section(rows: Sequence[str]) -> str:
    if not rows:
        return ""
    return "## Sample pictures\n\n| | prompt | settings |\n|---|---|---|\n" + "\n".join(rows) + "\n\n"


def _metric_section(paths: Sequence[Path]) -> str:
    tables = [_metric_table(path) for path in paths]
    return "## Metrics\n\n" + "\n".join(tables) + "\n" if tables else ""


def _metric_table(path: Path) -> str:
    """The table of a result of `evaluate`: a number with its protocol, the validation loss, or rows."""
    try:
        values = parse_json(read_bytes(path), lenient=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--push_metrics={path} cannot be read ({error}): give a result of evaluate."
        ) from None
    rows: list[dict[str, Any]]
    if isinstance(values, dict) and isinstance(values.get("protocol"), dict):
        protocol = {name: value for name, value in values["protocol"].items() if value is not None}
        shown = ("images", "sampler", "steps", "guidance_scale", "seed", "height", "width", "weights")
        rows = [
            {
                "metric": protocol.get("metric", "?"),
                "value": values.get("value"),
                **{name: protocol[name] for name in shown if name in protocol},
                "protocol": values.get("preset") or values.get("protocol_id", ""),
            }
        ]
    elif isinstance(values, dict):
        rows = [{name: each for name, each in values.items() if isinstance(each, int | float | str)}]
        rows[0].pop("features_fingerprint", None)
    else:
        rows = [row for row in values if isinstance(row, dict)] if isinstance(values, list) else []
    every = dict.fromkeys(name for row in rows for name in row)
    names = [
        name for name in every if all(isinstance(row.get(name), int | float | str | None) for row in rows)
    ]
    if not names:
        raise UserError(f"--push_metrics={path} has no numbers: give a result of evaluate, such as fid.json.")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        cells = [_number(row.get(name)) for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else _cell(cards.without_folders(str(value)))


def _cell(text: str) -> str:
    """Text in a cell of a table of Markdown."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")
