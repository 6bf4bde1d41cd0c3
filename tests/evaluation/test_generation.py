import json

import numpy as np
import pytest
from fake_pipeline import FakePipeline, picture_of
from PIL import Image

from pixart_jax.errors import UserError
from pixart_jax.evaluation.generation import (
    PlannedImage,
    check_complete,
    generate_images,
    read_captions,
    read_plan,
    read_run_settings,
)

PLANNED = [PlannedImage(f"{index:02d}.png", f"prompt {index // 2}", 7 + index) for index in range(70)]
SETTINGS = {"model": "runs/a", "steps": 4, "seed": 7}


def run(out, pipe=None, **options):
    return generate_images(
        pipe or FakePipeline(), PLANNED, out, SETTINGS, arguments={"steps": 4}, batch_size=1, **options
    )


def pixels(out, picture):
    return np.asarray(Image.open(out / "images" / picture.file))


def test_every_picture_has_its_prompt_and_seed(tmp_path):
    pipe = FakePipeline()
    assert run(tmp_path, pipe) == 70 == pipe.drawn
    for picture in PLANNED:
        np.testing.assert_array_equal(pixels(tmp_path, picture), picture_of(picture.prompt, picture.seed))
    assert pipe.arguments == {"steps": 4}
    recorded = [json.loads(line) for line in (tmp_path / "pictures.jsonl").read_text().splitlines()]
    assert recorded[3] == {"file": "03.png", "prompt": "prompt 1", "seed": 10, "tiles": 1}
    assert read_run_settings(tmp_path) == SETTINGS
    check_complete(PLANNED, tmp_path)


def test_an_interrupted_run_generates_the_missing_images(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, FakePipeline(limit=32))
    there = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert 0 < len(there) < 70
    times = {name: (tmp_path / "images" / name).stat().st_mtime_ns for name in there}
    with pytest.raises(UserError, match=f"lacks {70 - len(there)} of 70 images"):
        check_complete(PLANNED, tmp_path)
    pipe = FakePipeline()
    assert run(tmp_path, pipe) == pipe.drawn == 70 - len(there)
    check_complete(PLANNED, tmp_path)
    assert {name: (tmp_path / "images" / name).stat().st_mtime_ns for name in there} == times
    assert run(tmp_path, pipe) == 0


def test_shards_make_the_pictures_of_one_run(tmp_path):
    run(tmp_path / "one")
    assert [run(tmp_path / "many", shard=(index, 3)) for index in range(3)] == [24, 23, 23]
    check_complete(PLANNED, tmp_path / "many")
    for picture in PLANNED:
        np.testing.assert_array_equal(pixels(tmp_path / "one", picture), pixels(tmp_path / "many", picture))
    assert [path.name for path in (tmp_path / "many").iterdir() if path.name.startswith(".")] == []


def test_a_folder_has_one_setting(tmp_path):
    run(tmp_path)
    with pytest.raises(UserError, match="generated with steps 4, now 5; seed 7, now None: give the same"):
        settings = {"model": "runs/a", "steps": 5}
        generate_images(FakePipeline(), PLANNED, tmp_path, settings, arguments={})


def test_names_must_differ_and_strangers_are_found(tmp_path):
    with pytest.raises(UserError, match="two images would be named '1"):
        twice = [PlannedImage("1.png", "a", 0), PlannedImage("1.png", "b", 0)]
        generate_images(FakePipeline(), twice, tmp_path, {}, arguments={})
    run(tmp_path)
    (tmp_path / "images" / "results.txt").write_text("of the benchmark")
    check_complete(PLANNED, tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "grid.png")
    with pytest.raises(UserError, match=r"grid.png' does not belong to this benchmark"):
        check_complete(PLANNED, tmp_path)


def test_four_tiles_make_a_grid_row_by_row(tmp_path):
    picture = PlannedImage("7.png", "dense", 3, tiles=4)
    generate_images(FakePipeline(), [picture], tmp_path, {}, arguments={})
    grid = pixels(tmp_path, picture)
    assert grid.shape == (16, 16, 3)
    for number, (top, left) in enumerate([(0, 0), (0, 8), (8, 0), (8, 8)]):
        np.testing.assert_array_equal(grid[top : top + 8, left : left + 8], picture_of("dense", 3 + number))
    with pytest.raises(UserError, match="cuts grids into squares"):
        wide = lambda prompts, **options: np.zeros((4, 8, 16, 3), np.uint8)  # noqa: E731
        generate_images(
            wide, [PlannedImage("8.png", "dense", 3, tiles=4)], tmp_path / "wide", {}, arguments={}
        )


def test_grey_pictures_become_rgb(tmp_path):
    grey = lambda prompts, **options: np.full((1, 4, 4, 1), 9, np.uint8)  # noqa: E731
    generate_images(grey, [PlannedImage("a.jpg", "a", 0)], tmp_path, {}, arguments={})
    assert Image.open(tmp_path / "images" / "a.jpg").mode == "RGB"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b'a corgi\r\n\r\n\xc3\xa9t\xc3\xa9 "x"\r\n'),
        ("a.tsv", b'image_id\tid\tcaption\r\n1\t2\ta corgi\r\n3\t4\t\xc3\xa9t\xc3\xa9 "x"\r\n'),
        ("a.csv", b'prompt,n\na corgi,1\n"\xc3\xa9t\xc3\xa9 ""x""",2\n'),
        ("a.json", b'["a corgi", "\xc3\xa9t\xc3\xa9 \\"x\\""]'),
        (
            "b.json",
            b'{"1": {"category": "c", "prompt": "a corgi"}, "2": {"prompt": "\xc3\xa9t\xc3\xa9 \\"x\\""}}',
        ),
        ("a.jsonl", b'{"prompt": "a corgi"}\n{"caption": "\xc3\xa9t\xc3\xa9 \\"x\\""}\n'),
    ],
)
def test_captions_of_each_format(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read_captions(tmp_path / name).texts == ["a corgi", 'été "x"']


@pytest.mark.parametrize(
    ("name", "content", "names"),
    [
        ("a.txt", "x\ny\n", None),
        ("a.json", '{"1": "x", "2": {"prompt": "y"}}', ["1", "2"]),
        (
            "a.json",
            '[{"image": "a/1.png", "text": "x"}, {"image": "2.png", "text": "y"}]',
            ["a/1.png", "2.png"],
        ),
        (
            "a.jsonl",
            '{"file_name": "1.png", "text": "x"}\n{"file_name": "2", "caption": "y"}',
            ["1.png", "2"],
        ),
        ("a.csv", "caption,file_name\nx,1.png\ny,2.png\n", ["1.png", "2.png"]),
    ],
)
def test_captions_can_name_their_images(tmp_path, name, content, names):
    (tmp_path / name).write_text(content)
    assert read_captions(tmp_path / name) == (["x", "y"], names)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n", "0 captions"),
        ("a.csv", "name\nx\n", "none of the fields caption, prompt"),
        ("a.csv", "image,caption\n1.png,a cat, asleep\n", "line 2 has more cells than the first line"),
        ("a.csv", 'caption\n"a cat\na dog\n', "unexpected format"),
        ("a.JSON", "[1]", "unexpected format"),
        ("a.json", "[1]", "unexpected format"),
        ("a.json", "[", "unexpected format"),
        ("a.jsonl", '"a"\n""\n', "2 captions, 1 of them empty"),
        ("a.jsonl", '{"text": "a", "file": "1.png"}\n{"text": "b"}\n', "1 of 2 captions do not name"),
        ("a.jsonl", '{"text": "a", "file": 1}\n', "1 is not text"),
        ("a.json", '{"images": [], "annotations": []}', "unexpected format"),
    ],
)
def test_bad_caption_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_captions(tmp_path / name)


@pytest.mark.parametrize("text", ["[", "[" * 100_000, "3", "\udcff", '{"a": 1, "a": 2}'])
def test_damaged_notes_of_a_folder(tmp_path, text):
    data = text.encode("utf-8", "surrogateescape")
    (tmp_path / "settings.json").write_bytes(data)
    with pytest.raises(UserError, match=r"settings.json' cannot be read as JSON \(.*\): restore it, or give"):
        read_run_settings(tmp_path)
    (tmp_path / "pictures.jsonl").write_bytes(data + b"\n")
    with pytest.raises(UserError, match=r"pictures.jsonl' line 1 cannot be read as JSON"):
        read_plan(tmp_path)
    (tmp_path / "captions.json").write_bytes(data)
    with pytest.raises(UserError, match=r"captions.json"):
        read_captions(tmp_path / "captions.json")


@pytest.mark.parametrize("name", ["model", "benchmark", "captions", "weights", "sampler"])
def test_settings_of_another_type(tmp_path, name):
    (tmp_path / "settings.json").write_text(json.dumps({name: True}))
    with pytest.raises(UserError, match=rf"settings.json'.*{name} is true, and must be"):
        read_run_settings(tmp_path)
