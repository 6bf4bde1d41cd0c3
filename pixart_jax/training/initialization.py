"""Initialization of the weights: random, from the previous stage, or from a weight file.

`reparameterize` and `resize` take the weights of the previous stage and random weights of the new network.
They return the new weights and a report that lists every array as copied, computed from old arrays, new
(random or zero), or left out. An array that no rule covers raises a `UserError`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from pixart_jax.config import TrainConfig
from pixart_jax.denoiser import NETWORK, add_adapters
from pixart_jax.errors import UserError
from pixart_jax.hub import local
from pixart_jax.models.configs import NULL_TEXT, BackboneConfig, DiTConfig, PixArtConfig, format_layers
from pixart_jax.models.layers import sinusoid
from pixart_jax.models.mup import multiplier, with_readout
from pixart_jax.models.pixart import has_null_caption
from pixart_jax.training.objectives import Objective, Stream, stream_key
from pixart_jax.training.state import init_networks
from pixart_jax.weights.checkpoints import is_checkpoint, read_weights

if TYPE_CHECKING:
    from pixart_jax.data.loader import Dataset

# The timestep at which a re-parameterized network equals the DiT it came from (PixArt-α §2.3).
REPARAMETERIZATION_TIMESTEP = 500

# Settings that the weights were trained with, and that a run must not change. If it does not adapt them to a
# new VAE, so are the scale of the latents and, unless the image size changes, the position scale.
_LATENT_SCALE = "features.latent_scale"
_FIXED = (
    "diffusion.num_timesteps",
    "diffusion.beta_start",
    "diffusion.beta_end",
)
# The position embedding follows from these, and from the image size, not from parameters.
_POSITIONS = ("model.base_size", "model.position_scale")
# Settings of text that a run may change. The changes are printed.
_OF_TEXT = (
    *("guidance.null_text", "guidance.null_mask", "guidance.channels", "guidance.aspect_ratio"),
    *(f"features.text_encoder.{name}" for name in ("scale", "clean_caption", "lower_case")),
)

Params = dict[str, Any]
Flat = dict[tuple[str, ...], Any]


def initial_params(
    config: TrainConfig,
    objective: Objective,
    dataset: Dataset,
    say: Callable[[str], None],
    record: Callable[[str], None] = lambda text: None,
) -> dict[str, Params]:
    """Returns the initial weights of all networks of an objective.

    Args:
      config: config of the stage; `config.init` selects the initialization of the main network.
      objective: defines the networks.
      dataset: training data. Its null caption replaces that of the network.
      say: prints where the weights come from.
      record: called with the list of all arrays and where each comes from.

    Raises:
      UserError: if the weights cannot be read or do not fit, or if the null caption has a different shape.
    """
    key = stream_key(config.seed, Stream.INIT)
    if not config.adapter:
        params = jax.jit(lambda: init_networks(objective, key))()
        params[NETWORK] = _main_network(config, params[NETWORK], dataset, say, record)
        return objective.start(params)
    # The weights are loaded into the network without adapters, which are then added.
    fresh = jax.jit(lambda: nnx.to_pure_dict(nnx.state(config.model.make(rngs=nnx.Rngs(key)))))()
    network = add_adapters(config, _main_network(config, fresh, dataset, say, record), key)
    del fresh
    say(str(config.adapter))
    if config.init.adapter:
        network = _continued_adapter(config, network, say)
    return objective.start(init_networks(objective, key, {NETWORK: network}))


def _main_network(
    config: TrainConfig,
    fresh: Params,
    dataset: Dataset,
    say: Callable[[str], None],
    record: Callable[[str], None],
) -> Params:
    params = _starting_weights(config, fresh, say, record)
    if NULL_TEXT in params and config.guidance.null_text == "t5_empty":
        null, old = dataset.null_text(), params[NULL_TEXT]
        if null.shape != old.shape:
            raise UserError(
                f"the null caption of {config.data.train} has the shape {null.shape}, the model needs "
                f"{old.shape} (model.text_length, model.text_dim): set these to match, or use the "
                "features.text_length and the text encoder of the model for the features."
            )
        params[NULL_TEXT] = jnp.asarray(null, jnp.float32)
    return params


def _continued_adapter(config: TrainConfig, network: Params, say: Callable[[str], None]) -> Params:
    from pixart_jax.weights.adapter_files import read_adapter
    from pixart_jax.weights.trained_adapters import insert

    network = insert(read_adapter(config.init.adapter), network, config)
    say(f"continuing the adapter {config.init.adapter}")
    return network


def _starting_weights(
    config: TrainConfig, fresh: Params, say: Callable[[str], None], record: Callable[[str], None]
) -> Params:
    init = config.init
    if init.method == "none":
        say("a fresh start: random weights")
        return fresh
    if init.method == "weights":
        from pixart_jax.weights.loading import read_any  # imports all weight formats; few runs need them

        # Official files do not store the number of heads; diffusers folders do not store the caption length.
        read = read_any(init.path, assumed=config)
        old, before = read.params, read.config
        for note in read.notes:
            say(note)
    else:
        path = local(init.path)
        if init.method == "resize" and path.exists() and not is_checkpoint(path):
            raise UserError(
                f"init.method is 'resize', and '{init.path}' is no run: for weights of another format, set "
                "--config.init.method=weights, which resizes them too."
            )
        old, before = read_weights(path)
    compare_settings(before, config, say)
    if config.guidance.null_text == "token" and not has_null_caption(old):
        raise UserError(
            f"guidance.null_text is 'token', and '{init.path}' holds no null caption (diffusers has none): "
            "set it to 't5_empty'."
        )
    lengths = [getattr(each.model, "text_length", None) for each in (before, config)]
    if config.guidance.null_text == "token" and None not in lengths and lengths[0] != lengths[1]:
        raise UserError(
            f"guidance.null_text is 'token', and the null caption of '{init.path}' has {lengths[0]} tokens, "
            f"not {lengths[1]} (model.text_length): set guidance.null_text to 't5_empty', or "
            f"model.text_length to {lengths[0]}."
        )
    # With 'weights', the networks differ in nothing but what `resize` handles.
    convert = reparameterize if init.method == "reparameterize" else resize
    params, report = convert(old, before.model, fresh, config.model)
    params = with_readout(params, multiplier(config.model))
    added = _newly_compressed(before, config)
    if added:
        say(
            f"from here on, the keys and values of blocks {added} are compressed. At first they are "
            "normalized averages, which the network has to adapt to (docs/sigma.md)."
        )
    say(f"{init.method} from {init.path}: {report.summary()}; initialization.txt lists the arrays")
    record(f"{init.method} from {init.path}:\n{report}")
    return params


def compare_settings(before: TrainConfig, config: TrainConfig, say: Callable[[str], None]) -> None:
    """Compares the settings that weights were trained with, apart from shapes, with those of a run.

    Args:
      before: config of the weights: what their file states, and where it states nothing, what is assumed.
      config: config of the run.
      say: prints the differences that are allowed.

    Raises:
      UserError: a setting differs that a run must not change, or with adapters, whose network is frozen, the
        position embedding although the image size is the same, or newly compressed blocks.
    """
    both_text = all("text" in each.model.conditions for each in (before, config))
    same_size = before.model.base_size == config.model.base_size
    fixed = list(_FIXED)
    if not config.init.new_vae:
        fixed += [_LATENT_SCALE, *(["model.position_scale"] if same_size else [])]
    wrong = _differences(before, config, fixed)
    if wrong:
        raise UserError(
            f"the weights of init.path '{config.init.path}' were trained with {wrong}. The network would get "
            "other inputs than it knows: set the values of the weights"
            f"{', or init.new_vae for another VAE' if _LATENT_SCALE in wrong else ''}."
        )
    if config.init.new_vae:
        old, new = (each.features.latent_scale for each in (before, config))
        # Files that do not state a scale get that of the run.
        say(f"a new VAE: {_LATENT_SCALE} {'unknown' if old == new else old} in the weights, {new} here")
    positions = list(_differing(before, config, _POSITIONS))
    if positions and config.adapter and before.features.image_size == config.features.image_size:
        wrong = ", ".join(f"{name} {old} (here {new})" for name, old, new in positions)
        flags = " ".join(f"--config.{name}={old}" for name, old, _ in positions)
        raise UserError(
            f"the weights of init.path '{config.init.path}' have {wrong}, for images of the same size "
            f"({config.features.image_size} px). The network is frozen (adapter.kind "
            f"'{config.adapter.kind}') and cannot learn other positions: set {flags}."
        )
    added = _newly_compressed(before, config)
    if added and config.adapter:
        raise UserError(
            f"the weights of init.path '{config.init.path}' do not compress the keys and values of blocks "
            f"{added} (model.kv_compression_layers). The network is frozen (adapter.kind "
            f"'{config.adapter.kind}') and cannot adapt to that: set the values of the weights, or train the "
            "whole network first."
        )
    if positions:
        each = (
            f"{name.removeprefix('model.')} {old} in the weights, {new} here" for name, old, new in positions
        )
        say(f"position embedding: {'; '.join(each)}")
    changed = _differences(before, config, _OF_TEXT) if both_text else ""
    if changed:
        say(f"unlike the weights of {config.init.path}: {changed}")


def _newly_compressed(before: TrainConfig, config: TrainConfig) -> str:
    """The blocks that compress keys and values only in the run, such as '14-27'; '' if there are none."""
    added = set(config.model.compressed_layers) - set(before.model.compressed_layers)
    return format_layers(tuple(sorted(added)))


def _differences(before: TrainConfig, config: TrainConfig, names: Sequence[str]) -> str:
    """Settings with different values, as text: 'diffusion.beta_end 0.012 (here 0.02), …'."""
    return ", ".join(f"{name} {old} (here {new})" for name, old, new in _differing(before, config, names))


def _differing(
    before: TrainConfig, config: TrainConfig, names: Sequence[str]
) -> Iterator[tuple[str, Any, Any]]:
    """Settings with different values: name, value of the weights, value of the run."""
    for name in names:
        old, new = (functools.reduce(getattr, name.split("."), each) for each in (before, config))
        if old != new:
            yield name, old, new


@dataclasses.dataclass
class Report:
    """Lists what happened to each array of the old and of the new model."""

    copied: list[str] = dataclasses.field(default_factory=list)
    computed: list[str] = dataclasses.field(default_factory=list)
    new: list[str] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)

    def _rows(self) -> list[tuple[str, list[str]]]:
        rows = [
            (field.name.replace("_", " "), getattr(self, field.name)) for field in dataclasses.fields(self)
        ]
        return [(name, paths) for name, paths in rows if paths]

    def __str__(self) -> str:
        return "\n".join(
            f"  {name:<9} {len(paths):>3}  {', '.join(sorted(paths))}" for name, paths in self._rows()
        )

    def summary(self) -> str:
        """Returns the number of arrays of each kind, in one line."""
        return "arrays " + ", ".join(f"{name} {len(paths)}" for name, paths in self._rows())


def reparameterize(
    old: Params, old_config: DiTConfig, fresh: Params, config: PixArtConfig
) -> tuple[Params, Report]:
    """Initializes PixArt from DiT by re-parameterizing adaLN (PixArt-α §2.3, "re-parameterization").

    DiT modulates block i with A_i(SiLU(c)), c = t_emb(t) + y, where y is the class embedding. PixArt uses
    table_i + T(SiLU(t_emb(t))). With t* = 500 and c* = t_emb(t*) + y_0:

        T       := A_0, the projection of the first block (the paper: computed "only at the first block")
        table_i := A_i(SiLU(c*)) - A_0(SiLU(c*)),  so that table_0 = 0
        final   := A_final(SiLU(c*)) - c*,  because PixArt's last layer adds its table to t itself

    The paper computes the tables "without c". We use the embedding y_0 of the null class instead of y = 0:
    DiT learns y_0 for images of any class by dropping labels, whereas y = 0 is an input it has never seen.
    y_0 is added to the bias of the timestep embedder, so that the embedding in PixArt is t_emb(t) + y_0 for
    every t. The output projections of cross-attention are zero. At t* the new network therefore computes
    exactly what DiT computes for the null class, for any text.

    All other arrays with the same name are copied. Cross-attention, caption projection, null caption and size
    embedders are new; the last layer of the size embedders is zero, so that they do not change t at first.
    The class embeddings are left out.

    Args:
      old, old_config: weights and config of the DiT.
      fresh: random weights of the PixArt.
      config: config of the PixArt.

    Returns:
      The new weights and a report.

    Raises:
      UserError: if the old network is no DiT or the new one no PixArt, or if they differ in width, depth,
        heads, patch size or channels.
    """
    if (old_config.kind, config.kind) != (DiTConfig.kind, PixArtConfig.kind):
        raise UserError(
            f"init.method 'reparameterize' turns a 'dit' into a 'pixart', and the old model is a "
            f"'{old_config.kind}' and the new one a '{config.kind}': set init.method to 'resize' or "
            "'weights'."
        )
    _same(
        old_config, config, ("depth", "hidden_size", "num_heads", "patch_size", "in_channels", "out_channels")
    )
    source, target = _flat(old), _flat(fresh)
    report = Report()

    null_class = source["label_table",][old_config.num_classes]
    bias = source["t_embedder", "fc2", "bias"] + null_class
    condition = _timestep_embedding({**source, ("t_embedder", "fc2", "bias"): bias})
    active = jax.nn.silu(condition)

    kernels = source["blocks", "stacked", "modulation", "kernel"]  # [L, D, 6, D]
    biases = source["blocks", "stacked", "modulation", "bias"]  # [L, 6, D]
    at_t = jnp.einsum("d,ldkw->lkw", active, kernels) + biases  # [L, 6, D]
    final = jnp.einsum("d,dkw->kw", active, source["final_layer", "modulation", "kernel"])
    final = final + source["final_layer", "modulation", "bias"] - condition

    computed = {
        ("t_embedder", "fc2", "bias"): bias,
        ("t_block", "kernel"): kernels[0],
        ("t_block", "bias"): biases[0],
        ("blocks", "stacked", "scale_shift_table"): at_t - at_t[0],
        ("final_layer", "scale_shift_table"): final,
    }
    used = {path for path in source if "modulation" in path} | {("label_table",)}
    report.left_out = ["label_table (all but the null class)"]
    report.computed = _names(computed)
    return _copy_rest(source, target, computed, used, report, allowed_new=_is_text)


def resize(
    old: Params, old_config: BackboneConfig, fresh: Params, config: BackboneConfig
) -> tuple[Params, Report]:
    """Initializes a PixArt from a PixArt, or a DiT from a DiT, possibly for other images or captions.

    All arrays are copied, with these exceptions:

    - Position embeddings are not parameters; they follow from the config.
    - If the old model has no size embedders, they are new and their last layer is zero, so that the new
      network initially equals the old one for any size conditions. (The official code initializes them
      randomly, which changes t from the start.)
    - A null caption of another length is new: T5's features of the empty text replace it.
    - Where the new model compresses keys and values and the old one does not, the compression is new: it
      averages, and normalizes the averages (PixArt-Σ §3.2).

    Args:
      old, old_config: weights and config of the old network.
      fresh: random weights of the new network.
      config: config of the new network.

    Returns:
      The new weights and a report.

    Raises:
      UserError: if the models differ in more than size conditions, base size, position scale, text length and
        newly compressed blocks.
    """
    if old_config.kind != config.kind:
        raise UserError(
            f"the old model is a '{old_config.kind}' and the new one a '{config.kind}': to initialize a "
            "PixArt from a DiT, set init.method=reparameterize and init.path to a checkpoint "
            "(pixart_jax.convert makes one)."
        )
    reads_text = "text" in config.conditions
    own = ("text_dim", "qk_norm") if reads_text else ("num_classes",)
    if old_config.compressed_layers:
        own = (*own, "kv_compression", "kv_compression_factor")
    _same(
        old_config,
        config,
        ("depth", "hidden_size", "num_heads", "patch_size", "in_channels", "out_channels", *own),
    )
    source, target = _flat(old), _flat(fresh)
    computed, report = {}, Report()
    if reads_text:
        if old_config.size_conditions and not config.size_conditions:
            raise UserError(
                "the old model has size conditions and the new one does not: set model.size_conditions to "
                "True."
            )
        computed = _compression(source, old_config, target, config)
        report.computed = _names(computed)
        if source[NULL_TEXT,].shape != target[NULL_TEXT,].shape:
            del source[NULL_TEXT,]
    return _copy_rest(source, target, computed, set(), report, allowed_new=_is_new_in_resize)


def _compression(source: Flat, old_config: PixArtConfig, target: Flat, config: PixArtConfig) -> Flat:
    """The arrays of a compression of other blocks than before: those of the old blocks are kept."""
    old, new = old_config.compressed_layers, config.compressed_layers
    if not old or old == new:
        return {}
    if not set(old) <= set(new):
        raise UserError(
            f"the old model compresses the keys and values of blocks {old_config.kv_compression_layers}, the "
            f"new one only of {config.kv_compression_layers}: set model.kv_compression_layers so "
            "that it contains the old ones."
        )
    rows = np.array([new.index(layer) for layer in old])
    return {
        path: jnp.asarray(value).at[rows].set(source[path])
        for path, value in target.items()
        if _is_compression(path)
    }


def _copy_rest(source: Flat, target: Flat, computed: Flat, used: set, report: Report, allowed_new):
    """Fills `target` with computed arrays, else arrays of the same path, else arrays that may be new."""
    out, problems = {}, []
    for path, fresh in target.items():
        name = ".".join(path)
        if path in computed:
            value = computed[path]
        elif path in source:
            value = source[path]
            report.copied.append(name)
        elif allowed_new(path):
            value = jnp.zeros_like(fresh) if _is_size(path) and path[1] == "fc2" else fresh
            report.new.append(name)
        else:
            problems.append(f"{name} is missing in the old model")
            continue
        if value.shape != fresh.shape:
            problems.append(f"{name} is {value.shape} in the old model and {fresh.shape} in the new one")
        out[path] = value
    problems += [
        f"{'.'.join(path)} is unknown to the new model" for path in source.keys() - target.keys() - used
    ]
    if problems:
        raise UserError("the weights of the old model do not fit: " + "; ".join(sorted(problems)) + ".")
    return traverse_util.unflatten_dict(out), report


def _is_new_in_resize(path: tuple[str, ...]) -> bool:
    return _is_size(path) or _is_compression(path) or path == (NULL_TEXT,)


def _is_compression(path: tuple[str, ...]) -> bool:
    return path[:2] == ("blocks", "compression")


def _is_size(path: tuple[str, ...]) -> bool:
    return path[0] in ("size_embedder", "ratio_embedder")


def _is_text(path: tuple[str, ...]) -> bool:
    return path[0] in ("text_proj", NULL_TEXT) or "cross_attn" in path or _is_size(path)


def _timestep_embedding(flat: Flat) -> jax.Array:
    """Computes t_emb(t*), [D] float32."""
    features = sinusoid(jnp.asarray([REPARAMETERIZATION_TIMESTEP], jnp.float32))
    hidden = features @ flat["t_embedder", "fc1", "kernel"] + flat["t_embedder", "fc1", "bias"]
    return (jax.nn.silu(hidden) @ flat["t_embedder", "fc2", "kernel"] + flat["t_embedder", "fc2", "bias"])[0]


def _flat(params: Params) -> Flat:
    return traverse_util.flatten_dict(params)


def _names(flat: Flat) -> list[str]:
    return [".".join(path) for path in flat]


def _same(old: Any, new: Any, fields: tuple[str, ...]) -> None:
    differences = [
        f"{name} {getattr(old, name)} -> {getattr(new, name)}"
        for name in fields
        if not np.array_equal(getattr(old, name), getattr(new, name))
    ]
    if differences:
        raise UserError(
            f"the weights of init.path and the model differ: {', '.join(differences)}. Set the fields of "
            "config.model to the values of the weights (model.size=custom allows any)."
        )
