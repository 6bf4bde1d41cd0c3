import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest
import tiny
from flax import nnx

from pixart_jax.models.activations import decoding_bytes, sampling_bytes, training_bytes
from pixart_jax.models.attention import target_platform
from pixart_jax.models.configs import PixArtConfig
from pixart_jax.models.pixart import PixArt
from pixart_jax.models.vae import VAE, VAEConfig


def test_the_estimate_of_decoding_is_that_of_the_compiler():
    """They agree within a factor of 1.6 on a CPU, for a model large enough that its activations matter."""
    # Attention needs most memory in a VAE with two levels, convolutions in one with four.
    for channels, side, tile in (((32, 64), 64, 0), ((32, 64, 64, 64), 16, 0), ((32, 64, 64, 64), 16, 64)):
        vae = VAEConfig(block_out_channels=channels, layers_per_block=1)
        graph, state = nnx.split(nnx.eval_shape(lambda vae=vae: VAE(vae, rngs=nnx.Rngs(0))))

        def decode(params, latents, graph=graph, tile=tile):
            network = nnx.merge(graph, params)
            return network.decode_tiled(latents, tile // 8, tile // 32) if tile else network.decode(latents)

        latents = jax.ShapeDtypeStruct((1, side, side, 4), jnp.float32)
        compiled = jax.jit(decode).lower(state, latents).compile()
        estimate = decoding_bytes(vae, (128, 128), 1, tile)
        assert 1 / 1.6 < estimate / compiled.memory_analysis().temp_size_in_bytes < 1.6


@pytest.mark.parametrize(
    "fields",
    [
        dict(kv_compression="conv", kv_compression_layers="1"),
        dict(kv_compression="uniform_every", kv_compression_layers="1"),
        dict(qk_norm=True),
        dict(qk_norm=True, kv_compression="conv", kv_compression_layers="1"),
    ],
)
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_what_compression_and_normalization_keep_for_the_backward_pass(fields, remat, capsys):
    shape = dict(size="custom", depth=2, hidden_size=48, num_heads=2, text_dim=16, text_length=8)
    plain = PixArtConfig(**shape, remat=remat, scan_layers=False)
    changed = dataclasses.replace(plain, **fields)
    inputs = jnp.zeros((2, 32, 32, 4)), jnp.zeros(2), jnp.zeros((2, 8, 16)), jnp.ones((2, 8))

    def kept(model):
        """Bytes that the compiled step keeps, apart from its parameters."""
        graph, state = nnx.split(PixArt(model, rngs=nnx.Rngs(0)))
        jax.ad_checkpoint.print_saved_residuals(lambda params: nnx.merge(graph, params)(*inputs).sum(), state)
        lines = [line for line in capsys.readouterr().out.splitlines() if "from the argument" not in line]
        shapes = [re.match(r"f32\[([\d,]*)\]", line) for line in lines]
        return sum(4 * math.prod(map(int, filter(None, shape[1].split(",")))) for shape in shapes if shape)

    expected = [training_bytes(model, (32, 32), 2, 8) for model in (plain, changed)]
    difference = kept(changed) - kept(plain)
    assert difference == pytest.approx(expected[1] - expected[0], rel=0.02, abs=8000)
    assert (abs(difference) > 10_000) == (remat == "dots")


def test_logits_count_where_attention_keeps_them():
    model = dataclasses.replace(tiny.MODEL, dtype="bfloat16")
    # 'auto' is XLA's attention on a CPU, and a fused kernel on a GPU, or on a TPU with 256 keys or more.
    whole = sampling_bytes(model, (64, 64), 1)
    assert whole == sampling_bytes(dataclasses.replace(model, attention="xla"), (64, 64), 1)
    for platform in ("gpu", "tpu"):
        with target_platform(platform):
            assert sampling_bytes(model, (64, 64), 1) < whole
    with target_platform("tpu"):
        short = sampling_bytes(model, (16, 16), 1)
    assert short == sampling_bytes(model, (16, 16), 1)
