"""Writes adapter files for peft (and so for diffusers), for ComfyUI, and with Kohya's names.

docs/adapters.md says which tool reads which. Everything is written in float32.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pixart_jax.errors import UserError
from pixart_jax.weights import cards
from pixart_jax.weights.adapter_files import CONFIG, OURS, STEM
from pixart_jax.weights.adapters import Adapter, Factors, fuse
from pixart_jax.weights.backbones import official_modules
from pixart_jax.weights.files import CARD, CARD_MARK, write_safetensors
from pixart_jax.weights.tables import first_names


def write_peft(folder: Path, adapter: Adapter, base: str | None = None) -> None:
    """Writes the folder that `peft.PeftModel.from_pretrained(transformer, folder)` opens, and a model card.

    Args:
      folder: does not exist yet.
      adapter: the adapter.
      base: name of the weights that it belongs to; None for that of the adapter.

    Raises:
      UserError: only some modules have DoRA's magnitude, which peft has for all modules or for none.
    """
    base = adapter.base if base is None else base
    dora = {module for module, factors in adapter.modules.items() if factors.magnitude is not None}
    if dora and len(dora) < len(adapter.modules):
        without = first_names([module for module in adapter.modules if module not in dora])
        raise UserError(
            f"'{adapter.name}' has no DoRA magnitude for {without}, and in peft all modules have one or none "
            "has: write it with --to=comfyui."
        )
    ranks = {module: factors.rank for module, factors in adapter.modules.items()}
    alphas = {module: _plain(adapter.alpha(module)) for module in adapter.modules}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        "auto_mapping": {
            "base_model_class": "PixArtTransformer2DModel",
            "parent_library": "diffusers.models.transformers.pixart_transformer_2d",
        },
        "base_model_name_or_path": base or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {module: each for module, each in ranks.items() if each != rank},
        "alpha_pattern": {module: each for module, each in alphas.items() if each != alpha},
        "revision": None,
        # Full names: with the short ones that peft also takes, modules without an adapter could match.
        "target_modules": list(adapter.modules),
        "task_type": None,
        "use_dora": bool(dora),
        "use_rslora": adapter.rslora,
    }
    tensors = {}
    for module, factors in adapter.modules.items():
        name, convolution = f"base_model.model.{module}", factors.down.ndim == 4
        tensors[f"{name}.lora_A.weight"] = factors.down
        tensors[f"{name}.lora_B.weight"] = _up(factors)
        if factors.magnitude is not None:
            shape = (1, -1, 1, 1) if convolution else (-1,)
            tensors[f"{name}.lora_magnitude_vector"] = factors.magnitude.reshape(shape)
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _write(folder / f"{STEM}.safetensors", tensors, adapter, base)
    (folder / CARD).write_text(card(adapter, base), encoding="utf-8")


def write_comfyui(path: Path, adapter: Adapter, base: str | None = None) -> None:
    """Writes a file with diffusers' names of modules under 'transformer.', which ComfyUI's PixArt maps.

    Args: as for `write_peft`; `path` is a .safetensors file.
    """
    _write(path, _with_alpha(adapter.modules, "transformer.{}", "lora_A", "lora_B"), adapter, base)


def write_kohya(path: Path, adapter: Adapter, base: str | None = None) -> None:
    """Writes a file with Kohya's names: those of the official code, where query, key and value are fused.

    Args: as for `write_comfyui`.

    Raises:
      UserError: DoRA of only some members of a fused projection; the magnitudes of the others are not known.
    """
    fused: dict[str, Factors] = {}
    number = {module.split(".")[1] for module in adapter.modules if module.startswith("transformer_blocks.")}
    for official, modules in official_modules().items():
        for block in sorted(number, key=int) if "{}" in official else [""]:
            members = [adapter.modules.get(module.replace("{}", block)) for module in modules]
            if not any(members):
                continue
            name = official.replace("{}", block)
            try:
                fused[name] = fuse(members)
            except ValueError as error:
                raise UserError(
                    f"'{adapter.name}' cannot be written with {name} as one module ({error}): use "
                    "--to=comfyui or --to=peft."
                ) from None
    names = {name.replace(".", "_"): factors for name, factors in fused.items()}
    _write(path, _with_alpha(names, "lora_unet_{}", "lora_down", "lora_up"), adapter, base)


# What `convert --to` writes, by name.
# The keys are `files.ADAPTER_FORMATS`.
WRITERS: Mapping[str, Callable[[Path, Adapter], None]] = {
    "peft": write_peft,
    "comfyui": write_comfyui,
    "kohya": write_kohya,
}


def _with_alpha(modules: Mapping[str, Factors], name: str, down: str, up: str) -> dict[str, np.ndarray]:
    """Tensors of formats with '.alpha'. Their readers compute s = alpha / r, also for rsLoRA."""
    tensors = {}
    for module, factors in modules.items():
        module = name.format(module)
        tensors[f"{module}.{down}.weight"] = factors.down
        tensors[f"{module}.{up}.weight"] = _up(factors)
        tensors[f"{module}.alpha"] = np.array(factors.scale * factors.rank, np.float32)
        if factors.magnitude is not None:
            # The rows come first, so that ComfyUI takes the norm of each row, not of each column.
            tensors[f"{module}.dora_scale"] = factors.magnitude.reshape(-1, *[1] * (factors.down.ndim - 1))
    return tensors


def _up(factors: Factors) -> np.ndarray:
    """B, as a 1x1 convolution where A is a convolution."""
    return factors.up[:, :, None, None] if factors.down.ndim == 4 else factors.up


def _write(path: Path, tensors: Mapping[str, np.ndarray], adapter: Adapter, base: str | None) -> None:
    notes = {
        "base": adapter.base if base is None else base,
        "rslora": adapter.rslora,
        "rank": max(factors.rank for factors in adapter.modules.values()),
    }
    metadata = {
        "format": "pt",
        OURS: json.dumps(notes),
        cards.MANIFEST_KEY: json.dumps(cards.published(adapter.manifest)),
    }
    shapes = {name: value.shape for name, value in tensors.items()}
    write_safetensors(path, shapes, tensors.items(), metadata)


def _plain(value: float) -> int | float:
    """A whole number where rounding alone makes it another one."""
    return round(value) if abs(value - round(value)) <= 1e-9 * abs(value) else value


def card(adapter: Adapter, base: str) -> str:
    """The text of README.md for an adapter of the weights `base`."""
    ranks = sorted({factors.rank for factors in adapter.modules.values()})
    kind = "DoRA" if any(f.magnitude is not None for f in adapter.modules.values()) else "LoRA"
    facts: dict[str, Any] = {
        "kind": f"rank-stabilized {kind}" if adapter.rslora else kind,
        "base": base or "not recorded",
        "rank": ", ".join(map(str, ranks)),
        "modules": len(adapter.modules),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    about_licence = f"## Licence\n\n{cards.LICENCES[adapter.licence]}\n\n" if adapter.licence else ""
    licence = f"license: {adapter.licence}\n" if adapter.licence else ""
    return f"""---
{licence}{cards.base_model(base or "")}library_name: peft
tags: [pixart, text-to-image, lora, pixart_jax]
---
{CARD_MARK}
# PixArt adapter

| | |
|---|---|
{table}

{about_licence}{cards.manifest_block(adapter.manifest)}"""
