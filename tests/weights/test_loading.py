import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

import pixart_jax
from pixart_jax.errors import UserError
from pixart_jax.weights.checkpoints import write_weights


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, random_params):
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    write_weights(folder, random_params(tiny.MODEL)[1], tiny.CONFIG)
    return folder


def test_a_network_in_int8(checkpoint):
    """It is near the network in float32, with scanned and with separate blocks."""
    rng = np.random.default_rng(0)
    latents, text = rng.normal(size=(1, 8, 8, 3)), rng.normal(size=(1, 32, 16))
    arguments = [jnp.asarray(a, jnp.float32) for a in (latents, [300.0], text, np.ones((1, 32)))]
    run = jax.jit(lambda graph, params: nnx.merge(graph, params)(*arguments), static_argnums=0)
    exact = np.asarray(run(*nnx.split(pixart_jax.load_model(checkpoint))))
    outputs = []
    for scanned in (True, False):
        model = pixart_jax.load_model(checkpoint, weights_dtype="int8", scan_layers=scanned)
        block = model.blocks.stacked if scanned else model.blocks.stacked[0]
        for layer in (block.attn.qkv, block.cross_attn.kv, block.mlp.fc1, block.mlp.fc2):
            assert layer.kernel.dtype == jnp.int8 and layer.kernel_scale.dtype == jnp.float32
            assert layer.kernel.nbytes == layer.kernel.size
        assert block.mlp.fc1.bias.dtype == model.t_block.kernel.dtype == jnp.float32
        outputs.append(np.asarray(run(*nnx.split(model))))
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-5)
    assert 1e-4 < np.linalg.norm(outputs[0] - exact) / np.linalg.norm(exact) < 0.02


def test_an_unknown_dtype_of_the_weights(checkpoint):
    with pytest.raises(UserError, match="weights_dtype is 'int4': choose one of float32, int8"):
        pixart_jax.load_model(checkpoint, weights_dtype="int4")
