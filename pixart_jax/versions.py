"""Versions of packages and the git revision of this project, for the records of runs and benchmarks."""

from __future__ import annotations

import importlib.metadata
import subprocess
from collections.abc import Iterable
from pathlib import Path

from pixart_jax import __version__

# Packages that can change the numerical results of a training run.
RUN_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pixart_jax")


def package_versions(packages: Iterable[str] = RUN_PACKAGES) -> dict[str, str]:
    """Returns the version of each package; "" for packages that are not installed."""
    return {package: _version(package) for package in packages}


def _version(package: str) -> str:
    if package == "pixart_jax":
        return __version__  # not from its metadata, because it may run without being installed
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def git_revision() -> str:
    """Returns the commit of the checkout of this code; "" without git or outside a repository."""
    try:
        out = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return out.stdout.strip()
