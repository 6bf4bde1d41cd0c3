import dataclasses

import jax
import jax.numpy as jnp
import tiny
from flax import nnx

from pixart_jax.models.activations import decoding_bytes, sampling_bytes
from pixart_jax.models.attention import target_platform
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
