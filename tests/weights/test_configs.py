import json

import foreign
import ml_dtypes
import numpy as np
import pytest
from foreign import as_tensors, state_dict

from pixart_jax.config import DiffusionConfig
from pixart_jax.errors import UserError
from pixart_jax.models.configs import PixArtConfig
from pixart_jax.models.layers import position_table
from pixart_jax.weights.configs import (
    diffusers_config,
    dit_config,
    official_config,
    read_noise_schedule,
    read_positions,
    to_diffusers_config,
    to_noise_schedule,
)
from pixart_jax.weights.files import Tensors


@pytest.mark.parametrize("size, sizes", [("small", False), ("large", True)])
def test_the_model_of_an_official_file_is_inferred(size, sizes):
    numbers = {**foreign.SIZES[size], "sizes": sizes}
    config = official_config(
        as_tensors(foreign.official_state_dict(**numbers)), {"num_heads": numbers["heads"]}
    )
    assert (config.hidden_size, config.depth) == (numbers["width"], numbers["depth"])
    assert (config.base_size, config.position_scale) == (numbers["side"] // 2, numbers["scale"])
    assert (config.text_dim, config.text_length) == (numbers["text"], numbers["tokens"])
    assert config.size_conditions == numbers["sizes"]
    assert config.learn_sigma and config.mlp_ratio == 4


def test_the_model_of_a_dit_file_is_inferred():
    model = foreign.TorchDiT(width=64, depth=3, heads=4, side=8, classes=10)
    config = dit_config(as_tensors(state_dict(model)), {"num_heads": 4})
    assert (config.hidden_size, config.depth, config.num_heads, config.num_classes) == (64, 3, 4, 10)
    assert (config.base_size, config.position_scale) == (4, 1.0)


XL = official_config(
    Tensors(
        "XL/2",
        {
            "x_embedder.proj.weight": (1152, 4, 2, 2),
            "x_embedder.proj.bias": (1152,),
            "blocks.27.scale_shift_table": (6, 1152),
            "blocks.0.mlp.fc1.bias": (4608,),
            "final_layer.linear.bias": (32,),
            "y_embedder.y_embedding": (120, 4096),
            "y_embedder.y_proj.fc1.weight": (1152, 4096),
        },
        None,
    ),
    {"base_size": 64, "position_scale": 2.0},
)


def test_the_published_size_needs_no_flag():
    assert (XL.size, XL.depth, XL.num_heads, XL.head_dim, XL.mlp_ratio) == ("XL/2", 28, 16, 72, 4.0)


@pytest.mark.parametrize("scale", [0.25, 0.5, 1.0, 2.0, 4.0, 1.3, 3.14159])
@pytest.mark.parametrize("side, width", [(1, 8), (2, 8), (4, 48), (16, 1152), (64, 64)])
def test_base_size_and_scale_are_inferred_from_positions(scale, side, width):
    table = position_table(side, side, width, side, scale)[None]
    base_size, found = read_positions(table)
    assert base_size == side
    if side > 1:
        assert found == pytest.approx(scale, rel=1e-6)
        if (scale * 4).is_integer():
            assert found == scale


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.bfloat16])
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("side, width", [(2, 48), (8, 48), (16, 1152), (64, 1152)])
def test_rounded_positions(scale, side, width, dtype):
    """Whole files are stored in float8, with the position buffer."""
    table = position_table(side, side, width, side, scale)[None].astype(dtype)
    assert read_positions(table) == (side, scale)
    with pytest.raises(UserError, match="is not the table of sines"):
        read_positions(np.ascontiguousarray(table[:, ::-1]))


def test_invalid_positions_raise():
    table = position_table(4, 4, 48, 4, 1.0)[None]
    for broken in (table + 0.01 * np.sin(np.arange(48)), np.zeros_like(table), table[:, ::-1]):
        with pytest.raises(UserError, match="is not the table of sines"):
            read_positions(np.ascontiguousarray(broken, np.float32))
    with pytest.raises(UserError, match=r"square grid\..*--base_size"):
        read_positions(position_table(4, 6, 48, 4, 1.0)[None])


def test_what_a_file_does_not_contain_must_be_given():
    numbers = {**foreign.SIZES["small"], "sizes": False}
    arrays = foreign.official_state_dict(**numbers)
    with pytest.raises(UserError, match=r"width 48, .*--num_heads"):
        official_config(as_tensors(arrays), {})
    with pytest.raises(UserError, match="base_size=5 contradicts the file, which has 4"):
        official_config(as_tensors(arrays), {"num_heads": 4, "base_size": 5})
    del arrays["pos_embed"]
    with pytest.raises(UserError, match="--base_size"):
        official_config(as_tensors(arrays), {"num_heads": 4})
    config = official_config(as_tensors(arrays), {"num_heads": 4, "base_size": 8, "position_scale": 0.5})
    assert (config.base_size, config.position_scale) == (8, 0.5)


def test_assumed_values_are_used_where_a_file_has_none():
    arrays = foreign.official_state_dict(**{**foreign.SIZES["small"], "sizes": False})
    assumed = {"num_heads": 4, "base_size": 8, "position_scale": 0.5, "text_length": 77}
    config = official_config(as_tensors(arrays), {}, assumed)
    assert (config.num_heads, config.base_size, config.position_scale) == (4, 4, 1.0)
    assert config.text_length == 10
    del arrays["pos_embed"], arrays["y_embedder.y_embedding"]
    config = official_config(as_tensors(arrays), {"base_size": 16}, assumed)
    assert (config.num_heads, config.base_size, config.position_scale) == (4, 16, 0.5)
    assert config.text_length == 77


def test_diffusers_configs():
    numbers = {**foreign.SIZES["small"], "sizes": True}
    model = foreign.diffusers_model(**numbers)
    tensors, config = as_tensors(state_dict(model)), dict(model.config)
    # Before 0.30 the class was Transformer2DModel; sample_size 128 then meant size conditions, and the scale
    # of the positions followed from the size.
    old = {k: v for k, v in config.items() if k not in ("use_additional_conditions", "interpolation_scale")}
    old |= {"_class_name": "Transformer2DModel", "sample_size": 128, "num_vector_embeds": None}
    read = diffusers_config(tensors, old, {})
    assert (read.size_conditions, read.base_size, read.position_scale) == (True, 64, 2.0)
    # The first upload of PixArt-Sigma at 1024 px does not say that it has none.
    plain = as_tensors(state_dict(foreign.diffusers_model(**{**numbers, "sizes": False})))
    read = diffusers_config(plain, old, {})
    assert (read.size_conditions, read.base_size, read.position_scale) == (False, 64, 2.0)
    for change, message in (
        ({"norm_type": "ada_norm_zero"}, "norm_type 'ada_norm_zero'"),
        ({"activation_fn": "geglu"}, "activation_fn"),
        ({"attention_head_dim": 16}, "4 heads of 16 for tensors of width 48"),
        ({"sample_size": "8"}, "sample_size '8'"),
        ({"interpolation_scale": 0}, "interpolation_scale 0"),
        ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel"),
        ({"interpolation_scale": 10**400}, "interpolation_scale 10"),
        ({"interpolation_scale": float("nan")}, "interpolation_scale nan: it must be a finite number"),
        ({"patch_size": 4}, "patch_size 4 for tensors that have 2"),
        ({"num_layers": 3}, "num_layers 3 for tensors that have 2"),
        ({"in_channels": 16}, "in_channels 16 for tensors that have 4"),
        ({"out_channels": 4}, "out_channels 4 for tensors that have 8"),
        ({"caption_channels": 4096}, "caption_channels 4096 for tensors that have 24"),
    ):
        with pytest.raises(UserError, match=message):
            diffusers_config(tensors, {**config, **change}, {})


@pytest.mark.parametrize("sizes", [False, True])
def test_a_config_comes_back_from_its_diffusers_file(sizes):
    numbers = {**foreign.SIZES["large"], "sizes": sizes}
    tensors = as_tensors(state_dict(foreign.diffusers_model(**numbers)))
    config = PixArtConfig(
        size="custom", depth=3, hidden_size=96, num_heads=6, base_size=8, position_scale=2.0, text_dim=40,
        text_length=14, size_conditions=sizes,
    )  # fmt: skip
    assert diffusers_config(tensors, to_diffusers_config(config), {"text_length": 14}) == config
    # Without a config.json, the caller must give the values that do not follow from the tensors.
    stated = {"num_heads": 6, "base_size": 8, "position_scale": 2.0, "text_length": 14}
    assert diffusers_config(tensors, None, stated) == config


def save_scheduler(folder, **values):
    file = folder / "scheduler" / "scheduler_config.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(values))


def test_the_noise_schedule_of_a_pipeline_folder(tmp_path):
    default = DiffusionConfig(num_timesteps=500, min_snr_gamma=5.0)
    assert read_noise_schedule(tmp_path, default) == default  # the folder has no scheduler
    save_scheduler(tmp_path, num_train_timesteps=200, beta_end=0.01)
    found = read_noise_schedule(tmp_path, default)
    assert found == DiffusionConfig(num_timesteps=200, beta_end=0.01, min_snr_gamma=5.0)
    assert to_noise_schedule(found) == dict(num_train_timesteps=200, beta_start=1e-4, beta_end=0.01)
    save_scheduler(tmp_path, beta_start="small")
    with pytest.raises(UserError, match="beta_start' is 'small'"):
        read_noise_schedule(tmp_path, default)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(beta_schedule="scaled_linear"), r"beta_schedule 'scaled_linear' \(PixArt: 'linear'\)"),
        (dict(prediction_type="v_prediction"), "prediction_type 'v_prediction'"),
        (dict(rescale_betas_zero_snr=True), "rescale_betas_zero_snr True"),
        (dict(trained_betas=[0.1, 0.2]), r"trained_betas \[0.1, 0.2\]"),
        (dict(_class_name="FlowMatchEulerDiscreteScheduler"), "_class_name FlowMatchEuler"),
    ],
)
def test_a_scheduler_of_networks_that_were_trained_in_another_way(tmp_path, values, message):
    save_scheduler(tmp_path, **values)
    with pytest.raises(UserError, match=message):
        read_noise_schedule(tmp_path, DiffusionConfig())


def test_stated_values_must_not_contradict_the_diffusers_file():
    model = foreign.diffusers_model(**{**foreign.SIZES["small"], "sizes": False})
    tensors, config = as_tensors(state_dict(model)), dict(model.config)
    for name, value, told in (("num_heads", 6, 4), ("base_size", 8, 4), ("position_scale", 2.0, 1.0)):
        assert getattr(diffusers_config(tensors, config, {name: told}), name) == told
        with pytest.raises(UserError, match=f"{name}={value} contradicts the file, which has {told}"):
            diffusers_config(tensors, config, {name: value})
