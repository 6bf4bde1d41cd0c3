"""Loads parameters and config from any format: our checkpoints, official files, diffusers folders, DiT."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from pixart_jax.config import (
    DiffusionConfig,
    FeaturesConfig,
    GuidanceConfig,
    InitConfig,
    TextEncoderConfig,
    TrainConfig,
    from_dict,
)
from pixart_jax.denoiser import abstract_model, merge_adapters
from pixart_jax.errors import UserError, at_least, did_you_mean, one_of
from pixart_jax.hub import PREFIX, RELEASES_OWNER, cached, is_hub, local, name_of
from pixart_jax.models.configs import COMPRESSION_MODES, OFFICIAL_MODES, WEIGHTS_DTYPES, AdapterConfig
from pixart_jax.models.dit import DiT
from pixart_jax.models.pixart import PixArt, has_null_caption
from pixart_jax.models.quantization import kernels, quantize_blocks, quantize_parameters
from pixart_jax.readers import check_shape, parse_json, read_json
from pixart_jax.weights import backbones, cards, configs
from pixart_jax.weights.adapter_files import Specs, is_adapter, read_adapters
from pixart_jax.weights.adapters import Adapter, merge
from pixart_jax.weights.checkpoints import checkpoint_folder, is_checkpoint, read_config, read_network
from pixart_jax.weights.families import ALPHA, INDEX, SIGMA, Family, choose_family, family_of_pipeline
from pixart_jax.weights.files import COPY, Tensors, open_groups, pick_group
from pixart_jax.weights.hub import download_hint, is_sigma_release, local_network, network_folder

# Optional arguments of `read_any`. Properties of the model that a file may not contain:
FACTS = ("num_heads", "base_size", "position_scale", "text_length", "kv_compression")
# Conventions that the model is sampled with:
CONVENTIONS = (
    *("null_text", "null_mask", "guided_channels", "aspect_ratio"),
    *("latent_scale", "clean_caption", "lower_case"),
)
# How the model is run:
RUNTIME = ("dtype", "remat", "scan_layers", "attention")
_TYPES = {
    **dict.fromkeys(("num_heads", "base_size", "text_length", "guided_channels"), int),
    **dict.fromkeys(("position_scale", "latent_scale"), (int, float)),
    **dict.fromkeys(("scan_layers", "clean_caption", "lower_case"), bool),
}

# What an export of this project stores in the header of a file.
_FACTS_SHAPE = {
    "num_heads?": range(1, 2**31),
    "kv_compression?": str,
    "guidance?": dict,
    "diffusion?": dict,
    "latent_scale?": float,
    "clean_caption?": bool,
    "lower_case?": bool,
    "licence?": str,
}

_CONVENTIONS_OF = {
    # The official samplers: a learned null array under the caption's mask, the bucket's key as the aspect
    # ratio.
    "official": GuidanceConfig(null_text="token", null_mask="caption", aspect_ratio="bucket"),
    "diffusers": GuidanceConfig(null_text="t5_empty", null_mask="own", aspect_ratio="true"),
    "dit": GuidanceConfig(),
}
_MOST_STAGES = 20
_LICENCE_OF = {
    "official": "openrail++",
    "diffusers": "openrail++",
    "dit": "cc-by-nc-4.0",
    "checkpoint": "other",
}


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of a backbone, with their config, licence and other information about them."""

    # Nested dict of float32 arrays in the tree of `config.model`.
    params: dict[str, Any]
    # Model, guidance conventions, latent scale; for a checkpoint, the config of its run.
    config: TrainConfig
    # 'checkpoint', 'official', 'diffusers' or 'dit'.
    source: str
    # A key of `weights.cards.LICENCES`.
    licence: str
    # Messages for the user who loads the weights.
    notes: tuple[str, ...] = ()
    # How the weights were made: step, versions, git revision, config of the run.
    manifest: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # The adapter that the run has trained, which is merged into `params`.
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)


def load_model(
    path: str | Path,
    weights: str | None = None,
    *,
    adapter: Specs = (),
    adapter_alpha: float | None = None,
    weights_dtype: str = "float32",
    **overrides: Any,
) -> PixArt | DiT:
    """A model with the weights of a file or folder of any format.

        model = load_model("PixArt-XL-2-512x512.pth")
        out = model(latents, timesteps, text, text_mask)
        model = load_model("PixArt-XL-2-512x512.pth", adapter="pixel-art.safetensors:0.8")

    Args:
      path, weights, overrides: as for `pixart_jax.weights.loading.read_any`.
      adapter: LoRA or DoRA files to merge into the weights: 'PATH' or 'PATH:WEIGHT', a list of these, or
        {path: weight}.
      adapter_alpha: alpha of adapters that do not state their scale.
      weights_dtype: 'float32', or 'int8' for the kernels of the blocks. An int8 model is for sampling.

    Returns:
      the model; `model.config` describes it.

    Raises:
      UserError: `pixart_jax.weights.loading.read_any` raises it; an adapter is broken or does not fit; or
        another `weights_dtype`.
    """
    one_of("weights_dtype", weights_dtype, WEIGHTS_DTYPES)
    read = with_adapters(read_any(path, weights, **overrides), read_adapters(adapter, adapter_alpha))
    for note in read.notes:
        logging.warning("%s", note)
    return build_model(read, weights_dtype)


def with_adapters(read: Weights, adapters: Sequence[tuple[Adapter, float]]) -> Weights:
    """The weights with adapters merged into them; the manifest names the adapters."""
    if not adapters:
        return read
    params = merge(read.params, read.config.model, adapters)
    merged = [
        {"name": Path(adapter.name).name, "sha256": adapter.digest, "weight": weight}
        for adapter, weight in adapters
    ]
    notes = (*read.notes, *adapter_notes(read, adapters))
    return dataclasses.replace(
        read, params=params, notes=notes, manifest={**read.manifest, "adapters": merged}
    )


def adapter_notes(read: Weights, adapters: Sequence[tuple[Adapter, float]]) -> tuple[str, ...]:
    """Messages for the user who adds adapters to weights."""
    notes = [note for adapter, _ in adapters for note in adapter.notes]
    if adapters and read.adapter:
        notes.append(
            "the adapter that the run has trained is already part of its weights: --adapter adds to it. To "
            "use the run's adapter with another weight, give the base weights instead of the run."
        )
    return tuple(notes)


def build_model(weights: Weights, weights_dtype: str = "float32") -> PixArt | DiT:
    """The module of `weights`; without `scan_layers`, every block has its own arrays.

    Args:
      weights: config and float32 parameters.
      weights_dtype: 'float32', or 'int8' for the kernels of the blocks (`models/quantization.py`), which are
        quantized before they are put on the device. Such a model is for sampling.

    Raises:
      UserError: another `weights_dtype`.
    """
    one_of("weights_dtype", weights_dtype, WEIGHTS_DTYPES)
    config, params = weights.config.model, weights.params

    def make() -> PixArt | DiT:
        network = config.make(rngs=nnx.Rngs(0))
        if weights_dtype == "int8":
            quantize_blocks(network)
        return network

    if weights_dtype == "int8":
        inputs = kernels(nnx.merge(*abstract_model(config)))
        flat = nnx.traversals.flatten_mapping(params).items()
        params = nnx.traversals.unflatten_mapping(dict(quantize_parameters(flat, inputs)))
    graph, state = nnx.split(nnx.eval_shape(make))
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, params))
    model = nnx.merge(graph, state)
    if not config.scan_layers:
        model.blocks.unstack()
    return model


def read_any(
    path: str | Path,
    weights: str | None = None,
    *,
    assumed: TrainConfig | None = None,
    pipeline: str | Path | None = None,
    **overrides: Any,
) -> Weights:
    """Reads the weights of a backbone.

    Args:
      path: an official PixArt or DiT file (.safetensors, .pth, .pt); the folder of a diffusers transformer or
        pipeline; a run directory, a step of it, or a checkpoint that `convert` wrote; or one of these on the
        hub, hub:OWNER/NAME[@REVISION][/PATH].
      weights: 'ema' or 'raw', where there are both; None for the moving average if there is one.
      assumed: config of a run that uses the weights. Its number of heads, base size, position scale, text
        length, latent scale and noise schedule are used where the file does not contain them. Unlike
        overrides, they may differ from the file's.
      pipeline: a pipeline folder that the weights are used with. Its noise schedule is used where the file
        does not contain one, and so is its family (`families.choose_family`).
      overrides: properties that the file does not contain: num_heads (default 16 at width 1152), base_size,
        position_scale, text_length (default: that of the family), kv_compression (default 'conv' if there
        are weights for it); how the model is sampled: null_text, null_mask, guided_channels, aspect_ratio,
        latent_scale, clean_caption, lower_case; how it is run: dtype, remat, scan_layers, attention. See
        `models/configs.py` and `GuidanceConfig`.

    Raises:
      UserError: there is nothing to read; the file is broken; tensors are unknown, missing or of the wrong
        shape (the message names the first ones, with both names); a tensor has values that are not finite;
        or an override is unknown, missing or contradicts the file.
    """
    known = (*FACTS, *CONVENTIONS, *RUNTIME)
    for name in overrides:
        if name not in known:
            raise UserError(
                f"argument '{name}' is unknown: choose among {', '.join(known)}.{did_you_mean(name, known)}"
            )
    given = {name: value for name, value in overrides.items() if value is not None}
    for name, value in given.items():
        kind = _TYPES.get(name, str)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            wanted = {int: "an integer", bool: "True or False", str: "a text"}.get(kind, "a number")
            raise UserError(f"argument {name}={value!r:.200} is not of the right type: give {wanted}.")
        if name in ("position_scale", "latent_scale"):
            configs.check_factor(f"argument {name} is", value)
        elif kind is int:
            at_least(f"argument {name}", value, 1)
    if "kv_compression" in given:
        given["kv_compression"] = compression_mode(given["kv_compression"])
    if is_sigma_release(name_of(path)) and assumed is None:
        given.setdefault("text_length", SIGMA.text_length)
    path = local_network(path)
    pipeline = local(pipeline, parts=()) if pipeline is not None else None
    if not path.exists():
        raise UserError(
            f"weights '{path}' do not exist: give a weight file, a diffusers folder or a run directory"
            f"{download_hint(path)}."
        )
    if is_checkpoint(path):
        read = _read_checkpoint(path, weights, given)
    else:
        read = _read_foreign(path, weights, given, assumed, pipeline)
    if read.config.guidance.null_text == "token" and not has_null_caption(read.params):
        raise UserError(
            f"null_text='token', and '{path}' holds no null caption (diffusers has none): use "
            "null_text='t5_empty'."
        )
    return read


def compression_mode(name: str) -> str:
    """Returns a mode of key and value compression by our name or by that of the official code.

    Raises:
      UserError: the name is unknown.
    """
    ours = {official: name for name, official in OFFICIAL_MODES.items()}.get(name, name)
    one_of("kv_compression", ours, COMPRESSION_MODES)
    return ours


def _read_checkpoint(path: Path, weights: str | None, given: Mapping[str, Any]) -> Weights:
    params, config = read_network(path, weights or "ema")
    adapter = config.adapter
    params, config = merge_adapters(config, params)
    for name in FACTS:
        stored = getattr(config.model, name, None)
        if name in given and given[name] != stored:
            raise UserError(
                f"{name}={given[name]} contradicts the checkpoint, which has {stored}: leave it out."
            )
    manifest = read_json(checkpoint_folder(path) / "metadata" / "metadata", COPY, lenient=True)
    config = _with_runtime(_with_conventions(config, given), given)
    return Weights(params, config, "checkpoint", licence_of(path), manifest=manifest, adapter=adapter)


def licence_of(path: str | Path) -> str:
    """Returns the licence of weights, a key of `cards.LICENCES`, without reading their arrays.

    A run has the licence of the weights that it started from. If there are none, or if they do not exist any
    more, it is 'other'. Nothing is downloaded.
    """
    try:
        # The stages of a run are few. A longer chain is a circle.
        for _ in range(_MOST_STAGES):
            found = cached(path)
            if found is None:
                released = name_of(path).startswith(f"{PREFIX}{RELEASES_OWNER}/")
                return _LICENCE_OF["diffusers" if released else "checkpoint"]
            path = network_folder(found) if is_hub(path) else found
            if not is_checkpoint(path):
                break
            licence, init = cards.read_licence(path), read_config(checkpoint_folder(path)).init.path
            if licence or not init:
                return licence or _LICENCE_OF["checkpoint"]
            path = init
        path = Path(path)
        if (path / INDEX).is_file():
            path = path / "transformer"
        groups = {name: backbones.strip_prefixes(group)[0] for name, group in open_groups(path).items()}
        return _foreign_licence(path, pick_group(groups, None))
    except UserError:
        return "other"


def _foreign_licence(path: Path, tensors: Tensors) -> str:
    licence = _notes(tensors)[0].get("licence") or cards.read_licence(path)
    licence = licence or _LICENCE_OF[backbones.detect(tensors)]
    return licence if licence in cards.LICENCES else "other"


def _read_foreign(
    path: Path,
    weights: str | None,
    given: Mapping[str, Any],
    config: TrainConfig | None,
    pipeline: str | Path | None,
) -> Weights:
    scale = None
    diffusion = config.diffusion if config else DiffusionConfig()
    if pipeline is not None:
        diffusion = configs.read_noise_schedule(Path(pipeline), diffusion)
    assumed = (
        {name: vars(config.model)[name] for name in FACTS if name in vars(config.model)} if config else {}
    )
    folders = [Path(folder) for folder in (path, pipeline) if folder is not None]
    if (path / INDEX).is_file():
        if (path / "vae" / "config.json").is_file():
            scale = read_json(path / "vae" / "config.json", COPY).get("scaling_factor")
        diffusion = configs.read_noise_schedule(path, diffusion)
        path = path / "transformer"
    groups, notes = {}, []
    for name, group in open_groups(path).items():
        groups[name], stripped = backbones.strip_prefixes(group)
        notes += [note for note in stripped if note not in notes]
    tensors = pick_group(groups, weights)
    if tensors is groups.get("ema") and "raw" in groups:
        tensors, note = _with_trained_null(tensors, groups["raw"])
        notes += note
    if is_adapter(tensors):
        raise UserError(
            f"'{tensors.path}' is an adapter, not the weights of a network: give the weights that it belongs "
            "to, and this one as --adapter (adapter=…)."
        )
    kind = backbones.detect(tensors)
    facts, manifest = _notes(tensors)
    known = {**facts, **{name: value for name, value in given.items() if name in FACTS}}
    for name in FACTS:
        if name in facts and name in given and facts[name] != given[name]:
            raise UserError(
                f"{name}={given[name]} contradicts the notes of '{path}', which have {facts[name]}: leave it "
                "out."
            )
    # Exports of this project state everything. What version 0.1 did not know is as in alpha.
    family = ALPHA if facts or kind == "dit" else _family_of(tensors, given, config, folders)
    assumed.setdefault("text_length", family.text_length)
    conventions, null_text = kind, True
    if kind == "official":
        model = configs.official_config(tensors, known, assumed)
        if model.compressed_layers and "kv_compression" not in known:
            notes.append(
                f"'{tensors.path}' compresses keys and values in blocks {model.kv_compression_layers} and "
                f"does not state how: '{model.kv_compression}' is assumed (kv_compression=…)."
            )
        null_text = backbones.OFFICIAL_NULL_TEXT in tensors
        if not null_text:
            # Trainers that use diffusers' conventions export such files.
            conventions = "diffusers"
            notes.append(
                f"'{tensors.path}' holds no null caption ({backbones.OFFICIAL_NULL_TEXT}): guidance uses "
                "T5's features of the empty text, and the conventions of diffusers."
            )
    elif kind == "dit":
        model = configs.dit_config(tensors, known, assumed)
        notes.append(cards.LICENCES["cc-by-nc-4.0"])
    else:
        folder = path if path.is_dir() else path.parent
        file = folder / "config.json"
        stated = read_json(file, COPY) if file.is_file() else None
        model = configs.diffusers_config(tensors, stated, known, assumed)
    params = backbones.import_backbone(kind, tensors, model, null_text=null_text)
    scale = facts.get("latent_scale", scale)
    if family is not ALPHA:
        notes += _of_family(family, tensors, given, config, scale)
    if scale is None:
        scale = (config.features if config else family).latent_scale
    configs.check_factor(f"'{path}' has the scaling factor", scale)
    features = FeaturesConfig(
        text="text" in model.conditions,
        latent_scale=float(scale),
        text_encoder=TextEncoderConfig(
            clean_caption=facts.get("clean_caption", family.clean_caption),
            lower_case=facts.get("lower_case", family.lower_case),
        ),
    )
    config = TrainConfig(
        name=f"{kind}_weights",
        model=model,
        guidance=facts.get("guidance", _CONVENTIONS_OF[conventions]),
        features=features,
        diffusion=dataclasses.replace(diffusion, **facts.get("diffusion", {})),
        init=InitConfig("weights", name_of(path) if is_hub(name_of(path)) else path.name),
    )
    config = _with_runtime(_with_conventions(config, given), given)
    return Weights(params, config, kind, _foreign_licence(path, tensors), tuple(notes), manifest)


def _family_of(
    tensors: Tensors, given: Mapping[str, Any], config: TrainConfig | None, folders: Sequence[Path]
) -> Family:
    text_length = given.get("text_length")
    # Weights are of the family of a run that uses them, unless it adapts them or their folder says otherwise.
    other = config is None or config.init.new_vae or ALPHA in map(family_of_pipeline, folders)
    if text_length is None and not other:
        text_length = getattr(config.model, "text_length", None)
    return choose_family(_null_caption(tensors), text_length, folders)


def _null_caption(tensors: Tensors) -> int | None:
    """Tokens of the null caption of an official file; None if it has none."""
    shape = tensors.shapes.get(backbones.OFFICIAL_NULL_TEXT, ())
    return shape[0] if len(shape) == 2 else None


def _of_family(
    family: Family,
    tensors: Tensors,
    given: Mapping[str, Any],
    config: TrainConfig | None,
    scale: float | None,
) -> list[str]:
    """A note of what is assumed because of the family; none if everything is known."""
    values = {"text_length": family.text_length} if config is None and _null_caption(tensors) is None else {}
    if config is None and scale is None:
        values["latent_scale"] = family.latent_scale
    values["clean_caption"] = family.clean_caption
    if not given.get("clean_caption"):
        values["lower_case"] = family.lower_case
    assumed = ", ".join(f"{name} {value}" for name, value in values.items() if name not in given)
    return [f"read as {family.name}, with what its files do not state: {assumed}."] if assumed else []


def _notes(tensors: Tensors) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what an export of this project stored in the file's header: the facts and the manifest."""
    try:
        facts, manifest = (
            parse_json(tensors.metadata.get(key, "{}")) for key in (cards.FACTS_KEY, cards.MANIFEST_KEY)
        )
        check_shape(facts, _FACTS_SHAPE)
        check_shape(manifest, dict)
        # Networks without compression do not state it.
        if "kv_compression" in facts:
            one_of("kv_compression", facts["kv_compression"], OFFICIAL_MODES)
        if "guidance" in facts:
            facts["guidance"] = from_dict(facts["guidance"], GuidanceConfig, "guidance.")
        if "diffusion" in facts:
            schedule = from_dict(facts["diffusion"], DiffusionConfig, "diffusion.")
            facts["diffusion"] = {name: getattr(schedule, name) for name in configs.NOISE_SCHEDULE}
        return facts, manifest
    except ValueError as error:
        raise UserError(
            f"'{tensors.path}' has unreadable notes of an export in its header ({error}): export it again."
        ) from error


def _with_trained_null(ema: Tensors, raw: Tensors) -> tuple[Tensors, list[str]]:
    """The moving average with the null caption of the raw weights.

    The official trainer copies the model for its average before it loads the initial weights, and it averages
    only parameters. The average of a fine-tuned run therefore has a random null caption that no network was
    trained with.
    """
    name = backbones.OFFICIAL_NULL_TEXT
    if name not in ema or name not in raw or np.array_equal(ema[name], raw[name]):
        return ema, []
    note = f"{name} of the moving average was unused in training: taken from the raw weights of '{ema.path}'."
    shapes = {**ema.shapes, name: raw.shapes[name]}
    return Tensors(ema.path, shapes, lambda key: (raw if key == name else ema)[key], ema.metadata), [note]


def _with_conventions(config: TrainConfig, given: Mapping[str, Any]) -> TrainConfig:
    changes = {name: given[name] for name in CONVENTIONS if name in given}
    scale = changes.pop("latent_scale", config.features.latent_scale)
    of_text = {name: changes.pop(name) for name in ("clean_caption", "lower_case") if name in changes}
    encoder = dataclasses.replace(config.features.text_encoder, **of_text)
    if "guided_channels" in changes:
        changes["channels"] = changes.pop("guided_channels")
    return dataclasses.replace(
        config,
        guidance=dataclasses.replace(config.guidance, **changes),
        features=dataclasses.replace(config.features, latent_scale=scale, text_encoder=encoder),
    )


def _with_runtime(config: TrainConfig, given: Mapping[str, Any]) -> TrainConfig:
    changes = {name: given[name] for name in RUNTIME if name in given}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes)).for_sampling()
