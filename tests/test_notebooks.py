"""Runs the notebooks from top to bottom, as a reader does, on tiny models."""

import asyncio
import json
import os
from pathlib import Path

import foreign
import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import pixart_jax
from pixart_jax.convert import convert
from pixart_jax.weights.checkpoints import read_weights
from pixart_jax.weights.loading import read_any

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
jupyter_client = pytest.importorskip("jupyter_client")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def kernel():
    """One process for all notebooks: it imports the packages once. Each notebook starts without variables."""
    manager = jupyter_client.AsyncKernelManager(kernel_name="python3")
    yield manager
    asyncio.run(manager.shutdown_kernel(now=True))


def run(kernel, name: str, folder: Path, **parameters) -> list[str]:
    """Executes a notebook with its settings replaced, and returns what its cells print."""
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs before committing"
    settings = next(
        i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())
    )
    known = {line.split(" = ")[0] for line in notebook.cells[settings].source.splitlines()}
    assert parameters.keys() <= known
    text = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    notebook.cells.insert(settings + 1, nbformat.v4.new_code_cell(text))
    # One device, because eight simulated ones would only make a notebook slower.
    flags = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
    setup = f"""%reset -f
import os, sys
sys.path.insert(0, {str(ROOT)!r})
os.environ["XLA_FLAGS"] = {flags!r}
os.chdir({str(folder)!r})
del os, sys"""
    notebook.cells.insert(0, nbformat.v4.new_code_cell(setup))
    nbclient.NotebookClient(notebook, kernel, timeout=300).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    return [output.text for output in outputs if output.output_type == "stream" and output.name == "stdout"]


def test_export_to_pytorch(kernel, tmp_path):
    numbers = {**foreign.SIZES["small"], "sizes": True}
    foreign.save_pipeline(tmp_path / "base", foreign.diffusers_model(**{**numbers, "sizes": False}))
    save_file(foreign.official_state_dict(**numbers), tmp_path / "official.safetensors")
    convert(
        tmp_path / "official.safetensors", tmp_path / "run", "checkpoint", num_heads=4, say=lambda line: None
    )
    printed = run(
        kernel,
        "export_to_pytorch.ipynb",
        tmp_path,
        CHECKPOINT="run",
        PIPELINE="base",
        OUTPUT="out",
        SIDE=64,
        STEPS=3,
    )
    text = "".join(printed)
    assert "largest difference" in text and "size conditions folded for 64x64" in text
    assert "the same 39 arrays" in text
    assert (tmp_path / "out" / "pipeline" / "README.md").exists()
    exported, original = (
        load_file(tmp_path / name) for name in ("out/pixart.safetensors", "official.safetensors")
    )
    for name, value in original.items():
        np.testing.assert_allclose(exported[name], value, rtol=0, atol=2e-7)
    assert pixart_jax.load_model(tmp_path / "out" / "pixart.pth").config.num_heads == 4


def test_sample(kernel, tmp_path):
    few = dict(STEPS=3, STEP_COUNTS=[2, 3], GUIDANCE_SCALES=[4.5])
    samplers = {"dpm_solver": 3, "ddim": 3}  # each takes seconds to compile
    text = "".join(run(kernel, "sample.ipynb", tmp_path, SIZE="tiny", OUTPUT="out", SAMPLERS=samplers, **few))
    assert "2 blocks of width 48" in text
    assert "largest difference 0 of 255" in text
    pictures = [Image.open(path) for path in (tmp_path / "out").glob("*.png")]
    assert len(pictures) == 3 and all(picture.size == (32, 32) for picture in pictures)


def test_finetune(kernel, tmp_path):
    config = str(ROOT / "configs/finetune.py")
    sizes = dict(STEPS=30, BATCH_SIZE=16, SAMPLE_STEPS=3)
    text = "".join(run(kernel, "finetune.ipynb", tmp_path, SIZE="tiny", CONFIG=config, OUTPUT="out", **sizes))
    assert "64 images, for example" in text and "weights from out/tiny" in text
    assert "mean difference 0.0" not in text
    out = tmp_path / "out"
    losses = [json.loads(line)["loss"] for line in (out / "run/metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.9 * losses[0]
    trained, _ = read_weights(out / "run")
    for exported in (out / "diffusers", out / "finetuned.safetensors"):
        params = read_any(exported, num_heads=4).params
        for name in ("patch_embed", "text_proj"):
            jax.tree.map(np.testing.assert_array_equal, params[name], trained[name])


def test_lora(kernel, tmp_path):
    config = str(ROOT / "configs/lora.py")
    sizes = dict(STEPS=10, BATCH_SIZE=8, SAMPLE_STEPS=2)
    text = "".join(run(kernel, "lora.ipynb", tmp_path, SIZE="tiny", CONFIG=config, OUTPUT="out", **sizes))
    assert "lora of rank 16" in text and "20 modules of rank 16" in text
    assert "mean difference" in text and "mean difference 0.0" not in text
    adapter = load_file(tmp_path / "out/peft/adapter_model.safetensors")
    assert len(adapter) == 40 and all(value.any() for value in adapter.values())
