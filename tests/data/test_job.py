import dataclasses
import json

import numpy as np
import pytest
from damage import damaged

from pixart_jax import config as configs
from pixart_jax.config import FeaturesConfig
from pixart_jax.data.job import JOB, WORK, Job, rows_read
from pixart_jax.data.planning import Survey, hash_of
from pixart_jax.errors import UserError

CONFIG = FeaturesConfig(image_size=16, codec="pixels", text=False, latent_scale=1.0)
# Its records are so large that each has a shard of its own.
LARGE = dataclasses.replace(CONFIG, image_size=1024)
OPTIONS = {"kind": "folder", "shard_mb": 1, "min_bucket": 1, "max_crop": 1.0, "min_size": 0}


def survey_of(names: str, marks: int = 0, **changes: int) -> Survey:
    """One sample for each letter; `changes` are other facts of single samples."""
    keys = np.array([hash_of(name) for name in names], np.uint64)
    facts = np.array([changes.get(name, 0) for name in names], np.uint64)
    count = len(names)
    return Survey(
        sizes=np.ones((count, 2), np.int32),
        keys=keys,
        facts=facts,
        marks=np.full(count, marks, np.uint64),
        num_captions=np.zeros(count, np.uint16),
        captions=np.zeros(0, np.uint64),
        refused={},
        fingerprint=names,
        notes=(),
    )


def content(name: str) -> bytes:
    return name.encode() * 16


def planned(folder, names, survey=None, contents=content, config=CONFIG, usable=True, whole=True):
    """A job for these samples, planned and written as `precompute` does."""
    job = Job(folder, configs.to_dict(config), OPTIONS)
    job.plan(
        survey or survey_of(names),
        config,
        shard_mb=1,
        min_bucket=1,
        max_crop=1.0,
        channels=3,
        whole=whole,
        contents=lambda indices: [contents(names[i]) for i in indices],
        usable=lambda indices: [usable for _ in indices],
    )
    job.write()
    return job


def finish(job, names, number=-1, skipped=()):
    """Finishes a shard, without encoding anything."""
    file, _, rows = next(job.rounds[number].samples())
    own = [name for name in names if hash_of(name) in rows["key"].tolist()]
    (job.folder / file).write_bytes(b"shard")
    contents = [bytes(16) if name in skipped else content(name) for name in own]
    entry = {"records": len(own) - len(skipped), "bytes": 5, "cut": []}
    entry["refused"] = [[name, "broken", "why"] for name in skipped]
    job.finish(file, entry, rows_read(rows["key"], np.zeros(len(own), np.uint64), contents))
    return file


@pytest.fixture
def folder(tmp_path):
    (tmp_path / WORK).mkdir()
    return tmp_path


def test_a_folder_is_bound_when_it_has_records(folder):
    other = dataclasses.replace(CONFIG, latent_scale=2.0)
    planned(folder, "abc")
    # No shard is finished, so that other samples and another config may be planned.
    job = planned(folder, "xy", config=other)
    assert len(job.rounds) == 1 and job.keys.tolist() == survey_of("xy").keys.tolist()
    finish(job, "xy")
    with pytest.raises(UserError, match=r"started with features.latent_scale=2.0, now 1.0"):
        Job(folder, configs.to_dict(CONFIG), OPTIONS)
    again = planned(folder, "xy", config=other)
    assert again.fingerprint == job.fingerprint and not again.notes


def test_a_shard_of_skipped_samples_binds_nothing(folder):
    finish(planned(folder, "ab"), "ab", skipped="ab")
    assert planned(folder, "cd").keys.tolist() == survey_of("cd").keys.tolist()


def test_new_samples_form_a_round_of_their_own(folder):
    first = planned(folder, "ab")
    file = finish(first, "ab")
    job = planned(folder, "cab")
    assert [len(one.rows) for one in job.rounds] == [2, 1] and job.notes == ["1 new samples"]
    assert job.rounds[0].entry() == first.rounds[0].entry()
    (shard,) = (name for name, _, _ in job.rounds[1].samples())
    assert shard == file.replace("00000", "00001")
    assert [one.indices.tolist() for one in job.shards(survey_of("cab"))] == [[1, 2], [0]]


def test_a_part_of_the_work_adds_nothing_before_the_other_parts_are_finished(folder):
    finish(planned(folder, "ab", config=LARGE), "ab")
    waiting = planned(folder, "abc", config=LARGE, whole=False)
    assert len(waiting.rounds) == 1 and waiting.notes[0].startswith("1 new samples, which a run after all")
    assert len(planned(folder, "abc", config=LARGE).rounds) == 2


def test_equal_bytes_in_a_changed_file_are_no_change(folder):
    file = finish(planned(folder, "abc"), "abc")
    job = planned(folder, "abc", survey=survey_of("abc", marks=7))
    assert job.read(file, 3)["mark"].tolist() == [7, 7, 7]


@pytest.mark.parametrize(
    ("names", "changes", "contents", "what", "count"),
    [
        ("abd", {}, content, "is gone or cannot be used", 1),
        ("abcd", {"c": 1, "d": 1}, content, "has another caption, label or size", 2),
        ("abcd", {}, lambda name: content(name if name < "c" else "x"), "has another image", 2),
        ("abcd", {}, lambda name: content(name) if name < "c" else b"", "cannot be read", 2),
    ],
)
def test_one_of_the_changed_samples_is_named(folder, monkeypatch, names, changes, contents, what, count):
    finish(planned(folder, "abcd"), "abcd", skipped="b")
    named = []
    monkeypatch.setattr(Job, "_key_of", lambda self, file, record: named.append(record) or "KEY")
    with pytest.raises(UserError, match=f"{count} of 3 samples that are encoded .* 'KEY' {what}"):
        planned(folder, names, survey=survey_of(names, marks=1, **changes), contents=contents)
    # Without 'b', which was skipped, 'c' is record 1. Only this key is read from a shard.
    assert named == [1]


def test_changed_samples_of_unfinished_shards_are_left_out(folder):
    job = planned(folder, "abcd", config=LARGE)
    assert len(job.rounds[0].shards) == 4
    finish(job, "abcd")
    job = planned(folder, "abd", config=LARGE)
    assert job.keys.tolist() == survey_of("abd").keys.tolist()
    assert job.notes == ["1 samples of unfinished shards have changed or are gone"]


@pytest.mark.parametrize("usable", [True, False])
def test_skipped_samples_are_tried_again_when_their_file_has_changed(folder, usable):
    finish(planned(folder, "abc"), "abc", skipped="b")
    assert len(planned(folder, "abc").rounds) == 1
    job = planned(folder, "abc", survey=survey_of("abc", marks=7), usable=usable)
    assert len(job.rounds) == 1 + usable
    refused = job.refused([file for one in job.rounds for file, _ in one.shards], survey_of("abc"))
    # Until the new round is finished, the sample is still skipped.
    assert refused == [["b", "broken", "why"]]


def test_a_process_stops_if_another_one_has_planned_again(folder):
    job = planned(folder, "ab")
    stored = json.loads((folder / JOB).read_text())
    stored["rounds"][0]["sha256"] = "0" * 64
    (folder / JOB).write_text(json.dumps(stored))
    with pytest.raises(UserError, match="another process found other images"):
        finish(job, "ab")


@pytest.mark.parametrize("name", ["plan", "shard"])
def test_damaged_files(folder, name):
    job = planned(folder, "ab")
    file = finish(job, "ab")
    (path,) = (folder / WORK).glob("plan-*.npy" if name == "plan" else f"{file}.npy")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=f"{path.name}' cannot be read"):
        planned(folder, "ab")


@pytest.mark.parametrize("change", ["shard", "round", "samples"])
def test_a_plan_that_does_not_fit_its_job(folder, change):
    """Two shards of one name would overwrite each other."""
    finish(planned(folder, "ab"), "ab")
    stored = json.loads((folder / JOB).read_text())
    first = stored["rounds"][0]
    if change == "shard":
        first["shards"] *= 2
    elif change == "round":
        stored["rounds"] *= 2
    else:
        first["samples"] += 1
    (folder / JOB).write_text(json.dumps(stored))
    words = "it is not the plan that" if change == "samples" else "it names a shard twice"
    with pytest.raises(UserError, match=f"is damaged: {words}.* delete '{folder}'"):
        planned(folder, "ab")


def test_damaged_files_of_a_job(folder):
    """Each is named in one line, and nothing outside of the folder is removed."""
    job = planned(folder, "ab")
    file = finish(job, "ab")
    outside = folder.parent / "outside.arrayrecord"
    outside.write_text("mine")
    entry = folder / WORK / f"{file}.json"
    for path in (folder / JOB, entry):
        good = path.read_text()
        for place, changed in damaged(json.loads(good)):
            path.write_text(json.dumps(changed))
            try:
                again = planned(folder, "ab")
                again.refused([file], survey_of("ab"))
            except UserError as error:
                assert str(folder) in str(error) and "\n" not in str(error), place
        for text in ("", "[" * 100_000, '{"records": ' + "1" * 5000 + "}", "[]", "\ud800"):
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
            with pytest.raises(UserError, match=rf"{path.name}' cannot be read as JSON \(.*\): restore it"):
                planned(folder, "ab")
        path.write_text(good)
        finish(planned(folder, "ab"), "ab")
    stored = json.loads((folder / JOB).read_text())
    stored["rounds"][0]["shards"][0][0] = "../outside.arrayrecord"
    (folder / JOB).write_text(json.dumps(stored))
    with pytest.raises(UserError, match="must be text of the form"):
        planned(folder, "ab")
    assert outside.read_text() == "mine"


@pytest.mark.parametrize("damage", ["objects", "dtype", "cut", "0-d", "rows"])
def test_damaged_arrays_of_a_job(folder, damage):
    job = planned(folder, "ab")
    file = finish(job, "ab")
    (plan,) = (folder / WORK).glob("plan-*.npy")
    for path, message in ((plan, "restore it or delete"), (folder / WORK / f"{file}.npy", "restore it, or")):
        good = path.read_bytes()
        rows = np.load(path)
        changed = {"objects": np.array([{}]), "dtype": np.zeros(2), "0-d": rows[0], "rows": rows[:1]}
        if damage == "cut":
            path.write_bytes(good[:-1])
        else:
            np.save(path, changed[damage], allow_pickle=damage == "objects")
        with pytest.raises(UserError, match=rf"{path.name}' .*{message}"):
            planned(folder, "ab")
        path.write_bytes(good)
