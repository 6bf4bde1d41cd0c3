import dataclasses

import jax
import numpy as np
from stage_batches import CONFIG, MODEL, make_batch

from pixart_jax.config import DiffusionConfig, RoutingConfig
from pixart_jax.denoiser import NETWORK
from pixart_jax.training.objectives import make_objective, sample_keys
from pixart_jax.training.objectives.diffusion import draw, position_weights, token_route


def keys_of(batch):
    return sample_keys(jax.random.key(0), batch["index"])


def test_token_routing_depends_only_on_the_sample():
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(MODEL, depth=4),
        routing=RoutingConfig(rate=0.25, first_blocks=1, last_blocks=1),
    )
    batch = make_batch()
    keys = keys_of(batch)
    route = token_route(config, batch, keys)
    assert (route.start, route.stop) == (1, 3)
    kept = np.asarray(route.kept)
    assert kept.shape == (16, 3) and all(len(set(row)) == 3 for row in kept.tolist()) and kept.max() < 4
    assert len({tuple(sorted(row)) for row in kept.tolist()}) > 1
    np.testing.assert_array_equal(token_route(config, batch, keys[::-1]).kept, kept[::-1])
    assert token_route(config.without_routing(), batch, keys) is None


def test_validation_uses_fixed_timesteps_and_noise(random_params):
    params = {NETWORK: random_params(CONFIG.model)[1]}
    step = jax.jit(make_objective(CONFIG).validation)
    batch = make_batch() | {"weight": np.r_[np.ones(15), 0].astype(np.float32)}
    loss, count = step(params, batch)
    np.testing.assert_array_equal(count, [2] * 7 + [1])
    again, _ = step(params, batch)
    np.testing.assert_array_equal(loss, again)
    # A padding row has no influence.
    batch["latent_mean"][15] = 1e3
    np.testing.assert_allclose(step(params, batch)[0], loss, rtol=1e-6)


def test_latents_are_sampled_from_the_posterior_and_scaled():
    """x_0 = scale (mean + std eps), where eps is independent of the noise."""
    batch = make_batch()
    batch["latent_mean"][:] = 3.0
    draws = draw(CONFIG, batch, keys_of(batch))
    x0, noise, t = draws.x0, draws.noise, draws.timesteps
    assert abs(float(x0.mean()) - 1.5) < 0.01 and abs(float(x0.std()) - 0.05) < 0.005
    assert abs(np.corrcoef(np.ravel(x0), np.ravel(noise))[0, 1]) < 0.1
    assert 0 <= int(t.min()) < int(t.max()) <= 999


def masked(**changes):
    return dataclasses.replace(CONFIG, diffusion=DiffusionConfig(**changes))


def test_weights_of_positions_are_those_of_the_mask():
    """w = max(mask, unmasked_weight), and divided by its mean with `normalize_masks`."""
    assert position_weights(CONFIG, {}) is None and make_objective(CONFIG).arrays == ()
    assert make_objective(masked(unmasked_weight=0.1)).arrays == ("mask",)
    mask = np.random.default_rng(0).integers(0, 256, (3, 4, 4), np.uint8)
    mask[1], mask[2] = 255, 0
    weights = jax.jit(lambda batch: position_weights(masked(unmasked_weight=0.25), batch))({"mask": mask})
    np.testing.assert_allclose(weights, np.maximum(mask / 255, 0.25), rtol=1e-6)
    np.testing.assert_array_equal(weights[1], 1.0)  # exactly, so that the loss has the same bits
    config = masked(unmasked_weight=0.0, normalize_masks=True)
    weights = jax.jit(lambda batch: position_weights(config, batch))({"mask": mask})
    np.testing.assert_allclose(weights.mean(axis=(1, 2)), [1, 1, 0], rtol=1e-5)
    np.testing.assert_allclose(weights[0], mask[0] / mask[0].mean(), rtol=1e-5)


def test_masks_in_training_and_validation(random_params):
    params = {NETWORK: random_params(CONFIG.model)[1]}
    batch = make_batch()
    white, black = (np.full((16, 4, 4), value, np.uint8) for value in (255, 0))
    config = masked(unmasked_weight=0.25)
    plain, weighted = make_objective(CONFIG), make_objective(config)
    keys = keys_of(batch)
    terms = jax.jit(plain.loss)(params, batch, keys)
    same = jax.jit(weighted.loss)(params, batch | {"mask": white}, keys)
    quarter = jax.jit(weighted.loss)(params, batch | {"mask": black}, keys)
    for name in terms:
        np.testing.assert_allclose(same[name], terms[name], rtol=1e-6)
        np.testing.assert_allclose(quarter[name], 0.25 * terms[name], rtol=1e-5)
    held_out = batch | {"weight": np.ones(16, np.float32)}
    total, count = jax.jit(plain.validation)(params, held_out)
    masked_total, masked_count = jax.jit(weighted.validation)(params, held_out | {"mask": black})
    np.testing.assert_allclose(masked_total, 0.25 * total, rtol=1e-5)
    np.testing.assert_array_equal(masked_count, count)
