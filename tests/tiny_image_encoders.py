"""Image encoders of transformers with random weights, and models that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

_SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
_MLP = dict(**_SIZES, intermediate_size=32)
_TEXT = dict(**_MLP, vocab_size=20, bos_token_id=1, eos_token_id=2, pad_token_id=0)
# The class of a model, and its (vision) config.
CONFIGS = {
    "dinov2": (transformers.Dinov2Model, dict(**_SIZES, image_size=28, patch_size=14)),
    "dinov2_with_registers": (
        transformers.Dinov2WithRegistersModel,
        dict(**_SIZES, image_size=28, patch_size=14, num_register_tokens=4),
    ),
    "dinov3_vit": (
        transformers.DINOv3ViTModel,
        dict(**_MLP, image_size=32, patch_size=16, num_register_tokens=4),
    ),
    "clip": (transformers.CLIPModel, dict(**_MLP, image_size=32, patch_size=8)),
    "siglip": (transformers.SiglipModel, dict(**_MLP, image_size=32, patch_size=8)),
    "vit": (transformers.ViTModel, dict(**_MLP, image_size=32, patch_size=8)),
    # These are not usable.
    "bert": (transformers.BertModel, dict(**_MLP, vocab_size=20)),
    "vit_mae": (transformers.ViTMAEModel, dict(**_MLP, image_size=32, patch_size=8)),
    "swin": (
        transformers.SwinModel,
        dict(embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2, image_size=32, patch_size=4),
    ),
}


def save_image_encoder(folder: Path, kind: str, classes: int = 0, **changes: Any) -> torch.nn.Module:
    """Saves a model of one of `CONFIGS` with random weights in a folder, and returns it.

    Args:
      folder: where it is saved.
      kind: its name in `CONFIGS`.
      classes: for "vit", save a classifier with this many classes.
      changes: other values of its config.
    """
    torch.manual_seed(0)
    cls, values = CONFIGS[kind]
    values = values | changes
    if kind in ("clip", "siglip"):
        values = {"text_config": _TEXT, "vision_config": values}
    if classes:
        cls, values = transformers.ViTForImageClassification, values | {"num_labels": classes}
    model = cls(cls.config_class(**values))
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at initialization, so that all of them matter
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model
