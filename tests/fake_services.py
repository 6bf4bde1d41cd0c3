"""Modules with the calls of wandb and trackio, which record what they are given."""

from __future__ import annotations

import importlib.util
import sys

CODE = """
calls = []
fails = ""


def _call(name, /, **given):
    calls.append((name, given))
    if name == fails:
        raise RuntimeError(f"{name} has failed\\nand more")


class Image:
    def __init__(self, pixels):
        self.shape = pixels.shape


class Settings:
    def __init__(self, **given):
        _call("Settings", **given)


class Run:
    def define_metric(self, name, step_metric):
        _call("define_metric", name=name, step_metric=step_metric)

    def log(self, values, step=None):
        _call("log", values=values, step=step)

    def finish(self):
        _call("finish")


def init(**given):
    _call("init", **given)
    return Run()
"""


def install(monkeypatch, folder, *names):
    """Makes modules of these names importable until the test ends, and returns them."""
    file = folder / "fake_service.py"
    file.write_text(CODE)
    modules = []
    for name in names:
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setitem(sys.modules, name, module)
        modules.append(module)
    return modules


def calls_of(module, name):
    """The arguments of all calls of one function."""
    return [given for called, given in module.calls if called == name]
