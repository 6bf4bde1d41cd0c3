import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pixart_jax.config import InitConfig, TextEncoderConfig, TrainConfig
from pixart_jax.denoiser import init_params
from pixart_jax.errors import UserError
from pixart_jax.models.configs import DiTConfig, PixArtConfig
from pixart_jax.training import initialization
from pixart_jax.training.initialization import (
    REPARAMETERIZATION_TIMESTEP,
    compare_settings,
    reparameterize,
    resize,
)

SHAPE = dict(size="custom", depth=3, hidden_size=24, num_heads=2)
DIT = DiTConfig(**SHAPE, num_classes=4)
PIXART = PixArtConfig(**SHAPE, text_dim=8, text_length=5)
LATENTS = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 6, 4)), jnp.float32)


def fresh(config):
    return jax.jit(lambda: init_params(config, 1))()


def run(graph, params, *arguments):
    return jax.jit(nnx.merge(graph, params))(*arguments)


def text(seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.float32), jnp.ones((2, 5))


@pytest.mark.parametrize("size_conditions", [False, True])
def test_reparameterized_network_equals_the_dit_at_its_timestep(random_params, size_conditions):
    config = dataclasses.replace(PIXART, size_conditions=size_conditions)
    sizes = (jnp.full((2, 2), 300.0), jnp.ones((2, 1))) if size_conditions else ()
    dit_graph, dit = random_params(DIT)
    graph, _ = random_params(config)
    params, report = reparameterize(dit, DIT, fresh(config), config)

    t = jnp.full(2, float(REPARAMETERIZATION_TIMESTEP))
    no_class = jnp.full(2, DIT.num_classes)
    expected = run(dit_graph, dit, LATENTS, t, no_class)
    for seed in (0, 1):  # for any text
        out = run(graph, params, LATENTS, t, *text(seed), *sizes)
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
    # At other timesteps all blocks follow the projection of the first one, so the outputs are close but
    # differ.
    away = run(graph, params, LATENTS, t + 300, *text(), *sizes)
    assert jnp.abs(away - run(dit_graph, dit, LATENTS, t + 300, no_class)).max() > 1e-3
    assert "t_block.kernel" in report.computed
    assert "blocks.stacked.attn.qkv.kernel" in report.copied
    assert "blocks.stacked.cross_attn.proj.kernel" in report.new
    assert len(report.copied + report.computed + report.new) == len(jax.tree.leaves(params))


def test_resized_network_initially_equals_the_old_one(random_params):
    graph, old = random_params(PIXART)
    config = dataclasses.replace(PIXART, size_conditions=True, base_size=32, position_scale=2.0)
    new_graph, _ = random_params(config)
    params, report = resize(old, PIXART, fresh(config), config)
    assert sorted({name.split(".")[0] for name in report.new}) == ["ratio_embedder", "size_embedder"]
    t = jnp.asarray([3.0, 700.0])
    out = run(new_graph, params, LATENTS, t, *text(), jnp.full((2, 2), 512.0), jnp.full((2, 1), 1.3))
    # base_size 32 with position_scale 2 spans the same positions as base_size 16, and the new size embedders
    # return zero at first.
    np.testing.assert_allclose(out, run(graph, old, LATENTS, t, *text()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(depth=2), "depth 3 -> 2"),
        (dict(hidden_size=48), "hidden_size 24 -> 48"),
        (dict(in_channels=1), "in_channels 4 -> 1"),
    ],
)
def test_stages_of_different_shape_raise(random_params, change, message):
    _, dit = random_params(DIT)
    config = dataclasses.replace(PIXART, **change)
    with pytest.raises(UserError, match=message):
        reparameterize(dit, DIT, {}, config)


def test_resize_initializes_a_dit_only_from_a_dit(random_params):
    graph, old = random_params(DIT)
    config = dataclasses.replace(DIT, base_size=32, position_scale=2.0)
    new_graph, _ = random_params(config)
    params, report = resize(old, DIT, fresh(config), config)
    assert not (report.new or report.computed or report.left_out)
    t, labels = jnp.asarray([3.0, 700.0]), jnp.asarray([0, 3])
    expected = run(graph, old, LATENTS, t, labels)
    np.testing.assert_allclose(run(new_graph, params, LATENTS, t, labels), expected, rtol=1e-4, atol=1e-4)
    more = dataclasses.replace(DIT, num_classes=7)
    with pytest.raises(UserError, match="num_classes 4 -> 7"):
        resize(old, DIT, fresh(more), more)
    with pytest.raises(UserError, match="a 'dit' and the new one a 'pixart'"):
        resize(old, DIT, fresh(PIXART), PIXART)


def run_config(**changes):
    """The config of a run; `changes` by dotted name."""
    config = TrainConfig(model=PIXART, init=InitConfig("weights", "w"))
    for name, value in changes.items():
        section, field = name.split("__")
        part = dataclasses.replace(getattr(config, section), **{field: value})
        config = dataclasses.replace(config, **{section: part})
    return config


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model__position_scale", 2.0, r"model\.position_scale 2\.0 \(here 1\.0\)"),
        ("features__latent_scale", 0.13025, r"features\.latent_scale 0\.13025 \(here 0\.18215\)"),
        ("diffusion__num_timesteps", 500, r"diffusion\.num_timesteps 500 \(here 1000\)"),
        ("diffusion__beta_start", 0.00085, r"diffusion\.beta_start 0\.00085 \(here 0\.0001\)"),
        ("diffusion__beta_end", 0.012, r"diffusion\.beta_end 0\.012 \(here 0\.02\)"),
    ],
)
def test_settings_that_weights_were_trained_with_are_compared(name, value, message):
    with pytest.raises(UserError, match=rf"init\.path 'w' were trained with {message}"):
        compare_settings(run_config(**{name: value}), run_config(), lambda line: None)


def test_settings_that_a_run_may_change_are_printed():
    said = []
    compare_settings(run_config(), run_config(optimizer__learning_rate=1.0), said.append)
    assert not said
    # Another image size, with another scale of the positions, is what `resize` is for.
    larger = run_config(model__base_size=32, model__position_scale=2.0, guidance__null_mask="caption")
    compare_settings(run_config(), larger, said.append)
    assert said == [
        "position embedding: base_size 16 in the weights, 32 here; "
        "position_scale 1.0 in the weights, 2.0 here",
        "unlike the weights of w: guidance.null_mask own (here caption)",
    ]
    raw = run_config(features__text_encoder=TextEncoderConfig(clean_caption=False))
    compare_settings(run_config(), raw, said.append)
    assert said[2].endswith(": features.text_encoder.clean_caption True (here False)")
    kept = run_config(features__text_encoder=TextEncoderConfig(clean_caption=False, lower_case=False))
    compare_settings(raw, kept, said.append)
    assert said[3].endswith(": features.text_encoder.lower_case True (here False)")


def test_a_frozen_network_keeps_its_positions_unless_the_image_size_changes():
    said, before = [], run_config()
    config = run_config(model__base_size=32, model__position_scale=2.0, adapter__kind="lora")
    assert config.features.image_size == before.features.image_size
    with pytest.raises(UserError) as error:
        compare_settings(before, config, said.append)
    assert "model.base_size 16 (here 32), model.position_scale 1.0 (here 2.0)" in str(error.value)
    assert str(error.value).endswith("set --config.model.base_size=16 --config.model.position_scale=1.0.")
    features = dataclasses.replace(config.features, image_size=2 * before.features.image_size)
    compare_settings(before, dataclasses.replace(config, features=features), said.append)
    assert len(said) == 1 and "base_size 16 in the weights, 32 here" in said[0]


def test_missing_and_unknown_arrays_raise(random_params):
    _, old = random_params(PIXART)
    target = fresh(PIXART)
    with pytest.raises(UserError, match=r"surplus is unknown to the new model"):
        resize({**old, "surplus": jnp.ones(3)}, PIXART, target, PIXART)
    with pytest.raises(UserError, match=r"t_block\.bias is missing in the old model"):
        resize({**old, "t_block": {"kernel": old["t_block"]["kernel"]}}, PIXART, target, PIXART)
    normed = dataclasses.replace(PIXART, qk_norm=True)
    with pytest.raises(UserError, match="qk_norm False -> True"):
        resize(old, PIXART, fresh(normed), normed)


def test_captions_may_become_longer(random_params):
    """The null caption, which the features of the run replace, is all that changes."""
    _, old = random_params(PIXART)
    longer = dataclasses.replace(PIXART, text_length=7)
    params, report = resize(old, PIXART, fresh(longer), longer)
    assert report.new == ["null_text"] and params["null_text"].shape == (7, 8)
    assert not report.left_out and not report.computed


def test_compression_is_switched_on_as_an_average(random_params):
    config = dataclasses.replace(PIXART, kv_compression="conv", kv_compression_layers="1")
    graph, old = random_params(PIXART)
    new_graph, _ = random_params(config)
    params, report = resize(old, PIXART, fresh(config), config)
    assert report.new == [
        f"blocks.compression.{name}" for name in ("conv.bias", "conv.kernel", "norm.bias", "norm.scale")
    ]
    np.testing.assert_array_equal(params["blocks"]["compression"]["conv"]["kernel"], 0.25)
    t = jnp.asarray([3.0, 700.0])
    before = run(graph, old, LATENTS, t, *text())
    after = run(new_graph, params, LATENTS, t, *text())
    assert 1e-3 < np.abs(before - after).max() < np.abs(before).max()


def test_compression_of_more_blocks_keeps_that_of_the_old_ones(random_params):
    one, two = (
        dataclasses.replace(PIXART, kv_compression="conv", kv_compression_layers=layers)
        for layers in ("1", "0-1")
    )
    _, old = random_params(one)
    params, report = resize(old, one, fresh(two), two)
    assert len(report.computed) == 4
    kernel = params["blocks"]["compression"]["conv"]["kernel"]
    np.testing.assert_array_equal(kernel[0], 0.25)
    np.testing.assert_array_equal(kernel[1], old["blocks"]["compression"]["conv"]["kernel"][0])
    with pytest.raises(
        UserError, match=r"blocks 0-1, the new one only of 1: set model\.kv_compression_layers"
    ):
        resize(params, two, fresh(one), one)
    larger = dataclasses.replace(two, kv_compression_factor=3)
    with pytest.raises(UserError, match="kv_compression_factor 2 -> 3"):
        resize(params, two, fresh(larger), larger)


def test_a_frozen_network_does_not_get_compression():
    before = run_config()
    config = run_config(model__kv_compression="conv", adapter__kind="lora")
    with pytest.raises(
        UserError, match=r"do not compress .* blocks 1-2 .* is frozen \(adapter\.kind 'lora'\)"
    ):
        compare_settings(before, config, print)
    compare_settings(run_config(model__kv_compression="conv"), config, print)
    compare_settings(before, run_config(model__kv_compression="conv"), print)


@pytest.mark.parametrize(("old", "new"), [(PIXART, PIXART), (DIT, DIT)])
def test_only_a_dit_is_reparameterized_to_a_pixart(old, new):
    with pytest.raises(UserError, match=rf"the old model is a '{old.kind}' and the new one a '{new.kind}'"):
        reparameterize({}, old, {}, new)


def test_resizing_what_is_no_run_names_the_method(tmp_path):
    config = dataclasses.replace(run_config(), init=InitConfig("resize", str(tmp_path)))
    with pytest.raises(UserError, match=r"is no run: .* set --config\.init\.method=weights"):
        initialization._starting_weights(config, {}, print, print)


def test_another_vae_must_be_declared():
    said = []
    before = run_config(features__latent_scale=0.18215)
    config = run_config(features__latent_scale=0.13025)
    with pytest.raises(UserError, match=r"or init\.new_vae for another VAE"):
        compare_settings(before, config, said.append)
    declared = dataclasses.replace(config, init=dataclasses.replace(config.init, new_vae=True))
    compare_settings(before, declared, said.append)
    assert said == ["a new VAE: features.latent_scale 0.18215 in the weights, 0.13025 here"]
    # PixArt-Σ at 256 px also has other positions than PixArt-α.
    moved = dataclasses.replace(declared.model, position_scale=0.5)
    with pytest.raises(UserError, match=r"trained with model\.position_scale 1\.0 \(here 0\.5\)"):
        compare_settings(before, dataclasses.replace(before, model=moved), said.append)
    compare_settings(before, dataclasses.replace(declared, model=moved), said.append)
    assert said[-1] == "position embedding: position_scale 1.0 in the weights, 0.5 here"
    with pytest.raises(UserError, match=r"init\.new_vae is True, but the run starts from random weights"):
        InitConfig(new_vae=True)
