"""The fixtures of `fuzzing.fuzz`."""

import os

import pytest
from fuzzing import MINUTES, Sandbox


@pytest.fixture(scope="session")
def seconds_per_target(request):
    """The share of a target in the minutes of `make fuzz`, which runs several processes."""
    targets = sum("seconds_per_target" in getattr(item, "fixturenames", ()) for item in request.session.items)
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    return 60 * (MINUTES or 0) * processes / max(targets, 1)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    return Sandbox(tmp_path_factory.mktemp("sandbox"))
