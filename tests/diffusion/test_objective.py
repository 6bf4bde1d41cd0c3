import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax.diffusion.objective import diffusion_loss, p_mean_variance
from pixart_jax.diffusion.schedule import add_noise, linear_schedule
from pixart_jax.errors import UserError

GOLDENS = np.load(Path(__file__).parents[1] / "data" / "diffusion.npz")
SCHEDULE = linear_schedule()


def nhwc(name):
    return np.moveaxis(GOLDENS[name], 1, -1)


def loss_inputs():
    return nhwc("plain_model_output"), nhwc("plain_x0"), nhwc("plain_noise"), GOLDENS["plain_t"]


@pytest.mark.parametrize("t_dtype", [np.int32, np.float32])
def test_loss_matches_the_official_code(t_dtype):
    output, x0, noise, t = loss_inputs()
    terms = diffusion_loss(SCHEDULE, output, x0, noise, t.astype(t_dtype))
    np.testing.assert_allclose(terms["mse"], GOLDENS["plain_term_mse"], rtol=1e-6)
    # vb is a sum of terms near 1 that nearly cancel, in float32 on both sides.
    np.testing.assert_allclose(terms["vb"], GOLDENS["plain_term_vb"], rtol=5e-5)
    np.testing.assert_allclose(terms["loss"], GOLDENS["plain_term_loss"], rtol=5e-5)
    assert {name: (term.shape, term.dtype) for name, term in terms.items()} == dict.fromkeys(
        ("loss", "mse", "vb"), ((6,), jnp.float32)
    )


def test_p_mean_variance_matches_the_official_code():
    p = p_mean_variance(SCHEDULE, nhwc("plain_model_output"), nhwc("plain_x0"), GOLDENS["plain_t"])
    np.testing.assert_allclose(p.mean, nhwc("pmv_mean"), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(p.variance, nhwc("pmv_variance"), rtol=1e-5)
    np.testing.assert_allclose(p.log_variance, nhwc("pmv_log_variance"), rtol=1e-6)
    np.testing.assert_allclose(p.x0, nhwc("pmv_pred_xstart"), rtol=1e-5, atol=1e-5)


def test_loss_of_a_perfect_prediction_is_zero_after_step_0():
    _, x0, noise, _ = loss_inputs()
    t = np.array([1, 2, 37, 249, 250, 999])
    # v = -1 selects the variance of the true posterior.
    output = np.concatenate([noise, -np.ones_like(noise)], axis=-1)
    terms = diffusion_loss(SCHEDULE, output, x0, noise, t)
    np.testing.assert_array_equal(terms["mse"], 0.0)
    np.testing.assert_allclose(terms["vb"], 0.0, atol=1e-6)


def test_vb_is_the_kl_divergence_in_bits():
    # Only the variance is wrong. The KL divergence of Gaussians with equal means is (r - 1 - log r) / 2 with
    # r = var_q / var_p.
    _, x0, noise, _ = loss_inputs()
    t = np.full(6, 300)
    output = np.concatenate([noise, np.ones_like(noise)], axis=-1)
    ratio = SCHEDULE.posterior_variance[300] / SCHEDULE.betas[300]
    expected = 0.5 * (ratio - 1.0 - math.log(ratio)) / math.log(2.0)
    vb = diffusion_loss(SCHEDULE, output, x0, noise, t)["vb"]
    np.testing.assert_allclose(vb, expected, rtol=0.05, atol=1e-7)


def test_step_0_is_the_likelihood_of_a_bin():
    # With the mean at x_0 the bin is x_0 +- 1/255 and its probability is erf(1 / (255 sigma sqrt 2)).
    x0 = jnp.full((1, 2, 2, 4), 0.25)
    noise = jnp.ones_like(x0)
    output = jnp.concatenate([noise, -jnp.ones_like(noise)], axis=-1)
    sigma = math.sqrt(SCHEDULE.posterior_variance[1])
    expected = -math.log2(math.erf(1.0 / (255.0 * sigma * math.sqrt(2.0))))
    vb = diffusion_loss(SCHEDULE, output, x0, noise, jnp.array([0]))["vb"]
    np.testing.assert_allclose(vb, expected, rtol=2e-3)  # the tanh approximation of erf


def test_vb_trains_only_the_variance():
    output, x0, noise, t = loss_inputs()

    def vb(output):
        return diffusion_loss(SCHEDULE, output, x0, noise, t)["vb"].sum()

    gradient = jax.jit(jax.grad(vb))(output)
    np.testing.assert_array_equal(gradient[..., :4], 0.0)
    assert np.abs(gradient[..., 4:]).max() > 0.0


def test_gradient_is_finite_at_every_step():
    t = np.arange(1000)
    noise = jax.random.normal(jax.random.key(0), (1000, 1, 1, 4))
    x0 = 3.0 * jax.random.normal(jax.random.key(1), noise.shape)
    output = 2.0 * jax.random.normal(jax.random.key(2), (1000, 1, 1, 8))
    gradient = jax.jit(jax.grad(lambda o: diffusion_loss(SCHEDULE, o, x0, noise, t)["loss"].mean()))(output)
    assert np.isfinite(gradient).all()


def test_min_snr_weights_match_a_computation_by_hand():
    output, x0, noise, t = loss_inputs()
    snr = GOLDENS["alphas_cumprod"][t] / (1.0 - GOLDENS["alphas_cumprod"][t])
    plain = diffusion_loss(SCHEDULE, output, x0, noise, t)
    weighted = diffusion_loss(SCHEDULE, output, x0, noise, t, weighting="min_snr", gamma=5.0)
    expected = np.where(snr > 5.0, 5.0 / snr, 1.0)
    assert expected[0] < 1e-3 and expected[-1] == 1.0
    np.testing.assert_allclose(weighted["mse"], plain["mse"] * expected, rtol=1e-5)
    np.testing.assert_array_equal(weighted["vb"], plain["vb"])
    np.testing.assert_allclose(weighted["loss"], weighted["mse"] + weighted["vb"], rtol=1e-6)


@pytest.mark.parametrize("c", [1e-3, 0.1, 10.0])
def test_pseudo_huber_matches_its_formula_in_float64(c):
    output, x0, noise, t = loss_inputs()
    plain = diffusion_loss(SCHEDULE, output, x0, noise, t)
    terms = diffusion_loss(SCHEDULE, output, x0, noise, t, huber_c=c)
    difference = noise.astype(np.float64) - output[..., :4]
    expected = (np.sqrt(difference**2 + c**2) - c).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(terms["huber"], expected, rtol=1e-5)
    np.testing.assert_array_equal(terms["vb"], plain["vb"])
    np.testing.assert_allclose(terms["loss"], terms["huber"] + terms["vb"], rtol=1e-6)
    assert terms.keys() == {"loss", "huber", "vb"}


def test_fixed_variance_has_no_vb():
    output, x0, noise, t = loss_inputs()
    whole = diffusion_loss(SCHEDULE, output, x0, noise, t)
    terms = diffusion_loss(SCHEDULE, output[..., :4], x0, noise, t, learned_variance=False)
    np.testing.assert_array_equal(terms["vb"], 0.0)
    np.testing.assert_array_equal(terms["loss"], whole["mse"])


def test_loss_is_computed_in_float32():
    output, x0, noise, t = loss_inputs()
    rounded = [jnp.asarray(a, jnp.bfloat16) for a in (output, x0, noise)]
    low = diffusion_loss(SCHEDULE, *rounded, t)
    high = diffusion_loss(SCHEDULE, *(a.astype(jnp.float32) for a in rounded), t)
    assert low["loss"].dtype == jnp.float32
    np.testing.assert_allclose(low["loss"], high["loss"], rtol=1e-6)


def test_learned_variance_spans_beta_and_the_posterior_variance():
    x_t = add_noise(SCHEDULE, nhwc("plain_x0"), nhwc("plain_noise"), GOLDENS["plain_t"])
    noise = nhwc("plain_noise")
    t = GOLDENS["plain_t"]
    for v, table in ((-1.0, np.exp(SCHEDULE.posterior_log_variance_clipped)), (1.0, SCHEDULE.betas)):
        output = np.concatenate([noise, np.full_like(noise, v)], axis=-1)
        variance = p_mean_variance(SCHEDULE, output, x_t, t).variance
        np.testing.assert_allclose(variance[:, 0, 0, 0], table[t], rtol=1e-5)


@pytest.mark.parametrize("channels, learned_variance", [(4, True), (8, False), (6, True)])
def test_loss_rejects_a_wrong_number_of_channels(channels, learned_variance):
    _, x0, noise, t = loss_inputs()
    output = np.zeros((6, 8, 8, channels))
    with pytest.raises(UserError, match=f"{channels} channels"):
        diffusion_loss(SCHEDULE, output, x0, noise, t, learned_variance=learned_variance)


def test_loss_rejects_an_unknown_weighting():
    with pytest.raises(UserError, match="Did you mean 'min_snr'"):
        diffusion_loss(SCHEDULE, *loss_inputs(), weighting="minsnr")


def test_p_mean_variance_needs_a_variance():
    with pytest.raises(UserError, match="4 channels"):
        p_mean_variance(SCHEDULE, nhwc("plain_noise"), nhwc("plain_x0"), GOLDENS["plain_t"])


def test_weights_of_positions_weight_the_error_of_each_value():
    """Positions are independent: the weighted mean is that of the losses of single positions."""
    output, x0, noise, t = loss_inputs()
    plain = diffusion_loss(SCHEDULE, output, x0, noise, t, weighting="min_snr")
    ones = diffusion_loss(SCHEDULE, output, x0, noise, t, weighting="min_snr", weights=jnp.ones((6, 8, 8)))
    for name in plain:
        np.testing.assert_array_equal(ones[name], plain[name])
    rng = np.random.default_rng(0)
    weights = (rng.integers(0, 3, (6, 8, 8)) / 2).astype(np.float32)
    found = diffusion_loss(SCHEDULE, output, x0, noise, t, weighting="min_snr", weights=weights)
    single = []
    for row, column in np.ndindex(8, 8):
        at = (slice(None), slice(row, row + 1), slice(column, column + 1))
        parts = (output[at], x0[at], noise[at])
        single.append(diffusion_loss(SCHEDULE, *parts, t, weighting="min_snr"))
    for name in found:
        terms = np.stack([one[name] for one in single], axis=1)
        np.testing.assert_allclose(
            found[name], (weights.reshape(6, 64) * terms).mean(1), rtol=1e-4, atol=1e-6
        )


def test_no_gradient_where_the_weight_is_zero():
    output, x0, noise, t = loss_inputs()
    weights = np.zeros((6, 8, 8), np.float32)
    weights[:, :4] = 1

    def loss(output):
        return diffusion_loss(SCHEDULE, output, x0, noise, t, weights=weights)["loss"].sum()

    gradient = np.asarray(jax.grad(loss)(output))
    assert not gradient[:, 4:].any() and gradient[:, :4].all(axis=(1, 2)).any()
