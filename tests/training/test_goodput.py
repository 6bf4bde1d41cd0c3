import json

import pytest
from etils import epath

from pixart_jax.errors import UserError
from pixart_jax.training import goodput as module
from pixart_jax.training.goodput import Goodput


class Clock:
    def __init__(self):
        self.monotonic, self.wall = 0.0, 1e9

    def pass_(self, seconds):
        self.monotonic += seconds
        self.wall += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", lambda: clock.monotonic)
    monkeypatch.setattr(module.time, "time", lambda: clock.wall)
    return clock


def spend(goodput, clock, **seconds):
    for phase, spent in seconds.items():
        with goodput.measure(phase):
            clock.pass_(spent)


def test_every_second_is_counted_once(clock, tmp_path):
    seen = []
    goodput = Goodput(epath.Path(tmp_path), first_step=0, observe=seen.append)
    clock.pass_(5)
    goodput.begin()
    spend(goodput, clock, compile=20, data=1, step=70, checkpoint=3, evaluation=0)
    clock.pass_(1)
    shares = goodput.shares()
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["goodput_step"] == pytest.approx(0.7) and shares["goodput_restart"] == pytest.approx(0.05)
    assert shares["goodput_other"] == pytest.approx(0.01)
    assert seen == ["compile", "data", "step", "checkpoint", "evaluation"]


def test_restart_counts_repeated_steps_and_the_time_between_starts(clock, tmp_path):
    goodput = Goodput(epath.Path(tmp_path), first_step=0)
    goodput.begin()
    spend(goodput, clock, step=100)
    goodput.write(50, {"loss": 0.5, "goodput_step": 1.0})
    # Killed at step 50, down for 30 s; the newest checkpoint is of step 40.
    clock.pass_(30)
    goodput = Goodput(epath.Path(tmp_path), first_step=40)
    clock.pass_(10)
    goodput.begin()
    spend(goodput, clock, step=60)
    goodput.write(70, {})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["starts"] == 2 and summary["step"] == 70
    assert summary["seconds"]["step"] == pytest.approx(80 + 60)
    assert summary["seconds"]["restart"] == pytest.approx(20 + 30 + 10)
    assert summary["goodput"] == pytest.approx(140 / 200)
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_clock_that_is_set_back_counts_as_no_time(clock, tmp_path):
    goodput = Goodput(epath.Path(tmp_path), first_step=0)
    goodput.begin()
    spend(goodput, clock, step=10)
    goodput.write(10, {})
    clock.wall -= 3600
    goodput = Goodput(epath.Path(tmp_path), first_step=10)
    goodput.begin()
    spend(goodput, clock, step=10)
    shares = goodput.shares()
    assert shares["goodput_step"] == pytest.approx(1) and shares["goodput_restart"] == 0


def test_only_the_first_process_writes(tmp_path):
    Goodput(epath.Path(tmp_path), first_step=0, active=False).write(1, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:20],
        lambda text: "[]",
        lambda text: "[" * 100_000,
        lambda text: text.replace('"starts": 1', '"starts": "1"'),
        lambda text: text.replace('"written_at": ', '"written_at": 1e999, "x": '),
        lambda text: text.replace('"seconds": {', '"seconds": {"step": 1, "step": 2, '),
        lambda text: text.replace('"data": ', '"data": null, "x": '),
    ],
)
def test_a_damaged_summary(tmp_path, damage):
    path = epath.Path(tmp_path)
    Goodput(path, first_step=0).write(1, {"loss": float("nan")})
    Goodput(path, first_step=1)
    text = (path / "summary.json").read_text()
    assert damage(text) != text
    (path / "summary.json").write_text(damage(text))
    with pytest.raises(UserError, match=r"summary.json' cannot be read as JSON \(.*\): remove it; only the"):
        Goodput(path, first_step=1)
    Goodput(path, first_step=1, active=False)


def test_an_empty_summary_starts_anew(tmp_path):
    """After a power failure, a file that was just replaced may be empty."""
    path = epath.Path(tmp_path)
    Goodput(path, first_step=0).write(1, {})
    (path / "summary.json").write_text("")
    Goodput(path, first_step=1).write(2, {})
    assert json.loads((path / "summary.json").read_text())["starts"] == 1


def test_time_left_is_at_the_speed_of_this_start_without_compilation(clock, tmp_path):
    goodput = Goodput(epath.Path(tmp_path), first_step=40)
    clock.pass_(100)
    spend(goodput, clock, evaluation=50)  # sample images of step 0
    goodput.begin()
    spend(goodput, clock, compile=30, step=16, data=1, checkpoint=2)
    clock.pass_(1)
    assert goodput.seconds_left(50, 55) == pytest.approx(5 * 20 / 10)
    assert goodput.seconds_left(50, 50) == 0
