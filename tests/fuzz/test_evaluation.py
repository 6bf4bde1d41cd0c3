"""What `evaluate` and `benchmark recipe` read: captions, prompts and results of benchmarks, statistics."""

import json

import numpy as np
import pytest
from fuzzing import ROOT, fuzz, stop_here
from hostile import damaged, json_files
from hypothesis import strategies as st

from pixart_jax.evaluation.fid import read_statistics
from pixart_jax.evaluation.generation import read_captions, read_plan
from pixart_jax.evaluation.layouts import BENCHMARKS
from pixart_jax.evaluation.protocol import Protocol, Result

CAPTIONS = {
    "json": [{"caption": "a fox", "file_name": "a.png"}, {"caption": "two", "file_name": "b.png"}],
    "jsonl": {"prompt": "a fox", "image": "a.png"},
}
# For each benchmark a prompt file.
PROMPTS = {
    "geneval": (
        "evaluation_metadata.jsonl",
        {"prompt": "a fox", "tag": "colors", "include": [{"class": "fox"}]},
    ),
    "hpsv2": ("anime.json", ["a fox", "two"]),
    "imagereward": ("benchmark-prompts.json", [{"id": "000-1", "prompt": "a fox"}]),
    "wise": (
        "cultural_common_sense_verified.json",
        [{"prompt_id": 1, "Prompt": "a fox", "Explanation": "x"}],
    ),
    "wise_legacy": ("cultural_common_sense.json", [{"prompt_id": 1, "Prompt": "a fox", "Explanation": "x"}]),
    "dpg": ("a.txt", None),
    "t2i_compbench": ("color_val.txt", None),
}
RESULTS = {
    "geneval": ("results.jsonl", {"filename": "x/00000/samples/0000.png", "tag": "colors", "correct": True}),
    "imagereward": ("results/ImageReward-v1.0-benchmark-results.json", {"own": 0.5}),
    "wise": ("images/Results-qwen35/a_results.jsonl", {"prompt_id": 1, "score": 1}),
    "t2i_compbench": ("images/color/annotation_blip/vqa_result.json", [{"question_id": 0, "answer": "0.5"}]),
    "dpg": ("dpg-bench_1_results.txt", b"a.png, 0.5, 1\n\tentity: 80.5\nDPG-Bench score: 50.0\n"),
    "hpsv2": (
        "hpsv2.txt",
        b"x anime 30.0 \t 0.1\nx photo 28.0 \t 0.2\nx paintings 31.0 \t 0.1\nx concept-art 31.0 \t 0.3\n",
    ),
}


@pytest.fixture(scope="module")
def without_images():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pixart_jax.pipeline.load_pipeline", stop_here)
        yield


@fuzz(50, data=st.data(), kind=st.sampled_from(["json", "jsonl", "csv", "tsv", "txt"]))
def test_captions(sandbox, data, kind):
    if kind in CAPTIONS:
        content = data.draw(json_files(CAPTIONS[kind]), label=kind)
    else:
        text = "caption,file_name\na fox,a.png\ntwo,b.png\n".replace(",", "\t" if kind == "tsv" else ",")
        content = data.draw(damaged(text.encode()), label=kind)
    sandbox.write(f"captions.{kind}", content)
    sandbox.read(read_captions, f"captions.{kind}").check()


@fuzz(
    70,
    "without_images",
    data=st.data(),
    benchmark=st.sampled_from(sorted(PROMPTS)),
    seed=st.integers(-2, 2**33),
)
def test_prompts_of_benchmarks(sandbox, _, data, benchmark, seed):
    name, valid = PROMPTS[benchmark]
    content = damaged(b"a fox\ta\ntwo\n") if valid is None else json_files(valid)
    sandbox.write(f"prompts/{name}", data.draw(content, label=name))
    sandbox.command(
        *("evaluate", "layout", f"--benchmark={benchmark}", "--prompts=prompts", f"--seed={seed}"),
        *("--checkpoint=x", "--out=out"),
    ).check(outputs=["out"])


@fuzz(60, data=st.data(), benchmark=st.sampled_from(sorted(RESULTS)))
def test_results_of_benchmarks(sandbox, data, benchmark):
    name, valid = RESULTS[benchmark]
    content = damaged(valid) if isinstance(valid, bytes) else json_files(valid)
    sandbox.write(f"results/{name}", data.draw(content, label=name))
    settings = {"benchmark": benchmark, "model": "m", "seed": 0}
    if data.draw(st.booleans()):
        sandbox.write("results/settings.json", data.draw(json_files(settings), label="settings.json"))
    sandbox.command("evaluate", "table", f"--benchmark={benchmark}", "--results=results", "--out=out").check(
        outputs=["out"]
    )


def test_the_benchmarks_are_known():
    assert set(PROMPTS) == set(RESULTS) | {"wise_legacy"} == set(BENCHMARKS)


@fuzz(40, data=st.data())
def test_results(sandbox, data):
    Result("model", 12.5, Protocol("fid", 100)).write(sandbox.path / "fid.json")
    valid = json.loads((sandbox.path / "fid.json").read_text())
    sandbox.write("fid.json", data.draw(json_files(valid), label="fid.json"))
    sandbox.command("evaluate", "table", "--results=fid.json,fid.json", "--out=out").check(outputs=["out"])


@fuzz(30, data=st.data())
def test_statistics(sandbox, data):
    np.savez(sandbox.path / "s.npz", mu=np.zeros(4), sigma=np.eye(4), images=10, crop="none")
    sandbox.write("s.npz", data.draw(damaged((sandbox.path / "s.npz").read_bytes()), label="s.npz"))
    sandbox.read(read_statistics, "s.npz", Protocol("fid", 10)).check()


@fuzz(20, data=st.data())
def test_plans(sandbox, data):
    valid = {"file": "000000.png", "prompt": "a fox", "seed": 3, "tiles": 1}
    sandbox.write("pictures.jsonl", data.draw(json_files(valid), label="pictures.jsonl"))
    sandbox.read(read_plan, sandbox.path).check()


@fuzz(30, data=st.data())
def test_rates(sandbox, data):
    valid = {"config": "stage1", "images_per_second": 100.0, "machine": {"devices": 4}}
    sandbox.write("rates/stage1.json", data.draw(json_files(valid), label="stage1.json"))
    stages = f"--stages={ROOT / 'configs' / 'stage1.py'}"
    sandbox.command("benchmark", "recipe", stages, "--hardware=h100:8", "--rates=rates").check()
