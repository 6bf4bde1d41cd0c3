"""The image files that each benchmark's own scripts expect, planned from the benchmark's own prompt files.

The `plan` of a benchmark reads its prompt files and names the images to generate. Its `commands` are the
lines to run in a checkout of the benchmark. Names, counts and formats are those that its scripts parse.
Prompts that the scripts would misread raise an error before anything is generated.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pixart_jax.errors import UserError, at_least, one_of, system_reason
from pixart_jax.evaluation.generation import LONGEST_NAME, PlannedImage
from pixart_jax.readers import parse_json

T2I_CATEGORIES = ("color", "shape", "texture", "spatial", "non_spatial", "complex", "numeracy", "3d_spatial")
T2I_IMAGES = 10
WISE_FILES = {
    "wise_legacy": (
        "cultural_common_sense.json", "spatio-temporal_reasoning.json", "natural_science.json",
    ),
    "wise": (
        "cultural_common_sense_verified.json", "spatio-temporal_reasoning_verified.json",
        "natural_science_verified.json",
    ),
}  # fmt: skip
HPSV2_STYLES = ("anime", "concept-art", "paintings", "photo")
IMAGEREWARD_MODEL = "pixart_jax"


@dataclasses.dataclass(frozen=True)
class Layout:
    """The files that a benchmark's scripts read.

    Attributes:
      images: the images to generate.
      sources: the prompt files, in the order in which they were read.
      files: other files to write: from path below images/ to text.
    """

    images: tuple[PlannedImage, ...]
    sources: tuple[Path, ...]
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark and where to find it.

    Attributes:
      repository: its name on GitHub. The commands run in the root of a checkout.
      images: number of images of the complete benchmark.
      seed: the seed of its reference generator, or 0.
      plan: (prompt file or folder, seed) -> layout.
      commands: (absolute path of images/, side of an image in pixels, layout) -> lines of shell commands.
    """

    repository: str
    images: int
    seed: int
    plan: Callable[[Path, int], Layout]
    commands: Callable[[Path, int, Layout], list[str]]


# --- Prompt files -----------------------------------------------------------------------------------


def _lines(path: Path) -> list[str]:
    """The lines of a file, without LF or CRLF. Empty lines are allowed at the end of the file only."""
    lines = [line.rstrip("\r") for line in _text(path).split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise UserError(f"{path}:{number} is empty: every line must hold a prompt.")
    if not lines:
        raise UserError(f"'{path}' is empty: give a prompt file of the benchmark.")
    return lines


def _text(path: Path) -> str:
    if path.exists() and not path.is_file():  # reading a FIFO would wait for another process
        raise UserError(f"prompt file '{path}' is not a file: give a prompt file of the benchmark.")
    try:
        # Reading text would change carriage returns within a prompt to newlines.
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"prompt file '{path}' cannot be read ({system_reason(error)}): give a file of the benchmark."
        ) from error


def _json(path: Path, text: str | None = None) -> Any:
    try:
        return parse_json(_text(path) if text is None else text)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"prompt file '{path}' is not JSON: {error}.") from error


def _entries(path: Path) -> list[Any]:
    """The list in a JSON file."""
    entries = _json(path)
    if not isinstance(entries, list) or not entries:
        what = "an empty list" if entries == [] else f"{type(entries).__name__}, not a list"
        raise UserError(f"prompt file '{path}' contains {what}: is it a prompt file of this benchmark?")
    return entries


def _field(item: Any, name: str, kind: type, where: str) -> Any:
    value = item.get(name) if isinstance(item, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool) or not str(value).strip():
        raise UserError(f"{where} has no '{name}': is it a prompt file of this benchmark?")
    return value


def _among(path: Path, names: Iterable[str], what: str) -> list[Path]:
    """The existing files of a folder with one of the names; or `path` itself, if it has such a name."""
    if path.is_file():
        found = [path] if path.name in names else []
    else:
        found = [path / name for name in names if (path / name).is_file()]
    if not found:
        raise UserError(f"'{path}' is not {what}: it has none of the files {', '.join(names)}.")
    return found


# --- T2I-CompBench ----------------------------------------------------------------------------------


def _plan_t2i(path: Path, seed: int) -> Layout:
    """CATEGORY/samples/{prompt}_{number:06d}.png: ten images per prompt, numbered within the category.

    The scripts read the prompt from the text before the first '_' and the number from the digits after it.
    """
    sources = _among(path, [f"{name}_val.txt" for name in T2I_CATEGORIES], "T2I-CompBench's examples/dataset")
    images = []
    for source in sources:
        category = source.name.removesuffix("_val.txt")
        for row, line in enumerate(_lines(source)):
            # The reference generator uses the text before the first tab.
            prompt = line.split("\t")[0]
            for wrong, why in (
                ("/", "cannot be in a file name"),
                ("\0", "cannot be in a file name"),
                ("_", "would end the prompt for the benchmark's scripts"),
            ):
                if wrong in prompt:
                    raise UserError(
                        f"{source}:{row + 1}: prompts become file names, in which {wrong!r} {why}: "
                        f"'{prompt}'."
                    )
            for copy in range(T2I_IMAGES):
                name = f"{prompt}_{row * T2I_IMAGES + copy:06d}.png"
                size = len(name.encode())
                if size > LONGEST_NAME:
                    raise UserError(
                        f"{source}:{row + 1}: prompts become file names, and {size} bytes are more than the "
                        f"{LONGEST_NAME} that file systems allow: '{prompt[:60]}…'."
                    )
                images.append(PlannedImage(f"{category}/samples/{name}", prompt, seed + copy))
    return Layout(tuple(images), tuple(sources))


def _commands_t2i(images: Path, size: int, layout: Layout) -> list[str]:
    del size
    lines = []
    for source in layout.sources:
        category = source.name.removesuffix("_val.txt")
        folder, data = shlex.quote(str(images / category)), shlex.quote(str(source.parent.absolute()))
        # The scripts declare --complex with argparse's type=bool, for which any text is true, even "False".
        flag = " --complex=True" if category == "complex" else ""
        blip = f"(cd BLIPvqa_eval && python BLIP_vqa.py --out_dir={folder}/)"
        spatial = f"(cd UniDet_eval && python 2D_spatial_eval.py --outpath={folder}{flag})"
        clip = f"python CLIPScore_eval/CLIP_similarity.py --outpath={folder}/{flag}"
        lines += {
            "spatial": [spatial],
            "numeracy": [f"(cd UniDet_eval && python numeracy_eval.py --outpath={folder})"],
            # Without a final slash: the script looks for its depth maps under the last part of the path.
            "3d_spatial": [f"(cd UniDet_eval && python 3D_spatial_eval.py --outpath={folder})"],
            "non_spatial": [clip],
            "complex": [
                blip, spatial, clip,
                f"(cd 3_in_1_eval && python 3_in_1.py --outpath={folder}/ --data_path={data}/)",
            ],
        }.get(category, [blip])  # fmt: skip
    return lines


# --- WISE -------------------------------------------------------------------------------------------


def _wise_plan(version: str) -> Callable[[Path, int], Layout]:
    def plan(path: Path, seed: int) -> Layout:
        """{prompt_id}.png. The model only gets `Prompt`; the explanation is for the judge."""
        other = next(name for name in WISE_FILES if name != version)
        if any((path / name).is_file() for name in WISE_FILES[other]) and not any(
            (path / name).is_file() for name in WISE_FILES[version]
        ):
            raise UserError(
                f"'{path}' holds the prompts of {other}, not of {version}, which differ: use "
                f"--benchmark={other}, or give the other folder."
            )
        sources = _among(path, WISE_FILES[version], f"the data folder of {version}")
        images = []
        for source in sources:
            for number, item in enumerate(_entries(source)):
                where = f"{source}, entry {number}"
                identity = _field(item, "prompt_id", int, where)
                at_least(f"{where}: prompt_id", identity, 0)
                images.append(PlannedImage(f"{identity}.png", _field(item, "Prompt", str, where), seed))
        return Layout(tuple(images), tuple(sources))

    return plan


def _commands_wise(images: Path, size: int, layout: Layout) -> list[str]:
    del size, layout
    return [
        "# First start a vLLM server with Qwen3.5-35B-A3B:",
        "# vllm serve PATH/Qwen3.5-35B-A3B --served-model-name Qwen3.5-35B-A3B --port 8000",
        f"IMAGE_DIR={shlex.quote(str(images))} VLLM_API_BASE=http://127.0.0.1:8000/v1 bash eval_qwen.sh",
    ]


def _commands_wise_legacy(images: Path, size: int, layout: Layout) -> list[str]:
    del size, layout
    folder = shlex.quote(str(images))
    lines, scores = ["cd WISE_legacy"], []
    for name in WISE_FILES["wise_legacy"]:
        stem = name.removesuffix(".json")
        result = f"{folder}/Results/{stem}"
        scores.append(f"{result}_scores_results.jsonl")
        lines.append(
            f"python gpt_eval.py --json_path data/{name} --output_dir {result} --image_dir {folder} "
            f'--api_key "$OPENAI_API_KEY" --model gpt-4o-2024-05-13 --result_full {result}_full_results.json '
            f"--result_scores {scores[-1]} --max_workers 96"
        )
    return [*lines, f"python Calculate.py {' '.join(scores)} --category all"]


# --- GenEval ----------------------------------------------------------------------------------------


def _plan_geneval(path: Path, seed: int) -> Layout:
    """{line:05d}/metadata.jsonl with the line itself, and four images {line:05d}/samples/{copy:04d}.png."""
    source = path / "evaluation_metadata.jsonl" if path.is_dir() else path
    images, files = [], {}
    for row, line in enumerate(_lines(source)):
        item = _json(source, line)
        where = f"{source}:{row + 1}"
        prompt = _field(item, "prompt", str, where)
        _field(item, "tag", str, where)
        files[f"{row:05d}/metadata.jsonl"] = line
        images += [
            PlannedImage(f"{row:05d}/samples/{copy:04d}.png", prompt, seed + copy) for copy in range(4)
        ]
    return Layout(tuple(images), (source,), files)


def _commands_geneval(images: Path, size: int, layout: Layout) -> list[str]:
    del size, layout
    results = shlex.quote(str(images.parent / "results.jsonl"))
    return [
        "./evaluation/download_models.sh detector/",
        f"python evaluation/evaluate_images.py {shlex.quote(str(images))} --outfile {results} "
        "--model-path detector",
        # The script opens object_names.txt in the current folder.
        f"(cd evaluation && python summary_scores.py {results})",
    ]


# --- DPG-Bench --------------------------------------------------------------------------------------


def _plan_dpg(path: Path, seed: int) -> Layout:
    """{name of the prompt file}.png: a 2×2 grid of four images for each prompt."""
    sources = tuple(sorted(path.glob("*.txt")))
    if not sources:
        raise UserError(f"'{path}' is not the prompts folder of DPG-Bench: it has no .txt files.")
    images = []
    for source in sources:
        if "." in source.stem:
            raise UserError(f"'{source}': the scripts truncate names at their first dot; rename the file.")
        prompt = " ".join(_text(source).split())
        if not prompt:
            raise UserError(f"'{source}' is empty: every file must hold a prompt.")
        images.append(PlannedImage(f"{source.stem}.png", prompt, seed, tiles=4))
    return Layout(tuple(images), sources)


def _commands_dpg(images: Path, size: int, layout: Layout) -> list[str]:
    del layout
    return [
        "# Set PROCESSES to the number of GPUs, at least 2; the default is 8.",
        f"PIC_NUM=4 bash dpg_bench/dist_eval.sh {shlex.quote(str(images))} {size}",
    ]


# --- HPSv2, ImageReward -----------------------------------------------------------------------------


def _plan_hpsv2(path: Path, seed: int) -> Layout:
    """{style}/{index:05d}.jpg. The scripts do not read .png, and treat every folder as a style."""
    sources = _among(path, [f"{style}.json" for style in HPSV2_STYLES], "HPSv2's benchmark folder")
    images = []
    for source in sources:
        for index, prompt in enumerate(_entries(source)):
            if not isinstance(prompt, str) or not prompt.strip():
                raise UserError(f"{source}, entry {index} is not a prompt: is it a prompt file of HPSv2?")
            images.append(PlannedImage(f"{source.stem}/{index:05d}.jpg", prompt, seed))
    return Layout(tuple(images), tuple(sources))


def _commands_hpsv2(images: Path, size: int, layout: Layout) -> list[str]:
    del size, layout
    call = f'import hpsv2; hpsv2.evaluate({str(images)!r}, hps_version="v2.1")'
    return [
        "pip install hpsv2",
        # It prints its scores and does not store them.
        f"python -c {shlex.quote(call)} | tee {shlex.quote(str(images.parent / 'hpsv2.txt'))}",
    ]


def _plan_imagereward(path: Path, seed: int) -> Layout:
    """{model}/{id}_{copy}.png: ten images per prompt.

    The scripts compute the number of copies as the number of files divided by the number of prompts.
    """
    source = path / "benchmark-prompts.json" if path.is_dir() else path
    images = []
    for number, item in enumerate(_entries(source)):
        where = f"{source}, entry {number}"
        identity, prompt = (_field(item, name, str, where) for name in ("id", "prompt"))
        if "/" in identity:
            raise UserError(f"{where}: id '{identity}' has a '/', so it cannot be a file name: rename it.")
        images += [
            PlannedImage(f"{IMAGEREWARD_MODEL}/{identity}_{copy}.png", prompt, seed + copy)
            for copy in range(10)
        ]
    return Layout(tuple(images), (source,))


def _commands_imagereward(images: Path, size: int, layout: Layout) -> list[str]:
    del size
    results = shlex.quote(str(images.parent / "results"))
    return [
        f"python test-benchmark.py --benchmark=ImageReward-v1.0 --model={IMAGEREWARD_MODEL} "
        f"--prompts_path={shlex.quote(str(layout.sources[0].absolute()))} "
        f"--img_dir={shlex.quote(str(images))} --result_dir={results}"
    ]


# Prompt files: see the table in docs/evaluation.md.
BENCHMARKS = {
    "t2i_compbench": Benchmark("Karine-Huang/T2I-CompBench", 24_000, 42, _plan_t2i, _commands_t2i),
    "wise": Benchmark("PKU-YuanGroup/WISE", 1000, 0, _wise_plan("wise"), _commands_wise),
    "wise_legacy": Benchmark("PKU-YuanGroup/WISE", 1000, 0, _wise_plan("wise_legacy"), _commands_wise_legacy),
    "geneval": Benchmark("djghosh13/geneval", 2212, 42, _plan_geneval, _commands_geneval),
    "dpg": Benchmark("TencentQQGYLab/ELLA", 1065, 0, _plan_dpg, _commands_dpg),
    "hpsv2": Benchmark("tgxs002/HPSv2", 3200, 0, _plan_hpsv2, _commands_hpsv2),
    "imagereward": Benchmark("THUDM/ImageReward", 1000, 0, _plan_imagereward, _commands_imagereward),
}


def find_benchmark(name: str | None) -> Benchmark:
    """Returns the benchmark with a name.

    Raises:
      UserError: there is no benchmark with that name.
    """
    one_of("benchmark", name, BENCHMARKS)
    return BENCHMARKS[name]
