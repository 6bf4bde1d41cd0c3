"""The model card of an export, and what an export notes of itself in its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixart_jax.config import TrainConfig, to_dict
from pixart_jax.weights.files import CARD, CARD_MARK

# Keys of an export's header. The first is read again on import: what official files cannot tell. The second
# is for people: config, step and versions of the run.
FACTS_KEY = "pixart_jax.facts"
MANIFEST_KEY = "pixart_jax.manifest"

LICENCES = {
    "openrail++": (
        "PixArt-alpha's released weights, and what is fine-tuned from them, are under the CreativeML Open "
        "RAIL++-M licence, whose use restrictions travel with every copy; its code is Apache-2.0."
    ),
    "cc-by-nc-4.0": (
        "DiT's released weights are CC-BY-NC 4.0: what starts from them may not be used commercially. A "
        "stage 1 trained with this project is free of that."
    ),
    "apache-2.0": "These weights are under the Apache License 2.0.",
    "other": (
        "Weights trained from scratch are their trainer's to license. Weights that started from "
        "PixArt-alpha's release are under Open RAIL++-M, from DiT's under CC-BY-NC 4.0: the config below "
        "names what they started from."
    ),
}


def facts(config: TrainConfig, licence: str) -> str:
    """What the official format cannot tell, as JSON for the file's header."""
    return json.dumps(
        {
            "num_heads": config.model.num_heads,
            "guidance": to_dict(config.guidance),
            "latent_scale": config.features.latent_scale,
            "licence": licence,
        }
    )


def card(
    config: TrainConfig, licence: str, source: str, lines: tuple[str, ...], manifest: Mapping[str, Any]
) -> str:
    """The text of README.md.

    Args:
      config: of the exported model.
      licence: a key of `LICENCES`.
      source: name of the file or folder it was made from.
      lines: what the conversion did that a user of the weights should know.
      manifest: what made the weights.
    """
    model, guidance = config.model, config.guidance
    is_pixart = model.kind == "pixart"
    rows = {
        "made from": source,
        "size": f"{model.size}: {model.depth} blocks, width {model.hidden_size}, {model.num_heads} heads",
        "trained at": f"{config.features.image_size} px",
        "positions": f"base size {model.base_size}, position scale {model.position_scale:g}",
        "latents": f"{model.in_channels} channels, scaled by {config.features.latent_scale:g}",
    }
    if is_pixart:
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
        # Weights that were only converted here: the training values of their config trained nothing.
        manifest.pop("config", None)
    return f"""---
license: {licence}
tags: [{"pixart, text-to-image" if is_pixart else "dit, class-conditional"}, pixart_jax]
---
{CARD_MARK}
# {"PixArt-α" if is_pixart else "DiT"} weights

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

## Training manifest

```json
{json.dumps(manifest, indent=1)}
```
"""


def read_licence(folder: Path) -> str | None:
    """The licence in the card of an export of this project; None where there is no such card."""
    file = folder / CARD
    if not file.is_file():
        return None
    text = file.read_text(encoding="utf-8", errors="replace")
    name = text.partition("license: ")[2].partition("\n")[0].strip()
    return name if CARD_MARK in text and name in LICENCES else None
