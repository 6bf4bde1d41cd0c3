import json
import sys

import numpy as np
import pytest
import torch
from tiny_image_encoders import CONFIGS, save_image_encoder

from pixart_jax.encoders.image_features import IMAGENET, ImageEncoder
from pixart_jax.errors import UserError


def images(count=3, height=32, width=48, channels=3):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, height, width, channels), np.uint8)


def reference(model, pixels, size, mean, std, prefix, **options):
    """transformers' own output for images that are normalized and resized with PyTorch."""
    x = torch.tensor(pixels).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor(mean).reshape(1, -1, 1, 1)) / torch.tensor(std).reshape(1, -1, 1, 1)
    x = torch.nn.functional.interpolate(x, size, mode="bicubic", align_corners=False)
    with torch.no_grad():
        return model.eval()(x, **options).last_hidden_state[:, prefix:].numpy()


@pytest.mark.parametrize(
    ("kind", "prefix", "options"),
    [
        ("dinov2", 1, {}),
        ("dinov2_with_registers", 5, {}),
        ("dinov3_vit", 5, {}),
        ("clip", 1, {"interpolate_pos_encoding": True}),
        ("siglip", 0, {"interpolate_pos_encoding": True}),
        ("vit", 1, {"interpolate_pos_encoding": True}),
    ],
)
def test_features_are_those_of_transformers(tmp_path, kind, prefix, options):
    """Without class and register tokens, on a grid of 4 x 6 tokens: 16 px each, whatever the patch size."""
    model = save_image_encoder(tmp_path, kind)
    encoder = ImageEncoder(str(tmp_path), 3, batch_size=2)
    found = encoder.encode(images(), (4, 6))
    patch = CONFIGS[kind][1]["patch_size"]
    model = getattr(model, "vision_model", model)
    expected = reference(model, images(), (4 * patch, 6 * patch), *IMAGENET, prefix, **options)
    assert found.shape == expected.shape == (3, 24, encoder.width) and found.dtype == encoder.dtype
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=1e-2, atol=1e-2)


def test_a_tiny_classifier_of_grey_images_with_its_own_normalization(tmp_path):
    model = save_image_encoder(tmp_path, "vit", classes=5, num_channels=1, image_size=32, patch_size=4)
    settings = {"image_mean": [0.2], "image_std": [0.7], "rescale_factor": 1 / 255}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    grey = images(channels=1, height=16, width=16)
    found = ImageEncoder(str(tmp_path), 1, batch_size=4).encode(grey, (8, 8))
    options = {"interpolate_pos_encoding": True}
    expected = reference(model.vit, grey, (32, 32), [0.2], [0.7], 1, **options)
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=1e-2, atol=1e-2)
    # An image alone has the features that it has in a batch.
    alone = ImageEncoder(str(tmp_path), 1, batch_size=4).encode(grey[2:], (8, 8))
    np.testing.assert_array_equal(alone[0], found[2])
    with pytest.raises(UserError, match="takes images with 1 channels, and these have 3"):
        ImageEncoder(str(tmp_path), 3, batch_size=4)


def test_grey_images_are_repeated_for_an_encoder_of_colours(tmp_path):
    save_image_encoder(tmp_path, "vit")
    grey = images(channels=1)
    one, three = (ImageEncoder(str(tmp_path), n, 4).encode(grey.repeat(n, -1), (2, 3)) for n in (1, 3))
    np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("bert", "cannot be opened .*'bert' has no patches"),
        ("vit_mae", "does not return one vector for each patch"),
        ("swin", "does not encode images of 2x3 patches"),
        (None, "cannot be opened .*give a folder with an image encoder"),
    ],
)
def test_a_folder_without_a_usable_image_encoder_raises(tmp_path, kind, message):
    if kind:
        save_image_encoder(tmp_path, kind)
    with pytest.raises(UserError, match=rf"features.image_encoder '{tmp_path}' .*{message}") as raised:
        ImageEncoder(str(tmp_path), 3, 4)
    assert "\n" not in str(raised.value)


def test_other_faults_have_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"'facebook/dinov2-base' is no folder: give the folder .*hub:OWNER"):
        ImageEncoder("facebook/dinov2-base", 3, 4)
    save_image_encoder(tmp_path, "vit")
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5], "image_std": [0.5]}')
    with pytest.raises(UserError, match=r"image_mean \[0.5, 0.5\] .* and 3 channels"):
        ImageEncoder(str(tmp_path), 3, 4)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="needs the package 'torch', which is not installed: pip install"):
        ImageEncoder(str(tmp_path), 3, 4)
