import dataclasses
import json
import shutil

import foreign
import jax
import numpy as np
import pytest
import tiny

import pixart_jax
from pixart_jax.convert import convert
from pixart_jax.denoiser import init_params
from pixart_jax.errors import UserError
from pixart_jax.models import dtypes
from pixart_jax.pipeline import Embeddings, Pipeline, load_pipeline
from pixart_jax.pipeline.scheduler import read_scheduler
from pixart_jax.weights.checkpoints import write_weights
from pixart_jax.weights.loading import build_model, read_any

torch = foreign.torch
diffusers = pytest.importorskip("diffusers")

PROMPTS = ["a corgi reading a book in the park", "Two red foxes!"]
NEGATIVE = "blurry, low quality"
NUMBERS = {**foreign.SIZES["small"], "sizes": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "pipeline"
    model = foreign.diffusers_model(**NUMBERS)
    foreign.save_pipeline(folder, model)
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    pipeline = diffusers.PixArtAlphaPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipe(folder):
    return pixart_jax.load_pipeline(folder)


def start_noise(count, height=8, width=8):
    return np.random.default_rng(0).standard_normal((count, height, width, 4)).astype(np.float32)


def expected(theirs, noise, output, prompts=PROMPTS, **kwargs):
    defaults = dict(negative_prompt=NEGATIVE, num_inference_steps=10, guidance_scale=4.5)
    images = theirs(
        prompts,
        latents=torch.from_numpy(noise).permute(0, 3, 1, 2),
        use_resolution_binning=False,
        output_type=output,
        **{**defaults, **kwargs},
    ).images
    return images.permute(0, 2, 3, 1).numpy() if output == "latent" else images


def assert_same_pictures(images, reference):
    """To 2/255 in the mean, and no pixel far off; `reference` is in 0 .. 1."""
    assert images.dtype == np.uint8 and images.shape == reference.shape
    assert reference.std() * 255 > 1
    difference = np.abs(images - reference * 255)
    assert difference.mean() < 2 and difference.max() < 8


@pytest.mark.parametrize("size", [(64, 64), (48, 112)], ids=["square", "wide"])
def test_latents_and_images_of_diffusers(pipe, theirs, size):
    height, width = size
    noise = start_noise(2, height // 8, width // 8)
    images, latents = pipe(
        PROMPTS,
        negative_prompt=NEGATIVE,
        steps=10,
        guidance_scale=4.5,
        height=height,
        width=width,
        latents=noise,
        output="both",
    )
    reference = expected(theirs, noise, "latent", height=height, width=width)
    assert reference.std() > 0.3
    np.testing.assert_allclose(latents, reference, rtol=0, atol=1e-3)
    assert_same_pictures(images, expected(theirs, noise, "np", height=height, width=width))


def test_several_images_and_no_negative_prompt(pipe, theirs):
    noise = start_noise(6)
    images, latents = pipe(
        PROMPTS, steps=10, guidance_scale=4.5, images_per_prompt=3, latents=noise, output="both"
    )
    options = dict(negative_prompt="", num_images_per_prompt=3)
    reference = expected(theirs, noise, "latent", **options)
    np.testing.assert_allclose(latents, reference, rtol=0, atol=1e-3)
    assert_same_pictures(images, expected(theirs, noise, "np", **options))


def test_float16_where_the_gpu_has_no_bfloat16(folder, pipe, tmp_path, monkeypatch):
    """What a T4 would load, run on this CPU."""
    monkeypatch.setattr(dtypes, "cuda_capability", lambda: 7.5)
    half = load_pipeline(folder)
    assert (half.model.config.dtype, half.text_encoder.t5.dtype) == ("float16", "float16")
    assert half.codec.config.dtype == "float32"
    options = dict(steps=10, latents=start_noise(2), output="both")
    (images, latents), (exact_images, exact) = (one(PROMPTS, **options) for one in (half, pipe))
    error = np.abs(latents - exact).max() / np.abs(exact).max()
    assert 1e-5 < error < 1e-2
    assert_same_pictures(images, exact_images / 255)
    asked = load_pipeline(folder, dtype="float32", text_dtype="float32")
    assert (asked.model.config.dtype, asked.text_encoder.t5.dtype) == ("float32", "float32")

    # A run names its text encoder's dtype, which holds where the device has it.
    for given, expected in (("bfloat16", "float16"), ("float32", "float32")):
        encoder = dataclasses.replace(tiny.TEXT, dtype=given)
        features = dataclasses.replace(tiny.CONFIG.features, text_encoder=encoder)
        config = dataclasses.replace(tiny.CONFIG, features=features)
        write_weights(tmp_path / given, init_params(config.model, 0), config)
        assert load_pipeline(tmp_path / given).text_encoder.t5.dtype == expected
    monkeypatch.undo()
    assert load_pipeline(tmp_path / "bfloat16").text_encoder.t5.dtype == "bfloat16"


def test_a_size_is_snapped_to_the_bucket_and_resized_back_as_in_diffusers(tmp_path, monkeypatch):
    """At 256 px, the smallest size that has buckets."""
    model = foreign.diffusers_model(**{**NUMBERS, "side": 32, "depth": 1})
    foreign.save_pipeline(tmp_path / "pipeline", model)
    # One picture: the other seven devices would decode copies of it.
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    ours = load_pipeline(tmp_path / "pipeline")
    pipeline = diffusers.PixArtAlphaPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    noise = start_noise(1, 20, 50)  # bucket 160x400 of the size asked for
    size = dict(height=150, width=390)
    images = ours(PROMPTS[0], steps=4, guidance_scale=4.5, latents=noise, **size)
    reference = pipeline(
        PROMPTS[0],
        num_inference_steps=4,
        guidance_scale=4.5,
        latents=torch.from_numpy(noise).permute(0, 3, 1, 2),
        output_type="np",
        **size,
    ).images
    # Their filter on the way back is bilinear, ours that of the training images.
    assert images.shape == reference.shape and reference.std() * 255 > 10
    assert np.abs(images - reference * 255).mean() < 2
    with pytest.raises(UserError, match="height is 150 px: it must be a multiple of 16"):
        ours(PROMPTS[0], binning=False, **size)
    assert ours(PROMPTS[0], steps=1, aspect_ratio="5:2", output="latents").shape == noise.shape


def test_without_guidance(pipe, theirs):
    noise = start_noise(2)
    latents = pipe(PROMPTS, steps=10, guidance_scale=1, latents=noise, output="latents")
    np.testing.assert_allclose(
        latents, expected(theirs, noise, "latent", guidance_scale=1), rtol=0, atol=1e-3
    )


def test_an_image_has_its_own_seed(pipe):
    options = dict(steps=2, images_per_prompt=2, output="latents", batch_size=2)
    first = pipe(PROMPTS, seed=3, **options)
    np.testing.assert_array_equal(first, pipe(PROMPTS, seed=3, **options))
    assert len({image.tobytes() for image in first}) == 4
    assert not np.array_equal(first, pipe(PROMPTS, seed=4, **options))
    # The first prompt's images are the same without the second, and in a last batch that is filled up.
    np.testing.assert_array_equal(first[:2], pipe(PROMPTS[:1], seed=3, **options))
    np.testing.assert_array_equal(first[2:], pipe(PROMPTS[1:], seed=3, **options))
    three = pipe(PROMPTS[:1], seed=3, **{**options, "images_per_prompt": 3})
    np.testing.assert_array_equal(first[:2], three[:2])


def test_samplers_and_their_options(pipe):
    options = dict(steps=4, seed=1, output="latents")
    results = [
        pipe(PROMPTS[0], **options),
        pipe(PROMPTS[0], sampler_options={"order": 3}, **options),
        pipe(PROMPTS[0], sampler="ddim", **options),
        pipe(PROMPTS[0], sampler="iddpm", **options),
    ]
    assert all(np.isfinite(result).all() and result.shape == (1, 8, 8, 4) for result in results)
    assert len({result.tobytes() for result in results}) == 4


def test_embeddings_in_place_of_prompts(pipe):
    options = dict(steps=3, latents=start_noise(2), output="latents")
    expected = pipe(PROMPTS, negative_prompt=NEGATIVE, **options)
    positive, negative = pipe.encode(PROMPTS), pipe.encode([NEGATIVE])
    lengths = [len(ids) for ids in pipe.text_encoder.tokenize(PROMPTS)]
    assert positive.text.shape == (2, 120, 24) and positive.mask.sum(axis=1).tolist() == lengths
    alone = Pipeline(pipe.model, pipe.config, None, pipe.codec, {"order": 2, "spacing": "linspace"})
    got = alone(embeddings=positive, negative_embeddings=negative, **options)
    np.testing.assert_array_equal(got, expected)
    # Cut to their tokens they mean the same.
    short = Embeddings(positive.text[:, :60], positive.mask[:, :60])
    np.testing.assert_allclose(
        alone(embeddings=short, negative_embeddings=negative, **options), expected, rtol=0, atol=1e-4
    )
    with pytest.raises(UserError, match="no text encoder"):
        alone(PROMPTS)
    with pytest.raises(UserError, match="no text encoder"):
        alone(embeddings=positive)


def test_a_long_prompt_is_cut_and_said(pipe, caplog):
    pipe.encode(["a corgi " * 100])
    assert "is cut to 120" in caplog.text


def test_null_caption_policies(pipe):
    """What the model is guided away from without a negative prompt, as the unconditional embedding shows."""

    def negative(**changes):
        guidance = dataclasses.replace(pipe.config.guidance, **changes)
        config = dataclasses.replace(pipe.config, guidance=guidance)
        other = Pipeline(pipe.model, config, pipe.text_encoder, pipe.codec)
        return other._negative("", None, positive), other._negative(NEGATIVE, None, positive)

    positive = pipe.encode(PROMPTS)
    empty, length = pipe.text_encoder.null_text()
    assert length == 1
    token = np.asarray(pipe.model.null_text[...])
    own, text = negative(null_text="t5_empty", null_mask="own")
    assert own.mask.sum(axis=1).tolist() == [1, 1]
    np.testing.assert_allclose(own.text[0, 0], empty[0], rtol=0, atol=1e-6)
    caption, same = negative(null_text="t5_empty", null_mask="caption")
    np.testing.assert_array_equal(caption.mask, positive.mask)
    np.testing.assert_array_equal(caption.text[1], empty)
    learned, _ = negative(null_text="token", null_mask="caption")
    np.testing.assert_array_equal(learned.mask, positive.mask)
    np.testing.assert_array_equal(learned.text[0], token)
    learned, _ = negative(null_text="token", null_mask="own")
    assert learned.mask.all()
    # One prompt with a negative text, one without.
    guidance = dataclasses.replace(pipe.config.guidance, null_text="token", null_mask="caption")
    config = dataclasses.replace(pipe.config, guidance=guidance)
    mixed = Pipeline(pipe.model, config, pipe.text_encoder, pipe.codec)._negative(
        [NEGATIVE, ""], None, positive
    )
    np.testing.assert_array_equal(mixed.text[0], text.text[0])
    np.testing.assert_array_equal(mixed.mask[0], text.mask[0])
    np.testing.assert_array_equal(mixed.text[1], token)
    np.testing.assert_array_equal(mixed.mask[1], positive.mask[1])
    # A negative prompt is itself under every policy.
    np.testing.assert_array_equal(text.mask, same.mask)
    np.testing.assert_array_equal(text.text, pipe.encode([NEGATIVE] * 2).text)


def test_own_weights_with_the_encoders_of_a_pipeline(tmp_path, folder, pipe):
    convert(folder, tmp_path / "checkpoint", "checkpoint", say=lambda line: None)
    own = load_pipeline(tmp_path / "checkpoint", pipeline=folder)
    options = dict(steps=2, seed=5, output="latents")
    np.testing.assert_array_equal(own(PROMPTS, **options), pipe(PROMPTS, **options))


def test_size_conditions_follow_the_image(tmp_path, pipe):
    foreign.diffusers_model(**{**NUMBERS, "sizes": True}).save_pretrained(tmp_path / "ms")
    reads = [read_any(tmp_path / "ms", aspect_ratio=kind) for kind in ("bucket", "true")]
    bucket, true = (Pipeline(build_model(read), read.config, pipe.text_encoder, pipe.codec) for read in reads)
    conditions = bucket._size_conditions(2, 48, 112)
    assert conditions["image_size"].tolist() == [[48, 112]] * 2
    np.testing.assert_allclose(conditions["aspect_ratio"], [[0.43]] * 2)
    np.testing.assert_allclose(true._size_conditions(1, 48, 112)["aspect_ratio"], [[48 / 112]])
    options = dict(steps=2, latents=start_noise(1, 6, 14), height=48, width=112, output="latents")
    assert not np.array_equal(bucket(PROMPTS[0], **options), true(PROMPTS[0], **options))


def test_mistakes_in_the_call(pipe):
    embeddings = pipe.encode(PROMPTS)
    for kwargs, message in (
        (dict(height=60), "height is 60 px: it must be a multiple of 16, such as 48 or 64"),
        (dict(width=0), "width is 0"),
        (dict(sampler="dpm"), "sampler is 'dpm': choose"),
        (dict(seed=[1, 2, 3]), "seed has 3 numbers for 2 prompts"),
        (dict(output="image"), "Did you mean 'images'"),
        (dict(steps=0), "steps is 0"),
        (dict(images_per_prompt=0), "images_per_prompt is 0"),
        (dict(negative_prompt=["a"]), "negative_prompt has 1 texts for 2 prompts"),
        (
            dict(negative_embeddings=Embeddings(*(np.zeros((3, 1, 24)), np.ones((3, 1))))),
            "are 3 for 2 prompts",
        ),
        (dict(latents=np.zeros((1, 8, 8, 4))), r"latents are \(1, 8, 8, 4\): this call takes \(2, 8, 8, 4\)"),
        (dict(embeddings=embeddings), "either prompts or embeddings"),
    ):
        with pytest.raises(UserError, match=message):
            pipe(PROMPTS, **kwargs)
    with pytest.raises(UserError, match="0 prompts"):
        pipe([])
    with pytest.raises(UserError, match="either prompts or embeddings"):
        pipe()


def test_folders_that_do_not_fit(tmp_path, folder):
    other = tmp_path / "other"
    shutil.copytree(folder, other)

    def edit(name, **changes):
        values = json.loads((folder / name).read_text())
        (other / name).write_text(json.dumps({**values, **changes}))

    edit("scheduler/scheduler_config.json", use_karras_sigmas=True, solver_order=3)
    odd = load_pipeline(other)
    with pytest.raises(UserError, match="asks for use_karras_sigmas True"):
        odd("a corgi", steps=2)
    assert odd("a corgi", steps=1, sampler="ddim", output="latents").shape == (1, 8, 8, 4)
    edit("scheduler/scheduler_config.json", _class_name="EulerDiscreteScheduler", beta_end=0.01)
    diffusion, reason = read_scheduler(other, odd.config)
    assert diffusion.beta_end == 0.01 and "EulerDiscreteScheduler" in reason
    edit("scheduler/scheduler_config.json", beta_start="small")
    with pytest.raises(UserError, match="beta_start' is 'small'"):
        read_scheduler(other, odd.config)
    edit("scheduler/scheduler_config.json", solver_order=3)
    assert read_scheduler(other, odd.config)[1] == {"order": 3, "spacing": "linspace"}
    edit("model_index.json", _class_name="FluxPipeline")
    with pytest.raises(UserError, match="is a FluxPipeline"):
        load_pipeline(other)
    dit = foreign.TorchDiT(width=48, depth=1, heads=4, side=8, classes=3)
    torch.save(dit.state_dict(), tmp_path / "dit.pt")
    with pytest.raises(UserError, match="is a DiT"):
        load_pipeline(tmp_path / "dit.pt", pipeline=folder, num_heads=4)
    wide = foreign.diffusers_model(**{**NUMBERS, "text": 32})
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match="gives 24 features, the model takes 32"):
        load_pipeline(tmp_path / "wide", pipeline=folder)
