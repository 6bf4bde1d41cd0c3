import importlib.util
import json
import re
from pathlib import Path

import jax
import pytest
from command_line import outside

from pixart_jax.config import (
    AdapterConfig,
    CheckpointConfig,
    FeaturesConfig,
    InitConfig,
    LogConfig,
    OptimizerConfig,
    RoutingConfig,
    TrainConfig,
    all_fields,
    default_workdir,
    describe_fields,
    from_config_dict,
    from_dict,
    from_file,
    to_config_dict,
    to_dict,
    to_json,
    without_effect,
)
from pixart_jax.denoiser import abstract_model
from pixart_jax.errors import UserError
from pixart_jax.models.configs import DiTConfig, PixArtConfig
from pixart_jax.training.optimizers import learning_rate_schedule

ROOT = Path(__file__).parent.parent
SIGMA = ("sigma-256", "sigma-512", "sigma-1024", "sigma-2048")
STAGES = [
    ("digits", "stage1"),
    ("digits", "stage2"),
    ("digits", "stage3"),
    ("stage1", None),
    ("stage2", None),
    ("stage3", "256"),
    ("stage3", "512"),
    ("stage3", "1024"),
    ("finetune", "256"),
    ("finetune", "512"),
    ("finetune", "1024"),
    *(("finetune", variant) for variant in SIGMA),
    *((name, size) for name in ("lora", "dreambooth") for size in ("256", "512", "1024", *SIGMA)),
    *(("dreambooth", f"full-{size}") for size in ("256", "512", "1024", *SIGMA)),
    *(("sigma", stage) for stage in ("vae-256", "256", "512", "1024", "1024-kv", "2048", "2048-kv")),
    *(("digits", stage) for stage in ("sigma-8px", "sigma-16px", "sigma")),
    *(("fast", stage) for stage in ("stage1", "256", "512", "1024")),
]


def load(name, argument):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_config_dict(module.get_config(*([argument] if argument else [])))


@pytest.mark.parametrize("model", [None, DiTConfig(num_classes=7)])
def test_dict_and_flags_and_json_give_the_same_config(model):
    config = TrainConfig(name="x", **({"model": model} if model else {}))
    assert from_dict(to_dict(config)) == config
    assert from_config_dict(to_config_dict(config)) == config
    assert from_dict(json.loads(to_json(config))) == config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("optimizr.learning_rate", 1.0, "'optimizr' is unknown. Did you mean 'optimizer'"),
        (
            "optimizer.learning_rat",
            1.0,
            "'optimizer.learning_rat' is unknown. Did you mean 'optimizer.learning_rate'",
        ),
        ("model.dpeth", 1, "'model.dpeth' is unknown. Did you mean 'model.depth'"),
        ("model.kind", "pixar", "Did you mean 'pixart'"),
        ("steps", "many", "'steps' is 'many': it must be of type int"),
        ("steps", 0, "steps is 0"),
        ("steps", None, "'steps' is None: it must be of type int"),
        ("model.scan_layers", "yes", "'model.scan_layers' is 'yes': it must be of type bool"),
        ("data.batch_size", 10, "is not divisible by optimizer.accumulation 4"),
        ("init.path", "somewhere", "give both or neither"),
        ("guidance.channels", 2, r"guidance.channels is 2: it must be in \[3, 4\]"),
        ("features.text", False, "needs text features"),
        ("optimizer.ema_decay", 1.0, r"must be in \[0, 1\)"),
    ],
)
def test_invalid_values_raise_an_error_of_one_line(path, value, message):
    values = to_dict(TrainConfig())
    values["optimizer"]["accumulation"] = 4
    *parents, last = path.split(".")
    place = values
    for parent in parents:
        place = place.setdefault(parent, {})
    place[last] = value
    with pytest.raises(UserError, match=message) as raised:
        from_dict(values)
    assert "\n" not in str(raised.value)


def test_a_field_without_a_value_can_be_set_by_a_flag():
    values = to_config_dict(TrainConfig())
    assert from_config_dict(values).model.scan_layers is None
    assert from_config_dict(values).for_sampling().model.scan_layers is True
    values.model.scan_layers = False
    assert from_config_dict(values).model.scan_layers is False
    assert from_config_dict(values).for_sampling().model.scan_layers is False


def test_the_name_that_a_field_had_in_version_0_1_is_read():
    values = to_dict(TrainConfig(init=InitConfig("resize", "runs/stage2")))
    values["init"] = {"handover": "resize", "path": "runs/stage2"}
    assert from_dict(values).init == InitConfig("resize", "runs/stage2")


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


def test_integers_are_converted_to_floats():
    values = to_dict(TrainConfig())
    values["guidance"]["scale"] = 3
    assert from_dict(values).guidance.scale == 3.0


@pytest.mark.parametrize(("name", "argument"), STAGES)
def test_every_stage_builds(name, argument):
    config = load(name, argument)
    _, state = abstract_model(config.model)
    assert jax.tree.leaves(state)


# Trainable parameters: DiT-XL/2 without its fixed position embedding; PixArt as counted by the official code.
@pytest.mark.parametrize(
    ("name", "argument", "trainable"),
    [
        ("stage1", None, 675_129_632 - 256 * 1152),
        ("stage2", None, 610_856_096),
        ("stage3", "256", 610_856_096),
        ("stage3", "512", 611_349_152),
        ("stage3", "1024", 611_349_152),
        ("finetune", "256", 610_856_096),
        ("finetune", "512", 610_856_096),
        ("finetune", "1024", 611_349_152),
        *(("finetune", variant, 610_856_096) for variant in SIGMA),
        *(("sigma", stage, 610_856_096) for stage in ("vae-256", "256", "512", "1024", "2048")),
        # 7 x 1152 parameters in each of the 14 blocks that compress.
        *(("sigma", stage, 610_968_992) for stage in ("1024-kv", "2048-kv")),
    ],
)
def test_published_stages_have_the_published_size(name, argument, trainable):
    config = load(name, argument)
    _, state = abstract_model(config.model)
    frozen = 0 if name == "stage1" else config.model.text_length * 4096
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) - frozen == trainable


def test_stages_are_those_of_the_paper():
    stages = [load(name, argument) for name, argument in STAGES[3:8]]
    assert [(c.steps, c.data.batch_size) for c in stages] == [
        (300_000, 1024),
        (150_000, 11_392),
        (90_000, 11_392),
        (100_000, 2_560),
        (16_000, 384),
    ]
    assert all(c.optimizer.learning_rate == 2e-5 and c.optimizer.weight_decay == 0.03 for c in stages)
    # Each stage starts from the run of the previous one.
    assert [c.init.path for c in stages] == ["", *(f"runs/{c.name}" for c in stages[:-1])]
    assert [c.model.base_size / c.model.position_scale for c in stages] == [16, 16, 16, 32, 32]


def test_the_fast_recipe_leaves_the_weights_of_a_plain_alpha():
    stages = [load(name, stage) for name, stage in STAGES if name == "fast"]
    plain = [load("stage1", None), load("stage2", None), load("stage3", "512"), load("stage3", "1024")]
    assert [config.model for config in stages] == [config.model for config in plain]
    assert [c.init.path for c in stages] == ["", *(f"runs/{c.name}" for c in stages[:-1])]
    assert [c.init.method for c in stages] == [c.init.method for c in plain]
    # Each option where the literature has it: alignment at 256 px, routing from 1,024 tokens on.
    assert [c.objective for c in stages] == ["alignment"] * 2 + ["diffusion"] * 2
    assert [c.token_routing.rate for c in stages] == [0, 0, 0.5, 0.5]
    # The stages that draw more timesteps of medium noise are followed by stages that draw all equally.
    assert [c.diffusion.timestep_density for c in stages] == ["logit_normal"] * 2 + ["uniform"] * 2
    for config in stages:
        last = config.at_step(config.steps - 1)
        assert last.objective == "diffusion" and last.token_routing.rate == 0
        assert not without_effect(config)


def test_the_stages_of_sigma_are_those_of_its_paper_and_its_official_configs():
    stages = {stage: load("sigma", stage) for name, stage in STAGES if name == "sigma"}
    assert {stage: c.steps for stage, c in stages.items()} == {
        **{"vae-256": 8_000, "256": 80_000, "512": 10_000, "1024": 5_000, "2048": 4_000},
        **{"1024-kv": 5_000, "2048-kv": 4_000},
    }
    # Each stage starts from the run of the one before it, the first one from α, whose VAE is another.
    chain = {"256": "vae-256", "512": "256", "1024": "512", "2048": "1024"}
    chain |= {"1024-kv": "1024", "2048-kv": "1024-kv"}
    for stage, config in stages.items():
        init = config.init
        if stage == "vae-256":
            assert init == InitConfig("weights", load("finetune", "256").init.path, new_vae=True)
        else:
            assert init == InitConfig("resize", f"runs/{stages[chain[stage]].name}")
        model, features, optimizer = config.model, config.features, config.optimizer
        pixels = int(re.search(r"\d+", stage)[0])
        assert (features.image_size, model.position_scale) == (pixels, pixels / 512)
        assert (model.text_length, features.text_length, features.latent_scale) == (300, 300, 0.13025)
        assert features.buckets == ("single" if pixels == 256 else "official")
        assert not features.text_encoder.clean_caption and not model.size_conditions
        assert model.kv_compression == ("conv" if stage.endswith("-kv") else "none")
        assert (optimizer.name, optimizer.learning_rate, optimizer.weight_decay) == ("came", 2e-5, 0)
        rate = learning_rate_schedule(optimizer, config.data.batch_size)
        peak = 2e-5 * (config.data.batch_size / 256) ** 0.5
        assert float(rate(optimizer.warmup_steps)) == pytest.approx(peak)
    assert stages["2048-kv"].model.compressed_layers == tuple(range(14, 28))


@pytest.mark.parametrize(
    # `sample_size` in transformer/config.json of the release, and the values that diffusers derives from it.
    ("size", "sample_size", "interpolation_scale", "use_additional_conditions"),
    [
        *(("256", 32, 1, False), ("512", 64, 1, False), ("1024", 128, 2, True)),
        *(("sigma-256", 32, 0.5, False), ("sigma-512", 64, 1, False)),
        *(("sigma-1024", 128, 2, False), ("sigma-2048", 256, 4, False)),
    ],
)
def test_finetuning_uses_the_released_models(
    size, sample_size, interpolation_scale, use_additional_conditions
):
    config = load("finetune", size)
    model = config.model
    assert (model.base_size * model.patch_size, model.position_scale, model.size_conditions) == (
        sample_size,
        interpolation_scale,
        use_additional_conditions,
    )
    release = "PixArt-Sigma-XL-2-" if size.startswith("sigma-") else "PixArt-XL-2-"
    release = f"hub:PixArt-alpha/{release}"
    assert config.init.method == "weights" and config.init.path.startswith(release)
    # With these conventions, an exported model generates the same images in diffusers.
    assert (config.guidance.null_text, config.guidance.null_mask) == ("t5_empty", "own")


def test_finetuning_uses_the_official_learning_rate():
    config = load("finetune", "512")
    rate = learning_rate_schedule(config.optimizer, config.data.batch_size)
    assert float(rate(0)) == pytest.approx(2e-5 * (32 / 256) ** 0.5)  # without warm-up


def test_the_configs_for_released_weights_of_sigma_are_those_of_alpha_with_its_differences():
    for name in ("finetune", "lora", "dreambooth"):
        alpha, sigma = (to_dict(load(name, variant)) for variant in ("512", "sigma-512"))
        assert {key for key in alpha if alpha[key] != sigma[key]} == {
            *("name", "model", "features", "init"),
            *(["optimizer"] if name == "finetune" else []),
        }
        assert {key for key in alpha["model"] if alpha["model"][key] != sigma["model"][key]} == {
            "text_length"
        }
        features = sigma["features"]
        assert {key for key in features if alpha["features"][key] != features[key]} == {
            *("buckets", "vae", "latent_scale", "text_length", "text_encoder"),
        }
        encoder = features["text_encoder"]
        assert (features["latent_scale"], encoder["clean_caption"], encoder["lower_case"]) == (
            0.13025,
            False,
            False,
        )
    assert load("finetune", "sigma-512").optimizer.name == "came"
    assert load("lora", "sigma-1024").features.vae == "hub:PixArt-alpha/PixArt-Sigma-XL-2-1024-MS/vae"
    # The others are released as transformers alone.
    for size, name in (("256", "256x256"), ("512", "512-MS"), ("2048", "2K-MS")):
        config = load("lora", f"sigma-{size}")
        assert config.features.vae == "hub:PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers/vae"
        assert config.init.path == f"hub:PixArt-alpha/PixArt-Sigma-XL-2-{name}/transformer"


@pytest.mark.parametrize("size", ["256", "512", "1024", *SIGMA])
def test_dreambooth_is_built_on_the_other_configs(size):
    """Everything but the data, the length of the run, and what is trained is as in the base config."""
    for base, variant, changed in (
        ("lora", size, {"learning_rate", "warmup_steps"}),
        (
            *("finetune", f"full-{size}"),
            # AdamW, as for α, which is also what the rate is from.
            {"learning_rate", "sqrt_scaling_batch"}
            | ({"name", "weight_decay", "warmup_steps"} if size in SIGMA else set()),
        ),
    ):
        before, config = to_dict(load(base, size)), load("dreambooth", variant)
        after = to_dict(config)
        assert {name for name in after if after[name] != before[name]} == {
            *("name", "steps", "data", "optimizer", "checkpoint", "log"),
            *(["adapter"] if base == "lora" else []),
        }
        optimizer = after["optimizer"]
        different = {name for name in optimizer if optimizer[name] != before["optimizer"][name]}
        assert different - {"accumulation"} == changed - {"accumulation"}
        # A micro-batch has at most as many samples as in the base config.
        assert (
            4 // optimizer["accumulation"]
            <= before["data"]["batch_size"] // before["optimizer"]["accumulation"]
        )
        data = config.data
        assert len(data.train.split(",")) == 2 and data.batch_size == 4
        assert data.folder_numbers("weights") == data.folder_numbers("loss_weights") == [1, 1]
    # The official rates are used as they are.
    for variant, expected in ((size, 1e-3), (f"full-{size}", 5e-6)):
        config = load("dreambooth", variant)
        assert float(learning_rate_schedule(config.optimizer, 4)(0)) == pytest.approx(expected)
    assert load("dreambooth", size).adapter.scale == 0.5  # rank 16, alpha 8


def test_unknown_stages_raise_an_error():
    with pytest.raises(UserError, match=r"no variant 'full-128': choose 256.*sigma-2048, full-256"):
        load("dreambooth", "full-128")
    with pytest.raises(UserError, match=r"no stage '4096': choose vae-256, 256, 512, .*2048-kv"):
        load("sigma", "4096")
    with pytest.raises(UserError, match=r"no variant 'sigma-2K': choose 256.*sigma-1024, sigma-2048"):
        load("lora", "sigma-2K")
    with pytest.raises(UserError, match="Did you mean 'stage"):
        load("digits", "stage")
    for name in ("stage3", "finetune"):
        with pytest.raises(UserError, match="choose 256, 512, 1024"):
            load(name, "128")


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


def values_with(name, value):
    """The values of a config, as JSON has them, in which the field called `name` has another value."""
    model = DiTConfig() if name == "model.num_classes" else PixArtConfig()
    values = to_dict(TrainConfig(model=model))
    *sections, last = name.split(".")
    place = values
    for section in sections:
        place = place[section]
    assert last in place
    place[last] = value
    return values


NUMBERS = [name for name, info in all_fields().items() if info.kind in (int, float)]
# Fields for which 0 has a meaning. All other numbers must be above 0.
ZERO = {
    *(f"model.{name}" for name in ("depth", "hidden_size", "num_heads", "patch_size", "mup_base_width")),
    *("seed", "data.first_step", "features.image_size", "features.text_length", "features.text_encoder.seed"),
    *(f"diffusion.{name}" for name in ("min_snr_gamma", "condition_dropout", "unmasked_weight")),
    *(f"diffusion.{name}" for name in ("noise_offset", "input_perturbation", "timestep_mean")),
    "diffusion.change_weighting",
    *("guidance.scale", "diffusion.timestep_slope", "optimizer.final_rate", "optimizer.beta3"),
    *(f"optimizer.{name}" for name in ("momentum", "sqrt_scaling_batch", "warmup_steps", "beta1", "beta2")),
    *(f"optimizer.{name}" for name in ("weight_decay", "clip_norm", "ema_decay")),
    "optimizer.muon_learning_rate",
    *(f"routing.{name}" for name in ("rate", "first_blocks", "last_blocks", "finish")),
    "checkpoint.snapshot_every",
    *("checkpoint.keep_every", "checkpoint.keep_best", "divergence.spike_factor"),
    *("log.validate_every", "log.sample_every", "adapter.alpha", "adapter.dropout"),
    *("features.token_size", "alignment.stop_step"),
}
MINUS_ONE = {f"mesh.{name}" for name in ("data", "fsdp", "tensor", "sequence", "slices")}


# Fields whose upper bound is that of their type, int32 or float32, and why no smaller one is needed.
UNLIMITED = {
    **dict.fromkeys(("steps", "data.first_step", "optimizer.warmup_steps", "routing.finish"), "steps"),
    **dict.fromkeys((f"checkpoint.{name}" for name in ("every", "keep_every", "snapshot_every")), "steps"),
    "alignment.stop_step": "steps",
    **dict.fromkeys((f"log.{name}" for name in ("every", "validate_every", "sample_every")), "steps"),
    **dict.fromkeys(("divergence.spike_warmup", "divergence.patience"), "steps"),
    **dict.fromkeys(("checkpoint.keep", "checkpoint.keep_best"), "numbers of checkpoints"),
    "log.validation_samples": "at most all held-out samples are used",
    "optimizer.sqrt_scaling_batch": "only divides the batch size",
    **dict.fromkeys(MINUS_ONE, "compared with the number of devices"),
    **dict.fromkeys((f"watchdog.{name}_seconds" for name in ("connect", "dead", "hang")), "seconds"),
    **dict.fromkeys(("optimizer.clip_norm", "diffusion.min_snr_gamma"), "an upper bound of other numbers"),
    **dict.fromkeys(("optimizer.learning_rate", "optimizer.muon_learning_rate"), "a run that diverges ends"),
    "guidance.scale": "an image that is not finite is an error",
    "divergence.spike_factor": "a larger one detects nothing",
}


@pytest.mark.parametrize("name", NUMBERS)
def test_nonsense_values_of_every_number_are_rejected(name):
    kind, field = all_fields()[name].kind, all_fields()[name].field
    limits = field.metadata
    assert limits["minimum"] is not None or limits["above"] is not None
    limited = limits["maximum"] is not None or limits["below"] is not None
    assert limited != (name in UNLIMITED)
    if name in ZERO:
        from_dict(values_with(name, kind(0)))
    if name in MINUS_ONE | {"routing.rate"}:
        from_dict(values_with(name, -1))
    for number in [*outside(field, kind), *([] if name in ZERO else [0])]:
        # JSON and flags give whole numbers to fields that are whole numbers.
        value = float(number) if kind is float else number
        with pytest.raises(UserError) as raised:
            from_dict(values_with(name, value))
        message = str(raised.value)
        assert name in message and "must be" in message
        assert "\n" not in message and len(message) < 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.beta2": 1.0}, r"optimizer.beta2 is 1.0: it must be in \[0, 1\)"),
        ({"divergence.spike_factor": 1.0}, "must be above 1, or 0"),
        ({"diffusion.beta_start": 0.5}, "beta_end is 0.02: it must be at least diffusion.beta_start"),
        ({"mesh.fsdp": -2}, "mesh.fsdp is -2: it must be at least 1, or -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"steps": 10**400}, "steps is 1000"),
        ({"watchdog.dead_seconds": 3}, "at least 4"),
        ({"data.weights": "1,-2"}, "data.weights is '1,-2': every weight must be a number above 0"),
        ({"data.weights": "1,nan"}, "above 0"),
        ({"data.weights": "1,x"}, "above 0"),
        ({"data.weights": "1,,2"}, "data.weights is '1,,2': every weight must be a number above 0"),
        ({"data.weights": "inf,1"}, "above 0"),
        ({"data.loss_weights": "1,0"}, "data.loss_weights is '1,0': every weight must be a number above 0"),
        ({"data.repeats": "1,2.5"}, "data.repeats is '1,2.5': every number must be a whole number from 1 to"),
        ({"data.repeats": "0"}, "whole number from 1 to 10000"),
        ({"data.repeats": "1,x"}, "whole number from 1 to 10000"),
        ({"diffusion.unmasked_weight": 1.5}, r"diffusion.unmasked_weight is 1.5: it must be in \[0, 1\]"),
        ({"model.mlp_ratio": 1e38}, r"model.mlp_ratio is 1e\+38: it must be in \(0, 1000\]"),
        ({"data.batch_size": 2**31 - 1}, r"data.batch_size is 2147483647: it must be in \[1, 1048576\]"),
        ({"data.weights": "1e308,1e308"}, r"above 0, from 1.1\d+e-38 to 3.4\d+e\+38"),
        ({"optimizer.eps": 1e-308}, r"optimizer.eps is 1e-308: it must be at least 1.1754944e-38\."),
        ({"optimizer.clip_norm": 1e-308}, r"it must be at least 1.1754944e-38, or 0\."),
        ({"model.mlp_ratio": 1e-6}, "leaves no hidden layer"),
        ({"log.tracker": "tensorbord"}, "log.tracker is 'tensorbord': choose .* Did you mean 'tensorboard'"),
        ({"log.tracker": "wandb,none"}, "log.tracker is 'none': choose one of tensorboard, wandb, trackio"),
        ({"log.tracker": ""}, "log.tracker is '': choose one of tensorboard, wandb, trackio, none"),
        ({"features.text_encoder.dtype": "fp16"}, "features.text_encoder.dtype is 'fp16': choose one of"),
    ],
)
def test_values_outside_their_range_raise_an_error(changes, message):
    ((name, value),) = changes.items()
    with pytest.raises(UserError, match=message):
        from_dict(values_with(name, value))


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


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("optimizer.lr", "optimizer.learning_rate"),
        ("optimizer.wd", "optimizer.weight_decay"),
        ("optimizer.warmup", "optimizer.warmup_steps"),
        ("optimizer.batch_size", "data.batch_size"),
        ("learning_rate", "optimizer.learning_rate"),
        ("model.dropout", "adapter.dropout"),
        ("features.text_encoder.widths", "features.text_encoder.weights"),
        ("log_every", "log.every"),
        ("optimizer.LR", "optimizer.learning_rate"),
        ("guidance.guidance_scale", "guidance.scale"),
    ],
)
def test_the_message_for_an_unknown_field_names_the_nearest(name, nearest, monkeypatch, tmp_path):
    values = to_dict(TrainConfig())
    *sections, last = name.split(".")
    place = values
    for section in sections:
        place = place[section]
    place[last] = 1
    with pytest.raises(UserError, match=f"^config field '{name}' is unknown. Did you mean '{nearest}'"):
        from_dict(values)


@pytest.mark.parametrize("name", ["", ".", "..", "../other", "/absolute", "a//b", "a\0b"])
def test_a_name_that_is_no_folder_needs_a_run_directory(name):
    with pytest.raises(UserError, match=r"^name is '.*', which cannot be a folder in runs/: set"):
        default_workdir(TrainConfig(name=name))
    assert default_workdir(TrainConfig(name="a b/stage2")) == "runs/a b/stage2"


def test_the_message_for_a_field_that_resembles_no_other_lists_its_section():
    with pytest.raises(UserError, match="Fields of init: method, path"):
        from_dict({"init": {"zzz": 1}})
    with pytest.raises(UserError, match=r"Fields of the config: name, .*, optimizer, "):
        from_dict({"grad_clip": 1})
    # "features.text_encoder.num_layers" has a similar name, and nothing to do with it.
    with pytest.raises(UserError, match="Fields of data: train, "):
        from_dict({"data": {"num_workers": 1}})


def test_help_describes_every_field():
    text = describe_fields()
    shown = " ".join(text.split())
    for name, info in all_fields().items():
        help = info.field.metadata["help"]
        assert f"--config.{name} ({info.kind.__name__}, default " in shown, name
        assert len(help) > 8 and help.endswith(".") and " ".join(help.split()) in shown, name
    assert "--config.optimizer.learning_rate (float, default 2e-05, above 0)" in text
    assert "optimizer: The optimizer. The defaults are those of PixArt-α." in text


def test_home_directories_are_expanded_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    paths = {name for name, info in all_fields().items() if info.field.metadata["path"]}
    assert paths == {
        *("features.vae", "features.text_encoder.tokenizer", "features.text_encoder.weights"),
        *("data.train", "data.validation", "compile.cache", "init.path", "init.adapter"),
        "features.image_encoder",
    }
    for name in paths:
        values = values_with(name, "~/a,~/b/~c")
        if name == "init.path":
            values["init"]["method"] = "weights"
        if name == "init.adapter":
            values["init"] |= {"method": "weights", "path": "weights"}
            values["adapter"] = {"kind": "lora"}
        config = from_dict(values)
        for part in name.split("."):
            config = getattr(config, part)
        assert config == "/home/someone/a,/home/someone/b/~c"


def test_config_files_that_cannot_be_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = "from pixart_jax.config import *\ndef get_config(): return to_config_dict(TrainConfig(name='x'))"
    files = {
        "good.py": good,
        "argument.py": good.replace("get_config()", "get_config(size)"),
        "empty.py": "",
        "syntax.py": "x = 1\nx = = 2\n",
        "fails.py": "def get_config():\n    return {}['key']\n",
        "other.py": "def get_config():\n    return 3\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert from_file("good.py").name == "x"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert from_file("~/good.py").name == "x"
    for spec, message in {
        "": "config file '' does not exist",
        "god.py": "config file 'god.py' does not exist.*Did you mean 'good.py'",
        "good": "Did you mean 'good.py'",
        "good.py:512": "get_config takes no '512': leave it out",
        "argument.py": "get_config needs one: give FILE:ARGUMENT",
        "empty.py": "has no function get_config",
        "syntax.py": "line 2 of config file 'syntax.py': SyntaxError",
        "fails.py": "line 2 of config file 'fails.py': KeyError: 'key'",
        "other.py": "returns int, not a ConfigDict",
    }.items():
        with pytest.raises(UserError, match=message):
            from_file(spec)


@pytest.mark.parametrize("widths", ["0.05,", "wide", "0.3", "0.005", "nan", "0.05,0.05", "0.05,0.0500000001"])
def test_widths_of_averages_are_different_numbers_in_a_range(widths):
    with pytest.raises(
        UserError, match=f"optimizer.power_ema is '{widths}': give different numbers from 0.01"
    ):
        OptimizerConfig(power_ema=widths)


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
