"""Feature networks with random weights, in the file formats of the real ones."""

import json
import warnings
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

FEATURES = 24


class TinyInception(torch.nn.Module):
    """Like inception-2015-12-05.pt, `layers` takes normalised 299 px images, `forward` 0..255 of any size."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 12, 8, stride=8),
            torch.nn.ReLU(),
            torch.nn.Conv2d(12, FEATURES, 3, stride=2),
            torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1),
        )
        # Makes the features at least as large as Inception's, so that a FID is much larger than 1e-3.
        with torch.no_grad():
            self.layers[0].weight *= 10
            self.layers[2].weight *= 10

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        x = torch.nn.functional.interpolate(x, size=(299, 299), mode="bilinear", align_corners=True)
        return self.layers((x - 128) / 128)


def save_inception(path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(TinyInception().eval()).save(str(path))
    return path


def save_clip(folder: Path) -> Path:
    """Saves a CLIP model of transformers, with a tokenizer whose tokens are single characters."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    folder.mkdir(parents=True)
    letters = [chr(code) for code in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 16})
    )
    common = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={
            **common, "vocab_size": len(words), "max_position_embeddings": 16, "bos_token_id": 0,
            "eos_token_id": 1,
        },
        vision_config={**common, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )  # fmt: skip
    CLIPModel(config).eval().save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )
    return folder
