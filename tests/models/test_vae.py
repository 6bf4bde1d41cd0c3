import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from pixart_jax.errors import UserError
from pixart_jax.models import vae as vae_module
from pixart_jax.models.layers import activation_sharding
from pixart_jax.models.vae import VAE, Conv, MidAttention, VAEConfig
from pixart_jax.weights.tables import import_tensors
from pixart_jax.weights.vae import vae_table

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# Four levels, as in the real VAEs; one level keeps its number of channels.
TINY = dict(
    block_out_channels=(8, 16, 24, 24),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    norm_num_groups=4,
)
# For tests that do not compare with diffusers.
SMALL = dict(
    block_out_channels=(8, 16),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    layers_per_block=1,
)
# SDXL differs from SD 1.x only in the scale; later VAEs have more channels, a shift and no 1x1 convolutions.
VARIANTS = {
    "sd": {},
    "sdxl": dict(scaling_factor=0.13025, sample_size=1024, force_upcast=True),
    "later": dict(
        latent_channels=6,
        layers_per_block=1,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    ),
}


def torch_vae(**changes):
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(**{**TINY, **changes}).eval()
    with torch.no_grad():
        # Initial norms are the identity: make scale and bias matter, and the attention sharper.
        for name, value in model.named_parameters():
            if "norm" in name:
                value.add_(0.3 * torch.randn_like(value))
            if "to_q" in name:
                value.mul_(4)
    return model


def ours(model, dtype="float32", stored=np.float32, **changes):
    """Makes the JAX VAE with the weights of the torch model, from its config.json."""
    config = VAEConfig.from_hf(json.loads(model.to_json_string()), dtype=dtype)
    config = dataclasses.replace(config, **changes)
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    graph = nnx.graphdef(nnx.eval_shape(lambda: VAE(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, import_tensors(vae_table(config), tensors, stored))


def images(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (*shape, 3)).astype(np.float32)


def latents(*shape, channels=4, seed=1):
    return np.random.default_rng(seed).standard_normal((*shape, channels)).astype(np.float32)


def encode(vae, x):
    """Compiles the whole model, because compiling its operations one by one takes longer."""
    return jax.jit(lambda x: vae.encode(x))(x)


def decode(vae, z):
    return jax.jit(lambda z: vae.decode(z))(z)


def nchw(x):
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


def nhwc(x):
    return x.float().permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request):
    model = torch_vae(**VARIANTS[request.param])
    return model, ours(model)


@pytest.fixture(scope="module")
def vae():
    return ours(torch_vae(**SMALL))


def test_encode_is_that_of_diffusers(pair):
    model, vae = pair
    shape = (2, 40, 24)
    x = images(*shape)
    mean, std = encode(vae, x)
    with torch.no_grad():
        posterior = model.encode(nchw(x)).latent_dist
    assert mean.dtype == std.dtype == jnp.float32
    expected_mean, expected_std = nhwc(posterior.mean), nhwc(posterior.std)
    assert mean.shape == (shape[0], shape[1] // 8, shape[2] // 8, vae.config.latent_channels)
    np.testing.assert_allclose(mean, expected_mean, atol=5e-5, rtol=0)
    np.testing.assert_allclose(std, expected_std, atol=5e-5, rtol=0)
    assert expected_mean.std() > 0.05 and expected_std.std() > 0.02


def test_decode_is_that_of_diffusers(pair):
    model, vae = pair
    shape = (2, 3, 5)
    z = latents(*shape, channels=vae.config.latent_channels)
    decoded = decode(vae, z)
    with torch.no_grad():
        expected = nhwc(model.decode(nchw(z)).sample)
    assert decoded.dtype == jnp.float32 and decoded.shape == (shape[0], shape[1] * 8, shape[2] * 8, 3)
    assert expected.std() > 0.05
    np.testing.assert_allclose(decoded, expected, atol=5e-5, rtol=0)


def test_group_norm_is_that_of_pytorch():
    # Small deviations make epsilon matter; with the large offset, a one-pass variance would lose precision.
    x = 3 + 1e-3 * np.random.default_rng(0).standard_normal((2, 5, 3, 8)).astype(np.float32)
    expected = torch.nn.functional.group_norm(nchw(x).double(), 4, eps=1e-6)
    np.testing.assert_allclose(vae_module.group_norm(x, 4), nhwc(expected), atol=2e-3)
    np.testing.assert_allclose(vae_module.group_norm(x.astype(ml_dtypes.bfloat16) * 0, 4), 0)
    assert vae_module.group_norm(x.astype(ml_dtypes.bfloat16), 4).dtype == jnp.float32


def test_log_variance_is_clipped_as_in_diffusers():
    model = torch_vae(**SMALL)
    with torch.no_grad():
        model.quant_conv.weight[4:].mul_(0)
        model.quant_conv.bias[4:] = torch.tensor([-100.0, 100.0, 1.0, -40.0])
    std = encode(ours(model), images(1, 8, 8))[1]
    np.testing.assert_allclose(
        std[0, 0, 0], [np.exp(-15.0), np.exp(10.0), np.exp(0.5), np.exp(-15.0)], rtol=1e-6
    )


@pytest.mark.parametrize("chunk", [1, 8, 15])
def test_attention_in_chunks_changes_nothing(monkeypatch, chunk):
    attention = MidAttention(16, VAEConfig(block_out_channels=(16,), norm_num_groups=4), rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((2, 9, 5, 16)).astype(np.float32)
    whole = jax.jit(lambda x: attention(x)).lower(x)
    monkeypatch.setattr(vae_module, "QUERY_CHUNK", chunk)
    chunked = jax.jit(lambda x: attention(x)).lower(x)
    # The program with chunks has no array with all logits [B, heads, N, N].
    assert ["45x1x45xf32>" in lowered.as_text() for lowered in (whole, chunked)] == [True, False]
    np.testing.assert_allclose(chunked.compile()(x), whole.compile()(x), atol=1e-6)


def test_bfloat16_is_close_and_works_from_bfloat16_weights(vae):
    half = ours(torch_vae(**SMALL), dtype="bfloat16", stored=ml_dtypes.bfloat16)
    assert half.decoder.conv_in.kernel.dtype == ml_dtypes.bfloat16
    x, z = images(1, 32, 32), latents(1, 8, 8)
    pairs = [(encode(half, x)[0], encode(vae, x)[0]), (decode(half, z), decode(vae, z))]
    for close, exact in pairs:
        assert close.dtype == jnp.float32
        error = jnp.linalg.norm(close - exact) / jnp.linalg.norm(exact)
        assert 1e-4 < error < 5e-2


# --- Tiles ------------------------------------------------------------------------------------------


def test_latents_of_one_tile_are_decoded_at_once(vae):
    z = latents(2, 6, 5)
    tiled = jax.jit(lambda z: vae.decode_tiled(z, tile=6, overlap=2))(z)
    np.testing.assert_array_equal(tiled, decode(vae, z))


def test_tiles_are_close_to_the_untiled_image_and_closer_if_larger(vae):
    # The statistics of the latents are the same everywhere, so tiles have nearly those of the whole image.
    z = latents(2, 40, 36)
    whole = decode(vae, z)

    def error(a, b):
        return float(np.sqrt(np.square(a - b).mean()) / whole.std())

    small, large = (jax.jit(lambda z, t=t: vae.decode_tiled(z, tile=t, overlap=8))(z) for t in (12, 30))
    assert small.shape == large.shape == whole.shape
    assert error(large, whole) < 0.2 and error(large, whole) < 0.8 * error(small, whole)
    # Tiles are at the right positions: a shift by one latent pixel makes the error much larger.
    assert error(small[:, 2:], whole[:, :-2]) > 3 * error(small, whole)


# --- Config and shapes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda vae: vae.encode(images(1, 21, 16)), "21x16: height and width must be multiples of 2"),
        (lambda vae: vae.encode(latents(1, 16, 16)), "images are"),
        (lambda vae: vae.decode(images(1, 16, 16)), "latents are"),
        (lambda vae: vae.decode_tiled(images(1, 16, 16)), "latents are"),
        (lambda vae: vae.decode(latents(16, 16)), "latents are"),
    ],
)
def test_wrong_shapes_raise(vae, call, message):
    with pytest.raises(UserError, match=message):
        call(vae)


def test_from_hf_reads_all_fields():
    config = VAEConfig.from_hf(json.loads(torch_vae(**VARIANTS["later"]).to_json_string()), dtype="bfloat16")
    assert config == VAEConfig(
        latent_channels=6,
        block_out_channels=(8, 16, 24, 24),
        layers_per_block=1,
        norm_num_groups=4,
        shift_factor=0.0609,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        dtype="bfloat16",
    )
    assert config.downsampling == 8
    # The released sd-vae configs were written before scaling_factor existed.
    old = VAEConfig.from_hf({"_class_name": "AutoencoderKL", "act_fn": "silu", **TINY})
    assert old.scaling_factor == 0.18215 and old.use_quant_conv and old.mid_block_add_attention


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
        ({"act_fn": "relu"}, "act_fn is 'relu'"),
        ({"down_block_types": ["DownEncoderBlock2D"] * 3}, "down_block_types"),
        ({"up_block_types": ["AttnUpDecoderBlock2D"] * 4}, "AttnUpDecoderBlock2D"),
        ({"latents_mean": [0.0] * 4}, "latents_mean"),
        ({"block_out_channels": 8}, "block_out_channels is 8: it must be a list"),
        ({"up_block_types": None}, "up_block_types is None: it must be a list"),
        ({"shift_factor": "x"}, "shift_factor is 'x'"),
        ({"shift_factor": 10**400}, "shift_factor is 10"),
        ({"norm_num_groups": 7}, "norm_num_groups 7"),
        ({"latent_channels": 0}, "latent_channels is 0"),
        ({"block_out_channels": [8, 16, 24, "24"]}, "block_out_channels is '24'"),
        ({"scaling_factor": 0}, "scaling_factor is 0"),
        ({"scaling_factor": None}, "scaling_factor is None: it must be a finite number above 0"),
        ({"scaling_factor": "x"}, "scaling_factor is 'x'"),
        ({"scaling_factor": float("inf")}, "scaling_factor is inf"),
        ({"double_z": False}, "double_z unknown"),
    ],
)
def test_from_hf_raises_one_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        VAEConfig.from_hf({"_class_name": "AutoencoderKL", **TINY, **changes})
    assert "\n" not in str(error.value)


def test_float16_raises_for_released_weights_overflow():
    with pytest.raises(UserError, match="float16"):
        VAEConfig(dtype="float16")


def test_parameters_and_activations_name_their_axes():
    config = VAEConfig(block_out_channels=(8, 16), norm_num_groups=4)
    model = nnx.eval_shape(lambda: VAE(config, rngs=nnx.Rngs(0)))
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        axes = variable.get_metadata()["out_sharding"]
        assert len(axes) == len(variable.shape), path
        # Dimensions that a mesh cannot divide, the channels of images and latents, have no axis name.
        assert all(size % 8 == 0 for size, axis in zip(variable.shape, axes) if axis), path
    seen = set()
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def rule(axes):
        seen.add(axes)
        return device

    def through(x):
        vae = VAE(config, rngs=nnx.Rngs(0))
        return vae.decode(vae.encode(x)[0])

    with activation_sharding(rule):
        jax.eval_shape(through, images(1, 8, 8))
    assert seen == {("batch", None, None, None)}


def test_random_weights_have_the_distribution_of_pytorch():
    torch.manual_seed(0)
    theirs = torch.nn.Conv2d(32, 128, 3)
    conv = Conv(32, 128, dtype=jnp.float32, rngs=nnx.Rngs(0))
    for value, expected in ((conv.kernel, theirs.weight), (conv.bias, theirs.bias)):
        expected = expected.detach().numpy()
        assert np.abs(value).max() == pytest.approx(np.abs(expected).max(), rel=0.05)
        assert np.std(value) == pytest.approx(np.std(expected), rel=0.15)
