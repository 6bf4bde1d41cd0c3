"""Result files in each benchmark's format, with means worked out by hand."""

import json

import pytest

from pixart_jax.errors import UserError
from pixart_jax.evaluation.scores import read_scores


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def lines(items):
    return "".join(json.dumps(item) + "\n" for item in items)


# --- T2I-CompBench ----------------------------------------------------------------------------------


def write_t2i(root):
    """BLIP writes its answers as strings, the other scripts write numbers."""
    answers = lambda values: json.dumps(  # noqa: E731
        [{"question_id": number, "answer": value} for number, value in enumerate(values)]
    )
    for category, values in (
        ("color", ["0.7110", "0.2890"]),
        ("shape", ["0.5000"]),
        ("texture", ["0.1", "0.3"]),
    ):
        write(root / category / "annotation_blip" / "vqa_result.json", answers(values))
    write(root / "spatial/labels/annotation_obj_detection_2d/vqa_result.json", answers([0, 0.5, 0.7, 0]))
    write(root / "3d_spatial/labels/annotation_obj_detection_3d/vqa_result.json", answers([0.2]))
    write(root / "numeracy/annotation_num/vqa_result.json", answers([1.0, 0.5, 0.0]))
    write(root / "non_spatial/annotation_clip/vqa_result.json", answers([0.31, 0.33]))
    write(root / "complex/annotation_3_in_1/vqa_result.json", answers([0.4, 0.5]))
    # A part of the complex category's score, which must not be read as the score of a category.
    write(root / "complex/annotation_blip/vqa_result.json", answers([0.9]))


T2I = {
    "color": 0.5, "shape": 0.5, "texture": 0.2, "spatial": 0.3, "non-spatial": 0.32, "complex": 0.45,
    "3d-spatial": 0.2, "numeracy": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("below", ["out/images", "out"])
def test_t2i_compbench(tmp_path, below):
    write_t2i(tmp_path / below)
    scores, counts = read_scores("t2i_compbench", tmp_path / "out")
    assert scores == pytest.approx(T2I)
    assert counts["spatial"] == 4 and counts["shape"] == 1


def test_t2i_compbench_that_is_not(tmp_path):
    with pytest.raises(UserError, match="has no results of T2I-CompBench"):
        read_scores("t2i_compbench", tmp_path)
    file = write(tmp_path / "color/annotation_blip/vqa_result.json", '[{"question_id": 0}]')
    with pytest.raises(UserError, match="without a number 'answer'"):
        read_scores("t2i_compbench", tmp_path)
    for text, message in (
        ("[]", "is empty"),
        ("[", "is not JSON"),
        ("null", "is not a list of answers"),
        ('[{"answer": NaN}]', "answer nan"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_scores("t2i_compbench", tmp_path)


# --- WISE -------------------------------------------------------------------------------------------

WISE_NAMES = ("cultural_common_sense", "spatio-temporal_reasoning", "natural_science")


def wise_records(version):
    """Legacy: culture (2, 2, 2) to 100, else (1, 0, 0); time (2, 1, 0); space (0, 2, 2); rest (1, 1, 1)."""
    if version == "wise":
        # Correct are one in four of culture, all of time, none of space, and one in two of the others.
        for identity in range(1, 1001):
            right = (
                identity % 4 == 0 if identity <= 400 else identity <= 520 or (identity > 640 and identity % 2)
            )
            yield {"prompt_id": identity, "Subcategory": "s", "score": int(right)}
        return
    for identity in range(1, 1001):
        marks = (1, 1, 1)
        if identity <= 400:
            marks = (2, 2, 2) if identity <= 100 else (1, 0, 0)
        elif identity <= 567:
            marks = (2, 1, 0)
        elif identity <= 700:
            marks = (0, 2, 2)
        yield {
            "prompt_id": identity, "Subcategory": "s", "consistency": float(marks[0]),
            "realism": float(marks[1]), "aesthetic_quality": float(marks[2]),
        }  # fmt: skip


def write_wise(folder, version, records=None):
    records = list(wise_records(version)) if records is None else records
    for name, (first, last) in zip(WISE_NAMES, ((1, 400), (401, 700), (701, 1000))):
        part = [record for record in records if first <= record["prompt_id"] <= last]
        write(folder / f"{name}_scores_results.jsonl", lines(part))


WISE = {
    # (100·1 + 300·0.35)/400; (1.4 + 0.2)/2; (0.4 + 0.2)/2; 0.5
    "wise_legacy": {
        "culture": 0.5125, "time": 0.8, "space": 0.3, "biology": 0.5, "physics": 0.5, "chemistry": 0.5,
        "overall": 0.4 * 0.5125 + 0.167 * 0.8 + 0.133 * 0.3 + 0.3 * 0.5,
    },
    "wise": {
        "culture": 0.25, "time": 1.0, "space": 0.0, "biology": 0.5, "physics": 0.5, "chemistry": 0.5,
        "overall": 0.1 + 0.12 + 0.18,
    },
}  # fmt: skip


@pytest.mark.parametrize(("version", "folder"), [("wise_legacy", "Results"), ("wise", "Results-qwen35")])
def test_wise(tmp_path, version, folder):
    write_wise(tmp_path / "images" / folder, version)
    for path in (tmp_path, tmp_path / "images" / folder):
        scores, counts = read_scores(version, path)
        assert scores == pytest.approx(WISE[version])
    assert counts["culture"] == 400 and counts["time"] == (167 if version == "wise_legacy" else 120)
    # All records in one file, which `Calculate.py` accepts as well.
    one = write(tmp_path / "all.jsonl", lines(wise_records(version)))
    assert read_scores(version, one)[0] == pytest.approx(WISE[version])


def test_wise_versions_never_share_a_row(tmp_path):
    for version, other in (("wise", "wise_legacy"), ("wise_legacy", "wise")):
        write_wise(tmp_path / version, version)
        with pytest.raises(UserError, match=f"has scores of {version}, not of {other}"):
            read_scores(other, tmp_path / version)
    # Legacy scores of culture together with verified scores of science.
    mixed = [*list(wise_records("wise_legacy"))[:700], *list(wise_records("wise"))[700:]]
    write_wise(tmp_path / "mixed", "", mixed)
    for version, other in (("wise", "wise_legacy"), ("wise_legacy", "wise")):
        with pytest.raises(UserError, match=f"has scores of {other}, not of {version}"):
            read_scores(version, tmp_path / "mixed")


def test_wise_that_is_incomplete(tmp_path):
    records = list(wise_records("wise_legacy"))
    write_wise(tmp_path / "few", "", records[:-3])
    with pytest.raises(UserError, match=r"has scores of 997 prompts of 1\.\.1000 and lacks 3, such as 998"):
        read_scores("wise_legacy", tmp_path / "few")
    # gpt_eval.py writes 999 if the judge fails; Calculate.py would include it in the average.
    write_wise(tmp_path / "failed", "", [{**records[0], "consistency": 999}, *records[1:]])
    with pytest.raises(UserError, match=r"prompt 1: marks \[999.0, 2.0, 2.0\] are not in 0..2"):
        read_scores("wise_legacy", tmp_path / "failed")
    write_wise(tmp_path / "twice", "", [*records, records[4]])
    with pytest.raises(UserError, match="scores prompt 5 a second time"):
        read_scores("wise_legacy", tmp_path / "twice")
    write(tmp_path / "list" / "a_results.jsonl", lines([{**records[0], "prompt_id": [1]}]))
    with pytest.raises(UserError, match=r"has the prompt_id \[1\]: it must be a whole number"):
        read_scores("wise_legacy", tmp_path / "list")
    verified = list(wise_records("wise"))
    write_wise(tmp_path / "half", "", [{**verified[0], "score": 0.5}, *verified[1:]])
    with pytest.raises(UserError, match=r"prompt 1: score 0\.5 is neither 0 nor 1"):
        read_scores("wise", tmp_path / "half")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="has no scores of wise"):
        read_scores("wise", tmp_path / "none")


# --- GenEval ----------------------------------------------------------------------------------------


def geneval_records():
    """Correct images of each task: 2/2, 1/2, 0/1, 3/4, 0/2, 1/4."""
    for tag, right, count in (
        ("single_object", 2, 2), ("two_object", 1, 2), ("counting", 0, 1), ("colors", 3, 4),
        ("position", 0, 2), ("color_attr", 1, 4),
    ):  # fmt: skip
        for number in range(count):
            yield {"filename": "x.png", "tag": tag, "prompt": "p", "correct": number < right, "reason": ""}


def test_geneval(tmp_path):
    write(tmp_path / "results.jsonl", lines(geneval_records()))
    scores, counts = read_scores("geneval", tmp_path)
    expected = {"single": 1, "two": 0.5, "counting": 0, "colors": 0.75, "position": 0, "color attr.": 0.25}
    # The mean over the tasks, not over the images (7/15).
    assert scores == pytest.approx({**expected, "overall": 2.5 / 6})
    assert counts["colors"] == 4 and counts["overall"] == 15
    write(tmp_path / "results.jsonl", lines(list(geneval_records())[:5]))
    with pytest.raises(UserError, match="lacks the tasks colors, position, color_attr"):
        read_scores("geneval", tmp_path)
    write(tmp_path / "results.jsonl", lines([{"tag": "shapes", "correct": True}]))
    with pytest.raises(UserError, match="has the task 'shapes'"):
        read_scores("geneval", tmp_path)
    write(tmp_path / "results.jsonl", lines([{"tag": ["colors"], "correct": True}]))
    with pytest.raises(UserError, match=r"has the task '\['colors'\]'"):
        read_scores("geneval", tmp_path)


# --- DPG-Bench, HPSv2, ImageReward ------------------------------------------------------------------

DPG = """/out/images/1.png, 0.5, 0.75, 1.0, 0.75, 0.75
/out/images/2.png, 0.25, 0.25, 0.25, 0.25, 0.25
Model: images
L1 category scores:
\tentity: 80.5
\tglobal: 75.0
\tattribute: 60.25
L2 category scores:
\tattribute - color: 12.5
Image path: /out/images
Save results to: /out/images/dpg-bench_20260102-030405_results.txt
DPG-Bench score: 50.0
"""


def test_dpg(tmp_path):
    file = write(tmp_path / "images" / "dpg-bench_20260102-030405_results.txt", DPG)
    for path in (tmp_path, file):
        scores, counts = read_scores("dpg", path)
        assert scores == {"entity": 80.5, "global": 75.0, "attribute": 60.25, "overall": 50.0}
        assert counts == {"overall": 2}
    write(tmp_path / "images" / "dpg-bench_20260102-030406_results.txt", "")
    with pytest.raises(UserError, match="has 2 files"):
        read_scores("dpg", tmp_path)
    with pytest.raises(UserError, match="has no line 'DPG-Bench score"):
        read_scores("dpg", tmp_path / "images" / "dpg-bench_20260102-030406_results.txt")
    for old, new in (("80.5", "8-0"), ("score: 50.0", "score: 1e999")):
        with pytest.raises(UserError, match=r"without a number 'entity'|has score inf"):
            read_scores("dpg", write(tmp_path / "wrong.txt", DPG.replace(old, new)))


HPSV2 = """Loading model ...
-----------benchmark score ----------------
images anime           30.00 \t 0.1000
images photo           28.00 \t 0.2000
images paintings       31.00 \t 0.1000
images concept-art     31.00 \t 0.3000
images Average         30.00 \t
"""


def test_hpsv2(tmp_path):
    write(tmp_path / "hpsv2.txt", HPSV2)
    scores, _ = read_scores("hpsv2", tmp_path)
    assert scores == {"anime": 30, "photo": 28, "paintings": 31, "concept-art": 31, "overall": 30}
    write(tmp_path / "hpsv2.txt", HPSV2.replace("photo", "photos"))
    with pytest.raises(UserError, match="has no line of photo"):
        read_scores("hpsv2", tmp_path)
    write(tmp_path / "hpsv2.txt", "missing image for prompt: a photo of 2 cats\n" + HPSV2)
    with pytest.raises(UserError, match="reports missing images"):
        read_scores("hpsv2", tmp_path)


def test_imagereward(tmp_path):
    file = tmp_path / "results" / "ImageReward-v1.0-benchmark-results.json"
    write(file, '{"sd1-4": 0.1, "pixart_jax": 0.82}')
    assert (
        read_scores("imagereward", tmp_path)[0]
        == read_scores("imagereward", file)[0]
        == {"ImageReward": 0.82}
    )
    write(file, '{"sd1-4": 0.1, "sd2-1": 0.2}')
    with pytest.raises(UserError, match="has no score of 'pixart_jax'"):
        read_scores("imagereward", tmp_path)
