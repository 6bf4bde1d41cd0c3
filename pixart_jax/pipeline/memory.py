"""Computes how much memory generation needs on each device, before it starts.

The memory of the weights is exact. That of the activations is estimated from the largest arrays that are
alive at the same time; a test compares the estimates with the compiler's. Asking the compiler would take
minutes for a large model.
"""

from __future__ import annotations

import dataclasses
import os

import jax

from pixart_jax.data.buckets import SIZES
from pixart_jax.encoders.images import VAECodec
from pixart_jax.encoders.text import TextEncoder
from pixart_jax.errors import UserError
from pixart_jax.models.pixart import PixArtConfig
from pixart_jax.models.vae import QUERY_CHUNK
from pixart_jax.pipeline.pipeline import Pipeline
from pixart_jax.pipeline.sizes import Size

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes on one device.

    `encoding`, `sampling` and `decoding` are activations. They are never alive at the same time, because
    texts are encoded before latents are sampled, and latents are sampled before they are decoded.
    """

    backbone: int
    text_encoder: int
    vae: int
    encoding: int
    sampling: int
    decoding: int
    # Whether the text encoder stays in memory while latents are sampled.
    keeps_text_encoder: bool
    # Memory of the device; None if it is not known.
    limit: int | None

    @property
    def peak(self) -> int:
        text = self.backbone + self.vae + self.text_encoder + self.encoding
        kept = self.text_encoder if self.keeps_text_encoder else 0
        return max(text, self.backbone + self.vae + kept + max(self.sampling, self.decoding))

    def __str__(self) -> str:
        freed = "" if self.keeps_text_encoder else ", freed before sampling"
        rows = [
            ("backbone", self.backbone, ""),
            (f"text encoder{freed}", self.text_encoder, ""),
            ("VAE", self.vae, ""),
            ("encoding texts", self.encoding, ", estimated"),
            ("sampling", self.sampling, ", estimated"),
            ("decoding", self.decoding, ", estimated"),
            ("peak", self.peak, "" if self.limit is None else f" of {_gib(self.limit)}"),
        ]
        return "\n".join(f"  {name:<38}{_gib(size)}{note}" for name, size, note in rows if size)


def plan_memory(pipe: Pipeline, size: Size, images: int, *, encode: bool = True) -> Plan:
    """The memory that a pipeline needs.

    Args:
      pipe: the pipeline.
      size: size of the images.
      images: number of images in a device's batch.
      encode: whether the text encoder is used. Its weights are loaded when it encodes the first text.
    """
    model = pipe.model.config
    latent = size.height // pipe.codec.downsampling, size.width // pipe.codec.downsampling
    vae, decoding = 0, 0
    if isinstance(pipe.codec, VAECodec):
        vae, decoding = pipe.codec.bytes_per_device, decoding_bytes(pipe.codec, size)
    encoder = pipe.text_encoder if encode else None
    return Plan(
        backbone=_bytes(pipe.generator.params),
        text_encoder=0 if encoder is None else encoder.bytes_per_device,
        vae=vae,
        encoding=0 if encoder is None else encoding_bytes(encoder),
        sampling=sampling_bytes(model, latent, images),
        decoding=decoding,
        keeps_text_encoder=pipe.keep_text_encoder,
        limit=device_memory(pipe.generator.devices[0]),
    )


def check_memory(pipe: Pipeline, size: Size, images: int, *, encode: bool = True) -> Plan:
    """Checks that the device has enough memory for `plan_memory`, and returns the plan.

    Raises:
      UserError: the device has too little memory. The message says what would fit.
    """
    plan = plan_memory(pipe, size, images, encode=encode)
    if plan.limit is None or plan.peak <= plan.limit:
        return plan

    def fits(size: Size, images: int) -> bool:
        return plan_memory(pipe, size, images, encode=encode).peak <= plan.limit

    fewer = next((n for n in range(images - 1, 0, -1) if fits(size, n)), None)
    squares = (Size(side, side, side, side) for side in reversed(SIZES) if side < max(size[:2]))
    smaller = next((square for square in squares if fits(square, 1)), None)
    if fewer:
        advice = f"batch_size {fewer} fits"
    elif smaller:
        advice = f"batch_size 1 at {smaller.height}x{smaller.width} px fits (with binning off)"
    else:
        advice = "the weights alone are too large: use more devices, or a text_dtype of 16 bits"
    need, have = _gib(plan.peak).strip(), _gib(plan.limit).strip()
    raise UserError(
        f"batch_size {images} at {size.height}x{size.width} px needs {need} on each device, which has "
        f"{have}: {advice}."
    )


def device_memory(device: jax.Device) -> int | None:
    """Bytes that this process may use on a device, or None if that is not known.

    On a CPU: the memory of the machine, divided by the number of simulated devices.
    """
    if device.platform == "cpu":
        try:
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return None
        return total // len(jax.local_devices())
    return (device.memory_stats() or {}).get("bytes_limit")


def encoding_bytes(encoder: TextEncoder) -> int:
    """Activations of a feed-forward layer, and the weights of two blocks: one running, one being gathered."""
    t5 = encoder.t5
    tokens = encoder.rows_per_device * encoder.text_length
    inner = t5.num_heads * t5.d_kv
    block = 4 * t5.d_model * inner + 3 * t5.d_model * t5.d_ff
    logits = tokens * encoder.text_length * t5.num_heads
    return 8 * (tokens * (2 * t5.d_ff + 2 * t5.d_model) + logits) + 2 * block * t5.compute_dtype.itemsize


def sampling_bytes(model: PixArtConfig, latent: tuple[int, int], images: int) -> int:
    """The residual streams of a block, and the largest of its MLP, its attention logits and its weights.

    Counted in float32. A 16-bit model needs about two thirds of that, because its logits are also float32.
    """
    tokens = latent[0] * latent[1] // model.patch_size**2
    rows = 2 * images * tokens  # twice, for guidance
    mlp = 8 * rows * model.mlp_size
    # A fused kernel does not store the logits.
    logits = 8 * rows * tokens * model.num_heads if model.attention_choice().of(tokens) == "xla" else 0
    # Self-attention, cross-attention and MLP, in float32.
    weights = 4 * (8 * model.hidden_size**2 + 2 * model.hidden_size * model.mlp_size)
    return 28 * rows * model.hidden_size + max(mlp, logits, weights)


def decoding_bytes(codec: VAECodec, size: Size) -> int:
    """Four arrays of the decoder's second level at full resolution, or the logits of its attention."""
    channels = codec.config.block_out_channels
    pixels = size.height * size.width
    latents = pixels // codec.config.downsampling**2
    convolutions = 4 * 4 * pixels * channels[min(1, len(channels) - 1)]
    logits = 8 * min(latents, QUERY_CHUNK) * latents
    return max(convolutions, logits) * codec.images_per_device


def _bytes(params: object) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def _gib(size: int) -> str:
    return f"{size / GIB:8.2f} GiB"
