"""Captioning runs: order, batches, equal images, resuming after a kill, and skipped images."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from full_disk import largest_file
from PIL import Image
from source_files import write_special_files

import pixart_jax
from pixart_jax.captioning.run import INSTRUCTION, caption_images
from pixart_jax.data.images import RefusalReport, decode_image
from pixart_jax.data.sources import open_source
from pixart_jax.errors import OutputError, UserError

REPOSITORY = Path(pixart_jax.__file__).parents[1]


def open_folder(folder):
    return open_source("folder", folder, require_captions=False)


class FakeModel:
    """Its captions depend on the image, the instruction and the batch, as those of a real model may."""

    def __init__(self, fail_at=None):
        self.batches = []
        self.fail_at = fail_at

    def __call__(self, images, instructions):
        if len(self.batches) == self.fail_at:
            raise KeyboardInterrupt
        self.batches.append(len(images))
        batch = hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()[:6]
        return [f"{text} / {image.sum()} / {batch}" for image, text in zip(images, instructions, strict=True)]


def run(folder, out, model, **options):
    report = RefusalReport(max_refused_share=0.2)
    options = {"name": "fake", "batch_size": 4, **options}
    written = caption_images(open_folder(folder), model, out, report, **options)
    return written, report


def lines(out):
    return [json.loads(line) for line in Path(out).read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The output file of an uninterrupted run, as bytes."""
    out = tmp_path_factory.mktemp("whole") / "c.jsonl"
    run(folder, out, FakeModel())
    return out.read_bytes()


def test_one_line_an_image_in_order(folder, tmp_path):
    model = FakeModel()
    written, report = run(folder, tmp_path / "c.jsonl", model)
    records = lines(tmp_path / "c.jsonl")
    keys = [f"{i:02d}.png" for i in range(20)] + ["sub/20.png", "sub/21.png"]
    assert [record["path"] for record in records] == keys and written == 22
    assert model.batches == [4, 4, 4, 4, 3], "19 distinct images"
    for record in records:
        data = (folder / record["path"]).read_bytes()
        assert record["sha256"] == hashlib.sha256(data).hexdigest()
        height, width = decode_image(data).shape[:2]
        assert (record["height"], record["width"]) == (height, width)
        assert record["ratio"] == round(height / width, 4)
        assert record["captions"][-1]["text"].startswith(f"{INSTRUCTION} / {decode_image(data).sum()}")
        assert record["captions"][-1]["name"] == "fake"
    by_key = {record["path"]: record["captions"][-1]["text"] for record in records}
    assert by_key["00.png"] == by_key["07.png"] == by_key["19.png"] != by_key["01.png"]
    assert by_key["sub/21.png"] == by_key["03.png"]
    assert records[5]["captions"][0] == {"text": "photo 2", "weight": 1.0, "name": "caption"}
    assert len(records[20]["captions"]) == 1
    assert (report.taken, report.counts()) == (22, {"broken": 1})
    assert [refusal["key"] for refusal in lines(tmp_path / "c.jsonl.refused.jsonl")] == ["sub/broken.png"]


def test_output_is_a_source(folder, tmp_path):
    run(folder, tmp_path / "c.jsonl", FakeModel())
    source = open_source("auto", tmp_path / "c.jsonl", image_root=folder)
    assert len(source) == 22 and [c.name for c in source[4].captions] == ["caption", "fake"]
    assert source[4].decode().shape[:2] == (source[4].height, source[4].width)
    recaptioned = open_source("folder", folder, captions=tmp_path / "c.jsonl")
    assert recaptioned[4].captions == source[4].captions


def test_running_again_does_nothing(folder, tmp_path, whole):
    out = tmp_path / "c.jsonl"
    run(folder, out, FakeModel())
    model = FakeModel()
    written, report = run(folder, out, model)
    assert (written, model.batches, report.taken) == (0, [], 22)
    assert out.read_bytes() == whole


def test_any_cut_is_continued_to_the_same_bytes(folder, tmp_path, whole):
    out = tmp_path / "c.jsonl"
    run(folder, out, FakeModel())
    ends = np.cumsum([len(line) for line in whole.splitlines(keepends=True)])
    rng = np.random.default_rng(0)
    cuts = {
        0,
        1,
        len(whole) - 1,
        *ends[[0, 3, 4, 11, 20]],
        *(ends[[2, 8]] - 1),
        *rng.integers(0, len(whole), 12),
    }
    for cut in sorted(map(int, cuts)):
        out.write_bytes(whole[:cut])
        run(folder, out, FakeModel())
        assert out.read_bytes() == whole, cut


def test_interrupted_at_every_batch(folder, tmp_path, whole):
    for fail_at in range(5):
        out = tmp_path / f"{fail_at}.jsonl"
        with pytest.raises(KeyboardInterrupt):
            run(folder, out, FakeModel(fail_at))
        if fail_at:
            assert whole.startswith(out.read_bytes()) and len(lines(out)) < 22
        else:
            assert not out.exists()
        run(folder, out, FakeModel())
        assert out.read_bytes() == whole


def test_another_batch_size_neither_loses_nor_repeats(folder, tmp_path, whole):
    out = tmp_path / "c.jsonl"
    (tmp_path / "first").mkdir()
    run(folder, tmp_path / "first" / "c.jsonl", FakeModel())
    for file in (tmp_path / "first").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    out.write_bytes(whole[: len(whole) // 2])
    run(folder, out, FakeModel(), batch_size=3)
    assert [r["path"] for r in lines(out)] == [json.loads(line)["path"] for line in whole.splitlines()]


def test_an_image_that_was_replaced_does_not_keep_its_caption(folder, tmp_path):
    copy, out = tmp_path / "photos", tmp_path / "c.jsonl"
    shutil.copytree(folder, copy)
    run(copy, out, FakeModel())
    (copy / "05.png").write_bytes((copy / "06.png").read_bytes())
    with pytest.raises(UserError, match=r"image '05\.png' has changed since it was captioned"):
        run(copy, out, FakeModel())
    out.write_text("".join(line + "\n" for line in out.read_text().splitlines() if '"05.png"' not in line))
    assert run(copy, out, FakeModel())[0] == 1
    # The caption of the fake model without the part that depends on the batch.
    captions = {record["path"]: record["captions"][-1]["text"].split(" / ")[:2] for record in lines(out)}
    assert captions["05.png"] == captions["06.png"]


def test_two_processes_cannot_write_one_file(folder, tmp_path):
    out, errors = tmp_path / "c.jsonl", []

    def describe(images, instructions):
        with pytest.raises(
            UserError, match=f"another process is writing .*process {os.getpid()} on host"
        ) as e:
            run(folder, out, FakeModel())
        errors.append(e)
        return FakeModel()(images, instructions)

    run(folder, out, describe)
    assert errors and len(lines(out)) == 22


def test_images_added_later_get_lines_too(folder, tmp_path):
    copy, out = tmp_path / "photos", tmp_path / "c.jsonl"
    shutil.copytree(folder, copy)
    moved = (copy / "05.png").read_bytes()
    (copy / "05.png").unlink()
    run(copy, out, FakeModel())
    (copy / "05.png").write_bytes(moved)
    written, _ = run(copy, out, FakeModel())
    assert written == 1 and lines(out)[-1]["path"] == "05.png" and len(lines(out)) == 22


def test_many_equal_images_do_not_pile_up(tmp_path):
    for i in range(300):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i:03d}.png")
    model, out = FakeModel(), tmp_path / "out" / "c.jsonl"
    source = open_folder(tmp_path)

    class Watched:
        """The source; records the largest number of images that were read but not yet written."""

        most_waiting = 0

        def __len__(self):
            return len(source)

        def key(self, index):
            return source.key(index)

        def __getitem__(self, index):
            written = out.read_bytes().count(b"\n") if out.exists() else 0
            self.most_waiting = max(self.most_waiting, index + 1 - written)
            return source[index]

    watched = Watched()
    written = caption_images(watched, model, out, RefusalReport(0.2), name="fake", batch_size=2)
    # At most 64 batches wait, plus the one that is read ahead.
    assert (written, model.batches) == (300, [1]) and 128 <= watched.most_waiting <= 130


def test_shards_split_the_images(folder, tmp_path, whole):
    keys = []
    for i in range(3):
        run(folder, tmp_path / f"{i}.jsonl", FakeModel(), shard=(i, 3))
        keys += [record["path"] for record in lines(tmp_path / f"{i}.jsonl")]
    assert sorted(keys) == [json.loads(line)["path"] for line in whole.splitlines()]


def test_original_captions_are_given(folder, tmp_path):
    out = tmp_path / "c.jsonl"
    report = RefusalReport(max_refused_share=0.2)
    options = {"name": "fake", "batch_size": 4, "with_original": True}
    model = FakeModel()
    caption_images(open_folder(folder), model, out, report, **options)
    texts = {record["path"]: record["captions"][-1]["text"] for record in lines(out)}
    assert texts["05.png"].startswith(
        'Given the caption of this image "photo 2", describe this image and its'
    )
    # 00, 07 and 19 have equal bytes, but the caption of 00 differs, and so do its instruction and its result.
    assert texts["07.png"] == texts["19.png"] != texts["00.png"]
    assert report.counts() == {"missing_caption": 3}
    data = out.read_bytes()
    out.write_bytes(data[: len(data) // 3])
    caption_images(open_folder(folder), FakeModel(), out, RefusalReport(0.2), **options)
    assert out.read_bytes() == data


def test_too_many_refusals_stop(folder, tmp_path):
    report = RefusalReport(max_refused_share=0.01)
    with pytest.raises(UserError, match=r"skipped 1 of 23 samples.*sub/broken.png"):
        caption_images(open_folder(folder), FakeModel(), tmp_path / "c.jsonl", report, name="fake")
    assert len(lines(tmp_path / "c.jsonl")) == 22, "what was captioned is kept"


def test_another_model_or_a_strange_file_is_not_continued(folder, tmp_path):
    out = tmp_path / "c.jsonl"
    out.write_bytes(b"")  # an empty file: any settings are allowed
    run(folder, out, FakeModel(), name="first thought", instruction="Say it short", shard=(19, 23))
    out.write_bytes(b"")
    run(folder, out, FakeModel())
    with pytest.raises(UserError, match=r"started with name='fake', now it is 'other'"):
        run(folder, out, FakeModel(), name="other")
    with pytest.raises(UserError, match="started with instruction="):
        run(folder, out, FakeModel(), instruction="Say it short")
    with pytest.raises(UserError, match="shard='0/1', now it is '0/2'"):
        run(folder, out, FakeModel(), shard=(0, 2))
    data = out.read_bytes()
    out.write_bytes(data + data.splitlines(keepends=True)[3])
    with pytest.raises(UserError, match=r"line 23 .*repeats the key"):
        run(folder, out, FakeModel())
    out.write_bytes(b"hello\n" + data)
    with pytest.raises(UserError, match="line 1 is not a caption"):
        run(folder, out, FakeModel())
    (tmp_path / "c.jsonl.settings.json").unlink()
    with pytest.raises(UserError, match=r"c.jsonl.settings.json.*another --out"):
        run(folder, out, FakeModel())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"with_original": True, "instruction": "Describe"}, "if, and only if, with_original is True"),
        ({"instruction": "Given {caption}"}, "if, and only if, with_original is True"),
        ({"batch_size": 0}, "batch_size is 0: it must be at least 1"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_contradictions(folder, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        run(folder, tmp_path / "c.jsonl", FakeModel(), **options)
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_if_the_model_cannot_be_loaded(folder, tmp_path):
    def describe(images, instructions):
        raise UserError("model 'x' cannot be loaded")

    for size in (1, 30):  # before and after the broken image is skipped
        with pytest.raises(UserError, match="cannot be loaded"):
            run(folder, tmp_path / "c.jsonl", describe, batch_size=size)
        assert not list(tmp_path.iterdir())


def test_a_line_that_cannot_be_written_is_removed(folder, tmp_path, whole):
    out = tmp_path / "c.jsonl"
    with (
        largest_file(len(whole) // 2),
        pytest.raises(OutputError, match=r"c\.jsonl' cannot be written .File too large"),
    ):
        run(folder, out, FakeModel())
    assert out.read_bytes() and out.read_bytes().endswith(b"\n") and whole.startswith(out.read_bytes())
    run(folder, out, FakeModel())
    assert out.read_bytes() == whole


@pytest.mark.parametrize("side", ["", ".lock", ".settings.json", ".refused.jsonl"])
def test_a_folder_in_place_of_a_file_is_one_line(folder, tmp_path, side):
    (tmp_path / f"c.jsonl{side}").mkdir()
    with pytest.raises(OutputError, match=f"c.jsonl{side}' cannot be written .Is a directory"):
        run(folder, tmp_path / "c.jsonl", FakeModel())


def command(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "pixart_jax.caption", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options,
    )  # fmt: skip


def test_command_killed_and_resumed(describe, llava, folder, tmp_path):
    settings = {"max_new_tokens": 24, "prompt_style": "auto", "dtype": "auto"}
    expected = tmp_path / "expected.jsonl"
    options = {"name": str(llava), "batch_size": 2, "settings": settings}
    caption_images(open_folder(folder), describe, expected, RefusalReport(0.2), **options)

    out = tmp_path / "c.jsonl"
    arguments = [
        f"--images={folder}",
        f"--out={out}",
        f"--model={llava}",
        "--batch_size=2",
        "--max_new_tokens=24",
    ]
    process = command(*arguments, "--source=folder", "--max_refused_share=0.2")
    deadline = time.monotonic() + 120
    while not (out.exists() and out.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed = out.read_bytes()
    assert expected.read_bytes().startswith(killed) and 3 <= killed.count(b"\n") < 22
    with open(out, "ab") as file:  # and an incomplete line, as if killed while writing it
        file.write(expected.read_bytes()[len(killed) :][:50])
    written = caption_images(open_folder(folder), describe, out, RefusalReport(0.2), **options)
    assert out.read_bytes() == expected.read_bytes() and written == 22 - killed.count(b"\n")

    finished = command(*arguments, "--source=folder", "--max_refused_share=0.2")
    stdout, stderr = finished.communicate(timeout=120)
    assert finished.returncode == 0, stderr
    assert "used  " in stdout and "truncated or damaged image" in stdout and "0 captions written" in stdout
    assert out.read_bytes() == expected.read_bytes()


def test_special_files_in_place_of_images(tmp_path):
    write_special_files(tmp_path / "photos")
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "good.png")
    (tmp_path / "photos" / "good.txt").symlink_to("fifo.png")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "photos" / "other.png")
    report = RefusalReport(max_refused_share=1.0)
    source = open_folder(tmp_path / "photos")
    assert caption_images(source, FakeModel(), tmp_path / "c.jsonl", report, name="fake") == 1
    assert [line["path"] for line in lines(tmp_path / "c.jsonl")] == ["other.png"]
    assert report.counts() == {"unreadable": 5, "broken": 1, "missing_image": 1}
