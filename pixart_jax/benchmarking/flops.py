"""Counts the floating-point operations (FLOPs) of a model from its shape.

Only matrix products count; a multiplication and an addition count as two operations. The count follows the
model's definition: no rematerialization, and all text positions including padding. It is the numerator of
"model TFLOP/s" and of the share of a peak. Elementwise operations, such as those that compress keys and
values, and recomputation are not included.

Symbols: N image tokens, M keys of self-attention (N unless they are compressed), S text tokens, D width,
F width of the MLP.
"""

from __future__ import annotations

import dataclasses
import math

from flax import nnx

from pixart_jax.config import FeaturesConfig, RoutingConfig, TrainConfig
from pixart_jax.denoiser import abstract_network
from pixart_jax.errors import UserError
from pixart_jax.models.adapters import is_adapter
from pixart_jax.models.compression import block_keys
from pixart_jax.models.configs import BackboneConfig
from pixart_jax.models.layers import TIMESTEP_FEATURES
from pixart_jax.models.projector import projector_products


@dataclasses.dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of a forward pass on one image, by part."""

    # Patch embedding, text projection, conditions and the last layer.
    embeddings: float
    # Projections and MLPs of all blocks.
    projections: float
    # Logits and weighted sums of self-attention and of cross-attention.
    self_attention: float
    cross_attention: float

    @property
    def total(self) -> float:
        return self.embeddings + self.projections + self.self_attention + self.cross_attention


def forward_flops(
    model: BackboneConfig,
    height: int,
    width: int,
    text_tokens: int | None = None,
    routing: RoutingConfig | None = None,
) -> ForwardFlops:
    """Counts the FLOPs of a forward pass on one image.

        PixArt block: 2 (6 D^2 + 2 D F) N + 4 D^2 S + 4 N M D + 4 N S D
        DiT block:    2 (4 D^2 + 2 D F) N + 12 D^2 + 4 N M D

    PixArt-XL/2 with 120 text tokens needs 0.298, 1.236 and 6.51 TFLOP at 256, 512 and 1024 px. PixArt-Σ needs
    52.4 at 2048 px, and 39.4 if 14 of its 28 blocks compress keys and values.

    Args:
      model: config of the model.
      height, width: size of the latent (an eighth of the image with the paper's VAE).
      text_tokens: S, by default `model.text_length`. Unused for a DiT.
      routing: token routing, which reduces N in the blocks that some tokens skip. None: no routing.

    Raises:
      UserError: if height or width is not a multiple of the patch size.
    """
    patch = model.patch_size
    if height % patch or width % patch:
        raise UserError(
            f"latents are {height}x{width}: height and width must be multiples of the patch size {patch}, "
            "because FLOPs are counted per token."
        )
    grid = model.grid(height, width)
    image = grid[0] * grid[1]
    # Number of image tokens in each block.
    tokens = [image] * model.depth
    if routing is not None and routing.rate:
        routed = range(routing.first_blocks, model.depth - routing.last_blocks)
        tokens = [routing.kept(image) if block in routed else image for block in range(model.depth)]
    # Routed blocks have fewer tokens, blocks that compress have fewer keys, and none does both.
    keys = map(min, tokens, block_keys(model, grid))
    dim, hidden = model.hidden_size, model.mlp_size
    embeddings = image * dim * patch**2 * (model.in_channels + model.out_channels)
    embeddings += TIMESTEP_FEATURES * dim + dim**2
    projections = sum(tokens) * (4 * dim**2 + 2 * dim * hidden)
    cross = 0
    if "text" in model.conditions:
        text = model.text_length if text_tokens is None else text_tokens
        embeddings += 6 * dim**2 + text * (model.text_dim * dim + dim**2)
        if model.size_conditions:
            embeddings += 3 * (TIMESTEP_FEATURES * dim // 3 + (dim // 3) ** 2)
        projections += sum(tokens) * 2 * dim**2 + model.depth * text * 2 * dim**2
        cross = 2 * sum(tokens) * text * dim
    else:
        embeddings += 2 * dim**2
        projections += model.depth * 6 * dim**2
    # The sums above count multiplications. The factor 2 adds one addition for each of them.
    return ForwardFlops(
        embeddings=2.0 * embeddings,
        projections=2.0 * projections,
        self_attention=2.0 * sum(2 * queries * count * dim for queries, count in zip(tokens, keys)),
        cross_attention=2.0 * cross,
    )


def train_flops(
    model: BackboneConfig,
    height: int,
    width: int,
    text_tokens: int | None = None,
    routing: RoutingConfig | None = None,
) -> float:
    """Counts the FLOPs to train on one image: three times a forward pass.

    The backward pass of a matrix product consists of two products of the same size. PixArt-XL/2 needs 0.894,
    3.708 and 19.53 TFLOP at 256, 512 and 1024 px. The arguments are those of `forward_flops`.
    """
    return 3.0 * forward_flops(model, height, width, text_tokens, routing).total


def latent_size(features: FeaturesConfig, height: int | None = None, width: int | None = None):
    """Returns (height, width) of the latent of an image.

    Args:
      features: config of the features.
      height, width: size of the image in pixels; by default `features.image_size`.

    Raises:
      UserError: if height or width is not a multiple of the downsampling factor.
    """
    factor = features.downsampling
    sides = tuple(side or features.image_size for side in (height, width))
    if any(side % factor for side in sides):
        raise UserError(f"an image of {sides[0]}x{sides[1]} px has no latent: choose multiples of {factor}.")
    return tuple(side // factor for side in sides)


def stage_flops(config: TrainConfig, height: int | None = None, width: int | None = None) -> float:
    """Counts the FLOPs to train a stage on one image, with its text length and token routing.

    With adapters, the gradients of the frozen kernels are not computed, which saves a third of the products
    with kernels:

        3 F - (F_embeddings + F_projections) + 3 F_adapters

    for a forward pass of F. PixArt-XL/2 at 512 px with adapters of rank 16 in attention and MLP needs 0.73 of
    full training (the compiler counts 0.72). The projector of objective 'alignment' counts like the network.

    Args:
      config: config of the stage. Pass `config.at_step(step)` for a step without routing or alignment.
      height, width: size of the image in pixels; by default `features.image_size`.

    Raises:
      UserError: if height or width is not a multiple of the downsampling factor times the patch size.
    """
    sides = latent_size(config.features, height, width)
    text = config.features.text_length
    whole = train_flops(config.model, *sides, text, config.token_routing)
    if config.objective == "alignment":
        whole += 3.0 * projector_flops(config, *sides)
    if not config.adapter:
        return whole
    forward = forward_flops(config.model, *sides, text, config.token_routing)
    return whole - forward.embeddings - forward.projections + 3.0 * adapter_flops(config, *sides)


def run_flops(config: TrainConfig) -> float:
    """Counts the FLOPs of all steps of a stage, with and without token routing or alignment."""
    phases = config.phases()
    ends = [*list(phases)[1:], config.steps]
    return config.data.batch_size * sum(
        (end - start) * stage_flops(phase) for (start, phase), end in zip(phases.items(), ends)
    )


def projector_flops(config: TrainConfig, height: int, width: int) -> float:
    """Counts the FLOPs of the projector of objective 'alignment' in a forward pass on one image.

        2 N (D P + P^2 + P E) for hidden layers of width P and features of width E

    Args:
      config: config of the stage.
      height, width: size of the latent.
    """
    rows, columns = config.model.grid(height, width)
    tokens, block = rows * columns, config.alignment.block
    routing = config.token_routing
    if routing.rate and routing.first_blocks < block <= config.model.depth - routing.last_blocks:
        tokens = routing.kept(tokens)
    alignment = config.alignment
    products = projector_products(config.model.hidden_size, alignment.width, alignment.target_width)
    return 2.0 * tokens * products


def adapter_flops(config: TrainConfig, height: int, width: int) -> float:
    """Counts the FLOPs of the adapters in a forward pass on one image, without token routing.

        2 n r (in + out) for an adapter of rank r whose layer has n inputs: image tokens, text tokens or one

    Args:
      config: config of the stage.
      height, width: size of the latent.
    """
    image = (height // config.model.patch_size) * (width // config.model.patch_size)
    _, state = abstract_network(config.model, config.adapter)
    count = 0
    for path, leaf in nnx.to_flat_state(state):
        if is_adapter(path) and path[-1] in ("down", "up"):
            of_text = path[0] == "text_proj" or "kv" in path
            of_image = path[0] in ("patch_embed", "blocks", "final_layer")
            inputs = config.features.text_length if of_text else image if of_image else 1
            count += 2 * inputs * math.prod(leaf.shape)
    return float(count)
