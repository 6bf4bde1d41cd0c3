import functools
import inspect
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import mixture
import numpy as np
import pytest

from pixart_jax.diffusion.guidance import guide
from pixart_jax.diffusion.multistep import Inpaint, draw_noise
from pixart_jax.diffusion.samplers import SAMPLERS, ddim, dpm_solver, iddpm, lcm, sa_solver
from pixart_jax.diffusion.schedule import linear_schedule
from pixart_jax.errors import UserError

GOLDENS = np.load(Path(__file__).parents[1] / "data" / "diffusion.npz")
SCHEDULE = linear_schedule()
X_T = np.moveaxis(GOLDENS["ddim_xT"], 1, -1)
KEYS = jax.random.split(jax.random.key(0), 2)
ANSWER = np.random.default_rng(1).normal(size=X_T.shape).astype(np.float32)
DEFAULT_STEPS = {"dpm_solver": 20, "ddim": 50, "iddpm": 100, "sa_solver": 25, "lcm": 4}


def model(x, t, shift=0.0):
    """The analytic model of the goldens; `shift` [B] takes the place of the text."""
    t, shift = t.reshape(-1, 1, 1, 1), jnp.reshape(shift, (-1, 1, 1, 1))
    return 0.9 * jnp.sin(1.3 * x + 2.0 * t / 1000.0) + 0.1 * x + shift


def with_variance(fn, v=0.3):
    return lambda x, t: jnp.concatenate([fn(x, t), jnp.full_like(x, v)], axis=-1)


def torch_model(x, t):
    import torch

    return 0.9 * torch.sin(1.3 * x + 2.0 * t / 1000.0) + 0.1 * x


def assert_close(actual, expected, tolerance=1e-4):
    """Checks equality within `tolerance` of the largest magnitude; solutions grow to a few hundred."""
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.abs(np.asarray(actual) - expected).max() <= tolerance * np.abs(expected).max()


def run_diffusers(scheduler, steps, x, fn=torch_model, skip=0, **options):
    import torch

    scheduler.set_timesteps(steps)
    if skip:
        scheduler.set_begin_index(skip)
    x = torch.tensor(np.asarray(x))
    for t in scheduler.timesteps[skip:]:
        x = scheduler.step(fn(x, t), t, x, **options, return_dict=False)[0]
    return x


def timesteps_of(sampler, steps, **options):
    """Returns the timesteps that are passed to the model, in order."""
    return [t for t, _ in watched(sampler, steps, **options)[1]]


def watched(sampler, steps, **options):
    """Returns the result, and the timestep and latents of every model call in order."""
    seen = []

    def spy(x, t):
        seen.append((float(t[0]), np.asarray(x)))
        return with_variance(model)(x, t)

    return eager(sampler, spy, X_T, SCHEDULE, steps=steps, keys=KEYS, **options), seen


def eager(sampler, *args, **options):
    """Runs the scan as a Python loop with concrete values; for a few steps this is faster than compiling."""
    with jax.disable_jit():
        return sampler(*args, **options)


# --- Comparison with the official code


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [5, 14, 20])
def test_dpm_solver_matches_the_official_code(steps, order):
    fn = guide(model, GOLDENS["dpm_cond"], GOLDENS["dpm_uncond"], 4.5)
    ours = dpm_solver(fn, np.moveaxis(GOLDENS["dpm_xT"], 1, -1), SCHEDULE, steps=steps, order=order)
    assert_close(ours, np.moveaxis(GOLDENS[f"dpm_steps{steps}_order{order}"], 1, -1))


def test_ddim_matches_the_official_code():
    assert_close(ddim(model, X_T, SCHEDULE, steps=25), np.moveaxis(GOLDENS["ddim25_out"], 1, -1))


def test_timesteps_are_the_official_ones():
    np.testing.assert_allclose(timesteps_of(dpm_solver, 5), 999.0 - 199.8 * np.arange(5), rtol=1e-6)
    np.testing.assert_allclose(timesteps_of(sa_solver, 5, tau=0.0), 999.0 - 199.8 * np.arange(5), rtol=1e-6)
    assert timesteps_of(lcm, 4) == [999, 759, 519, 279]
    assert timesteps_of(lcm, 4, spacing="linspace") == [999, 759, 499, 259]
    assert timesteps_of(iddpm, "ddim5") == [800, 600, 400, 200, 0]
    assert timesteps_of(iddpm, 4) == [999, 666, 333, 0]
    assert timesteps_of(ddim, 5) == [800, 600, 400, 200, 0]
    assert timesteps_of(ddim, 4, spacing="trailing") == [999, 749, 499, 249]


# --- Comparison with diffusers


# With 15 or more steps, diffusers lowers only the order of the last step.
@pytest.mark.parametrize("steps, order", [(5, 2), (10, 2), (20, 2), (10, 1), (14, 3), (15, 3)])
def test_dpm_solver_linspace_matches_diffusers(steps, order):
    diffusers = pytest.importorskip("diffusers")
    theirs = run_diffusers(diffusers.DPMSolverMultistepScheduler(solver_order=order), steps, X_T)
    assert_close(dpm_solver(model, X_T, SCHEDULE, steps=steps, order=order, spacing="linspace"), theirs)


def test_dpm_solver_starts_from_an_image_as_diffusers_does(steps=20):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    init = np.random.default_rng(0).normal(size=X_T.shape).astype(np.float32)
    scheduler = diffusers.DPMSolverMultistepScheduler()
    scheduler.set_timesteps(steps)
    skip = steps - int(steps * 0.6)
    noised = scheduler.add_noise(torch.tensor(init), torch.tensor(X_T), scheduler.timesteps[skip : skip + 1])
    theirs = run_diffusers(diffusers.DPMSolverMultistepScheduler(), steps, noised, skip=skip)
    ours = dpm_solver(model, X_T, SCHEDULE, steps=steps, spacing="linspace", init=init, strength=0.6)
    assert_close(ours, theirs)


# If N does not divide T, the noise levels of diffusers' "trailing" do not match the timesteps it passes.
@pytest.mark.parametrize("steps, spacing", [(7, "leading"), (10, "leading"), (10, "trailing")])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim_matches_diffusers(monkeypatch, steps, eta, spacing):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.schedulers import scheduling_ddim

    feed_noise(monkeypatch, scheduling_ddim, steps)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing=spacing)
    theirs = run_diffusers(scheduler, steps, X_T, eta=eta)
    ours = eager(ddim, model, X_T, SCHEDULE, steps=steps, eta=eta, spacing=spacing, keys=KEYS)
    assert_close(ours, theirs)


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_lcm_matches_diffusers(monkeypatch, steps):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.schedulers import scheduling_lcm

    feed_noise(monkeypatch, scheduling_lcm, steps)
    scheduler = diffusers.LCMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    theirs = run_diffusers(scheduler, steps, X_T)
    assert_close(eager(lcm, model, X_T, SCHEDULE, steps=steps, spacing="linspace", keys=KEYS), theirs)


def test_iddpm_matches_diffusers(monkeypatch, steps=10):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from diffusers.schedulers import scheduling_ddpm

    feed_noise(monkeypatch, scheduling_ddpm, steps)
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)

    def fn(x, t):
        # The scheduler splits noise and variance along axis 1.
        return torch.cat([torch_model(x, t), torch.full_like(x, 0.3)], dim=1)

    theirs = run_diffusers(scheduler, steps, X_T, fn=fn)
    assert_close(eager(iddpm, with_variance(model), X_T, SCHEDULE, steps=f"ddim{steps}", keys=KEYS), theirs)


def feed_noise(monkeypatch, module, steps):
    """Makes a diffusers scheduler use the noise of our samplers."""
    import torch

    noises = (torch.tensor(np.asarray(draw_noise(KEYS, step, X_T.shape[1:]))) for step in range(steps))
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(noises))


# --- Comparison with a known distribution


def column(values):
    return jnp.asarray(values, jnp.float32).reshape(-1, 1, 1, 1)


def flow_error(sampler, steps, start_level, end_level, **options):
    """Returns the largest error of a deterministic sampler's map from noise to data, over the middle 98 %.

    In one dimension the exact flow preserves quantiles.
    """
    run = jax.jit(lambda x: sampler(mixture.exact_model, x, SCHEDULE, steps=steps, **options))
    probabilities = np.linspace(0.01, 0.99, 999)
    # Exclude the gap between the modes, where the map is almost discontinuous.
    probabilities = probabilities[np.abs(probabilities - 0.3) > 0.02]
    result = run(column(mixture.quantiles(*start_level, probabilities))).ravel()
    return np.abs(result - mixture.quantiles(*end_level, probabilities)).max()


def levels(t):
    return tuple(float(level) for level in SCHEDULE.marginal(t))


@pytest.mark.parametrize(
    "sampler, options, steps, order",
    [
        (dpm_solver, {"order": 2}, (240, 480), 2),
        (dpm_solver, {"order": 3}, (240, 480), 3),
        (sa_solver, {"tau": 0.0}, (60, 240), 2),  # at 480 steps float32 limits the accuracy
        # The last steps, which have a lower order, limit the accuracy.
        (sa_solver, {"tau": 0.0, "predictor_order": 3, "corrector_order": 3}, (60, 240), 1.6),
    ],
)
def test_solvers_converge_to_the_flow_at_their_order(sampler, options, steps, order):
    coarse, fine = (flow_error(sampler, count, levels(999), levels(0), **options) for count in steps)
    assert fine < 0.007
    assert math.log(coarse / fine, steps[1] / steps[0]) > 0.9 * order


@pytest.mark.parametrize("sampler, spacing", [(dpm_solver, "linspace"), (ddim, "trailing")])
def test_samplers_that_end_without_noise_converge(sampler, spacing):
    coarse, fine = (
        flow_error(sampler, steps, levels(999), (1.0, 0.0), spacing=spacing) for steps in (10, 250)
    )
    assert coarse > 0.2 and fine < 0.02


@pytest.mark.parametrize(
    "sampler, model, coarse, fine, options",
    [
        (iddpm, mixture.exact_variance_model, 4, 100, {}),
        (ddim, lambda steps: mixture.exact_model, 10, 100, {"eta": 1.0}),
        (sa_solver, lambda steps: mixture.exact_model, 5, 50, {}),
    ],
)
def test_stochastic_samplers_converge_to_the_data(sampler, model, coarse, fine, options):
    rough = mixture.distance(mixture.draw(sampler, model(coarse), coarse, **options))
    samples = mixture.draw(sampler, model(fine), fine, **options)
    # The distance of 20,000 exact samples is about 0.008, because the share of each mode is random and the
    # modes are 2.5 apart.
    assert rough > 0.1 and mixture.distance(samples) < 0.03
    found = mixture.moments(samples)
    for name, (exact, standard_error) in mixture.expected_moments().items():
        # DDIM adds noise of variance beta~, which makes the modes too narrow unless all T steps are used.
        bound = 0.03 if sampler is ddim and name.endswith("std") else 4 * standard_error
        assert abs(found[name] - exact) < bound, name


def test_ancestral_sampling_needs_the_learned_variance():
    learned, beta = (
        mixture.distance(mixture.draw(iddpm, model, 30))
        for model in (mixture.exact_variance_model(30), mixture.with_variance(mixture.exact_model))
    )
    assert learned < 0.02 < 0.05 < beta


@pytest.mark.parametrize("steps", [1, 4])
def test_lcm_with_an_exact_consistency_function_samples_the_data(steps):
    assert mixture.distance(mixture.draw(lcm, mixture.consistency_model, steps)) < 0.02


# --- Properties that all samplers share


every_sampler = pytest.mark.parametrize("name", SAMPLERS)


def run(name, x_T=X_T, keys=KEYS, fn=None, **options):
    fn = fn or with_variance(model)
    return eager(SAMPLERS[name], fn, x_T, SCHEDULE, steps=6, keys=keys, **options)


@every_sampler
def test_signature(name):
    parameters = inspect.signature(SAMPLERS[name]).parameters
    assert list(parameters)[:3] == ["fn", "x_T", "schedule"]
    assert parameters["steps"].default == DEFAULT_STEPS[name]
    assert {"keys", "init", "strength", "inpaint", "return_x0"} <= set(parameters)


@every_sampler
def test_jit_gives_the_same_result_with_a_static_schedule(name):
    compiled = jax.jit(
        lambda x, keys, schedule: SAMPLERS[name](with_variance(model), x, schedule, steps=6, keys=keys),
        static_argnums=2,
    )
    # The compiler may round otherwise: 1.03e-5 with JAX 0.12.
    assert_close(compiled(X_T, KEYS, SCHEDULE), run(name), 2e-5)


@every_sampler
def test_an_image_does_not_depend_on_its_batch(name):
    result = run(name)
    assert np.abs(result[0] - result[1]).max() > 0.1
    # Not bit for bit: the last digit of XLA's sine may depend on the position in a vector.
    assert_close(run(name, X_T[::-1], KEYS[::-1]), result[::-1], 2e-5)
    other = run(name, np.stack([ANSWER[0], X_T[1]]), jnp.stack([jax.random.key(9), KEYS[1]]))
    assert_close(other[1], result[1], 2e-5)
    assert np.abs(other[0] - result[0]).max() > 0.1


@pytest.mark.parametrize("name", ["iddpm", "sa_solver", "lcm"])
def test_an_image_depends_on_its_key(name):
    other = jnp.stack([KEYS[0], jax.random.key(9)])
    first, second = run(name), run(name, keys=other)
    assert_close(first[:1], second[:1], 1e-6)
    assert np.abs(first[1] - second[1]).max() > 0.1
    with pytest.raises(UserError, match="one key per image"):
        run(name, keys=None)


@pytest.mark.parametrize("name", ["dpm_solver", "ddim"])
def test_deterministic_samplers_need_no_keys(name):
    assert_close(run(name, keys=None), run(name), 1e-6)


@pytest.mark.parametrize("name", ["dpm_solver", "ddim", "sa_solver", "lcm"])
def test_the_variance_half_is_optional(name):
    np.testing.assert_array_equal(run(name, fn=model), run(name))


def test_iddpm_needs_the_variance_half():
    with pytest.raises(UserError, match="4 channels"):
        run("iddpm", fn=model)


@every_sampler
def test_return_x0_returns_the_prediction_of_every_step(name):
    result, trajectory = run(name, return_x0=True)
    np.testing.assert_array_equal(result, run(name))
    assert trajectory.shape == (6, *X_T.shape)
    _, calls = watched(SAMPLERS[name], 6)
    for (t, x), x0 in zip(calls, trajectory, strict=True):
        alpha, sigma = SCHEDULE.marginal(t)
        assert_close(x0, (x - sigma * model(x, jnp.full(2, t))) / alpha, 1e-4)


def certain_model(answer):
    """A model that always predicts the image `answer`; `t` must be concrete."""

    def fn(x, t):
        alpha, sigma = SCHEDULE.marginal(float(t[0]))
        return jnp.concatenate([(x - alpha * answer) / sigma, -jnp.ones_like(x)], axis=-1)

    return fn


@every_sampler
@pytest.mark.parametrize("options", [{}, {"init": ANSWER[::-1], "strength": 0.5}])
def test_a_model_that_predicts_one_image_generates_it(name, options):
    # DPM-Solver and SA-Solver end at the noise level of step 0, sigma = 0.01.
    result = run(name, fn=certain_model(ANSWER), **options)
    np.testing.assert_allclose(result, ANSWER, atol=0.05)


@every_sampler
def test_init_skips_the_first_steps(name):
    _, whole = watched(SAMPLERS[name], 6)
    _, part = watched(SAMPLERS[name], 6, init=ANSWER, strength=0.5)
    assert [t for t, _ in part] == [t for t, _ in whole[3:]]
    alpha, sigma = SCHEDULE.marginal(part[0][0])
    np.testing.assert_allclose(part[0][1], alpha * ANSWER + sigma * X_T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ddim", "iddpm", "lcm"])
def test_a_run_from_init_equals_the_last_steps_of_a_full_run(name):
    # One-step methods carry only x, and the noise of a step is keyed by its number.
    result, calls = watched(SAMPLERS[name], 6)
    t, x = calls[2]
    alpha, sigma = SCHEDULE.marginal(t)
    init = jnp.asarray((x - sigma * X_T) / alpha)
    assert_close(run(name, init=init, strength=0.67), result)


def test_full_strength_starts_from_the_noised_image():
    alpha, sigma = SCHEDULE.marginal(999)
    noised = alpha * ANSWER + sigma * X_T
    assert_close(run("dpm_solver", init=ANSWER), run("dpm_solver", noised), 1e-5)


@every_sampler
def test_inpainting_keeps_the_known_region(name):
    mask = jnp.zeros((1, 8, 8, 1)).at[:, :4].set(1.0)
    noise = np.random.default_rng(2).normal(size=X_T.shape).astype(np.float32)
    inpaint = Inpaint(mask, jnp.asarray(ANSWER), jnp.asarray(noise))
    result, calls = watched(SAMPLERS[name], 6, inpaint=inpaint)
    np.testing.assert_array_equal(result[:, 4:], ANSWER[:, 4:])
    # This model works on each value separately, so the other region is sampled as without inpainting.
    assert_close(result[:, :4], run(name)[:, :4], 1e-5)
    assert len(calls) == 6
    for t, x in calls:
        alpha, sigma = SCHEDULE.marginal(t)
        np.testing.assert_allclose(x[:, 4:], (alpha * ANSWER + sigma * noise)[:, 4:], rtol=1e-5, atol=1e-5)


@every_sampler
def test_the_kept_region_influences_the_sampled_one(name):
    # A model that sees the whole image: the sampled half depends on the mean of the kept half.
    def fn(x, t):
        return with_variance(model)(x.mean(axis=(1, 2), keepdims=True) + 0.0 * x, t)

    mask = jnp.zeros((1, 8, 8, 1)).at[:, :4].set(1.0)
    dark, light = (
        run(name, fn=fn, inpaint=Inpaint(mask, jnp.full_like(X_T, level), jnp.zeros_like(X_T)))
        for level in (-2.0, 2.0)
    )
    assert np.abs(dark - light)[:, :4].max() > 0.1


def test_guidance_runs_inside_a_sampler():
    seen = []

    def fn(x, t, condition):
        seen.append(x.shape[0])
        return with_variance(functools.partial(model, shift=condition))(x, t)

    shift, null = jnp.array([0.2, -0.1]), jnp.zeros(1)
    guided = run("iddpm", fn=guide(fn, shift, null, 1.0))
    assert set(seen) == {2}
    assert_close(guided, run("iddpm", fn=with_variance(functools.partial(model, shift=shift))), 1e-6)
    partly = dpm_solver(guide(fn, shift, null, 4.0, interval=(200, 800)), X_T, SCHEDULE, steps=6)
    assert 4 in seen
    assert np.abs(partly - run("dpm_solver", fn=guide(fn, shift, null, 4.0))).max() > 0.01


@pytest.mark.parametrize(
    "sampler, options, message",
    [
        (dpm_solver, {"order": 4}, "order=4"),
        (dpm_solver, {"spacing": "karras"}, "spacing"),
        (dpm_solver, {"steps": 0}, "steps=0"),
        (ddim, {"eta": 2.0}, "eta"),
        (ddim, {"spacing": "even"}, "spacing"),
        (ddim, {"steps": 1001}, "steps=1001"),
        (lcm, {"steps": 51}, "training_steps"),
        (lcm, {"spacing": "even"}, "spacing"),
        (iddpm, {"steps": "ddim999"}, "no integer stride"),
        (iddpm, {"strength": 0.5}, "init"),
    ],
)
def test_invalid_arguments_raise(sampler, options, message):
    with pytest.raises(UserError, match=message):
        sampler(with_variance(model), X_T, SCHEDULE, keys=KEYS, **options)
