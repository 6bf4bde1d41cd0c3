import pytest

from pixart_jax.encoders import progress
from pixart_jax.encoders.progress import PROGRESS_SECONDS, Progress, duration


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, which a test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_time_that_is_left_counts_images_and_captions_separately(clock):
    work = Progress(40, True, lambda line: None)
    assert work.left() == ""
    clock[0] = 10.0
    work.images("a", 10, 20, 10)
    assert work.left() == "about 30 s left without the captions"
    clock[0] = 30.0
    work.images("a", 20, 20, 10)
    # The captions of 20 images took 20 of the 30 seconds: 10 s for images, 20 s for captions are left.
    work.captioned(20, 20.0)
    assert work.left() == "about 30 s left"


def test_a_line_is_printed_at_intervals(clock):
    lines = []
    work = Progress(100, False, lines.append)
    for done in range(10, 101, 10):
        clock[0] += PROGRESS_SECONDS / 2
        work.images("a", done, 100, 10)
    # The last images of a shard have no line, because the line of the shard follows.
    assert [line.split(", ")[0] for line in lines] == [f"a: {n} of 100 images" for n in (20, 40, 60, 80)]
    assert lines[0] == "a: 20 of 100 images, 0.7/s, about 2 min 0 s left"


def test_duration():
    assert [duration(value) for value in (7, 130, 7500)] == ["7 s", "2 min 10 s", "2 h 5 min"]
