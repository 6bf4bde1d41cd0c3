import types

import numpy as np
import pytest
from feature_networks import save_clip, torch
from PIL import Image
from torchmetrics.multimodal import CLIPScore

from pixart_jax.errors import UserError
from pixart_jax.evaluation.clip import Clip, clip_score
from pixart_jax.evaluation.fid import image_files
from pixart_jax.files import sha256_of_file

CAPTIONS = ["a corgi", "two red foxes!", "a very long caption that CLIP cuts", "x", "a corgi reading"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip") / "model")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip_images")
    rng = np.random.default_rng(0)
    for number in range(5):
        pixels = rng.integers(0, 256, (4, 6, 3), np.uint8).repeat(20, axis=0).repeat(20, axis=1)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_the_score_is_that_of_torchmetrics(folder, images):
    clip = Clip(folder)
    ours = clip_score(image_files(images), CAPTIONS, clip, batch_size=2)

    def model_and_processor():
        from transformers import CLIPModel

        class Model(CLIPModel):
            """Returns only the features, as in transformers 4, because torchmetrics expects this."""

            def get_image_features(self, *args):
                return super().get_image_features(*args).pooler_output

            def get_text_features(self, *args):
                return super().get_text_features(*args).pooler_output

        def processor(text=None, images=None, **options):
            if images is not None:
                return clip.processor([image.numpy() for image in images], return_tensors="pt")
            return clip.tokenizer(text, truncation=True, max_length=16, **options)

        return Model.from_pretrained(folder).eval(), processor

    metric = CLIPScore(model_name_or_path=model_and_processor)
    for file, caption in zip(image_files(images), CAPTIONS):
        metric.update(torch.tensor(np.asarray(Image.open(file))).permute(2, 0, 1), caption)
    assert ours == pytest.approx(float(metric.compute()), abs=1e-3)


def test_cosines_are_of_each_pair(folder, images):
    """An image is compared with its own caption, and the result does not depend on the batch."""
    clip = Clip(folder)
    opened = [Image.open(file) for file in image_files(images)]
    together = clip.cosines(opened, CAPTIONS)
    alone = [clip.cosines([image], [caption])[0] for image, caption in zip(opened, CAPTIONS)]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.abs(together - clip.cosines(opened, CAPTIONS[::-1])).max() > 1e-3
    assert np.abs(together).max() <= 1
    assert clip.digest == sha256_of_file(folder / "model.safetensors")


def test_a_negative_mean_is_0(images):
    clip = types.SimpleNamespace(cosines=lambda images, captions: np.full(len(images), -0.5))
    assert clip_score(image_files(images), CAPTIONS, clip) == 0
    clip.cosines = lambda images, captions: np.arange(len(images)) / 10
    assert clip_score(image_files(images), CAPTIONS, clip) == pytest.approx(20)


def test_bad_input(tmp_path, images, folder):
    with pytest.raises(UserError, match="5 images and 4 captions"):
        clip_score(image_files(images), CAPTIONS[:4], None)
    with pytest.raises(UserError, match="does not hold a CLIP model"):
        Clip(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="does not hold a CLIP model"):
        Clip(tmp_path)
