"""Packaging: which folders are installed. Everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    # The configs are installed inside the package, where `--config=stage2` finds them.
    packages=[*find_packages(include=["pixart_jax", "pixart_jax.*"]), "pixart_jax.configs"],
    package_dir={"pixart_jax.configs": "configs"},
)
