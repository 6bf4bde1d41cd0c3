"""Text encoders other than T5 as the network of a `TextEncoder`: transformers' classes, in PyTorch.

Encoders such as BERT and XLM-R, the text part of CLIP-like models, the encoder of other encoder-decoders, and
language models without their last layer (Gemma, as in Sana, arXiv 2410.10629) give one vector per token.

PyTorch is an extra, and imported only when such an encoder is used. It runs on one CUDA device if PyTorch has
one, otherwise on the CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pixart_jax.config import TextEncoderConfig
from pixart_jax.errors import UserError
from pixart_jax.readers import read_json
from pixart_jax.weights.files import COPY
from pixart_jax.weights.hub import local_folder

_FIELD = "features.text_encoder.weights"


class TorchNetwork:
    """A text encoder of transformers.

    Its features are the hidden states after the last block and, if the model has one, the last norm
    (`last_hidden_state`).

    Attributes:
      width: D.
      vocab_size: number of token ids.
      dtype: name of the compute dtype.
      batch_size: captions encoded at a time.
      bytes_per_device: memory of JAX's device that the weights take while they are loaded: 0 on a CPU.
      bytes_of_largest: 0, because no weights are quantized.
      host_bytes: memory of the host that the weights take while they are loaded, if they are not on a device.
      encoding_bytes: an estimate of the activations on JAX's device: 0 on a CPU.
    """

    bytes_of_largest = 0

    def __init__(self, config: TextEncoderConfig, text_length: int, batch_size: int):
        """Prepares the encoder; `load` reads its weights.

        Args:
          config: names the weights, a folder in HuggingFace's layout, and the compute dtype.
          text_length: S, the length of the longest rows.
          batch_size: captions encoded at a time.

        Raises:
          UserError: PyTorch is not installed; transformers cannot open the folder as a text encoder; it takes
            fewer than S tokens; or the weights are to be in int8.
        """
        try:
            import torch
        except ImportError:
            raise UserError(
                f"{_FIELD} is '{config.weights}', an encoder that needs PyTorch, which is not installed: pip "
                "install 'pixart_jax[torch]'."
            ) from None
        if config.weights_dtype != "auto":
            raise UserError(
                f"features.text_encoder.weights_dtype is '{config.weights_dtype}', which only T5 knows, and "
                f"'{config.weights}' is another encoder: set it to 'auto'."
            )
        self._name, self._folder = config.weights, local_folder(config.weights, _FIELD)
        self.dtype, self.batch_size, self._part = config.dtype, batch_size, None
        self._scale = np.float32(config.scale)
        with self._opening():
            kind, stated = _class_and_config(self._folder)
            # A model without memory tells its shapes.
            with torch.device("meta"):
                part = _text_part(kind.from_config(stated))
            self.width = part.config.get_text_config().hidden_size
            self.vocab_size = part.get_input_embeddings().num_embeddings
            limit = _positions(part)
        if limit is not None and text_length > limit:
            raise UserError(
                f"features.text_length is {text_length}, but the text encoder '{config.weights}' takes at "
                f"most {limit} tokens: set features.text_length and model.text_length to {limit} or less."
            )
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        count = sum(parameter.numel() for parameter in part.parameters())
        size = count * getattr(torch, self.dtype).itemsize
        shared = self._device.type == "cuda" and jax.default_backend() == "gpu"
        self.bytes_per_device, self.host_bytes = (size, 0) if shared else (0, size)
        # Per token, as float32: a feed-forward layer of 4 D twice, and a few arrays of D.
        self.encoding_bytes = 4 * 12 * batch_size * text_length * self.width if shared else 0

    def load(self) -> None:
        """Loads the weights, if they are not loaded yet.

        Raises:
          UserError: the weights cannot be found, or do not fit the config.
        """
        if self._part is not None:
            return
        import torch

        local_folder(self._name, _FIELD)
        with self._opening():
            kind, stated = _class_and_config(self._folder)
            model, found = kind.from_pretrained(
                self._folder,
                config=stated,
                dtype=getattr(torch, self.dtype),
                local_files_only=True,
                output_loading_info=True,
            )
            part = _text_part(model)
            # transformers gives random values to what a file lacks. Poolers have no effect on the features.
            used = {id(parameter) for parameter in part.parameters()}
            lacking = set(found["missing_keys"])
            lacking = sorted(
                name
                for name, parameter in model.named_parameters()
                if name in lacking and id(parameter) in used and "pooler" not in name
            )
            if lacking:
                raise ValueError(f"its weights lack {len(lacking)} tensors, for example {lacking[0]}")
            part = part.to(self._device).eval()
            # A try shows whether it runs on text alone, and what it returns.
            width = self._encode(part, np.zeros((1, 1), np.int32), np.ones((1, 1), bool)).shape[-1]
            if width != self.width:
                raise ValueError(f"its features have width {width}, but its config.json says {self.width}")
            self._part = part

    def release(self) -> None:
        """Frees the memory of the weights."""
        self._part = None
        if self._device.type == "cuda":
            import torch

            torch.cuda.empty_cache()

    def run(self, token_ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Encodes a batch.

        Args:
          token_ids: [batch_size, L] int32.
          mask: [batch_size, L] bool.

        Returns:
          [batch_size, L, D] float32, multiplied by the scale of the config.
        """
        self.load()
        return self._scale * self._encode(self._part, token_ids, mask)

    def _encode(self, part: Any, token_ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        import torch

        ids, valid = (torch.from_numpy(each).to(self._device, torch.long) for each in (token_ids, mask))
        with torch.inference_mode():
            return part(input_ids=ids, attention_mask=valid).last_hidden_state.float().cpu().numpy()

    @contextlib.contextmanager
    def _opening(self) -> Iterator[None]:
        """Silences transformers, and turns its errors into one line."""
        from transformers.utils import logging

        bar, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        try:
            yield
        # transformers and the readers of weights raise many kinds of errors; the fix is the same.
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{_FIELD} is '{self._name}', which transformers cannot open as a text encoder ({reason}): "
                "give the folder of a T5, or of an encoder of transformers."
            ) from None
        finally:
            logging.set_verbosity(level)
            if bar:
                logging.enable_progress_bar()


def _class_and_config(folder: Path) -> tuple[Any, Any]:
    """The class of transformers that opens a folder, without a decoder if there is such a class; its config.

    Only classes of transformers itself are used: code in the folder is never run, nor is the user asked.
    """
    import transformers

    name = read_json(folder / "config.json", COPY)["model_type"]
    if name not in transformers.CONFIG_MAPPING:
        raise ValueError(f"this version of transformers does not know model_type '{name}'")
    config = transformers.CONFIG_MAPPING[name].from_pretrained(folder, local_files_only=True)
    if hasattr(config, "auto_map"):
        del config.auto_map
    # A language model would keep the keys and values of all tokens.
    config.get_text_config().use_cache = False
    if name not in transformers.models.auto.modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES:
        return transformers.AutoModel, config
    config.is_encoder_decoder = False
    return transformers.AutoModelForTextEncoding, config


def _text_part(model: Any) -> Any:
    """The part of a model that reads text."""
    if getattr(model.config, "is_encoder_decoder", False):
        return model.get_encoder()
    # CLIP-like models have a `text_model`, language models that also see images a `language_model`.
    return getattr(model, "text_model", None) or getattr(model, "language_model", None) or model


def _positions(part: Any) -> int | None:
    """The largest number of tokens that a model takes; None if there is no limit."""
    import torch

    limit = getattr(part.config.get_text_config(), "max_position_embeddings", None)
    for name, module in part.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            # RoBERTa counts positions from the row after that of padding.
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            limit = module.num_embeddings - unused
    return limit
