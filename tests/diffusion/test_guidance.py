import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax.diffusion.guidance import guide, uses_guidance
from pixart_jax.errors import UserError

B, C = 3, 4
X = jax.random.normal(jax.random.key(0), (B, 2, 2, C))
T = jnp.array([900.0, 500.0, 100.0])
CONDITIONAL = jnp.arange(1.0, 1.0 + B * C).reshape(B, C)
UNCONDITIONAL = 0.5 * jnp.ones((B, C))


def model(x, t, condition):
    """Predicts the noise x + condition + t / 1000 and a variance of 10 times the condition."""
    noise = x + condition[:, None, None] + t[:, None, None, None] / 1000.0
    return jnp.concatenate([noise, jnp.broadcast_to(10.0 * condition[:, None, None], x.shape)], axis=-1)


def noise_of(condition):
    return X + condition[:, None, None] + T[:, None, None, None] / 1000.0


def counted(calls):
    def fn(x, t, condition):
        calls.append(x.shape[0])
        return model(x, t, condition)

    return fn


def test_guidance_applies_to_the_noise_and_not_to_the_variance():
    output = guide(model, CONDITIONAL, UNCONDITIONAL, 3.0)(X, T)
    u, c = noise_of(UNCONDITIONAL), noise_of(CONDITIONAL)
    np.testing.assert_allclose(output[..., :C], u + 3.0 * (c - u), rtol=1e-5)
    np.testing.assert_allclose(output[..., C:], model(X, T, CONDITIONAL)[..., C:])
    assert output.dtype == jnp.float32


def test_unconditional_samples_come_first_in_the_doubled_batch():
    def position(x, t, condition):
        return jnp.broadcast_to(jnp.arange(x.shape[0]).reshape(-1, 1, 1, 1), x.shape)

    output = guide(position, CONDITIONAL, UNCONDITIONAL, 2.0)(X, T)
    # Image k is row k of the unconditional half and row B + k of the conditional half: k + 2 (B + k - k).
    np.testing.assert_array_equal(output[:, 0, 0, 0], np.arange(B) + 2 * B)


def test_guidance_of_the_first_three_channels():
    output = guide(model, CONDITIONAL, UNCONDITIONAL, 3.0, guided_channels=3)(X, T)
    u, c = noise_of(UNCONDITIONAL), noise_of(CONDITIONAL)
    np.testing.assert_allclose(output[..., :3], (u + 3.0 * (c - u))[..., :3], rtol=1e-5)
    np.testing.assert_allclose(output[..., 3], c[..., 3], rtol=1e-5)


def test_guiding_all_four_channels_equals_the_default():
    four, every = (
        guide(model, CONDITIONAL, UNCONDITIONAL, 3.0, guided_channels=count)(X, T) for count in (4, None)
    )
    np.testing.assert_array_equal(four, every)


@pytest.mark.parametrize(
    "scale, calls", [(1, [B]), (1.0, [B]), (0, [B]), (0.5, [B]), (np.float32(0.0), [B]), (2.0, [2 * B])]
)
def test_scales_up_to_1_run_only_the_conditional_half(scale, calls):
    """As in diffusers, where guidance is used above 1. The released LCM asks for a scale of 0."""
    seen = []
    output = guide(counted(seen), CONDITIONAL, UNCONDITIONAL, scale)(X, T)
    assert seen == calls
    scale = max(scale, 1)
    expected = noise_of(CONDITIONAL) * scale + noise_of(UNCONDITIONAL) * (1 - scale)
    np.testing.assert_allclose(output[..., :C], expected, rtol=1e-4, atol=1e-5)


def test_a_traced_scale_up_to_1_is_no_guidance_either():
    run = jax.jit(lambda scale: guide(model, CONDITIONAL, UNCONDITIONAL, scale)(X, T)[..., :C])
    for scale in (0.0, 0.5, 1.0):
        np.testing.assert_allclose(run(scale), noise_of(CONDITIONAL), rtol=1e-5)
    assert jnp.isnan(run(jnp.nan)).all()


@pytest.mark.parametrize("interval", [None, (0.0, 1000.0)])
def test_each_image_may_have_its_own_scale(interval):
    scales = jnp.array([0.0, 3.0, 7.0])
    output = guide(model, CONDITIONAL, UNCONDITIONAL, scales, interval=interval)(X, T)
    u, c = noise_of(UNCONDITIONAL), noise_of(CONDITIONAL)
    expected = u + jnp.array([1.0, 3.0, 7.0]).reshape(-1, 1, 1, 1) * (c - u)
    np.testing.assert_allclose(output[..., :C], expected, rtol=1e-5)


@pytest.mark.parametrize("scale", [-1, -0.001, float("nan"), float("inf"), np.float32(-2)])
def test_scales_that_are_negative_or_not_finite_raise(scale):
    with pytest.raises(UserError, match=r"guidance_scale is .* at least 0"):
        guide(model, CONDITIONAL, UNCONDITIONAL, scale)
    with pytest.raises(UserError, match=r"guidance_scale is .* at least 0"):
        uses_guidance(scale)


@pytest.mark.parametrize("scale", [[1.0, 4.0], "4", None])
def test_what_is_no_number_is_no_scale(scale):
    with pytest.raises(UserError, match="guidance_scale is"):
        uses_guidance(scale)


def test_scale_may_be_traced():
    @jax.jit
    def run(scale):
        return guide(model, CONDITIONAL, UNCONDITIONAL, scale)(X, T)

    np.testing.assert_allclose(run(3.0), guide(model, CONDITIONAL, UNCONDITIONAL, 3.0)(X, T), rtol=1e-5)


def test_interval_applies_to_the_timestep_of_each_image():
    output = guide(model, CONDITIONAL, UNCONDITIONAL, 3.0, interval=(100.0, 500.0))(X, T)
    u, c = noise_of(UNCONDITIONAL), noise_of(CONDITIONAL)
    np.testing.assert_allclose(output[0, ..., :C], c[0], rtol=1e-5)
    np.testing.assert_allclose(output[1:, ..., :C], (u + 3.0 * (c - u))[1:], rtol=1e-5)


@pytest.mark.parametrize("interval, ran", [((0, 1000), [2 * B]), ((901, 1000), [B]), ((0, 50), [B])])
def test_outside_the_interval_the_unconditional_half_does_not_run(interval, ran):
    seen = []

    def spy(x, t, condition):
        jax.debug.callback(lambda: seen.append(x.shape[0]))
        return model(x, t, condition)

    jax.jit(guide(spy, CONDITIONAL, UNCONDITIONAL, 3.0, interval=interval))(X, T).block_until_ready()
    jax.effects_barrier()
    assert seen == ran


def test_full_rescale_restores_the_deviation_of_the_conditional_noise():
    output = guide(model, CONDITIONAL, UNCONDITIONAL, 7.0, rescale=1.0)(X, T)
    axes = (1, 2, 3)
    np.testing.assert_allclose(
        output[..., :C].std(axis=axes), noise_of(CONDITIONAL).std(axis=axes), rtol=1e-5
    )


def test_partial_rescale_mixes_as_in_the_paper():
    output = guide(model, CONDITIONAL, UNCONDITIONAL, 7.0, rescale=0.7)(X, T)
    u, c = np.asarray(noise_of(UNCONDITIONAL)), np.asarray(noise_of(CONDITIONAL))
    guided = u + 7.0 * (c - u)
    # Lin et al. 2023, equations 15 and 16, as in diffusers' rescale_noise_cfg.
    rescaled = guided * c.std(axis=(1, 2, 3), keepdims=True) / guided.std(axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(output[..., :C], 0.7 * rescaled + 0.3 * guided, rtol=1e-5)


def test_conditions_are_pytrees_and_a_single_null_condition_is_broadcast():
    def fn(x, t, condition):
        text = jnp.where(condition["mask"], condition["text"], 0.0).sum(axis=1)
        return x + text[:, None, None, None]

    conditional = {"text": jnp.arange(12.0).reshape(B, 4), "mask": jnp.ones((B, 4), bool)}
    null = {"text": jnp.full((1, 4), 2.0), "mask": jnp.arange(4)[None] < 1}
    output = guide(fn, conditional, null, 3.0)(X, T)
    text = conditional["text"].sum(axis=1)[:, None, None, None]
    np.testing.assert_allclose(output, X + 2.0 + 3.0 * (text - 2.0), rtol=1e-5)


@pytest.mark.parametrize(
    "unconditional, options, message",
    [
        (None, {}, "needs an unconditional"),
        ((UNCONDITIONAL,), {}, "same fields"),
        (UNCONDITIONAL[:2], {}, "only axis 0"),
        (UNCONDITIONAL[:, :2], {}, "only axis 0"),
        (UNCONDITIONAL, {"interval": (500, 100)}, "interval"),
        (UNCONDITIONAL, {"rescale": 1.5}, "rescale"),
        (UNCONDITIONAL, {"guided_channels": 0}, "guided_channels"),
    ],
)
def test_invalid_arguments_raise(unconditional, options, message):
    with pytest.raises(UserError, match=message):
        guide(model, CONDITIONAL, unconditional, 3.0, **options)
