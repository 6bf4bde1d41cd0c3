import dataclasses
import json
import time

import fake_services
import numpy as np
import pytest
from etils import epath
from fake_services import calls_of

from pixart_jax.config import LogConfig, TrainConfig, to_dict
from pixart_jax.errors import UserError
from pixart_jax.training import trackers
from pixart_jax.training.trackers import TensorBoard, open_trackers

PIXELS = np.zeros((4, 6, 3), np.uint8)


def config_with(tracker, **changes):
    return TrainConfig(name="my photos/stage2", log=LogConfig(tracker=tracker), **changes)


def run(folder, config, step=1):
    """One start of a run."""
    opened = open_trackers(epath.Path(folder), config, 0)
    for tracker in opened:
        tracker.scalars(step, {"loss": 0.5})
        tracker.image(step, "samples", PIXELS)
        tracker.flush()
        tracker.close()


def test_services_get_scalars_images_and_config_and_continue_the_same_run(tmp_path, monkeypatch):
    wandb, trackio = fake_services.install(monkeypatch, tmp_path, "wandb", "trackio")
    workdir = tmp_path / "photos"
    config = config_with("wandb, trackio,wandb")
    run(workdir, config, 1)
    run(workdir, dataclasses.replace(config, steps=7), 2)  # a resumed run
    run_id = json.loads((workdir / "tracker.json").read_text())["id"]
    for module in (wandb, trackio):
        first, second = calls_of(module, "init")
        assert first["project"] == "my-photos-stage2" and first["name"] == f"photos-{run_id}"
        assert first["config"] == to_dict(config) and second["config"]["steps"] == 7
        names = ("project", "name", "resume", "id", "dir")
        assert [first.get(name) for name in names] == [second.get(name) for name in names]
        assert first["resume"] == "allow"
        assert len(calls_of(module, "finish")) == 2
    assert calls_of(wandb, "init")[0]["id"] == run_id
    assert calls_of(wandb, "define_metric")[0] == {"name": "*", "step_metric": "step"}
    scalars, image, *_ = calls_of(wandb, "log")
    assert scalars == {"values": {"loss": 0.5, "step": 1}, "step": None}
    assert image["values"]["samples"].shape == PIXELS.shape and image["values"]["step"] == 1
    scalars, image, *_ = calls_of(trackio, "log")
    assert scalars == {"values": {"loss": 0.5}, "step": 1}
    assert image["values"]["samples"].shape == PIXELS.shape and image["step"] == 1
    # Another run directory is another run.
    run(tmp_path / "other" / "photos", config)
    assert calls_of(trackio, "init")[2]["name"] != calls_of(trackio, "init")[0]["name"]


@pytest.mark.parametrize(("fails", "logged"), [("init", 0), ("log", 1), ("finish", 2)])
def test_a_service_that_fails_is_reported_once_and_turned_off(tmp_path, monkeypatch, capsys, fails, logged):
    (wandb,) = fake_services.install(monkeypatch, tmp_path, "wandb")
    monkeypatch.setattr(wandb, "fails", fails)
    run(tmp_path / "run", config_with("wandb"))
    assert len(calls_of(wandb, "log")) == logged
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("log.tracker: wandb is off") and line.endswith(f"it failed: {fails} has failed")


def test_a_service_that_does_not_end_is_left_behind(tmp_path, monkeypatch, capsys):
    (wandb,) = fake_services.install(monkeypatch, tmp_path, "wandb")
    monkeypatch.setattr(wandb.Run, "finish", lambda run: time.sleep(5))
    monkeypatch.setattr(trackers, "END_SECONDS", 0.1)
    monkeypatch.setattr(trackers, "GRACE_SECONDS", 0.1)
    start = time.monotonic()
    run(tmp_path / "run", config_with("wandb"))
    assert time.monotonic() - start < 4
    assert "wandb did not end within" in capsys.readouterr().err


def test_only_services_need_an_id(tmp_path):
    run(tmp_path / "run", config_with("tensorboard"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["tensorboard"]
    assert isinstance(open_trackers(epath.Path(tmp_path), config_with("tensorboard"), 0)[0], TensorBoard)
    assert open_trackers(epath.Path(tmp_path), config_with("none"), 0) == []


def test_a_damaged_id_is_an_error(tmp_path, monkeypatch):
    fake_services.install(monkeypatch, tmp_path, "trackio")
    (tmp_path / "tracker.json").write_text('{"id": 3}')
    with pytest.raises(UserError, match=r"tracker.json' .*remove it; services then show a new run"):
        run(tmp_path, config_with("trackio"))
