import subprocess

import numpy

import pixart_jax
from pixart_jax.versions import RUN_PACKAGES, git_revision, package_versions


def test_versions_of_packages():
    found = package_versions(("numpy", "pixart_jax", "no-such-package"))
    assert found == {"numpy": numpy.__version__, "pixart_jax": pixart_jax.__version__, "no-such-package": ""}
    assert all(package_versions().values()) and tuple(package_versions()) == RUN_PACKAGES


def test_the_git_revision(monkeypatch):
    revision = git_revision()
    assert revision == "" or (len(revision) == 40 and int(revision, 16))
    monkeypatch.setattr(subprocess, "run", raising(FileNotFoundError("git")))
    assert git_revision() == ""


def raising(error):
    def call(*args, **kwargs):
        raise error

    return call
