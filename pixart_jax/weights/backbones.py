"""The three weight formats of the backbones, with one table each, used for import and export.

'official' is the state dict of PixArt-alpha and PixArt-Sigma, 'diffusers' that of `PixArtTransformer2DModel`,
'dit' that of DiT.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax import nnx

from pixart_jax.errors import UserError, short
from pixart_jax.models.configs import LAYER_NAMES, NULL_TEXT, DiTConfig, PixArtConfig
from pixart_jax.models.dit import DiT
from pixart_jax.models.layers import MAX_PERIOD, TIMESTEP_FEATURES, position_table
from pixart_jax.models.pixart import PixArt
from pixart_jax.weights.files import Tensors
from pixart_jax.weights.tables import (
    SAME,
    VECTOR,
    Entry,
    Path,
    Shape,
    Table,
    TensorLayout,
    dense,
    export_shapes,
    export_tensors,
    import_tensors,
    parameter_shapes,
)

OFFICIAL_NULL_TEXT = "y_embedder.y_embedding"
POSITIONS = "pos_embed"

# Patterns of names that occur only in this format.
_MARKS = {
    "diffusers": r"transformer_blocks\.\d+\..+|caption_projection\..+",
    "dit": r"y_embedder\.embedding_table\.weight|blocks\.\d+\.adaLN_modulation\..+",
    "official": r"y_embedder\.y_proj\..+|blocks\.\d+\.cross_attn\..+",
}
_STACK = ("blocks", "stacked")
_COMPRESSION = ("blocks", "compression")
# What other code puts before the names of a network: wrappers (DataParallel, torch.compile, FSDP, activation
# checkpointing), also within a name, and the models that contain the network (Lightning, ComfyUI).
_WRAPPERS = "module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
_PREFIX = re.compile(rf"^(?:(?:{_WRAPPERS}|model|diffusion_model)\.)+|(?<=\.)(?:(?:{_WRAPPERS})\.)+")

# Names in the files that hold all parts of a pipeline, as ComfyUI saves them: the network, the other parts.
_IN_PIPELINE = re.compile(r"model\.diffusion_model\.")
_OTHER_PARTS = re.compile(r"(?:first_stage_model|cond_stage_model|conditioner|text_encoders|vae)\.")

# Our name to theirs: modules with the same names in both official formats.
_TRUNK = {"t_embedder.fc1": "t_embedder.mlp.0", "t_embedder.fc2": "t_embedder.mlp.2"}
_OFFICIAL = {
    **_TRUNK,
    "t_block": "t_block.1",
    "text_proj.fc1": "y_embedder.y_proj.fc1",
    "text_proj.fc2": "y_embedder.y_proj.fc2",
    "size_embedder.fc1": "csize_embedder.mlp.0",
    "size_embedder.fc2": "csize_embedder.mlp.2",
    "ratio_embedder.fc1": "ar_embedder.mlp.0",
    "ratio_embedder.fc2": "ar_embedder.mlp.2",
    "final_layer.linear": "final_layer.linear",
}
_OFFICIAL_BLOCK = {
    "attn.qkv": "attn.qkv",
    "attn.proj": "attn.proj",
    "cross_attn.q": "cross_attn.q_linear",
    "cross_attn.kv": "cross_attn.kv_linear",
    "cross_attn.proj": "cross_attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_DIT = {
    **_TRUNK,
    "final_layer.linear": "final_layer.linear",
    "final_layer.modulation": "final_layer.adaLN_modulation.1",
}
_DIT_BLOCK = {
    "attn.qkv": "attn.qkv",
    "attn.proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "modulation": "adaLN_modulation.1",
}
# Norms and convolution that some blocks of PixArt-Σ have, and diffusers does not know.
_SIGMA_BLOCK = {"attn.q_norm": "attn.q_norm", "attn.k_norm": "attn.k_norm"}
_SIGMA_COMPRESSION = {"conv": "attn.sr", "norm": "attn.norm"}
_SIGMA_PARAMETERS = {"scale": "weight", "kernel": "weight", "bias": "bias"}
_PATCHES = "patch_embed.proj"
_IN_BLOCK = "blocks.stacked."
# `LAYER_NAMES` has diffusers' names. Our fused projections are several modules in diffusers.
_DIFFUSERS = {
    ours: names[0]
    for ours, names in LAYER_NAMES.items()
    if not ours.startswith(_IN_BLOCK) and ours != _PATCHES
}
_DIFFUSERS_BLOCK = {
    ours.removeprefix(_IN_BLOCK): names if len(names) > 1 else names[0]
    for ours, names in LAYER_NAMES.items()
    if ours.startswith(_IN_BLOCK)
}


def strip_prefixes(tensors: Tensors) -> tuple[Tensors, tuple[str, ...]]:
    """Removes prefixes such as 'module.' and 'model.diffusion_model.' from the names of a file.

    Returns:
      the tensors by their new names, and a note for the user if there were prefixes.

    Raises:
      UserError: two tensors would have the same name, or the file holds more than the network.
    """
    others = [name for name in tensors if _OTHER_PARTS.match(name)]
    if others and any(_IN_PIPELINE.match(name) for name in tensors):
        raise UserError(
            f"'{tensors.path}' also holds a text encoder or a VAE ({len(others)} tensors, such as "
            f"{short(others[0])}): save the tensors under 'model.diffusion_model.' in a file of their own."
        )
    names: dict[str, str] = {}
    for name in tensors:
        other = names.setdefault(_PREFIX.sub("", name), name)
        if other != name:
            raise UserError(
                f"'{tensors.path}' has both {other} and {name}, which are one tensor of the network: give a "
                "file of one network."
            )
    prefixes = dict.fromkeys(prefix for name in tensors for prefix in _PREFIX.findall(name))
    if not prefixes:
        return tensors, ()
    shapes = {new: tensors.shapes[old] for new, old in names.items()}
    stripped = Tensors(tensors.path, shapes, lambda name: tensors[names[name]], tensors.metadata)
    return stripped, (f"removed the prefix {', '.join(prefixes)} from the names in '{tensors.path}'.",)


def detect(tensors: Mapping[str, Any]) -> str:
    """The format of a file, detected from the names of its tensors.

    Raises:
      UserError: the names belong to no format, or to several.
    """
    found = [kind for kind, mark in _MARKS.items() if any(re.fullmatch(mark, name) for name in tensors)]
    if len(found) == 1:
        return found[0]
    some = ", ".join(list(tensors)[:3])
    raise UserError(
        f"'{getattr(tensors, 'path', 'the file')}' ({len(tensors)} tensors: {some}, …) has names of "
        f"{' and of '.join(found) or 'no known format'}: give the weights of a PixArt (official or "
        "diffusers) or of a DiT."
    )


def import_backbone(
    kind: str, tensors: Tensors, config: PixArtConfig | DiTConfig, *, null_text: bool = True
) -> dict[str, Any]:
    """Imports the parameters of the model that `config` describes, float32, as a nested dict.

    The diffusers format has no null caption. It is zero here; a pipeline computes it with the text encoder.

    Args:
      kind: the format.
      tensors: of the file.
      config: of the model.
      null_text: False for an official file without a null caption, which is then zero too.

    Raises:
      UserError: see `tables.import_tensors`.
    """
    params = import_tensors(backbone_table(kind, config, null_text), tensors)
    if config.kind == "pixart" and NULL_TEXT not in params:
        params[NULL_TEXT] = np.zeros((config.text_length, config.text_dim), np.float32)
    return params


def export_backbone(
    kind: str, params: Mapping[str, Any], config: PixArtConfig | DiTConfig
) -> tuple[dict[str, Shape], Iterator[tuple[str, np.ndarray]]]:
    """Exports parameters: the shapes by name, and an iterator over the tensors in the same order.

    Raises:
      UserError: see `check_diffusers_knows`.
    """
    if kind == "diffusers":
        check_diffusers_knows(config)
    table = backbone_table(kind, config)
    shapes = export_shapes(table)
    if kind == "diffusers":
        params = {name: value for name, value in params.items() if name != NULL_TEXT}
        return shapes, export_tensors(table, params)
    # The official classes have the positions as a buffer, and a strict load requires it.
    side, width = config.base_size, config.hidden_size
    positions = position_table(side, side, width, side, config.position_scale)[None]

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        yield POSITIONS, positions
        yield from export_tensors(table, params)

    return {POSITIONS: positions.shape, **shapes}, tensors()


def check_diffusers_knows(config: PixArtConfig) -> None:
    """Raises a `UserError` if the network has layers that diffusers does not have."""
    layers = [
        *(["normalized queries and keys (model.qk_norm)"] if config.qk_norm else []),
        *(["compressed keys and values (model.kv_compression)"] if config.compressed_layers else []),
    ]
    if layers:
        raise UserError(
            f"the network has {' and '.join(layers)}, which diffusers does not know, so its export would "
            "lose weights: use --to=official or --to=checkpoint."
        )


@functools.lru_cache(maxsize=8)
def backbone_table(kind: str, config: PixArtConfig | DiTConfig, null_text: bool = True) -> Table:
    """The table of a format: 'official' (with or without a null caption), 'diffusers' or 'dit'."""
    model = DiT if kind == "dit" else PixArt
    shapes = parameter_shapes(nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0))))
    official = kind != "diffusers"
    modules, block, prefix, tables = {
        "official": (_OFFICIAL, _OFFICIAL_BLOCK, "blocks", "final_layer."),
        "diffusers": (_DIFFUSERS, _DIFFUSERS_BLOCK, "transformer_blocks", ""),
        "dit": (_DIT, _DIT_BLOCK, "blocks", "final_layer."),
    }[kind]
    patch = "x_embedder.proj" if official else LAYER_NAMES[_PATCHES][0]
    entries = [
        Entry(("patch_embed", "proj", "kernel"), f"{patch}.weight", _patches(config)),
        Entry(("patch_embed", "proj", "bias"), f"{patch}.bias"),
    ]
    for path in shapes:
        module = ".".join(path[:-1])
        if module in modules:
            entries.append(_linear(path, modules[module], ()))
    for layer in range(config.depth):
        for path in shapes:
            name = block.get(".".join(path[2:-1]))
            if path[:2] != _STACK or name is None:
                continue
            # A kernel is [L, in, parts, …], a bias [L, parts, …].
            before = (slice(None),) if path[-1] == "kernel" else ()
            parts = (
                [(layer,)] if isinstance(name, str) else [(layer, *before, part) for part in range(len(name))]
            )
            names = [name] if isinstance(name, str) else name
            entries += [_linear(path, f"{prefix}.{layer}.{n}", index) for n, index in zip(names, parts)]
        if kind != "dit":
            path = (*_STACK, "scale_shift_table")
            entries.append(Entry(path, f"{prefix}.{layer}.scale_shift_table", SAME, (layer,)))
    if kind == "official":
        entries += _sigma_entries(shapes, config)
    if kind == "dit":
        entries.append(Entry(("label_table",), "y_embedder.embedding_table.weight"))
    else:
        entries.append(Entry(("final_layer", "scale_shift_table"), f"{tables}scale_shift_table"))
    if kind == "official" and null_text:
        entries.append(Entry((NULL_TEXT,), OFFICIAL_NULL_TEXT))
    else:
        shapes = {path: shape for path, shape in shapes.items() if path != (NULL_TEXT,)}
    if kind == "diffusers":
        # Adapters of layers that diffusers does know are merged with this table.
        shapes = {path: shape for path, shape in shapes.items() if not _is_unknown_to_diffusers(path)}
    name = {"official": "an official PixArt", "diffusers": "a diffusers PixArt", "dit": "an official DiT"}[
        kind
    ]
    return Table(name, tuple(entries), shapes, ignored=(POSITIONS,) if official else ())


def _sigma_entries(shapes: Mapping[Path, Shape], config: PixArtConfig) -> Iterator[Entry]:
    """The entries of normalized queries and keys, and of compressed keys and values."""
    stacks = (
        (_STACK, _SIGMA_BLOCK, range(config.depth)),
        (_COMPRESSION, _SIGMA_COMPRESSION, config.compressed_layers),
    )
    for stack, names, layers in stacks:
        for path in shapes:
            name = names.get(".".join(path[2:-1]))
            if path[:2] != stack or name is None:
                continue
            layout = _FILTERS if path[-1] == "kernel" else VECTOR
            parameter = _SIGMA_PARAMETERS[path[-1]]
            for position, layer in enumerate(layers):
                yield Entry(path, f"blocks.{layer}.{name}.{parameter}", layout, (position,))


def _is_unknown_to_diffusers(path: Path) -> bool:
    return path[:2] == _COMPRESSION or ".".join(path[2:-1]) in _SIGMA_BLOCK


def official_modules() -> dict[str, tuple[str, ...]]:
    """The linear layers and the patch convolution by their official names, and what diffusers calls them.

    A fused projection, such as 'blocks.{}.attn.qkv', is several modules in diffusers. '{}' stands for the
    number of the block.
    """
    names = {"x_embedder.proj": LAYER_NAMES[_PATCHES]}
    names |= {_OFFICIAL[ours]: (name,) for ours, name in _DIFFUSERS.items()}
    for ours, name in _DIFFUSERS_BLOCK.items():
        parts = (name,) if isinstance(name, str) else name
        names[f"blocks.{{}}.{_OFFICIAL_BLOCK[ours]}"] = tuple(f"transformer_blocks.{{}}.{p}" for p in parts)
    return names


def fold_size_conditions(
    params: Mapping[str, Any], config: PixArtConfig, height: int, width: int
) -> tuple[dict[str, Any], PixArtConfig]:
    """Turns a model with size conditions into one without them, for images of one size.

        b' = b + [size(height) | size(width) | ratio(height / width)]

    where b is the last bias of the timestep embedder. This is exact, because the model adds the size
    embedding to the output of the timestep embedder.

    Args:
      params: parameters of a model with size conditions.
      config: config of that model.
      height, width: the size, in pixels.

    Returns:
      parameters and config of the new model. Parameters that do not change are shared with `params`.
    """

    def embed(embedder: Mapping[str, Any], value: float) -> np.ndarray:
        half = TIMESTEP_FEATURES // 2
        angles = value * MAX_PERIOD ** -(np.arange(half) / half)
        x = np.concatenate([np.cos(angles), np.sin(angles)])
        hidden = x @ _float64(embedder["fc1"]["kernel"]) + _float64(embedder["fc1"]["bias"])
        active = hidden / (1 + np.exp(-hidden))
        return active @ _float64(embedder["fc2"]["kernel"]) + _float64(embedder["fc2"]["bias"])

    size, ratio = params["size_embedder"], params["ratio_embedder"]
    constant = np.concatenate([embed(size, height), embed(size, width), embed(ratio, height / width)])
    last = params["t_embedder"]["fc2"]
    folded = {
        name: value for name, value in params.items() if name not in ("size_embedder", "ratio_embedder")
    }
    bias = (_float64(last["bias"]) + constant).astype(np.float32)
    folded["t_embedder"] = {**params["t_embedder"], "fc2": {**last, "bias": bias}}
    return folded, dataclasses.replace(config, size_conditions=False)


def _float64(value: Any) -> np.ndarray:
    return np.asarray(value, np.float64)


# One filter for each channel: theirs is [d, 1, r, r], ours [r, r, H, K].
_FILTERS = TensorLayout(
    lambda theirs, shape: theirs.transpose(2, 3, 1, 0).reshape(shape),
    lambda ours: ours.reshape(*ours.shape[:2], 1, -1).transpose(3, 2, 0, 1),
)


def _linear(path: Path, name: str, index: tuple[int | slice, ...]) -> Entry:
    """The entry for the kernel or bias of a linear layer called `name` in the other format."""
    if path[-1] == "bias":
        return Entry(path, f"{name}.bias", VECTOR, index)
    # The output projections of attention have two input axes: heads and head width.
    inputs = 2 if path[-2] == "proj" else 1
    return Entry(path, f"{name}.weight", dense(inputs), index)


def _patches(config: PixArtConfig | DiTConfig) -> TensorLayout:
    """Theirs is a convolution of stride p, [d, c, p, q]; ours a linear map of patches, [(p q c), d]."""
    patch = (config.patch_size, config.patch_size, config.in_channels, config.hidden_size)
    return TensorLayout(
        lambda theirs, shape: theirs.transpose(2, 3, 1, 0).reshape(shape),
        lambda ours: ours.reshape(patch).transpose(3, 2, 0, 1),
    )
