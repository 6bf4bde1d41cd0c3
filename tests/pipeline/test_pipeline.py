import dataclasses
import re

import foreign
import jax
import numpy as np
import pytest
import tiny

import pixart_jax
from pixart_jax.errors import UserError
from pixart_jax.pipeline import Embeddings, Pipeline, load_pipeline, memory, pipeline
from pixart_jax.pipeline.requests import Request
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


@pytest.fixture(scope="module")
def sigma(tmp_path_factory):
    """The folder of a `PixArtSigmaPipeline`, and the pipeline."""
    folder = tmp_path_factory.mktemp("sigma") / "pipeline"
    model = foreign.diffusers_model(**{**NUMBERS, "scale": 2.0})
    foreign.save_pipeline(folder, model, "PixArtSigmaPipeline", scaling_factor=0.13025)
    pipeline = diffusers.PixArtSigmaPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return folder, pipeline


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
    """Checks that the mean difference is below 2/255 and no pixel is far off; `reference` is in 0 .. 1."""
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


# Cleaning changes both. The second has more tokens than PixArt-alpha reads.
SIGMA_PROMPTS = ["Two <b>red</b> Foxes, 4x4 (sks123)", "A quick brown fox jumps over it, 4x4. " * 9]


@pytest.mark.parametrize(
    ("given", "cleaned", "size"),
    [
        (dict(clean_caption=True), True, (64, 64)),
        # diffusers converts to lower case also without cleaning, which is not how Sigma was trained.
        (dict(clean_caption=False, lower_case=True), False, (48, 112)),
    ],
    ids=["cleaned, square", "not cleaned, wide"],
)
def test_latents_and_images_of_the_pipeline_of_sigma(sigma, given, cleaned, size, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    folder, theirs = sigma
    pipe = load_pipeline(folder, **given)
    assert 180 < pipe.encode(SIGMA_PROMPTS).mask[1].sum() < 300
    height, width = size
    noise = start_noise(2, height // 8, width // 8)
    options = dict(negative_prompt="Blurry 4x4", height=height, width=width)
    images, latents = pipe(
        SIGMA_PROMPTS, steps=4, guidance_scale=4.5, latents=noise, output="both", **options
    )
    options |= dict(prompts=SIGMA_PROMPTS, num_inference_steps=4)
    reference, other = (
        expected(theirs, noise, "latent", **options, clean_caption=kept) for kept in (cleaned, not cleaned)
    )
    assert reference.std() > 0.3 and np.abs(other - reference).max() > 0.01
    np.testing.assert_allclose(latents, reference, rtol=0, atol=1e-3)
    assert_same_pictures(images, expected(theirs, noise, "np", **options, clean_caption=cleaned))


def test_sigma_gets_prompts_as_it_was_trained(sigma, caplog):
    folder, theirs = sigma
    pipe = load_pipeline(folder)
    assert caplog.messages == [
        "read as PixArt-Sigma, with what its files do not state: text_length 300, clean_caption False, "
        "lower_case False."
    ]
    assert (pipe.model.config.text_length, pipe.config.features.latent_scale) == (300, 0.13025)
    ids = theirs.tokenizer(SIGMA_PROMPTS)["input_ids"]
    assert pipe.text_encoder.tokenize(SIGMA_PROMPTS) == ids
    assert ids != theirs.tokenizer([prompt.lower() for prompt in SIGMA_PROMPTS])["input_ids"]


def test_a_size_whose_keys_cannot_be_compressed_raises_before_anything_is_generated(pipe, monkeypatch):
    config = dataclasses.replace(pipe.model.config, kv_compression="uniform")
    monkeypatch.setattr(pipe.model, "config", config)
    pipe.resolve(Request("x", height=64, width=96))
    with pytest.raises(UserError, match=r"^for images of 64x48 px, .*'uniform' cannot reduce a grid of 4x3"):
        pipe.resolve(Request("x", height=64, width=48))


def test_images_that_do_not_fit_into_memory_are_decoded_in_tiles(pipe, monkeypatch):
    side = dict(height=2048, width=2048)
    for limit in (None, 10**12):
        monkeypatch.setattr(memory, "device_memory", lambda device, limit=limit: limit)
        request, size = pipe.resolve(Request("x", **side))
        assert request.tile is None and size.tile == 0
    plan = memory.plan_memory(pipe, size, 1)
    limit = plan.backbone + plan.vae + plan.text_encoder + plan.decoding
    monkeypatch.setattr(memory, "device_memory", lambda device: limit)
    assert pipe.resolve(Request("x", **side))[1].tile == 0
    monkeypatch.setattr(memory, "device_memory", lambda device: limit - 1)
    request, size = pipe.resolve(Request("x", **side))
    assert request.tile == size.tile == 1024 and pipe.resolve(request) == (request, size)
    tiled = memory.plan_memory(pipe, size, 1)
    assert tiled.decoding < plan.decoding and "in tiles of 1024 px" in str(tiled)
    # Whoever asks for the whole image gets it.
    assert pipe.resolve(Request("x", tile=0, **side)) == (
        dataclasses.replace(request, tile=0),
        size._replace(tile=0),
    )
    asked = pipe.resolve(Request("x", tile=256, **side))
    assert asked == (dataclasses.replace(request, tile=256), size._replace(tile=256))
    for tile in (-128, 8, 130):
        with pytest.raises(UserError, match=f"tile is {tile} px: it must be 0 or a multiple of 8 of at"):
            pipe("x", tile=tile)
    monkeypatch.setattr(pipeline, "TILE", 32)
    monkeypatch.setattr(memory, "device_memory", lambda device: 0)
    images, latents = pipe("a corgi", steps=1, output="both")
    np.testing.assert_array_equal(images, pipe.decode(latents, 32))
    assert not np.array_equal(images, pipe.decode(latents))


def test_several_images_and_no_negative_prompt(pipe, theirs):
    noise = start_noise(6)
    images, latents = pipe(
        PROMPTS, steps=10, guidance_scale=4.5, images_per_prompt=3, latents=noise, output="both"
    )
    options = dict(negative_prompt="", num_images_per_prompt=3)
    reference = expected(theirs, noise, "latent", **options)
    np.testing.assert_allclose(latents, reference, rtol=0, atol=1e-3)
    assert_same_pictures(images, expected(theirs, noise, "np", **options))


def test_a_size_is_snapped_to_the_bucket_and_resized_back_as_in_diffusers(tmp_path, monkeypatch):
    """Uses 256 px, the smallest size that has buckets."""
    model = foreign.diffusers_model(**{**NUMBERS, "side": 32, "depth": 1})
    foreign.save_pipeline(tmp_path / "pipeline", model)
    # One device, because with a single image the other seven would only decode copies of it.
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    ours = load_pipeline(tmp_path / "pipeline")
    pipeline = diffusers.PixArtAlphaPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    noise = start_noise(1, 20, 50)  # the requested size is in bucket 160x400
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
    # diffusers resizes back with a bilinear filter, we use the filter of the training images.
    assert images.shape == reference.shape and reference.std() * 255 > 10
    assert np.abs(images - reference * 255).mean() < 2
    with pytest.raises(UserError, match="height is 150 px: it must be a multiple of 16"):
        ours(PROMPTS[0], binning=False, **size)
    assert ours(PROMPTS[0], steps=1, aspect_ratio="5:2", output="latents").shape == noise.shape


def test_without_guidance(pipe, theirs):
    noise = start_noise(2)
    for scale in (1, 0):
        latents = pipe(PROMPTS, steps=10, guidance_scale=scale, latents=noise, output="latents")
        np.testing.assert_allclose(
            latents, expected(theirs, noise, "latent", guidance_scale=scale), rtol=0, atol=1e-3
        )


def test_an_image_has_its_own_seed(pipe):
    options = dict(steps=2, images_per_prompt=2, output="latents", batch_size=2)
    first = pipe(PROMPTS, seed=3, **options)
    np.testing.assert_array_equal(first, pipe(PROMPTS, seed=3, **options))
    assert len({image.tobytes() for image in first}) == 4
    assert not np.array_equal(first, pipe(PROMPTS, seed=4, **options))
    # A prompt's images are the same without the other prompt, and in a last batch that is padded.
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
    # Embeddings with less padding give the same result.
    short = Embeddings(positive.text[:, :60], positive.mask[:, :60])
    np.testing.assert_allclose(
        alone(embeddings=short, negative_embeddings=negative, **options), expected, rtol=0, atol=1e-4
    )
    with pytest.raises(UserError, match="no text encoder"):
        alone(PROMPTS)
    with pytest.raises(UserError, match="no text encoder"):
        alone(embeddings=positive)


def test_a_long_prompt_is_truncated_with_a_warning(pipe, caplog):
    pipe.encode(["a corgi " * 100])
    assert "was truncated to 120" in caplog.text


@pytest.mark.parametrize("prompt", ["a \ud83d dog", "caf\udce9"])
def test_a_prompt_that_is_not_unicode(pipe, prompt):
    with pytest.raises(UserError, match="remove the characters that are not Unicode") as error:
        pipe.encode(["a corgi", prompt])
    assert str(error.value).isascii()


def test_words_that_cleaning_removes_are_reported(pipe, caplog, monkeypatch):
    prompts = ["a photo of sks123 dog", "1234567"]
    pipe.encode([*prompts, "a corgi", ""])
    lines = [line for line in caplog.messages if line.startswith("cleaning")]
    assert len(lines) == 2
    assert lines[0].startswith(
        "cleaning removed 'sks123' from the prompt 'a photo of sks123 dog'; only weights"
    )
    assert "from the prompt '1234567', which is now empty; " in lines[1]
    assert all("features.text_encoder.clean_caption=False" in line for line in lines)
    monkeypatch.setattr(pipe.text_encoder, "clean_caption", False)
    caplog.clear()
    pipe.encode(["a photo of sks456 dog"])
    assert not any(line.startswith("cleaning") for line in caplog.messages)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(height="64"), "argument height is '64': it must be a whole number"),
        (dict(steps=2.5), "argument steps is 2.5: it must be a whole number"),
        (dict(guidance_scale="4"), "argument guidance_scale is '4': it must be a number"),
        (dict(guidance_interval=(5,)), r"argument guidance_interval is \(5,\): it must be two numbers"),
        (dict(binning=1), "argument binning is 1: it must be true or false"),
        (dict(sampler_options=["order"]), "argument sampler_options is .* an object"),
        (dict(seed="7"), "seed is '7': it must be a whole number"),
        (dict(negative_prompt=7), "negative_prompt: 7 is not text"),
        (dict(prompts=7), "prompts: 7 is not text; give a text or a list of texts"),
        (dict(prompts=["a", None]), "prompts: None is not text"),
    ],
)
def test_arguments_of_another_type(pipe, arguments, message):
    with pytest.raises(UserError, match=message):
        pipe(**{"prompts": "a corgi", "steps": 1, **arguments})


def test_scalars_of_numpy_and_jax_are_numbers(pipe):
    options = dict(prompts="a corgi", output="latents")
    expected = pipe(**options, steps=1, guidance_scale=2.0, seed=3)
    given = pipe(**options, steps=np.int64(1), guidance_scale=jax.numpy.float32(2), seed=np.uint32(3))
    np.testing.assert_array_equal(given, expected)
    options |= dict(steps=2, sampler="sa_solver")
    expected = pipe(**options, sampler_options={"tau": 0.5, "tau_interval": [0.2, 0.7]})
    arrays = {"tau": np.float32(0.5), "tau_interval": np.array([0.2, 0.7])}
    np.testing.assert_array_equal(pipe(**options, sampler_options=arrays), expected)
    with pytest.raises(UserError, match=r"sampler_options\.tau is nan: it must be a finite"):
        pipe(**options, sampler_options={"tau": torch.tensor(torch.nan)})


def test_unknown_characters_are_reported(pipe, caplog):
    pipe.encode(["a corgi", "кошка", "a table"])
    assert len(caplog.messages) == 1
    assert re.match(r"\d of the \d tokens of the prompt 'кошка' are unknown to the text", caplog.messages[0])


@pytest.mark.parametrize("null_text", ["t5_empty", "token"])
@pytest.mark.parametrize("null_mask", ["own", "caption"])
def test_null_captions(random_params, null_text, null_mask):
    """Tests the null caption that guidance uses if there is no negative prompt."""
    guidance = dataclasses.replace(tiny.CONFIG.guidance, null_text=null_text, null_mask=null_mask)
    pipe = tiny.make_pipe(random_params, config=dataclasses.replace(tiny.CONFIG, guidance=guidance))

    def latents(**negative):
        return pipe(PROMPTS, steps=2, output="latents", **negative)

    def assert_close(got, expected):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())

    positive = pipe.encode(PROMPTS)
    if null_text == "token":
        text, length = np.asarray(pipe.model.null_text[...]), 32
    else:
        text, length = pipe.text_encoder.null_text()
        assert length == 1
    own = np.broadcast_to(np.arange(32) < length, (2, 32))
    masks = {"own": own, "caption": positive.mask}
    right, wrong = (
        latents(negative_embeddings=Embeddings(np.broadcast_to(text, (2, *text.shape)), mask))
        for mask in (masks.pop(null_mask), *masks.values())
    )
    unprompted = latents()
    assert_close(unprompted, right)
    assert np.abs(right - wrong).max() > 1e-3 * np.abs(right).max()
    # A negative prompt has its own text and mask, also if another prompt of the call has none.
    prompted = latents(negative_embeddings=pipe.encode([NEGATIVE] * 2))
    assert_close(latents(negative_prompt=NEGATIVE), prompted)
    assert_close(latents(negative_prompt=[NEGATIVE, ""]), np.stack([prompted[0], unprompted[1]]))


@pytest.mark.parametrize(("kind", "ratio"), [("bucket", 0.43), ("true", 48 / 112)])
def test_size_conditions_follow_the_image(tmp_path, pipe, kind, ratio):
    """The first step predicts the noise that the network predicts with these conditions."""
    foreign.diffusers_model(**{**NUMBERS, "sizes": True}).save_pretrained(tmp_path / "ms")
    read = read_any(tmp_path / "ms", aspect_ratio=kind)
    other = Pipeline(build_model(read), read.config, pipe.text_encoder, pipe.codec, devices=jax.devices()[:1])
    noise, steps = start_noise(1, 6, 14), []
    other(PROMPTS[0], steps=1, latents=noise, height=48, width=112, guidance_scale=1, callback=steps.append)
    alpha = np.sqrt(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[-1])
    predicted = (noise - alpha * steps[0].latents) / np.sqrt(1 - alpha**2)

    def network(height, ratio):
        conditions = np.float32([[height, 112]]), np.float32([[ratio]])
        return other.model(noise, np.float32([999]), *pipe.encode(PROMPTS[:1]), *conditions)[..., :4]

    np.testing.assert_allclose(predicted, network(48, ratio), rtol=0, atol=1e-4)
    for wrong in (network(48, 0.4), network(112, ratio)):
        assert np.abs(predicted - wrong).max() > 1e-3


def test_input_errors_in_the_call(pipe):
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
        (dict(stesp=3), "argument 'stesp' is unknown. Did you mean 'steps'"),
        (dict(num_inference_steps=3), "'num_inference_steps' is unknown. Here it is 'steps'"),
        (dict(generator=None), "'generator' is unknown. Here it is 'seed', a number"),
        (dict(num_images_per_prompt=2), "is unknown. Here it is 'images_per_prompt'"),
        (dict(guidance_scale=-1), "guidance_scale is -1: it must be a finite number of at least 0"),
        (dict(guidance_scale=np.nan), "guidance_scale is nan: it must be a finite number"),
        (dict(guidance_scale=np.float32("inf")), "guidance_scale is inf: it must be a finite number"),
        (dict(steps=float("nan")), "argument steps is nan: it must be a whole number"),
        (
            dict(sampler="sa_solver", sampler_options={"tau": np.nan}),
            "sampler_options.tau is nan: it must be a finite",
        ),
        (
            dict(sampler="sa_solver", sampler_options={"tau_interval": [0, np.inf]}),
            "sampler_options.tau_interval is inf",
        ),
        (
            dict(latents=np.full((2, 8, 8, 4), np.nan)),
            "latents have values that are NaN or infinite in row 0",
        ),
        (dict(latents=np.full((2, 8, 8, 4), 1e300)), "latents have values that are NaN or infinite in row 0"),
        (dict(latents=np.zeros((2, 8, 8, 4), complex)), "latents are complex128: give real numbers"),
        (dict(negative_embeddings=np.zeros((2, 1, 24))), r"are a ndarray: give \(features, mask\)"),
        (
            dict(negative_embeddings=Embeddings(np.zeros((2, 1, 24)), np.full((2, 1), np.nan))),
            "the mask of negative_embeddings has other values than 0 and 1",
        ),
        (
            dict(negative_embeddings=Embeddings(np.zeros((2, 3, 24)), np.ones((2, 1)))),
            r"are \[2, 3, 24\], their mask is \[2, 1\]",
        ),
        (
            dict(negative_embeddings=Embeddings(np.zeros((2, 1, 5)), np.ones((2, 1)))),
            "have 5 features for each token, the model takes 24",
        ),
        (
            dict(negative_embeddings=Embeddings(np.full((2, 1, 24), np.nan), np.ones((2, 1)))),
            "negative_embeddings have values that are NaN or infinite in row 0",
        ),
        (dict(image=3), "image is a int: give a file, a PIL image"),
        (dict(mask=np.ones((64, 64))), "mask is given without image"),
        (dict(strength=0.3), "no image to start from"),
        (dict(seed=-1), "seed is -1"),
    ):
        with pytest.raises(UserError, match=message):
            pipe(PROMPTS, **kwargs)
    with pytest.raises(UserError, match="0 prompts"):
        pipe([])
    with pytest.raises(UserError, match="either prompts or embeddings"):
        pipe()
    text = np.array(embeddings.text)
    text[1, 0, 0] = np.nan
    with pytest.raises(UserError, match="embeddings have values that are NaN or infinite in row 1"):
        pipe(embeddings=Embeddings(text, embeddings.mask))


def test_latents_that_are_not_finite_name_the_prompt_and_the_step(random_params):
    """They would become a black picture."""
    pipe = tiny.make_pipe(random_params)
    options = dict(steps=3, images_per_prompt=2, seed=5, output="latents")
    # Finite, but too large for float32 once it is multiplied.
    message = r"^prompt 'a corgi', seed 5: the latents are NaN or infinite from step 1 of 3 \(timestep 999\)"
    with pytest.raises(UserError, match=message):
        pipe(["a corgi", "a fox"], guidance_scale=1e38, **options)
    noise = np.zeros((2, tiny.SIDE, tiny.SIDE, 3), np.float32)
    noise[1] = 3e38
    with pytest.raises(UserError, match=r"^prompt 'a fox', seed 6: the latents .* from step [12] of 3"):
        pipe("a fox", latents=noise, **options)


def test_text_features_that_are_not_finite_name_the_prompt(random_params, monkeypatch):
    pipe = tiny.make_pipe(random_params)
    good = pipe.text_encoder.encode_each

    def encode_each(captions):
        for i, valid in good(captions):
            yield i, valid * (np.inf if captions[i] == "a fox" else 1)

    monkeypatch.setattr(pipe.text_encoder, "encode_each", encode_each)
    with pytest.raises(UserError, match="prompt 'a fox': its text features are NaN or infinite"):
        pipe(["a corgi", "a fox"], steps=1)


def test_what_the_weights_decide_is_filled_in(pipe, random_params):
    request, size = pipe.resolve(Request("x", width=96, image="x.png"))
    assert (request.height, request.width, request.strength) == (64, 96, 0.8) and size.width == 96
    assert request.guidance_scale == pipe.config.guidance.scale
    assert request.sampler_options == {"order": 2, "spacing": "linspace"}
    # Resolving settings that are already resolved changes nothing.
    assert pipe.resolve(request) == (request, size)
    asked = Request("x", aspect_ratio="2:1", guidance_scale=2, sampler="ddim", image="x.png", mask="y.png")
    request, size = pipe.resolve(asked)
    assert request == dataclasses.replace(asked, sampler_options={}, strength=1.0)
    assert (size.height, size.width) == (48, 96)
