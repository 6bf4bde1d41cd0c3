import dataclasses

import jax
import numpy as np
import pytest
from stage_batches import CONFIG, MODEL, make_batch

from pixart_jax.config import DiffusionConfig, RoutingConfig
from pixart_jax.denoiser import NETWORK, Denoiser
from pixart_jax.diffusion.schedule import add_noise
from pixart_jax.diffusion.timesteps import UNIFORM_SHARE, change_weights, timestep_probabilities
from pixart_jax.errors import UserError
from pixart_jax.training.objectives import make_objective, sample_keys
from pixart_jax.training.objectives.diffusion import (
    _CANDIDATES_STREAM,
    Drawn,
    Draws,
    draw,
    importance_weighted,
    loss_terms,
    nearest_noise,
    perturb,
    position_weights,
    predict,
    token_route,
)


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


def with_diffusion(**changes):
    return dataclasses.replace(CONFIG, diffusion=dataclasses.replace(CONFIG.diffusion, **changes))


def test_a_density_changes_only_the_timesteps():
    batch = make_batch(size=512)
    plain = draw(CONFIG, batch, keys_of(batch))
    dense = draw(with_diffusion(timestep_density="logit_normal", timestep_mean=1.0), batch, keys_of(batch))
    assert dense.timesteps.mean() > plain.timesteps.mean() + 100
    for name in ("x0", "noise", "dropped"):
        np.testing.assert_array_equal(getattr(dense, name), getattr(plain, name))


@pytest.mark.parametrize("density", ["logit_normal", "sigmoid", "speed"])
def test_importance_weights_give_the_expectation_of_uniform_timesteps(density):
    """The mean of weight(t) f(t) is that of f over all timesteps, here f = t / T and f = 1."""
    config = with_diffusion(timestep_density=density, importance_weights=True)
    batch = make_batch(size=4096)
    draws = draw(config, batch, keys_of(batch))
    values = {"f": draws.timesteps / 1000.0, "one": np.ones(4096, np.float32)}
    weighted = importance_weighted(config, values, draws.timesteps)
    # The standard error is about 0.02.
    np.testing.assert_allclose(weighted["f"].mean(), 0.4995, atol=0.06)
    np.testing.assert_allclose(weighted["one"].mean(), 1.0, atol=0.08)
    # Exactly, over all timesteps: sum p(t) weight(t) f(t) = sum f(t) / T.
    every = np.arange(1000)
    weights = importance_weighted(config, {"w": np.ones(1000)}, every)["w"]
    probabilities = timestep_probabilities(density, 1000, boundary=643, uniform_share=UNIFORM_SHARE)
    np.testing.assert_allclose(probabilities * weights, 1e-3, rtol=1e-5)
    assert weights.max() <= 1.001 / UNIFORM_SHARE
    same = importance_weighted(with_diffusion(timestep_density=density), values, draws.timesteps)
    assert same is values


@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_change_weighting_multiplies_the_noise_error(random_params, loss):
    params, batch = {NETWORK: random_params(MODEL)[1]}, make_batch()
    keys = keys_of(batch)
    configs = [with_diffusion(loss=loss), with_diffusion(loss=loss, change_weighting=0.8)]
    plain, weighted = (jax.jit(make_objective(config).loss)(params, batch, keys) for config in configs)
    timesteps = np.asarray(draw(CONFIG, batch, keys).timesteps)
    weights = change_weights(Denoiser.of(CONFIG).schedule, 0.8)[timesteps]
    np.testing.assert_allclose(weighted[loss], weights * plain[loss], rtol=1e-5)
    np.testing.assert_allclose(weighted["vb"], plain["vb"], rtol=1e-5)
    np.testing.assert_allclose(weighted["loss"], weights * plain[loss] + plain["vb"], rtol=1e-5)
    with pytest.raises(UserError, match=r"change_weighting is 0\.6 and diffusion\.min_snr_gamma 5\.0: both"):
        DiffusionConfig(change_weighting=0.6, min_snr_gamma=5.0)


def test_the_nearest_of_several_noises_is_used():
    """Against all candidates, of which the first is the noise without the option."""
    batch = make_batch(size=64)
    keys = keys_of(batch)
    draws = draw(CONFIG, batch, keys)
    assert nearest_noise(CONFIG, draws, keys) is draws
    config = with_diffusion(noise_candidates=5)
    found = jax.jit(lambda draws, keys: nearest_noise(config, draws, keys))(draws, keys)
    fold = jax.random.fold_in
    others = [
        [jax.random.normal(fold(fold(key, _CANDIDATES_STREAM), i), (4, 4, 4)) for i in range(1, 5)]
        for key in keys
    ]
    candidates = np.concatenate([np.asarray(draws.noise)[:, None], np.array(others)], axis=1)
    distances = np.square(np.asarray(draws.x0)[:, None] - candidates).sum(axis=(2, 3, 4))
    nearest = distances.argmin(axis=1)
    assert set(nearest) == set(range(5))
    np.testing.assert_allclose(found.noise, candidates[np.arange(64), nearest], atol=1e-6)
    for name in ("x0", "timesteps", "dropped"):
        np.testing.assert_array_equal(getattr(found, name), getattr(draws, name))
    # The choice for a sample does not depend on the other samples of the batch.
    part = Draws(*(array[::-3] for array in draws[:4]))
    np.testing.assert_array_equal(nearest_noise(config, part, keys[::-3]).noise, found.noise[::-3])


def test_offset_and_perturbation_apply_to_the_chosen_noise(random_params):
    """The loss is that of the nearest noise with its offset and perturbation."""
    params, batch = random_params(MODEL)[1], make_batch()
    keys = keys_of(batch)
    config = with_diffusion(noise_candidates=3, noise_offset=0.5, input_perturbation=0.1, condition_dropout=0)
    nearest = nearest_noise(config, draw(config, batch, keys), keys)
    draws = perturb(config, nearest, keys)
    assert np.any(nearest.noise != draw(config, batch, keys).noise)
    denoiser = Denoiser.of(config)
    conditions = denoiser.conditions(batch)
    drawn = Drawn(draws, conditions)
    expected = jax.jit(lambda p: loss_terms(denoiser, drawn, predict(denoiser, p, drawn)))(params)
    found = jax.jit(make_objective(config).loss)({NETWORK: params}, batch, keys)
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)


def test_the_noise_offset_is_constant_in_each_channel():
    batch = make_batch(size=256)
    keys = keys_of(batch)
    draws = draw(CONFIG, batch, keys)
    assert perturb(CONFIG, draws, keys) is draws
    moved = perturb(with_diffusion(noise_offset=0.5), draws, keys)
    offset = np.asarray(moved.noise - draws.noise)
    np.testing.assert_allclose(offset, np.broadcast_to(offset[:, :1, :1], offset.shape), atol=1e-6)
    assert abs(offset[:, 0, 0].std() - 0.5) < 0.05 and abs(offset.mean()) < 0.05
    assert abs(np.corrcoef(offset[:, 0, 0, 0], offset[:, 0, 0, 1])[0, 1]) < 0.2
    assert moved.perturbation is None
    np.testing.assert_array_equal(moved.x0, draws.x0)


def test_only_the_input_of_the_network_is_perturbed(random_params):
    """With input noise xi, the network gets the latents of the noise eps + xi, and the target is eps."""
    batch = make_batch()
    keys = keys_of(batch)
    config = with_diffusion(input_perturbation=0.1)
    draws = perturb(config, draw(config, batch, keys), keys)
    xi = np.asarray(draws.perturbation)
    assert abs(xi.std() - 0.1) < 0.005
    np.testing.assert_array_equal(draws.noise, draw(CONFIG, batch, keys).noise)
    denoiser, params = Denoiser.of(config), random_params(MODEL)[1]
    conditions = denoiser.conditions(batch)
    drawn = Drawn(draws, conditions)
    terms = jax.jit(lambda p: loss_terms(denoiser, drawn, predict(denoiser, p, drawn)))(params)
    x_t = add_noise(denoiser.schedule, draws.x0, draws.noise + xi, draws.timesteps)
    output = jax.jit(lambda p: denoiser(p, x_t, draws.timesteps, conditions))(params)
    expected = np.square(draws.noise - output[..., :4]).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(terms["mse"], expected, rtol=1e-5)


def test_options_of_training_do_not_change_the_validation_loss(random_params):
    params = {NETWORK: random_params(MODEL)[1]}
    batch = make_batch() | {"weight": np.ones(16, np.float32)}
    options = dict(
        noise_offset=0.5,
        input_perturbation=0.1,
        timestep_density="speed",
        importance_weights=True,
        change_weighting=0.6,
        noise_candidates=3,
    )
    objectives = [make_objective(config) for config in (CONFIG, with_diffusion(**options))]
    plain, other = (jax.jit(objective.validation)(params, batch)[0] for objective in objectives)
    np.testing.assert_array_equal(plain, other)
    keys = keys_of(batch)
    plain, other = (jax.jit(objective.loss)(params, batch, keys)["loss"] for objective in objectives)
    assert np.all(plain != other)
