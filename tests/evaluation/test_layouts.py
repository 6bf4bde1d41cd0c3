"""Each layout is read back as the benchmark's own scripts read it."""

import json
import os
import re
import shlex

import numpy as np
import pytest
from fake_pipeline import FakePipeline, picture_of
from PIL import Image

from pixart_jax.errors import UserError
from pixart_jax.evaluate import Flags, layout
from pixart_jax.evaluation.generation import check_complete, generate_images
from pixart_jax.evaluation.layouts import BENCHMARKS, HPSV2_STYLES, T2I_CATEGORIES, WISE_FILES, find_benchmark
from pixart_jax.files import write_text

# Prompts with quotes, a full stop at the end, many words, non-ASCII characters, shell characters.
PROMPTS = [
    'a "red" bird\'s nest and a blue cup.',
    "a very long prompt, " * 7 + "indeed",
    "ein grüner Apfel über 二 Tassen",
    "a cup -- $HOME `x` & *",
]
SLASHED = [*PROMPTS, "a half/half picture_with underscores"]


def generate(name, prompts, out, seed=None):
    """Generates the images of a layout, with interruptions, and resumes until it is complete."""
    benchmark = BENCHMARKS[name]
    plan = benchmark.plan(prompts, benchmark.seed if seed is None else seed)
    for file, text in plan.files.items():
        write_text(out / "images" / file, text)
    options = dict(arguments={}, batch_size=1)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(2):
            generate_images(FakePipeline(limit=1), plan.images[::-1], out, {}, shard=(0, 2), **options)
            generate_images(FakePipeline(limit=0), plan.images, out, {}, **options)
    assert 0 < len(list((out / "images").rglob("*.[pj][np]g"))) < len(plan.images)
    generate_images(FakePipeline(), plan.images, out, {}, **options)
    check_complete(plan.images, out)
    return plan, benchmark.commands((out / "images").absolute(), 8, plan)


def read(path):
    return np.asarray(Image.open(path))


# --- T2I-CompBench ----------------------------------------------------------------------------------


def blip_reader(folder):
    """Reads (prompt, number) from file names as Create_annotation_for_BLIP in BLIP_vqa.py does."""
    names = os.listdir(folder)
    names.sort(key=lambda x: int(x.split("_")[-1].split(".")[0]))
    return [(name.split("_")[0], int(name.split("_")[-1].split(".")[0])) for name in names]


def unidet_reader(folder):
    """Reads file names as UniDet_eval's Dataset and numeracy_eval.py do, which parse numbers differently."""
    names = os.listdir(folder)
    names.sort(key=lambda x: int(x.split("_")[1].split(".")[0]))
    return [(name.split("_")[0], int(name.split(".png")[0].split("_")[1])) for name in names]


def test_t2i_compbench(tmp_path):
    prompts = tmp_path / "examples" / "dataset"
    prompts.mkdir(parents=True)
    for category in T2I_CATEGORIES:
        # CRLF line ends, as in six of the official files.
        (prompts / f"{category}_val.txt").write_bytes("\r\n".join([*PROMPTS, ""]).encode())
    (prompts / "color_train.txt").write_text("not for evaluation\n")
    _, commands = generate("t2i_compbench", prompts, tmp_path / "my out")
    images = tmp_path / "my out" / "images"
    assert sorted(os.listdir(images)) == sorted(T2I_CATEGORIES)
    expected = [(prompt, row * 10 + copy) for row, prompt in enumerate(PROMPTS) for copy in range(10)]
    for category in T2I_CATEGORIES:
        assert os.listdir(images / category) == ["samples"]
        assert blip_reader(images / category / "samples") == expected
        assert unidet_reader(images / category / "samples") == expected
    # Image j of every prompt has seed 42 + j, as in the reference generator.
    name = f"{PROMPTS[2]}_000023.png"
    np.testing.assert_array_equal(read(images / "spatial" / "samples" / name), picture_of(PROMPTS[2], 45))
    # The commands can be run in this order: the complex category needs three other scores before its own.
    text = "\n".join(commands)
    assert text.count("BLIP_vqa.py") == 4 and text.count("CLIP_similarity.py") == 2
    order = [commands.index(line) for line in commands if "/complex" in line]
    scripts = [re.search(r"(\w+)\.py", commands[index])[1] for index in order]
    assert scripts == ["BLIP_vqa", "2D_spatial_eval", "CLIP_similarity", "3_in_1"]
    for line in commands:
        folder = re.search(r"--(?:out_dir|outpath)=(.*?)(?: --|\)?$)", line)[1]
        (path,) = shlex.split(folder)
        assert os.path.isabs(path) and os.path.isdir(path)
        # argparse reads False as true, because bool("False") is True. So the flag is either True or omitted.
        complex_flag = "/complex" in path and "BLIP" not in line and "3_in_1" not in line
        assert ("--complex=True" in line) == complex_flag and "=False" not in line
        assert path.endswith("/") == any(name in line for name in ("BLIP_vqa", "CLIP_sim", "3_in_1"))


def test_t2i_compbench_raises_for_prompts_that_its_scripts_would_misread(tmp_path):
    file = tmp_path / "color_val.txt"
    for text, message in [
        (
            "fine\nhalf/half\n",
            r"color_val.txt:2: prompts become file names, in which '/' cannot be in a file name",
        ),
        ("under_score\n", "'_' would end the prompt"),
        ("é" * 130 + "\n", "271 bytes are more than the 255"),
        ("a\n\nb\n", "color_val.txt:2 is empty"),
        ("\n", "is empty"),
    ]:
        file.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            BENCHMARKS["t2i_compbench"].plan(file, 42)
    with pytest.raises(UserError, match="is not T2I-CompBench's examples/dataset"):
        BENCHMARKS["t2i_compbench"].plan(tmp_path / "elsewhere", 42)


# --- WISE -------------------------------------------------------------------------------------------


def write_wise(folder, version, count=4):
    folder.mkdir(exist_ok=True)
    identity = 0
    for name in WISE_FILES[version]:
        items = []
        for prompt in SLASHED[:count]:
            identity += 1
            items.append(
                {"Prompt": f"{prompt} {identity}", "Explanation": "for the judge", "Category": "c",
                 "Subcategory": "s", "prompt_id": identity}
            )  # fmt: skip
        (folder / name).write_text(json.dumps(items), encoding="utf-8")


@pytest.mark.parametrize("version", WISE_FILES)
def test_wise(tmp_path, version):
    write_wise(tmp_path / "data", version, 5)
    (tmp_path / "data" / "merge.json").write_text("[]")
    _, commands = generate(version, tmp_path / "data", tmp_path / "out")
    images = tmp_path / "out" / "images"
    # As in gpt_eval.py and vllm_eval.py: there is an image for every prompt of the three files.
    found = 0
    for name in WISE_FILES[version]:
        for item in json.loads((tmp_path / "data" / name).read_text(encoding="utf-8")):
            path = os.path.join(images, f"{item['prompt_id']}.png")
            np.testing.assert_array_equal(read(path), picture_of(item["Prompt"], 0))
            found += 1
    assert found == 15 == len(os.listdir(images))
    # The scripts join paths with the output folder, which leaves only absolute paths unchanged.
    text = "\n".join(commands)
    if version == "wise":
        assert f"IMAGE_DIR={images.absolute()} " in text and "eval_qwen.sh" in text
    else:
        calls = [line for line in commands if "gpt_eval.py" in line]
        assert len(calls) == 3 and all("--model gpt-4o-2024-05-13" in line for line in calls)
        for line in calls:
            words = shlex.split(line)
            for flag in ("--image_dir", "--output_dir", "--result_full", "--result_scores"):
                assert os.path.isabs(words[words.index(flag) + 1])
            assert words[words.index("--result_scores") + 1] in commands[-1]
        assert "Calculate.py" in commands[-1]


def test_wise_versions_do_not_mix(tmp_path):
    for version, other in (("wise", "wise_legacy"), ("wise_legacy", "wise")):
        write_wise(tmp_path / version, version)
        with pytest.raises(UserError, match=f"holds the prompts of {version}, not of {other}"):
            BENCHMARKS[other].plan(tmp_path / version, 0)
    (tmp_path / "wise" / WISE_FILES["wise"][0]).write_text('[{"prompt": "a"}]')
    with pytest.raises(UserError, match="entry 0 has no 'prompt_id'"):
        BENCHMARKS["wise"].plan(tmp_path / "wise", 0)


# --- GenEval ----------------------------------------------------------------------------------------


def test_geneval(tmp_path):
    lines = [
        json.dumps({"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": prompt})
        for prompt in SLASHED
    ]
    (tmp_path / "evaluation_metadata.jsonl").write_bytes("\r\n".join(lines).encode())
    _, commands = generate("geneval", tmp_path, tmp_path / "out")
    images = tmp_path / "out" / "images"
    # As in evaluate_images.py.
    found = {}
    for subfolder in os.listdir(images):
        if not os.path.isdir(images / subfolder) or not subfolder.isdigit():
            continue
        with open(images / subfolder / "metadata.jsonl") as file:
            metadata = json.load(file)
        names = [name for name in os.listdir(images / subfolder / "samples") if re.match(r"\d+\.png", name)]
        found[int(subfolder)] = (metadata, sorted(names))
    assert found == {
        row: (json.loads(line), ["0000.png", "0001.png", "0002.png", "0003.png"])
        for row, line in enumerate(lines)
    }
    np.testing.assert_array_equal(read(images / "00004/samples/0003.png"), picture_of(SLASHED[4], 45))
    assert str(images.absolute()) in commands[1] and "summary_scores.py" in commands[2]
    with pytest.raises(UserError, match=":1 has no 'tag'"):
        (tmp_path / "evaluation_metadata.jsonl").write_text('{"prompt": "a"}')
        BENCHMARKS["geneval"].plan(tmp_path, 0)


# --- DPG-Bench --------------------------------------------------------------------------------------


def test_dpg(tmp_path):
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    names = ["1", "256", "partiprompts0", "stanford paragraphs2", "é"]
    for name, prompt in zip(names, SLASHED):
        (prompts / f"{name}.txt").write_bytes(f"{prompt}\r\n".encode())
    _, commands = generate("dpg", prompts, tmp_path / "out")
    images = tmp_path / "out" / "images"
    # As in compute_dpg_bench.py: every file in the folder is an image, which is cut into tiles.
    words = shlex.split(commands[-1])
    root, resolution = words[-2], int(words[-1])
    assert os.path.isabs(root) and words[0] == "PIC_NUM=4"
    keys = {}
    for name in os.listdir(root):
        image = Image.open(os.path.join(root, name))
        boxes = [(0, 0), (resolution, 0), (0, resolution), (resolution, resolution)]
        keys[name.split(".")[0]] = [
            np.asarray(image.crop((left, top, left + resolution, top + resolution))) for left, top in boxes
        ]
    assert sorted(keys) == sorted(names)
    for name, prompt in zip(names, SLASHED):
        for copy, crop in enumerate(keys[name]):
            np.testing.assert_array_equal(crop, picture_of(prompt, copy))
    assert images.absolute().as_posix() == root
    with pytest.raises(UserError, match="truncate names at their first dot"):
        (prompts / "a.b.txt").write_text("x")
        BENCHMARKS["dpg"].plan(prompts, 0)
    with pytest.raises(UserError, match="is not the prompts folder of DPG-Bench"):
        BENCHMARKS["dpg"].plan(tmp_path / "none", 0)


# --- HPSv2, ImageReward -----------------------------------------------------------------------------


def test_hpsv2(tmp_path):
    prompts = tmp_path / "benchmark"
    prompts.mkdir()
    for style in HPSV2_STYLES:
        (prompts / f"{style}.json").write_text(json.dumps([f"{prompt} {style}" for prompt in SLASHED]))
    (prompts / "drawbench.json").write_text('["not of the benchmark"]')
    _, commands = generate("hpsv2", prompts, tmp_path / "out")
    root = str((tmp_path / "out" / "images").absolute())
    # As in hpsv2's evaluate_benchmark: every name in the folder is a style, which must have a prompt file.
    assert sorted(os.listdir(root)) == sorted(HPSV2_STYLES)
    for style in os.listdir(root):
        with open(prompts / f"{style}.json") as file:
            meta = json.load(file)
        assert sorted(os.listdir(os.path.join(root, style))) == [f"{i:05d}.jpg" for i in range(len(meta))]
        for index, _ in enumerate(meta):
            image = Image.open(os.path.join(root, style, f"{index:05d}.jpg"))
            assert image.format == "JPEG" and image.size == (8, 8)
    assert repr(root) in shlex.split(commands[-1])[2] and 'hps_version="v2.1"' in commands[-1]


def test_imagereward(tmp_path):
    items = [{"id": f"00569{row}-0057", "prompt": prompt} for row, prompt in enumerate(SLASHED)]
    file = tmp_path / "benchmark-prompts.json"
    file.write_text(json.dumps(items), encoding="utf-8")
    _, commands = generate("imagereward", file, tmp_path / "out")
    words = dict(word.split("=", 1) for word in shlex.split(commands[0]) if "=" in word)
    # As in test-benchmark.py.
    with open(words["--prompts_path"]) as handle:
        prompts = json.load(handle)
    folder = os.path.join(words["--img_dir"], words["--model"])
    copies = len(os.listdir(folder)) // len(prompts)
    assert copies == 10
    for item in prompts:
        for copy in range(copies):
            path = os.path.join(folder, f"{item['id']}_{copy}.png")
            np.testing.assert_array_equal(read(path), picture_of(item["prompt"], copy))
    file.write_text('[{"id": "a/b", "prompt": "x"}]')
    with pytest.raises(UserError, match="id 'a/b' has a '/'"):
        BENCHMARKS["imagereward"].plan(file, 0)


def test_benchmarks_are_named():
    assert find_benchmark("dpg") is BENCHMARKS["dpg"]
    with pytest.raises(UserError, match=r"choose one of .* Did you mean 'geneval'\?"):
        find_benchmark("genval")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("t2i_compbench", "color_val.txt"),
        ("hpsv2", "anime.json"),
        ("imagereward", "benchmark-prompts.json"),
        ("geneval", "evaluation_metadata.jsonl"),
        ("dpg", "1.txt"),
    ],
)
def test_prompt_files_that_cannot_be_read(tmp_path, name, file):
    (tmp_path / file).write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match="cannot be read"):
        BENCHMARKS[name].plan(tmp_path, 0)


def test_a_hostile_line_of_geneval(tmp_path):
    for line in ("[" * 100_000, '{"prompt": "x", "prompt": "y", "tag": "z"}', "3"):
        (tmp_path / "evaluation_metadata.jsonl").write_text(line)
        with pytest.raises(UserError, match=r"evaluation_metadata.jsonl"):
            BENCHMARKS["geneval"].plan(tmp_path, 0)


# --- Prompt files that are no prompt files ----------------------------------------------------------

GENEVAL = '{"tag": "color", "prompt": %s}\n'


@pytest.mark.parametrize(
    ("benchmark", "file", "content", "words"),
    [
        *(
            (benchmark, file, content, words)
            for benchmark, file in (
                ("wise", WISE_FILES["wise"][0]),
                ("hpsv2", "photo.json"),
                ("imagereward", "benchmark-prompts.json"),
            )
            for content, words in (
                (b"", "is not JSON"),
                (b"{", "is not JSON"),
                (b"[" * 100_000, "is not JSON"),
                (b"\xff", "cannot be read"),
                (b"9" * 5000, "is not JSON"),
                (b"3", "contains int, not a list"),
                (b"null", "contains NoneType, not a list"),
                (b'{"a": 1}', "contains dict, not a list"),
                (b"[]", "contains an empty list"),
                (b"[3]", "entry 0"),
                (b"[[]]", "entry 0"),
                (None, "is not a file|has none of the files"),
            )
        ),
        *(
            (
                "imagereward",
                "benchmark-prompts.json",
                json.dumps([{"id": i, "prompt": "p"} for i in ids]),
                w,
            )
            for ids, w in (
                (["a\0b"], "no '/' or NUL"),
                (["n" * 300], "1 to 255 bytes"),
                (["half \ud83d"], "not Unicode"),
                (["../up"], "has a '/'"),
                (["a", "a"], "two images would be named 'pixart_jax/a_0.png'"),
                ([3], "has no 'id'"),
            )
        ),
        *(
            ("wise", WISE_FILES["wise"][0], json.dumps([{"prompt_id": i, "Prompt": "p"} for i in ids]), words)
            for ids, words in (
                ([True], "has no 'prompt_id'"),
                ([1.0], "has no 'prompt_id'"),
                ([-1], "prompt_id is -1: it must be at least 0"),
                ([10**300], "has more than 64 bits"),
                ([7, 7], "two images would be named '7.png'"),
            )
        ),
        *(
            ("geneval", "evaluation_metadata.jsonl", GENEVAL % json.dumps(prompt), words)
            for prompt, words in (
                ("half a \ud83d pair", "not Unicode"),
                ("a\0b", "is NUL"),
                ("word " * 10_000, "49,999 characters, over 10,000"),
                (["x"], "has no 'prompt'"),
            )
        ),
        ("geneval", "evaluation_metadata.jsonl", b"", "is empty"),
        ("geneval", "evaluation_metadata.jsonl", b"[]\n", "has no 'prompt'"),
        ("dpg", "a.txt", b"word " * 10_000, "the prompt of image 'a.png': 49,999 characters"),
        ("dpg", "a.txt", b"a\0b", "is NUL"),
        ("dpg", os.fsdecode(b"\xff.txt"), b"a", "be Unicode"),
        ("dpg", "a.txt", None, "is not a file"),
        ("t2i_compbench", "color_val.txt", None, "has none of the files"),
    ],
)
def test_wrong_prompt_files_are_an_error_of_one_line(tmp_path, benchmark, file, content, words):
    path = tmp_path / file
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    given = Flags(benchmark=benchmark, prompts=str(tmp_path), out=str(tmp_path / "out"))
    with pytest.raises(UserError, match=words) as error:
        layout(given)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    assert not (tmp_path / "out").exists()


def test_the_largest_seed(tmp_path):
    (tmp_path / "evaluation_metadata.jsonl").write_text(GENEVAL % '"p"')
    given = Flags(benchmark="geneval", prompts=str(tmp_path), out=str(tmp_path / "out"), seed=2**32 - 2)
    with pytest.raises(UserError, match=r"'00000/samples/0002.png' would be 4294967296, over .* smaller"):
        layout(given)
