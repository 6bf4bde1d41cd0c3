"""The wheel of this project, built and installed in a new environment."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import xla_flags

ROOT = Path(__file__).parents[1]


def _environment():
    """The environment of this process, without what tests set to find this checkout and simulated devices."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "XLA_FLAGS")}


def build(out):
    """Builds the sdist, and the wheel from it; returns their paths."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def install(wheel, home):
    """Installs a wheel in a new environment, and returns the folder of its scripts.

    Its dependencies are those of this environment; without network they cannot be installed again.
    """
    venv.create(home, with_pip=False)
    pip = [sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", wheel], check=True, env=_environment())
    (site,) = home.glob("lib/python*/site-packages")
    # A plain path: .pth files in this folder, such as that of an editable installation, are not read.
    (site / "dependencies.pth").write_text(str(Path(pytest.__file__).parents[1]) + "\n")
    return home / "bin"


def run(scripts, script, *arguments, cwd, **environment):
    """Runs a script of the new environment, and returns what it prints."""
    done = subprocess.run(
        [scripts / script, *arguments],
        cwd=cwd,
        env=_environment() | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags.ONE_DEVICE} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{script} {' '.join(arguments)}\n{done.stdout}{done.stderr}"
    return done.stdout
