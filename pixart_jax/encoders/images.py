"""From images to latents and back: with a VAE, or with the pixels themselves as latents.

The VAE runs on all local devices, with the batch sharded over them.

Axes: n images; H, W rows and columns in pixels; h, w, C rows, columns and channels of the latents.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx

from pixart_jax.config import FeaturesConfig
from pixart_jax.constants import IMAGE_BATCH
from pixart_jax.encoders.batches import local_sharding, round_up
from pixart_jax.errors import UserError
from pixart_jax.models.vae import VAEConfig, abstract_vae
from pixart_jax.readers import read_json
from pixart_jax.weights.files import COPY, open_tensors
from pixart_jax.weights.hub import local_folder
from pixart_jax.weights.tables import import_tensors
from pixart_jax.weights.vae import vae_table


class Codec(Protocol):
    """Converts images to latents and back.

    Attributes:
      latent_scale: the scaling factor. The diffusion model sees `latent_scale` times the codec's latents.
      downsampling: pixels per latent position, along a side.
    """

    latent_scale: float
    downsampling: int

    def latent_shape(self, height: int, width: int, channels: int) -> tuple[int, int, int]:
        """(h, w, C) of the latents of an image of height x width pixels with `channels` colour channels."""

    def encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Encodes images, uint8 [n, H, W, channels].

        Returns:
          mean and standard deviation of the posterior, [n, h, w, C] float32, unscaled; for a codec without a
          posterior, the pixels unchanged and None.
        """

    def decode(self, latents: np.ndarray, tile: int = 0) -> np.ndarray:
        """Unscaled latents [n, h, w, C] -> uint8 [n, H, W, channels].

        Args:
          latents: see above.
          tile: side in pixels of the tiles that a VAE decodes one after the other, see `VAE.decode_tiled`; 0
            for the whole image at once.
        """


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Maps [-1, 1] to 0 .. 255: clips, then rounds.

    Raises:
      UserError: an image has values that are NaN or infinite, which would become black.
    """
    bad = [row for row, image in enumerate(images) if not np.isfinite(image).all()]
    if bad:
        raise UserError(
            f"{len(bad)} of {len(images)} decoded images have values that are NaN or infinite: the weights "
            "or the latents are damaged."
        )
    return np.rint((np.asarray(images, np.float32).clip(-1, 1) + 1) * 127.5).astype(np.uint8)


class PixelCodec:
    """Uses the pixels themselves as latents: x / 127.5 - 1 for a value x of 0 .. 255."""

    downsampling = 1

    def __init__(self, latent_scale: float = 1.0):
        self.latent_scale = latent_scale

    def latent_shape(self, height: int, width: int, channels: int) -> tuple[int, int, int]:
        return height, width, channels

    def encode(self, images: np.ndarray) -> tuple[np.ndarray, None]:
        return images, None

    def decode(self, latents: np.ndarray, tile: int = 0) -> np.ndarray:
        return to_uint8(latents)


class VAECodec:
    """The VAE of Stable Diffusion or SDXL, on all local devices.

    Attributes:
      config: the VAE's config.
      images_per_device: images that one device encodes or decodes at a time.
      bytes_per_device: size of the weights on one device.
    """

    def __init__(self, folder: str, latent_scale: float, batch_size: int = IMAGE_BATCH):
        """Loads the weights.

        Args:
          folder: a folder in diffusers' layout, or a name on the HuggingFace hub.
          latent_scale: see `Codec`.
          batch_size: images at a time, rounded up to a multiple of the number of local devices.

        Raises:
          UserError: the VAE cannot be found, or is not one that this project supports.
        """
        self.latent_scale = latent_scale
        vae, params = load_vae(local_folder(folder, "features.vae"))
        self.downsampling, self._channels = vae.downsampling, vae.latent_channels
        self._rows, replicated = local_sharding()
        self._batch_size = round_up(batch_size, self._rows.mesh.size)
        self.config = vae
        self.images_per_device = self._batch_size // self._rows.mesh.size
        self.bytes_per_device = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        self._params = jax.device_put(params, replicated)
        graph = nnx.graphdef(abstract_vae(vae))
        jit = functools.partial(jax.jit, in_shardings=(replicated, self._rows), out_shardings=self._rows)
        self._encode = jit(lambda params, x: nnx.merge(graph, params).encode(x))
        self._decode = jit(lambda params, z: nnx.merge(graph, params).decode(z))

        @functools.cache
        def decode_tiled(tile: int) -> Callable[[Any, jax.Array], jax.Array]:
            side = tile // self.downsampling
            return jit(lambda params, z: nnx.merge(graph, params).decode_tiled(z, side, side // 4))

        self._decode_tiled = decode_tiled

    def latent_shape(self, height: int, width: int, channels: int) -> tuple[int, int, int]:
        if channels != 3:
            raise UserError(
                f"features.codec is 'vae' and the images have {channels} channels, but a VAE takes 3: choose "
                "features.codec='pixels'."
            )
        return height // self.downsampling, width // self.downsampling, self._channels

    def encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scaled = np.asarray(images, np.float32) / np.float32(127.5) - 1
        mean, std = self._batched(self._encode, scaled)
        return mean, std

    def decode(self, latents: np.ndarray, tile: int = 0) -> np.ndarray:
        decode = self._decode_tiled(tile) if tile else self._decode
        return to_uint8(self._batched(decode, np.asarray(latents, np.float32)))

    def _batched(self, function: Callable[[Any, jax.Array], Any], values: np.ndarray) -> Any:
        """Applies a function to batches of equal size. The last one is padded with copies of its last row."""
        out = []
        for start in range(0, len(values), self._batch_size):
            rows = np.minimum(np.arange(start, start + self._batch_size), len(values) - 1)
            result = function(self._params, jax.device_put(values[rows], self._rows))
            kept = len(values) - start
            out.append(jax.tree.map(lambda leaf, kept=kept: np.asarray(leaf)[:kept], result))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *out)


def load_vae(folder: Path) -> tuple[VAEConfig, Any]:
    """The config of a VAE and its float32 parameters, from a folder in diffusers' layout.

    Raises:
      UserError: the folder does not hold a complete AutoencoderKL, or latents of this one are shifted.
    """
    vae = VAEConfig.from_hf(read_json(folder / "config.json", COPY))
    if vae.shift_factor:
        raise UserError(
            f"'{folder}' has shift_factor {vae.shift_factor}, and latents are only scaled here, not shifted: "
            "give the VAE of PixArt, Stable Diffusion 1.x or SDXL."
        )
    return vae, import_tensors(vae_table(vae), open_tensors(folder))


def make_codec(config: FeaturesConfig, batch_size: int = IMAGE_BATCH) -> Codec:
    """Makes the codec of a config.

    Args:
      config: its `codec` is 'vae' or 'pixels'.
      batch_size: images that a VAE encodes or decodes at a time.

    Raises:
      UserError: see `VAECodec`.
    """
    if config.codec == "pixels":
        return PixelCodec(config.latent_scale)
    return VAECodec(config.vae, config.latent_scale, batch_size)
