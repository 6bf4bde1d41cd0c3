"""What is installed, and the versions that are pinned for the tests."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from newcomer import install, run
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pixart_jax
from pixart_jax.cli import COMMANDS

ROOT = Path(__file__).parent.parent
PINNED = ("requirements.txt", "requirements-newest.txt")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(name):
    lines = (ROOT / name).read_text().splitlines()
    requirements = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(each.name): each.specifier for each in requirements}


def test_both_pairs_of_versions_pin_the_same_packages():
    assert pins(PINNED[0]).keys() == pins(PINNED[1]).keys()


@pytest.mark.parametrize("name", PINNED)
def test_pins_are_within_the_ranges_of_the_project(name):
    pinned = pins(name)
    extras = PROJECT["optional-dependencies"]
    checked = set()
    for text in [*PROJECT["dependencies"], *(each for extra in extras.values() for each in extra)]:
        requirement = Requirement(text)
        package = canonicalize_name(requirement.name)
        if package not in pinned:
            continue
        (pin,) = pinned[package]
        assert pin.operator == "==" and requirement.specifier.contains(pin.version), requirement
        checked.add(package)
    assert {"jax", "flax", "torch", "numpy"} <= checked


@pytest.mark.parametrize("name", PINNED)
def test_everything_that_the_tests_install_is_pinned(name):
    pinned = pins(name)
    needed = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
    names = {canonicalize_name(Requirement(each).name) for each in needed} - {"pixart-jax"}
    assert names <= pinned.keys()


def test_the_wheel_has_the_code_the_configs_and_the_marker_of_its_types(wheel_files):
    """py.typed (PEP 561) tells type checkers to use the annotations of the installed package."""
    with zipfile.ZipFile(wheel_files[1]) as wheel:
        installed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pixart_jax").rglob("*.py")}
    configs = {f"pixart_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert len(configs) > 5
    assert installed == code | configs | {"pixart_jax/py.typed"}


def test_the_sdist_has_what_the_wheel_is_made_from(wheel_files):
    with tarfile.open(wheel_files[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE", "configs/stage2.py"} <= names
    assert not [name for name in names if name.startswith(("demo/", "benchmarks/results/"))]


def test_the_metadata_say_what_a_registry_shows(wheel_files):
    with zipfile.ZipFile(wheel_files[1]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        text = wheel.read(name).decode()
    assert f"\nVersion: {pixart_jax.__version__}\n" in text and "\nLicense-Expression: Apache-2.0\n" in text
    assert "\nRequires-Python: >=3.11\n" in text and "text/markdown" in text
    for version in ("3.11", "3.12", "3.13"):
        assert f"Classifier: Programming Language :: Python :: {version}\n" in text


def test_scripts_of_the_wheel(wheel_files, tmp_path):
    installed = install(wheel_files[1], tmp_path / "environment")
    home = run(installed, "python", "-c", "import pixart_jax; print(pixart_jax.__file__)", cwd=tmp_path)
    assert Path(home).is_relative_to(installed.parent)
    assert run(installed, "pixart", "--version", cwd=tmp_path) == f"pixart_jax {pixart_jax.__version__}\n"
    listed = run(installed, "pixart", cwd=tmp_path)
    assert {f"pixart-{name}" for name in COMMANDS} | {"pixart"} == PROJECT["scripts"].keys()
    for name in COMMANDS:
        assert name in listed
        as_script = run(installed, f"pixart-{name}", "--help", cwd=tmp_path)
        assert f"pixart_jax.{name}" in as_script
        assert as_script == run(installed, "pixart", name, "--help", cwd=tmp_path)


def test_packages_that_the_wheel_needs_are_installed_here():
    """`pip check` of this environment, whose versions are those of the pins."""
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_version_is_stated_once():
    assert "version" in PROJECT["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", pixart_jax.__version__)
