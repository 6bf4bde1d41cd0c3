import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from pixart_jax.config import FeaturesConfig
from pixart_jax.encoders.images import PixelCodec, VAECodec, load_vae, make_codec, to_uint8
from pixart_jax.errors import UserError
from pixart_jax.models.vae import abstract_vae


def test_pixels():
    codec = make_codec(FeaturesConfig(codec="pixels", latent_scale=1.0))
    assert isinstance(codec, PixelCodec) and codec.latent_scale == 1 and codec.downsampling == 1
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    stored, std = codec.encode(images)
    assert std is None and codec.latent_shape(16, 16, 1) == (16, 16, 1)
    np.testing.assert_array_equal(codec.decode(stored / np.float32(127.5) - 1), images)


def test_to_uint8_rounds_and_clips():
    assert to_uint8(np.array([-1.2, -1, -0.999, 0.0, 1, 7])).tolist() == [0, 0, 0, 128, 255, 255]


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    ).eval()
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return folder, model


def test_the_vae_is_that_of_diffusers(vae_folder):
    torch = pytest.importorskip("torch")
    folder, model = vae_folder
    codec = VAECodec(str(folder), 0.18215, batch_size=8)
    assert codec.downsampling == 8 and codec.latent_shape(48, 64, 3) == (6, 8, 4)
    images = np.random.default_rng(0).integers(0, 256, (11, 48, 64, 3), np.uint8)
    mean, std = codec.encode(images)
    with torch.no_grad():
        x = torch.from_numpy(images.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
        posterior = model.encode(x).latent_dist
        decoded = model.decode(posterior.mean).sample.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(mean, posterior.mean.permute(0, 2, 3, 1), rtol=0, atol=2e-5)
    np.testing.assert_allclose(std, posterior.std.permute(0, 2, 3, 1), rtol=0, atol=2e-5)
    # Small floating-point differences can change the rounding.
    assert np.abs(codec.decode(mean).astype(int) - to_uint8(decoded)).max() <= 1
    # An image that fits into one tile is decoded at once.
    np.testing.assert_array_equal(codec.decode(mean[:1], 64), codec.decode(mean[:1]))
    tiled = jax.jit(lambda z: model_of(folder).decode_tiled(z, 4, 1))(mean[:1])
    np.testing.assert_array_equal(codec.decode(mean[:1], 32), to_uint8(np.asarray(tiled)))
    assert np.abs(codec.decode(mean[:1], 32).astype(int) - codec.decode(mean[:1])).max() > 1
    alone, _ = codec.encode(images[9:10])
    np.testing.assert_allclose(alone[0], mean[9], rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="the images have 1 channels, but a VAE takes 3"):
        codec.latent_shape(8, 8, 1)


def model_of(folder):
    config, params = load_vae(folder)
    return nnx.merge(nnx.graphdef(abstract_vae(config)), params)


@pytest.mark.parametrize("upcast", [True, False])
def test_the_vae_never_computes_in_float16(vae_folder, tmp_path, upcast):
    """`force_upcast` is for VAEs that overflow in float16, such as SDXL's."""
    folder, _ = vae_folder
    shutil.copytree(folder, tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**config, "force_upcast": upcast}))
    codec = VAECodec(str(tmp_path / "vae"), 0.13025, batch_size=1)
    latents = np.random.default_rng(0).normal(size=(1, 2, 2, 4)).astype(np.float32) * 1e6
    assert np.abs(latents).max() > np.finfo(np.float16).max
    # Decoding raises an error if a value is not finite.
    assert codec.config.dtype == "float32" and codec.decode(latents).std() > 1


def test_a_missing_vae_is_one_line(tmp_path):
    with pytest.raises(UserError) as error:
        make_codec(FeaturesConfig(vae="no/such-vae"))
    assert "features.vae is 'no/such-vae': no such folder" in str(error.value)
    assert "\n" not in str(error.value)


def test_images_are_decoded_without_the_text_encoder():
    """Training and the pipeline's codec must not have to wait for an import of transformers."""
    unwanted = ("transformers", "tokenizers", "torch", "pixart_jax.encoders.text", "pixart_jax.models.t5")
    program = f"import sys, pixart_jax.encoders.images; print([n for n in {unwanted} if n in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


def test_a_vae_whose_latents_are_shifted(tmp_path):
    for shift, message in (
        (0.0609, "shift_factor 0.0609, and latents are only"),
        (None, "no weights"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"shift_factor": shift}))
        with pytest.raises(UserError, match=message):
            VAECodec(str(tmp_path), 0.18215, batch_size=1)
