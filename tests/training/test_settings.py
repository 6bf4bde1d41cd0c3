"""Settings that commands apply before JAX starts, on machines with and without an NVIDIA GPU or a TPU."""

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pixart_jax.errors import UserError
from pixart_jax.training import settings
from pixart_jax.training.settings import (
    DETERMINISTIC_FLAG,
    GPU_FLAGS,
    TPU_FLAGS,
    apply_settings,
    say_how_a_run_resumes,
)

ROOT = Path(__file__).parents[2]
PLUGIN = [SimpleNamespace(name="xla_cuda13")]
VARIABLES = ("XLA_FLAGS", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "LIBTPU_INIT_ARGS")


class Machine:
    """A fake machine with JAX's CUDA plugin on which JAX has not started, and its resulting settings."""

    def __init__(self, monkeypatch):
        self.started, self.backend, self.plugins, self.lines = False, "gpu", PLUGIN, []
        self.tpus = 0
        self.config = SimpleNamespace(jax_platforms=None, jax_optimization_level="UNKNOWN")
        self.config.update = lambda name, value: setattr(self.config, name, value)
        jax = SimpleNamespace(config=self.config, default_backend=lambda: self.backend)
        bridge = SimpleNamespace(backends_are_initialized=lambda: self.started)
        monkeypatch.setattr(settings, "jax", jax)
        chips = SimpleNamespace(num_available_tpu_chips_and_device_id=lambda: (self.tpus, None))
        monkeypatch.setattr(settings, "xla_bridge", bridge)
        monkeypatch.setattr(settings, "hardware_utils", chips)
        monkeypatch.setattr(settings, "entry_points", lambda group: self.plugins)
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)

    def apply(self, deterministic=False):
        apply_settings(deterministic, self.lines.append)
        return self.environment()

    def environment(self):
        return {name: os.environ[name] for name in VARIABLES if name in os.environ}


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def test_flags_memory_and_optimization_level_are_set_once_on_a_gpu(machine):
    first = machine.apply()
    assert first == {"XLA_FLAGS": " ".join(GPU_FLAGS), "XLA_CLIENT_MEM_FRACTION": "0.9"}
    assert machine.config.jax_optimization_level == "O1"
    assert machine.apply() == first, "a child process must not add the flags again"
    assert machine.lines == 2 * [
        f"XLA settings: XLA_FLAGS='{' '.join(GPU_FLAGS)}' XLA_CLIENT_MEM_FRACTION=0.9 "
        "JAX_OPTIMIZATION_LEVEL=O1"
    ]


def test_the_environment_takes_precedence(machine, monkeypatch):
    own = "--xla_gpu_all_reduce_combine_threshold_bytes=1 --xla_own=2"
    monkeypatch.setenv("XLA_FLAGS", own)
    # JAX raises if both names of the variable are set.
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    machine.config.jax_optimization_level = "O3"
    environment = machine.apply()
    assert environment.keys() == {"XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION"}
    assert environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    assert environment["XLA_FLAGS"].endswith(f" {own}")
    assert environment["XLA_FLAGS"].count("all_reduce_combine") == 1
    assert machine.lines[0].endswith("XLA_PYTHON_CLIENT_MEM_FRACTION=0.5 JAX_OPTIMIZATION_LEVEL=O3")


@pytest.mark.parametrize(
    ("platforms", "plugins", "applies"),
    [
        (None, PLUGIN, True),
        ("cuda,cpu", PLUGIN, True),
        ("gpu", PLUGIN, True),
        ("cpu", PLUGIN, False),
        (None, [SimpleNamespace(name="xla_rocm7")], False),
    ],
)
def test_settings_apply_only_if_jax_looks_for_an_nvidia_gpu(machine, platforms, plugins, applies):
    machine.config.jax_platforms, machine.plugins = platforms, plugins
    assert bool(machine.apply()) == bool(machine.lines) == applies
    assert (machine.config.jax_optimization_level == "O1") == applies


def test_determinism_adds_a_flag(machine):
    assert machine.apply(deterministic=True)["XLA_FLAGS"] == " ".join([*GPU_FLAGS, DETERMINISTIC_FLAG])


@pytest.mark.parametrize("value", ["", "=1", "=True"])
def test_determinism_may_come_from_the_environment(machine, monkeypatch, value):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_gpu_deterministic_ops{value}")
    machine.apply(deterministic=True)
    machine.started = True
    machine.apply(deterministic=True)


def test_flags_of_libtpu_are_set_on_a_tpu_unless_the_environment_has_them(machine, monkeypatch):
    machine.plugins, machine.tpus = [], 4
    own = "--xla_jf_spmd_threshold_for_windowed_einsum_mib=0 --own=1"
    monkeypatch.setenv("LIBTPU_INIT_ARGS", own)
    environment = machine.apply()
    assert environment == {"LIBTPU_INIT_ARGS": " ".join([*TPU_FLAGS[:-1], own])}
    assert machine.apply() == environment
    assert machine.lines[0] == f"TPU settings: LIBTPU_INIT_ARGS='{environment['LIBTPU_INIT_ARGS']}'"


@pytest.mark.parametrize(
    ("platforms", "tpus", "started"), [(None, 0, False), ("cpu", 4, False), (None, 4, True)]
)
def test_nothing_is_set_without_a_tpu_that_can_be_started(machine, platforms, tpus, started):
    machine.plugins, machine.tpus, machine.started = [], tpus, started
    machine.config.jax_platforms = platforms
    assert machine.apply() == {} and machine.lines == []


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra 'tpu'")
def test_libtpu_knows_every_flag():
    library = Path(importlib.util.find_spec("libtpu").origin).parent / "libtpu.so"
    text = library.read_bytes()
    for flag in TPU_FLAGS:
        assert flag.removeprefix("--").partition("=")[0].encode() in text


@pytest.mark.parametrize("started", [False, True])
def test_flags_that_contradict_the_config_raise(machine, monkeypatch, started):
    machine.started = started
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true --xla_gpu_deterministic_ops=false")
    with pytest.raises(UserError, match=r"XLA_FLAGS is '.*=false': remove the flag that turns it off"):
        machine.apply(deterministic=True)
    assert "XLA_CLIENT_MEM_FRACTION" not in machine.environment()


def test_settings_are_not_applied_after_jax_has_started_and_a_line_is_printed(machine):
    machine.started = True
    assert machine.apply() == {} and machine.config.jax_optimization_level == "UNKNOWN"
    assert machine.lines == [
        f"XLA settings: not applied, because JAX has already started: {' '.join(GPU_FLAGS)}"
    ]
    with pytest.raises(UserError, match=r"JAX has already started without it: call .* or start the process"):
        machine.apply(deterministic=True)
    machine.backend = "cpu"  # the plugin is installed, but there is no GPU
    machine.apply(deterministic=True)


def test_a_line_is_printed_if_resuming_is_not_bitwise(machine):
    say_how_a_run_resumes(True, machine.lines.append)
    assert not machine.lines
    say_how_a_run_resumes(False, machine.lines.append)
    assert "compile.deterministic is False" in machine.lines.pop()
    machine.backend = "cpu"
    say_how_a_run_resumes(False, machine.lines.append)
    assert not machine.lines


def test_every_flag_has_a_comment():
    lines = Path(settings.__file__).read_text().splitlines()
    flags = [(above, line) for above, line in itertools.pairwise(lines) if line.strip().startswith('"--xla')]
    assert len(flags) == len(GPU_FLAGS) + len(TPU_FLAGS)
    assert all(above.strip().startswith("# ") for above, _ in flags)


# --- With the installed compiler --------------------------------------------------------------------


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """The environment of a machine with a CUDA plugin but without a GPU."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "no_gpu.py").write_text("def initialize(): pass\n")
    installed = folder / "jax_cuda13_pjrt-0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: jax-cuda13-pjrt\nVersion: 0\n")
    (installed / "entry_points.txt").write_text("[jax_plugins]\nxla_cuda13 = no_gpu\n")
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return kept | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "JAX_PLATFORMS": ""}


def test_the_compiler_knows_every_flag_and_none_has_its_default_value(plugin, tmp_path):
    """XLA ends the process on an unknown flag, and dumps the flags that differ from their defaults."""
    program = (
        "import jax; from pixart_jax.training.settings import apply_settings; apply_settings(True); "
        "jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0)); print('accepted')"
    )

    def ask(flags):
        environment = plugin | {"XLA_FLAGS": flags}
        return subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
        )

    done = ask(f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text")
    assert done.stdout.endswith("JAX_OPTIMIZATION_LEVEL=O1\naccepted\n"), done.stderr
    options = "\n".join(path.read_text() for path in tmp_path.glob("*.debug_options"))
    for flag in (*GPU_FLAGS, DETERMINISTIC_FLAG):
        name, _, value = flag.removeprefix("--").partition("=")
        assert f'{name}: "{value}"' in options or f"{name}: {value}" in options, options
    assert "accepted" not in ask("--xla_gpu_no_such_flag=true").stdout


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train --config=configs/digits.py:stage1 --config.data.train=nowhere --workdir={}", "nowhere"),
        ("sample --checkpoint=nowhere --prompts=one --out={}", "nowhere"),
        ("precompute --config=configs/digits.py:stage1 --images=nowhere --out={}", "nowhere"),
        ("benchmark compile --config=configs/digits.py:stage1 --topology=nowhere", "nowhere"),
    ],
)
def test_commands_apply_and_print_the_settings(plugin, tmp_path, command, message):
    """Each command stops at a missing input, after it has applied the settings."""
    words = command.format(tmp_path / "out").split()
    done = subprocess.run(
        [sys.executable, "-m", f"pixart_jax.{words[0]}", *words[1:]],
        env=plugin,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stdout.startswith(f"XLA settings: XLA_FLAGS='{GPU_FLAGS[0]}")
