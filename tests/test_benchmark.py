import json
import subprocess
import sys
from pathlib import Path

import pytest

from pixart_jax.benchmark import MODES, Flags, main
from pixart_jax.benchmarking import compile
from pixart_jax.benchmarking.flops import forward_flops
from pixart_jax.config import FeaturesConfig, MeshConfig, PixArtConfig, TrainConfig, to_config_dict
from pixart_jax.errors import UserError

ROOT = Path(__file__).parent.parent

# Makes importing the packages in `HEAVY` fail, as on a machine with an accelerator and few packages.
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
    """It has jax, flax, optax, einops, numpy, ml_collections and absl (JAX itself may look for etils)."""
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
    with pytest.raises(UserError, match=f"choose one of {', '.join(MODES)}"):
        main(Flags(words=tuple(words)))


def command(*arguments, status):
    done = subprocess.run(
        [sys.executable, "-m", "pixart_jax.benchmark", *arguments],
        cwd=ROOT,
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
def test_a_compiled_program_may_use_the_kernels_of_its_topology(
    monkeypatch, capsys, topology, attention, message
):
    monkeypatch.setattr(compile, "check", lambda config, topology, **options: {"fits": True})
    monkeypatch.setattr(compile, "summary", lambda report: "")
    config = to_config_dict(TrainConfig(model=PixArtConfig(dtype="bfloat16")))
    config.model.attention = attention
    given = Flags(words=("compile",), config=config, topology=topology)
    if message:
        with pytest.raises(UserError, match=message):
            main(given)
    else:
        assert main(given) == 0
        assert f"attention: {attention}" in capsys.readouterr().out


CONFIG = TrainConfig(
    name="tiny",
    model=PixArtConfig(size="custom", depth=1, hidden_size=24, num_heads=2, text_dim=8, text_length=5),
    features=FeaturesConfig(image_size=32, text_length=5),
    mesh=MeshConfig(fsdp=8),
)


def test_what_is_missing_is_named():
    assert "--config is missing" in command("compile", status=2).stderr
    with pytest.raises(UserError, match=r"^--topology is missing"):
        main(Flags(words=("compile",), config=to_config_dict(CONFIG)))
    with pytest.raises(UserError, match=r"^--stages, --hardware, --rates are missing"):
        main(Flags(words=("recipe",)))


@pytest.mark.parametrize(
    ("mode", "flags", "evaluations"),
    [("train", {"parts": False}, 3), ("sample", {"steps": 3, "guidance_scale": 1.0}, 3)],
)
def test_the_flags_reach_the_measurement(mode, flags, evaluations, tmp_path, capsys):
    """Training counts as three evaluations of the model, because of the gradient."""
    out = tmp_path / "new" / "result.json"
    size = {"batch": 16, "height": 48, "width": 32}
    config = to_config_dict(CONFIG)
    main(Flags(words=(mode,), config=config, out=str(out), rounds=2, calls=1, **size, **flags))
    result = json.loads(out.read_text())
    assert (result["batch_size"], result["latent"]) == (16, [6, 4])
    flops = forward_flops(CONFIG.model, 6, 4, 5).total
    assert result["model_tflop_per_image"] == pytest.approx(evaluations * flops / 1e12, rel=0.1)
    assert not result.get("parts")
    assert "16 images in" in capsys.readouterr().out
