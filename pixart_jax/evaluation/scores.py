"""Reads the result files of the benchmarks' own scripts, and averages them as the scripts do.

The columns are those of the published tables. Values that a script would silently average, such as the 999
that stands for a failure of the judge, raise an error here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pixart_jax.errors import UserError, short, system_reason
from pixart_jax.evaluation.layouts import HPSV2_STYLES, IMAGEREWARD_MODEL
from pixart_jax.readers import parse_json

# From the column of the table to the category and the file in its folder.
T2I_FILES = {
    "color": ("color", "annotation_blip/vqa_result.json"),
    "shape": ("shape", "annotation_blip/vqa_result.json"),
    "texture": ("texture", "annotation_blip/vqa_result.json"),
    "spatial": ("spatial", "labels/annotation_obj_detection_2d/vqa_result.json"),
    "non-spatial": ("non_spatial", "annotation_clip/vqa_result.json"),
    "complex": ("complex", "annotation_3_in_1/vqa_result.json"),
    "3d-spatial": ("3d_spatial", "labels/annotation_obj_detection_3d/vqa_result.json"),
    "numeracy": ("numeracy", "annotation_num/vqa_result.json"),
}
# The last prompt id of each category, and its weight in the overall score.
WISE_CATEGORIES = {
    "wise_legacy": {
        "culture": (400, 0.4), "time": (567, 0.167), "space": (700, 0.133),
        "biology": (800, 0.1), "physics": (900, 0.1), "chemistry": (1000, 0.1),
    },
    "wise": {
        "culture": (400, 0.4), "time": (520, 0.12), "space": (640, 0.12),
        "biology": (760, 0.12), "physics": (880, 0.12), "chemistry": (1000, 0.12),
    },
}  # fmt: skip
WISE_FOLDERS = {"wise_legacy": "Results", "wise": "Results-qwen35"}
GENEVAL_TASKS = {
    "single_object": "single", "two_object": "two", "counting": "counting",
    "colors": "colors", "position": "position", "color_attr": "color attr.",
}  # fmt: skip


def read_scores(benchmark: str, path: str | Path) -> tuple[dict[str, float], dict[str, int]]:
    """Reads the result files of a benchmark.

    Args:
      benchmark: a key of `layouts.BENCHMARKS`.
      path: the --out folder of `evaluate layout`; or the results themselves: a file, or the folder with the
        files of all categories.

    Returns:
      the score of each column, and the number of answers that were averaged.

    Raises:
      UserError: there are no result files, or they have another format or version, or are incomplete.
    """
    return _READERS[benchmark](Path(path))


def _t2i(path: Path) -> tuple[dict[str, float], dict[str, int]]:
    root = path / "images" if (path / "images").is_dir() else path
    scores, counts = {}, {}
    for column, (category, file) in T2I_FILES.items():
        if not (root / category / file).is_file():
            continue
        answers = _json(root / category / file)
        if not isinstance(answers, list):
            raise UserError(f"'{root / category / file}' is not a list of answers: run its command again.")
        values = [_number(answer, "answer", root / category / file) for answer in answers]
        scores[column], counts[column] = _mean(values, root / category / file)
    if not scores:
        files = " or ".join("/".join(parts) for parts in list(T2I_FILES.values())[:2])
        raise UserError(f"'{path}' has no results of T2I-CompBench, such as {files}: run its commands first.")
    return scores, counts


def _wise(version: str) -> Callable[[Path], tuple[dict[str, float], dict[str, int]]]:
    def read(path: Path) -> tuple[dict[str, float], dict[str, int]]:
        folder = path / "images" / WISE_FOLDERS[version]
        folder = folder if folder.is_dir() else path
        files = [folder] if folder.is_file() else sorted(folder.glob("*_results.jsonl"))
        if not files:
            raise UserError(
                f"'{folder}' has no scores of {version} (*_results.jsonl): run its commands first."
            )
        values: dict[int, float] = {}
        for file in files:
            for item in _records(file):
                found = "wise_legacy" if "consistency" in item else "wise" if "score" in item else None
                if found != version:
                    raise UserError(
                        f"'{file}' has scores of {found or 'no version of WISE'}, not of {version}: their "
                        "judges, prompts and ids differ, so they are not comparable."
                    )
                identity = item.get("prompt_id")
                if type(identity) is not int:
                    raise UserError(
                        f"'{file}' has the prompt_id {short(identity, quote=True)}: it must be a whole "
                        "number."
                    )
                if identity in values:
                    raise UserError(
                        f"'{file}' scores prompt {identity} a second time: keep one result per prompt."
                    )
                values[identity] = _wise_score(item, file)
        missing = set(range(1, 1001)) - set(values)
        if missing or len(values) != 1000:
            raise UserError(
                f"'{folder}' has scores of {len(values)} prompts of 1..1000 and lacks {len(missing)}, such "
                f"as {min(missing, default='none')}: score all of them."
            )
        scores, counts, first = {}, {}, 1
        for name, (last, _) in WISE_CATEGORIES[version].items():
            scores[name] = float(np.mean([values[identity] for identity in range(first, last + 1)]))
            counts[name], first = last + 1 - first, last + 1
        weights = {name: weight for name, (_, weight) in WISE_CATEGORIES[version].items()}
        overall = sum(weight * scores[name] for name, weight in weights.items())
        return {**scores, "overall": overall}, {**counts, "overall": 1000}

    return read


def _wise_score(item: Mapping[str, Any], file: Path) -> float:
    """The WiScore of an image, from three marks of 0..2 (legacy judge) or one mark, 0 or 1 (later judge)."""
    identity = item.get("prompt_id")
    marks = {"consistency": 0.7, "realism": 0.2, "aesthetic_quality": 0.1}
    if "consistency" in item:
        values = [_number(item, name, file) for name in marks]
        if not all(0 <= value <= 2 for value in values):
            raise UserError(
                f"'{file}', prompt {identity}: marks {values} are not in 0..2 (999 stands for a failure of "
                "the judge, which the scripts would average): run gpt_eval.py again."
            )
        return sum(weight * value for weight, value in zip(marks.values(), values)) / 2
    value = _number(item, "score", file)
    if value not in (0, 1):
        raise UserError(
            f"'{file}', prompt {identity}: score {value} is neither 0 nor 1: run the judge again."
        )
    return value


def _geneval(path: Path) -> tuple[dict[str, float], dict[str, int]]:
    file = path / "results.jsonl" if path.is_dir() else path
    by_task: dict[str, list[float]] = {}
    for item in _records(file):
        task = item.get("tag")
        if not isinstance(task, str) or task not in GENEVAL_TASKS:
            raise UserError(
                f"'{file}' has the task '{short(task)}', which GenEval does not have: is it a result of "
                "GenEval?"
            )
        by_task.setdefault(task, []).append(_number(item, "correct", file))
    missing = [task for task in GENEVAL_TASKS if task not in by_task]
    if missing:
        raise UserError(
            f"'{file}' lacks the tasks {', '.join(missing)}: the overall score is the mean of all six."
        )
    scores = {GENEVAL_TASKS[task]: float(np.mean(by_task[task])) for task in GENEVAL_TASKS}
    counts = {GENEVAL_TASKS[task]: len(by_task[task]) for task in GENEVAL_TASKS}
    overall = float(np.mean(list(scores.values())))
    return {**scores, "overall": overall}, {**counts, "overall": sum(counts.values())}


def _dpg(path: Path) -> tuple[dict[str, float], dict[str, int]]:
    """Reads the text file that the script writes into the image folder."""
    if path.is_dir():
        folder = path / "images" if (path / "images").is_dir() else path
        files = sorted(folder.glob("dpg-bench_*_results.txt"))
        if len(files) != 1:
            raise UserError(
                f"'{folder}' has {len(files)} files dpg-bench_*_results.txt: give one of them as --results."
            )
        path = files[0]
    text = _text(path)
    names = ("global", "entity", "attribute", "relation", "other")
    scores = {}
    for name in names:
        found = re.search(rf"^\t{name}: ([-+.\deE]+)$", text, re.MULTILINE | re.IGNORECASE)
        if found:
            scores[name] = _number({name: found[1]}, name, path)
    overall = re.search(r"^DPG-Bench score: ([-+.\deE]+)$", text, re.MULTILINE)
    if not overall:
        raise UserError(f"'{path}' has no line 'DPG-Bench score: …': give the file of a finished run.")
    images = len(re.findall(r"\.png, ", text))
    return {**scores, "overall": _number({"score": overall[1]}, "score", path)}, {"overall": images}


def _hpsv2(path: Path) -> tuple[dict[str, float], dict[str, int]]:
    """Reads the output of `hpsv2.evaluate`: lines of model, style, mean and deviation."""
    path = path / "hpsv2.txt" if path.is_dir() else path
    text = _text(path)
    if "missing image for prompt" in text:
        raise UserError(
            f"'{path}' reports missing images, which its mean leaves out: generate all images and run it "
            "again."
        )
    scores = {
        style: float(mean)
        for style, mean in re.findall(rf"({'|'.join(HPSV2_STYLES)})\s+(\d+\.\d+)\s+\d+\.\d+\s*$", text, re.M)
    }
    missing = [style for style in HPSV2_STYLES if style not in scores]
    if missing:
        raise UserError(f"'{path}' has no line of {', '.join(missing)}: is it the output of hpsv2.evaluate?")
    return {**scores, "overall": float(np.mean(list(scores.values())))}, {}


def _imagereward(path: Path) -> tuple[dict[str, float], dict[str, int]]:
    if path.is_dir():
        path = path / "results" / "ImageReward-v1.0-benchmark-results.json"
    values = _json(path)
    if not isinstance(values, dict) or (IMAGEREWARD_MODEL not in values and len(values) != 1):
        raise UserError(f"'{path}' has no score of '{IMAGEREWARD_MODEL}': is it ImageReward's results file?")
    value = values.get(IMAGEREWARD_MODEL, next(iter(values.values())))
    return {"ImageReward": _number({"score": value}, "score", path)}, {}


_READERS: dict[str, Callable[[Path], tuple[dict[str, float], dict[str, int]]]] = {
    "t2i_compbench": _t2i,
    "wise": _wise("wise"),
    "wise_legacy": _wise("wise_legacy"),
    "geneval": _geneval,
    "dpg": _dpg,
    "hpsv2": _hpsv2,
    "imagereward": _imagereward,
}


# --- Files ------------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"result file '{path}' cannot be read ({system_reason(error)}): give the benchmark's own file."
        ) from error


def _json(path: Path) -> Any:
    try:
        return parse_json(_text(path), lenient=True)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"result file '{path}' is not JSON: {error}.") from error


def _records(path: Path) -> Iterable[Mapping[str, Any]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = parse_json(line, lenient=True)
        except ValueError as error:
            raise UserError(f"{path}:{number} is not JSON: {error}.") from error
        if not isinstance(item, dict):
            raise UserError(f"{path}:{number} is not an object: is it a result file of this benchmark?")
        yield item


def _number(item: Any, name: str, path: Path) -> float:
    """Reads a number, also from text (as T2I-CompBench writes some) or from a boolean (as pandas does)."""
    try:
        value = float(item[name])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"'{path}' has an entry without a number '{name}': {short(item)}.") from error
    if not np.isfinite(value):
        raise UserError(f"'{path}' has {name} {value} in {short(item)}: it must be finite.")
    return value


def _mean(values: list[float], path: Path) -> tuple[float, int]:
    if not values:
        raise UserError(f"'{path}' is empty: run the benchmark's commands again.")
    return float(np.mean(values)), len(values)
