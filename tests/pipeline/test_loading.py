import dataclasses
import json
import shutil

import foreign
import numpy as np
import pytest
import tiny
from flax import nnx

from pixart_jax.convert import convert
from pixart_jax.denoiser import init_params
from pixart_jax.errors import UserError
from pixart_jax.models import dtypes
from pixart_jax.pipeline import load_pipeline
from pixart_jax.pipeline.memory import plan_memory
from pixart_jax.pipeline.sizes import Size
from pixart_jax.weights.checkpoints import write_weights
from pixart_jax.weights.loading import read_any

torch = foreign.torch
pytest.importorskip("diffusers")

PROMPTS = ["a corgi reading a book in the park", "Two red foxes!"]
NUMBERS = {**foreign.SIZES["small"], "sizes": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "pipeline"
    foreign.save_pipeline(folder, foreign.diffusers_model(**NUMBERS))
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return load_pipeline(folder)


def test_float16_where_the_gpu_has_no_bfloat16(folder, pipe, tmp_path, monkeypatch):
    """Loads the dtypes that a T4 would get, and runs them on this CPU."""
    monkeypatch.setattr(dtypes, "cuda_capability", lambda: 7.5)
    half = load_pipeline(folder)
    assert (half.model.config.dtype, half.text_encoder.network.dtype) == ("float16", "float16")
    assert half.codec.config.dtype == "float32"
    options = dict(steps=10, output="both")
    (images, latents), (exact_images, exact) = (one(PROMPTS, **options) for one in (half, pipe))
    error = np.abs(latents - exact).max() / np.abs(exact).max()
    assert 1e-5 < error < 1e-2
    difference = np.abs(images - exact_images.astype(np.float32))
    assert exact_images.std() > 1 and difference.mean() < 2 and difference.max() < 8
    asked = load_pipeline(folder, dtype="float32", text_dtype="float32")
    assert (asked.model.config.dtype, asked.text_encoder.network.dtype) == ("float32", "float32")

    # A run's config sets the dtype of its text encoder, which is used if the device supports it.
    for given, expected in (("bfloat16", "float16"), ("float32", "float32")):
        encoder = dataclasses.replace(tiny.TEXT, dtype=given)
        features = dataclasses.replace(tiny.CONFIG.features, text_encoder=encoder)
        config = dataclasses.replace(tiny.CONFIG, features=features)
        write_weights(tmp_path / given, init_params(config.model, 0), config)
        assert load_pipeline(tmp_path / given).text_encoder.network.dtype == expected
    monkeypatch.undo()
    assert load_pipeline(tmp_path / "bfloat16").text_encoder.network.dtype == "bfloat16"


def test_own_weights_with_the_encoders_of_a_pipeline(tmp_path, folder, pipe):
    convert(folder, tmp_path / "checkpoint", "checkpoint", say=lambda line: None)
    own = load_pipeline(tmp_path / "checkpoint", pipeline=folder)
    options = dict(steps=2, seed=5, output="latents")
    np.testing.assert_array_equal(own(PROMPTS, **options), pipe(PROMPTS, **options))


def test_own_weights_keep_what_they_were_trained_with(tmp_path, folder):
    """Their noise schedule and cleaning of captions, not those of the pipeline that provides the encoders."""
    read = read_any(folder)
    encoder = dataclasses.replace(read.config.features.text_encoder, clean_caption=False)
    config = dataclasses.replace(
        read.config,
        diffusion=dataclasses.replace(read.config.diffusion, num_timesteps=500),
        features=dataclasses.replace(read.config.features, text_encoder=encoder),
    )
    write_weights(tmp_path / "own", read.params, config)
    own = load_pipeline(tmp_path / "own", pipeline=folder)
    assert own.config.diffusion.num_timesteps == 500 and not own.text_encoder.clean_caption

    # A transformer alone states no noise schedule.
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    file = other / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_train_timesteps": 200}))
    alone = load_pipeline(folder / "transformer", pipeline=other)
    assert alone.config.diffusion.num_timesteps == 200 and alone.text_encoder.clean_caption


def test_a_transformer_alone_asks_for_a_pipeline(tmp_path, folder):
    message = "without its text encoder and VAE: also give --pipeline"
    read = read_any(folder)
    write_weights(tmp_path / "checkpoint", read.params, read.config)
    for path in (folder / "transformer", tmp_path / "checkpoint"):
        with pytest.raises(UserError, match=message):
            load_pipeline(path)
    for wrong, what in (("nope", "is not a folder"), (folder / "vae", "has no model_index.json")):
        with pytest.raises(UserError, match=f"^--pipeline={wrong} {what}: give the folder of a PixArt"):
            load_pipeline(folder / "transformer", pipeline=wrong)


def test_folders_that_do_not_fit(tmp_path, folder):
    other = tmp_path / "other"
    shutil.copytree(folder, other)

    def edit(name, **changes):
        values = json.loads((folder / name).read_text())
        (other / name).write_text(json.dumps({**values, **changes}))

    edit("scheduler/scheduler_config.json", use_karras_sigmas=True, solver_order=3)
    # The scaling factor of the weights must be that of the VAE, unless the caller decides.
    convert(folder, tmp_path / "scaled", "checkpoint", latent_scale=0.25, say=lambda line: None)
    with pytest.raises(UserError, match=r"has the scaling factor 0\.18215, and the weights 0\.25"):
        load_pipeline(tmp_path / "scaled", pipeline=folder)
    load_pipeline(tmp_path / "scaled", pipeline=folder, latent_scale=0.5)
    edit("vae/config.json", scaling_factor=float("nan"))
    with pytest.raises(UserError, match=r"vae/config.json' cannot be read .*NaN is not finite"):
        load_pipeline(tmp_path / "scaled", pipeline=other)
    edit("vae/config.json")
    odd = load_pipeline(other)
    with pytest.raises(UserError, match="has use_karras_sigmas True"):
        odd("a corgi", steps=2)
    assert odd("a corgi", steps=1, sampler="ddim", output="latents").shape == (1, 8, 8, 4)
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


def test_weights_in_int8(folder, pipe, tmp_path):
    small = load_pipeline(folder, weights_dtype="int8", text_weights_dtype="int8")
    size_of_text = small.text_encoder.network.bytes_per_device
    assert size_of_text < 0.7 * pipe.text_encoder.network.bytes_per_device
    size = Size(64, 64, 64, 64)
    plan, before = plan_memory(small, size, 1), plan_memory(pipe, size, 1)
    assert plan.backbone < 0.7 * before.backbone and plan.text_encoder == size_of_text
    blocks = nnx.state(small.model.blocks)
    kernels = [leaf for path, leaf in nnx.to_flat_state(blocks) if path[-1] == "kernel"]
    assert kernels and {leaf.dtype for leaf in kernels} == {np.dtype(np.int8)}
    assert small.fingerprint != pipe.fingerprint
    for name, known in (("weights_dtype", "float32"), ("text_weights_dtype", "auto")):
        with pytest.raises(UserError, match=f"^{name} is 'int4': choose one of {known}, int8"):
            load_pipeline(folder, **{name: "int4"})

    # A run's config says how the weights of its text encoder are kept.
    encoder = dataclasses.replace(tiny.TEXT, weights_dtype="int8")
    features = dataclasses.replace(tiny.CONFIG.features, text_encoder=encoder)
    config = dataclasses.replace(tiny.CONFIG, features=features)
    write_weights(tmp_path / "run", init_params(config.model, 0), config)
    run = load_pipeline(tmp_path / "run").text_encoder
    whole = load_pipeline(tmp_path / "run", text_weights_dtype="auto").text_encoder
    assert run.network.bytes_per_device < whole.network.bytes_per_device
