"""Image to image and inpainting: images and masks as the samplers take them.

Axes: H, W pixels as given, h, w, C latent.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from pixart_jax.data.images import Refused, decode_image, resize_and_crop, to_pixels
from pixart_jax.encoders.images import Codec
from pixart_jax.errors import UserError
from pixart_jax.pipeline.sizes import Size

# Default strength of image to image, as in diffusers.
IMAGE_STRENGTH = 0.8

ImageSource = np.ndarray | Image.Image | str | os.PathLike


def read_image(image: ImageSource) -> np.ndarray:
    """Reads an image.

    Args:
      image: a file, a PIL image, or uint8 [H, W, 3].

    Returns:
      uint8 [H, W, 3].

    Raises:
      UserError: neither an image nor such an array.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise UserError(f"image is {image.dtype} {list(image.shape)}: give uint8 [height, width, 3].")
        return image
    if not isinstance(image, Image.Image | str | os.PathLike):
        raise UserError(
            f"image is a {type(image).__name__}: give a file, a PIL image, or uint8 [height, width, 3]."
        )
    try:
        pixels = to_pixels(image) if isinstance(image, Image.Image) else decode_image(image)
    except Refused as error:
        name = "" if isinstance(image, Image.Image) else f" '{os.fspath(image)}'"
        raise UserError(f"image{name} cannot be read ({error.text}): give a PNG or JPEG.") from None
    if not pixels.size:
        raise UserError(f"image is {pixels.shape[1]}x{pixels.shape[0]} px: give one that has pixels.")
    return pixels


def read_mask(mask: ImageSource) -> np.ndarray:
    """Reads a mask.

    Args:
      mask: a file or a PIL image; or an array [H, W]: bool, uint8 (True from 128) or float (True from 0.5).

    Returns:
      bool [H, W], True where the image is regenerated.

    Raises:
      UserError: neither an image nor such an array.
    """
    if not isinstance(mask, np.ndarray):
        return read_image(mask).mean(axis=2) > 127.5
    if mask.ndim != 2 or not mask.size:
        raise UserError(f"mask is {list(mask.shape)}: give [height, width].")
    if mask.dtype.kind not in "biuf" or not np.isfinite(mask).all():
        raise UserError(f"mask is {mask.dtype}, or NaN or infinite somewhere: give numbers from 0 to 1.")
    return mask >= (0.5 if mask.dtype != np.uint8 else 128)


def default_strength(mask: object) -> float:
    """The default share of the steps that is run on an image, with or without a mask."""
    return IMAGE_STRENGTH if mask is None else 1.0


def clean_latents(image: ImageSource, height: int, width: int, codec: Codec, channels: int) -> np.ndarray:
    """Latents of an image that is resized and cropped to a size: the mean of the posterior.

    Args:
      image: as for `read_image`.
      height, width: pixels that the model generates.
      codec: codec of the pipeline.
      channels: C.

    Returns:
      [h, w, C] float32, unscaled.
    """
    pixels = resize_and_crop(read_image(image), height, width).pixels
    mean, std = codec.encode(pixels[None])
    if std is not None:
        return mean[0]
    # The pixel codec returns the pixels themselves.
    scaled = mean[0].astype(np.float32) / np.float32(127.5) - 1
    return scaled.mean(axis=2, keepdims=True) if channels == 1 else scaled


def latent_mask(mask: ImageSource, height: int, width: int, side: int) -> np.ndarray:
    """The mask of the latents.

    Args:
      mask: as for `read_mask`; it is resized and cropped as its image is.
      height, width: pixels that the model generates.
      side: the codec's downsampling factor, in pixels per latent.

    Returns:
      [h, w, 1] float32: 1 for a latent if any of its pixels is regenerated, so that the other latents contain
      no new pixel.
    """
    pixels = np.where(read_mask(mask), np.uint8(255), np.uint8(0))
    pixels = resize_and_crop(pixels[:, :, None].repeat(3, axis=2), height, width).pixels[:, :, 0] > 127
    cells = pixels.reshape(height // side, side, width // side, side)
    return cells.any(axis=(1, 3))[:, :, None].astype(np.float32)


def resize_back(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes images to the requested size, and crops them if the aspect ratio differs.

    Args:
      images: uint8 [N, H, W, 1 or 3].
      height, width: in pixels.

    Returns:
      uint8 [N, height, width, 1 or 3].
    """
    if images.shape[1:3] == (height, width):
        return images
    channels = images.shape[3]
    resized = np.empty((len(images), height, width, channels), np.uint8)
    for row, image in enumerate(images):
        rgb = image.repeat(3, axis=2) if channels == 1 else image
        resized[row] = resize_and_crop(rgb, height, width).pixels[:, :, :channels]
    return resized


def edited_rows(
    image: ImageSource | Sequence[ImageSource] | None,
    mask: ImageSource | Sequence[ImageSource] | None,
    count: int,
    size: Size,
    codec: Codec,
    channels: int,
) -> dict[str, np.ndarray]:
    """Clean latents and masks as a program takes them, a row for each prompt.

    Args:
      image, mask: one for all prompts, or a list with one for each; a mask only with an image.
      count: number of prompts.
      size: size of the images.
      codec, channels: codec and number of latent channels of the pipeline.

    Returns:
      'init' [count, h, w, C], unscaled clean latents, if there are images; 'mask' [count, h, w, 1], if there
      are masks.

    Raises:
      UserError: a mask of another size than its image, a wrong number of images or masks, or a file that
        cannot be read.
    """
    if image is None:
        return {}
    images = _one_each("image", image, count)
    sides = size.height, size.width
    # One image is often used for several prompts; it is encoded once.
    distinct = {_identity(each): each for each in images}
    clean = {key: clean_latents(each, *sides, codec, channels) for key, each in distinct.items()}
    out = {"init": np.stack([clean[_identity(each)] for each in images])}
    if mask is not None:
        masks = _one_each("mask", mask, count)
        for one, other in zip(images, masks):
            shapes = read_image(one).shape[:2], read_mask(other).shape
            if shapes[0] != shapes[1]:
                raise UserError(
                    f"mask is {list(shapes[1])} and its image {list(shapes[0])}: give both the same size."
                )
        out["mask"] = np.stack([latent_mask(each, *sides, codec.downsampling) for each in masks])
    return out


def _identity(image: ImageSource) -> object:
    return os.fspath(image) if isinstance(image, str | os.PathLike) else id(image)


def _one_each(name: str, given: Any, count: int) -> list[Any]:
    if not isinstance(given, list | tuple):
        return [given] * count
    if len(given) != count:
        raise UserError(f"{name} has {len(given)} entries for {count} prompts: give 1 or {count}.")
    return list(given)
