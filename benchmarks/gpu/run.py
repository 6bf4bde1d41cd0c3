"""Runs the parts of `parts.py`, each within a time limit, and writes their results.

    python benchmarks/gpu/run.py [small] [PART ...]

Every case runs in its own process, so that its memory is freed when it ends. The JSON file of a part is
written after each case. If the list is interrupted, finished cases are kept, and the next call continues from
there. Running out of memory counts as a result. If a case fails, the end of its output is recorded, the list
continues, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from parts import PARTS, Case  # noqa: E402
from summary import summary, texts  # noqa: E402

from pixart_jax.errors import EXIT_USAGE, UserError, did_you_mean, report  # noqa: E402
from pixart_jax.files import write_text  # noqa: E402

# Cases with these outcomes are not run again.
FINISHED = ("ok", "out of memory")
OUT_OF_MEMORY = (
    "RESOURCE_EXHAUSTED",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "torch.OutOfMemoryError",
    "CUDA out of memory",
)
# Number of output lines that are kept of a failed case.
ERROR_LINES = 15
# Usable share of the memory that JAX may use; the rest is lost to fragmentation.
USABLE_MEMORY = 0.97
GIB = 2**30


def environment(small: bool, cache: Path, case: Case | None = None) -> dict[str, str]:
    """Returns the environment variables for the process of a case."""
    values = dict(os.environ)
    # With this, the project need not be installed.
    values["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # The same as `compile.cache`, but also for programs that have no such option.
    values |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    values |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if small:
        # Fast compilation, because the speed of these programs does not matter.
        quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        quick += f" {os.environ.get('XLA_FLAGS', '')}"
        values |= {"JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "PASSIVE", "XLA_FLAGS": quick.strip()}
    elif case and case.torch:
        values["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    return values


def run_process(
    command: tuple[str, ...], variables: dict[str, str], limit: float
) -> tuple[int | None, str, dict[str, Any] | None]:
    """Runs Python with `command` and --out; returns exit status (None: timed out), output and result.

    When this returns, the process and all processes that it has started have ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder, "result.json"), Path(folder, "log")
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *command, f"--out={out}"],
                cwd=ROOT,
                env=variables,
                stdout=file,
                stderr=subprocess.STDOUT,
                # A process group of its own can be killed, and it stays in the session of the shell.
                process_group=0,
            )
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        result = None
        if out.is_file():
            # A process that was killed while writing leaves an incomplete file.
            with contextlib.suppress(json.JSONDecodeError):
                result = json.loads(out.read_text())
        return status, log.read_text(errors="replace"), result


def run_once(case: Case, batch: int | None, small: bool, cache: Path, limit: float) -> dict[str, Any]:
    """Runs a case with one batch size, and returns its record."""
    command = case.command if batch is None else (*case.command, f"--batch={batch}")
    start = time.monotonic()
    status, output, result = run_process(command, environment(small, cache, case), limit)
    outcome = "ok" if status == 0 and result is not None else "failed"
    if status is None:
        outcome = "out of time"
    elif outcome == "failed" and any(sign in output for sign in OUT_OF_MEMORY):
        outcome = "out of memory"
    record = {
        "outcome": outcome,
        "batch": batch,
        "seconds": round(time.monotonic() - start, 1),
        "command": shlex.join(("python", *command)),
        "result": result,
    }
    if outcome != "ok":
        record["exit_status"] = status
        record["output"] = [line[:400] for line in output.splitlines() if line.strip()][-ERROR_LINES:]
    return record


def next_batch(record: dict[str, Any], limit_bytes: int | None) -> int:
    """Returns the batch size that should just fit, given the planned memory of another; at least 1.

        batch (limit - arguments) / (peak - arguments)

    `arguments` are weights, moments and moving average, which do not depend on the batch size.
    """
    batch = record["batch"]
    if limit_bytes is None:
        return 2 * batch  # a CPU reports no limit
    memory = record["result"]["memory"]
    state = memory["planned_arguments_GiB"]
    peak = max(memory["planned_peak_GiB"] or 0, state + memory["planned_temporary_GiB"])
    found = int(batch * (USABLE_MEMORY * limit_bytes / GIB - state) / (peak - state))
    # Round down to full tiles of the matrix products if that costs little.
    return max(1, found - found % 8 if found >= 32 else found)


def run_largest(
    case: Case, known: dict[str, Any] | None, limit_bytes: int | None, run: Any
) -> dict[str, Any]:
    """Looks for the largest batch that fits.

    The search starts with the batch size that should fit according to the memory plan of the default batch
    size. If a batch does not fit, three quarters of it is tried next.

    Args:
      case: the case with the default batch size.
      known: the record of the same case at the default batch size, if there is one.
      limit_bytes: memory that JAX may use on the device, if the device reports it.
      run: batch -> record.
    """
    tries = []

    def attempt(batch: int) -> dict[str, Any]:
        record = run(batch)
        tries.append({name: record[name] for name in ("batch", "outcome", "seconds")})
        return record

    first = known or attempt(case.batch)
    while first["outcome"] == "out of memory" and first["batch"] > 1:
        first = attempt(first["batch"] // 2)
    best = first
    if first["outcome"] == "ok":
        batch = next_batch(first, limit_bytes)
        while batch > first["batch"]:
            best = attempt(batch)
            if best["outcome"] != "out of memory":
                break
            best, batch = first, batch * 3 // 4
    return best | {"tries": tries}


def run_part(name: str, arguments: argparse.Namespace, machine: dict[str, Any]) -> bool:
    """Runs the cases of a part that have no result yet; returns False if one failed."""
    part, path = PARTS[name], arguments.out / f"{name}.json"
    known = json.loads(path.read_text()) if path.is_file() else {"machines": [], "cases": {}}
    found = {"part": name, "what": part.what, "machines": known["machines"], "cases": known["cases"]}
    cases = part.cases(arguments.small)
    todo = [
        case
        for case in cases
        if re.search(arguments.only, f"{name}: {case.name}")
        and (arguments.again or known["cases"].get(case.name, {}).get("outcome") not in FINISHED)
    ][: arguments.cases]
    if not todo:
        print(f"{name}: nothing left to run of {len(cases)} cases", flush=True)
        return True
    found["machines"].append(machine)
    deadline = time.monotonic() + 60 * arguments.minutes
    good = True
    for case in todo:
        left = deadline - time.monotonic()
        missing = [package for package in case.packages if importlib.util.find_spec(package) is None]
        needed = 1 if arguments.small else case.seconds
        if missing:
            record = {"outcome": "skipped", "why": f"not installed: {', '.join(missing)}"}
        elif left < needed:
            record = {"outcome": "skipped", "why": f"{max(left, 0):.0f} s left, it needs {needed}"}
        elif case.largest:

            def run(batch: int, case: Case = case) -> dict[str, Any]:
                left = max(1.0, deadline - time.monotonic())
                return run_once(case, batch, arguments.small, arguments.cache, left)

            same = found["cases"].get(case.name.replace("largest", str(case.batch)))
            if not same or same["outcome"] not in FINISHED:
                same = None
            record = run_largest(case, same, machine["memory_limit_bytes"], run)
        else:
            record = run_once(case, case.batch, arguments.small, arguments.cache, left)
        # A part often ends at its time limit. A case that timed out has failed only if it ran first.
        good &= record["outcome"] != "failed" and (record["outcome"] != "out of time" or case is not todo[0])
        if record["outcome"] in FINISHED or found["cases"].get(case.name, {}).get("outcome") not in FINISHED:
            # Results of earlier calls refer to the machine that they were measured on.
            found["cases"][case.name] = {"machine": len(found["machines"]) - 1} | record
        write_text(path, json.dumps(found, indent=1) + "\n")
        if text := texts(found):
            write_text(arguments.out / f"{name}.txt", text)
        write_text(arguments.out / "summary.txt", summary(arguments.out, PARTS))
        why = record.get("why") or f"{record['seconds']:.0f} s"
        print(f"{name}: {case.name}: {record['outcome']} ({why})", flush=True)
        for line in record.get("output", []) if record["outcome"] == "failed" else []:
            print(f"    {line}", flush=True)
    return good


def look_at_device(small: bool, cache: Path) -> dict[str, Any]:
    """Returns the result of `device.py`. Ends the program with status 2 if there is no GPU."""
    command = ("benchmarks/gpu/device.py", *(("--small",) if small else ()))
    status, output, result = run_process(command, environment(small, cache), 180)
    if status == EXIT_USAGE:
        raise UserError(output.strip().splitlines()[-1])
    if status != 0 or result is None:
        raise SystemExit(f"the device cannot be used:\n{output[-2000:]}")
    return result


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="performance_gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="[small] PART", help="parts to run, default all")
    parser.add_argument("--list", action="store_true", help="print the parts and their cases, run nothing")
    parser.add_argument("--again", action="store_true", help="also run cases that have a result")
    parser.add_argument(
        "--only",
        default="",
        metavar="PATTERN",
        help="run only cases whose 'PART: CASE' contains this regular expression",
    )
    parser.add_argument("--cases", type=int, help="maximum number of cases of each part, default all")
    parser.add_argument("--minutes", type=float, default=8, help="time limit of each part, default 8")
    parser.add_argument(
        "--out", type=Path, help="default benchmarks/results/gpu; for small a temporary folder"
    )
    parser.add_argument("--cache", type=Path, help="folder of compiled programs, default build/compiled")
    arguments = parser.parse_intermixed_args(words)
    arguments.small = arguments.words[:1] == ["small"]
    arguments.parts = arguments.words[arguments.small :] or list(PARTS)
    for name in arguments.parts:
        if name not in PARTS:
            raise UserError(f"part '{name}' is unknown: --list prints the parts.{did_you_mean(name, PARTS)}")
    return arguments


def main(words: list[str]) -> int:
    arguments = parse(words)
    if arguments.list:
        for name in arguments.parts:
            print(f"{name:12} {PARTS[name].what}")
        return 0
    if arguments.out is None:
        folder = tempfile.mkdtemp(prefix="performance_gpu_") if arguments.small else "benchmarks/results/gpu"
        arguments.out = Path(folder)
    arguments.out = arguments.out.absolute()
    arguments.out.mkdir(parents=True, exist_ok=True)
    # Programs for CPUs and GPUs can share a folder, because their keys differ.
    arguments.cache = (arguments.cache or ROOT / "build/compiled").absolute()
    machine = look_at_device(arguments.small, arguments.cache)
    print(f"{machine['device_kind']}: results in {arguments.out}", flush=True)
    good = True
    for name in arguments.parts:
        good &= run_part(name, arguments, machine)
    page = summary(arguments.out, PARTS)
    write_text(arguments.out / "summary.txt", page)
    print(page)
    return 0 if good else 1


if __name__ == "__main__":
    # SIGTERM must also end the case that is running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        report(f"error: {error}")
        sys.exit(EXIT_USAGE)
