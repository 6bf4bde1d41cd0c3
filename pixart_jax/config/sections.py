"""The sections of a config, such as `optimizer`. Intervals are in steps; a step is one optimizer update."""

from __future__ import annotations

import dataclasses
import math

from pixart_jax.constants import (
    LARGEST_BATCH,
    LARGEST_SIDE,
    LARGEST_WIDTH,
    MOST_REPEATS,
    MOST_STEPS,
    MOST_THREADS,
    VAE_DOWNSAMPLING,
)
from pixart_jax.errors import UserError, one_of, short
from pixart_jax.flags import LARGEST, LARGEST_SEED, SMALLEST, check_fields, flag
from pixart_jax.models.configs import COMPUTE_DTYPES, MOST_BLOCKS, TEXT_WEIGHTS_DTYPES

OBJECTIVES = ("diffusion", "alignment")
OPTIMIZERS = ("adamw", "adafactor", "came", "lion", "muon", "prodigy", "schedule_free")
INIT_METHODS = ("none", "reparameterize", "resize", "weights")
TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """The tokenizer and the text encoder that convert captions to text features."""

    tokenizer: str = flag(
        "PixArt-alpha/PixArt-XL-2-1024-MS",
        "HuggingFace name or folder of the tokenizer, or 'byt5' (tokenizes bytes; needs no download).",
        path="weights",
    )
    tokenizer_subfolder: str = flag("tokenizer", "Subfolder of the tokenizer in its repository; '' for none.")
    weights: str = flag(
        "",
        "Folder of a text encoder (HuggingFace layout): T5, mT5 or, with the extra 'torch', any other that "
        "transformers opens (BERT, CLIP, Gemma, …); or 'random' for a fixed random T5 of the shape below.",
        path="weights",
    )
    # An encoder from a folder has its own config instead.
    d_model: int = flag(4096, "Width of the random encoder.", minimum=1, maximum=LARGEST_WIDTH)
    d_ff: int = flag(
        10240, "Width of the hidden layers of the random encoder.", minimum=1, maximum=4 * LARGEST_WIDTH
    )
    d_kv: int = flag(
        64, "Width of the attention heads of the random encoder.", minimum=1, maximum=LARGEST_WIDTH
    )
    num_heads: int = flag(
        64, "Number of attention heads of the random encoder.", minimum=1, maximum=LARGEST_WIDTH
    )
    num_layers: int = flag(24, "Number of layers of the random encoder.", minimum=1, maximum=1000)
    seed: int = flag(0, "Seed of the random encoder.", minimum=0, maximum=LARGEST_SEED)
    dtype: str = flag("bfloat16", "Compute dtype of the encoder.", choices=COMPUTE_DTYPES)
    weights_dtype: str = flag(
        "auto",
        "How the weights are kept in memory: 'auto' (in the compute dtype) or 'int8' (T5-XXL takes 5.9 GB "
        "instead of 9.5; the features change by a few percent, see docs/sampling.md; T5 and mT5 only).",
        choices=TEXT_WEIGHTS_DTYPES,
    )
    scale: float = flag(
        1.0,
        "The features of an encoder other than T5 are multiplied by this. The caption projection is "
        "initialized for vectors of norm 64, as T5-XXL's; those of BERT-like encoders are much shorter.",
        above=0,
        maximum=1000,
    )
    clean_caption: bool = flag(
        True, "Clean captions as diffusers does, which applies the cleaning twice (HTML, links, quotes, …)."
    )
    lower_case: bool = flag(
        True,
        "Without cleaning: convert captions to lower case, as diffusers does. False keeps them as they are, "
        "which is how PixArt-Sigma was trained.",
    )

    def __post_init__(self):
        check_fields(self, "features.text_encoder.")


@dataclasses.dataclass(frozen=True)
class FeaturesConfig:
    """How `precompute` encodes images and captions. A stage is trained on features with the same settings."""

    image_size: int = flag(
        0,
        "Side of the images in pixels; with buckets, the side of the square bucket. 0: the size that "
        "model.base_size implies.",
        minimum=0,
        maximum=LARGEST_SIDE // 4,  # buckets have longer sides
    )
    buckets: str = flag(
        "single",
        "'single' (centre crop to a square) or 'official' (the 40 aspect-ratio buckets).",
        choices=("single", "official"),
    )
    codec: str = flag(
        "vae",
        "'vae' (mean and std of the posterior) or 'pixels' (the latents are the pixels, for tests and small "
        "images).",
        choices=("vae", "pixels"),
    )
    vae: str = flag(
        "stabilityai/sd-vae-ft-ema", "Folder of the VAE (diffusers layout), for codec 'vae'.", path="weights"
    )
    latent_scale: float = flag(
        0.18215,
        "Scaling factor: the model gets the VAE's latents times this (SD: 0.18215, SDXL: 0.13025; pixels: "
        "1).",
        above=0,
        maximum=1e6,
    )
    text: bool = flag(True, "Whether to write text features; stage 1 needs none.")
    text_length: int = flag(
        0,
        "Maximum caption length in tokens. Longer captions are truncated, and `precompute` lists them. 0: "
        "model.text_length.",
        minimum=0,
        maximum=LARGEST_WIDTH,
    )
    text_dtype: str = flag(
        "bfloat16",
        "How text features are stored: 'bfloat16', 'float32' or 'int8' (with one scale per token).",
        choices=("bfloat16", "float32", "int8"),
    )
    latent_dtype: str = flag(
        "float16",
        "How the VAE's mean and std are stored: 'float16', 'bfloat16' or 'float32'.",
        choices=("float16", "bfloat16", "float32"),
    )
    image_encoder: str = flag(
        "",
        "Folder of an image encoder (DINOv2, DINOv3, SigLIP, CLIP, ViT, … as transformers opens it), whose "
        "features of each image are stored for objective 'alignment'; '' for none.",
        path="weights",
    )
    token_size: int = flag(
        0,
        "Pixels along each side of a token, for which the image encoder gives one vector. 0: the size that "
        "the model implies.",
        minimum=0,
        maximum=LARGEST_SIDE,
    )
    text_encoder: TextEncoderConfig = TextEncoderConfig()

    def __post_init__(self):
        check_fields(self, "features.")
        if self.token_size and not self.image_encoder:
            raise UserError(
                f"features.token_size is {self.token_size}, but features.image_encoder is empty: it has no "
                "effect, leave it out."
            )

    @property
    def latent_side(self) -> int:
        """Side of the latents of a square image."""
        return self.image_size // self.downsampling

    @property
    def downsampling(self) -> int:
        """Pixels per latent position along each side."""
        return VAE_DOWNSAMPLING if self.codec == "vae" else 1


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The training data, and how it is read."""

    train: str = flag(
        "", "Folders of feature shards, comma-separated. Several folders are mixed.", path="images"
    )
    weights: str = flag(
        "",
        "Relative sampling weight of each folder, comma-separated; '' weighs folders by their number of "
        "records.",
    )
    repeats: str = flag(
        "",
        "How often the records of each folder are used per epoch, comma-separated whole numbers; '' for "
        "once. An alternative to 'weights'.",
    )
    loss_weights: str = flag(
        "",
        "Weight of the loss of each folder's records, comma-separated; '' for 1. For DreamBooth, give the "
        "folder of the prior (class) images the weight of prior preservation.",
    )
    validation: str = flag(
        "",
        "Folder of held-out feature shards, for the validation loss and, without log.prompts, the sample "
        "images; '' for neither.",
        path="images",
    )
    on_the_fly: bool = flag(
        False,
        "If True, 'train' and 'validation' name images, as for `precompute --images`, and the encoders run "
        "during training. For small data sets.",
    )
    first_step: int = flag(
        0,
        "Step from which on this data is used. Set it to continue a run whose data has changed: its value is "
        "the step of the checkpoint that the run continues from. Keep it for later restarts.",
        minimum=0,
    )
    batch_size: int = flag(
        256,
        "Samples per optimizer update, in total over all devices and processes.",
        minimum=1,
        maximum=LARGEST_BATCH,
    )
    threads: int = flag(4, "Number of reader threads per process.", minimum=1, maximum=MOST_THREADS)
    prefetch: int = flag(
        4, "Number of batches prepared in advance per process.", minimum=1, maximum=MOST_THREADS
    )

    def __post_init__(self):
        check_fields(self, "data.")
        for name in ("weights", "loss_weights"):
            for weight in self.folder_numbers(name):
                if not SMALLEST <= weight <= LARGEST[float]:
                    raise UserError(
                        f"data.{name} is '{getattr(self, name)}': every weight must be a number above 0, "
                        f"from {SMALLEST} to {LARGEST[float]}."
                    )
        for repeats in self.folder_numbers("repeats"):
            if not (1 <= repeats <= MOST_REPEATS and repeats.is_integer()):
                raise UserError(
                    f"data.repeats is '{self.repeats}': every number must be a whole number from 1 to "
                    f"{MOST_REPEATS}."
                )
        if self.weights and self.repeats:
            raise UserError(
                f"data.weights is '{self.weights}' and data.repeats is '{self.repeats}': both say how often "
                "the records of a folder are used; set only one of them."
            )

    def folder_numbers(self, name: str) -> list[float]:
        """Returns the numbers of a field that has one for each folder of `train`; empty if it is not set.

        Text that is not a number, such as the empty text in "1,,2", becomes NaN.

        Args:
          name: "weights", "repeats" or "loss_weights".
        """

        def number(text: str) -> float:
            try:
                return float(text)
            except ValueError:
                return math.nan

        text = getattr(self, name)
        return [number(part) for part in text.split(",")] if text else []


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The noise schedule and the loss."""

    num_timesteps: int = flag(
        1000, "Number of timesteps of the linear schedule.", minimum=1, maximum=1_000_000
    )
    beta_start: float = flag(1e-4, "First beta of the schedule.", above=0, below=1)
    beta_end: float = flag(0.02, "Last beta of the schedule.", above=0, below=1)
    min_snr_gamma: float = flag(
        0.0, "Gamma of the min-SNR weighting of the noise error; 0 for no weighting.", minimum=0
    )
    condition_dropout: float = flag(
        0.1,
        "Share of samples whose caption (or class) is replaced by the null caption (or class).",
        minimum=0,
        below=1,
    )
    unmasked_weight: float = flag(
        1.0,
        "Weight of the loss where the mask of an image is black; it is 1 where the mask is white, and for "
        "images without a mask. Below 1, features with masks are needed (`precompute --masks`). 1 uses no "
        "masks.",
        minimum=0,
        maximum=1,
    )
    normalize_masks: bool = flag(
        False,
        "Divide the weights of an image's latent positions by their mean, so that images of which a small "
        "part is white count as much as others.",
    )
    loss: str = flag(
        "mse",
        "Loss of the noise error d: 'mse' (d^2) or 'huber' (pseudo-Huber, sqrt(d^2 + c^2) - c).",
        choices=("mse", "huber"),
    )
    huber_c: float = flag(
        0.1, "c of the pseudo-Huber loss: it is quadratic below c and linear above.", above=0, maximum=1000
    )
    timestep_density: str = flag(
        "uniform",
        "How timesteps u = (t + 1/2) / num_timesteps are drawn: 'uniform', 'logit_normal' (logit u is normal "
        "with timestep_mean and timestep_std), 'sigmoid' (density sigmoid(timestep_slope (u - 1/2))) or "
        "'speed' (those that are almost only noise timestep_suppression times less often).",
        choices=("uniform", "logit_normal", "sigmoid", "speed"),
    )
    timestep_mean: float = flag(0.0, "Mean of 'logit_normal'; above 0: more noise.", minimum=-10, maximum=10)
    timestep_std: float = flag(1.0, "Standard deviation of 'logit_normal'.", minimum=0.01, maximum=100)
    timestep_slope: float = flag(5.0, "Slope of 'sigmoid'; above 0: more noise.", minimum=-100, maximum=100)
    timestep_suppression: float = flag(
        5.0, "How much less often 'speed' draws the timesteps that it suppresses.", minimum=1, maximum=1000
    )
    timestep_convergence: float = flag(
        0.985,
        "'speed' suppresses the timesteps at which the variance of the noise, 1 - abar_t, is at least this.",
        above=0,
        below=1,
    )
    change_weighting: float = flag(
        0.0,
        "Weight the noise error by how fast the variance of the noise changes at its timestep, between 1 - "
        "this and this (lambda of SpeeD, 0.6 there); 0 for no weighting.",
        minimum=0.5,
        maximum=1,
        also=0,
    )
    importance_weights: bool = flag(
        False,
        "Divide the loss of a sample by the density of its timestep, so that its expectation is that of "
        "uniform timesteps.",
    )
    noise_candidates: int = flag(
        1,
        "Noises that are drawn for each sample, of which the one nearest to its latents is used.",
        minimum=1,
        maximum=1024,
    )
    noise_offset: float = flag(
        0.0,
        "Standard deviation of a random constant that is added to each channel of the noise; 0 for none.",
        minimum=0,
        maximum=10,
    )
    input_perturbation: float = flag(
        0.0,
        "Noise that only the network's input gets, as a share of its noise (0.1 in arXiv 2301.11706); 0 for "
        "none.",
        minimum=0,
        maximum=10,
    )

    def __post_init__(self):
        check_fields(self, "diffusion.")
        if self.beta_end < self.beta_start:
            raise UserError(
                f"diffusion.beta_end is {self.beta_end}: it must be at least diffusion.beta_start "
                f"({self.beta_start})."
            )
        if self.change_weighting and self.min_snr_gamma:
            raise UserError(
                f"diffusion.change_weighting is {self.change_weighting} and diffusion.min_snr_gamma "
                f"{self.min_snr_gamma}: both weight the noise error by its timestep, set one of them to 0."
            )


@dataclasses.dataclass(frozen=True)
class GuidanceConfig:
    """Conventions of classifier-free guidance. They are stored with the weights.

    The defaults are those of diffusers, so that an exported model generates the same images there. The
    official training code keeps the mask of the caption when it drops the caption (`null_mask='caption'`).
    """

    null_text: str = flag(
        "t5_empty",
        "The null caption: 't5_empty' (text features of \"\") or 'token' (an array stored with the weights).",
        choices=("token", "t5_empty"),
    )
    null_mask: str = flag(
        "own",
        "Mask of the null caption: its 'own', or that of the 'caption' that it replaces.",
        choices=("caption", "own"),
    )
    channels: int = flag(
        4,
        "Latent channels that are guided: 4 (all), or 3 as in the official ancestral sampler.",
        minimum=3,
        maximum=4,
    )
    aspect_ratio: str = flag(
        "true",
        "Aspect ratio used in the size conditions: that of the 'bucket' (key of the table) or 'true' (height "
        "/ width).",
        choices=("bucket", "true"),
    )
    scale: float = flag(4.5, "Default guidance scale of sampling.", minimum=0)

    def __post_init__(self):
        check_fields(self, "guidance.")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer. The defaults are those of PixArt-α.

    These are AdamW with weight decay 0.03 for all parameters, eps 1e-10, and gradients clipped to norm 0.01.
    """

    name: str = flag(
        "adamw",
        "'adamw', 'adafactor', 'came' (the optimizer of PixArt-Σ), 'lion', 'muon' (orthogonalized momentum "
        "for the matrices of the blocks, AdamW for everything else), 'prodigy' (estimates the learning rate: "
        "set learning_rate to 1) or 'schedule_free' (AdamW; its own average replaces the moving average).",
        choices=OPTIMIZERS,
    )
    moments: str = flag(
        "float32",
        "How the moments of 'adamw' and 'lion' are stored: 'float32', 'bfloat16' or 'int8' (blocks of at "
        "most 256 values), the last two with stochastic rounding.",
        choices=("float32", "bfloat16", "int8"),
    )
    momentum: float = flag(0.95, "Decay of Muon's momentum.", minimum=0, below=1)
    muon_learning_rate: float = flag(
        0.0,
        "Learning rate of the matrices that 'muon' trains, with the same warm-up, schedule and scaling as "
        "optimizer.learning_rate, which the other parameters keep; 0: the same as optimizer.learning_rate.",
        minimum=0,
    )
    learning_rate: float = flag(2e-5, "Learning rate after the warm-up.", above=0)
    sqrt_scaling_batch: int = flag(
        0, "If not 0, the learning rate is multiplied by sqrt(batch size / this).", minimum=0
    )
    warmup_steps: int = flag(
        1000, "Steps of linear warm-up to the learning rate; 0 for no warm-up.", minimum=0
    )
    schedule: str = flag(
        "constant",
        "The learning rate after the warm-up: 'constant', 'linear' or 'cosine' (decay until the last step), "
        "or 'wsd' (constant, then linear decay in the last steps).",
        choices=("constant", "linear", "cosine", "wsd"),
    )
    final_rate: float = flag(
        0.0,
        "Where a decaying schedule ends, as a share of optimizer.learning_rate.",
        minimum=0,
        maximum=1,
    )
    decay_share: float = flag(
        0.2, "Share of config.steps in which the schedule 'wsd' decays.", above=0, maximum=1
    )
    beta1: float = flag(
        0.9, "Decay of the first moment (of 'schedule_free': its interpolation).", minimum=0, below=1
    )
    beta2: float = flag(0.999, "Decay of the second moment (of 'lion': of its moment).", minimum=0, below=1)
    beta3: float = flag(0.9999, "Decay of the instability of 'came'.", minimum=0, below=1)
    eps: float = flag(
        1e-10, "Added to the root of the second moment, by which updates are divided.", above=0, maximum=1
    )
    weight_decay: float = flag(
        0.03,
        "Decoupled weight decay: a parameter shrinks by its learning rate times this in each update.",
        minimum=0,
        maximum=1000,
    )
    clip_norm: float = flag(0.01, "Global norm to which gradients are clipped; 0 for no clipping.", minimum=0)
    accumulation: int = flag(
        1,
        "Number of micro-batches whose gradients are accumulated into one update.",
        minimum=1,
        maximum=LARGEST_BATCH,
    )
    ema_decay: float = flag(0.9999, "Decay of the moving average of the weights.", minimum=0, below=1)
    ema_every: int = flag(
        1,
        "Steps between two updates of the moving average, whose decay is the product of that of these steps.",
        minimum=1,
        maximum=1000,
    )
    ema_device: str = flag(
        "device",
        "Where the moving average is kept: 'device', or 'host', so that it takes no memory of the devices. "
        "With 'host', set optimizer.ema_every to about 10: every update of the average copies it to the "
        "devices and back.",
        choices=("device", "host"),
    )
    power_ema: str = flag(
        "",
        "Relative widths of further averages of the weights, comma-separated, such as 0.05,0.1; '' for none. "
        "`evaluate ema` computes averages of other widths from their snapshots (checkpoint.snapshot_every).",
    )
    offload: bool = flag(
        False,
        "Keep the optimizer's state in host memory between updates. It saves memory if that state is larger "
        "than what the gradient needs; every update copies it to the devices and back.",
    )

    def __post_init__(self):
        check_fields(self, "optimizer.")
        if self.moments != "float32" and self.name not in ("adamw", "lion"):
            raise UserError(
                f"optimizer.moments is '{self.moments}', which '{self.name}' does not support: set it to "
                "'float32', or optimizer.name to 'adamw' or 'lion'."
            )
        if self.name == "schedule_free" and (self.schedule != "constant" or not self.beta1):
            raise UserError(
                f"optimizer.name is 'schedule_free' with optimizer.schedule '{self.schedule}' and "
                f"optimizer.beta1 {self.beta1}: it needs 'constant' and a beta1 above 0."
            )

        if self.power_widths and self.name == "schedule_free":
            raise UserError(
                f"optimizer.power_ema is '{self.power_ema}' with optimizer.name 'schedule_free', whose own "
                "average replaces moving averages: leave power_ema empty, or choose another optimizer."
            )

    @property
    def power_widths(self) -> tuple[float, ...]:
        """The widths in `power_ema`."""
        return parse_widths("optimizer.power_ema", self.power_ema) if self.power_ema else ()

    @property
    def on_host(self) -> tuple[str, ...]:
        """The fields of the training state that are kept in host memory."""
        return ("ema",) * (self.ema_device == "host") + ("optimizer",) * self.offload

    def decay_steps(self, steps: int) -> int:
        """Returns in how many of `steps` steps, the last ones, the learning rate decays."""
        if self.schedule == "constant":
            return 0
        if self.schedule == "wsd":
            return max(1, round(self.decay_share * steps))
        return steps - self.warmup_steps


# Half of the tokens skip all blocks but the first and the last: PRX part 3.
HALF_ROUTED = {"rate": 0.5, "first_blocks": 1, "last_blocks": 1}
# The smallest number of tokens with routing, if its rate goes by that number.
ROUTED_FROM = 1024


@dataclasses.dataclass(frozen=True)
class RoutingConfig:
    """Token routing in training (TREAD, arXiv 2501.04765): some tokens skip the blocks in the middle.

    The parameters are the same as without routing, and sampling does not use routing, unless its guidance
    does. The loss covers all tokens.
    """

    rate: float = flag(
        0.0,
        "Share of the tokens that skip the middle blocks, chosen anew for every sample; 0 for no routing. "
        "-1: by the number of tokens of the square image: no routing below 1024, and 0.5 from there, with "
        "first_blocks and last_blocks 1, whatever these two are.",
        minimum=0,
        below=1,
        also=-1,
    )
    first_blocks: int = flag(
        2, "Number of blocks at the start that run on all tokens.", minimum=0, maximum=MOST_BLOCKS
    )
    last_blocks: int = flag(
        4, "Number of blocks at the end that run on all tokens.", minimum=0, maximum=MOST_BLOCKS
    )
    finish: int = flag(
        0, "Number of steps at the end of the stage in which no tokens skip blocks.", minimum=0
    )

    def __post_init__(self):
        check_fields(self, "routing.")

    def resolved(self, tokens: int) -> RoutingConfig:
        """Returns the routing of a stage with `tokens` image tokens; the same unless `rate` is -1.

        At 256 tokens, routing makes the images worse; at 1,024 it makes them better and training faster
        (Photoroom, "PRX part 2", 2026: FID 18.20 -> 21.61 and 17.42 -> 14.10). Nothing was measured between
        the two, and fewer tokens save less, so that there is no routing below 1,024.
        """
        if self.rate != -1:
            return self
        rate = HALF_ROUTED["rate"] if tokens >= ROUTED_FROM else 0.0
        return dataclasses.replace(self, **HALF_ROUTED | {"rate": rate})

    def kept(self, tokens: int) -> int:
        """Returns how many of `tokens` tokens pass through all blocks."""
        return max(1, round(tokens * (1 - self.rate)))


@dataclasses.dataclass(frozen=True)
class AlignmentConfig:
    """Objective 'alignment': the tokens inside the network predict the features of an image encoder (REPA).

    See `training/objectives/alignment.py`. The features come from `features.image_encoder`.
    """

    block: int = flag(
        8,
        "The block, counted from 1, whose tokens are aligned: the 8th of 28 in arXiv 2410.06940.",
        minimum=1,
        maximum=MOST_BLOCKS,
    )
    weight: float = flag(
        0.5, "Weight of the alignment in the loss, beside 1 of the diffusion loss.", above=0, maximum=1000
    )
    stop_step: int = flag(
        0,
        "Step from which on the objective is 'diffusion', because alignment helps most at the start (arXiv "
        "2505.16792); 0 for never.",
        minimum=0,
    )
    width: int = flag(
        2048, "Width of the two hidden layers of the projector.", minimum=1, maximum=LARGEST_WIDTH
    )
    target_width: int = flag(
        768,
        "Width of the features of the image encoder (DINOv2-B: 768).",
        minimum=1,
        maximum=LARGEST_WIDTH,
    )

    def __post_init__(self):
        check_fields(self, "alignment.")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis of the mesh.

    If one axis is -1, it gets the devices that the other axes leave. If several are, `make_mesh` chooses.
    """

    data: int = flag(-1, "Number of replicas of the model.", minimum=1, also=-1)
    fsdp: int = flag(
        1,
        "Devices that share parameters, moving average and optimizer state (and the batch).",
        minimum=1,
        also=-1,
    )
    tensor: int = flag(1, "Devices that share attention heads and MLP columns.", minimum=1, also=-1)
    sequence: int = flag(1, "Devices that share the image tokens of a sample.", minimum=1, also=-1)
    slices: int = flag(
        -1,
        "TPU slices or GPU nodes that are connected by a slower network. 'data' spans them; every other axis "
        "stays within one. -1 takes the number that the devices report.",
        minimum=1,
        also=-1,
    )
    strategy: str = flag(
        "fsdp",
        "What is sharded over 'fsdp': 'fsdp' (parameters, moving average, optimizer) or 'zero1' (only the "
        "moving average and the optimizer; the parameters are replicated).",
        choices=("fsdp", "zero1"),
    )

    def __post_init__(self):
        check_fields(self, "mesh.")


@dataclasses.dataclass(frozen=True)
class CompileConfig:
    """How the training step is compiled, once for each bucket, and where compiled programs are cached."""

    ahead: bool = flag(
        False,
        "Compile the step for every bucket before step 1, instead of when the first batch of the bucket "
        "arrives.",
    )
    cache: str = flag(
        "",
        "Folder in which compiled programs are kept for later runs; '' for none. Use one folder per kind of "
        "machine.",
        path="output",
    )
    deterministic: bool = flag(
        False,
        "On GPUs, use only kernels whose results do not vary from run to run, so that a resumed run gives "
        "the same bits. Costs speed and memory: attention is then computed by XLA.",
    )

    def __post_init__(self):
        check_fields(self, "compile.")


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Initialization of the weights at step 0."""

    method: str = flag(
        "none",
        "'none' (random weights), 'reparameterize' (DiT -> PixArt), 'resize' (PixArt -> PixArt at another "
        "image size) or 'weights' (a weights file or folder, in any format that `convert` reads).",
        choices=INIT_METHODS,
    )
    path: str = flag("", "The run directory or weights file to start from.", path="weights")
    adapter: str = flag(
        "",
        "Adapter that the run continues to train: a run directory or an adapter file or folder. '' for a new "
        "one.",
        path="weights",
    )
    new_vae: bool = flag(
        False,
        "The latents of the run come from another VAE than those that the weights were trained on, so "
        "features.latent_scale may differ.",
    )

    def __post_init__(self):
        check_fields(self, "init.")
        if (self.method == "none") != (not self.path):
            raise UserError(
                f"init.method is '{self.method}' and init.path '{self.path}': give both or neither."
            )
        if self.new_vae and not self.path:
            raise UserError(
                "init.new_vae is True, but the run starts from random weights: leave it out, or give "
                "init.path."
            )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and which of them are kept."""

    every: int = flag(1000, "Steps between checkpoints; the last step is always saved.", minimum=1)
    keep: int = flag(3, "Number of newest checkpoints to keep.", minimum=1)
    keep_every: int = flag(
        0, "Checkpoints at multiples of this number of steps are kept permanently; 0 for none.", minimum=0
    )
    keep_best: int = flag(
        0,
        "Number of checkpoints with the lowest validation loss to keep. If not 0, the run validates before "
        "every checkpoint.",
        minimum=0,
    )
    snapshot_every: int = flag(
        0,
        "Steps between snapshots of the averages of optimizer.power_ema, which are kept permanently; 0 for "
        "none. The last step also has one. A snapshot has 4 bytes per trained parameter and width.",
        minimum=0,
    )

    def __post_init__(self):
        check_fields(self, "checkpoint.")
        if self.keep_every % self.every:
            raise UserError(
                f"checkpoint.keep_every is {self.keep_every}: it must be a multiple of checkpoint.every "
                f"({self.every}), or 0."
            )


@dataclasses.dataclass(frozen=True)
class DivergenceConfig:
    """What to do after an update whose loss or gradient is not finite, or whose loss is a spike.

    Such an update is never applied; this is part of the compiled step.
    """

    action: str = flag(
        "stop",
        "'stop' ends the run; 'skip' skips the update and continues with the next batch.",
        choices=("stop", "skip"),
    )
    spike_factor: float = flag(
        0.0,
        "A loss above this many times its running average is a spike; 0 disables the detection of spikes.",
        above=1,
        also=0,
    )
    spike_warmup: int = flag(
        100,
        "Initial steps during which nothing counts as a spike; the running average is still settling.",
        minimum=1,
    )
    patience: int = flag(10, "With 'skip', the run ends after this many skipped updates in a row.", minimum=1)

    def __post_init__(self):
        check_fields(self, "divergence.")


@dataclasses.dataclass(frozen=True)
class WatchdogConfig:
    """How long processes wait for each other before they end the run, in seconds."""

    connect_seconds: int = flag(300, "How long processes wait for each other at the start.", minimum=1)
    dead_seconds: int = flag(30, "A process counts as dead after this long without a heartbeat.", minimum=4)
    hang_seconds: int = flag(
        1800,
        "If no process makes progress for this long, the process that is furthest behind counts as hanging.",
        minimum=1,
    )

    def __post_init__(self):
        check_fields(self, "watchdog.")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What a run logs, and how often."""

    every: int = flag(100, "Steps between lines of metrics.", minimum=1)
    validate_every: int = flag(1000, "Steps between validations; 0 for never.", minimum=0)
    validation_samples: int = flag(1024, "Number of held-out samples used in each validation.", minimum=1)
    sample_every: int = flag(5000, "Steps between grids of sample images; 0 for never.", minimum=0)
    samples: int = flag(
        16,
        "Number of held-out captions in a grid; the largest number of prompts whose images are generated at "
        "a time.",
        minimum=1,
        maximum=10_000,
    )
    sample_steps: int = flag(20, "Sampling steps of these images.", minimum=1, maximum=MOST_STEPS)
    prompts: str = flag(
        "",
        "Prompts of the sample images, instead of held-out captions: texts or files of prompts (as for "
        "`sample --prompts`, with the fields 'prompt' and 'seed'), separated by | or newlines. Needs the "
        "encoder in features.text_encoder, at the start only.",
    )
    tracker: str = flag(
        "tensorboard",
        "Where metrics and sample images are shown, besides files of the run directory: 'tensorboard', "
        "'wandb' and 'trackio' (extras of the same names), several separated by commas, or 'none'.",
    )

    def __post_init__(self):
        check_fields(self, "log.")
        for name in self.trackers:
            one_of("log.tracker", name, TRACKERS if "," in self.tracker else (*TRACKERS, "none"))

    @property
    def trackers(self) -> list[str]:
        """The names in `tracker`, without 'none'."""
        names = [name.strip() for name in self.tracker.split(",")]
        return [] if names == ["none"] else list(dict.fromkeys(names))


def parse_widths(name: str, text: str) -> tuple[float, ...]:
    """Parses relative widths of averages, comma-separated.

    Args:
      name: name of the setting, for messages.
      text: such as "0.05,0.1".

    Raises:
      UserError: one is not a number, is out of range, or is there twice.
    """
    try:
        widths = tuple(float(part) for part in text.split(","))
    except ValueError:
        widths = ()
    different = len({f"{width:g}" for width in widths}) == len(widths)
    if not widths or not different or not all(0.01 <= width <= 0.25 for width in widths):
        raise UserError(
            f"{name} is '{short(text)}': give different numbers from 0.01 to 0.25, separated by commas, such "
            "as 0.05,0.1."
        )
    return widths
