"""The weight format of VAEs: the table of diffusers' `AutoencoderKL`."""

from __future__ import annotations

import functools
import re

from pixart_jax.models.vae import VAEConfig, abstract_vae
from pixart_jax.weights.tables import CONVOLUTION, SAME, Entry, Table, dense, dotted, parameter_shapes

# Our modules have the structure of diffusers' modules. These rules replace the names that differ.
_VAE_NAMES = (
    (r"\bdownsample\b", "downsamplers.0.conv"),
    (r"\bupsample\b", "upsamplers.0.conv"),
    (r"\bshortcut\b", "conv_shortcut"),
    (r"\bnorm_out\b", "conv_norm_out"),
    (r"\battention\b", "attentions.0"),
    (r"\battentions\.0\.norm\b", "attentions.0.group_norm"),
    (r"\b([qkv])\.(kernel|bias)\b", r"to_\1.\2"),
    (r"\bproj\b", "to_out.0"),
    (r"\b(kernel|scale)$", "weight"),
)
# Names of the middle attention before diffusers 0.12, which the released SD files still use.
_VAE_OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@functools.lru_cache(maxsize=8)
def vae_table(config: VAEConfig) -> Table:
    """The table of diffusers' `AutoencoderKL`, including old names and shapes of its attention."""
    shapes = parameter_shapes(abstract_vae(config))
    entries = []
    for path, shape in shapes.items():
        key = dotted(path)
        for pattern, name in _VAE_NAMES:
            key = re.sub(pattern, name, key)
        aliases = [key.replace(f".{new}.", f".{old}.") for new, old in _VAE_OLD_NAMES.items()]
        layout = {1: SAME, 2: dense(or_convolution=True), 4: CONVOLUTION}[len(shape)]
        entries.append(Entry(path, key, layout, aliases=tuple(alias for alias in aliases if alias != key)))
    return Table(name="an AutoencoderKL (diffusers)", entries=tuple(entries), shapes=shapes)
