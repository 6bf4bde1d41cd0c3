"""Images to start from and masks to redraw by, as the samplers take them.

Axes: H, W pixels as given, h, w, C latent.
"""

from __future__ import annotations

import os

import numpy as np

from pixart_jax.data.images import Refused, decode_image, resize_and_crop
from pixart_jax.encoders import Codec
from pixart_jax.errors import UserError

# Strength where an image is given and no mask: diffusers' default.
IMAGE_STRENGTH = 0.8

ImageSource = np.ndarray | str | os.PathLike


def read_image(image: ImageSource) -> np.ndarray:
    """uint8 [H, W, 3] of a file, or of an array uint8 [H, W, 3].

    Raises:
      UserError: neither an image file nor such an array.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise UserError(f"image is {image.dtype} {list(image.shape)}: give uint8 [height, width, 3].")
        return image
    try:
        return decode_image(image)
    except Refused as error:
        raise UserError(
            f"image '{os.fspath(image)}' cannot be read ({error.text}): give a PNG or JPEG."
        ) from None


def read_mask(mask: ImageSource) -> np.ndarray:
    """bool [H, W], True where the image is redrawn.

    Args:
      mask: a file, light where the image is redrawn; or an array [H, W]: bool, uint8 (from 128 on redrawn) or
        float (from 0.5 on).

    Raises:
      UserError: neither.
    """
    if not isinstance(mask, np.ndarray):
        return read_image(mask).mean(axis=2) > 127.5
    if mask.ndim != 2 or not mask.size:
        raise UserError(f"mask is {list(mask.shape)}: give [height, width].")
    return mask >= (0.5 if mask.dtype != np.uint8 else 128)


def default_strength(image: object, mask: object) -> float:
    """The part of the steps that is run, where it is not told."""
    return IMAGE_STRENGTH if image is not None and mask is None else 1.0


def clean_latents(image: ImageSource, height: int, width: int, codec: Codec, channels: int) -> np.ndarray:
    """Latents of an image, resized and cropped to a size: the posterior mean.

    Args:
      image: as `read_image`.
      height, width: in pixels, that the model draws.
      codec: of the pipeline.
      channels: C.

    Returns:
      [h, w, C] float32, unscaled.
    """
    pixels = resize_and_crop(read_image(image), height, width).pixels
    mean, std = codec.encode(pixels[None])
    if std is not None:
        return mean[0]
    # The codec of pixels hands them through.
    scaled = mean[0].astype(np.float32) / np.float32(127.5) - 1
    return scaled.mean(axis=2, keepdims=True) if channels == 1 else scaled


def latent_mask(mask: ImageSource, height: int, width: int, side: int) -> np.ndarray:
    """[h, w, 1] float32, 1 for a latent of which any pixel is redrawn, so that what stays has no new pixel.

    Args:
      mask: as `read_mask`, resized and cropped as the image is.
      height, width: in pixels, that the model draws.
      side: pixels per latent.
    """
    pixels = np.where(read_mask(mask), np.uint8(255), np.uint8(0))
    pixels = resize_and_crop(pixels[:, :, None].repeat(3, axis=2), height, width).pixels[:, :, 0] > 127
    cells = pixels.reshape(height // side, side, width // side, side)
    return cells.any(axis=(1, 3))[:, :, None].astype(np.float32)


def resize_back(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [N, H, W, 1 or 3] -> [N, height, width, 1 or 3], the centre where the aspect differs."""
    if images.shape[1:3] == (height, width):
        return images
    channels = images.shape[3]
    rgb = images.repeat(3, axis=3) if channels == 1 else images
    return np.stack([resize_and_crop(image, height, width).pixels[:, :, :channels] for image in rgb])
