"""Every test runs on eight simulated CPU devices; tests that need fewer build a mesh over some of them."""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import xla_flags

os.environ["JAX_PLATFORMS"] = "cpu"
_FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    **xla_flags.FAST,
    # Eight devices on two busy cores may reach a collective minutes apart; XLA would abort after 40 seconds.
    "--xla_cpu_collective_call_terminate_timeout_seconds": "300",
}
_given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join(
    [_given, *(f"{name}={value}" for name, value in _FLAGS.items() if name not in _given)]
).strip()
# The tests of a session and the commands that they start share a cache of compiled programs.
_CACHE = "JAX_COMPILATION_CACHE_DIR"
_made = None
if _CACHE not in os.environ:
    _made = os.environ[_CACHE] = tempfile.mkdtemp(prefix="compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# No test may download from the Hugging Face Hub.
os.environ["HF_HUB_OFFLINE"] = "1"


def _faster():
    """Turns off two things that only cost time in tests.

    To draw a random key, flax asks a tracer for its sharding, which raises an error that is caught. The text
    of the error lists the operations from which the tracer comes: a third of the time of building a model.

    Orbax lets each device write a part of every replicated array, and cuts off the parts by one small program
    per array and device: most of the programs of a run. `test_distributed.py` tests it with real processes.
    """
    import jax
    from jax._src.interpreters import partial_eval
    from orbax.checkpoint import type_handlers

    partial_eval.DynamicJaxprTracer._origin_msg = lambda tracer: ""
    type_handlers.get_type_handler(jax.Array)._use_replica_parallel = False


_faster()

# The files that take longest. They start first, so that at the end no core waits for another.
_LONGEST = (
    "test_train.py",
    "training/test_distributed.py",
    "test_precompute.py",
    "benchmarks/test_performance_gpu.py",
    "training/test_step.py",
    "pipeline/test_pipeline.py",
    "test_notebooks.py",
    "test_docs.py",
    "test_readme.py",
    "training/test_checkpoints.py",
    "test_launch.py",
    "test_compatibility.py",
    "soak/test_kill_at.py",
)


def pytest_collection_modifyitems(items):
    places = {Path(__file__).parent / name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_unconfigure():
    if _made:
        shutil.rmtree(_made, ignore_errors=True)


@pytest.fixture(scope="session")
def random_params():
    """(config, seed=0) -> (graph, params): random weights, none of them a zero array, so that all matter.

    NumPy generates them from the shapes of the abstract model, so nothing is compiled.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from pixart_jax.denoiser import abstract_model

    def draw(config, seed=0, scale=0.2):
        graph, state = abstract_model(config)
        rng = np.random.default_rng(seed)
        params = jax.tree.map(
            lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32),
            nnx.to_pure_dict(state),
        )
        return graph, params

    return draw


@pytest.fixture(scope="session")
def wheel_files(tmp_path_factory):
    """The sdist of this project, and the wheel that is built from it."""
    import newcomer

    return newcomer.build(tmp_path_factory.mktemp("dist"))
