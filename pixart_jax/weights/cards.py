"""The model card of an export, and the notes that an export writes into its own files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixart_jax.config import TrainConfig, to_dict
from pixart_jax.hub import RELEASES, RELEASES_OWNER, HubPath, is_hub
from pixart_jax.weights.configs import NOISE_SCHEDULE
from pixart_jax.weights.families import SIGMA, family_of
from pixart_jax.weights.files import CARD, CARD_MARK

# Keys in the header of an exported file. An import reads the facts, which the official format cannot hold.
# The manifest is for people: config, step and versions of the run.
FACTS_KEY = "pixart_jax.facts"
MANIFEST_KEY = "pixart_jax.manifest"

LICENCES = {
    "openrail++": (
        "The released weights of PixArt-alpha and PixArt-Sigma, and weights fine-tuned from them, are under "
        "the CreativeML Open RAIL++-M licence. Its use restrictions apply to every copy. Their code is "
        "Apache-2.0."
    ),
    "cc-by-nc-4.0": (
        "DiT's released weights are under CC-BY-NC 4.0: weights trained from them may not be used "
        "commercially. This does not apply to weights whose stage 1 was trained with this project."
    ),
    "apache-2.0": "These weights are under the Apache License 2.0.",
    "other": (
        "Whoever trained weights from scratch chooses their licence. Weights trained from the releases of "
        "PixArt-alpha and PixArt-Sigma are under Open RAIL++-M, and from DiT's release under CC-BY-NC 4.0. "
        "The config below names the weights that these were trained from."
    ),
}


# Entries of the manifest of a checkpoint that are only of use beside it.
_OF_CHECKPOINT = ("checksums", "sha256", "loader", "working_directory")
# Folders of a pipeline: such a name alone says nothing.
_PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "checkpoints")
# An absolute path, alone or in a list.
_ABSOLUTE = re.compile(r"(?:(?<=^)|(?<=[,|\n]))\s*(?:[/~\\]|[A-Za-z]:[/\\])[^,|\n]*")


def without_folders(text: str) -> str:
    """Replaces the absolute paths in a text by their last names, because others may read an export."""

    def last(match: re.Match) -> str:
        parts = re.split(r"[/\\]+", match[0].strip().rstrip("/\\"))
        start = -1
        while parts[start] in _PARTS and -start < len(parts) - 1:
            start -= 1
        return "/".join(parts[start:])

    return _ABSOLUTE.sub(last, text)


def published(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a manifest that an export contains: no checksums of a checkpoint, no absolute paths."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: clean(each) for key, each in value.items()}
        if isinstance(value, list):
            return [clean(each) for each in value]
        return without_folders(value) if isinstance(value, str) else value

    return {name: clean(value) for name, value in manifest.items() if name not in _OF_CHECKPOINT}


def manifest_block(manifest: Mapping[str, Any]) -> str:
    """The section of a card about the training: the published manifest, with only those values of the config
    that differ from the defaults."""
    shown = published(manifest)
    if isinstance(shown.get("config"), Mapping):
        shown["config"] = _changed(shown["config"], to_dict(TrainConfig()))
    return f"## Training manifest\n\n```json\n{json.dumps(shown, indent=1)}\n```\n"


def _changed(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    out = {}
    for name, value in values.items():
        default = defaults.get(name)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            value, default = _changed(value, default), {}
        if value != default:
            out[name] = value
    return out


def facts(config: TrainConfig, licence: str) -> str:
    """The facts that the official format cannot hold, as JSON for the file's header."""
    return json.dumps(
        {
            "num_heads": config.model.num_heads,
            # Of a network that compresses keys and values. Its weights are the same in every mode.
            **({"kv_compression": config.model.kv_compression} if config.model.compressed_layers else {}),
            "guidance": to_dict(config.guidance),
            "diffusion": {name: getattr(config.diffusion, name) for name in NOISE_SCHEDULE},
            "latent_scale": config.features.latent_scale,
            "clean_caption": config.features.text_encoder.clean_caption,
            "lower_case": config.features.text_encoder.lower_case,
            "licence": licence,
        }
    )


def base_model(path: str) -> str:
    """The line of a card's header that names the repository of the weights that others were made from.

    Args:
      path: of the hub, or of a folder or file with the name of a release; for any other, the result is ''.
    """
    if is_hub(path):
        return f"base_model: {HubPath.parse(path).repository}\n"
    names = [Path(part).stem if part.endswith((".pth", ".safetensors")) else part for part in path.split("/")]
    found = [name for name in names if name in RELEASES and name != RELEASES_OWNER]
    return f"base_model: {RELEASES_OWNER}/{found[-1]}\n" if found else ""


def card(
    config: TrainConfig, licence: str, source: str, lines: tuple[str, ...], manifest: Mapping[str, Any]
) -> str:
    """The text of README.md.

    Args:
      config: of the exported weights.
      licence: a key of `LICENCES`.
      source: name of the file or folder they were converted from.
      lines: notes of the conversion for users of the weights.
      manifest: step, config and versions of the training run, if there was one.
    """
    model, guidance = config.model, config.guidance
    is_pixart = model.kind == "pixart"
    network = "DiT"
    rows = {
        "made from": source,
        "size": f"{model.size}: {model.depth} blocks, width {model.hidden_size}, {model.num_heads} heads",
        "trained at": f"{config.features.image_size} px",
        "positions": f"base size {model.base_size}, position scale {model.position_scale:g}",
        "latents": f"{model.in_channels} channels, scaled by {config.features.latent_scale:g}",
    }
    if is_pixart:
        network = "PixArt-Σ" if family_of(model.text_length) is SIGMA else "PixArt-α"
        encoder = config.features.text_encoder
        kept = "in lower case" if encoder.lower_case else "as they are"
        rows["captions"] = "cleaned" if encoder.clean_caption else f"not cleaned, {kept}"
        rows["size conditions"] = "yes" if model.size_conditions else "no"
        rows["text"] = f"{model.text_length} tokens of {model.text_dim}"
        rows["guidance"] = (
            f"null text '{guidance.null_text}', null mask '{guidance.null_mask}', {guidance.channels} "
            f"channels, aspect ratio '{guidance.aspect_ratio}', scale {guidance.scale:g}"
        )
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    notes = "".join(f"- {line}\n" for line in lines)
    exported = {
        "model": to_dict(model),
        "guidance": to_dict(guidance),
        "diffusion": to_dict(config.diffusion),
        "latent_scale": config.features.latent_scale,
    }
    manifest = dict(manifest)
    if not manifest.get("step"):
        # Not a checkpoint of a run: the config's training settings were not used to make these weights.
        manifest.pop("config", None)
    base = base_model(source) or base_model(config.init.path)
    tags = "pixart, text-to-image" if is_pixart else "dit, class-conditional"
    return f"""---
license: {licence}
{base}tags: [{tags}, pixart_jax]
---
{CARD_MARK}
# {network} weights

| | |
|---|---|
{table}

{notes}
## Licence

{LICENCES[licence]}

## Config

```json
{json.dumps(exported, indent=1)}
```

{manifest_block(manifest)}"""


def read_licence(folder: Path) -> str | None:
    """The licence in the card of an export of this project; None if the folder has no such card."""
    file = folder / CARD
    if not file.is_file():
        return None
    text = file.read_text(encoding="utf-8", errors="replace")
    name = text.partition("license: ")[2].partition("\n")[0].strip()
    return name if CARD_MARK in text and name in LICENCES else None
