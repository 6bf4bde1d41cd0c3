import subprocess
import sys
from pathlib import Path

import pytest

from pixart_jax.benchmark import MODES, main
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
    """jax, flax, optax, einops, numpy, ml_collections and absl; jax.experimental may look for etils itself."""
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


def test_what_is_missing_is_named():
    assert "--topology is missing" in command("compile", "--config=configs/digits.py:stage1", status=2).stderr
    assert "--config is missing" in command("compile", status=2).stderr
    assert "--stages is missing" in command("recipe", status=2).stderr
