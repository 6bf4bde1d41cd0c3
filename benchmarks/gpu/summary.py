"""Summarizes all results of a folder on one page of text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the page; figures that a case does not have are None."""

    name: str
    rate: float | None = None
    unit: str = "img/s"
    # Shares of the peak measured with matrix products on the same device, and of the peak in the datasheet.
    matrix: float | None = None
    datasheet: float | None = None
    memory_gib: float | None = None
    compile_seconds: float | None = None
    cached: bool = False
    remark: str = ""


def _shares(flops_per_second: float, machine: Mapping[str, Any]) -> dict[str, float | None]:
    stated = machine["datasheet_flops_per_second"]
    return {
        "matrix": flops_per_second / machine["matrix_peak"]["flops_per_second"],
        "datasheet": stated and flops_per_second / stated,
    }


def _compiled(compilation: Mapping[str, Any]) -> dict[str, Any]:
    return {"compile_seconds": compilation["compile_seconds"], "cached": compilation["from_cache"]}


def _step(name: str, result: Mapping[str, Any], remark: str) -> Row:
    """Makes a row from the output of `benchmark train`."""
    memory = result["memory"]
    return Row(
        name,
        result["images_per_second"],
        matrix=result["share_of_matrix_peak"],
        datasheet=result["share_of_datasheet"],
        memory_gib=memory["device_peak_GiB"] or memory["process_peak_GiB"],
        **_compiled(result["compilation"]),
        remark=remark,
    )


def train(name: str, case: Mapping[str, Any], machine: Mapping[str, Any]) -> Iterator[Row]:
    tries = ", ".join(f"{row['batch']} {row['outcome']}" for row in case.get("tries", ()))
    remark = f"batch {case['batch']}" + (f" (tried {tries})" if tries else "")
    yield _step(name, case["result"], remark)


def profile(name: str, case: Mapping[str, Any], machine: Mapping[str, Any]) -> Iterator[Row]:
    classes = case["result"]["classes"].items()
    shares = ", ".join(f"{label} {value['share']:.0%}" for label, value in classes)
    yield _step(name, case["result"], f"{shares}; kernels in profile.txt")


def compare(name: str, case: Mapping[str, Any], machine: Mapping[str, Any]) -> Iterator[Row]:
    (result,) = case["result"].values()
    for side, seconds in result["median_seconds"].items():
        ratio = result.get(f"times_as_fast_as_{side}")
        yield Row(
            f"{name}, {side}",
            result["batch"] / seconds,
            **_shares(result["model_gflops"][side] * 1e9, machine),
            compile_seconds=result["first_call_seconds"][side],
            remark=_faster(ratio) if ratio else f"batch {result['batch']}; compile: the first call",
        )


def sample(name: str, case: Mapping[str, Any], machine: Mapping[str, Any]) -> Iterator[Row]:
    steps = case["result"]["steps"]
    for result in case["result"]["results"]:
        for side, rate in result["images_per_second"].items():
            here = side == "pixart_jax"
            yield Row(
                f"{name}, {side}",
                rate,
                **_shares(rate * result["tflop_per_image"] * 1e12, machine),
                compile_seconds=result["compile_seconds"] if here else None,
                remark=f"{steps} steps" if here else _faster(result["times_as_fast_as_diffusers"]),
            )


def _faster(ratio: Mapping[str, Any]) -> str:
    low, high = ratio["of_single_rounds"]
    return f"pixart_jax is {ratio['of_medians']:.2f} times as fast ({low:.2f} to {high:.2f})"


def options(name: str, case: Mapping[str, Any], machine: Mapping[str, Any]) -> Iterator[Row]:
    result = case["result"]
    for option, row in result["options"].items():
        low, high = row["times_as_fast_range"]
        yield Row(
            f"{name}: {option}" if option == "plain" else option,
            result["arguments"]["batch"] / row["median_seconds"],
            memory_gib=row["planned_GiB"],
            compile_seconds=row["compile_seconds"],
            cached=row["from_cache"],
            remark=f"{row['times_as_fast']:.2f} times as fast as plain ({low:.2f} to {high:.2f})"
            if option != "plain"
            else "",
        )


def digits(name: str, case: Mapping[str, Any], machine: Mapping[str, Any]) -> Iterator[Row]:
    result = case["result"]
    bits = "bits equal" if result["bits_equal"] else f"BITS DIFFER {result['different_arrays']}"
    compilation = result["runs"]["whole"].get("compilation")
    yield Row(
        name,
        result["images_per_second"],
        **(_compiled(compilation) if compilation else {}),
        remark=f"{bits} after {result['steps']} steps; {result['what']}",
    )


def encoders(name: str, case: Mapping[str, Any], machine: Mapping[str, Any]) -> Iterator[Row]:
    result = case["result"]
    memory = result["memory"]
    yield Row(
        name,
        result[f"{result['unit']}_per_second"],
        unit={"tokens": "tok/s", "images": "img/s"}[result["unit"]],
        matrix=result["share_of_matrix_peak"],
        datasheet=result["share_of_datasheet"],
        memory_gib=memory["device_peak_GiB"] or memory["process_peak_GiB"],
        **_compiled(result["compilation"]),
        remark=f"batch {result['batch']}, {result['parameters'] / 1e6:,.0f}M parameters",
    )


def attention(name: str, case: Mapping[str, Any], machine: Mapping[str, Any]) -> Iterator[Row]:
    for shape, row in case["result"]["shapes"].items():
        yield Row(
            f"{name}: {shape}",
            row["batch"] / row["seconds"]["median"],
            **_shares(row["flops_per_second"], machine),
            **_compiled(row["compilation"]),
            remark=f"{row['seconds']['median'] * 1e3:.3f} ms, batch {row['batch']}",
        )


# First word of the name of a part -> function that makes its rows.
ROWS: dict[str, Callable[..., Iterator[Row]]] = {
    "train": train,
    "compare": compare,
    "sample": sample,
    "profile": profile,
    "options": options,
    "digits": digits,
    "encoders": encoders,
    "attention": attention,
}


def rows(part: str, found: Mapping[str, Any]) -> Iterator[Row]:
    """Yields the lines for the results of a part."""
    for name, case in found["cases"].items():
        if case.get("result") and case["outcome"] in ("ok", "failed"):
            yield from ROWS[part.partition("-")[0]](name, case, found["machines"][case["machine"]])
        if case["outcome"] != "ok":
            batch = f" at batch {case['batch']}" if case.get("batch") else ""
            why = case.get("why") or (case.get("output") or [""])[-1]
            yield Row(name, remark=f"{case['outcome']}{batch}: {why}"[:110])


def _cells(row: Row) -> str:
    def cell(value: float | None, form: str, width: int) -> str:
        return f"{'-' if value is None else format(value, form):>{width}}"

    seconds = cell(row.compile_seconds, ".0f", 5) + ("c" if row.cached else " ")
    return (
        f"{row.name:<44} {cell(row.rate, '.4g', 9)} {row.unit if row.rate is not None else '':5} "
        f"{cell(row.matrix, '.1%', 7)} {cell(row.datasheet, '.1%', 7)} {cell(row.memory_gib, '.1f', 6)} "
        f"{seconds} {row.remark}".rstrip()
    )


def _about(machine: Mapping[str, Any]) -> list[str]:
    """Describes the device in a few lines."""
    smi, limit = machine["nvidia_smi"], machine["memory_limit_bytes"]
    lines = [f"device      {machine['device_kind']}" + (f", {smi['memory.total']}" if smi else "")]
    lines[0] += f", JAX may use {limit / GIB:.1f} GiB" if limit else ""
    if smi:
        lines.append(
            f"driver      {smi['driver_version']}, clock up to {smi['clocks.max.sm']}, {smi['power.limit']}"
        )
    peak, stated = machine["matrix_peak"], machine["datasheet_flops_per_second"]
    lines.append(
        f"peak        {peak['flops_per_second'] / 1e12:.4g} TFLOP/s measured in {peak['dtype']} products of "
        f"{peak['size']}x{peak['size']}" + (f"; datasheet {stated / 1e12:.0f}" if stated else "")
    )
    words = [f"{name} {version}" for name, version in machine["versions"].items()]
    label = "versions"
    for start in range(0, len(words), 6):
        lines.append(f"{label:11} {', '.join(words[start : start + 6])}")
        label = ""
    return [*lines, f"measured    {machine['time']}, revision {machine['revision'] or 'unknown'}"]


def summary(folder: Path, parts: Mapping[str, Any]) -> str:
    """Returns the page: the device of the newest result, then a line for each case that has a result."""
    found = {name: folder / f"{name}.json" for name in parts}
    found = {name: json.loads(path.read_text()) for name, path in found.items() if path.is_file()}
    machines = [machine for part in found.values() for machine in part["machines"]]
    if not machines:
        return "no results\n"
    newest = max(machines, key=lambda machine: machine["time"])
    lines = _about(newest)
    others = sorted({machine["device_kind"] for machine in machines} - {newest["device_kind"]})
    if others:
        lines.append(f"WARNING     some results are of {', '.join(others)}")
    lines += [
        "",
        f"{'case':<44} {'rate':>9} {'':5} {'matrix':>7} {'sheet':>7} {'GiB':>6} {'comp.':>5}",
        "(shares of the measured matrix peak and of the datasheet; memory; seconds to compile, c: cached)",
    ]
    for name, part in found.items():
        lines += ["", f"{name}: {part['what']}", *(_cells(row) for row in rows(name, part))]
    return "\n".join(lines) + "\n"


def texts(part: Mapping[str, Any]) -> str:
    """Returns the texts that the cases of a part have written; '' if there are none."""
    results = [case.get("result") or {} for case in part["cases"].values()]
    return "\n".join(result["text"] for result in results if "text" in result)
