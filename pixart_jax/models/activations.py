"""Estimates of the memory of activations, in training and in sampling.

They count the largest arrays that are alive at the same time. Tests compare them with the compiler's plans.
Asking the compiler takes minutes for a large model.

Symbols: B images, N image tokens, M keys of self-attention where they are compressed, S text tokens, D width,
H heads, L blocks, C blocks that compress keys and values.
"""

from __future__ import annotations

from pixart_jax.models.compression import block_keys
from pixart_jax.models.configs import BackboneConfig
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

        (L k + w) B N D + L B S 2 D [+ L B N r] [+ C B M 2 D] [+ L B N 2 D]    values in the compute dtype

    k and w are `KEPT` and `WORKING`. Rematerialization with 'dots', and none, keep key and value of the text,
    the inputs of the second products of adapters, the compressed keys and values (beside those that they are
    made of, with 'conv', or instead of them), and with normalization also the queries and keys before it.

    Args:
      model: config of the network. It computes attention with a fused kernel, unless its choice is 'xla'.
      latent: height and width of the latent.
      images: number of images in a micro-batch.
      text_tokens: S.
      ranks: r, the sum of the ranks of all adapters in a block.
    """
    grid = model.grid(*latent)
    tokens, keys = grid[0] * grid[1], block_keys(model, grid)
    rows = images * tokens
    values = model.depth * KEPT[model.remat] * rows * model.hidden_size
    kept = model.remat in ("none", "dots")
    if kept:
        values += model.depth * (2 * images * text_tokens * model.hidden_size + rows * ranks)
        # The gradient of a convolution also needs what it is computed from.
        dropped = 0 if model.kv_compression == "conv" else tokens
        compressed = sum(keys[block] - dropped for block in model.compressed_layers)
        values += 2 * images * compressed * model.hidden_size
        if model.qk_norm:
            values += model.depth * 2 * rows * model.hidden_size
    size = 4 if model.dtype == "float32" else 2
    # Logits in float32 and probabilities, of one block or of all.
    logits = [
        (4 + size) * model.num_heads * rows * (count + text_tokens)
        for count in keys
        if model.attention_choice().of(count) == "xla"
    ]
    logits_bytes = sum(logits) if model.remat == "none" else max(logits, default=0)
    return int(values * size + logits_bytes) + working_bytes(model, latent, images)


def working_bytes(model: BackboneConfig, latent: tuple[int, int], images: int) -> int:
    """Returns the bytes of the activations that the gradient of one block needs; see `training_bytes`."""
    tokens = latent[0] * latent[1] // model.patch_size**2
    return int(WORKING * images * tokens * model.hidden_size * (4 if model.dtype == "float32" else 2))


def projector_bytes(model: BackboneConfig, latent: tuple[int, int], images: int, width: int, out: int) -> int:
    """Returns the bytes that the projector of objective 'alignment' keeps for the backward pass.

    These are its two hidden layers before and after the activation, in the compute dtype, and the normalized
    features in float32.

    Args:
      model: config of the network.
      latent: height and width of the latent.
      images: number of images in a micro-batch.
      width, out: widths of the hidden layers and of the features.
    """
    rows, columns = model.grid(*latent)
    return images * rows * columns * (4 * width * (4 if model.dtype == "float32" else 2) + 4 * 3 * out)


def sampling_bytes(model: BackboneConfig, latent: tuple[int, int], images: int) -> int:
    """Returns the bytes of the activations of a block, on one device.

    These are the residual streams, and the largest of its MLP, its attention logits and its weights, counted
    in float32. A 16-bit model needs about two thirds of that, because its logits are also float32.

    Args:
      model: config of the network.
      latent: height and width of the latent.
      images: number of images in a batch. With guidance, the network gets twice as many.
    """
    grid = model.grid(*latent)
    rows = 2 * images * grid[0] * grid[1]
    mlp = 8 * rows * model.mlp_size
    # A fused kernel does not store the logits.
    choice = model.attention_choice()
    keys = max((count for count in block_keys(model, grid) if choice.of(count) == "xla"), default=0)
    logits = 8 * rows * keys * model.num_heads
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
