"""Fields of the config: on the command line, and stored with weights."""

import contextlib
import json
from pathlib import Path

import pytest
from fuzzing import ROOT, fuzz, stop_here
from hostile import DEEP, DIGITS, HUGE, NUMBERS, TEXTS, trees
from hypothesis import strategies as st

from pixart_jax import train
from pixart_jax.config import all_fields, from_dict, from_file, to_dict
from pixart_jax.training import distributed, supervision
from pixart_jax.training.distributed import Cluster

STAGES = [
    *(f"digits.py:{stage}" for stage in ("stage1", "stage2", "stage3")),
    *("stage1.py", "stage2.py", "stage3.py:256", "stage3.py:1024", "finetune.py:512"),
]
FIELDS = list(all_fields())
VALUES = st.sampled_from(
    (*map(str, NUMBERS), *TEXTS, "True", "False", "9" * 5_000, "1,2", "inf,1", "[1]", "a=1")
)
STORED = to_dict(from_file(str(ROOT / "configs" / "digits.py:stage2")))


@pytest.fixture(scope="module")
def without_training():
    """`train` stops where it would open the data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train", stop_here)
        patch.setattr(distributed, "connect", lambda *_: Cluster())
        # The watchdog ends the process, which here runs many examples.
        patch.setattr(supervision, "supervised", lambda *_: contextlib.nullcontext())
        yield


@fuzz(
    150,
    "without_training",
    stage=st.sampled_from(STAGES),
    changes=st.lists(st.tuples(st.sampled_from(FIELDS), VALUES), min_size=1, max_size=3),
)
def test_overrides(sandbox, _, stage, changes):
    given = [f"--config.{name}={value}" for name, value in changes]
    sandbox.command("train", f"--config={ROOT / 'configs' / stage}", *given).check()


@fuzz(60, values=trees(STORED, at_most=3))
def test_stored_config(sandbox, values):
    """A checkpoint, a feature folder and an export store a config."""
    for mark in (DEEP, DIGITS, HUGE):
        values = json.loads(json.dumps(values).replace(f'"{mark}"', "[[[1e999]]]"))
    sandbox.read(lambda: isinstance(values, dict) and from_dict(values)).check()


def test_every_field_is_tried():
    assert len(FIELDS) > 90 and Path(ROOT / "configs").is_dir()
