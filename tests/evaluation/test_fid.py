import dataclasses
import io
import itertools
import sys

import numpy as np
import pytest
from feature_networks import FEATURES, save_inception, torch
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images
from torchmetrics.image.fid import FrechetInceptionDistance

from pixart_jax.errors import UserError
from pixart_jax.evaluation.fid import (
    RESIZES,
    Inception,
    Statistics,
    frechet_distance,
    image_files,
    image_statistics,
    prepare,
    read_statistics,
    reference_statistics,
    write_statistics,
)
from pixart_jax.evaluation.protocol import Protocol
from pixart_jax.files import sha256_of_file

PROTOCOL = Protocol("fid", 0)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return save_inception(tmp_path_factory.mktemp("inception") / "inception.pt")


@pytest.fixture(scope="module")
def inception(network):
    return Inception(network)


@pytest.fixture(scope="module")
def crops():
    """32 crops of two photographs, 72 x 64 pixels."""
    rng = np.random.default_rng(0)
    photos = load_sample_images().images
    out = []
    for number in range(32):
        photo = photos[number % 2]
        top, left = (rng.integers(0, side - 72) for side in photo.shape[:2])
        out.append(Image.fromarray(photo[top : top + 64, left : left + 72]))
    return out


def save(folder, images):
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        image.save(folder / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, crops):
    root = tmp_path_factory.mktemp("images")
    return save(root / "a", crops[:24]), save(root / "b", crops[16:])


def fid(a, b, inception, protocol=PROTOCOL):
    return frechet_distance(
        image_statistics(a, inception, protocol), image_statistics(b, inception, protocol)
    )


class Preprocessed(torch.nn.Module):
    """Applies clean-fid's resize, one channel at a time, before the network; used with torchmetrics."""

    num_features = FEATURES

    def __init__(self, network):
        super().__init__()
        self.network = torch.jit.load(str(network))

    def forward(self, images):
        inputs = []
        for image in images.numpy():
            channels = [
                np.asarray(Image.fromarray(plane.astype(np.float32), "F").resize((299, 299), Image.BICUBIC))
                for plane in image
            ]
            inputs.append(torch.tensor(np.stack(channels).clip(0, 255)))
        return self.network.layers((torch.stack(inputs) - 128) / 128).flatten(1)


def test_fid_of_two_folders_is_that_of_torchmetrics(folders, network, inception):
    metric = FrechetInceptionDistance(feature=Preprocessed(network))
    for folder, real in zip(folders, (True, False)):
        images = [np.asarray(Image.open(file)) for file in sorted(folder.iterdir())]
        metric.update(torch.tensor(np.stack(images)).permute(0, 3, 1, 2), real=real)
    expected = float(metric.compute())
    assert expected > 1
    assert fid(*folders, inception) == pytest.approx(expected, rel=0, abs=1e-3)


def test_distance_is_the_formula_with_the_matrix_root(inception):
    """pytorch-fid and clean-fid compute it like this, for invertible covariances."""
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(1)
    sets = [rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)) + rng.normal(size=6) for _ in range(2)]
    a, b = (Statistics(s.mean(0), np.cov(s, rowvar=False), 200, "") for s in sets)
    root = sqrtm(a.covariance @ b.covariance).real
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    # If only the means differ, the distance is the squared length of their difference.
    shifted = dataclasses.replace(a, mean=a.mean + 2)
    assert frechet_distance(a, shifted) == pytest.approx(24, rel=1e-9)
    with pytest.raises(UserError, match="6 and 5 features"):
        frechet_distance(a, Statistics(a.mean[:5], a.covariance[:5, :5], 200, ""))


@pytest.mark.parametrize("resize", RESIZES)
def test_a_set_is_at_distance_0_from_itself(folders, inception, resize):
    protocol = dataclasses.replace(PROTOCOL, resize=resize)
    scale = np.trace(image_statistics(folders[0], inception, protocol).covariance)
    # This also holds with fewer images than features, where the covariance is singular.
    assert abs(fid(folders[0], folders[0], inception, protocol)) < 1e-6 * scale
    few = folders[0].parent / "few"
    if not few.exists():
        save(few, [Image.open(file) for file in image_files(folders[0])[:6]])
    assert abs(fid(few, few, inception, protocol)) < 1e-5 * scale


def jpeg(image, quality):
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return Image.open(data)


def noisy(image, deviation):
    noise = np.random.default_rng(np.asarray(image).sum()).normal(size=(*image.size[::-1], 3))
    return Image.fromarray((np.asarray(image) + deviation * noise).round().clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("harm", "amounts"),
    [
        (lambda image, radius: image.filter(ImageFilter.GaussianBlur(radius)), (0.5, 1, 2, 4)),
        (noisy, (8, 16, 32, 64)),
        (jpeg, (80, 40, 20, 5)),
    ],
    ids=["blur", "noise", "jpeg"],
)
def test_fid_grows_with_harm(tmp_path, folders, inception, harm, amounts):
    clean = [Image.open(file) for file in image_files(folders[0])]
    reference = image_statistics(folders[0], inception, PROTOCOL)
    distances = [0.0]
    for amount in amounts:
        folder = save(tmp_path / str(amount), [harm(image, amount) for image in clean])
        distances.append(frechet_distance(image_statistics(folder, inception, PROTOCOL), reference))
    assert all(later > 1.2 * earlier for earlier, later in itertools.pairwise(distances)), distances


def test_resizes_are_those_of_the_libraries():
    """'pytorch' is ToTensor, interpolate, 2x - 1, as in pytorch-fid. 'clean' is smoother: it antialiases."""
    pixels = np.random.default_rng(0).integers(0, 256, (600, 500, 3)).astype(np.float32)
    tensor = torch.tensor(pixels).permute(2, 0, 1)[None]
    expected = 2 * torch.nn.functional.interpolate(tensor / 255, (299, 299), mode="bilinear") - 1
    ours = RESIZES["pytorch"](pixels, torch)
    torch.testing.assert_close(ours, expected)
    clean = RESIZES["clean"](pixels, torch)
    assert clean.shape == ours.shape and float(clean.std()) < 0.7 * float(ours.std())
    assert RESIZES["tensorflow"](pixels, torch).shape == (1, 3, 600, 500)


def test_preparation():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    whole = prepare(image, PROTOCOL)
    np.testing.assert_array_equal(whole, np.asarray(image))
    cropped = prepare(image, dataclasses.replace(PROTOCOL, crop="centre"))
    np.testing.assert_array_equal(cropped, whole[:, 10:50])
    protocol = dataclasses.replace(PROTOCOL, crop="centre", size=16, filter="lanczos")
    rounded = prepare(image, protocol)
    exact = prepare(image, dataclasses.replace(protocol, rounding=False))
    assert rounded.shape == exact.shape == (16, 16, 3) and exact.dtype == np.float32
    assert np.array_equal(rounded, rounded.round()) and not np.array_equal(exact, exact.round())
    assert np.abs(rounded - exact).mean() < 0.5
    other = prepare(image, dataclasses.replace(protocol, filter="box"))
    assert np.abs(rounded - other).max() > 2
    assert prepare(image.convert("L"), PROTOCOL).shape == (40, 60, 3)


def test_statistics_are_stored_with_their_preparation(tmp_path, folders, inception):
    protocol = dataclasses.replace(PROTOCOL, network=inception.digest)
    statistics = image_statistics(folders[0], inception, protocol)
    write_statistics(tmp_path / "a.npz", statistics, protocol)
    read = reference_statistics(tmp_path / "a.npz", inception, protocol)
    np.testing.assert_array_equal(read.covariance, statistics.covariance)
    assert read.images == 24 and read.digest == sha256_of_file(tmp_path / "a.npz")
    with pytest.raises(UserError, match="measured with resize clean, not pytorch"):
        read_statistics(tmp_path / "a.npz", dataclasses.replace(protocol, resize="pytorch"))
    # Files written by other programs contain only the statistics, so their preparation cannot be checked.
    np.savez(tmp_path / "b.npz", mu=statistics.mean, sigma=statistics.covariance)
    assert frechet_distance(read_statistics(tmp_path / "b.npz", protocol), statistics) < 1e-6
    np.savez(tmp_path / "c.npz", mu=statistics.mean)
    for name in ("c.npz", "none.npz"):
        with pytest.raises(UserError, match=r"give an \.npz file with mu and sigma"):
            read_statistics(tmp_path / name, protocol)


def test_images_and_batches(tmp_path, folders, inception):
    """The digest depends on names and bytes, not on the batch size. Images may have different sizes."""
    one, many = (image_statistics(folders[0], inception, PROTOCOL, batch_size=size) for size in (7, 24))
    np.testing.assert_allclose(one.covariance, many.covariance, rtol=1e-4, atol=1e-9)
    assert one.digest == many.digest != image_statistics(folders[1], inception, PROTOCOL).digest
    mixed = save(
        tmp_path / "x",
        [Image.new("RGB", (20, 30), "red"), Image.new("RGB", (40, 10)), Image.new("L", (9, 9))],
    )
    for resize in RESIZES:
        assert image_statistics(mixed, inception, dataclasses.replace(PROTOCOL, resize=resize)).images == 3
    Image.new("RGB", (9, 9)).save(mixed / "not UTF-8 \udcff.png")
    assert image_statistics(mixed, inception, PROTOCOL).images == 4


def test_without_pytorch(network, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="PyTorch is not installed: pip install"):
        Inception(network)


def test_bad_input(tmp_path, inception, network):
    save(tmp_path / "one", [Image.new("RGB", (20, 30))])
    with pytest.raises(UserError, match="holds 1 image"):
        image_statistics(tmp_path / "one", inception, PROTOCOL)
    (tmp_path / "one" / "x.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"image '.*x.png' cannot be read"):
        image_statistics(tmp_path / "one", inception, PROTOCOL)
    with pytest.raises(UserError, match="has no images"):
        image_files(tmp_path / "none")
    (tmp_path / "x.pt").write_bytes(b"no network")
    with pytest.raises(UserError, match="is not inception-2015-12-05"):
        Inception(tmp_path / "x.pt")
    with pytest.raises(UserError, match="cannot be read"):
        Inception(tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(2)}, "it has no sigma"),
        ({"mu": np.zeros(2), "sigma": np.zeros((3, 3))}, r"mu is \[2\], and sigma \[3, 3\]"),
        ({"mu": np.float64(0), "sigma": np.zeros((1, 1))}, r"mu is float64 \[\], and must be finite"),
        ({"mu": np.zeros(1), "sigma": np.full((1, 1), np.nan)}, "sigma is .* must be finite"),
        ({"mu": np.array(["x"]), "sigma": np.zeros((1, 1))}, "mu is <U1"),
        ({"mu": np.array([{}]), "sigma": np.zeros((1, 1))}, "mu.npy holds Python objects"),
        ({"mu": np.zeros(1), "sigma": np.zeros((1, 1)), "images": np.zeros(2)}, "images is float64"),
    ],
)
def test_statistics_of_another_kind(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=rf"x.npz'.*{message}.*: give an .npz file with mu and sigma"):
        read_statistics(tmp_path / "x.npz", PROTOCOL)
