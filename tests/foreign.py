"""PyTorch models and folders for comparison: tiny, random, written without the package's weight tables."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from pixart_jax.weights.files import Tensors

torch = pytest.importorskip("torch")
F = torch.nn.functional

# Two sizes: width, depth, heads, latent side, text width, tokens, position scale.
SIZES = {
    "small": dict(width=48, depth=2, heads=4, side=8, text=24, tokens=10, scale=1.0),
    "large": dict(width=96, depth=3, heads=6, side=16, text=40, tokens=14, scale=2.0),
}

CORPUS = [
    "a corgi reading a book in the park",
    "two red foxes sleep under a tree",
    "an oil painting of the sea at night",
    "a bowl of soup on a wooden table",
    "blurry, low quality, watermark",
    "the quick brown fox jumps over the lazy dog",
]


def _positions(side: int, width: int, scale: float) -> np.ndarray:
    """Returns the official position buffer, computed with the formula of the paper's code."""
    axis = np.arange(side, dtype=np.float32) / scale
    omega = 1 / 10000 ** (np.arange(width // 4) / (width / 4))
    table = []
    for row in axis:
        for column in axis:
            x, y = column * omega, row * omega
            table.append(np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)]))
    return np.array(table, np.float32)[None]


def official_state_dict(
    *, width: int, depth: int, side: int, text: int, tokens: int, scale: float, sizes: bool, **_
) -> dict[str, np.ndarray]:
    """A random official PixArt state dict; no tensor is zero."""
    d = width
    shapes = {
        "x_embedder.proj.weight": (d, 4, 2, 2),
        "x_embedder.proj.bias": (d,),
        "t_embedder.mlp.0.weight": (d, 256),
        "t_embedder.mlp.0.bias": (d,),
        "t_embedder.mlp.2.weight": (d, d),
        "t_embedder.mlp.2.bias": (d,),
        "t_block.1.weight": (6 * d, d),
        "t_block.1.bias": (6 * d,),
        "y_embedder.y_embedding": (tokens, text),
        "y_embedder.y_proj.fc1.weight": (d, text),
        "y_embedder.y_proj.fc1.bias": (d,),
        "y_embedder.y_proj.fc2.weight": (d, d),
        "y_embedder.y_proj.fc2.bias": (d,),
        "final_layer.scale_shift_table": (2, d),
        "final_layer.linear.weight": (32, d),
        "final_layer.linear.bias": (32,),
    }
    for name in ("csize_embedder", "ar_embedder") if sizes else ():
        shapes |= {
            f"{name}.mlp.0.weight": (d // 3, 256),
            f"{name}.mlp.0.bias": (d // 3,),
            f"{name}.mlp.2.weight": (d // 3, d // 3),
            f"{name}.mlp.2.bias": (d // 3,),
        }
    for i in range(depth):
        shapes[f"blocks.{i}.scale_shift_table"] = (6, d)
        for name, rows, columns in (
            ("attn.qkv", 3 * d, d),
            ("attn.proj", d, d),
            ("cross_attn.q_linear", d, d),
            ("cross_attn.kv_linear", 2 * d, d),
            ("cross_attn.proj", d, d),
            ("mlp.fc1", 4 * d, d),
            ("mlp.fc2", d, 4 * d),
        ):
            shapes[f"blocks.{i}.{name}.weight"] = (rows, columns)
            shapes[f"blocks.{i}.{name}.bias"] = (rows,)
    rng = np.random.default_rng(width + sizes)
    out = {"pos_embed": _positions(side // 2, d, scale)}
    for name, shape in shapes.items():
        fan_in = np.prod(shape[1:]) if len(shape) > 1 else 25
        out[name] = (rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)
    return out


def diffusers_model(
    *, width: int, depth: int, heads: int, side: int, text: int, scale: float, sizes: bool, seed: int = 0, **_
):
    """A random `PixArtTransformer2DModel`."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        num_layers=depth,
        cross_attention_dim=width,
        sample_size=side,
        caption_channels=text,
        interpolation_scale=int(scale) if scale == int(scale) else scale,
        use_additional_conditions=sizes,
    ).eval()


def as_tensors(arrays: dict[str, np.ndarray]) -> Tensors:
    """Returns arrays as the tensors of a file called 'test'."""
    return Tensors(Path("test"), {name: value.shape for name, value in arrays.items()}, arrays.__getitem__)


def state_dict(model) -> dict[str, np.ndarray]:
    """The state dict of a PyTorch model as arrays."""
    return {name: value.numpy() for name, value in model.state_dict().items()}


def inputs(
    shape: tuple[int, int], *, text: int, tokens: int, sizes: bool, seed: int = 0, **_
) -> dict[str, np.ndarray]:
    """Returns arguments of our model, NHWC, for three images with captions of different lengths."""
    rng = np.random.default_rng(seed)
    lengths = np.array([tokens, 1, tokens // 2])
    out = {
        "latents": rng.standard_normal((3, *shape, 4)).astype(np.float32),
        "timesteps": np.array([3.0, 421.5, 999.0], np.float32),
        "text": rng.standard_normal((3, tokens, text)).astype(np.float32),
        "text_mask": (np.arange(tokens) < lengths[:, None]).astype(np.int32),
    }
    if sizes:
        out["image_size"] = np.array([[512, 768], [300, 200], [1024, 1024]], np.float32)
        out["aspect_ratio"] = np.array([[0.67], [1.5], [1.0]], np.float32)
    return out


def run_diffusers(model, arguments: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the output of a diffusers transformer for the arguments of our model, NHWC."""
    tensors = {name: torch.from_numpy(value) for name, value in arguments.items()}
    with torch.no_grad():
        out = model(
            tensors["latents"].permute(0, 3, 1, 2),
            encoder_hidden_states=tensors["text"],
            encoder_attention_mask=tensors["text_mask"],
            timestep=tensors["timesteps"],
            added_cond_kwargs={
                "resolution": tensors.get("image_size"),
                "aspect_ratio": tensors.get("aspect_ratio"),
            },
            return_dict=False,
        )[0]
    return out.permute(0, 2, 3, 1).numpy()


class TorchDiT(torch.nn.Module):
    """DiT (arXiv 2212.09748) under its official parameter names."""

    def __init__(self, width: int, depth: int, heads: int, side: int, classes: int):
        super().__init__()
        d, linear = width, torch.nn.Linear
        self.heads = heads
        module = torch.nn.Module
        self.x_embedder, self.t_embedder, self.y_embedder = module(), module(), module()
        self.x_embedder.proj = torch.nn.Conv2d(4, d, 2, 2)
        self.t_embedder.mlp = torch.nn.Sequential(linear(256, d), torch.nn.SiLU(), linear(d, d))
        self.y_embedder.embedding_table = torch.nn.Embedding(classes + 1, d)
        self.pos_embed = torch.nn.Parameter(torch.from_numpy(_positions(side // 2, d, 1.0)))
        self.blocks = torch.nn.ModuleList(module() for _ in range(depth))
        for block in self.blocks:
            block.attn, block.mlp = module(), module()
            block.attn.qkv, block.attn.proj = linear(d, 3 * d), linear(d, d)
            block.mlp.fc1, block.mlp.fc2 = linear(d, 4 * d), linear(4 * d, d)
            block.adaLN_modulation = torch.nn.Sequential(torch.nn.SiLU(), linear(d, 6 * d))
        self.final_layer = module()
        self.final_layer.linear = linear(d, 32)
        self.final_layer.adaLN_modulation = torch.nn.Sequential(torch.nn.SiLU(), linear(d, 2 * d))

    def forward(self, x, t, labels):
        """x [B, 4, h, w], t [B], labels [B] -> [B, 8, h, w]."""
        batch, _, height, width = x.shape
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        angles = t[:, None] * torch.exp(-np.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
        c = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], 1)) + self.y_embedder.embedding_table(
            labels
        )

        def modulated(x, shift, scale):
            return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

        for block in self.blocks:
            shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = block.adaLN_modulation(c).chunk(6, 1)
            qkv = block.attn.qkv(modulated(x, shift_1, scale_1))
            q, k, v = qkv.reshape(batch, x.shape[1], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + gate_1[:, None] * block.attn.proj(attended)
            hidden = F.gelu(block.mlp.fc1(modulated(x, shift_2, scale_2)), approximate="tanh")
            x = x + gate_2[:, None] * block.mlp.fc2(hidden)
        x = self.final_layer.linear(modulated(x, *self.final_layer.adaLN_modulation(c).chunk(2, 1)))
        x = x.reshape(batch, height // 2, width // 2, 2, 2, 8)
        return torch.einsum("bhwpqc->bchpwq", x).reshape(batch, 8, height, width)


def save_tokenizer(folder: Path) -> None:
    """Saves a T5 tokenizer in the files of PixArt's release, with a vocabulary trained on a few sentences."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=model,
        vocab_size=90,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


# A tiny network for `save_pipeline`, and the config fields that describe it to `precompute` and `train`.
PIPELINE_NUMBERS = dict(width=48, depth=1, heads=4, side=8, text=24, tokens=10, scale=1.0)
PIPELINE_FLAGS = (
    "model.size=custom",
    "model.depth=1",
    "model.num_heads=4",
    "model.hidden_size=48",
    "model.text_dim=24",
    "model.base_size=4",
    "model.dtype=float32",
    "features.image_size=64",
)


def save_pipeline(folder: Path, transformer, kind: str = "PixArtAlphaPipeline", **vae_config) -> None:
    """Saves a complete pipeline of a class with the given transformer, using diffusers."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    save_tokenizer(folder.parent / "tokenizer_files")
    tokenizer = transformers.T5Tokenizer.from_pretrained(folder.parent / "tokenizer_files")
    torch.manual_seed(1)
    encoder = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=len(tokenizer) + 3,
            d_model=transformer.config.caption_channels,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
        **vae_config,
    )
    pipeline = getattr(diffusers, kind)(
        tokenizer=tokenizer,
        text_encoder=encoder.eval(),
        vae=vae.eval(),
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )
    pipeline.save_pretrained(folder)
