"""The weight format of T5 and mT5: the table of transformers' `T5EncoderModel` and `MT5EncoderModel`."""

from __future__ import annotations

import functools
from pathlib import Path

from flax import nnx

from pixart_jax.models.t5 import MODEL_TYPES, T5Config, T5Encoder
from pixart_jax.readers import read_json
from pixart_jax.weights.files import COPY
from pixart_jax.weights.tables import SAME, Entry, Table, dense, parameter_shapes


def other_than_t5(folder: Path) -> str | None:
    """The `model_type` of a text encoder that `T5Encoder` does not implement; None if it is a T5.

    Raises:
      UserError: the folder has no readable config.json.
    """
    kind = read_json(folder / "config.json", COPY).get("model_type")
    return kind if isinstance(kind, str) and kind not in MODEL_TYPES else None


@functools.lru_cache(maxsize=8)
def t5_table(config: T5Config) -> Table:
    """The table of transformers' `T5EncoderModel`. In the file of a complete T5, the decoder is ignored."""
    first = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    entries = [
        Entry(("embed",), "shared.weight", aliases=("encoder.embed_tokens.weight",)),
        Entry(("position_bias",), first),
        Entry(("final_norm", "scale"), "encoder.final_layer_norm.weight"),
    ]
    feed_forward = ("wi_0", "wi_1", "wo") if config.feed_forward_proj == "gated-gelu" else ("wi", "wo")
    per_layer = [
        (("attn_norm", "scale"), "layer.0.layer_norm", SAME),
        *((("attn", name), f"layer.0.SelfAttention.{name}", dense()) for name in "qkv"),
        (("attn", "o"), "layer.0.SelfAttention.o", dense(inputs=2)),
        (("ff_norm", "scale"), "layer.1.layer_norm", SAME),
        *((("ff", name), f"layer.1.DenseReluDense.{name}", dense()) for name in feed_forward),
    ]
    for path, name, layout in per_layer:
        for layer in range(config.num_layers):
            key = f"encoder.block.{layer}.{name}.weight"
            entries.append(Entry(("blocks", "stacked", *path), key, layout, (layer,)))
    return Table(
        name="a T5 encoder (HuggingFace)",
        entries=tuple(entries),
        shapes=parameter_shapes(nnx.eval_shape(lambda: T5Encoder(config, rngs=nnx.Rngs(0)))),
        ignored=(r"decoder\..+", r"lm_head\.weight"),
    )
