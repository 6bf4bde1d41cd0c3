"""Runs the notebooks from top to bottom, as a reader does, on tiny models."""

from pathlib import Path

import foreign
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import pixart_jax
from pixart_jax.convert import convert

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]


def run(name: str, folder: Path, **parameters) -> list[str]:
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
    path = f"import sys; sys.path.insert(0, {str(ROOT)!r})"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(path))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    return [output.text for output in outputs if output.output_type == "stream" and output.name == "stdout"]


def test_export_to_pytorch(tmp_path):
    numbers = {**foreign.SIZES["small"], "sizes": True}
    foreign.save_pipeline(tmp_path / "base", foreign.diffusers_model(**{**numbers, "sizes": False}))
    save_file(foreign.official_state_dict(**numbers), tmp_path / "official.safetensors")
    convert(
        tmp_path / "official.safetensors", tmp_path / "run", "checkpoint", num_heads=4, say=lambda line: None
    )
    printed = run(
        "export_to_pytorch.ipynb", tmp_path, CHECKPOINT="run", PIPELINE="base", OUTPUT="out", SIDE=64, STEPS=3
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
