"""Files of one random adapter as each tool writes them, made without the package's readers and writers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

GOLDENS = Path(__file__).parent / "data" / "lora"
BASE = GOLDENS / "base"
RANK, ALPHA = 3, 6.0

# The official names of modules, by those of diffusers.
OFFICIAL = {
    "pos_embed.proj": "x_embedder.proj",
    "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "adaln_single.linear": "t_block.1",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "proj_out": "final_layer.linear",
    "attn1.to_out.0": "attn.proj",
    "attn2.to_q": "cross_attn.q_linear",
    "attn2.to_out.0": "cross_attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
FUSED = {
    "attn.qkv": ["attn1.to_q", "attn1.to_k", "attn1.to_v"],
    "cross_attn.kv_linear": ["attn2.to_k", "attn2.to_v"],
}


class Part(NamedTuple):
    A: np.ndarray
    B: np.ndarray
    m: np.ndarray | None


def kernels() -> dict[str, np.ndarray]:
    """The kernels [out, …] of the base, by module."""
    tensors = load_file(BASE / "diffusion_pytorch_model.safetensors")
    return {n.removesuffix(".weight"): t for n, t in tensors.items() if n.endswith(".weight")}


def draw(dora: bool = False, seed: int = 0) -> dict[str, Part]:
    """An adapter of every module. The members of a fused projection have one A, as if it had been trained."""
    rng = np.random.default_rng(seed)
    members = {member: fused for fused, names in FUSED.items() for member in names}
    parts, shared = {}, {}
    for module, kernel in sorted(kernels().items()):
        block, _, name = module.rpartition(".attn")
        group = (block, members.get(f"attn{name}", module))
        if group not in shared:
            shared[group] = rng.normal(size=(RANK, *kernel.shape[1:])).astype(np.float32)
        up = 0.1 * rng.normal(size=(len(kernel), RANK)).astype(np.float32)
        norm = np.sqrt((kernel.reshape(len(kernel), -1) ** 2).sum(1))
        m = (norm * rng.uniform(0.5, 1.5, len(kernel))).astype(np.float32) if dora else None
        parts[module] = Part(shared[group], up, m)
    return parts


def merged(parts: dict[str, Part], scale: float = ALPHA / RANK) -> dict[str, np.ndarray]:
    """W' of every module, by the formulas, in float64."""
    out = {}
    for module, kernel in kernels().items():
        A, B, m = (None if part is None else part.astype(np.float64) for part in parts[module])
        rows = kernel.reshape(len(kernel), -1) + scale * B @ A.reshape(len(A), -1)
        if m is not None:
            rows = m[:, None] * rows / np.sqrt((rows**2).sum(1, keepdims=True))
        out[module] = rows.reshape(kernel.shape)
    return out


def official(parts: dict[str, Part]) -> dict[str, Part]:
    """The adapter by the names of the official code, with fused projections."""
    out = {}
    for module, part in parts.items():
        if not module.startswith("transformer_blocks."):
            out[OFFICIAL[module]] = part
        else:
            _, number, name = module.split(".", 2)
            if name in OFFICIAL:
                out[f"blocks.{number}.{OFFICIAL[name]}"] = part
    for number in {module.split(".")[1] for module in parts if module.startswith("transformer_blocks.")}:
        for fused, names in FUSED.items():
            own = [parts[f"transformer_blocks.{number}.{name}"] for name in names]
            m = None if own[0].m is None else np.concatenate([each.m for each in own])
            out[f"blocks.{number}.{fused}"] = Part(own[0].A, np.concatenate([each.B for each in own]), m)
    return out


def up_of(part: Part) -> np.ndarray:
    return part.B[:, :, None, None] if part.A.ndim == 4 else part.B


def peft_tensors(parts, prefix, magnitude=".lora_magnitude_vector"):
    tensors = {}
    for module, part in parts.items():
        tensors[f"{prefix}{module}.lora_A.weight"] = part.A
        tensors[f"{prefix}{module}.lora_B.weight"] = up_of(part)
        if part.m is not None:
            m = part.m[None, :, None, None] if part.A.ndim == 4 else part.m
            tensors[f"{prefix}{module}{magnitude}"] = np.ascontiguousarray(m)
    return tensors


def kohya_tensors(parts, name, down, up):
    tensors = {}
    for module, part in parts.items():
        tensors[f"{name(module)}.{down}.weight"] = part.A
        tensors[f"{name(module)}.{up}.weight"] = up_of(part)
        tensors[f"{name(module)}.alpha"] = np.array(ALPHA, np.float32)
        if part.m is not None:
            tensors[f"{name(module)}.dora_scale"] = part.m.reshape(-1, *[1] * (part.A.ndim - 1))
    return tensors


def settings(parts, **changes):
    return {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "use_rslora": False,
        "use_dora": next(iter(parts.values())).m is not None,
        "target_modules": sorted(parts),
        **changes,
    }


def save_peft(folder: Path, parts, **changes) -> Path:
    folder.mkdir()
    save_file(peft_tensors(parts, "base_model.model."), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings(parts, **changes)))
    return folder


def save_simpletuner(folder: Path, parts) -> Path:
    folder.mkdir()
    packed = {f"transformer.{name}": value for name, value in settings(parts).items()}
    save_file(
        peft_tensors(parts, "transformer."),
        folder / "pytorch_lora_weights.safetensors",
        {"format": "pt", "lora_adapter_metadata": json.dumps(packed)},
    )
    return folder


def save_onetrainer(path: Path, parts) -> Path:
    """OneTrainer's format for diffusers: alpha is folded into B."""
    folded = {module: part._replace(B=part.B * np.float32(ALPHA / RANK)) for module, part in parts.items()}
    tensors = peft_tensors(folded, "transformer.", ".lora_magnitude_vector.weight")
    save_file(tensors, path, {"ot_branch": "master", "ot_config": "{}"})
    return path


def save_legacy(path: Path, parts) -> Path:
    def name(module):
        return "lora_transformer_" + module.replace(".", "_")

    save_file(kohya_tensors(parts, name, "lora_down", "lora_up"), path)
    return path


def save_kohya(path: Path, parts) -> Path:
    def name(module):
        return "lora_unet_" + module.replace(".", "_")

    save_file(kohya_tensors(official(parts), name, "lora_down", "lora_up"), path)
    return path


def save_original(path: Path, parts, prefix="") -> Path:
    save_file(kohya_tensors(official(parts), lambda module: prefix + module, "lora_A", "lora_B"), path)
    return path


def save_comfy(path: Path, parts) -> Path:
    return save_original(path, parts, "diffusion_model.")


def save_second_file(path: Path, parts) -> Path:
    """The second file of the official script: without a scale, and without DoRA."""
    save_file(peft_tensors(parts, "unet.base_model.model."), path)
    return path


FORMATS = {
    "peft": save_peft,
    "simpletuner": save_simpletuner,
    "onetrainer.safetensors": save_onetrainer,
    "legacy.safetensors": save_legacy,
    "kohya.safetensors": save_kohya,
    "original.safetensors": save_original,
    "comfy.safetensors": save_comfy,
}
