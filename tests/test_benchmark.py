import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pixart_jax.benchmark import MODES, main
from pixart_jax.benchmarking import throughput
from pixart_jax.config import PixArtConfig, TrainConfig, to_config_dict
from pixart_jax.errors import UserError

ROOT = Path(__file__).parent.parent

# What a bare accelerator machine has, beside these and the standard library, is not asked for.
BARE = """
import sys

HEAVY = {heavy}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise ImportError(name + " is not here")

sys.meta_path.insert(0, Refuse())
"""
HEAVY = (
    *(
        "orbax",
        "grain",
        "array_record",
        "tensorboardX",
        "transformers",
        "tensorflow_datasets",
        "torch",
        "tqdm",
    ),
    *("PIL", "safetensors", "sklearn", "ftfy", "bs4", "pyarrow", "etils", "tokenizers", "huggingface_hub"),
)


def bare(program, status=0):
    text = BARE.format(heavy=HEAVY) + program
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def test_a_bare_machine_is_enough():
    """jax, flax, optax, einops, numpy, ml_collections and absl (JAX itself may look for etils)."""
    bare(
        "HEAVY = tuple(name for name in HEAVY if name != 'etils')\n"
        "import pkgutil, importlib\n"
        "for package in ('models', 'diffusion', 'benchmarking'):\n"
        "    folder = importlib.import_module('pixart_jax.' + package)\n"
        "    for module in pkgutil.iter_modules(folder.__path__):\n"
        "        importlib.import_module(f'pixart_jax.{package}.{module.name}')\n"
        "import pixart_jax.benchmark\n"
    )
    assert "orbax is not here" in bare("import pixart_jax.training.checkpoints", status=1).stderr


@pytest.mark.parametrize("words", [[], ["compil"], ["train", "more"]])
def test_modes_are_named(words):
    with pytest.raises(UserError, match=f"takes one of {', '.join(MODES)}"):
        main({}, [sys.argv[0], *words])


def command(*arguments, status):
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    import os

    done = subprocess.run(
        [sys.executable, "-m", "pixart_jax.benchmark", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


def test_a_compile_check_ends_with_1_when_it_does_not_fit(tmp_path):
    stage = ["--config=configs/digits.py:stage2", "--config.model.depth=1", "--nosearch"]
    out = tmp_path / "report.json"
    done = command("compile", *stage, "--topology=cpu:8", "--memory_gib=0.0001", f"--out={out}", status=1)
    assert "DOES NOT FIT" in done.stdout and out.exists()


@pytest.mark.parametrize(
    ("topology", "attention", "message"),
    [
        ("h100:8", "cudnn", ""),
        ("v5e:2x2", "splash", ""),
        ("h100:8", "splash", "the backend is gpu, it needs a TPU"),
        ("cpu:8", "cudnn", "the backend is cpu, it needs a GPU"),
    ],
)
def test_what_is_compiled_may_ask_for_the_kernels_of_its_topology(monkeypatch, topology, attention, message):
    given = to_config_dict(TrainConfig(model=PixArtConfig(dtype="bfloat16")))
    given.model.attention = attention
    values = {"config": given, "topology": topology}
    holders = {name: SimpleNamespace(value=value) for name, value in values.items()}
    monkeypatch.setitem(MODES, "compile", lambda config, values: config.model.attention)
    if message:
        with pytest.raises(UserError, match=message):
            main(holders, ["benchmark", "compile"])
    else:
        assert main(holders, ["benchmark", "compile"]) == attention


def test_what_is_missing_is_named():
    assert "--topology is missing" in command("compile", "--config=configs/digits.py:stage1", status=2).stderr
    assert "--config is missing" in command("compile", status=2).stderr
    assert "--stages is missing" in command("recipe", status=2).stderr


RESULT = {
    "images_per_second": 10.0,
    "batch_size": 8,
    "seconds": {"median": 0.8, "fastest": 0.7, "slowest": 0.9},
    "model_tflops": 2.0,
    "matrix_peak_tflops": 5.0,
    "share_of_matrix_peak": 0.4,
    "datasheet_tflops": 8.0,
    "share_of_datasheet": 0.25,
    "compilation": {"lowering_seconds": 1.0, "compile_seconds": 2.0, "from_cache": True},
    "memory": {"device_peak_GiB": 3.5, "process_peak_GiB": 1.0},
    "parts": {"ema": {"median": 0.01}},
    "shards": {"waiting_share": 0.0012},
}
GIVEN = {
    "batch": 8,
    "height": 512,
    "width": None,
    "rounds": 2,
    "calls": 1,
    "profile": "",
    "data": "shards",
    "parts": False,
    "sampler": "dpm_solver",
    "steps": 5,
    "guidance_scale": 1.0,
}


@pytest.mark.parametrize("mode", ["train", "sample"])
def test_a_measurement_is_told_and_written(mode, monkeypatch, tmp_path, capsys):
    asked = {}

    def measure(config, **options):
        asked.update(options, batch=config.data.batch_size)
        return RESULT

    monkeypatch.setattr(throughput, f"benchmark_{mode}", measure)
    out = tmp_path / "new" / "result.json"
    MODES[mode](TrainConfig(model=PixArtConfig()), {**GIVEN, "out": str(out)})
    assert json.loads(out.read_text()) == RESULT
    shared = {"batch": 8, "height": 512, "width": None, "rounds": 2, "calls": 1, "profile": ""}
    own = {
        "train": {"data": "shards", "parts": False},
        "sample": {"sampler": "dpm_solver", "steps": 5, "scale": 1.0},
    }[mode]
    assert asked == shared | own
    told = capsys.readouterr().out
    assert "10 img/s: 8 images in 0.8 s (0.7 to 0.9)" in told
    assert "40.0% of the 5 measured here, 25.0% of the datasheet's 8" in told
    assert "from the cache" in told and "3.50 GiB" in told and "0.12% of the time waiting" in told
