"""Lists the kernels of a training step on a GPU with their times, from a trace of one step.

    python benchmarks/gpu/kernels.py --config=configs/stage3.py:512 --batch=16 --out=FILE

Measures the step as `pixart_jax.benchmark train` does, traces one more step, and prints the kernels that take
the most time, with their shares of the step. Streams may overlap, so kernels and idle time can add up to more
than the step. On a CPU the script lists operations instead of kernels. --profile=FOLDER keeps the trace.
"""

from __future__ import annotations

import collections
import dataclasses
import gzip
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pixart_jax import benchmark
from pixart_jax.errors import UserError
from pixart_jax.flags import run

SHOWN = 40
# Patterns for the names of kernels, tried in this order. Fusions, reductions and all others count as
# elementwise.
CLASSES = (
    ("attention", re.compile(r"fmha|sdpa|flash|attention", re.IGNORECASE)),
    (
        "matrix products",
        re.compile(r"gemm|nvjet|cutlass|cublas|xmma|matmul|splitk|(^|_)dot([._]|$)|convolution", re.I),
    ),
    (
        "copies",
        re.compile(
            r"^mem(cpy|set)|^((loop|input|wrapped)_)*(copy|transpose|(dynamic[_-])?(update[_-])?slice|concatenate|pad)"
            r"([._-]|$)",
            re.IGNORECASE,
        ),
    ),
)
OTHER = "elementwise"


def read_trace(folder: Path) -> list[dict[str, Any]]:
    """Returns all events of the trace in a folder written by `jax.profiler.trace`."""
    paths = list(folder.glob("plugins/profile/*/*.trace.json.gz"))
    if len(paths) != 1:
        raise UserError(f"'{folder}' holds {len(paths)} traces: give the folder of one jax.profiler.trace.")
    with gzip.open(paths[0]) as file:
        return json.load(file)["traceEvents"]


def kernels(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the complete events on the streams of the GPUs; on a CPU, those of compiled operations."""
    names = {event["pid"]: event["args"]["name"] for event in events if event.get("name") == "process_name"}
    threads = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event.get("name") == "thread_name"
    }
    complete = [event for event in events if event.get("ph") == "X"]
    devices = {pid for pid, name in names.items() if "GPU" in name}
    if not devices:
        # Skip loops and calls, whose events include the operations inside them.
        operations = [event for event in complete if "hlo_op" in event.get("args", {})]
        return [event for event in operations if not re.match(r"while|call|conditional", event["name"])]
    streams = {at for at, name in threads.items() if at[0] in devices and name.startswith("Stream")}
    if not streams:
        found = sorted(name for at, name in threads.items() if at[0] in devices)
        raise UserError(f"the trace has no streams of a GPU, only {', '.join(found)}: no kernels to count.")
    return [event for event in complete if (event["pid"], event["tid"]) in streams]


def kind(name: str) -> str:
    """Returns the class of a kernel."""
    return next((label for label, pattern in CLASSES if pattern.search(name)), OTHER)


def busy_time(events: Sequence[dict[str, Any]]) -> float:
    """Returns the microseconds in which at least one of the events was running."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event["ts"]):
        start, stop = event["ts"], event["ts"] + event["dur"]
        total += max(0.0, stop - max(start, until))
        until = max(until, stop)
    return total


def shares(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns milliseconds of kernels and classes, and their shares of the time from first to last kernel."""
    if not events:
        raise UserError("the trace contains no kernels: run a step while it is being recorded.")
    window = max(event["ts"] + event["dur"] for event in events) - min(event["ts"] for event in events)
    time, calls, classes = collections.Counter(), collections.Counter(), collections.Counter()
    operations: dict[str, str] = {}
    for event in events:
        name = event["name"]
        time[name] += event["dur"]
        calls[name] += 1
        classes[kind(name)] += event["dur"]
        operations.setdefault(name, event.get("args", {}).get("hlo_op", ""))
    classes["idle"] = window - busy_time(events)
    order = (*(label for label, _ in CLASSES), OTHER, "idle")
    return {
        "window_ms": window / 1e3,
        "classes": {label: {"ms": classes[label] / 1e3, "share": classes[label] / window} for label in order},
        "kernels": [
            {
                "name": name,
                "operation": operations[name],
                "class": kind(name),
                "calls": calls[name],
                "ms": spent / 1e3,
                "share": spent / window,
            }
            for name, spent in time.most_common()
        ],
    }


def table(title: str, found: dict[str, Any]) -> str:
    """Formats the classes and the kernels with the most time as text."""
    lines = [f"{title}: {found['window_ms']:.2f} ms from the first kernel to the last", ""]
    lines += [
        f"  {label:16} {value['ms']:9.2f} ms {value['share']:7.1%}"
        for label, value in found["classes"].items()
    ]
    lines += ["", f"  {'ms':>9} {'share':>7} {'calls':>6}  {'class':16} kernel"]
    lines += [
        f"  {row['ms']:9.3f} {row['share']:7.1%} {row['calls']:6}  {row['class']:16} {row['name'][:90]}"
        for row in found["kernels"][:SHOWN]
    ]
    rest = found["kernels"][SHOWN:]
    if rest:
        spent, share = (sum(row[key] for row in rest) for key in ("ms", "share"))
        lines.append(f"  {spent:9.3f} {share:7.1%} {sum(row['calls'] for row in rest):6}  {len(rest)} others")
    return "\n".join(lines) + "\n"


def main(given: benchmark.Flags) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out, trace = Path(folder, "train.json"), given.profile or folder
        # The command itself, with all that it sets before it starts.
        changes = {"words": ("train",), "parts": False, "profile": trace, "out": str(out)}
        benchmark.main(dataclasses.replace(given, **changes))
        result = json.loads(out.read_text())
        found = shares(kernels(read_trace(Path(trace))))
    text = table(f"{result['config']}, batch {result['batch_size']}", found)
    print(text)
    if given.out:
        Path(given.out).write_text(json.dumps({**result, **found, "text": text}, indent=1) + "\n")


if __name__ == "__main__":
    run(main, benchmark.Flags)
