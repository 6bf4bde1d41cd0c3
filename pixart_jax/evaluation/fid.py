"""Fréchet inception distance between two sets of images.

    FID = |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½)

with the means μ and covariances Σ of Inception-v3's 2048 pooled features (arXiv 1706.08500, section 3). The
network is inception-2015-12-05.pt, NVIDIA's TorchScript file of the original TensorFlow graph, which
clean-fid uses too. The file holds the weights and the computation, so that differing implementations of
Inception cannot change the result.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from pixart_jax.errors import UserError, system_reason
from pixart_jax.evaluation.protocol import Protocol
from pixart_jax.files import replacing, sha256_of_bytes, sha256_of_file
from pixart_jax.readers import read_arrays

INPUT_SIZE = 299
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}
# Fields of a protocol that determine the features of an image. Statistics with other values are not
# comparable.
_PREPARATION = ("crop", "size", "filter", "rounding", "resize", "network")


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean and covariance of the features of a set of images.

    Attributes:
      mean: [F] float64.
      covariance: [F, F] float64, the unbiased estimate (divided by n − 1).
      images: number of images n; 0 if the statistics file does not contain it.
      digest: sha256 over names and contents of the images, or of the statistics file.
    """

    mean: np.ndarray
    covariance: np.ndarray
    images: int
    digest: str


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """The FID of two sets of features, in float64.

    tr (Σ₁ Σ₂)^½ is computed as the sum of the square roots of the eigenvalues of Σ₁^½ Σ₂ Σ₁^½. That matrix is
    symmetric, so that the result is accurate even if Σ₁ Σ₂ is singular, as with fewer images than features.

    Raises:
      UserError: the two sets have different numbers of features.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"the statistics have {len(a.mean)} and {len(b.mean)} features: use those of the same network."
        )
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ b.covariance @ root)
    difference = a.mean - b.mean
    trace = np.trace(a.covariance) + np.trace(b.covariance)
    return float(difference @ difference + trace - 2 * np.sqrt(eigenvalues.clip(0)).sum())


# --- Images -----------------------------------------------------------------------------------------


def image_files(folder: str | Path) -> list[Path]:
    """The image files of a folder and its subfolders, sorted by name, without hidden ones.

    macOS writes a hidden file '._NAME' beside each file on some disks and in archives.

    Raises:
      UserError: there is no such folder, or it has no images.
    """
    root = Path(folder)
    files = sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )
    if not files:
        raise UserError(f"'{folder}' has no images: give a folder of {', '.join(IMAGE_SUFFIXES)} files.")
    return files


def prepare(image: Image.Image, protocol: Protocol) -> np.ndarray:
    """Crops and resizes an image according to the protocol.

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
    """Pillow's resize without rounding, which it only supports for single channels of floats."""
    channels = [
        np.asarray(Image.fromarray(np.ascontiguousarray(pixels[:, :, channel])).resize(size, filter))
        for channel in range(3)
    ]
    return np.stack(channels, axis=-1).clip(0, 255)


# --- Features ---------------------------------------------------------------------------------------


def _clean(pixels: np.ndarray, torch: ModuleType) -> Any:
    """The default of clean-fid: Pillow's bicubic with antialiasing, without rounding."""
    resized = _resize_float(pixels, (INPUT_SIZE, INPUT_SIZE), Image.Resampling.BICUBIC)
    return (_channels_first(resized, torch) - 128) / 128


def _pytorch(pixels: np.ndarray, torch: ModuleType) -> Any:
    """Like pytorch-fid and MLPerf: bilinear without antialiasing; 0..255 becomes −1..1."""
    resized = torch.nn.functional.interpolate(
        _channels_first(pixels, torch) / 255,
        size=(INPUT_SIZE, INPUT_SIZE),
        mode="bilinear",
        align_corners=False,
    )
    return 2 * resized - 1


def _tensorflow(pixels: np.ndarray, torch: ModuleType) -> Any:
    """Like the original graph: the network itself resizes, bilinear without antialiasing."""
    return _channels_first(pixels, torch)


def _channels_first(pixels: np.ndarray, torch: ModuleType) -> Any:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32))[None]


RESIZES: dict[str, Callable[[np.ndarray, ModuleType], Any]] = {
    "clean": _clean,
    "pytorch": _pytorch,
    "tensorflow": _tensorflow,
}


class Inception:
    """Inception-v3 as a TorchScript file.

    Attributes:
      digest: sha256 of the file.
    """

    def __init__(self, path: str | Path):
        """Loads the network, on a GPU if PyTorch has one.

        Raises:
          UserError: PyTorch is not installed, or the file is not this network.
        """
        self.torch = import_torch()
        self.digest = sha256_of_file(path)
        self.device = "cuda" if self.torch.cuda.is_available() else "cpu"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch deprecates TorchScript itself
                self._network = self.torch.jit.load(str(path), map_location=self.device).eval()
            self._layers = self._network.layers
        except (RuntimeError, AttributeError) as error:
            raise UserError(
                f"'{path}' is not inception-2015-12-05.pt ({str(error).splitlines()[0]}): give the "
                "TorchScript file that clean-fid uses."
            ) from error

    def features(self, images: Sequence[np.ndarray], resize: str) -> np.ndarray:
        """Features of images.

        Args:
          images: n arrays [H, W, 3] float32 in 0..255; sizes may differ.
          resize: how an image becomes the network's input, a key of `RESIZES`.

        Returns:
          [n, F] float64.
        """
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
    """Computes the statistics of the images of a folder.

    Args:
      folder: with at least two images.
      inception: the feature network.
      protocol: how images are prepared.
      batch_size: images at a time.

    Raises:
      UserError: the folder has fewer than two images, or an image cannot be read.
    """
    files = image_files(folder)
    if len(files) < 2:
        raise UserError(f"'{folder}' holds 1 image: a covariance needs at least two.")
    digest = hashlib.sha256()
    features = []
    for start in tqdm(range(0, len(files), batch_size), desc=f"features of {folder}", disable=None):
        images = []
        for file in files[start : start + batch_size]:
            data = file.read_bytes()
            # The name may have bytes that are not UTF-8.
            digest.update(os.fsencode(file.relative_to(folder)) + f" {sha256_of_bytes(data)}\n".encode())
            try:
                images.append(prepare(Image.open(io.BytesIO(data)), protocol))
            except OSError as error:
                raise UserError(
                    f"image '{file}' cannot be read ({system_reason(error)}): replace or remove it."
                ) from error
        features.append(inception.features(images, protocol.resize))
    values = np.concatenate(features)
    return Statistics(values.mean(axis=0), np.cov(values, rowvar=False), len(values), digest.hexdigest())


def write_statistics(path: str | Path, statistics: Statistics, protocol: Protocol) -> None:
    """Writes an .npz file with mu and sigma, as pytorch-fid and clean-fid read it, and the preparation."""
    preparation = {name: str(getattr(protocol, name)) for name in _PREPARATION}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file, mu=statistics.mean, sigma=statistics.covariance, images=statistics.images, **preparation
        )


def read_statistics(path: str | Path, protocol: Protocol) -> Statistics:
    """Reads an .npz file with mu and sigma.

    Raises:
      UserError: it cannot be read, or its images were prepared differently. Files from other projects do not
        contain their preparation, and are accepted.
    """
    fix = "give an .npz file with mu and sigma"
    values = read_arrays(path, ("mu", "sigma", "images?", *(f"{name}?" for name in _PREPARATION)), fix)
    mean, covariance = values["mu"], values["sigma"]
    for name, axes in (("mu", 1), ("sigma", 2)):
        value = values[name]
        if value.dtype.kind not in "fiu" or value.ndim != axes or not np.isfinite(value).all():
            raise UserError(
                f"'{path}': {name} is {value.dtype} {list(value.shape)}, and must be finite numbers with "
                f"{axes} axes: {fix}."
            )
    if covariance.shape != (len(mean), len(mean)):
        raise UserError(f"'{path}': mu is {list(mean.shape)}, and sigma {list(covariance.shape)}: {fix}.")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    images = values.get("images", np.int64(0))
    if images.dtype.kind not in "iu" or images.ndim:
        raise UserError(f"'{path}': images is {images.dtype} {list(images.shape)}, not a number: {fix}.")
    for name in _PREPARATION:
        ours = str(getattr(protocol, name))
        if name in values and str(values[name]) != ours:
            raise UserError(
                f"'{path}' was measured with {name} {values[name]}, not {ours}: measure the images again."
            )
    return Statistics(mean, covariance, int(images), sha256_of_file(path))


def reference_statistics(path: str | Path, inception: Inception, protocol: Protocol) -> Statistics:
    """The statistics of an .npz file, or of a folder of images.

    Raises:
      UserError: see `read_statistics` and `image_statistics`.
    """
    if Path(path).is_file():
        return read_statistics(path, protocol)
    return image_statistics(path, inception, protocol)


def import_torch() -> ModuleType:
    """Imports PyTorch, which is only installed with the extra 'eval'.

    Raises:
      UserError: it is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError("PyTorch is not installed: pip install 'pixart_jax[eval]'.") from error
    return torch
