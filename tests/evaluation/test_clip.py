import types

import numpy as np
import pytest
from feature_networks import save_clip, torch
from PIL import Image
from torchmetrics.multimodal import CLIPScore

from pixart_jax.errors import UserError
from pixart_jax.evaluation.clip import Clip, clip_score, images_of_captions
from pixart_jax.evaluation.fid import image_files
from pixart_jax.evaluation.generation import Captions, PlannedImage, generate_images
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


def _empty_files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_captions_without_names_follow_the_numbers(tmp_path):
    numbers = [f"{number}.png" for number in range(12)]
    # macOS writes the hidden file.
    folder = _empty_files(tmp_path, *numbers, "._0.png", ".cache/0.png")
    captions = Captions([f"caption {number}" for number in range(12)], None)
    assert [file.name for file in images_of_captions(folder, captions)] == numbers
    assert [file.name for file in images_of_captions(folder, captions, samples=3)] == numbers[:3]
    with pytest.raises(UserError, match="12 images and 11 captions"):
        images_of_captions(folder, Captions(captions.texts[:11], None))
    # One of the images is missing, and any of the first captions could be its own.
    (folder / "1.png").unlink()
    with pytest.raises(UserError, match="11 images and 12 captions"):
        images_of_captions(folder, captions, samples=3)


@pytest.mark.parametrize("names", [("cat.png", "dog.png"), ("1.png", "01.png"), ("a/1.png", "b/2.png")])
def test_an_order_that_numbers_do_not_decide_is_an_error(tmp_path, names):
    with pytest.raises(UserError, match="whose order no number decides"):
        images_of_captions(_empty_files(tmp_path, *names), Captions(["x", "y"], None))


@pytest.mark.parametrize("names", [("b/2.png", "a/1.png"), ("b/2", "a/1"), ("2.png", "1.png"), ("2", "1")])
def test_captions_with_names(tmp_path, names):
    folder = _empty_files(tmp_path, "a/1.png", "b/2.png")
    found = images_of_captions(folder, Captions(["x", "y"], list(names)))
    assert found == [tmp_path / "b/2.png", tmp_path / "a/1.png"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["1", "3"], "caption of '3' has 0 images"),
        (["1", "2"], "caption of '2' has 2 images"),
        (["a/1.png"], "3 images, and the captions name 1 of them"),
        (["a/1", "a/1", "b/2"], "3 images, and the captions name 2 of them in 3 entries"),
    ],
)
def test_names_that_do_not_fit(tmp_path, names, message):
    folder = _empty_files(tmp_path, "a/1.png", "a/2.png", "b/2.png")
    with pytest.raises(UserError, match=message):
        images_of_captions(folder, Captions(["x"] * len(names), names))


def test_generated_images_follow_their_plan(tmp_path):
    """The names in the caption file are not those of the generated images."""
    planned = [PlannedImage(f"{name}.png", caption, 0) for name, caption in (("b", "x"), ("a", "y"))]
    pipe = lambda prompts, **options: np.zeros((2, 4, 4, 3), np.uint8)  # noqa: E731
    generate_images(pipe, planned, tmp_path, {}, arguments={})
    captions = Captions(["x", "y"], ["one", "two"])
    found = images_of_captions(tmp_path / "images", captions)
    assert [file.name for file in found] == ["b.png", "a.png"]
    with pytest.raises(UserError, match="generated from other captions"):
        images_of_captions(tmp_path / "images", Captions(["y", "x"], None))


def test_bad_input(tmp_path, folder):
    with pytest.raises(UserError, match="does not hold a CLIP model"):
        Clip(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="does not hold a CLIP model"):
        Clip(tmp_path)
