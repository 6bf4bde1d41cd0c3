"""Exports of PixArt-Sigma to diffusers; tests/test_convert.py has those of PixArt-alpha."""

import json
import shutil

import foreign
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import pixart_jax
from pixart_jax.convert import convert
from pixart_jax.errors import UserError
from pixart_jax.weights.files import CARD
from pixart_jax.weights.loading import read_any

diffusers = pytest.importorskip("diffusers")

SMALL = {**foreign.SIZES["small"], "sizes": False, "scale": 4.0}
FILE = "diffusion_pytorch_model.safetensors"
CLEANING = (
    "PixArtSigmaPipeline cleans captions. These weights were trained without: call it with "
    "clean_caption=False. It converts them to lower case even then."
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A `PixArtSigmaPipeline`, of a 2K network in all but its size."""
    folder = tmp_path_factory.mktemp("base") / "pipeline"
    foreign.save_pipeline(
        folder, foreign.diffusers_model(**SMALL), "PixArtSigmaPipeline", scaling_factor=0.13025
    )
    return folder


def run(*args, **kwargs) -> list[str]:
    lines = []
    convert(*args, say=lines.append, **kwargs)
    return lines


def save_official(path, **changes):
    save_file(foreign.official_state_dict(**{**SMALL, "tokens": 300, **changes}), path)
    return path


@pytest.mark.parametrize("kind", ["PixArtTransformer2DModel", "Transformer2DModel"])
def test_diffusers_to_checkpoint_to_official_and_back_is_the_same_bits(tmp_path, base, kind):
    """Of a whole pipeline. The old class is that of the first upload, which does not mention sizes."""
    source = tmp_path / "source"
    shutil.copytree(base, source)
    file = source / "transformer" / "config.json"
    config = json.loads(file.read_text())
    old = {**config, "_class_name": kind}
    if kind == "Transformer2DModel":
        del old["use_additional_conditions"]
    file.write_text(json.dumps(old))
    run(source, tmp_path / "c", "checkpoint")
    run(tmp_path / "c", tmp_path / "o.safetensors", "official")
    official = load_file(tmp_path / "o.safetensors")
    assert official.keys() == foreign.official_state_dict(**SMALL).keys()
    assert official["y_embedder.y_embedding"].shape == (300, 24)
    lines = run(tmp_path / "o.safetensors", tmp_path / "p", "diffusers", pipeline=base)
    assert lines[0] == CLEANING
    before, after = (load_file(folder / "transformer" / FILE) for folder in (base, tmp_path / "p"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    written = json.loads((tmp_path / "p" / "transformer" / "config.json").read_text())
    assert written["use_additional_conditions"] is False and written["interpolation_scale"] == 4
    assert {name: config[name] for name in written} == written


def test_the_exported_folder_is_a_pipeline_of_sigma(tmp_path, base):
    source = save_official(tmp_path / "o.safetensors")
    lines = run(source, tmp_path / "p", "diffusers", num_heads=4, pipeline=base)
    assert CLEANING in lines
    pipeline = diffusers.PixArtSigmaPipeline.from_pretrained(tmp_path / "p")
    pipeline.set_progress_bar_config(disable=True)
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "p")) is type(pipeline)
    card = (tmp_path / "p" / CARD).read_text()
    assert "# PixArt-Σ weights" in card and "| captions | not cleaned, as they are |" in card
    images = pipeline("two red foxes", num_inference_steps=1, output_type="np", use_resolution_binning=False)
    assert images.images.shape == (1, 64, 64, 3)
    read = read_any(tmp_path / "p")
    assert read.config.model == read_any(source, num_heads=4).config.model
    # The folder of alpha's pipeline would truncate captions to 120 tokens.
    alpha = tmp_path / "alpha"
    shutil.copytree(base, alpha)
    index = json.loads((alpha / "model_index.json").read_text())
    (alpha / "model_index.json").write_text(json.dumps({**index, "_class_name": "PixArtAlphaPipeline"}))
    lines = run(source, tmp_path / "q", "diffusers", num_heads=4, pipeline=alpha)
    told = "the folder is that of a PixArtSigmaPipeline, because these weights use captions of 300 tokens."
    assert told in lines
    assert json.loads((tmp_path / "q" / "model_index.json").read_text()) == index
    # And the other way round.
    save_official(tmp_path / "a.safetensors", tokens=120)
    lines = run(
        tmp_path / "a.safetensors",
        tmp_path / "r",
        "diffusers",
        num_heads=4,
        pipeline=base,
        latent_scale=0.13025,
    )
    assert (
        "the folder is that of a PixArtAlphaPipeline, because these weights use captions of 120 tokens."
        in lines
    )
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "r")) is diffusers.PixArtAlphaPipeline
    with pytest.raises(UserError, match=r"vae has scaling_factor 0\.13025, but the model's .* is 0\.18215"):
        run(tmp_path / "a.safetensors", tmp_path / "s", "diffusers", num_heads=4, pipeline=base)


def test_a_pipeline_of_sigma_passes_no_sizes(tmp_path, base):
    """Also not at 1024 px, where that of alpha does."""
    source = save_official(tmp_path / "o.safetensors", sizes=True, side=128, scale=2.0)
    message = "--size_conditions=keep: PixArtSigmaPipeline passes none to these weights, which would fail: "
    with pytest.raises(UserError, match=message):
        run(
            source,
            tmp_path / "p",
            "diffusers",
            **dict(num_heads=4, pipeline=base, size_conditions="keep"),
        )
    assert not (tmp_path / "p").exists()
    lines = run(source, tmp_path / "p", "diffusers", num_heads=4)
    folded = "size conditions folded for 1024x1024 px, because PixArtSigmaPipeline passes them to no network."
    assert any(line.startswith(folded) for line in lines)
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    assert config["use_additional_conditions"] is False and config["sample_size"] == 128
    arguments = foreign.inputs((4, 4), **{**SMALL, "sizes": True})
    arguments |= {
        "image_size": np.full((3, 2), 1024, np.float32),
        "aspect_ratio": np.ones((3, 1), np.float32),
    }
    network = pixart_jax.load_model(source, num_heads=4)
    expected = np.asarray(jax.jit(lambda arguments: network(**arguments))(arguments))
    plain = {name: arguments[name] for name in arguments if name not in ("image_size", "aspect_ratio")}
    model = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "p")
    np.testing.assert_allclose(foreign.run_diffusers(model, plain), expected, rtol=0, atol=5e-5)
