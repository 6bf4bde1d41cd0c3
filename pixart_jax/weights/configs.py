"""Model configs, inferred from the tensors of a weight file and from diffusers' config.json.

Sizes follow from the shapes of the tensors. What shapes do not determine, such as the number of heads, comes
from the caller or from the file's own notes, else from a published default. If there is none, an error names
the flag to give.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from pixart_jax.config import DiffusionConfig, from_dict, to_dict
from pixart_jax.errors import UserError
from pixart_jax.models.configs import OFFICIAL_MODES, SIZES, DiTConfig, PixArtConfig, format_layers
from pixart_jax.readers import read_json
from pixart_jax.weights.families import ALPHA
from pixart_jax.weights.files import COPY, Tensors

# Width and number of heads of PixArt-XL/2, the only published PixArt.
_XL_WIDTH, _XL_HEADS = 1152, 16

# Fields of a diffusers config that change the network, with the only value that PixArt uses.
_DIFFUSERS_FIXED = {
    "norm_type": "ada_norm_single",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "attention_type": "default",
}

# The file of the scheduler in a pipeline folder.
SCHEDULER = Path("scheduler", "scheduler_config.json")
# Fields of `DiffusionConfig` that are the noise schedule of the weights, with their names in diffusers.
NOISE_SCHEDULE = {
    "num_timesteps": "num_train_timesteps",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
}
# Fields of a scheduler that say how its network was trained, whatever the sampler, with the only value that
# PixArt uses.
_SCHEDULER_FIXED = {
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "trained_betas": None,
}

# The number of a block. A tensor with a longer one, which Python may refuse to convert, is unknown to the
# import.
_NUMBER = r"(\d{1,9})"

_NOTHING: Mapping[str, Any] = {}


def official_config(
    tensors: Tensors, given: Mapping[str, Any], assumed: Mapping[str, Any] = _NOTHING
) -> PixArtConfig:
    """The config of an official PixArt state dict.

    Args:
      tensors: with official names.
      given: values from the caller, for what the tensors do not determine: num_heads, base_size,
        position_scale, text_length, kv_compression.
      assumed: values to use where there is no other; unlike given ones, they may differ from the file's.

    Raises:
      UserError: a value that the tensors do not determine is missing, or a given value contradicts them.
    """
    backbone = _official_backbone(tensors, given, assumed)
    length, text_dim = _shape(tensors, "y_embedder.y_embedding", 2) or (None, None)
    fc1 = _shape(tensors, "y_embedder.y_proj.fc1.weight", 2)
    return PixArtConfig(
        **backbone,
        **_sigma(tensors, given, assumed),
        text_dim=fc1[1] if fc1 else text_dim or 4096,
        text_length=_settle("text_length", length, given, assumed) or ALPHA.text_length,
        size_conditions=any(name.startswith("csize_embedder.") for name in tensors),
    )


def dit_config(
    tensors: Tensors, given: Mapping[str, Any], assumed: Mapping[str, Any] = _NOTHING
) -> DiTConfig:
    """The config of an official DiT state dict; arguments and errors as for `official_config`."""
    labels = _shape(tensors, "y_embedder.embedding_table.weight", 2)
    return DiTConfig(
        **_official_backbone(tensors, given, assumed), num_classes=labels[0] - 1 if labels else 1000
    )


def diffusers_config(
    tensors: Tensors,
    config: Mapping[str, Any] | None,
    given: Mapping[str, Any],
    assumed: Mapping[str, Any] = _NOTHING,
) -> PixArtConfig:
    """The config of a diffusers `PixArtTransformer2DModel`.

    Args:
      tensors: with diffusers names.
      config: its config.json, or that of the older `Transformer2DModel`; None for a file without one.
      given, assumed: as for `official_config`.

    Raises:
      UserError: config.json is of another network, or a value is missing or contradicts it.
    """
    width = _length(tensors, "pos_embed.proj.bias", "transformer_blocks.0.attn1.to_q.bias")
    in_channels, patch = _kernel(tensors, "pos_embed.proj.weight", width)
    depth = _depth(tensors, "transformer_blocks")
    outputs = _length(tensors, "proj_out.bias", "proj_out.weight")
    text = _shape(tensors, "caption_projection.linear_1.weight", 2)
    config = dict(config or {})
    shapes = {"num_layers": depth, "in_channels": in_channels, "out_channels": outputs / patch**2}
    shapes |= {"patch_size": patch, "caption_channels": text and text[1], "cross_attention_dim": width}
    found = _read_diffusers_config(config, width, shapes) if config else {}
    found_or_given = {
        name: _settle(name, found.get(name), given, assumed)
        for name in ("num_heads", "base_size", "position_scale")
    }
    sizes = config.get("use_additional_conditions")
    if sizes is None:
        # diffusers assumes them at sample_size 128, but the first upload of PixArt-Sigma at 1024 px has none.
        sizes = "adaln_single.emb.resolution_embedder.linear_1.weight" in tensors
    return PixArtConfig(
        **_backbone(
            depth=depth,
            width=width,
            patch=patch,
            in_channels=in_channels,
            hidden=_length(tensors, "transformer_blocks.0.ff.net.0.proj.bias") or 4 * width,
            outputs=outputs,
            **found_or_given,
        ),
        text_dim=text[1] if text else config.get("caption_channels") or 4096,
        text_length=_settle("text_length", None, given, assumed) or ALPHA.text_length,
        size_conditions=bool(sizes),
    )


def to_diffusers_config(config: PixArtConfig) -> dict[str, Any]:
    """The config.json of `PixArtTransformer2DModel`, which does not rely on the defaults of diffusers."""
    return {
        "_class_name": "PixArtTransformer2DModel",
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "dropout": 0.0,
        "norm_num_groups": 32,
        "cross_attention_dim": config.hidden_size,
        "sample_size": config.base_size * config.patch_size,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": 1000,
        "upcast_attention": False,
        "interpolation_scale": _whole(config.position_scale),
        "use_additional_conditions": config.size_conditions,
        "caption_channels": config.text_dim,
        **_DIFFUSERS_FIXED,
    }


def read_noise_schedule(folder: Path, default: DiffusionConfig) -> DiffusionConfig:
    """The noise schedule of the scheduler in a pipeline folder; `default` if there is none.

    Raises:
      UserError: the scheduler is for networks that were trained in another way.
    """
    file = folder / SCHEDULER
    if not file.is_file():
        return default
    values = read_scheduler(folder)
    wrong = [
        f"{name} {values[name]!r:.40} (PixArt: {value!r})"
        for name, value in _SCHEDULER_FIXED.items()
        if values.get(name, value) != value
    ]
    if "FlowMatch" in str(values.get("_class_name")):
        wrong.append(f"_class_name {values['_class_name']}")
    if wrong:
        raise UserError(
            f"'{file}' is of a network that was trained in another way: {'; '.join(wrong)}. Give the "
            "scheduler that belongs to the weights."
        )
    schedule = {
        ours: values.get(theirs, getattr(DiffusionConfig, ours)) for ours, theirs in NOISE_SCHEDULE.items()
    }
    return from_dict({**to_dict(default), **schedule}, DiffusionConfig, f"{file}: ")


def read_scheduler(folder: Path) -> dict[str, Any]:
    """The values of the scheduler in a pipeline folder. Some are infinite, as diffusers writes them."""
    return read_json(folder / SCHEDULER, COPY, lenient=True)


def to_noise_schedule(config: DiffusionConfig) -> dict[str, Any]:
    """The noise schedule in the fields of a diffusers scheduler."""
    return {theirs: getattr(config, ours) for ours, theirs in NOISE_SCHEDULE.items()}


def read_positions(table: np.ndarray) -> tuple[int, float]:
    """Reads base size and position scale from the position buffer of a square grid.

    The grid of the buffer has base_size tokens on a side, so that token j has position j / scale. Token 1 of
    the first row therefore holds [sin(w_k / scale) | cos(w_k / scale)] in its first half. The lowest
    frequency w_k whose sine is distinguishable from 0 gives 1 / scale without the ambiguity of a full period.

    Args:
      table: [1, T, D], any float dtype.

    Returns:
      base size and position scale.

    Raises:
      UserError: the buffer is not a table of sines and cosines of a square grid.
    """
    from pixart_jax.models.layers import MAX_PERIOD, position_table

    # Tolerances for the rounding of 16-bit and 32-bit files; for float8, half the distance of two values.
    bits = 8 * table.dtype.itemsize
    tolerance, least = (2e-2, 5e-2) if bits <= 16 else (1e-4, 1e-3)
    if bits == 8:
        tolerance = float(ml_dtypes.finfo(table.dtype).eps) / 2
    values = np.asarray(table, np.float64).reshape(table.shape[-2:])
    tokens, width = values.shape
    side = round(tokens**0.5)
    if side * side != tokens or width % 4:
        raise UserError(
            f"pos_embed is {table.shape}: its tokens do not form a square grid. Give --base_size and "
            "--position_scale."
        )
    if side == 1:
        return 1, 1.0
    quarter = width // 4
    frequencies = MAX_PERIOD ** -(np.arange(quarter) / quarter)
    sines, cosines = values[1, :quarter], values[1, quarter : 2 * quarter]
    showing = np.flatnonzero(sines >= least)
    k = showing[-1] if len(showing) else 0
    estimate = np.arctan2(sines[k], cosines[k]) / frequencies[k]
    if estimate > 0:
        scale = 1 / estimate
        candidates = [float(Fraction(scale).limit_denominator(16)), scale]
        if bits == 8:
            candidates = [_nearest_scale(scale, table.dtype, values[:side, :quarter], frequencies)]
        for candidate in candidates:
            if candidate > 0 and np.allclose(
                position_table(side, side, width, side, candidate), values, rtol=0, atol=tolerance
            ):
                return side, candidate
    raise UserError(
        "pos_embed is not the table of sines of any position scale: the file is not of a PixArt or DiT, or "
        "it was altered; give the original file."
    )


def _nearest_scale(estimate: float, dtype: np.dtype, sines: np.ndarray, frequencies: np.ndarray) -> float:
    """The position scale whose sines, rounded to `dtype`, are nearest to those of the first row of tokens.

    A single token in float8 gives the scale to within several percent only.

    Args:
      estimate: the scale of a single token.
      dtype: of the file.
      sines: [side, D / 4], the first quarter of the width.
      frequencies: [D / 4].
    """
    positions = np.arange(len(sines))[:, None] * frequencies

    def distance(scale: Fraction) -> float:
        rounded = np.sin(positions / float(scale)).astype(dtype).astype(np.float64)
        return np.abs(rounded - sines).sum()

    # Simple fractions come first, and win if several are equally near.
    near = [
        Fraction(numerator, denominator)
        for denominator in range(1, 17)
        for numerator in range(1, int(1.25 * estimate * denominator) + 2)
        if numerator >= 0.8 * estimate * denominator
    ]
    return float(min(near, key=distance))


def _official_backbone(
    tensors: Tensors, given: Mapping[str, Any], assumed: Mapping[str, Any]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "pos_embed" in tensors:
        found["base_size"], found["position_scale"] = read_positions(tensors["pos_embed"])
    width = _length(tensors, "x_embedder.proj.bias", "t_embedder.mlp.0.bias", "blocks.0.attn.proj.bias")
    in_channels, patch = _kernel(tensors, "x_embedder.proj.weight", width)
    return _backbone(
        depth=_depth(tensors, "blocks"),
        width=width,
        patch=patch,
        in_channels=in_channels,
        hidden=_length(tensors, "blocks.0.mlp.fc1.bias") or 4 * width,
        outputs=_length(tensors, "final_layer.linear.bias", "final_layer.linear.weight"),
        **{
            name: _settle(name, found.get(name), given, assumed)
            for name in ("num_heads", "base_size", "position_scale")
        },
    )


def _sigma(tensors: Tensors, given: Mapping[str, Any], assumed: Mapping[str, Any]) -> dict[str, Any]:
    """Normalized queries and keys, and compressed keys and values, which PixArt-Σ may have."""
    convolution = re.compile(rf"blocks\.{_NUMBER}\.attn\.sr\.weight")
    found = [(int(match[1]), name) for name in tensors if (match := convolution.fullmatch(name))]
    mode = given.get("kv_compression")
    if not found:
        if mode not in (None, "none"):
            raise UserError(
                f"kv_compression={mode}, but no block of '{tensors.path}' has the weights of a compression "
                "(attn.sr): leave it out, or export the file again if it says so itself."
            )
        mode = None
    elif mode == "none":
        raise UserError(
            f"kv_compression=none, but {len(found)} blocks of '{tensors.path}' compress keys and values "
            f"({found[0][1]}): choose {', '.join(OFFICIAL_MODES)}."
        )
    values: dict[str, Any] = {"qk_norm": "blocks.0.attn.q_norm.weight" in tensors}
    if found:
        # The weights are the same in every mode. No file states it.
        assumed_mode = assumed.get("kv_compression")
        values["kv_compression"] = mode or (assumed_mode if assumed_mode in OFFICIAL_MODES else "conv")
        values["kv_compression_layers"] = format_layers(tuple(sorted(layer for layer, _ in found)))
        shape = _shape(tensors, found[0][1], 4)
        values["kv_compression_factor"] = max(shape[2], 2) if shape else 2
    return values


def _backbone(
    *,
    depth: int,
    width: int,
    patch: int,
    in_channels: int,
    hidden: int,
    outputs: int,
    num_heads: int | None,
    base_size: int | None,
    position_scale: float | None,
) -> dict[str, Any]:
    if num_heads is None:
        if width != _XL_WIDTH:
            raise UserError(
                f"the model has width {width}, and the file does not contain its number of heads: give "
                "--num_heads (load_model(…, num_heads=…))."
            )
        num_heads = _XL_HEADS
    if base_size is None:
        raise UserError(
            "the file has no pos_embed and so does not contain the size it was trained at: give --base_size "
            "(tokens on a side: 16 for 256 px, 32 for 512, 64 for 1024) and --position_scale."
        )
    channels, rest = divmod(outputs, patch * patch)
    if rest or channels not in (in_channels, 2 * in_channels):
        raise UserError(
            f"the last layer (final_layer.linear, proj_out) has {outputs} outputs, but {in_channels} latent "
            f"channels in patches of {patch} need {patch * patch * in_channels}, or twice that with a "
            "learned variance: give the file of a PixArt or a DiT."
        )
    numbers = dict(depth=depth, hidden_size=width, num_heads=num_heads, patch_size=patch)
    return dict(
        numbers,
        size=next((name for name, shape in SIZES.items() if shape == numbers), "custom"),
        mlp_ratio=_ratio(hidden, width),
        in_channels=in_channels,
        learn_sigma=channels != in_channels,
        base_size=base_size,
        position_scale=1.0 if position_scale is None else float(position_scale),
    )


def _read_diffusers_config(
    config: Mapping[str, Any], width: int, shapes: Mapping[str, int | float | None]
) -> dict[str, Any]:
    """Reads the config.json of weights of this width. `shapes` has the fields that the tensors determine."""
    kind = config.get("_class_name", "PixArtTransformer2DModel")
    if kind not in ("PixArtTransformer2DModel", "Transformer2DModel"):
        raise UserError(f"config.json is of a {kind}: give the folder of a PixArtTransformer2DModel.")
    for name in ("num_attention_heads", "attention_head_dim", "sample_size", "patch_size"):
        value = config.get(name, 1)
        if type(value) is not int or value < 1:
            raise UserError(f"config.json has {name} {value!r}: it must be a whole number of at least 1.")
    wrong = [
        f"{name} {config[name]!r} (PixArt: {value!r})"
        for name, value in _DIFFUSERS_FIXED.items()
        if config.get(name, value) != value
    ]
    heads, head_dim = config.get("num_attention_heads", 16), config.get("attention_head_dim", 72)
    if heads * head_dim != width:
        wrong.append(f"{heads} heads of {head_dim} for tensors of width {width}")
    # Old configs leave out values that are None here.
    wrong += [
        f"{name} {config[name]!r:.40} for tensors that have {value:g}"
        for name, value in shapes.items()
        if config.get(name) is not None and value and config[name] != value
    ]
    if wrong:
        raise UserError(
            f"config.json is of another network: {'; '.join(wrong)}. Give the config.json of these weights."
        )
    side = config.get("sample_size", 128)
    scale = config.get("interpolation_scale")
    if scale is not None:
        check_factor("config.json has interpolation_scale", scale)
    return {
        "num_heads": heads,
        "base_size": side // (shapes["patch_size"] or 1),
        "position_scale": float(max(side // 64, 1) if scale is None else scale),
    }


def check_factor(start: str, value: Any) -> None:
    """Raises a `UserError` unless `value` is a finite number above 0. `start` begins the message."""
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise UserError(f"{start} {value!r:.200}: it must be a finite number above 0.")


def _settle(name: str, found: Any, given: Mapping[str, Any], assumed: Mapping[str, Any]) -> Any:
    """The value found in the file, else the one given by the caller; two different values raise.

    If there is neither, it is the value to assume.
    """
    value = given.get(name)
    if found is not None and value is not None and found != value:
        raise UserError(f"{name}={value} contradicts the file, which has {found}: leave it out.")
    return next((each for each in (found, value) if each is not None), assumed.get(name))


def _depth(tensors: Tensors, prefix: str) -> int:
    layers = [int(match.group(1)) for name in tensors if (match := re.match(rf"{prefix}\.{_NUMBER}\.", name))]
    return 1 + max(layers, default=0)


def _shape(tensors: Tensors, name: str, ndim: int) -> tuple[int, ...] | None:
    """The shape of a tensor if it has `ndim` axes, else None: the import then reports the wrong shape."""
    shape = tensors.shapes.get(name, ())
    return shape if len(shape) == ndim else None


def _length(tensors: Tensors, *names: str) -> int:
    """The first axis of the first of `names` that exists. Biases should come first: they have one axis."""
    shapes = (tensors.shapes.get(name, ()) for name in names)
    return next((shape[0] for shape, name in zip(shapes, names) if len(shape) == _axes(name)), 0)


def _axes(name: str) -> int:
    return 1 if name.endswith(".bias") else 2


def _kernel(tensors: Tensors, name: str, width: int) -> tuple[int, int]:
    """Latent channels and patch size, from the patch convolution [width, channels, p, p]."""
    shape = _shape(tensors, name, 4)
    if shape is None or shape[0] != width or shape[2] != shape[3]:
        return 4, 2
    return shape[1], shape[2]


def _ratio(hidden: int, width: int) -> float:
    """The mlp_ratio r for which int(width * r) equals `hidden`.

    If hidden / width is rounded down, int(width * r) can be one less; then r is the next larger float.
    """
    ratio = hidden / max(width, 1)
    return ratio if int(width * ratio) == hidden else float(np.nextafter(ratio, np.inf))


def _whole(value: float) -> int | float:
    return int(value) if value == int(value) else value
