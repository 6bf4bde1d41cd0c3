import json

import pytest

from pixart_jax.config import (
    InitConfig,
    TrainConfig,
    all_fields,
    describe_fields,
    from_config_dict,
    from_dict,
    from_file,
    to_config_dict,
    to_dict,
    to_json,
)
from pixart_jax.errors import UserError
from pixart_jax.models.configs import DiTConfig


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


def test_integers_are_converted_to_floats():
    values = to_dict(TrainConfig())
    values["guidance"]["scale"] = 3
    assert from_dict(values).guidance.scale == 3.0


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
