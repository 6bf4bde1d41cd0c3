import importlib.util
import json
from pathlib import Path

import jax
import pytest

from pixart_jax.config import (
    FeaturesConfig,
    InitConfig,
    TrainConfig,
    from_config_dict,
    from_dict,
    to_config_dict,
    to_dict,
    to_json,
)
from pixart_jax.denoiser import abstract_model
from pixart_jax.errors import UserError
from pixart_jax.models.dit import DiTConfig
from pixart_jax.models.pixart import PixArtConfig
from pixart_jax.training.optimizers import learning_rate_schedule

ROOT = Path(__file__).parent.parent
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
        ("optimizer.learning_rat", 1.0, "'optimizer.learning_rat' is unknown. Did you mean 'learning_rate'"),
        ("model.dpeth", 1, "'model.dpeth' is unknown. Did you mean 'depth'"),
        ("model.kind", "pixar", "Did you mean 'pixart'"),
        ("steps", "many", "'steps' is 'many': it must be of type int"),
        ("steps", 0, "steps is 0"),
        ("data.batch_size", 10, "is not divisible by optimizer.accumulation 4"),
        ("init.path", "somewhere", "give both or neither"),
        ("guidance.channels", 2, "choose 3 or 4"),
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
    ],
)
def test_published_stages_have_the_published_size(name, argument, trainable):
    config = load(name, argument)
    _, state = abstract_model(config.model)
    frozen = 0 if name == "stage1" else 120 * 4096
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


@pytest.mark.parametrize(
    # `sample_size` in transformer/config.json of the release, and the values that diffusers derives from it.
    ("size", "sample_size", "interpolation_scale", "use_additional_conditions"),
    [("256", 32, 1, False), ("512", 64, 1, False), ("1024", 128, 2, True)],
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
    assert config.init.method == "weights" and config.init.path.startswith("PixArt-XL-2-")
    # With these conventions, an exported model generates the same images in diffusers.
    assert (config.guidance.null_text, config.guidance.null_mask) == ("t5_empty", "own")


def test_finetuning_uses_the_official_learning_rate():
    config = load("finetune", "512")
    rate = learning_rate_schedule(config.optimizer, config.data.batch_size)
    assert float(rate(0)) == pytest.approx(2e-5 * (32 / 256) ** 0.5)  # without warm-up


def test_unknown_stages_raise_an_error():
    with pytest.raises(UserError, match="Did you mean 'stage"):
        load("digits", "stage")
    for name in ("stage3", "finetune"):
        with pytest.raises(UserError, match="choose 256, 512, 1024"):
            load(name, "128")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routing": {"rate": 1.0}}, r"routing.rate is 1.0: it must be in \[0, 1\)"),
        ({"routing": {"rate": 0.5, "finish": -1}}, "routing.finish is -1"),
        ({"routing": {"rate": 0.5, "first_blocks": 2, "last_blocks": 2}}, "leaves 0 blocks to skip"),
        ({"optimizer": {"name": "moun"}}, "optimizer.name is 'moun'.*Did you mean 'muon'"),
    ],
)
def test_invalid_routing_and_optimizer(changes, message):
    with pytest.raises(UserError, match=message):
        from_dict({"model": {"kind": "pixart", "size": "custom", "depth": 4}, **changes})
