import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from pixart_jax.config import FeaturesConfig, GuidanceConfig, TrainConfig
from pixart_jax.denoiser import Denoiser
from pixart_jax.errors import UserError
from pixart_jax.models.configs import NULL_TEXT, PixArtConfig
from pixart_jax.sampling import image_keys, make_sampler, picture_grid, sample_in_batches

MODEL = PixArtConfig(size="custom", depth=1, hidden_size=24, num_heads=2, text_dim=8, text_length=5)
CONFIG = TrainConfig(model=MODEL, features=FeaturesConfig(latent_scale=0.5))


@pytest.fixture(scope="module")
def drawn(random_params):
    """A function that samples the given rows of seven conditions: (rows, batch_size=4) -> latents."""
    _, params = random_params(MODEL)
    sample = make_sampler(Denoiser.of(CONFIG), height=4, width=4, steps=3)
    rng = np.random.default_rng(0)
    conditions = {
        "text": jnp.asarray(rng.normal(size=(7, 5, 8)), jnp.float32),
        "text_mask": jnp.asarray(np.arange(5) < rng.integers(1, 6, size=(7, 1))),
    }

    def draw(rows, batch_size=4):
        rows = np.asarray(rows)
        chosen = {name: value[rows] for name, value in conditions.items()}
        return sample_in_batches(sample, params, image_keys(rows), chosen, batch_size)

    return draw


def test_an_image_does_not_depend_on_its_batch(drawn):
    together = drawn(range(7))
    assert together.shape == (7, 4, 4, 4)
    np.testing.assert_array_equal(drawn([3]), together[3:4])
    np.testing.assert_array_equal(drawn([6, 5, 4, 3, 2, 1, 0]), together[::-1])
    assert np.abs(together[0] - together[1]).max() > 1e-2


def test_float16_samples_what_float32_does(random_params):
    latents = {}
    for dtype in ("float32", "float16"):
        config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, dtype=dtype))
        _, params = random_params(config.model)
        sample = make_sampler(Denoiser.of(config), height=8, width=8, steps=10)
        conditions = {
            "text": jax.random.normal(jax.random.key(0), (2, 5, 8)),
            "text_mask": jnp.ones((2, 5), bool),
        }
        latents[dtype] = sample(params, image_keys(np.arange(2)), conditions)
    error = jnp.abs(latents["float16"] - latents["float32"]).max() / jnp.abs(latents["float32"]).max()
    assert latents["float16"].dtype == jnp.float32
    assert 1e-6 < error < 1e-2


def test_latents_leave_the_scale_of_the_model(random_params, drawn):
    _, params = random_params(MODEL)
    config = dataclasses.replace(CONFIG, features=FeaturesConfig(latent_scale=1.0))
    sample = make_sampler(Denoiser.of(config), height=4, width=4, steps=3)
    conditions = {"text": jnp.ones((1, 5, 8)), "text_mask": jnp.ones((1, 5), bool)}
    unit = sample(params, image_keys(np.arange(1)), conditions)
    halved = make_sampler(Denoiser.of(CONFIG), height=4, width=4, steps=3)(
        params, image_keys(np.arange(1)), conditions
    )
    np.testing.assert_allclose(halved, unit * 2, rtol=1e-5)


def latents_of_a_run(pipe, config, params, prompts, seeds):
    """Samples the latents of the image grids of a training run, in the scale of the network."""
    text, lengths = pipe.text_encoder.encode(prompts)
    conditions = {"text": text, "text_mask": np.arange(text.shape[1]) < lengths[:, None]}
    sample = make_sampler(Denoiser.of(config), height=tiny.SIDE, width=tiny.SIDE, steps=3)
    return sample(params, image_keys(seeds), conditions) * config.features.latent_scale


def test_a_run_samples_what_its_pipeline_samples(random_params):
    """The same latents from the same weights, prompts and seeds, with either guidance convention."""
    prompts, seeds = ["a corgi", "two red foxes sleep"], np.array([3, 7])
    # Four channels, so that guidance of three channels leaves one out.
    model = dataclasses.replace(tiny.MODEL, in_channels=4)
    features = dataclasses.replace(tiny.CONFIG.features, latent_scale=0.5)
    found = []
    for null_text, null_mask, channels in (("token", "caption", 3), ("t5_empty", "own", 4)):
        guidance = GuidanceConfig(null_text=null_text, null_mask=null_mask, channels=channels)
        config = dataclasses.replace(tiny.CONFIG, model=model, features=features, guidance=guidance)
        pipe = tiny.make_pipe(random_params, config=config)
        params = dict(random_params(model)[1])
        if null_text == "t5_empty":
            # A run reads the null caption from its features; the pipeline computes it with its text encoder.
            params[NULL_TEXT] = jnp.asarray(pipe.text_encoder.null_text()[0])
        of_run = latents_of_a_run(pipe, config, params, prompts, seeds)
        of_pipe = pipe(prompts, seed=seeds, steps=3, output="latents")
        np.testing.assert_allclose(of_run, of_pipe, rtol=1e-4, atol=1e-5)
        found.append(of_pipe)
    assert np.abs(found[0] - found[1])[..., :3].max() > 1e-2  # the conventions make a difference


def test_scales_up_to_1_are_no_guidance(random_params):
    _, params = random_params(MODEL)
    conditions = {"text": jnp.ones((1, 5, 8)), "text_mask": jnp.ones((1, 5), bool)}
    keys = image_keys(np.arange(1))
    found = []
    for scale in (0, 0.5, 1):
        # A scale that is stored in the config has the same effect as one that is given.
        config = dataclasses.replace(CONFIG, guidance=GuidanceConfig(scale=scale))
        sample = make_sampler(Denoiser.of(config), height=4, width=4, steps=2)
        found.append(sample(params, keys, conditions))
        np.testing.assert_array_equal(found[-1], found[0])
    guided = make_sampler(Denoiser.of(CONFIG), height=4, width=4, steps=2, scale=2.0)
    assert np.abs(guided(params, keys, conditions) - found[0]).max() > 1e-3
    with pytest.raises(UserError, match="guidance_scale is -1"):
        make_sampler(Denoiser.of(CONFIG), height=4, width=4, scale=-1)


def test_keys_are_those_of_the_seeds():
    keys = image_keys(np.asarray([5, 0]))
    np.testing.assert_array_equal(jax.random.key_data(keys[0]), jax.random.key_data(jax.random.key(5)))


def test_unknown_samplers_raise():
    with pytest.raises(UserError, match="Did you mean 'dpm_solver'"):
        make_sampler(Denoiser.of(CONFIG), height=4, width=4, sampler="dpm_solvr")


def test_a_grid_is_filled_row_by_row():
    images = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1) * 10
    grid = picture_grid(images, columns=2, magnify=2, gap=1)
    assert grid.shape == (7, 7, 3)
    assert grid[1, 1, 0] == 0 and grid[1, 4, 0] == 10 and grid[4, 1, 0] == 20
    assert grid[4, 4, 0] == 255 and grid[0, 0, 0] == 255
