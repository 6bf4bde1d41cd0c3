import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pixart_jax.models.configs import DiTConfig, PixArtConfig
from pixart_jax.models.dit import DiT
from pixart_jax.models.layers import linear
from pixart_jax.models.pixart import PixArt
from pixart_jax.models.quantization import T5_KEPT, kernels, quantize, quantize_blocks, quantize_parameters
from pixart_jax.models.t5 import T5Config, T5Encoder

TINY = dict(size="custom", depth=2, hidden_size=16, num_heads=2, base_size=4)
NETWORKS = {
    "pixart": (PixArt, PixArtConfig(**TINY, text_dim=8, text_length=6), ()),
    "dit": (DiT, DiTConfig(**TINY, num_classes=3), ()),
    "t5": (T5Encoder, T5Config(11, 16, 4, 24, 2, 2), T5_KEPT),
}


def make(name):
    """A network with random parameters, and the names of the kernels that are not quantized."""
    kind, config, kept = NETWORKS[name]
    graph, abstract = nnx.split(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32)  # noqa: E731
    return nnx.merge(graph, jax.tree.map(draw, abstract)), kept


def kernel(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape, inputs", [((5, 7), (0,)), ((2, 6, 3, 4, 5), (-4,)), ((2, 4, 3, 6), (1, 2))])
def test_the_formula(shape, inputs):
    weights = kernel(*shape)
    weights[(..., 0)] = 0
    rounded, scale = quantize(weights, inputs)
    assert isinstance(rounded, np.ndarray) and rounded.dtype == np.int8 and scale.dtype == np.float32
    whole = np.expand_dims(scale.astype(np.float64), [axis % len(shape) for axis in inputs])
    largest = np.abs(weights.astype(np.float64)).max(axis=inputs, keepdims=True)
    np.testing.assert_allclose(whole, np.where(largest > 0, largest / 127, 1), rtol=1e-6)
    # The nearest multiple of the scale; the largest weight of a channel is 127 times the scale.
    assert np.abs(rounded * whole - weights).max() < 0.500001 * whole.max()
    np.testing.assert_array_equal(rounded, np.round(weights / whole))
    assert set(np.abs(rounded).max(axis=inputs).ravel()) == {0, 127}
    for ours, theirs in zip(quantize(jnp.asarray(weights), inputs), (rounded, scale)):
        np.testing.assert_array_equal(ours, theirs)


def test_the_error_of_normal_weights():
    weights = kernel(4096, 64)
    rounded, scale = quantize(weights, (0,))
    error = np.sqrt(np.mean(np.square(rounded * scale - weights)) / np.mean(np.square(weights)))
    # Rounding has the error s / sqrt(12), and the largest of 4096 normal numbers is 3.3 to 4.5 deviations.
    assert 3.3 / 127 / 12**0.5 < error < 4.5 / 127 / 12**0.5


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_on_the_host_are_those_of_the_quantized_network(name):
    network, kept = make(name)
    params = nnx.traversals.flatten_mapping(nnx.to_pure_dict(nnx.state(network)))
    params = {path: np.asarray(value) for path, value in params.items()}
    inputs = kernels(network, kept)
    host = dict(quantize_parameters(params.items(), inputs))
    quantize_blocks(network, kept)
    device = nnx.traversals.flatten_mapping(nnx.to_pure_dict(nnx.state(network)))
    assert host.keys() == device.keys() and len(host) == len(params) + len(inputs)
    for path, value in host.items():
        assert value.dtype == device[path].dtype == (np.int8 if path in inputs else np.float32)
        np.testing.assert_array_equal(value, device[path])
    # Nothing else has changed.
    for path in params.keys() - inputs.keys():
        np.testing.assert_array_equal(host[path], params[path])
    names = {path[-1] if name == "t5" else path[-2] for path in inputs}
    assert (
        names
        == {
            "pixart": {"qkv", "q", "kv", "proj", "fc1", "fc2"},
            "dit": {"qkv", "proj", "fc1", "fc2"},
            "t5": {"q", "k", "v", "o", "wi_0", "wi_1"},
        }[name]
    )


def test_the_scales_are_sharded_like_the_outputs():
    network, kept = make("t5")
    before = dict(nnx.to_flat_state(nnx.state(network)))
    quantize_blocks(network, kept)
    for path, variable in nnx.to_flat_state(nnx.state(network)):
        if str(path[-1]).endswith("_scale"):
            axes = before[*path[:-1], path[-1].removesuffix("_scale")].get_metadata()["out_sharding"]
            inputs = 2 if path[-1] == "o_scale" else 1
            assert variable.get_metadata()["out_sharding"] == (axes[0], *axes[1 + inputs :])


def test_a_product_in_float16_does_not_overflow_before_it_is_rescaled():
    layer = linear(4096, 3, (None, None), dtype=jnp.float16, rngs=nnx.Rngs(0))
    layer.kernel.set_value(jnp.full((4096, 3), 1e-3))
    rounded, scale = quantize(layer.kernel[...], (0,))
    layer.kernel, layer.kernel_scale = nnx.Param(rounded), nnx.Param(scale)
    out = layer(jnp.ones((1, 4096), jnp.float16))  # x q is 127 * 4096 = 520,192
    assert out.dtype == jnp.float16
    np.testing.assert_allclose(np.asarray(out, np.float32), 4.096, rtol=1e-3)


@pytest.mark.parametrize("name", ["pixart", "t5"])
def test_the_output_is_that_of_the_rounded_kernels(name):
    """A network in int8 computes what a network with the kernels q s does."""
    network, kept = make(name)
    exact, _ = make(name)
    quantize_blocks(network, kept)
    modules = {("blocks", *path): module for path, module in nnx.iter_modules(network.blocks)}
    floats = {("blocks", *path): module for path, module in nnx.iter_modules(exact.blocks)}
    for (*path, leaf), inputs in kernels(exact, kept).items():
        module = modules[tuple(path)]
        scale = getattr(module, f"{leaf}_scale")[...]
        stored = getattr(module, leaf)[...]
        whole = stored * jnp.expand_dims(scale, [axis % stored.ndim for axis in inputs])
        getattr(floats[tuple(path)], leaf).set_value(whole)
    if name == "pixart":
        text = jnp.asarray(kernel(2, 6, 8))
        arguments = jnp.asarray(kernel(2, 8, 8, 4)), jnp.asarray([3, 900]), text, jnp.ones((2, 6), bool)
    else:
        arguments = jnp.asarray([[1, 5, 7], [2, 3, 0]]), jnp.asarray([[1, 1, 1], [1, 1, 0]])
    run = jax.jit(lambda graph, params: nnx.merge(graph, params)(*arguments), static_argnums=0)
    found, expected, original = (np.asarray(run(*nnx.split(one))) for one in (network, exact, make(name)[0]))
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert 1e-4 < np.linalg.norm(found - original) / np.linalg.norm(original) < 0.03
