"""Estimates of the memory of activations, in training and in sampling.

They count the largest arrays that are alive at the same time. Tests compare them with the compiler's plans.
Asking the compiler takes minutes for a large model.

Symbols: B images, N image tokens, S text tokens, D width, H heads, L blocks.
"""

from __future__ import annotations

from pixart_jax.models.layers import BackboneConfig
from pixart_jax.models.t5 import T5Config
from pixart_jax.models.vae import QUERY_CHUNK, VAEConfig

# Arrays [B, N, D] in the compute dtype that a block keeps for the backward pass, by `model.remat`. Without
# rematerialization XLA decides what it keeps, and the value is that of compiled programs
# (benchmarks/activation_memory.py). 'full' keeps only the input of the block, 'save_attention' also the
# outputs of self-attention and cross-attention, and 'dots' those of all products: query, key and value (3),
# the three projections after self-attention, before and after cross-attention (3), and the MLP (4 + 1).
KEPT = {"none": 23.0, "dots": 12.4, "save_attention": 3.0, "full": 1.0}
# Likewise, arrays that are alive while the gradient of one block is computed.
WORKING = 36.0


def training_bytes(
    model: BackboneConfig, latent: tuple[int, int], images: int, text_tokens: int = 0, ranks: int = 0
) -> int:
    """Returns the bytes of the activations at the end of the forward pass, on one device.

        (L k + w) B N D + L B S 2 D [+ L B N r]    values in the compute dtype

    k and w are `KEPT` and `WORKING`. Rematerialization with 'dots', and none, keep key and value of the text,
    and the inputs of the second products of adapters.

    Args:
      model: config of the network. It computes attention with a fused kernel, unless its choice is 'xla'.
      latent: height and width of the latent.
      images: number of images in a micro-batch.
      text_tokens: S.
      ranks: r, the sum of the ranks of all adapters in a block.
    """
    tokens = latent[0] * latent[1] // model.patch_size**2
    rows = images * tokens
    values = model.depth * KEPT[model.remat] * rows * model.hidden_size
    kept = model.remat in ("none", "dots")
    if kept:
        values += model.depth * (2 * images * text_tokens * model.hidden_size + rows * ranks)
    size = 4 if model.dtype == "float32" else 2
    logits = 0
    if model.attention_choice().of(tokens) == "xla":
        # Logits in float32 and probabilities, of one block or of all.
        logits = (4 + size) * model.num_heads * rows * (tokens + text_tokens)
        logits *= model.depth if model.remat == "none" else 1
    return int(values * size + logits) + working_bytes(model, latent, images)


def working_bytes(model: BackboneConfig, latent: tuple[int, int], images: int) -> int:
    """Returns the bytes of the activations that the gradient of one block needs; see `training_bytes`."""
    tokens = latent[0] * latent[1] // model.patch_size**2
    return int(WORKING * images * tokens * model.hidden_size * (4 if model.dtype == "float32" else 2))


def sampling_bytes(model: BackboneConfig, latent: tuple[int, int], images: int) -> int:
    """Returns the bytes of the activations of a block, on one device.

    These are the residual streams, and the largest of its MLP, its attention logits and its weights, counted
    in float32. A 16-bit model needs about two thirds of that, because its logits are also float32.

    Args:
      model: config of the network.
      latent: height and width of the latent.
      images: number of images in a batch. With guidance, the network gets twice as many.
    """
    tokens = latent[0] * latent[1] // model.patch_size**2
    rows = 2 * images * tokens
    mlp = 8 * rows * model.mlp_size
    # A fused kernel does not store the logits.
    logits = 8 * rows * tokens * model.num_heads if model.attention_choice().of(tokens) == "xla" else 0
    # Self-attention, cross-attention and MLP, in float32.
    weights = 4 * (8 * model.hidden_size**2 + 2 * model.hidden_size * model.mlp_size)
    return 28 * rows * model.hidden_size + max(mlp, logits, weights)


def encoding_bytes(t5: T5Config, captions: int, text_length: int) -> int:
    """Returns the activations of a feed-forward layer, and the weights of two blocks.

    One block is running while the weights of the next are gathered.

    Args:
      t5: config of the text encoder.
      captions: number of captions in a batch.
      text_length: tokens of a caption.
    """
    tokens = captions * text_length
    inner = t5.num_heads * t5.d_kv
    block = 4 * t5.d_model * inner + 3 * t5.d_model * t5.d_ff
    logits = tokens * text_length * t5.num_heads
    return 8 * (tokens * (2 * t5.d_ff + 2 * t5.d_model) + logits) + 2 * block * t5.compute_dtype.itemsize


def decoding_bytes(vae: VAEConfig, image: tuple[int, int], images: int, tile: int = 0) -> int:
    """Returns four arrays of the decoder's second level at full resolution, or the logits of its attention.

    Args:
      vae: config of the VAE.
      image: height and width of the image in pixels.
      images: number of images in a batch.
      tile: side of the tiles that are decoded one after the other; the image is then held three times more.
    """
    channels = vae.block_out_channels
    pixels, whole = image[0] * image[1], 0
    if tile and tile < max(image):
        pixels, whole = min(tile, image[0]) * min(tile, image[1]), 3 * 4 * 3 * pixels
    latents = pixels // vae.downsampling**2
    convolutions = 4 * 4 * pixels * channels[min(1, len(channels) - 1)]
    logits = 8 * min(latents, QUERY_CHUNK) * latents
    return (max(convolutions, logits) + whole) * images


def generation_peak(weights: int, text_encoder: int, encoding: int, after: int, keeps: bool) -> int:
    """Returns the peak of generating images, in bytes.

    Args:
      weights: of network and VAE.
      text_encoder: weights of the text encoder.
      encoding, after: activations while texts are encoded, and afterwards.
      keeps: whether the text encoder stays in memory afterwards.
    """
    return weights + max(text_encoder + encoding, (text_encoder if keeps else 0) + after)
