import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pixart_jax.errors import UserError
from pixart_jax.models.configs import PixArtConfig
from pixart_jax.models.pixart import PixArt

TINY = PixArtConfig(
    size="custom", depth=2, hidden_size=24, num_heads=2, text_dim=8, text_length=5, size_conditions=True
)


def count(config):
    model = nnx.eval_shape(lambda: PixArt(config, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))


@pytest.mark.parametrize(("size_conditions", "trainable"), [(False, 610_856_096), (True, 611_349_152)])
def test_xl2_has_the_official_number_of_parameters(size_conditions, trainable):
    # The null caption, 120 x 4096, is stored with the weights but not trained.
    assert count(PixArtConfig(size_conditions=size_conditions)) == trainable + 120 * 4096


def test_initialization_matches_the_official_code():
    config = PixArtConfig(size="custom", depth=2, hidden_size=384, num_heads=6, text_dim=512, text_length=20)
    params = jax.jit(lambda: nnx.to_pure_dict(nnx.state(PixArt(config, rngs=nnx.Rngs(0)))))()
    blocks = params["blocks"]["stacked"]
    np.testing.assert_allclose(params["t_block"]["kernel"].std(), 0.02, rtol=0.02)
    np.testing.assert_allclose(params["t_embedder"]["fc1"]["kernel"].std(), 0.02, rtol=0.02)
    np.testing.assert_allclose(params["text_proj"]["fc2"]["kernel"].std(), 0.02, rtol=0.02)
    assert not jnp.any(blocks["cross_attn"]["proj"]["kernel"])
    assert not jnp.any(params["final_layer"]["linear"]["kernel"])
    assert not jnp.any(blocks["attn"]["qkv"]["bias"])
    for fused, fans in (("attn", 384 + 3 * 384), ("cross_attn", 384 + 2 * 384)):
        kernel = blocks[fused]["qkv" if fused == "attn" else "kv"]["kernel"]
        np.testing.assert_allclose(jnp.abs(kernel).max(), np.sqrt(6 / fans), rtol=0.01)
    # The patch bias keeps PyTorch's default, U(-1/4, 1/4) for 16 inputs.
    np.testing.assert_allclose(jnp.abs(params["patch_embed"]["proj"]["bias"]).max(), 0.25, rtol=0.05)
    np.testing.assert_allclose(blocks["scale_shift_table"].std() * np.sqrt(384), 1.0, rtol=0.05)
    np.testing.assert_allclose(params["null_text"].std() * np.sqrt(512), 1.0, rtol=0.05)
    # Blocks differ from each other.
    assert jnp.any(blocks["mlp"]["fc1"]["kernel"][0] != blocks["mlp"]["fc1"]["kernel"][1])


def arguments(batch=2, length=5):
    rng = np.random.default_rng(0)
    return dict(
        latents=jnp.asarray(rng.normal(size=(batch, 4, 6, 4)), jnp.float32),
        timesteps=jnp.asarray([1.0, 500.0]),
        text=jnp.asarray(rng.normal(size=(batch, length, 8)), jnp.float32),
        text_mask=jnp.ones((batch, length)),
        image_size=jnp.asarray([[512.0, 768.0], [300.0, 200.0]]),
        aspect_ratio=jnp.asarray([[0.67], [1.5]]),
    )


@pytest.fixture(scope="module")
def model(random_params):
    graph, params = random_params(TINY)
    run = jax.jit(lambda **given: nnx.merge(graph, params)(**given))
    return lambda **given: run(**{name: value for name, value in given.items() if value is not None})


def test_output_is_initially_zero():
    out = jax.jit(lambda: PixArt(TINY, rngs=nnx.Rngs(0))(**arguments()))()
    assert out.shape == (2, 4, 6, 8)
    assert not jnp.any(out)


@pytest.mark.parametrize("residual", [1.0, 2e4])
@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_float16_is_accurate_with_large_activations(random_params, residual, scan):
    """Trained transformers have a few activations of several thousand; the residual stream is float16."""
    config = dataclasses.replace(TINY, scan_layers=scan)
    params = random_params(config)[1]
    # Make one channel large, as in trained transformers. All later layers read it through their norms, and so
    # does the final layer.
    bias = params["patch_embed"]["proj"]["bias"]
    params["patch_embed"]["proj"]["bias"] = bias.at[3].set(residual)

    def run(dtype):
        graph = random_params(dataclasses.replace(config, dtype=dtype))[0]
        return jax.jit(lambda params, given: nnx.merge(graph, params)(**given))(params, arguments())

    exact, half = run("float32"), run("float16")
    assert half.dtype == jnp.float32 and jnp.isfinite(half).all()
    error = jnp.abs(half - exact).max() / jnp.abs(exact).max()
    assert 1e-6 < error < 5e-3


@pytest.mark.parametrize("name", ["latents", "timesteps", "text", "image_size", "aspect_ratio"])
def test_each_input_affects_only_its_own_sample(model, name):
    before = model(**arguments())
    changed = arguments()
    changed[name] = changed[name].at[0].add(0.5)
    after = model(**changed)
    assert jnp.abs(after[0] - before[0]).max() > 1e-4
    np.testing.assert_allclose(after[1], before[1], atol=1e-6)


def test_masked_text_has_no_influence(model):
    given = arguments()
    given["text_mask"] = jnp.asarray([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    before = model(**given)
    given["text"] = given["text"].at[0, 3:].set(1e3).at[1, 1:].set(-1e3)
    np.testing.assert_allclose(model(**given), before, atol=1e-6)
    # The length that a batch is padded to has no influence either.
    shorter = {**given, "text": given["text"][:, :3], "text_mask": given["text_mask"][:, :3]}
    np.testing.assert_allclose(model(**shorter), before, atol=1e-6)


def test_fractional_timesteps_are_not_rounded(model):
    whole, half = arguments(), arguments()
    half["timesteps"] = half["timesteps"] + 0.5
    assert jnp.abs(model(**whole) - model(**half)).max() > 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(latents=jnp.zeros((2, 5, 6, 4))), "sides that the patch size 2 divides"),
        (dict(latents=jnp.zeros((2, 4, 6, 3))), "takes 4 channels"),
        (dict(text=jnp.zeros((2, 5, 9))), r"text features \[B, S, 8\]"),
        (dict(text_mask=jnp.ones((2, 4))), "text_mask"),
        (dict(aspect_ratio=None), "has size conditions"),
    ],
)
def test_wrong_shapes_raise_with_the_expected_shape(model, change, message):
    with pytest.raises(UserError, match=message):
        model(**{**arguments(), **change})


def test_unused_size_conditions_raise():
    plain = dataclasses.replace(TINY, size_conditions=False)
    with pytest.raises(UserError, match="do not pass image_size and aspect_ratio"):
        jax.eval_shape(lambda: PixArt(plain, rngs=nnx.Rngs(0))(**arguments()))


def test_width_must_be_a_multiple_of_three_for_size_conditions():
    with pytest.raises(UserError, match="multiple of 3"):
        PixArtConfig(size="custom", hidden_size=32, num_heads=2, size_conditions=True)
