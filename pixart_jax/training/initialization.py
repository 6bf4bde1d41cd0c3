"""The weights of step 0: random, or taken from the previous stage or from a weight file.

`reparameterize` and `resize` take the weights of the previous stage and random weights of the new network.
They return the new weights with a report that accounts for every array: copied, computed from the old ones,
new, or left out. An array that no rule covers raises.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from pixart_jax.config import TrainConfig
from pixart_jax.errors import UserError
from pixart_jax.models.dit import DiTConfig
from pixart_jax.models.layers import BackboneConfig, sinusoid
from pixart_jax.models.pixart import NULL_TEXT, PixArtConfig
from pixart_jax.training.objectives import NETWORK, Objective, Stream, stream_key
from pixart_jax.training.state import init_networks
from pixart_jax.weights.checkpoints import read_weights

if TYPE_CHECKING:
    from pixart_jax.data.loader import Dataset

# The timestep at which a re-parameterized network equals the DiT it came from (PixArt-α §2.3).
REPARAMETERIZATION_TIMESTEP = 500

Params = dict[str, Any]
Flat = dict[tuple[str, ...], Any]


def initial_params(
    config: TrainConfig,
    objective: Objective,
    dataset: Dataset,
    say: Callable[[str], None],
) -> dict[str, Params]:
    """The weights of step 0 of every network of an objective.

    Args:
      config: the stage; `init` names what its network starts from.
      objective: its networks.
      dataset: the training data, whose null caption becomes that of the network.
      say: takes lines about where the weights come from.

    Raises:
      UserError: the weights cannot be read or do not fit, or the null caption has another shape.
    """
    params = jax.jit(lambda: init_networks(objective, stream_key(config.seed, Stream.INIT)))()
    params[NETWORK] = _starting_weights(config, params[NETWORK], say)
    if NULL_TEXT in params[NETWORK] and config.guidance.null_text == "t5_empty":
        null, old = dataset.null_text(), params[NETWORK][NULL_TEXT]
        if null.shape != old.shape:
            raise UserError(
                f"the null caption of {config.data.train} is {null.shape}, the model takes {old.shape}: "
                "precompute with the same features.text_length and encoder."
            )
        params[NETWORK][NULL_TEXT] = jnp.asarray(null, jnp.float32)
    return objective.start(params)


def _starting_weights(config: TrainConfig, fresh: Params, say: Callable[[str], None]) -> Params:
    init = config.init
    if init.handover == "none":
        say("a fresh start: random weights")
        return fresh
    if init.handover == "weights":
        from pixart_jax.weights.loading import read_any  # every weight format; most runs need none

        # An official file does not tell its heads, nor a diffusers folder the length of its captions.
        facts = {name: getattr(config.model, name, None) for name in ("num_heads", "text_length")}
        read = read_any(init.path, **facts)
        old, before = read.params, read.config
        for note in read.notes:
            say(note)
    else:
        old, before = read_weights(init.path)
    # Weights of any kind fit a network of the same shape, at any image size.
    convert = reparameterize if init.handover == "reparameterize" else resize
    params, report = convert(old, before.model, fresh, config.model)
    say(f"{init.handover} from {init.path}:\n{report}")
    return params


@dataclasses.dataclass
class Report:
    """What happened to every array of the old and the new model."""

    copied: list[str] = dataclasses.field(default_factory=list)
    computed: list[str] = dataclasses.field(default_factory=list)
    new: list[str] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        rows = [
            (field.name.replace("_", " "), getattr(self, field.name)) for field in dataclasses.fields(self)
        ]
        return "\n".join(
            f"  {name:<9} {len(paths):>3}  {', '.join(sorted(paths))}" for name, paths in rows if paths
        )


def reparameterize(
    old: Params, old_config: DiTConfig, fresh: Params, config: PixArtConfig
) -> tuple[Params, Report]:
    """DiT -> PixArt by re-parameterization of adaLN (PixArt-α §2.3, "re-parameterization").

    DiT modulates block i by A_i(SiLU(c)), c = t_emb(t) + y; PixArt by table_i + T(SiLU(t_emb(t))). With t* =
    500 and c* = t_emb(t*) + y_0:

        T       := A_0, the first block's projection (the paper: computed "only at the first block")
        table_i := A_i(SiLU(c*)) - A_0(SiLU(c*)),  so that table_0 = 0
        final   := A_final(SiLU(c*)) - c*,  since PixArt's last layer adds its table to t itself

    The paper takes S(i) "without c". Here that is the *null class* y_0, which DiT learns by dropping labels:
    it is the network's own idea of "any image", whereas y = 0 is an input it never saw. y_0 is folded into
    the bias of the timestep embedder, so that t_emb(t) + y_0 is what PixArt sees at every t. The
    cross-attention output is zero, as in fresh weights. At t* the new network therefore computes exactly what
    DiT computes for the null class, whatever the text.

    Everything else of equal name is copied. New: cross-attention, caption projection, null caption, size
    embedders (whose last layer is set to zero, so that they do not disturb t at the start). Left out: the
    labels.

    Raises:
      UserError: the two models differ in width, depth, heads, patch or channels.
    """
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
    """PixArt -> PixArt, or DiT -> DiT, at another size: every array is copied; positions follow the config.

    Size embedders that the old model lacks are new, with a zero last layer: the new network starts as the old
    one whatever the image size (the official code leaves them random, which disturbs t at once).

    Raises:
      UserError: the two models differ in more than size conditions, base size and position scale.
    """
    if old_config.kind != config.kind:
        raise UserError(
            f"the old model is a '{old_config.kind}' and the new one a '{config.kind}': a PixArt starts from "
            "a DiT by init.handover=reparameterize, from a checkpoint (convert makes one)."
        )
    reads_text = "text" in config.conditions
    own = "text_dim" if reads_text else "num_classes"
    _same(
        old_config,
        config,
        ("depth", "hidden_size", "num_heads", "patch_size", "in_channels", "out_channels", own),
    )
    source, target = _flat(old), _flat(fresh)
    if reads_text:
        if old_config.size_conditions and not config.size_conditions:
            raise UserError(
                "the old model has size conditions and the new one has not: set model.size_conditions to "
                "True."
            )
        if source[NULL_TEXT,].shape != target[NULL_TEXT,].shape:
            raise UserError(
                f"the null caption has {source[NULL_TEXT,].shape[0]} tokens in the old model and "
                f"{target[NULL_TEXT,].shape[0]} in the new: keep model.text_length."
            )
    return _copy_rest(source, target, {}, set(), Report(), allowed_new=_is_size)


def _copy_rest(source: Flat, target: Flat, computed: Flat, used: set, report: Report, allowed_new):
    """Fills `target`: computed arrays, arrays of equal path and shape, then the ones that may be new."""
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
            problems.append(f"{name} has no source")
            continue
        if value.shape != fresh.shape:
            problems.append(f"{name} is {value.shape} in the old model and {fresh.shape} in the new")
        out[path] = value
    problems += [
        f"{'.'.join(path)} has no place in the new model" for path in source.keys() - target.keys() - used
    ]
    if problems:
        raise UserError("the handover does not fit: " + "; ".join(sorted(problems)) + ".")
    return traverse_util.unflatten_dict(out), report


def _is_size(path: tuple[str, ...]) -> bool:
    return path[0] in ("size_embedder", "ratio_embedder")


def _is_text(path: tuple[str, ...]) -> bool:
    return path[0] in ("text_proj", NULL_TEXT) or "cross_attn" in path or _is_size(path)


def _timestep_embedding(flat: Flat) -> jax.Array:
    """t_emb(t*) [D], float32."""
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
            f"the stage before has another shape: {', '.join(differences)}. Give both stages the same values."
        )
