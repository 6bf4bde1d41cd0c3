"""Run directories, which several people may write to: checkpoints, metrics, summaries."""

import contextlib
import functools
import json
import shutil
from pathlib import Path

import pytest
from etils import epath
from fuzzing import fuzz
from hostile import DEEP, DIGITS, HUGE, damaged, json_files, to_json, trees
from hypothesis import strategies as st
from tqdm import tqdm

from pixart_jax.config import DivergenceConfig, TrainConfig
from pixart_jax.files import sha256_of_json
from pixart_jax.training import metrics
from pixart_jax.training.divergence import DivergenceGuard, StepRecord
from pixart_jax.training.goodput import Goodput
from pixart_jax.training.metrics import MetricWriter
from pixart_jax.weights.checkpoints import read_weights

OLD = Path(__file__).parent.parent / "data" / "v0_1" / "stage2"
METADATA = json.loads((OLD / "checkpoints" / "2" / "metadata" / "metadata").read_text())
FILES = sorted(str(path.relative_to(OLD)) for path in OLD.rglob("*") if path.is_file())
METRICS = [{"step": step, "loss": 1.5, "learning_rate": 1e-4} for step in (1, 2, 3)]


@fuzz(12, metadata=trees(METADATA), signed=st.booleans(), raw=st.none() | json_files(METADATA))
def test_metadata(sandbox, metadata, signed, raw):
    """The hash in the metadata finds damage. Whoever changes it on purpose can change the hash, too."""
    shutil.copytree(OLD, sandbox.path / "run")
    if isinstance(metadata, dict) and signed:
        rest = {name: value for name, value in metadata.items() if name != "sha256"}
        metadata["sha256"] = sha256_of_json(rest)
    content = to_json(metadata) if raw is None or signed else raw
    sandbox.write("run/checkpoints/2/metadata/metadata", content)
    sandbox.read(read_weights, "run").check()


@fuzz(5, data=st.data(), name=st.sampled_from(FILES))
def test_checkpoint_files(sandbox, data, name):
    shutil.copytree(OLD, sandbox.path / "run")
    old = (OLD / name).read_bytes()
    if data.draw(st.integers(0, 4)) == 0:
        (sandbox.path / "run" / name).unlink()
    else:
        (sandbox.path / "run" / name).write_bytes(data.draw(damaged(old), label=name))
    sandbox.read(read_weights, "run").check()


def continue_run(first_step):
    """What a run reads and writes beside its checkpoints when it continues."""
    workdir = epath.Path("run").absolute()
    with contextlib.closing(
        MetricWriter(workdir, TrainConfig(steps=9), first_step=first_step, active=True)
    ) as writer:
        writer.write(first_step + 1, {"loss": 1.0})
    goodput = Goodput(workdir, first_step=first_step)
    goodput.begin()
    with goodput.measure("step"):
        pass
    goodput.write(first_step + 1, {"loss": 1.0})
    json.loads((workdir / "summary.json").read_text())
    guard = DivergenceGuard(DivergenceConfig(action="skip"), workdir, lambda _, value: [value])
    values = {"loss": 1.0, "loss_average": 1.0, "gradient_norm": 1.0, "refused": True}
    guard.means([StepRecord(first_step + 1, ["key"], values)])


SUMMARY = {
    **{"step": 3, "starts": 2, "goodput": 0.5, "share": {}, "written_at": 1.7e9, "newest": {"loss": 1.0}},
    "seconds": {
        "step": 1.0,
        "compile": 1.0,
        "data": 0.0,
        "checkpoint": 0.0,
        "evaluation": 0,
        "restart": 1,
        "other": 2,
    },
}


@pytest.fixture(scope="module")
def without_bar():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "tqdm", functools.partial(tqdm, disable=True))
        yield


@fuzz(50, "without_bar", data=st.data(), first_step=st.integers(0, 5))
def test_metrics_and_summaries(sandbox, _, data, first_step):
    lines = b"".join(json.dumps(line).encode() + b"\n" for line in METRICS)
    for name in ("metrics.jsonl", "refused_updates.jsonl"):
        bad = data.draw(st.one_of(json_files(METRICS[0]), damaged(lines), st.just(b"")), label=name)
        sandbox.write(f"run/{name}", lines + bad)
    sandbox.write("run/summary.json", data.draw(json_files(SUMMARY), label="summary.json"))
    sandbox.read(continue_run, first_step).check(leaves=["run"])


def test_the_marks_of_hostile_json_are_known():
    assert all(mark not in json.dumps(METADATA) for mark in (DEEP, DIGITS, HUGE))
    with pytest.raises(RecursionError):
        json.loads(to_json(DEEP))
