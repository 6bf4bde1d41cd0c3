"""The configuration of a training stage, as frozen dataclasses that check their values when they are made.

A file in `configs/` builds a `TrainConfig` and converts it with `to_config_dict`, so that every field can be
set with a flag (`--config.optimizer.learning_rate=1e-4`). `from_config_dict` converts the result back and
raises a `UserError` for unknown fields and wrong types. All intervals are in steps; a step is one optimizer
update.
"""

from __future__ import annotations

import dataclasses
import json
import runpy
import typing
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict

from pixart_jax.constants import VAE_DOWNSAMPLING
from pixart_jax.errors import UserError, at_least, did_you_mean, one_of
from pixart_jax.models.dit import DiTConfig
from pixart_jax.models.layers import SIZES, BackboneConfig
from pixart_jax.models.pixart import PixArtConfig

T = TypeVar("T")

MODELS = {cls.kind: cls for cls in (PixArtConfig, DiTConfig)}
OBJECTIVES = ("diffusion",)
INIT_METHODS = ("none", "reparameterize", "resize", "weights")


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """The tokenizer and the text encoder that convert captions to text features."""

    # HuggingFace name or folder of the tokenizer, or 'byt5' (tokenizes bytes; needs no download).
    tokenizer: str = "PixArt-alpha/PixArt-XL-2-1024-MS"
    # Subfolder of the tokenizer in its repository; '' for none.
    tokenizer_subfolder: str = "tokenizer"
    # Folder with T5 encoder weights (HuggingFace layout), or 'random' for a fixed random encoder of the shape
    # below.
    weights: str = ""
    # Shape and seed of the random encoder. An encoder from a folder has its own config instead.
    d_model: int = 4096
    d_ff: int = 10240
    d_kv: int = 64
    num_heads: int = 64
    num_layers: int = 24
    seed: int = 0
    # Compute dtype of the encoder.
    dtype: str = "bfloat16"
    # Clean captions as diffusers does, which applies the cleaning twice (HTML, links, quotes, …).
    clean_caption: bool = True


@dataclasses.dataclass(frozen=True)
class FeaturesConfig:
    """How `precompute` encodes images and captions. A stage is trained on features with the same settings."""

    # Side of the images in pixels; with buckets, the side of the square bucket. 0: the size that
    # `model.base_size` implies.
    image_size: int = 0
    # 'single' (centre crop to a square) or 'official' (the 40 aspect-ratio buckets).
    buckets: str = "single"
    # 'vae' (mean and std of the posterior) or 'pixels' (the latents are the pixels, for tests and small
    # images).
    codec: str = "vae"
    # Folder of the VAE (diffusers layout), for codec 'vae'.
    vae: str = "stabilityai/sd-vae-ft-ema"
    # Scaling factor: the model gets the VAE's latents times this (SD: 0.18215, SDXL: 0.13025; pixels: 1).
    latent_scale: float = 0.18215
    # Whether to write text features; stage 1 needs none.
    text: bool = True
    # Maximum caption length in tokens. Longer captions are truncated, and `precompute` lists them. 0:
    # `model.text_length`.
    text_length: int = 0
    # How text features are stored: 'bfloat16', 'float32' or 'int8' (with one scale per token).
    text_dtype: str = "bfloat16"
    # How the VAE's mean and std are stored: 'float16', 'bfloat16' or 'float32'.
    latent_dtype: str = "float16"
    text_encoder: TextEncoderConfig = TextEncoderConfig()

    def __post_init__(self):
        one_of("features.buckets", self.buckets, ("single", "official"))
        one_of("features.codec", self.codec, ("vae", "pixels"))
        one_of("features.text_dtype", self.text_dtype, ("bfloat16", "float32", "int8"))
        one_of("features.latent_dtype", self.latent_dtype, ("float16", "bfloat16", "float32"))
        at_least("features.image_size", self.image_size, 0)
        at_least("features.text_length", self.text_length, 0)

    @property
    def latent_side(self) -> int:
        """Side of the latents of a square image."""
        return self.image_size // self.downsampling

    @property
    def downsampling(self) -> int:
        """Pixels per latent position along each side."""
        return VAE_DOWNSAMPLING if self.codec == "vae" else 1


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The training data, and how it is read."""

    # Folders of feature shards, comma-separated. Several folders are mixed.
    train: str = ""
    # Relative sampling weight of each folder, comma-separated; '' weighs folders by their number of records.
    weights: str = ""
    # Folder of held-out feature shards; '' for no validation.
    validation: str = ""
    # If True, 'train' and 'validation' name images, as for `precompute --images`, and the encoders run during
    # training. For small data sets.
    on_the_fly: bool = False
    # Step from which on this data is used. Set it to continue a run whose data has changed: its value is the
    # step of the checkpoint that the run continues from. Keep it for later restarts.
    first_step: int = 0
    # Samples per optimizer update, in total over all devices and processes.
    batch_size: int = 256
    # Number of reader threads, and of batches prepared in advance, per process.
    threads: int = 4
    prefetch: int = 4

    def __post_init__(self):
        at_least("data.first_step", self.first_step, 0)
        at_least("data.batch_size", self.batch_size, 1)
        at_least("data.threads", self.threads, 1)
        at_least("data.prefetch", self.prefetch, 1)


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The noise schedule and the loss."""

    # Number of timesteps of the linear schedule, and its first and last beta.
    num_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    # Gamma of the min-SNR weighting of the noise error; 0 for no weighting.
    min_snr_gamma: float = 0.0
    # Share of samples whose caption (or class) is replaced by the null caption (or class).
    condition_dropout: float = 0.1

    def __post_init__(self):
        if not 0 <= self.condition_dropout < 1:
            raise UserError(f"diffusion.condition_dropout is {self.condition_dropout}: it must be in [0, 1).")
        at_least("diffusion.min_snr_gamma", self.min_snr_gamma, 0)


@dataclasses.dataclass(frozen=True)
class GuidanceConfig:
    """Conventions of classifier-free guidance. They are stored with the weights.

    The defaults are those of diffusers, so that an exported model generates the same images there. The
    official training code keeps the mask of the caption when it drops the caption (`null_mask='caption'`).
    """

    # The null caption: 't5_empty' (text features of "") or 'token' (an array stored with the weights).
    null_text: str = "t5_empty"
    # Mask of the null caption: its 'own', or that of the 'caption' that it replaces.
    null_mask: str = "own"
    # Latent channels that are guided: 4 (all), or 3 as in the official ancestral sampler.
    channels: int = 4
    # Aspect ratio used in the size conditions: that of the 'bucket' (key of the table) or 'true' (height /
    # width).
    aspect_ratio: str = "true"
    # Default guidance scale of sampling.
    scale: float = 4.5

    def __post_init__(self):
        one_of("guidance.null_text", self.null_text, ("token", "t5_empty"))
        one_of("guidance.null_mask", self.null_mask, ("caption", "own"))
        one_of("guidance.aspect_ratio", self.aspect_ratio, ("bucket", "true"))
        if self.channels not in (3, 4):
            raise UserError(f"guidance.channels is {self.channels}: choose 3 or 4 (4 means all).")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer. The defaults are those of PixArt-α.

    These are AdamW with weight decay 0.03 for all parameters, eps 1e-10, and gradients clipped to norm 0.01.
    """

    # 'adamw', or 'muon' (orthogonalized momentum for the matrices of the blocks, AdamW for everything else).
    name: str = "adamw"
    # Decay of Muon's momentum.
    momentum: float = 0.95
    learning_rate: float = 2e-5
    # If not 0, the learning rate is multiplied by sqrt(batch size / this).
    sqrt_scaling_batch: int = 0
    # Steps of linear warm-up to the constant learning rate.
    warmup_steps: int = 1000
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-10
    weight_decay: float = 0.03
    # Global norm to which gradients are clipped; 0 for no clipping.
    clip_norm: float = 0.01
    # Number of micro-batches whose gradients are accumulated into one update.
    accumulation: int = 1
    # Decay of the moving average of the weights.
    ema_decay: float = 0.9999

    def __post_init__(self):
        one_of("optimizer.name", self.name, ("adamw", "muon"))
        at_least("optimizer.accumulation", self.accumulation, 1)
        at_least("optimizer.warmup_steps", self.warmup_steps, 0)
        at_least("optimizer.clip_norm", self.clip_norm, 0)
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"optimizer.ema_decay is {self.ema_decay}: it must be in [0, 1).")


@dataclasses.dataclass(frozen=True)
class RoutingConfig:
    """Token routing in training (TREAD, arXiv 2501.04765): some tokens skip the blocks in the middle.

    The parameters are the same as without routing, and sampling does not use routing. The loss covers all
    tokens.
    """

    # Share of the tokens that skip the middle blocks, chosen anew for every sample; 0 for no routing.
    rate: float = 0.0
    # Number of blocks at the start and at the end that run on all tokens.
    first_blocks: int = 2
    last_blocks: int = 4
    # Number of steps at the end of the stage in which no tokens skip blocks.
    finish: int = 0

    def __post_init__(self):
        if not 0 <= self.rate < 1:
            raise UserError(f"routing.rate is {self.rate}: it must be in [0, 1).")
        for name in ("first_blocks", "last_blocks", "finish"):
            at_least(f"routing.{name}", getattr(self, name), 0)

    def kept(self, tokens: int) -> int:
        """Returns how many of `tokens` tokens pass through all blocks."""
        return max(1, round(tokens * (1 - self.rate)))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis of the mesh.

    If one axis is -1, it gets the devices that the other axes leave. If several are, `make_mesh` chooses.
    """

    # Number of replicas of the model.
    data: int = -1
    # Devices that share parameters, moving average and optimizer state (and the batch).
    fsdp: int = 1
    # Devices that share attention heads and MLP columns.
    tensor: int = 1
    # Devices that share the image tokens of a sample.
    sequence: int = 1
    # TPU slices or GPU nodes that are connected by a slower network. `data` spans them; every other axis
    # stays within one. -1 takes the number that the devices report.
    slices: int = -1
    # What is sharded over `fsdp`: 'fsdp' (parameters, moving average, optimizer) or 'zero1' (only the moving
    # average and the optimizer; the parameters are replicated).
    strategy: str = "fsdp"

    def __post_init__(self):
        one_of("mesh.strategy", self.strategy, ("fsdp", "zero1"))
        for name in ("data", "fsdp", "tensor", "sequence", "slices"):
            value = getattr(self, name)
            if value < 1 and value != -1:
                raise UserError(f"mesh.{name} is {value}: it must be at least 1, or -1.")


@dataclasses.dataclass(frozen=True)
class CompileConfig:
    """How the training step is compiled, once for each bucket, and where compiled programs are cached."""

    # Compile the step for every bucket before step 1, instead of when the first batch of the bucket arrives.
    ahead: bool = False
    # Folder in which compiled programs are kept for later runs; '' for none. Use one folder per kind of
    # machine.
    cache: str = ""
    # On GPUs, use only kernels whose results do not vary from run to run, so that a resumed run gives the
    # same bits. Costs speed.
    deterministic: bool = False


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Initialization of the weights at step 0."""

    # 'none' (random weights), 'reparameterize' (DiT -> PixArt), 'resize' (PixArt -> PixArt at another image
    # size) or 'weights' (a weights file or folder, in any format that `convert` reads).
    method: str = "none"
    # The run directory or weights file to start from.
    path: str = ""

    def __post_init__(self):
        one_of("init.method", self.method, INIT_METHODS)
        if (self.method == "none") != (not self.path):
            raise UserError(
                f"init.method is '{self.method}' and init.path '{self.path}': give both or neither."
            )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and which of them are kept."""

    # Steps between checkpoints; the last step is always saved.
    every: int = 1000
    # Number of newest checkpoints to keep.
    keep: int = 3
    # Checkpoints at multiples of this number of steps are kept permanently; 0 for none.
    keep_every: int = 0
    # Number of checkpoints with the lowest validation loss to keep. If not 0, the run validates before every
    # checkpoint.
    keep_best: int = 0

    def __post_init__(self):
        at_least("checkpoint.every", self.every, 1)
        at_least("checkpoint.keep", self.keep, 1)
        at_least("checkpoint.keep_best", self.keep_best, 0)
        if self.keep_every % self.every:
            raise UserError(
                f"checkpoint.keep_every is {self.keep_every}: it must be a multiple of checkpoint.every "
                f"({self.every}), or 0."
            )


@dataclasses.dataclass(frozen=True)
class DivergenceConfig:
    """What to do after an update whose loss or gradient is not finite, or whose loss is a spike.

    Such an update is never applied; this is part of the compiled step.
    """

    # 'stop' ends the run; 'skip' skips the update and continues with the next batch.
    action: str = "stop"
    # A loss above this many times its running average is a spike; 0 disables the detection of spikes.
    spike_factor: float = 0.0
    # Initial steps during which nothing counts as a spike; the running average is still settling.
    spike_warmup: int = 100
    # With 'skip', the run ends after this many skipped updates in a row.
    patience: int = 10

    def __post_init__(self):
        one_of("divergence.action", self.action, ("stop", "skip"))
        if self.spike_factor and self.spike_factor <= 1:
            raise UserError(f"divergence.spike_factor is {self.spike_factor}: it must exceed 1, or be 0.")
        at_least("divergence.spike_warmup", self.spike_warmup, 1)
        at_least("divergence.patience", self.patience, 1)


@dataclasses.dataclass(frozen=True)
class WatchdogConfig:
    """How long processes wait for each other before they end the run, in seconds."""

    # How long processes wait for each other at the start.
    connect_seconds: int = 300
    # A process counts as dead after this long without a heartbeat.
    dead_seconds: int = 30
    # If no process makes progress for this long, the process that is furthest behind counts as hanging.
    hang_seconds: int = 1800

    def __post_init__(self):
        at_least("watchdog.connect_seconds", self.connect_seconds, 1)
        at_least("watchdog.dead_seconds", self.dead_seconds, 4)
        at_least("watchdog.hang_seconds", self.hang_seconds, 1)


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What a run logs, and how often; 0 for never."""

    # Steps between lines of metrics.
    every: int = 100
    # Steps between validations, and the number of held-out samples used in each.
    validate_every: int = 1000
    validation_samples: int = 1024
    # Steps between grids of sample images, number of images in a grid, and sampling steps.
    sample_every: int = 5000
    samples: int = 16
    sample_steps: int = 20

    def __post_init__(self):
        at_least("log.every", self.every, 1)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The config of a training stage.

    If `features.image_size` or `features.text_length` is 0, it is replaced by the value of the model.
    """

    # Name of the stage, for logs and checkpoints.
    name: str = ""
    # What is trained, and with which loss: the name of a module of `training/objectives`.
    objective: str = "diffusion"
    # Total number of optimizer updates.
    steps: int = 1000
    # Seed of initial weights, data order, noise, timesteps and dropout.
    seed: int = 0
    model: BackboneConfig = dataclasses.field(default_factory=PixArtConfig)
    features: FeaturesConfig = FeaturesConfig()
    data: DataConfig = DataConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    routing: RoutingConfig = RoutingConfig()
    mesh: MeshConfig = MeshConfig()
    compile: CompileConfig = CompileConfig()
    init: InitConfig = InitConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    divergence: DivergenceConfig = DivergenceConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self):
        unset = {
            name: value for name, value in _model_facts(self).items() if not getattr(self.features, name)
        }
        object.__setattr__(self, "features", dataclasses.replace(self.features, **unset))
        one_of("objective", self.objective, OBJECTIVES)
        at_least("steps", self.steps, 1)
        if self.data.batch_size % self.optimizer.accumulation:
            raise UserError(
                f"data.batch_size {self.data.batch_size} is not divisible by optimizer.accumulation "
                f"{self.optimizer.accumulation}, the number of micro-batches: choose a multiple."
            )
        skipped = self.model.depth - self.routing.first_blocks - self.routing.last_blocks
        if self.routing.rate and skipped < 1:
            raise UserError(
                f"routing leaves {skipped} blocks to skip: routing.first_blocks and routing.last_blocks "
                f"must together be less than the model's {self.model.depth}."
            )
        if self.checkpoint.keep_best and not self.data.validation:
            raise UserError(
                "checkpoint.keep_best needs a validation loss: set data.validation, or set keep_best to 0."
            )
        if "text" in self.model.conditions and not self.features.text:
            raise UserError(
                f"features.text is False: a '{self.model.kind}' model needs text features, set it to True."
            )

    def without_routing(self) -> TrainConfig:
        """Returns the config of the last `routing.finish` steps, which are trained without token routing."""
        return dataclasses.replace(self, routing=dataclasses.replace(self.routing, rate=0.0))


def _model_facts(config: TrainConfig) -> dict[str, int]:
    """Returns the fields of `features` that the model determines: image size and text length."""
    model = config.model
    return {
        "image_size": model.base_size * model.patch_size * config.features.downsampling,
        "text_length": getattr(model, "text_length", PixArtConfig.text_length),
    }


def to_dict(config: Any) -> dict[str, Any]:
    """Converts a config to nested dicts of plain values. A model config also gets its class, as "kind"."""
    out = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        out[field.name] = to_dict(value) if dataclasses.is_dataclass(value) else value
    return {"kind": config.kind, **out} if isinstance(config, BackboneConfig) else out


def to_config_dict(config: TrainConfig) -> ConfigDict:
    """Converts a config to a `ConfigDict`, whose fields can be set with flags.

    Values that are computed from others are set to 0, so that they are computed again after flags are set.
    """
    values = to_dict(config)
    for name, value in _model_facts(config).items():
        if values["features"][name] == value:
            values["features"][name] = 0
    if config.model.size != "custom":
        values["model"] |= dict.fromkeys(SIZES[config.model.size], 0)
    return ConfigDict(values)


def from_dict(values: typing.Mapping[str, Any], cls: type[T] = TrainConfig, where: str = "") -> T:
    """Converts nested dicts to a config and checks all values. The inverse of `to_dict`.

    Args:
      values: fields by name; a missing field gets its default.
      cls: the dataclass to make.
      where: prefix of field names in messages.

    Raises:
      UserError: a field is unknown, or a value has the wrong type or is not allowed.
    """
    values = dict(values)
    if cls is InitConfig and "handover" in values:
        values["method"] = values.pop("handover")  # the name of the field in version 0.1
    if cls is TrainConfig and "model" in values:
        model = dict(values["model"])
        kind = model.pop("kind", "pixart")
        one_of("model.kind", kind, MODELS)
        values["model"] = from_dict(model, MODELS[kind], "model.")
    hints = typing.get_type_hints(cls)
    fields = {field.name for field in dataclasses.fields(cls)}
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"config field '{where}{name}' is unknown.{did_you_mean(name, fields)}")
        hint = hints[name]
        if dataclasses.is_dataclass(value):
            continue
        if dataclasses.is_dataclass(hint):
            values[name] = from_dict(value, hint, f"{where}{name}.")
        elif hint is float and type(value) is int:
            values[name] = float(value)
        elif type(value) is not hint:
            raise UserError(f"config field '{where}{name}' is {value!r}: it must be of type {hint.__name__}.")
    return cls(**values)


def from_config_dict(config: ConfigDict) -> TrainConfig:
    """Converts the config of a config file, after flags have changed it, and checks all values."""
    return from_dict(config.to_dict())


def from_file(spec: str) -> TrainConfig:
    """Loads a config file.

    Args:
      spec: the path, with an argument for `get_config` if it has one, such as 'configs/stage3.py:512'.

    Raises:
      UserError: the file does not exist, or the config is not valid.
    """
    path, _, argument = spec.partition(":")
    if not Path(path).is_file():
        raise UserError(f"config file '{path}' does not exist: give a file such as configs/stage3.py:512.")
    module = runpy.run_path(path)
    return from_config_dict(module["get_config"](*([argument] if argument else [])))


def to_json(config: TrainConfig) -> str:
    """Converts a config to JSON with sorted keys, so that equal configs have the same text and hash."""
    return json.dumps(to_dict(config), indent=1, sort_keys=True)
