"""Runs the Python snippets of each page of the documentation, with tiny weights under the same names."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import foreign
import numpy as np
import pytest
import tiny
from digits_runs import ENVIRONMENT, tiny_config
from feature_networks import save_clip, save_inception
from PIL import Image
from safetensors.numpy import save_file

import pixart_jax
from pixart_jax.convert import convert
from pixart_jax.weights.adapter_export import write_comfyui

ROOT = Path(__file__).parents[1]
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [
    path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if "```python" in path.read_text()
]
# 16 heads, as in XL/2, of width 4.
NUMBERS = dict(width=64, depth=1, heads=16, side=8, text=24, tokens=10, scale=1.0)
# Names that a page uses without defining them.
BATCH = """
import numpy as np
rng = np.random.default_rng(0)
latents, timesteps = rng.normal(size=(4, 8, 8, 4)), np.array([999.0, 500.0, 3.0, 0.0])
text, text_mask = rng.normal(size=(4, 10, 24)), np.arange(10) < rng.integers(1, 10, size=(4, 1))
"""
GIVEN = {
    "README.md": BATCH,
    "weights.md": BATCH,
    "sampling.md": f"""{BATCH}
import pixart_jax
model = pixart_jax.load_model("PixArt-XL-2-512x512.pth")
text, null = (text, text_mask), (np.zeros_like(text), text_mask)
""",
}
# Replacements that make the snippets faster.
SMALLER = {
    "steps=400": "steps=2",
    "steps=20": "steps=2",
    "count=100": "count=10",
    "(64, 64, 4)": "(8, 8, 4)",
    "(1, 64, 64, ": "(1, 8, 8, ",
    "images[:100]": "images[:4]",
    "schedule.betas[:501]": "schedule.betas[:3]",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, random_params):
    """The files that the snippets need, under the names that the pages use."""
    root = tmp_path_factory.mktemp("pages")
    pipeline, with_sizes = root / "PixArt-XL-2-512x512", root / "PixArt-XL-2-1024-MS"
    foreign.save_pipeline(pipeline, foreign.diffusers_model(**NUMBERS, sizes=False))
    shutil.copytree(pipeline, with_sizes, ignore=shutil.ignore_patterns("transformer"))
    foreign.diffusers_model(**{**NUMBERS, "width": 96}, sizes=True).save_pretrained(
        with_sizes / "transformer"
    )

    def quiet(line):
        pass

    adapter = tiny.make_adapter(config=pixart_jax.load_model(pipeline).config)
    write_comfyui(root / "pixel-art.safetensors", adapter)
    save_file(foreign.official_state_dict(**NUMBERS, sizes=False), root / "official.safetensors")
    official = root / "PixArt-XL-2-512x512.pth"
    convert(root / "official.safetensors", official, "official", num_heads=16, say=quiet)
    convert(official, root / "runs" / "finetune", "checkpoint", say=quiet)
    save_inception(root / "inception-2015-12-05.pt")
    save_clip(root / "clip-vit-large-patch14")
    (root / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(root / "photos" / f"{number}.png")
    shutil.copy(root / "photos" / "0.png", root / "corgi.png")
    (root / "configs").mkdir()
    for stage in ("stage1", "stage2", "stage3"):  # of `make demo`
        demo = tiny_config(root, stage)
        pixart_jax.write_weights(root / "demo" / stage, random_params(demo.model)[1], demo)
    config = (ROOT / "configs" / "digits.py").read_text()
    assert "depth=4, hidden_size=72" in config
    (root / "configs" / "digits.py").write_text(
        config.replace("depth=4, hidden_size=72", "depth=1, hidden_size=24")
    )
    return root


def test_all_calls_of_the_package_are_in_snippets_that_are_run():
    assert {"README.md", "python.md", "sampling.md"} <= {path.name for path in PAGES}
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        rest = SNIPPET.sub("", path.read_text())
        assert not re.search(r"^    .*\bpixart_jax\.\w+\(", rest, re.MULTILINE), path.name


def program(path):
    """The snippets of a page, after the names that it uses without defining them."""
    text = path.read_text()
    # Every line keeps its line number on the page, so that tracebacks refer to the page.
    lines = [""] * (text.count("\n") + 1)
    for match in SNIPPET.finditer(text):
        first = text[: match.start(1)].count("\n")
        code = match[1].splitlines()
        lines[first : first + len(code)] = code
    code = "\n".join(lines)
    for large, small in SMALLER.items():
        code = code.replace(large, small)
    return GIVEN.get(path.name, ""), code, str(path)


# Each page has its own names. One process for all imports the packages and compiles once.
RUN = """
import json, sys, traceback
errors = {}
for given, code, path in json.load(sys.stdin):
    names = {"__name__": "__main__"}
    try:
        exec(given, names)
        exec(compile(code, path, "exec"), names)
    except BaseException:
        errors[path] = traceback.format_exc()
with open("errors.json", "w") as file:
    json.dump(errors, file)
"""


@pytest.fixture(scope="module")
def errors(folder):
    """The traceback of each page whose snippets fail."""
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=folder,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        input=json.dumps([program(path) for path in PAGES]),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "errors.json").read_text())


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_snippets_of_a_page_run(path, errors):
    assert str(path) not in errors, errors[str(path)]


def test_the_page_on_python_names_everything_that_is_public():
    text = (ROOT / "docs" / "python.md").read_text()
    assert [name for name in pixart_jax.__all__ if f"`{name}`" not in text] == []
