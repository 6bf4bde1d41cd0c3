"""What importing the package does."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import pixart_jax
from pixart_jax.pipeline import load_pipeline

PACKAGE = Path(pixart_jax.__file__).parent


def run(program: str, **environment) -> str:
    """Runs a program in a separate process, and returns what it prints."""
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PJRT_NPROC")}
    return subprocess.check_output([sys.executable, "-c", program], env=kept | environment, text=True).strip()


def test_public_names_are_found_when_first_used():
    assert all(getattr(pixart_jax, name) for name in pixart_jax.__all__)
    assert pixart_jax.load_pipeline is load_pipeline and set(pixart_jax.__all__) <= set(dir(pixart_jax))
    with pytest.raises(AttributeError, match="load_modell"):
        _ = pixart_jax.load_modell


def test_importing_the_package_loads_nothing_else():
    program = "import sys, pixart_jax; print(sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = ast.literal_eval(run(program))
    assert not {"jax", "flax", "numpy", "absl"} & set(loaded)
    ours = "import sys, pixart_jax; print([name for name in sys.modules if name.startswith('pixart_jax.')])"
    assert run(ours) == "[]"


def test_type_checkers_see_the_names_that_programs_get():
    """The imports under `TYPE_CHECKING` and the table of modules in `__init__.py` have the same names."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (
        node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = {}
    for node in block.body:
        for alias in node.names:
            assert alias.asname == alias.name  # otherwise it is private to the package
            seen[alias.name] = node.module
    assert seen.keys() == set(pixart_jax.__all__)
    for name, home in seen.items():
        value = getattr(pixart_jax, name)
        if isinstance(value, ModuleType):
            assert home == "pixart_jax" and value.__name__ == f"pixart_jax.{name}"
        else:
            assert value is getattr(sys.modules[home], name), name


def test_no_public_name_depends_on_what_was_imported_before():
    """Importing `pixart_jax.train` sets the attribute `train`, which must not replace a function."""
    submodules = {path.stem for path in PACKAGE.iterdir()}
    for name in submodules & set(pixart_jax.__all__):
        assert isinstance(getattr(pixart_jax, name), ModuleType), name
    # Before and after the import, as an attribute and by all kinds of import.
    program = """
import pixart_jax
first = pixart_jax.train
from pixart_jax.train import train
import pixart_jax.train as second
from pixart_jax import train as third
print(first is second is third is pixart_jax.train, first.train is train)
"""
    assert run(program) == "True True"


def test_simulated_devices_have_threads_for_their_collectives():
    """By default XLA has one thread per device, and a program with two independent collectives would hang."""

    def threads(**environment):
        return run("import os, pixart_jax; print(os.environ.get('PJRT_NPROC'))", **environment)

    assert threads() == "None"
    assert threads(XLA_FLAGS="--xla_force_host_platform_device_count=1") == "None"
    assert threads(XLA_FLAGS="--a=1 --xla_force_host_platform_device_count=8") == "128"
    assert threads(XLA_FLAGS="--xla_force_host_platform_device_count=8", PJRT_NPROC="20") == "20"


def test_a_command_that_is_interrupted_while_it_imports_ends_at_once(tmp_path):
    """An exception would be printed with a traceback, and an import could swallow it."""
    stub = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)
except KeyboardInterrupt:
    pass
"""
    (tmp_path / "jax.py").write_text(stub)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{PACKAGE.parent}"}
    # The shell in which the tests run may ignore Ctrl-C, and processes inherit this.
    reset = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, "
    code = f"{reset} [sys.executable, '-m', 'pixart_jax.train', '--config=digits:stage1'])"
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (130, "interrupted: the same command continues\n")
