"""The configuration of a training stage, as frozen dataclasses that check their values when they are made.

A file in `configs/` builds a `TrainConfig` and converts it with `to_config_dict`, so that every field can be
set with a flag (`--config.optimizer.learning_rate=1e-4`). `from_config_dict` converts the result back and
raises a `UserError` for unknown fields and wrong types.
"""

from pixart_jax.config.conversion import (
    all_fields,
    describe_fields,
    from_config_dict,
    from_dict,
    from_file,
    to_config_dict,
    to_dict,
    to_json,
    with_pinned_paths,
)
from pixart_jax.config.sections import (
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
    TextEncoderConfig,
    WatchdogConfig,
    parse_widths,
)
from pixart_jax.config.stage import TrainConfig, default_workdir, without_effect
from pixart_jax.models.configs import AdapterConfig, DiTConfig, PixArtConfig

__all__ = [
    "AdapterConfig",
    "AlignmentConfig",
    "CheckpointConfig",
    "CompileConfig",
    "DataConfig",
    "DiTConfig",
    "DiffusionConfig",
    "DivergenceConfig",
    "FeaturesConfig",
    "GuidanceConfig",
    "InitConfig",
    "LogConfig",
    "MeshConfig",
    "OptimizerConfig",
    "PixArtConfig",
    "RoutingConfig",
    "TextEncoderConfig",
    "TrainConfig",
    "WatchdogConfig",
    "all_fields",
    "default_workdir",
    "describe_fields",
    "from_config_dict",
    "from_dict",
    "from_file",
    "parse_widths",
    "to_config_dict",
    "to_dict",
    "to_json",
    "with_pinned_paths",
    "without_effect",
]
