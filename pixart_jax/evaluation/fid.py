"""Fréchet inception distance between two sets of images.

    FID = |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½)

of means and covariances of Inception-v3's 2048 pooled features (arXiv 1706.08500, section 3). The network is
inception-2015-12-05.pt, NVIDIA's TorchScript file of the original TensorFlow graph, which clean-fid uses:
weights and computation in one file, so that no other definition of it can slip in.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from pixart_jax.errors import UserError
from pixart_jax.evaluation.protocol import Protocol
from pixart_jax.files import sha256_of_bytes, sha256_of_file

INPUT_SIZE = 299
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}
# Fields of a protocol that say how an image becomes features: statistics of others do not compare.
_PREPARATION = ("crop", "size", "filter", "rounding", "resize", "network")


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Gaussian of a set of features.

    Attributes:
      mean: [F].
      covariance: [F, F], of a sample (divided by n − 1).
      images: how many; 0 where the file does not tell.
      digest: sha256 of the images with their names, or of the statistics file.
    """

    mean: np.ndarray
    covariance: np.ndarray
    images: int
    digest: str


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """FID of two Gaussians, in float64.

    tr (Σ₁ Σ₂)^½ is the sum of the roots of the eigenvalues of Σ₁^½ Σ₂ Σ₁^½, which is symmetric: exact where
    Σ₁ Σ₂ is singular, as it is with fewer images than features.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"statistics have {len(a.mean)} and {len(b.mean)} features: take those of one network."
        )
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ b.covariance @ root)
    difference = a.mean - b.mean
    trace = np.trace(a.covariance) + np.trace(b.covariance)
    return float(difference @ difference + trace - 2 * np.sqrt(eigenvalues.clip(0)).sum())


# --- Images -----------------------------------------------------------------------------------------


def image_files(folder: str | Path) -> list[Path]:
    """The images of a folder and its subfolders, by name.

    Raises:
      UserError: no folder, or none in it.
    """
    root = Path(folder)
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise UserError(f"'{folder}' is no folder of images ({', '.join(IMAGE_SUFFIXES)}).")
    return files


def prepare(image: Image.Image, protocol: Protocol) -> np.ndarray:
    """Crops and resizes as the protocol says.

    Returns:
      [H, W, 3] float32 in 0..255.
    """
    image = image.convert("RGB")
    if protocol.crop == "centre":
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    if protocol.size is None:
        return np.asarray(image, np.float32)
    size = (protocol.size, protocol.size)
    if protocol.rounding:
        return np.asarray(image.resize(size, FILTERS[protocol.filter]), np.float32)
    return _resize_float(np.asarray(image, np.float32), size, FILTERS[protocol.filter])


def _resize_float(pixels: np.ndarray, size: tuple[int, int], filter: Image.Resampling) -> np.ndarray:
    """Pillow's resize without rounding: one channel at a time, as floats."""
    channels = [
        np.asarray(Image.fromarray(np.ascontiguousarray(pixels[:, :, channel])).resize(size, filter))
        for channel in range(3)
    ]
    return np.stack(channels, axis=-1).clip(0, 255)


# --- Features ---------------------------------------------------------------------------------------


def _clean(pixels: np.ndarray, torch: ModuleType) -> Any:
    """clean-fid's default: Pillow's antialiased bicubic, without rounding."""
    resized = _resize_float(pixels, (INPUT_SIZE, INPUT_SIZE), Image.Resampling.BICUBIC)
    return (_channels_first(resized, torch) - 128) / 128


def _pytorch(pixels: np.ndarray, torch: ModuleType) -> Any:
    """pytorch-fid's, and MLPerf's: bilinear without antialiasing, 0..255 to −1..1."""
    resized = torch.nn.functional.interpolate(
        _channels_first(pixels, torch) / 255,
        size=(INPUT_SIZE, INPUT_SIZE),
        mode="bilinear",
        align_corners=False,
    )
    return 2 * resized - 1


def _tensorflow(pixels: np.ndarray, torch: ModuleType) -> Any:
    """The original graph's own, within the network: bilinear without antialiasing."""
    return _channels_first(pixels, torch)


def _channels_first(pixels: np.ndarray, torch: ModuleType) -> Any:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32))[None]


RESIZES: dict[str, Callable[[np.ndarray, ModuleType], Any]] = {
    "clean": _clean,
    "pytorch": _pytorch,
    "tensorflow": _tensorflow,
}


class Inception:
    """The feature network of a TorchScript file.

    Attributes:
      digest: sha256 of the file.
    """

    def __init__(self, path: str | Path):
        """Loads it, onto a GPU if PyTorch has one.

        Raises:
          UserError: PyTorch is not installed, or the file is not such a network.
        """
        self.torch = import_torch()
        self.digest = sha256_of_file(path)
        self.device = "cuda" if self.torch.cuda.is_available() else "cpu"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript as a whole
                self._network = self.torch.jit.load(str(path), map_location=self.device).eval()
            self._layers = self._network.layers
        except (RuntimeError, AttributeError) as error:
            raise UserError(
                f"'{path}' is not inception-2015-12-05.pt, the TorchScript file that clean-fid uses: "
                f"{str(error).splitlines()[0]}"
            ) from error

    def features(self, images: Sequence[np.ndarray], resize: str) -> np.ndarray:
        """[H, W, 3] float32 images in 0..255, of any sizes -> [n, F] float64."""
        torch = self.torch
        inputs = [RESIZES[resize](image, torch) for image in images]
        out = []
        with torch.inference_mode():
            for _, group in itertools.groupby(inputs, lambda tensor: tensor.shape):
                batch = torch.cat(list(group)).to(self.device)
                if resize == "tensorflow":
                    result = self._network(batch, return_features=True)
                else:
                    result = self._layers(batch)
                out.append(result.reshape(len(batch), -1).double().cpu().numpy())
        return np.concatenate(out)


def image_statistics(
    folder: str | Path, inception: Inception, protocol: Protocol, *, batch_size: int = 32
) -> Statistics:
    """Statistics of the images of a folder.

    Raises:
      UserError: no images, fewer than two, or one that cannot be read.
    """
    files = image_files(folder)
    if len(files) < 2:
        raise UserError(f"'{folder}' holds 1 image: a covariance takes two or more.")
    digest = hashlib.sha256()
    features = []
    for start in tqdm(range(0, len(files), batch_size), desc=f"features of {folder}", disable=None):
        images = []
        for file in files[start : start + batch_size]:
            data = file.read_bytes()
            name = file.relative_to(folder).as_posix()
            digest.update(f"{name} {sha256_of_bytes(data)}\n".encode())
            try:
                images.append(prepare(Image.open(io.BytesIO(data)), protocol))
            except OSError as error:
                raise UserError(f"image '{file}' cannot be read: {error}.") from error
        features.append(inception.features(images, protocol.resize))
    values = np.concatenate(features)
    return Statistics(values.mean(axis=0), np.cov(values, rowvar=False), len(values), digest.hexdigest())


def write_statistics(path: str | Path, statistics: Statistics, protocol: Protocol) -> None:
    """Writes a .npz with mu and sigma, as pytorch-fid and clean-fid read it, and how they were measured."""
    told = {name: str(getattr(protocol, name)) for name in _PREPARATION}
    with Path(path).open("wb") as file:
        np.savez(file, mu=statistics.mean, sigma=statistics.covariance, images=statistics.images, **told)


def read_statistics(path: str | Path, protocol: Protocol) -> Statistics:
    """Reads a .npz with mu and sigma.

    Raises:
      UserError: it cannot be read, or tells that its images were prepared in another way.
    """
    try:
        with np.load(path) as file:
            values = dict(file)
        mean, covariance = values["mu"].astype(np.float64), values["sigma"].astype(np.float64)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"'{path}' is no .npz file with mu and sigma: {error}.") from error
    for name in _PREPARATION:
        ours = str(getattr(protocol, name))
        if name in values and str(values[name]) != ours:
            raise UserError(
                f"'{path}' was measured with {name} {values[name]}, not {ours}: measure it again."
            )
    return Statistics(mean, covariance, int(values.get("images", 0)), sha256_of_file(path))


def reference_statistics(path: str | Path, inception: Inception, protocol: Protocol) -> Statistics:
    """Of a .npz file, or of a folder of images.

    Raises:
      UserError: see `read_statistics` and `image_statistics`.
    """
    if Path(path).is_file():
        return read_statistics(path, protocol)
    return image_statistics(path, inception, protocol)


def import_torch() -> ModuleType:
    """PyTorch, which only the extra 'eval' installs."""
    try:
        import torch
    except ImportError as error:
        raise UserError("PyTorch is not installed: pip install 'pixart_jax[eval]'.") from error
    return torch
