import json

import jax
import numpy as np
import pytest
from flax import nnx

from pixart_jax.errors import UserError
from pixart_jax.models.vae import VAE, VAEConfig
from pixart_jax.weights.tables import export_shapes, import_tensors
from pixart_jax.weights.vae import vae_table

TINY = VAEConfig(block_out_channels=(8, 12), norm_num_groups=2, layers_per_block=1)


def random_tensors(table):
    rng = np.random.default_rng(0)
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in export_shapes(table).items()}


def test_names_and_shapes_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    for changes in ({}, dict(mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False)):
        model = diffusers.AutoencoderKL(
            block_out_channels=(8, 12),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=2,
            layers_per_block=2,
            **changes,
        )
        config = VAEConfig.from_hf(json.loads(model.to_json_string()))
        theirs = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        assert export_shapes(vae_table(config)) == theirs


def test_the_released_size_has_a_table_without_making_the_model():
    shapes = vae_table(VAEConfig()).shapes
    # The released sd-vae-ft-ema.
    assert sum(np.prod(shape) for shape in shapes.values()) == 83_653_863


def test_params_go_into_a_module():
    table = vae_table(TINY)
    params = import_tensors(table, random_tensors(table))
    vae = nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: VAE(TINY, rngs=nnx.Rngs(0)))), params)
    kernel = vae.encoder.down_blocks[1].resnets[0].shortcut.kernel
    np.testing.assert_array_equal(
        kernel, params["encoder"]["down_blocks"][1]["resnets"][0]["shortcut"]["kernel"]
    )


@pytest.mark.parametrize("convolution", [False, True])
def test_vae_attention_of_old_files(convolution):
    table = vae_table(TINY)
    tensors = random_tensors(table)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, value in tensors.items():
        for new, name in names.items():
            if f".{new}." in key:
                key = key.replace(f".{new}.", f".{name}.")
                value = value[:, :, None, None] if convolution and value.ndim == 2 else value
        old[key] = value
    assert len(set(old) - set(tensors)) == 16
    assert old["decoder.mid_block.attentions.0.query.weight"].ndim == (4 if convolution else 2)
    jax.tree.map(np.testing.assert_array_equal, import_tensors(table, old), import_tensors(table, tensors))
    # Other tensors must not have the shape of a 1x1 convolution.
    bias = "decoder.mid_block.attentions.0.proj_attn.bias"
    with pytest.raises(UserError, match=f"{bias} 12x1x1 for 12"):
        import_tensors(table, {**old, bias: old[bias][:, None, None]})
