"""The configuration of a training stage: frozen dataclasses, checked once, at the door.

A file in `configs/` builds a `TrainConfig` and hands it to `to_config_dict`, which makes every field a flag
(`--config.optimizer.learning_rate=1e-4`). `from_config_dict` turns what the flags left back into the
dataclass and refuses unknown fields. Every interval is in steps, and a step is one optimizer update.
"""

from __future__ import annotations

import dataclasses
import json
import runpy
import typing
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict

from pixart_jax.errors import UserError, at_least, did_you_mean, one_of
from pixart_jax.models.dit import DiTConfig
from pixart_jax.models.layers import SIZES
from pixart_jax.models.pixart import PixArtConfig

T = TypeVar("T")

MODELS = {"pixart": PixArtConfig, "dit": DiTConfig}
HANDOVERS = ("none", "reparameterize", "resize", "weights")


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """Who turns captions into text features."""

    # Tokenizer: a HuggingFace name or folder, or 'byt5' (bytes; needs no download).
    tokenizer: str = "PixArt-alpha/PixArt-XL-2-1024-MS"
    # Subfolder of the tokenizer in its repository, '' for none.
    tokenizer_subfolder: str = "tokenizer"
    # Folder with T5 encoder weights (HuggingFace layout), or 'random': a fixed encoder of the shape below.
    weights: str = ""
    # Shape and seed of the random encoder; a folder brings its own config.
    d_model: int = 4096
    d_ff: int = 10240
    d_kv: int = 64
    num_heads: int = 64
    num_layers: int = 24
    seed: int = 0
    # Compute dtype of the encoder.
    dtype: str = "bfloat16"
    # Clean captions as diffusers does (twice: HTML, links, quotes, …).
    clean_caption: bool = True


@dataclasses.dataclass(frozen=True)
class FeaturesConfig:
    """What `precompute` makes of images and captions. A stage trains on features made with its own values."""

    # Side of the images in pixels; with buckets, the side of the square one.
    image_size: int = 256
    # 'single' (centre crop to a square) or 'official' (the 40 aspect-ratio buckets).
    buckets: str = "single"
    # 'vae' (mean and std of the posterior) or 'pixels' (identity latents, for tests and small images).
    codec: str = "vae"
    # Folder of the VAE (diffusers layout) for codec 'vae'.
    vae: str = "stabilityai/sd-vae-ft-ema"
    # Factor from unscaled VAE latents to what the model sees (0.18215 SD, 0.13025 SDXL; 1 for pixels).
    latent_scale: float = 0.18215
    # Write text features; stage 1 needs none.
    text: bool = True
    # Longest caption in tokens; what is longer is cut, and said.
    text_length: int = 120
    # How text features are stored: 'bfloat16', 'float32' or 'int8' (per token, with a scale).
    text_dtype: str = "bfloat16"
    # How VAE mean and std are stored: 'float16', 'bfloat16' or 'float32'.
    latent_dtype: str = "float16"
    text_encoder: TextEncoderConfig = TextEncoderConfig()

    def __post_init__(self):
        one_of("features.buckets", self.buckets, ("single", "official"))
        one_of("features.codec", self.codec, ("vae", "pixels"))
        one_of("features.text_dtype", self.text_dtype, ("bfloat16", "float32", "int8"))
        one_of("features.latent_dtype", self.latent_dtype, ("float16", "bfloat16", "float32"))
        at_least("features.image_size", self.image_size, 1)
        at_least("features.text_length", self.text_length, 1)

    @property
    def latent_side(self) -> int:
        """Side of the square latents: the VAE makes one pixel of 8 x 8."""
        return self.image_size // (8 if self.codec == "vae" else 1)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read, and how."""

    # Folders of feature shards, comma-separated; several are mixed.
    train: str = ""
    # How often each folder is drawn from, comma-separated, any scale; '' for in proportion to its records.
    weights: str = ""
    # Folder of held-out feature shards; '' for no validation.
    validation: str = ""
    # 'train' and 'validation' name images, as `precompute --images` takes them, and the encoders run in the
    # loop: for small sets.
    on_the_fly: bool = False
    # Samples per optimizer update, over all devices and processes.
    batch_size: int = 256
    # Reader threads and prepared batches per process.
    threads: int = 4
    prefetch: int = 4

    def __post_init__(self):
        at_least("data.batch_size", self.batch_size, 1)
        at_least("data.threads", self.threads, 1)
        at_least("data.prefetch", self.prefetch, 1)


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The noising process and the loss."""

    # Timesteps of the linear schedule and its ends.
    num_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    # Min-SNR-gamma weighting of the noise error; 0 for none.
    min_snr_gamma: float = 0.0
    # Share of samples whose caption (or class) is dropped for the null one.
    condition_dropout: float = 0.1

    def __post_init__(self):
        if not 0 <= self.condition_dropout < 1:
            raise UserError(f"diffusion.condition_dropout is {self.condition_dropout}: it must be in [0, 1).")
        at_least("diffusion.min_snr_gamma", self.min_snr_gamma, 0)


@dataclasses.dataclass(frozen=True)
class GuidanceConfig:
    """The conventions of classifier-free guidance, stored with the weights.

    The defaults are what diffusers does, so that an exported model samples the same there. The official
    training code keeps the caption's own mask on a dropped caption (`null_mask='caption'`).
    """

    # The null caption: 't5_empty' (features of "") or 'token' (an array kept with the weights).
    null_text: str = "t5_empty"
    # Which tokens of the null caption are read: its 'own' mask, or the mask of the 'caption' it stands for.
    null_mask: str = "own"
    # Guided latent channels: 4 (all) or 3, as the official ancestral sampler.
    channels: int = 4
    # Aspect ratio given to the size conditions: of the 'bucket' (table key) or 'true' (height / width).
    aspect_ratio: str = "true"
    # Guidance scale that samples are drawn with by default.
    scale: float = 4.5

    def __post_init__(self):
        one_of("guidance.null_text", self.null_text, ("token", "t5_empty"))
        one_of("guidance.null_mask", self.null_mask, ("caption", "own"))
        one_of("guidance.aspect_ratio", self.aspect_ratio, ("bucket", "true"))
        if self.channels not in (3, 4):
            raise UserError(f"guidance.channels is {self.channels}: choose 3 or 4 (4 means all).")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (PixArt-α: weight decay 0.03 on everything, eps 1e-10, clip 0.01), or Muon in its place."""

    # 'adamw', or 'muon': orthogonalised momentum for the matrices of the blocks, AdamW for the rest.
    name: str = "adamw"
    # Decay of Muon's momentum.
    momentum: float = 0.95
    learning_rate: float = 2e-5
    # Multiply the learning rate by sqrt(batch / this); 0 for the rate as it stands.
    sqrt_scaling_batch: int = 0
    # Steps of linear warm-up to the constant rate.
    warmup_steps: int = 1000
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-10
    weight_decay: float = 0.03
    # Largest global norm of the gradient; 0 for no clipping.
    clip_norm: float = 0.01
    # Micro-batches whose gradients make one update.
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
    """Token routing in training (TREAD, arXiv 2501.04765): some tokens jump over the blocks in the middle.

    The weights and their use in sampling are the same; the loss is still that of all tokens.
    """

    # Share of the tokens that jumps, drawn anew for every sample; 0 for none.
    rate: float = 0.0
    # Blocks before and after the jump, which run on all tokens.
    first_blocks: int = 2
    last_blocks: int = 4
    # Steps at the end of the stage that train on all tokens throughout.
    finish: int = 0

    def __post_init__(self):
        if not 0 <= self.rate < 1:
            raise UserError(f"routing.rate is {self.rate}: it must be in [0, 1).")
        for name in ("first_blocks", "last_blocks", "finish"):
            at_least(f"routing.{name}", getattr(self, name), 0)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis. -1 on one axis takes what is left; on several, `make_mesh` plans."""

    # Replicas of the model.
    data: int = -1
    # Devices that share parameters, moving average and optimizer state (and the batch).
    fsdp: int = 1
    # Devices that share attention heads and MLP columns.
    tensor: int = 1
    # Devices that share the image tokens of a sample.
    sequence: int = 1
    # TPU slices or GPU nodes that a slower network joins: `data` is laid across them, every other axis stays
    # within one. -1: as many as the devices report.
    slices: int = -1
    # What is sharded over `fsdp`: 'fsdp' (parameters, moving average, optimizer) or 'zero1' (moving average
    # and optimizer alone; parameters whole on every device).
    strategy: str = "fsdp"

    def __post_init__(self):
        one_of("mesh.strategy", self.strategy, ("fsdp", "zero1"))
        for name in ("data", "fsdp", "tensor", "sequence", "slices"):
            value = getattr(self, name)
            if value < 1 and value != -1:
                raise UserError(f"mesh.{name} is {value}: it must be at least 1, or -1.")


@dataclasses.dataclass(frozen=True)
class CompileConfig:
    """How the step is compiled, once for each bucket, and where the programs are kept."""

    # Compile the step of every bucket before step 1; else each when it is first met.
    ahead: bool = False
    # Folder that keeps compiled programs from one run to the next, '' for none; one per kind of machine.
    cache: str = ""
    # On GPUs: exclude kernels whose results differ from run to run, so that a resumed run continues to the
    # same bits. Costs speed.
    deterministic: bool = False


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Where the weights of step 0 come from."""

    # 'none' (random), 'reparameterize' (DiT -> PixArt), 'resize' (PixArt -> PixArt at another size) or
    # 'weights' (a weight file or folder, any format `convert` reads).
    handover: str = "none"
    # The run directory or weight file it starts from.
    path: str = ""

    def __post_init__(self):
        one_of("init.handover", self.handover, HANDOVERS)
        if (self.handover == "none") != (not self.path):
            raise UserError(
                f"init.handover is '{self.handover}' and init.path '{self.path}': give both or neither."
            )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved, and which checkpoints stay."""

    # Steps between checkpoints; the last step is always saved.
    every: int = 1000
    # Newest checkpoints kept.
    keep: int = 3
    # Checkpoints at multiples of this many steps are kept for good; 0 for none.
    keep_every: int = 0
    # Checkpoints of the lowest validation loss kept; more than 0 validates before every checkpoint.
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
    """What happens to an update whose loss or gradient is not finite, or whose loss is a spike.

    Such an update is never applied; the decision is part of the compiled step.
    """

    # 'stop' ends the run, 'skip' goes on with the next batch.
    action: str = "stop"
    # A loss above this many times its running average is a spike; 0 for none.
    spike_factor: float = 0.0
    # Steps of which none is taken for a spike, while the average settles.
    spike_warmup: int = 100
    # With 'skip', this many skipped updates in a row end the run.
    patience: int = 10

    def __post_init__(self):
        one_of("divergence.action", self.action, ("stop", "skip"))
        if self.spike_factor and self.spike_factor <= 1:
            raise UserError(f"divergence.spike_factor is {self.spike_factor}: it must exceed 1, or be 0.")
        at_least("divergence.spike_warmup", self.spike_warmup, 1)
        at_least("divergence.patience", self.patience, 1)


@dataclasses.dataclass(frozen=True)
class WatchdogConfig:
    """When the processes of a run give up on one of them; all in seconds."""

    # To find each other at the start.
    connect_seconds: int = 300
    # Without a sign of life, after which a process counts as dead.
    dead_seconds: int = 30
    # Without progress anywhere, after which the process that is behind counts as hanging.
    hang_seconds: int = 1800

    def __post_init__(self):
        at_least("watchdog.connect_seconds", self.connect_seconds, 1)
        at_least("watchdog.dead_seconds", self.dead_seconds, 4)
        at_least("watchdog.hang_seconds", self.hang_seconds, 1)


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What a run shows, and when; 0 for never."""

    # Steps between lines of metrics.
    every: int = 100
    # Steps between validation losses, and how many held-out samples they take.
    validate_every: int = 1000
    validation_samples: int = 1024
    # Steps between sample grids, pictures in one, and the sampler's steps.
    sample_every: int = 5000
    samples: int = 16
    sample_steps: int = 20

    def __post_init__(self):
        at_least("log.every", self.every, 1)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training stage."""

    # Name of the stage, for logs and checkpoints.
    name: str = ""
    # Optimizer updates in all.
    steps: int = 1000
    # Seed of weights, order, noise, timesteps and dropout.
    seed: int = 0
    model: PixArtConfig | DiTConfig = dataclasses.field(default_factory=PixArtConfig)
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
        at_least("steps", self.steps, 1)
        if self.data.batch_size % self.optimizer.accumulation:
            raise UserError(
                f"data.batch_size {self.data.batch_size} does not divide into optimizer.accumulation "
                f"{self.optimizer.accumulation} micro-batches: choose a multiple."
            )
        passed = self.model.depth - self.routing.first_blocks - self.routing.last_blocks
        if self.routing.rate and passed < 1:
            raise UserError(
                f"routing leaves {passed} blocks to jump over: routing.first_blocks and routing.last_blocks "
                f"must together be less than the model's {self.model.depth}."
            )
        if self.checkpoint.keep_best and not self.data.validation:
            raise UserError("checkpoint.keep_best needs a validation loss: set data.validation, or 0.")
        if isinstance(self.model, PixArtConfig) and not self.features.text:
            raise UserError("features.text is False: a 'pixart' model needs text features, set it to True.")


def _kind(model: PixArtConfig | DiTConfig) -> str:
    return next(kind for kind, cls in MODELS.items() if type(model) is cls)


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as nested plain values; a model carries its `kind`."""
    out = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        out[field.name] = to_dict(value) if dataclasses.is_dataclass(value) else value
    return {"kind": _kind(config), **out} if type(config) in MODELS.values() else out


def to_config_dict(config: TrainConfig) -> ConfigDict:
    """The form that command-line flags can change. Numbers that follow from a named size are 0 in it."""
    values = to_dict(config)
    if config.model.size != "custom":
        values["model"] |= dict.fromkeys(SIZES[config.model.size], 0)
    return ConfigDict(values)


def from_dict(values: typing.Mapping[str, Any], cls: type[T] = TrainConfig, where: str = "") -> T:
    """The inverse of `to_dict`, which every outside value passes.

    Raises:
      UserError: an unknown field, a value of the wrong type, or whatever a dataclass refuses.
    """
    values = dict(values)
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
    """Checks what a config file and the flags made, and freezes it."""
    return from_dict(config.to_dict())


def from_file(spec: str) -> TrainConfig:
    """The stage of a config file with its argument, 'configs/stage3.py:512'.

    Raises:
      UserError: no such file, or whatever the config refuses.
    """
    path, _, argument = spec.partition(":")
    if not Path(path).is_file():
        raise UserError(f"config file '{path}' is missing: give one such as configs/stage3.py:512.")
    module = runpy.run_path(path)
    return from_config_dict(module["get_config"](*([argument] if argument else [])))


def to_json(config: TrainConfig) -> str:
    """Stable JSON, for the checkpoint and its hash."""
    return json.dumps(to_dict(config), indent=1, sort_keys=True)
