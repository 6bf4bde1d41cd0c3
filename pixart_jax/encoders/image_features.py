"""From images to the features of an image encoder, one vector per token, for objective 'alignment'.

The encoder is a folder that transformers opens: DINOv2, DINOv3, SigLIP, CLIP, ViT and others with a grid of
patches. It runs in PyTorch, on CUDA if there is a GPU that PyTorch can use, else on the CPU.

Axes: n images; H, W rows and columns in pixels; N tokens; E width of the encoder.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from pixart_jax.errors import UserError
from pixart_jax.hub import local
from pixart_jax.readers import read_json

# Mean and standard deviation of ImageNet's colours: those of DINOv2, and of encoders that state none.
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Likewise for images with another number of channels.
OTHER = (0.5,), (0.5,)
_NUMBERS = [float]


class ImageEncoder:
    """An image encoder whose patches are the tokens of the network.

    Attributes:
      width: E.
      dtype: how features are stored.
    """

    dtype = ml_dtypes.bfloat16

    def __init__(self, folder: str, channels: int, batch_size: int):
        """Loads the encoder.

        Args:
          folder: a folder, also of the hub, with config.json and weights; preprocessor_config.json, if there
            is one, gives the normalization.
          channels: number of channels of the images. Grey images are repeated for an encoder of three.
          batch_size: images that are encoded at a time.

        Raises:
          UserError: a package is missing, the folder holds no image encoder, or its tokens are not a grid of
            patches.
        """
        self._folder, self._batch_size = str(local(folder)), batch_size
        self._torch, self._model, config = _load(self._folder)
        self._channels = getattr(config, "num_channels", 3)
        if channels not in (1, self._channels):
            raise self._error(f"takes images with {self._channels} channels, and these have {channels}")
        patch = config.patch_size
        rows, columns = patch if isinstance(patch, list | tuple) else (patch, patch)
        if rows != columns:
            raise self._error(f"has patches of {rows}x{columns} pixels, which are not square")
        self._patch = rows
        self._scale, self._mean, self._std = self._normalization()
        parameters = inspect.signature(self._model.forward).parameters
        name = "interpolate_pos_encoding"
        self._options = {name: True} if name in parameters else {}
        self._prefix, self.width = self._probe()

    def encode(self, images: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """Encodes images of one size.

        The images are normalized, then resized to `grid` patches (bicubic, as in the code of REPA). Batches
        are filled up, so that the features of an image hardly depend on the others.

        Args:
          images: uint8 [n, H, W, C].
          grid: rows and columns of tokens.

        Returns:
          bfloat16 [n, N, E], the tokens row by row, without class and register tokens.
        """
        out = []
        for start in range(0, len(images), self._batch_size):
            rows = np.minimum(np.arange(start, start + self._batch_size), len(images) - 1)
            tokens = self._run(images[rows], grid)[: len(images) - start, self._prefix :]
            out.append(tokens.astype(self.dtype))
        return np.concatenate(out)

    def _run(self, images: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """Returns all tokens of the encoder, float32."""
        torch = self._torch
        device = next(self._model.parameters()).device
        with torch.inference_mode():
            x = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float()
            x = (x.expand(-1, self._channels, -1, -1) * self._scale - self._column(self._mean, x)) / (
                self._column(self._std, x)
            )
            size = tuple(side * self._patch for side in grid)
            x = torch.nn.functional.interpolate(x, size, mode="bicubic")
            tokens = self._model(pixel_values=x, **self._options).last_hidden_state
            return tokens.float().cpu().numpy()

    def _column(self, values: tuple[float, ...], like: Any) -> Any:
        return self._torch.tensor(values, device=like.device).reshape(1, -1, 1, 1)

    def _normalization(self) -> tuple[float, tuple[float, ...], tuple[float, ...]]:
        """Returns the factor of the pixels 0 .. 255, and mean and standard deviation of the channels."""
        mean, std = IMAGENET if self._channels == 3 else OTHER
        path = Path(self._folder) / "preprocessor_config.json"
        if not path.is_file():
            return 1 / 255, mean, std
        shape = {"image_mean?": _NUMBERS, "image_std?": _NUMBERS, "rescale_factor?": float}
        shape |= {"do_normalize?": bool, "do_rescale?": bool}
        given = read_json(path, "restore it, or remove it for the normalization of ImageNet", shape)
        mean, std = tuple(given.get("image_mean", mean)), tuple(given.get("image_std", std))
        if not given.get("do_normalize", True):
            mean, std = (0.0,), (1.0,)
        if not {len(mean), len(std)} <= {1, self._channels} or min(std) <= 0:
            raise self._error(
                f"has image_mean {list(mean)} and image_std {list(std)} in {path.name}, and {self._channels} "
                "channels"
            )
        return given.get("rescale_factor", 1 / 255) if given.get("do_rescale", True) else 1.0, mean, std

    def _probe(self) -> tuple[int, int]:
        """Returns the number of tokens before those of the patches, and E, from two grids of patches."""
        counts, width = [], 0
        for grid in ((2, 3), (3, 4)):
            blank = np.zeros((1, *grid, self._channels), np.uint8)
            try:
                tokens = self._run(blank, grid)
            # An encoder that takes only images of its own size; transformers raises several kinds of errors.
            except (ValueError, RuntimeError, AttributeError, TypeError, KeyError) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                raise self._error(
                    f"does not encode images of {grid[0]}x{grid[1]} patches ({reason})"
                ) from None
            if tokens.ndim != 3:
                raise self._error(f"returns an array of shape {list(tokens.shape)} instead of tokens")
            counts.append(tokens.shape[1] - grid[0] * grid[1])
            width = tokens.shape[2]
        if counts[0] != counts[1] or counts[0] < 0:
            raise self._error("does not return one vector for each patch of an image")
        return counts[0], width

    def _error(self, fault: str) -> UserError:
        return UserError(
            f"features.image_encoder '{self._folder}' {fault}: give another image encoder, such as DINOv2."
        )


def _load(folder: str) -> tuple[Any, Any, Any]:
    """Opens the vision model in a folder: torch, the model, and the config of the model."""
    if not os.path.isdir(folder):
        raise UserError(
            f"features.image_encoder '{folder}' is no folder: give the folder with its config.json and "
            "weights, or hub:OWNER/NAME, which is downloaded."
        )
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f"features.image_encoder needs the package '{error.name}', which is not installed: pip install "
            "'pixart_jax[torch]'."
        ) from None
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it reports layers for classification, which are not used
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        vision = getattr(config, "vision_config", config)
        if not hasattr(vision, "patch_size"):
            raise ValueError(f"a model of type '{config.model_type}' has no patches")
        model = transformers.AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    # The file formats and their optional packages raise many kinds of errors; the fix is the same.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"features.image_encoder '{folder}' cannot be opened ({reason}): give a folder with an image "
            "encoder, such as DINOv2, that transformers opens."
        ) from None
    finally:
        transformers.logging.set_verbosity(level)
    # CLIP and SigLIP come with a text encoder.
    model = getattr(model, "vision_model", model)
    return torch, model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), vision
