"""What is installed, and the versions that are pinned for the tests."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PINNED = ("requirements.txt", "requirements-newest.txt")


def pins(name):
    lines = (ROOT / name).read_text().splitlines()
    requirements = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(each.name): each.specifier for each in requirements}


def test_both_pairs_of_versions_pin_the_same_packages():
    assert pins(PINNED[0]).keys() == pins(PINNED[1]).keys()


@pytest.mark.parametrize("name", PINNED)
def test_pins_are_within_the_ranges_of_setup(name):
    pinned = pins(name)
    text = (ROOT / "setup.py").read_text()
    ranges = [Requirement(found) for found in re.findall(r'"([\w.\[\]-]+[<>]=[^"]*)"', text)]
    checked = set()
    for requirement in ranges:
        package = canonicalize_name(requirement.name)
        if package not in pinned:
            continue
        (pin,) = pinned[package]
        assert pin.operator == "==" and requirement.specifier.contains(pin.version), requirement
        checked.add(package)
    assert {"jax", "flax", "torch", "numpy"} <= checked


def test_what_is_installed_is_the_code_and_the_marker_of_its_types(tmp_path):
    """py.typed (PEP 561) tells type checkers to use the annotations of the installed package."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", tmp_path / "build"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (package,) = (tmp_path / "build").glob("lib*/pixart_jax")
    installed = {path.relative_to(package) for path in package.rglob("*") if path.is_file()}
    code = {path.relative_to(ROOT / "pixart_jax") for path in (ROOT / "pixart_jax").rglob("*.py")}
    assert installed == code | {Path("py.typed")}
