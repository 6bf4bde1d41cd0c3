"""Tables of results, next to published ones, as Markdown and JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pixart_jax.evaluation.protocol import Result, require_same


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
      model: name of the model.
      scores: by column; columns may be missing.
      source: where the numbers come from.
      target: whether results are compared with this row.
    """

    model: str
    scores: Mapping[str, float]
    source: str
    target: bool = False


@dataclasses.dataclass(frozen=True)
class Published:
    """The published numbers of a benchmark.

    Attributes:
      columns: in the order of the publication.
      digits: digits after the decimal point, as published.
      rows: the published rows.
      note: what a reader must know before comparing.
    """

    columns: tuple[str, ...]
    digits: int
    rows: tuple[Row, ...]
    note: str = ""


def _rows(
    columns: tuple[str, ...], source: str, values: Mapping[str, Sequence[float]], target: str = "PixArt-α"
) -> tuple[Row, ...]:
    return tuple(Row(name, dict(zip(columns, row)), source, name == target) for name, row in values.items())


_T2I = ("color", "shape", "texture", "spatial", "non-spatial", "complex")
_WISE = ("culture", "time", "space", "biology", "physics", "chemistry", "overall")
_GENEVAL = ("single", "two", "counting", "colors", "position", "color attr.", "overall")
_HPSV2 = ("anime", "concept-art", "paintings", "photo", "overall")
_DPG = ("global", "entity", "attribute", "relation", "other", "overall")

PUBLISHED = {
    "t2i_compbench": Published(
        columns=(*_T2I, "3d-spatial", "numeracy"),
        digits=4,
        rows=_rows(_T2I, "PixArt-α paper, table 3", {
            "SD 1.4": (0.3765, 0.3576, 0.4156, 0.1246, 0.3079, 0.3080),
            "SD 2": (0.5065, 0.4221, 0.4922, 0.1342, 0.3096, 0.3386),
            "GORS": (0.6603, 0.4785, 0.6287, 0.1815, 0.3193, 0.3328),
            "DALL·E 2": (0.5750, 0.5464, 0.6374, 0.1283, 0.3043, 0.3696),
            "SDXL": (0.6369, 0.5408, 0.5637, 0.2032, 0.3110, 0.4091),
            "PixArt-α": (0.6886, 0.5582, 0.7044, 0.2082, 0.3179, 0.4117),
        }),
        note="The published rows are from the benchmark's scripts of 2023; later ones give other numbers for "
        "SDXL. Run a known model next to yours.",
    ),
    "wise_legacy": Published(
        columns=_WISE,
        digits=2,
        rows=_rows(_WISE, "WISE legacy board", {
            "SD 1.5": (0.34, 0.35, 0.32, 0.28, 0.29, 0.21, 0.32),
            "SDXL 0.9": (0.43, 0.48, 0.47, 0.44, 0.45, 0.27, 0.43),
            "SD 3.5 large": (0.44, 0.50, 0.58, 0.44, 0.52, 0.31, 0.46),
            "Playground 2.5": (0.49, 0.58, 0.55, 0.43, 0.48, 0.33, 0.49),
            "FLUX.1-dev": (0.48, 0.58, 0.62, 0.42, 0.51, 0.35, 0.50),
            "PixArt-α": (0.45, 0.50, 0.48, 0.49, 0.56, 0.34, 0.47),
        }),
        note="Judge gpt-4o-2024-05-13; not comparable with WISE Verified.",
    ),
    "wise": Published(
        columns=_WISE,
        digits=4,
        rows=tuple(
            Row(name, {"overall": value}, "WISE Verified board")
            for name, value in {
                "SD 1.5": 0.3090, "SDXL 0.9": 0.3640, "SD 3 medium": 0.3850, "FLUX.1-dev": 0.4160,
            }.items()
        ),
        note="Judge Qwen3.5-35B-A3B, marks 0 or 1; PixArt-α is not on this board; not comparable with WISE "
        "legacy.",
    ),
    "geneval": Published(
        columns=_GENEVAL,
        digits=2,
        rows=(
            *_rows(_GENEVAL, "GenEval README", {
                "SD 1.5": (0.97, 0.38, 0.35, 0.76, 0.04, 0.06, 0.43),
                "SD 2.1": (0.98, 0.51, 0.44, 0.85, 0.07, 0.17, 0.50),
                "SDXL": (0.98, 0.74, 0.39, 0.85, 0.15, 0.23, 0.55),
            }),
            *_rows(_GENEVAL, "as quoted by the SD3 paper", {
                "PixArt-α": (0.98, 0.50, 0.44, 0.80, 0.08, 0.07, 0.48),
            }),
            Row("PixArt-Σ 1024", {"overall": 0.54}, "Sana README"),
        ),
    ),
    "dpg": Published(
        columns=_DPG,
        digits=2,
        rows=(
            Row("PixArt-α", {"overall": 71.6}, "Sana README", target=True),
            Row("PixArt-Σ 1024", {"overall": 80.5}, "Sana README"),
        ),
    ),
    "hpsv2": Published(
        columns=_HPSV2,
        digits=2,
        rows=(Row("PixArt-α", {"overall": 30.82}, "AMD Nitro-T table", target=True),),
        note="Version 2.0 and version 2.1 of the preference model give different numbers: state the version.",
    ),
    "imagereward": Published(
        columns=("ImageReward",), digits=4, rows=(), note="There is no published row for PixArt-α."
    ),
}  # fmt: skip


def benchmark_table(
    benchmark: str, scores: Mapping[str, float], counts: Mapping[str, int], *, model: str, source: str
) -> tuple[str, dict[str, Any]]:
    """A table of the published rows and a measured one.

    Args:
      benchmark: a key of `PUBLISHED`.
      scores, counts: measured scores by column, and the number of answers averaged in each score.
      model, source: model and source of the measured row.

    Returns:
      Markdown and JSON values. The target is in bold; the last row is the measured row minus the target.
    """
    published = PUBLISHED[benchmark]
    measured = Row(model, scores, source)
    target = next((row for row in published.rows if row.target), None)
    columns = [
        column
        for column in published.columns
        if any(column in row.scores for row in (*published.rows, measured))
    ]
    lines = ["| model | " + " | ".join(columns) + " | source |", "|---" * (len(columns) + 2) + "|"]
    for row in (*published.rows, measured):
        cells = [
            f"{row.scores[column]:.{published.digits}f}" if column in row.scores else "–"
            for column in columns
        ]
        cells = [row.model, *cells]
        if row.target:
            cells = [f"**{cell}**" for cell in cells]
        lines.append("| " + " | ".join([*cells, row.source]) + " |")
    difference = {}
    if target:
        difference = {
            column: scores[column] - target.scores[column]
            for column in columns
            if column in scores and column in target.scores
        }
        cells = [
            f"{difference[column]:+.{published.digits}f}" if column in difference else "–"
            for column in columns
        ]
        lines.append("| " + " | ".join([f"{model} − {target.model}", *cells, ""]) + " |")
    if counts:
        lines += ["", "Answers: " + ", ".join(f"{name} {count}" for name, count in counts.items()) + "."]
    if published.note:
        lines += ["", published.note]
    values = {
        "benchmark": benchmark,
        "columns": columns,
        "rows": [dataclasses.asdict(row) for row in (*published.rows, measured)],
        "difference_to_target": difference,
        "answers": dict(counts),
        "note": published.note,
    }
    return "\n".join(lines) + "\n", values


def result_table(results: Sequence[Result]) -> tuple[str, dict[str, Any]]:
    """A table of FID and CLIP scores: one row per metric, one column per model.

    Returns:
      Markdown and JSON values.

    Raises:
      UserError: two results of one metric have different protocols.
    """
    models = list(dict.fromkeys(result.model for result in results))
    lines = ["| metric | protocol | " + " | ".join(models) + " |", "|---" * (len(models) + 2) + "|"]
    rows = []
    for metric in dict.fromkeys(result.protocol.metric for result in results):
        chosen = [result for result in results if result.protocol.metric == metric]
        protocol = require_same(chosen)
        values = {result.model: result.value for result in chosen}
        cells = [f"{values[model]:.2f}" if model in values else "–" for model in models]
        preset = next((f" ({result.preset})" for result in chosen if result.preset), "")
        lines.append(f"| {metric} | {protocol.id}{preset} | " + " | ".join(cells) + " |")
        rows.append({"metric": metric, "values": values, "protocol": dataclasses.asdict(protocol)})
    return "\n".join(lines) + "\n", {"models": models, "rows": rows}
