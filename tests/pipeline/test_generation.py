import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from pixart_jax.denoiser import Denoiser
from pixart_jax.errors import UserError
from pixart_jax.pipeline.generation import Program, images_per_device, seed_rows
from pixart_jax.pipeline.pipeline import Pipeline
from pixart_jax.pipeline.requests import Settings
from pixart_jax.sampling import guided_noise, image_keys, route_tokens

PROMPTS = ["a corgi", "two foxes", "", "the sea at night", "a corgi", "🙂", "soup on a table"]
OPTIONS = dict(steps=3, negative_prompt="blurry", output="latents")


@pytest.fixture(scope="module")
def pipe(random_params):
    return tiny.make_pipe(random_params)


@pytest.fixture(scope="module")
def together(pipe):
    return pipe(PROMPTS, seed=range(3, 10), batch_size=7, **OPTIONS)


def test_an_image_is_the_same_alone_in_a_batch_and_on_four_devices(pipe, together, random_params):
    """The images are equal bit for bit, on a CPU in float32."""
    assert np.isfinite(together).all() and together.std() > 0.1
    assert not np.array_equal(together[0], together[4])  # one prompt, two seeds
    for k in (0, 5, 6):
        np.testing.assert_array_equal(pipe(PROMPTS[k], seed=3 + k, **OPTIONS)[0], together[k])
    four = tiny.make_pipe(random_params, devices=4)
    np.testing.assert_array_equal(four(PROMPTS, seed=range(3, 10), **OPTIONS), together)
    np.testing.assert_array_equal(four(PROMPTS[5], seed=8, **OPTIONS)[0], together[5])


def test_the_devices_share_the_images(random_params):
    four = tiny.make_pipe(random_params, devices=4)
    assert four.generator.per_device(7, None) == 1 and four.generator.per_device(7, 3) == 1
    seen = []
    four(PROMPTS, steps=1, output="latents", callback=lambda step: seen.append(step.images))
    assert seen == [range(4), range(4, 7)]


def test_accelerators_generate_several_images_at_a_time():
    assert [images_per_device("gpu", 2, count, None) for count in (1, 2, 3, 7, 40)] == [1, 1, 2, 4, 4]
    assert images_per_device("gpu", 2, 1, 6) == 6
    assert images_per_device("cpu", 2, 40, None) == images_per_device("cpu", 2, 40, 6) == 1


def test_a_program_depends_on_some_settings_only():
    """Changing any of the other settings must not compile a new program."""
    shape, options = (32, 32, 3), {"order": 3, "spacing": "linspace"}
    program = Program.of(shape, Settings(steps=3, sampler_options=options))
    same = Settings(
        steps=3,
        sampler_options=dict(reversed(options.items())),
        seed=7,
        guidance_scale=2,
        height=64,
        image="x",
    )
    assert Program.of(shape, same) == program and hash(Program.of(shape, same)) == hash(program)
    others = [Settings(steps=4), Settings(steps=3, guidance_interval=(0, 9)), Settings(steps=3, strength=0.5)]
    programs = {program, *(Program.of(shape, each) for each in others)}
    programs |= {Program.of((64, 32, 3), same), Program.of(shape, same, watched=True)}
    assert len(programs) == 6


def test_a_callback_sees_every_step(pipe, together, random_params):
    for sampler, last in (("dpm_solver", True), ("sa_solver", False)):
        steps = []
        out = pipe(PROMPTS[:2], seed=[3, 4], callback=steps.append, **{**OPTIONS, "sampler": sampler})
        assert [step.number for step in steps] == [1, 2, 3] * 2
        assert [step.images for step in steps] == [range(1)] * 3 + [range(1, 2)] * 3
        assert steps[0].timestep == 999 and steps[0].timestep > steps[1].timestep > steps[2].timestep
        assert all(step.latents.shape == (1, tiny.SIDE, tiny.SIDE, 3) for step in steps)
        if last:
            # DPM-Solver++ ends close to its last clean prediction, and a callback does not change the result.
            np.testing.assert_allclose(steps[-1].latents[0], out[1], rtol=0, atol=0.2)
            np.testing.assert_allclose(out, together[:2], rtol=0, atol=1e-5)


def test_what_a_callback_raises_ends_the_call(pipe):
    """The exception itself, not one of JAX, and the pipeline can still be used."""
    seen = []

    class Enough(BaseException):
        pass

    def fail(step):
        seen.append(step.number)
        raise Enough("enough")

    with pytest.raises(Enough, match="enough"):
        pipe("a corgi", callback=fail, **OPTIONS)
    assert seen == [1]
    pipe("a corgi", callback=lambda step: seen.append(step.number), **OPTIONS)
    assert seen == [1, 1, 2, 3]


def test_guidance_interval_and_rescale(pipe, together):
    options = {**OPTIONS, "seed": range(3, 10)}
    unguided = pipe(PROMPTS, guidance_scale=1, **options)
    outside = pipe(PROMPTS, guidance_interval=(2000, 3000), **options)
    scale = np.abs(together).max()  # large, because the weights are random
    close = dict(rtol=0, atol=1e-6 * scale)
    np.testing.assert_allclose(outside, unguided, **close)
    np.testing.assert_allclose(pipe(PROMPTS, guidance_interval=[0, 999], **options), together, **close)
    some = pipe(PROMPTS, guidance_interval=(0, 500), **options)
    assert np.abs(some - together).max() > 1e-5 * scale and np.abs(some - unguided).max() > 1e-5 * scale
    assert np.abs(pipe(PROMPTS, guidance_rescale=0.7, **options) - together).max() > 1e-5 * scale


def test_guidance_by_routing(random_params):
    """routed + s (dense - routed), where half of the tokens, by seed and timestep, skip the middle blocks."""
    model = dataclasses.replace(tiny.MODEL, depth=3)
    pipe = tiny.make_pipe(random_params, config=dataclasses.replace(tiny.CONFIG, model=model))
    options = dict(steps=3, output="latents", guidance_by="routing", guidance_scale=3.0)
    together = pipe(PROMPTS[:3], seed=[3, 4, 5], batch_size=3, **options)
    np.testing.assert_array_equal(pipe(PROMPTS[1], seed=4, **options)[0], together[1])
    dense = pipe(PROMPTS[:3], seed=[3, 4, 5], steps=3, output="latents", guidance_scale=1)
    np.testing.assert_array_equal(
        pipe(PROMPTS[:3], seed=[3, 4, 5], **options | {"guidance_scale": 0.5}), dense
    )
    assert np.abs(together - dense).max() > 1e-3

    # One evaluation, from the equation.
    conditions = {"text": jnp.ones((2, 4, pipe.model.config.text_dim)), "text_mask": jnp.ones((2, 4), bool)}
    denoiser, keys = Denoiser.of(pipe.config), image_keys(np.array([3, 4]))
    params, x = pipe.generator.params, jax.random.normal(jax.random.key(0), (2, tiny.SIDE, tiny.SIDE, 3))
    t = jnp.array([700.0, 123.456])
    noise = guided_noise(denoiser, params, conditions, None, 3.0, routed=keys)(x, t)[..., :3]
    route = route_tokens(pipe.config, keys, t, (tiny.SIDE, tiny.SIDE))
    tokens = (tiny.SIDE // pipe.model.config.patch_size) ** 2
    assert route.kept.shape == (2, tokens // 2)
    assert route.stop == pipe.model.config.depth - 1 and all(
        len(set(row.tolist())) == tokens // 2 for row in route.kept
    )
    full = denoiser(params, x, t, conditions)[..., :3]
    weak = denoiser(params, x, t, conditions, route=route)[..., :3]
    np.testing.assert_allclose(noise, weak + 3 * (full - weak), rtol=1e-4, atol=1e-4)
    later = route_tokens(pipe.config, keys, t - 1, (tiny.SIDE, tiny.SIDE))
    assert not np.array_equal(later.kept, route.kept) and not np.array_equal(route.kept[0], route.kept[1])

    with pytest.raises(UserError, match="negative_prompt is given and guidance_by 'routing'"):
        pipe("a corgi", negative_prompt=["blurry"], **options)


def test_compressed_blocks_cannot_guide_by_routing(pipe):
    model = dataclasses.replace(pipe.config.model, depth=3, kv_compression="conv", kv_compression_layers="1")
    short = mock.Mock(config=dataclasses.replace(pipe.config, model=model))
    with pytest.raises(UserError, match=r"guidance_by is 'routing', but .* block 1 .* Set it to 'caption'"):
        Pipeline._check_routing(short, "")


def test_invalid_settings_are_reported_before_anything_runs(pipe):
    for arguments, message in (
        (dict(steps=1000), "steps=1000"),
        (dict(sampler_options={"order": 7}), "order=7"),
        (dict(sampler_options={"ordre": 2}), "has no 'ordre', only order, spacing. Did you mean 'order'"),
        (dict(sampler_options={"steps": 2}), "has no 'steps'"),
        (dict(sampler_options={"order": "2"}), "sampler_options.order is '2': it must be a whole number"),
        (
            dict(sampler="ddim", sampler_options={"eta": "x"}),
            "sampler_options.eta is 'x': it must be a number",
        ),
        (
            dict(sampler="sa_solver", sampler_options={"tau": None}),
            "sampler_options.tau is None: it must be a",
        ),
        (
            dict(sampler="sa_solver", sampler_options={"tau_interval": 3}),
            "sampler_options.tau_interval is 3: it must be two numbers",
        ),
        (dict(guidance_interval=(9, 3)), "guidance interval"),
        (dict(guidance_rescale=2.0), "rescale 2.0"),
        (dict(strength=1.5, image="x.png"), "strength 1.5"),
        (dict(steps=4, strength=0.1, image="x.png"), "leaves none"),
        (dict(sampler="dpm_slover"), "sampler is 'dpm_slover': choose one of .* Did you mean 'dpm_solver'"),
    ):
        with pytest.raises(UserError, match=message):
            pipe.resolve(Settings(**arguments))


def test_image_k_of_a_prompt_has_the_seed_plus_k():
    assert seed_rows(5, 2, 3).tolist() == [5, 6, 7, 5, 6, 7]
    assert seed_rows([5, 9], 2, 2).tolist() == [5, 6, 9, 10]
    assert seed_rows(2**32 - 2, 1, 2).dtype == np.uint32
    with pytest.raises(
        UserError, match="seed is 4294967295: it must be a whole number between 0 and 4294967294"
    ):
        seed_rows(2**32 - 1, 1, 2)
    with pytest.raises(UserError, match="seed is -1"):
        seed_rows(-1, 1, 1)
    with pytest.raises(UserError, match=r"seed is 1\.5: it must be a whole number"):
        seed_rows([2, 1.5], 2, 1)
    with pytest.raises(UserError, match="seed has 2 numbers for 3 prompts"):
        seed_rows([1, 2], 3, 1)


def test_no_device_holds_the_weights_twice(pipe):
    ours = {id(leaf) for leaf in jax.tree.leaves(pipe.generator.params)}
    assert {id(leaf) for leaf in jax.tree.leaves(nnx.split(pipe.model)[1])} <= ours
