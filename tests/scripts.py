"""Imports scripts that are in no package, such as those of `benchmarks/`."""

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def imported(path: str | Path) -> ModuleType:
    """A new module from a file; its path may be relative to the repository."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
