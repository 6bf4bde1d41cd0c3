import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pixart_jax.errors import UserError
from pixart_jax.models.compression import Compression
from pixart_jax.models.configs import PixArtConfig, format_layers, parse_layers
from pixart_jax.models.layers import activation_sharding
from pixart_jax.weights.backbones import backbone_table
from pixart_jax.weights.tables import export_shapes

HEADS, WIDTH = 2, 3
CONFIG = PixArtConfig(size="custom", depth=4, hidden_size=24, num_heads=2, text_dim=8, text_length=5)
SIGMA = dataclasses.replace(CONFIG, qk_norm=True, kv_compression="conv")


def tokens(height, width):
    return np.random.default_rng(0).normal(size=(2, height * width, HEADS, WIDTH)).astype(np.float32)


def test_the_convolution_is_initially_the_normalized_average():
    x = tokens(4, 6)
    out = Compression("conv", 2, HEADS, WIDTH)(jnp.asarray(x), (4, 6))
    mean = x.reshape(2, 2, 2, 3, 2, HEADS * WIDTH).mean((2, 4)).reshape(2, 6, -1)
    expected = torch.nn.functional.layer_norm(torch.tensor(mean), (HEADS * WIDTH,), eps=1e-5)
    np.testing.assert_allclose(out.reshape(2, 6, -1), expected, atol=1e-5)


@pytest.mark.parametrize("grid", [(4, 6), (5, 7)])
def test_nearest_is_the_resizing_of_pytorch(grid):
    x = tokens(*grid)
    out = Compression("nearest", 2, HEADS, WIDTH)(jnp.asarray(x), grid)
    image = torch.tensor(x.reshape(2, *grid, -1)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(image, scale_factor=0.5, mode="nearest")
    expected = expected.permute(0, 2, 3, 1).reshape(2, -1, HEADS, WIDTH)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("mode", ["uniform", "uniform_every"])
def test_modes_that_need_an_even_grid_say_so(mode):
    module = Compression(mode, 2, HEADS, WIDTH)
    assert module(jnp.asarray(tokens(2, 4)), (2, 4)).shape[1] == {"uniform": 2, "uniform_every": 4}[mode]
    with pytest.raises(UserError, match=f"kv_compression '{mode}' cannot reduce .*5x7.* by 2: choose"):
        module(jnp.asarray(tokens(5, 7)), (5, 7))


@pytest.mark.parametrize("mode", ["conv", "nearest", "uniform", "uniform_every"])
def test_an_image_of_which_no_token_would_remain_raises(mode):
    config = dataclasses.replace(SIGMA, kv_compression=mode, kv_compression_factor=8)
    with pytest.raises(UserError, match=f"'{mode}' cannot reduce .*2x3.* by 8, because none would remain"):
        config.check_size(4, 6)
    config.check_size(16, 32)
    CONFIG.check_size(4, 6)  # compresses nothing


@pytest.mark.parametrize(
    ("text", "layers"),
    [("", (2, 3)), ("0", (0,)), ("3,1-2", (1, 2, 3)), (" 0 - 3".replace(" ", ""), (0, 1, 2, 3))],
)
def test_layers_are_numbers_and_ranges(text, layers):
    assert parse_layers(text, 4) == layers
    assert parse_layers(format_layers(layers), 4) == layers


def test_layers_have_one_form_in_configs():
    assert SIGMA.kv_compression_layers == "2-3"
    assert dataclasses.replace(SIGMA, kv_compression_layers="3,0,1").kv_compression_layers == "0-1,3"


@pytest.mark.parametrize("text", ["4", "2-1", "x", "1,,2", "1-2-3", "-1", "1;2", "9" * 200])
def test_other_layers_raise(text):
    with pytest.raises(
        UserError, match=r"kv_compression_layers is .*: give numbers and ranges of the blocks 0 to 3"
    ):
        dataclasses.replace(SIGMA, kv_compression_layers=text)


def test_layers_without_compression_raise():
    with pytest.raises(
        UserError, match=r"kv_compression_layers is '2-3', but model\.kv_compression is 'none'"
    ):
        dataclasses.replace(SIGMA, kv_compression="none")


@pytest.mark.parametrize(
    ("change", "count", "keys"),
    [
        ({}, 610_856_096, 437),
        ({"kv_compression": "conv", "kv_compression_layers": "14-27"}, 610_968_992, 493),
        ({"qk_norm": True}, 610_985_120, 549),
    ],
)
def test_xl2_has_the_official_number_of_parameters_and_tensors(change, count, keys):
    config = PixArtConfig(text_length=300, **change)
    shapes = backbone_table("official", config).shapes
    assert sum(np.prod(shape) for path, shape in shapes.items() if path[0] != "null_text") == count
    # The official classes also have the position table.
    assert len(export_shapes(backbone_table("official", config))) + 1 == keys


@pytest.mark.parametrize("axes", [("sequence", None), (None, "tensor")])
def test_sharded_tokens_and_heads_give_the_same_result(random_params, axes):
    graph, params = random_params(SIGMA)
    rng = np.random.default_rng(1)
    arguments = (
        jnp.asarray(rng.normal(size=(2, 8, 12, 4)), jnp.float32),
        jnp.asarray([3.0, 711.5]),
        jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.float32),
        jnp.ones((2, 5), bool),
    )
    mesh = Mesh(np.array(jax.devices()[:2]), [axis for axis in axes if axis])
    names = dict(zip(("tokens", "heads"), axes))

    def rule(logical):
        return NamedSharding(mesh, PartitionSpec(*(names.get(axis) for axis in logical)))

    def output(params, rule):
        with activation_sharding(rule):
            return nnx.merge(graph, params)(*arguments)

    plain = jax.jit(lambda params: output(params, None))(params)
    sharded = jax.jit(lambda params: output(params, rule))(params)
    np.testing.assert_allclose(sharded, plain, atol=2e-5)
