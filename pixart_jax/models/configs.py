"""The configs of the networks and of their adapters. Nothing here needs JAX, so that commands can print their
help, read configs and report invalid values without loading it.

A config builds its network with `make`, which imports the module of the network.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import re
from typing import TYPE_CHECKING, ClassVar

from pixart_jax.constants import LARGEST_SIDE, LARGEST_WIDTH
from pixart_jax.errors import UserError, did_you_mean, short
from pixart_jax.flags import check_fields, flag

if TYPE_CHECKING:
    import jax.numpy as jnp
    from flax import nnx

    from pixart_jax.models.attention import Choice
    from pixart_jax.models.dit import DiT
    from pixart_jax.models.pixart import PixArt

SIZES = {
    "XL/2": dict(depth=28, hidden_size=1152, num_heads=16, patch_size=2),
    "L/2": dict(depth=24, hidden_size=1024, num_heads=16, patch_size=2),
    "B/2": dict(depth=12, hidden_size=768, num_heads=12, patch_size=2),
    "S/2": dict(depth=12, hidden_size=384, num_heads=6, patch_size=2),
}
# Largest number of blocks.
MOST_BLOCKS = 1000
# Compute dtypes of networks. float16 is for sampling only: training would exceed its range, 6e-8 to 65504.
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
# How the weights of a network for sampling are kept, and those of a text encoder ('auto': in its compute
# dtype).
WEIGHTS_DTYPES = ("float32", "int8")
TEXT_WEIGHTS_DTYPES = ("auto", "int8")
# Values of `model.attention`. `attention.choose_implementation` resolves 'auto' to one of the others.
ATTENTION_IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash")
# Rematerialization policies, which `layers.py` defines.
REMAT_POLICIES = ("none", "full", "dots", "save_attention")
# How r x r tokens become one, with the names in the official code.
OFFICIAL_MODES = {
    "conv": "conv",
    "nearest": "ave",
    "uniform": "uniform",
    "uniform_every": "uniform_every",
}
COMPRESSION_MODES = ("none", *OFFICIAL_MODES)

# --- Networks -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class BackboneConfig(abc.ABC):
    """Fields that the configs of PixArt and DiT share.

    `size` selects a published shape; with 'custom', the four fields below it give the shape. Each subclass
    declares what the rest of the project needs to know about its network: `kind`, `untrained`, `conditions`
    and `make`.
    """

    # Name of the network in configs and checkpoints.
    kind: ClassVar[str]
    # Paths of the parameters that are stored with the weights but never trained.
    untrained: ClassVar[tuple[str, ...]] = ()
    # What only some networks have: normalized queries and keys, and compressed keys and values, with the
    # numbers of the blocks that compress them.
    qk_norm: ClassVar[bool] = False
    kv_compression: ClassVar[str] = "none"
    compressed_layers: ClassVar[tuple[int, ...]] = ()

    size: str = flag("XL/2", "'XL/2', 'L/2', 'B/2', 'S/2' or 'custom'.", choices=(*SIZES, "custom"))
    # For these four fields, 0 means the value of `size` (of XL/2 if 'custom').
    depth: int = flag(0, "Number of blocks. 0: as model.size says.", minimum=0, maximum=MOST_BLOCKS)
    hidden_size: int = flag(
        0, "Width D of the token stream. 0: as model.size says.", minimum=0, maximum=LARGEST_WIDTH
    )
    num_heads: int = flag(
        0,
        "Attention heads H; D / H is the head width. 0: as model.size says.",
        minimum=0,
        maximum=LARGEST_WIDTH,
    )
    patch_size: int = flag(
        0, "Side length of a patch, in latent pixels. 0: as model.size says.", minimum=0, maximum=256
    )
    mlp_ratio: float = flag(
        4.0, "Width of the hidden layer of the MLP, as a multiple of D.", above=0, maximum=1000
    )
    in_channels: int = flag(4, "Channels of the latent.", minimum=1, maximum=1024)
    learn_sigma: bool = flag(
        True, "Predict the variance as well: the output has twice as many channels as the latent."
    )
    base_size: int = flag(
        16,
        "Side length of the training grid in tokens. At position_scale 1, positions are 0 to base_size - 1.",
        minimum=1,
        maximum=LARGEST_SIDE,
    )
    position_scale: float = flag(
        1.0,
        "Divisor of the positions ('lewei_scale' of PixArt-α, 'pe_interpolation' of PixArt-Σ).",
        above=0,
        maximum=LARGEST_SIDE,
    )
    mup_base_width: int = flag(
        0,
        "Width at which the learning rate was tuned, for muP: initial values, learning rates and the output "
        "are scaled so that it fits this width too (docs/own-images.md); 0 for no muP. PixArt-alpha: 288.",
        minimum=0,
        maximum=LARGEST_WIDTH,
    )
    dtype: str = flag(
        "float32",
        "Compute dtype of the blocks: 'float32', 'bfloat16' or, for sampling only, 'float16'.",
        choices=COMPUTE_DTYPES,
    )
    remat: str = flag(
        "none",
        "What the backward pass recomputes to save memory: 'none', 'dots' (all but the outputs of linear "
        "layers and of attention), 'save_attention' (all but the outputs of attention), 'full' (everything).",
        choices=REMAT_POLICIES,
    )
    scan_layers: bool | None = flag(
        None,
        "Run the blocks with lax.scan, so that a block is compiled once, or unrolled, which is faster on "
        "GPUs and CPUs. None: unrolled in training on GPUs, otherwise with lax.scan.",
    )
    # Only the name is checked, because a config must open on any machine. Whether this machine can run the
    # implementation is checked when the network is built.
    attention: str = flag(
        "auto",
        "'auto' (the fastest that this backend supports), 'xla', 'cudnn' (NVIDIA GPUs) or 'splash' (TPUs).",
        choices=ATTENTION_IMPLEMENTATIONS,
    )

    def __post_init__(self):
        check_fields(self, "model.")
        for name, value in SIZES.get(self.size, SIZES["XL/2"]).items():
            given = getattr(self, name)
            if given == 0:
                object.__setattr__(self, name, value)
            elif given != value and self.size != "custom":
                raise UserError(
                    f"model.{name} is {given}, but the size {self.size} has {value}: leave it out, or set "
                    "model.size to 'custom'."
                )
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"model.hidden_size {self.hidden_size} does not divide into model.num_heads "
                f"{self.num_heads}: choose a number of heads that divides the width."
            )
        if self.hidden_size % 4:
            raise UserError(
                f"model.hidden_size is {self.hidden_size}: the 2-D sine positions need a multiple of 4."
            )
        if self.mlp_size < 1:
            raise UserError(f"model.mlp_ratio is {self.mlp_ratio}: it leaves no hidden layer in the MLP.")
        if self.mup_base_width:
            check_mup(self.mup_base_width, self.hidden_size, self.head_dim)

    @property
    @abc.abstractmethod
    def conditions(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """The inputs of the network other than latents and timesteps, in the order of its arguments.

        Returns:
          The shape of one row and the dtype of each array, by its name in a batch. The dtype 'float' means
          the dtype in which the features are stored.
        """

    @abc.abstractmethod
    def make(self, *, rngs: nnx.Rngs) -> nnx.Module:
        """Builds the network with random initial weights."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns the rows and columns of image tokens of a latent of `height` x `width` positions."""
        return height // self.patch_size, width // self.patch_size

    def check_size(self, height: int, width: int) -> None:  # noqa: B027 - most networks take any
        """Raises a `UserError` if the network does not take latents of `height` x `width` positions."""

    def attention_choice(self) -> Choice:
        """Resolves `attention` for this backend.

        Raises:
          UserError: if this backend does not support the implementation or the dtype.
        """
        from pixart_jax.models.attention import choose_implementation

        return choose_implementation(self.attention, dtype=self.dtype, head_dim=self.head_dim)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def compute_dtype(self) -> jnp.dtype:
        import jax.numpy as jnp

        return jnp.dtype(self.dtype)


# Path of the features of the null caption, a parameter that is stored with the weights but never trained.
NULL_TEXT = "null_text"


@dataclasses.dataclass(frozen=True)
class PixArtConfig(BackboneConfig):
    """A text-conditional PixArt."""

    kind: ClassVar[str] = "pixart"
    untrained: ClassVar[tuple[str, ...]] = (NULL_TEXT,)

    text_dim: int = flag(4096, "Width of the text features (T5-XXL: 4096).", minimum=1, maximum=LARGEST_WIDTH)
    text_length: int = flag(
        120,
        "Maximum number of text tokens of a caption; the null caption has this many.",
        minimum=1,
        maximum=LARGEST_WIDTH,
    )
    size_conditions: bool = flag(
        False, "Condition on the original image size and the aspect ratio (micro-conditions of 'PixArtMS')."
    )
    qk_norm: bool = flag(False, "Normalize queries and keys of self-attention (LayerNorm; PixArt-Σ).")
    kv_compression: str = flag(
        "none",
        "How self-attention merges neighbouring keys and values (PixArt-Σ): 'none', 'conv' (a convolution "
        "that starts as their average), 'nearest' (keeps one of them; 'ave' in the official code), 'uniform' "
        "(the same, for grids that the factor divides), 'uniform_every' (every second one of the sequence).",
        choices=COMPRESSION_MODES,
    )
    kv_compression_layers: str = flag(
        "",
        "Blocks whose keys and values are compressed, such as '14-27' or '0,2,14-27'. '': the second half.",
    )
    kv_compression_factor: int = flag(
        2, "Tokens along each side of the grid that become one.", minimum=2, maximum=LARGEST_SIDE
    )

    def __post_init__(self):
        super().__post_init__()
        if self.kv_compression != "none":
            layers = format_layers(parse_layers(self.kv_compression_layers, self.depth))
            object.__setattr__(self, "kv_compression_layers", layers)
        elif self.kv_compression_layers:
            raise UserError(
                f"model.kv_compression_layers is '{short(self.kv_compression_layers)}', but "
                "model.kv_compression is 'none': leave it out, or set model.kv_compression to 'conv'."
            )
        if self.size_conditions and self.hidden_size % 3:
            raise UserError(
                f"model.hidden_size is {self.hidden_size}: with size conditions it must be a multiple of 3 "
                "(and of 4), because they are embedded as three vectors of a third of the width each."
            )

    @property
    def conditions(self) -> dict[str, tuple[tuple[int, ...], str]]:
        arrays = {
            "text": ((self.text_length, self.text_dim), "float"),
            "text_mask": ((self.text_length,), "bool"),
        }
        if self.size_conditions:
            arrays |= {"image_size": ((2,), "float32"), "aspect_ratio": ((1,), "float32")}
        return arrays

    @property
    def compressed_layers(self) -> tuple[int, ...]:
        """The numbers of the blocks with compressed keys and values."""
        return () if self.kv_compression == "none" else parse_layers(self.kv_compression_layers, self.depth)

    def check_size(self, height: int, width: int) -> None:
        if self.compressed_layers:
            check_grid(self.kv_compression, self.kv_compression_factor, self.grid(height, width))

    def make(self, *, rngs: nnx.Rngs) -> PixArt:
        from pixart_jax.models.pixart import PixArt

        return PixArt(self, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class DiTConfig(BackboneConfig):
    """A class-conditional DiT."""

    kind: ClassVar[str] = "dit"

    num_classes: int = flag(
        1000,
        'Number of classes. The label num_classes stands for "no class" (classifier-free guidance).',
        minimum=1,
        maximum=2**24,
    )

    @property
    def conditions(self) -> dict[str, tuple[tuple[int, ...], str]]:
        return {"label": ((), "int32")}

    def make(self, *, rngs: nnx.Rngs) -> DiT:
        from pixart_jax.models.dit import DiT

        return DiT(self, rngs=rngs)


def check_mup(base: int, width: int, head_dim: int) -> None:
    """Raises a `UserError` unless the width and `model.mup_base_width` (not 0) fit together."""
    if base % head_dim or (width % base and base % width):
        raise UserError(
            f"model.mup_base_width is {base}: it must be a multiple of the head width {head_dim} "
            f"(hidden_size / num_heads, the same at every width), and divide model.hidden_size ({width}) or "
            "be a multiple of it."
        )


# --- Compressed keys and values -----------------------------------------------------------------------


def check_grid(mode: str, factor: int, grid: tuple[int, int]) -> None:
    """Checks that the keys and values of an image can be compressed.

    Args:
      mode: one of `OFFICIAL_MODES`.
      factor: r.
      grid: rows and columns of the image tokens.

    Raises:
      UserError: no token would remain, or r does not divide the grid and the mode needs that.
    """
    height, width = grid
    what, counts, needed = f"a grid of {height}x{width} tokens", grid, mode == "uniform"
    if mode == "uniform_every":
        what, counts, needed = f"{height}x{width} = {height * width} tokens", (height * width,), True
    start = f"kv_compression '{mode}' cannot reduce {what} by {factor}"
    if min(counts) < factor:
        raise UserError(
            f"{start}, because none would remain: choose larger images or a smaller "
            "model.kv_compression_factor."
        )
    if needed and any(count % factor for count in counts):
        raise UserError(
            f"{start}: choose an image size that it divides, or the compression 'conv' or 'nearest'."
        )


def parse_layers(text: str, depth: int) -> tuple[int, ...]:
    """Returns the numbers of the compressed blocks, ascending.

    Args:
      text: numbers and ranges, such as '14-27' or '0,2,14-27'; '' for the second half of the blocks.
      depth: number of blocks.

    Raises:
      UserError: `text` has another form, or names a block that does not exist.
    """
    if not text:
        return tuple(range(depth // 2, depth))
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not first <= last < depth:
            raise UserError(
                f"model.kv_compression_layers is '{text:.80}': give numbers and ranges of the blocks 0 to "
                f"{depth - 1}, such as '{depth // 2}-{depth - 1}'."
            )
        layers |= set(range(first, last + 1))
    return tuple(sorted(layers))


def format_layers(layers: tuple[int, ...]) -> str:
    """The inverse of `parse_layers`: '0,2,14-27'."""
    parts = []
    for layer in layers:
        if parts and parts[-1][1] == layer - 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


# --- Adapters -----------------------------------------------------------------------------------------

_CONDITIONS = "adaln_single.emb"
# Our name of a layer -> its name in diffusers; several names for a layer that holds several matrices.
LAYER_NAMES: dict[str, tuple[str, ...]] = {
    "patch_embed.proj": ("pos_embed.proj",),
    "t_embedder.fc1": (f"{_CONDITIONS}.timestep_embedder.linear_1",),
    "t_embedder.fc2": (f"{_CONDITIONS}.timestep_embedder.linear_2",),
    "size_embedder.fc1": (f"{_CONDITIONS}.resolution_embedder.linear_1",),
    "size_embedder.fc2": (f"{_CONDITIONS}.resolution_embedder.linear_2",),
    "ratio_embedder.fc1": (f"{_CONDITIONS}.aspect_ratio_embedder.linear_1",),
    "ratio_embedder.fc2": (f"{_CONDITIONS}.aspect_ratio_embedder.linear_2",),
    "t_block": ("adaln_single.linear",),
    "text_proj.fc1": ("caption_projection.linear_1",),
    "text_proj.fc2": ("caption_projection.linear_2",),
    "blocks.stacked.attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "blocks.stacked.attn.proj": ("attn1.to_out.0",),
    "blocks.stacked.cross_attn.q": ("attn2.to_q",),
    "blocks.stacked.cross_attn.kv": ("attn2.to_k", "attn2.to_v"),
    "blocks.stacked.cross_attn.proj": ("attn2.to_out.0",),
    "blocks.stacked.mlp.fc1": ("ff.net.0.proj",),
    "blocks.stacked.mlp.fc2": ("ff.net.2",),
    "final_layer.linear": ("proj_out",),
}
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_MLP = ("ff.net.0.proj", "ff.net.2")
ADAPTER_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": _ATTENTION,
    "attention+mlp": (*_ATTENTION, *_MLP),
    # The names in the official scripts. 'proj' is the patch embedding and the first layer of the MLP,
    # 'linear' the modulation, 'linear_1' and 'linear_2' the embedders of timestep, sizes and caption.
    "official": (*_ATTENTION, "proj_out", *_MLP, "proj", "linear", "linear_1", "linear_2"),
}
ADAPTER_KINDS = ("none", "lora", "rslora", "dora")
BASE_DTYPES = ("float32", "bfloat16", "int8")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Adapters that are trained in place of the network (LoRA, rsLoRA, DoRA)."""

    kind: str = flag(
        "none",
        "'none' (the network itself is trained), 'lora', 'rslora' (scale alpha / sqrt(rank)) or 'dora' "
        "(directions and magnitudes).",
        choices=ADAPTER_KINDS,
    )
    rank: int = flag(16, "Rank r of the update of a layer.", minimum=1, maximum=LARGEST_WIDTH)
    alpha: float = flag(
        0.0, "The update is scaled by alpha / rank. 0: alpha is equal to the rank.", minimum=0, maximum=1e6
    )
    targets: str = flag(
        "attention+mlp",
        "The layers with adapters: 'attention', 'attention+mlp', 'official' (those of the official scripts) "
        "or names of diffusers' layers, comma-separated. As in peft, a name stands for all layers that end "
        "in it.",
    )
    dropout: float = flag(
        0.0, "Share of the inputs of an adapter that are set to zero in training.", minimum=0, below=1
    )
    base_dtype: str = flag(
        "float32",
        "How the frozen weights are stored during training: 'float32', 'bfloat16' or 'int8' (the kernels of "
        "the blocks, with one scale per output channel; the rest in bfloat16).",
        choices=BASE_DTYPES,
    )

    def __post_init__(self):
        check_fields(self, "adapter.")
        if self:
            adapter_targets(self)

    def __bool__(self) -> bool:
        """Whether there are adapters."""
        return self.kind != "none"

    def __str__(self) -> str:
        return (
            f"adapter: {self.kind} of rank {self.rank} in {self.targets}, alpha {self.alpha or self.rank:g}, "
            f"scale {self.scale:g}, beside weights in {self.base_dtype}"
        )

    @property
    def scale(self) -> float:
        """s in W + s A B."""
        divisor = math.sqrt(self.rank) if self.kind == "rslora" else self.rank
        return (self.alpha or self.rank) / divisor


def adapter_targets(config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Returns the adapted parts of each layer, by our name of the layer.

    Raises:
      UserError: a name in `config.targets` stands for no layer.
    """
    names = ADAPTER_TARGETS.get(config.targets) or tuple(name.strip() for name in config.targets.split(","))
    unused, found = set(names), {}
    for layer, parts in LAYER_NAMES.items():
        matches = [{name for name in names if f".{part}".endswith(f".{name}") and name} for part in parts]
        unused -= set().union(*matches)
        if any(matches):
            found[layer] = tuple(part for part, match in enumerate(matches) if match)
    if unused:
        known = [
            *ADAPTER_TARGETS,
            *ADAPTER_TARGETS["official"],
            *(part for parts in LAYER_NAMES.values() for part in parts),
        ]
        wrong = sorted(unused)[0]
        raise UserError(
            f"adapter.targets has '{wrong}': choose {', '.join(ADAPTER_TARGETS)}, or names of "
            f"diffusers' layers such as to_q, attn2.to_k, ff.net.2 or proj_out.{did_you_mean(wrong, known)}"
        )
    return found
