"""Runs the notebooks from top to bottom, as a reader does, on tiny models, and checks their texts."""

import asyncio
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import foreign
import jax
import numpy as np
import pytest
import scripts
import tiny
from PIL import Image
from safetensors.numpy import load_file, save_file

import pixart_jax
from pixart_jax.config import (
    FeaturesConfig,
    PixArtConfig,
    TextEncoderConfig,
    TrainConfig,
    to_config_dict,
)
from pixart_jax.convert import convert
from pixart_jax.denoiser import init_params
from pixart_jax.weights.adapter_export import write_peft
from pixart_jax.weights.checkpoints import read_weights, write_weights
from pixart_jax.weights.loading import read_any

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
jupyter_client = pytest.importorskip("jupyter_client")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


costs = scripts.imported("benchmarks/notebook_costs.py")
badges = scripts.imported("notebooks/badges.py")

# A network on pixels, which needs no VAE, and a tokenizer of bytes, which needs no files.
TINY = TrainConfig(
    model=PixArtConfig(
        size="custom",
        depth=2,
        hidden_size=48,
        num_heads=4,
        in_channels=3,
        patch_size=4,
        base_size=8,
        text_dim=64,
        text_length=32,
        dtype="float32",
        remat="none",
    ),
    features=FeaturesConfig(
        codec="pixels",
        vae="",
        latent_scale=1.0,
        text_length=32,
        text_encoder=TextEncoderConfig(
            tokenizer="byt5",
            weights="random",
            d_model=64,
            d_ff=128,
            d_kv=16,
            num_heads=4,
            num_layers=2,
            dtype="float32",
        ),
    ),
)


def write_tiny(folder: Path, *, noise: float = 0.1) -> dict:
    """Writes a checkpoint with random weights, and returns the fields that make a config one for them."""
    rng = np.random.default_rng(0)
    # The last layer is initialized with zeros; without noise the network would predict only zeros.
    params = jax.tree.map(
        lambda leaf: leaf + noise * rng.standard_normal(leaf.shape, np.float32), init_params(TINY.model, 0)
    )
    write_weights(folder, params, TINY)
    values = to_config_dict(TINY)
    fields = {"init.path": str(folder), "log.sample_every": 0}
    for section in ("model", "features", "features.text_encoder"):
        part = values
        for name in section.split("."):
            part = part[name]
        fields |= {f"{section}.{name}": value for name, value in part.items() if not hasattr(value, "items")}
    return fields


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
    # 256 would be the mean difference of images that have nothing in common.
    assert float(re.search(r"mean difference ([\d.]+) of 255", text)[1]) < 1
    assert (tmp_path / "out" / "pipeline" / "README.md").exists()
    exported, original = (
        load_file(tmp_path / name) for name in ("out/pixart.safetensors", "official.safetensors")
    )
    for name, value in original.items():
        np.testing.assert_allclose(exported[name], value, rtol=0, atol=2e-7)
    assert pixart_jax.load_model(tmp_path / "out" / "pixart.pth").config.num_heads == 4


def test_sample(kernel, tmp_path):
    write_tiny(tmp_path / "weights")
    write_peft(tmp_path / "lora", tiny.make_adapter(config=TINY.model))
    few = dict(STEPS=3, STEP_COUNTS=[2, 3], GUIDANCE_SCALES=[4.5], SEEDS=2)
    samplers = {"dpm_solver": 3, "ddim": 3}  # each takes seconds to compile
    given = dict(WEIGHTS="weights", ADAPTER="lora", OUTPUT="out", SAMPLERS=samplers)
    text = "".join(run(kernel, "sample.ipynb", tmp_path, **given, **few))
    assert "2 blocks of width 48" in text
    assert "largest difference 0 of 255" in text and "ADAPTER is empty" not in text
    pictures = [Image.open(path) for path in (tmp_path / "out").glob("*.png")]
    assert len(pictures) == 6 and all(picture.size == (32, 32) for picture in pictures)


def test_finetune(kernel, tmp_path):
    fields = write_tiny(tmp_path / "weights", noise=0.0)
    # For training from random weights: a higher learning rate and weaker gradient clipping.
    for name, value in dict(learning_rate=3e-3, sqrt_scaling_batch=0, clip_norm=1.0, accumulation=1).items():
        fields[f"optimizer.{name}"] = value
    sizes = dict(STEPS=30, BATCH_SIZE=16, SAMPLE_STEPS=3)
    text = "".join(run(kernel, "finetune.ipynb", tmp_path, OVERRIDES=fields, OUTPUT="out", **sizes))
    assert "64 images, for example" in text and f"weights from {tmp_path / 'weights'}" in text
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
    fields = write_tiny(tmp_path / "weights")
    fields |= {"optimizer.learning_rate": 1e-2, "optimizer.warmup_steps": 0, "optimizer.accumulation": 1}
    fields["adapter.base_dtype"] = "float32"
    sizes = dict(STEPS=10, BATCH_SIZE=8, SAMPLE_STEPS=2)
    text = "".join(run(kernel, "lora.ipynb", tmp_path, OVERRIDES=fields, OUTPUT="out", **sizes))
    assert "lora of rank 16" in text and "20 modules of rank 16" in text
    assert "mean difference" in text and "mean difference 0.0" not in text
    adapter = load_file(tmp_path / "out/peft/adapter_model.safetensors")
    assert len(adapter) == 40 and all(value.any() for value in adapter.values())
    assert (tmp_path / "out/comfyui.safetensors").exists()

    # After a disconnect: all cells again.
    fields.pop("optimizer.accumulation")
    text = "".join(
        run(kernel, "lora.ipynb", tmp_path, OVERRIDES=fields, OUTPUT="out", **sizes | {"STEPS": 12})
    )
    assert "of which 1 are done" in text and "/run at step 10" in text and "is complete at step 12" in text


def test_train(kernel, tmp_path):
    few = dict(STEPS={"stage1": 20, "stage2": 20}, SAMPLES=10)
    text = "".join(run(kernel, "train.ipynb", tmp_path, **few))
    assert "read as requested; real scans: 9" in text
    _, config = read_weights(tmp_path / "demo/stage2")
    assert config.steps == 20 and config.init.path.endswith("demo/stage1")


# --- Texts --------------------------------------------------------------------------------------------


def cells(path: Path) -> list:
    return nbformat.read(path, as_version=4).cells


def code(path: Path) -> list[str]:
    return [cell.source for cell in cells(path) if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_on_colab_as_it_stands(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert "OWNER" not in path.read_text()
    assert notebook.metadata.accelerator == "GPU" and notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.colab == {"name": path.name, "provenance": []}
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    assert code(path)[:2] == code(NOTEBOOKS[0])[:2]
    settings = [cell.source for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    assert len(settings) == 1 and settings[0].startswith("# @title Settings")
    assert all("# @param" in line for line in settings[0].splitlines()[1:])


HEAVY = re.compile(
    r"\b(?:pipe|sample|theirs|train|precompute|convert|read_any|load_pipeline|transformer|measure)\("
)


@pytest.mark.parametrize(
    "path", [path for path in NOTEBOOKS if path.stem != "train"], ids=lambda path: path.stem
)
def test_the_cell_before_a_heavy_one_says_its_time_and_memory(path):
    before = {cell.source: above.source for above, cell in zip(cells(path), cells(path)[1:])}
    heavy = [source for source in code(path)[1:] if HEAVY.search(source)]
    assert len(heavy) >= 4
    for source in heavy:
        assert re.search(rf"^{re.escape(costs.MARK)} .*\d", before[source], re.MULTILINE), source


def test_time_and_memory_are_those_that_the_script_estimates():
    for name, expected in costs.lines().items():
        text = "\n".join(cell.source for cell in cells(ROOT / "notebooks" / name))
        found = [line.removeprefix(f"{costs.MARK} ") for line in text.splitlines() if costs.MARK in line]
        assert found == expected


# --- The cell that installs the package ---------------------------------------------------------------


def install(monkeypatch, repository="", gpu="", devices=()):
    """Runs the cell where the package is missing, and returns what pip is asked for."""
    asked = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: gpu and name)
    monkeypatch.setattr(subprocess, "check_output", lambda query, text: gpu)
    monkeypatch.setattr(subprocess, "check_call", asked.append)
    monkeypatch.setattr(
        Path, "glob", lambda folder, pattern: [d for d in devices if Path(d).parent == folder]
    )
    source = code(NOTEBOOKS[0])[0].replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}")
    exec(source, {})
    assert asked[0][:4] == [sys.executable, "-m", "pip", "install"] and len(asked) == 1
    return asked[0][-1]


@pytest.mark.parametrize(
    ("gpu", "devices", "extras"),
    [
        ("580.95.05, 7.5\n", (), "[cuda,notebooks]"),
        ("580.95.05, 8.0\n580.95.05, 8.0\n", (), "[cuda,notebooks]"),
        ("550.54.15, 8.9\n", (), "[cuda12,notebooks]"),
        ("580.95.05, 7.0\n", (), "[cuda12,notebooks]"),
        ("", ("/dev/accel0",), "[tpu,notebooks]"),
        ("", ("/dev/vfio/0",), "[tpu,notebooks]"),
        ("", (), "[notebooks]"),
    ],
)
def test_the_first_cell_installs_what_the_machine_needs(gpu, devices, extras, monkeypatch):
    assert install(monkeypatch, "", gpu, devices) == f"pixart_jax{extras}"


def test_the_first_cell_installs_a_clone(monkeypatch, tmp_path):
    assert install(monkeypatch, str(tmp_path)) == f"{tmp_path}[notebooks]"
    address = "https://example.org/clone.git"
    assert install(monkeypatch, address) == f"pixart_jax[notebooks] @ git+{address}"


# --- Badges -------------------------------------------------------------------------------------------


def test_badges_are_those_of_the_repository(tmp_path):
    names = ("pyproject.toml", *badges.PAGES, *(f"notebooks/{path.name}" for path in NOTEBOOKS))
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    badges.main(tmp_path)
    for name in names:  # they are up to date
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), "run notebooks/badges.py"

    project = tmp_path / "pyproject.toml"
    text = re.sub(r"(?m)^Repository = .*\n", "", project.read_text())
    with_address = text.replace(
        "[project.urls]\n", '[project.urls]\nRepository = "https://github.com/a/b.c"\n'
    )
    for given, count in ((text, 0), (with_address, 1), (with_address, 1), (text, 0)):
        project.write_text(given)
        badges.main(tmp_path)
        for path in NOTEBOOKS:
            address = f"https://colab.research.google.com/github/a/b.c/blob/main/notebooks/{path.name}"
            first = cells(tmp_path / "notebooks" / path.name)[0].source
            assert first.count(address) == first.count("[![Open in Colab]") == count
            assert first.splitlines()[2 * count].startswith("# ")
            assert (tmp_path / "docs/install.md").read_text().count(address) == count

    project.write_text(with_address.replace("github.com", "example.org"))
    with pytest.raises(SystemExit, match="Colab opens notebooks from"):
        badges.main(tmp_path)
