"""The versions that are pinned for the tests."""

import re
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
