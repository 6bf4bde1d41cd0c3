"""Photos to caption, and a tiny LLaVA that captions them."""

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images
from tiny_captioners import save_llava

from pixart_jax.captioning.model import load_captioner


def save(path, pixels):
    Image.fromarray(np.ascontiguousarray(pixels)).save(path)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """23 photos: 20 crops (00, 07 and 19 have equal bytes), and three in a subfolder, one of them broken."""
    root = tmp_path_factory.mktemp("photos")
    photos = load_sample_images().images
    for i in range(20):
        crop = photos[i % 2][3 * i : 3 * i + 40 + i, 5 * i : 5 * i + 60]
        save(root / f"{i:02d}.png", photos[0][:50, :70] if i in (0, 7, 19) else crop)
        (root / f"{i:02d}.txt").write_text(f"photo {i % 3}")
    (root / "sub").mkdir()
    save(root / "sub" / "20.png", photos[1][:44, :55])
    (root / "sub" / "21.png").write_bytes((root / "03.png").read_bytes())
    (root / "sub" / "broken.png").write_bytes((root / "sub" / "20.png").read_bytes()[:300])
    return root


@pytest.fixture(scope="session")
def llava(tmp_path_factory):
    pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("llava")
    save_llava(path)
    return path


@pytest.fixture(scope="session")
def describe(llava):
    return load_captioner(str(llava), max_new_tokens=24)
