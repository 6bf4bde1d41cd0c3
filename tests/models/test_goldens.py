"""Compares the network with the official PyTorch code (tests/data; float32, CPU, random weights)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pixart_jax
from pixart_jax.weights.backbones import export_backbone

DATA = Path(__file__).parents[1] / "data"
# Number of stored gradients. That of y_embedder.y_embedding is not among them: no caption is dropped here.
GRADIENTS = dict(pixart=7, pixart_ms=7, sigma_base=5, sigma_qknorm=7, sigma_kv=8, sigma_kv_qknorm=10)


class Golden:
    """A model of the official code and the results that it computed."""

    def __init__(self, name: str):
        self.name = name
        self.numbers = json.loads((DATA / f"{name}_config.json").read_text())
        self.model = pixart_jax.load_model(
            DATA / f"{name}_weights.safetensors", num_heads=self.numbers["num_heads"]
        )
        self.io = np.load(DATA / f"{name}_io.npz")
        self.run = jax.jit(lambda *arguments: self.model(*arguments))

    def arguments(self, mask: np.ndarray) -> tuple[np.ndarray, ...]:
        io = self.io
        sizes = (io["img_hw"], io["aspect_ratio"]) if "img_hw" in io else ()
        return (io["x"].transpose(0, 2, 3, 1), io["t"], io["y"][:, 0], mask, *sizes)


SIGMA = ["sigma_base", "sigma_qknorm", "sigma_kv", "sigma_kv_qknorm"]


@pytest.fixture(scope="module", params=["pixart", "pixart_ms", *SIGMA])
def golden(request):
    return Golden(request.param)


def test_the_config_is_inferred_from_the_weights(golden):
    config, numbers = golden.model.config, golden.numbers
    assert (config.depth, config.hidden_size) == (numbers["depth"], numbers["hidden_size"])
    assert (config.text_dim, config.text_length) == (numbers["caption_channels"], numbers["model_max_length"])
    assert config.base_size * config.patch_size == numbers["input_size"]
    assert config.position_scale == numbers.get("lewei_scale", numbers.get("pe_interpolation"))
    assert config.size_conditions == ("img_hw" in golden.io)
    assert config.qk_norm == numbers.get("qk_norm", False)
    compression = numbers.get("kv_compress_config")
    assert config.kv_compression == (compression["sampling"] if compression else "none")
    if compression:
        assert config.compressed_layers == tuple(compression["kv_compress_layer"])
        assert config.kv_compression_factor == compression["scale_factor"]


@pytest.mark.parametrize("key", ["out", "out_without_mask"])
def test_output_matches_the_official_code(golden, key):
    mask = golden.io["mask"] if key == "out" else np.ones_like(golden.io["mask"])
    out = np.asarray(golden.run(*golden.arguments(mask))).transpose(0, 3, 1, 2)
    expected = golden.io[key]
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5)


def test_output_depends_on_the_mask(golden):
    # Otherwise the test above would pass even if the mask were ignored.
    assert np.abs(golden.io["out"] - golden.io["out_without_mask"]).max() > 0.01


def test_loss_and_gradients_match_the_official_code(golden):
    graph, params = nnx.split(golden.model)
    arguments = golden.arguments(golden.io["mask"])

    @jax.jit
    def loss(params):
        return jnp.mean(jnp.square(nnx.merge(graph, params)(*arguments)))

    value, gradients = jax.value_and_grad(loss)(params)
    np.testing.assert_allclose(value, golden.io["loss"], rtol=1e-4)
    _, named = export_backbone("official", nnx.to_pure_dict(gradients), golden.model.config)
    named = dict(named)
    expected = {key[5:]: golden.io[key] for key in golden.io if key.startswith("grad:")}
    assert len(expected) == GRADIENTS[golden.name]
    for name, gradient in expected.items():
        assert np.abs(gradient).max() > 0
        error = np.linalg.norm(named[name] - gradient) / np.linalg.norm(gradient)
        assert error < 1e-4, (name, error)
        np.testing.assert_allclose(
            named[name], gradient, rtol=0, atol=1e-4 * np.abs(gradient).max(), err_msg=name
        )


@pytest.mark.parametrize("name", SIGMA[2:])
def test_every_mode_of_compression_matches_the_official_code(name):
    golden = Golden(name)
    arguments = golden.arguments(golden.io["mask"])
    odd = (golden.io["x_odd"].transpose(0, 2, 3, 1), *arguments[1:])
    results = {"out_odd": golden.run(*odd)}
    for mode in ("ave", "uniform", "uniform_every"):
        weights = DATA / f"{name}_weights.safetensors"
        model = pixart_jax.load_model(weights, num_heads=4, kv_compression=mode)
        results[f"out_{mode}"] = jax.jit(lambda *arguments, model=model: model(*arguments))(*arguments)
    for key, out in results.items():
        np.testing.assert_allclose(out.transpose(0, 3, 1, 2), golden.io[key], rtol=0, atol=2e-5, err_msg=key)
    assert np.abs(golden.io["out_ave"] - golden.io["out"]).max() > 0.01
