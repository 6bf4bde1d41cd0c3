import pytest

from pixart_jax.config import (
    AdapterConfig,
    CheckpointConfig,
    FeaturesConfig,
    InitConfig,
    LogConfig,
    OptimizerConfig,
    RoutingConfig,
    TrainConfig,
    default_workdir,
    from_config_dict,
    from_dict,
    to_config_dict,
    to_dict,
    without_effect,
)
from pixart_jax.errors import UserError
from pixart_jax.models.configs import PixArtConfig


def test_features_follow_the_model_unless_they_are_given():
    model = PixArtConfig(base_size=32, text_length=300)
    features = TrainConfig(model=model).features
    assert (features.image_size, features.text_length) == (512, 300)
    pixels = TrainConfig(model=model, features=FeaturesConfig(codec="pixels", text_length=77)).features
    assert (pixels.image_size, pixels.text_length) == (64, 77)
    with pytest.raises(UserError, match=r"features.image_size is 32768: it must be in \[0, 16383\]"):
        TrainConfig(model=PixArtConfig(base_size=2048))
    # A flag that changes the model changes the features, too.
    values = to_config_dict(TrainConfig(model=model))
    values.model.base_size = 64
    assert from_config_dict(values).features.image_size == 1024


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routing": {"rate": 1.0}}, r"routing.rate is 1.0: it must be in \[0, 1\), or -1\."),
        ({"routing": {"rate": 0.5, "finish": -1}}, "routing.finish is -1"),
        ({"routing": {"rate": 0.5, "first_blocks": 2, "last_blocks": 2}}, "leaves 0 blocks to skip"),
        (
            {
                "model": {"kind": "pixart", "size": "custom", "depth": 4, "kv_compression": "conv"},
                "routing": {"rate": 0.5, "first_blocks": 1, "last_blocks": 1},
            },
            r"blocks 1 to 2, and block 2 compresses keys and values.*kv_compression_layers \(2-3\)",
        ),
        ({"optimizer": {"name": "moun"}}, "optimizer.name is 'moun'.*Did you mean 'muon'"),
    ],
)
def test_invalid_routing_and_optimizer(changes, message):
    with pytest.raises(UserError, match=message):
        from_dict({"model": {"kind": "pixart", "size": "custom", "depth": 4}, **changes})


@pytest.mark.parametrize(("base_size", "rate"), [(16, 0.0), (31, 0.0), (32, 0.5), (64, 0.5)])
def test_routing_by_the_number_of_tokens(base_size, rate):
    """The side of the grid of a square image decides for all buckets; the config keeps -1."""
    stage = TrainConfig(model=PixArtConfig(base_size=base_size), routing=RoutingConfig(rate=-1, finish=7))
    assert stage.routing.rate == -1 and stage.token_routing == RoutingConfig(rate, 1, 1, 7)
    assert stage.without_routing().token_routing.rate == 0
    assert from_dict(to_dict(stage)) == stage
    # Without routing in training, guidance uses half of the tokens all the same.
    assert stage.guidance_routing == RoutingConfig(0.5, 1, 1, 7 if rate else 0)
    given = RoutingConfig(0.25, 3, 2)
    assert given.resolved(10**6) == given.resolved(4) == given


ALIGNED = {"objective": "alignment", "features": {"image_encoder": "dinov2"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": {}}, "objective is 'alignment', but features.image_encoder is empty: set it to"),
        ({"alignment": {"block": 29}}, "alignment.block is 29, but the model has 28 blocks"),
        ({"features": {"image_encoder": "a", "token_size": 32}}, "token_size is 32, .* has 16 pixels"),
        (
            {"adapter": {"kind": "lora"}, "init": {"method": "weights", "path": "x"}},
            "objective is 'alignment' and adapter.kind 'lora': alignment is for training the whole network",
        ),
        (
            {"objective": "diffusion", "features": {"token_size": 16}},
            "features.token_size is 16, but features.image_encoder is empty",
        ),
    ],
)
def test_invalid_alignment(changes, message):
    with pytest.raises(UserError, match=message):
        from_dict(ALIGNED | changes)


def test_the_size_of_a_token_follows_from_the_model():
    assert TrainConfig().features.token_size == 0
    config = from_dict(ALIGNED)
    assert config.features.token_size == 16
    assert to_config_dict(config).features.token_size == 0
    assert from_dict(to_dict(config)) == config


def test_routing_and_alignment_end_at_their_steps():
    config = from_dict(
        ALIGNED | {"steps": 10, "alignment": {"stop_step": 4}, "routing": {"rate": 0.5, "finish": 3}}
    )
    phases = config.phases()
    assert [(start, each.objective, each.routing.rate) for start, each in phases.items()] == [
        (0, "alignment", 0.5),
        (4, "diffusion", 0.5),
        (7, "diffusion", 0.0),
    ]
    for step in range(10):
        assert config.at_step(step) == phases[max(start for start in phases if start <= step)]
    assert TrainConfig().phases() == {0: TrainConfig()}
    finishing = from_dict({"steps": 2, "routing": {"rate": 0.5, "finish": 5}})
    assert finishing.phases() == {0: finishing.without_routing()}


def test_weights_and_repeats_exclude_each_other():
    with pytest.raises(UserError, match=r"data.weights is '1,2' and data.repeats is '3,1': .* only one"):
        from_dict({"data": {"weights": "1,2", "repeats": "3,1"}})
    data = from_dict({"data": {"repeats": "3,1", "loss_weights": "1,0.5"}}).data
    assert data.folder_numbers("repeats") == [3, 1] and data.folder_numbers("weights") == []


@pytest.mark.parametrize("name", ["", ".", "..", "../other", "/absolute", "a//b", "a\0b"])
def test_a_name_that_is_no_folder_needs_a_run_directory(name):
    with pytest.raises(UserError, match=r"^name is '.*', which cannot be a folder in runs/: set"):
        default_workdir(TrainConfig(name=name))
    assert default_workdir(TrainConfig(name="a b/stage2")) == "runs/a b/stage2"


def test_snapshots_need_averages_that_change_at_their_steps():
    assert OptimizerConfig(power_ema=" 0.1, 0.05").power_widths == (0.1, 0.05)
    every = CheckpointConfig(snapshot_every=15)
    with pytest.raises(UserError, match=r"snapshot_every is 15, but optimizer\.power_ema is empty"):
        TrainConfig(checkpoint=every)
    with pytest.raises(
        UserError, match=r"snapshot_every is 15: it must be a multiple of optimizer\.ema_every"
    ):
        TrainConfig(checkpoint=every, optimizer=OptimizerConfig(power_ema="0.1", ema_every=10))
    TrainConfig(checkpoint=every, optimizer=OptimizerConfig(power_ema="0.1", ema_every=5))
    with pytest.raises(UserError, match=r"power_ema is '0\.1' with optimizer\.name 'schedule_free'"):
        OptimizerConfig(power_ema="0.1", name="schedule_free")


def test_settings_without_effect_are_named():
    (line,) = without_effect(TrainConfig(optimizer=OptimizerConfig(power_ema="0.1")))
    assert line.startswith(
        "optimizer.power_ema only takes memory, because checkpoint.snapshot_every is 0: set "
    )
    host = OptimizerConfig(ema_device="host", ema_every=10)
    assert without_effect(TrainConfig(steps=10, optimizer=host)) == []
    assert without_effect(TrainConfig(steps=9, optimizer=OptimizerConfig(ema_every=1))) == []
    (line,) = without_effect(TrainConfig(steps=9, optimizer=host))
    assert line.startswith("steps is 9 and optimizer.ema_every 10") and "ema_every=1" in line
    assert without_effect(TrainConfig(log=LogConfig(prompts="a corgi"))) == []
    (line,) = without_effect(TrainConfig(log=LogConfig(prompts="a corgi", sample_every=0)))
    assert line.startswith("log.prompts has no effect") and "--config.log.sample_every" in line


def test_an_adapter_cannot_learn_another_vae():
    with pytest.raises(UserError, match=r"init.new_vae is True and adapter.kind 'lora': a frozen network"):
        TrainConfig(adapter=AdapterConfig("lora"), init=InitConfig("weights", "w", new_vae=True))
