"""The console scripts."""

import subprocess
import sys

import pytest

from pixart_jax.cli import COMMANDS

# Packages that take long to import, and that only the work of a command needs.
SLOW = (
    "jax",
    "flax",
    "transformers",
    "torch",
    "scipy",
    "tensorflow",
    "tensorflow_datasets",
    "grain",
    "pyarrow",
)


def run(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_does_not_wait_for_slow_packages(name):
    done = run(
        f"""
import atexit, sys
from pixart_jax.cli import main
sys.argv = ["pixart-{name}", "--help"]
atexit.register(lambda: print([name for name in {SLOW} if name in sys.modules], file=sys.stderr))
main()
"""
    )
    assert done.returncode == 0 and done.stderr == "[]\n", done.stderr
    assert "flags:" in done.stdout


def test_a_config_is_read_without_jax():
    done = run(
        """
import sys
from pixart_jax.config import from_file
from_file("stage3:512")
print("jax" in sys.modules)
"""
    )
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize("arguments", [["trian"], ["trian", "--help"]])
def test_an_unknown_command_is_an_input_error(arguments):
    done = subprocess.run([sys.executable, "-m", "pixart_jax", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "command 'trian'" in done.stderr and "Did you mean 'train'?" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_without_a_command_all_are_listed(arguments):
    done = subprocess.run([sys.executable, "-m", "pixart_jax", *arguments], capture_output=True, text=True)
    assert done.returncode == 0 and all(f"  {name}" in done.stdout for name in COMMANDS)


def test_ctrl_c_ends_a_script_while_it_imports(tmp_path):
    """As with `python -m`: see tests/test_init.py."""
    (tmp_path / "jax.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = run(
        f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {str(tmp_path)!r})
sys.argv = ["pixart-train", "--config=digits:stage1"]
from pixart_jax.cli import main
main()
"""
    )
    assert (done.returncode, done.stderr) == (130, "interrupted: the same command continues\n")
