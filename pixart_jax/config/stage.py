"""The config of a training stage: its sections, and the rules between them."""

from __future__ import annotations

import dataclasses
import math

from pixart_jax.config.sections import (
    HALF_ROUTED,
    OBJECTIVES,
    AlignmentConfig,
    CheckpointConfig,
    CompileConfig,
    DataConfig,
    DiffusionConfig,
    DivergenceConfig,
    FeaturesConfig,
    GuidanceConfig,
    InitConfig,
    LogConfig,
    MeshConfig,
    OptimizerConfig,
    RoutingConfig,
    WatchdogConfig,
)
from pixart_jax.errors import UserError, short
from pixart_jax.flags import LARGEST_SEED, check_fields, flag
from pixart_jax.models.configs import AdapterConfig, BackboneConfig, PixArtConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The config of a training stage.

    If `features.image_size` or `features.text_length` is 0, it is replaced by the value of the model.
    """

    name: str = flag("", "Name of the stage, for logs and checkpoints.")
    objective: str = flag(
        "diffusion",
        "What is trained, and with which loss: the name of a module of training/objectives.",
        choices=OBJECTIVES,
    )
    steps: int = flag(1000, "Total number of optimizer updates.", minimum=1)
    seed: int = flag(
        0,
        "Seed of initial weights, data order, noise, timesteps and dropout.",
        minimum=0,
        maximum=LARGEST_SEED,
    )
    model: BackboneConfig = dataclasses.field(default_factory=PixArtConfig)
    features: FeaturesConfig = dataclasses.field(default_factory=FeaturesConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    diffusion: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)
    guidance: GuidanceConfig = dataclasses.field(default_factory=GuidanceConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    routing: RoutingConfig = dataclasses.field(default_factory=RoutingConfig)
    alignment: AlignmentConfig = dataclasses.field(default_factory=AlignmentConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    compile: CompileConfig = dataclasses.field(default_factory=CompileConfig)
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    divergence: DivergenceConfig = dataclasses.field(default_factory=DivergenceConfig)
    watchdog: WatchdogConfig = dataclasses.field(default_factory=WatchdogConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)

    def __post_init__(self):
        check_fields(self, "")
        unset = {name: value for name, value in model_facts(self).items() if not getattr(self.features, name)}
        object.__setattr__(self, "features", dataclasses.replace(self.features, **unset))
        if self.data.batch_size % self.optimizer.accumulation:
            raise UserError(
                f"data.batch_size {self.data.batch_size} is not divisible by optimizer.accumulation "
                f"{self.optimizer.accumulation}, the number of micro-batches: choose a multiple, or set "
                "optimizer.accumulation to 1."
            )
        warmup, decay = self.optimizer.warmup_steps, self.optimizer.decay_steps(self.steps)
        if self.optimizer.schedule != "constant" and (decay < 1 or warmup + decay > self.steps):
            raise UserError(
                f"optimizer.schedule '{self.optimizer.schedule}' leaves no steps to decay: "
                f"optimizer.warmup_steps {warmup} and optimizer.decay_share {self.optimizer.decay_share} do "
                f"not fit into {self.steps} steps. Lower them, or raise config.steps."
            )
        if self.token_routing.rate:
            self.check_routing(self.token_routing)
        if self.checkpoint.keep_best and not self.data.validation:
            raise UserError(
                "checkpoint.keep_best needs a validation loss: set data.validation, or set keep_best to 0."
            )
        self._check_snapshots()
        self._check_adapter()
        if self.objective == "alignment":
            self._check_alignment()
        if self.model.mup_base_width and self.optimizer.name not in ("adamw", "lion"):
            raise UserError(
                f"model.mup_base_width is {self.model.mup_base_width} and optimizer.name "
                f"'{self.optimizer.name}', whose learning rates muP does not define here: set optimizer.name "
                "to 'adamw' or 'lion', or model.mup_base_width to 0."
            )
        if self.log.prompts and "text" not in self.model.conditions:
            raise UserError(
                f"log.prompts is '{short(self.log.prompts)}', and a '{self.model.kind}' model takes classes "
                "instead of text: leave it empty."
            )
        if "text" in self.model.conditions and not self.features.text:
            raise UserError(
                f"features.text is False: a '{self.model.kind}' model needs text features, set it to True."
            )

    def _check_snapshots(self) -> None:
        every, ema_every = self.checkpoint.snapshot_every, self.optimizer.ema_every
        if every and not self.optimizer.power_ema:
            raise UserError(
                f"checkpoint.snapshot_every is {every}, but optimizer.power_ema is empty: set it to the "
                "widths of the averages, such as 0.05,0.1, or set snapshot_every to 0."
            )
        if every % ema_every:
            raise UserError(
                f"checkpoint.snapshot_every is {every}: it must be a multiple of optimizer.ema_every "
                f"({ema_every}), or 0."
            )

    def _check_adapter(self) -> None:
        kind = self.adapter.kind
        if self.adapter and self.model.kind != "pixart":
            raise UserError(
                f"adapter.kind is '{kind}', but the model is a '{self.model.kind}': adapters are for PixArt."
            )
        if self.adapter and self.init.method not in ("weights", "resize"):
            raise UserError(
                f"adapter.kind is '{kind}' and init.method '{self.init.method}': an adapter needs trained "
                "weights, set init.method to 'weights' and init.path to their file or folder."
            )
        if self.adapter and self.model.mup_base_width:
            raise UserError(
                f"model.mup_base_width is {self.model.mup_base_width} and adapter.kind '{kind}': muP is for "
                "training whole networks, set model.mup_base_width to 0."
            )
        if self.adapter and self.init.new_vae:
            raise UserError(
                f"init.new_vae is True and adapter.kind '{kind}': a frozen network cannot learn the latents "
                "of another VAE, leave init.new_vae out, or set adapter.kind to 'none'."
            )
        if self.init.adapter and not self.adapter:
            raise UserError(
                f"init.adapter is '{self.init.adapter}', but adapter.kind is 'none': set it to the kind of "
                "that adapter."
            )

    def _check_alignment(self) -> None:
        if not self.features.image_encoder:
            raise UserError(
                "objective is 'alignment', but features.image_encoder is empty: set it to the folder of an "
                "image encoder, such as DINOv2, for precompute and for training."
            )
        token = self.model.patch_size * self.features.downsampling
        if self.features.token_size != token:
            raise UserError(
                f"features.token_size is {self.features.token_size}, but a token of the model has {token} "
                "pixels along each side: leave it out."
            )
        if self.alignment.block > self.model.depth:
            raise UserError(
                f"alignment.block is {self.alignment.block}, but the model has {self.model.depth} blocks: "
                "choose one of them (a third of the depth is usual)."
            )
        if self.adapter:
            raise UserError(
                f"objective is 'alignment' and adapter.kind '{self.adapter.kind}': alignment is for training "
                "the whole network, set objective to 'diffusion' or adapter.kind to 'none'."
            )

    @property
    def compares_samples(self) -> bool:
        """Whether images of `log.prompts` are shown beside those of the weights that the run starts from."""
        return bool(self.log.prompts and self.log.sample_every and self.init.path)

    @property
    def token_routing(self) -> RoutingConfig:
        """The routing of training: `routing`, with a rate that is not -1.

        The rate goes by the tokens of a square image, so that it is the same for all buckets of a stage.
        """
        return self.routing.resolved(math.prod(self.model.grid(*2 * (self.features.latent_side,))))

    @property
    def guidance_routing(self) -> RoutingConfig:
        """The routing with which sampling can guide: that of training or, without one, of half the tokens."""
        routing = self.token_routing
        return routing if routing.rate else RoutingConfig(**HALF_ROUTED)

    def check_routing(self, routing: RoutingConfig) -> None:
        """Raises a `UserError` if tokens cannot skip the blocks that `routing`, with a rate above 0, says."""
        first, last = routing.first_blocks, self.model.depth - routing.last_blocks
        if last - first < 1:
            raise UserError(
                f"routing leaves {last - first} blocks to skip: routing.first_blocks and routing.last_blocks "
                f"must together be less than the model's {self.model.depth}."
            )
        routed = set(range(first, last)) & set(self.model.compressed_layers)
        if routed:
            raise UserError(
                f"routing skips tokens in blocks {first} to {last - 1}, and block {min(routed)} compresses "
                "keys and values, which needs all of them: set routing.rate to 0, or routing.first_blocks "
                "and routing.last_blocks so that no routed block is one of model.kv_compression_layers "
                f"({self.model.kv_compression_layers})."
            )

    def without_routing(self) -> TrainConfig:
        """Returns the config of the last `routing.finish` steps, which are trained without token routing."""
        if not self.token_routing.rate:
            return self
        return dataclasses.replace(self, routing=dataclasses.replace(self.routing, rate=0.0))

    def at_step(self, step: int) -> TrainConfig:
        """Returns the config of the update after `step` updates: without routing, or alignment, at the end.

        Updates with the same config run the same program. All have the same training state.
        """
        config = self
        if self.objective == "alignment" and 0 < self.alignment.stop_step <= step:
            config = dataclasses.replace(config, objective="diffusion")
        return config.without_routing() if step >= self.steps - self.routing.finish else config

    def phases(self) -> dict[int, TrainConfig]:
        """Returns the configs of the updates of a run, by the first step that each of them is for."""
        starts = {0, self.alignment.stop_step, max(0, self.steps - self.routing.finish)}
        found: dict[int, TrainConfig] = {}
        for start in sorted(start for start in starts if start < self.steps):
            config = self.at_step(start)
            if config not in found.values():
                found[start] = config
        return found

    def for_sampling(self) -> TrainConfig:
        """Returns the config with which images are generated: blocks run in `lax.scan` unless it says not to.

        On a GPU, unrolled blocks gain a few percent in sampling, take twice as long to compile and need more
        memory. In training they gain more, so there they are the default.
        """
        scanned = self.model.scan_layers is not False
        return dataclasses.replace(self, model=dataclasses.replace(self.model, scan_layers=scanned))


def without_effect(config: TrainConfig) -> list[str]:
    """Returns a line for each setting that has no effect because of another one, and how to change that."""
    lines, optimizer = [], config.optimizer
    if config.log.prompts and not config.log.sample_every:
        lines.append(
            "log.prompts has no effect, because log.sample_every is 0: set --config.log.sample_every to the "
            "number of steps between sample images"
        )
    if optimizer.power_ema and not config.checkpoint.snapshot_every:
        lines.append(
            "optimizer.power_ema only takes memory, because checkpoint.snapshot_every is 0: set "
            "--config.checkpoint.snapshot_every to the number of steps between snapshots"
        )
    if optimizer.muon_learning_rate and optimizer.name != "muon":
        lines.append(
            f"optimizer.muon_learning_rate has no effect, because optimizer.name is '{optimizer.name}': set "
            "--config.optimizer.name=muon"
        )
    if "ema" in optimizer.on_host and config.steps < optimizer.ema_every:
        # An update at the last step would give a run that is extended other bits than a longer run.
        lines.append(
            f"steps is {config.steps} and optimizer.ema_every {optimizer.ema_every}: the moving average, "
            "which exports use, stays what it is at the start. Set --config.optimizer.ema_every=1, or export "
            "with --weights=raw"
        )
    return lines


def default_workdir(config: TrainConfig) -> str:
    """Returns the run directory of a config for which the user gives none: runs/NAME.

    Raises:
      UserError: the config has no name, or one that would not be a folder in runs/.
    """
    if not config.name or "\0" in config.name or {"", ".", ".."} & set(config.name.split("/")):
        raise UserError(
            f"name is '{config.name}', which cannot be a folder in runs/: set --config.name, or give "
            "--workdir."
        )
    return f"runs/{config.name}"


def model_facts(config: TrainConfig) -> dict[str, int]:
    """Returns the fields of `features` that the model determines.

    They are the side of an image and of a token in pixels, and the length of a text in tokens.
    """
    model, features = config.model, config.features
    token = model.patch_size * features.downsampling
    return {
        "image_size": model.base_size * token,
        "text_length": getattr(model, "text_length", PixArtConfig.text_length),
        "token_size": token if features.image_encoder else 0,
    }
