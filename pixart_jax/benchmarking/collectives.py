"""Counts the communication of a compiled program from its HLO text."""

from __future__ import annotations

import math
import re

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CALLS = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_MANY_CALLS = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BOUND = re.compile(r"[su]32\[\]\S* constant\((\d+)\)")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_BITS = {"pred": 8, "token": 0, "opaque": 0}


def count_collectives(text: str) -> dict[str, dict[str, int]]:
    """Collectives that one run of the program executes.

    An operation in a loop counts once per turn. A TPU's compiler splits one collective over several fused
    computations, to overlap it with arithmetic; they carry one channel and count once. It also writes most
    reduce-scatters as an all-reduce and a slice, or as a ring of permutes: the kinds are its words.

    Args:
      text: `jax.stages.Compiled.as_text()`.

    Returns:
      kind -> {"count", "bytes"}, bytes being those of the results on one device.

    Raises:
      ValueError: no HLO module, or a collective in a loop whose turns are not known.
    """
    computations, entry = _computations(text)
    found: dict[str, tuple[str, int, int]] = {}
    stack: list[tuple[str, int | None]] = [(entry, 1)]
    while stack:
        name, times = stack.pop()
        for number, line in enumerate(computations[name]):
            collective = _COLLECTIVE.search(line)
            if collective:
                if times is None:
                    raise ValueError(f"a collective in a loop of unknown length: {line.strip()[:200]}")
                result, kind, start = collective.groups()
                channel = _CHANNEL.search(line)
                key = channel[1] if channel else f"{name}:{number}"
                found[key] = (kind, times, _bytes(result, kind, asynchronous=bool(start)))
            turns = _turns(line, computations) if " while(" in line else 1
            called = _CALLS.findall(line)
            for group in _MANY_CALLS.findall(line):
                called += [part.strip().lstrip("%") for part in group.split(",")]
            inner = times * turns if times and turns else None
            stack += [(callee, inner) for callee in called if callee in computations]
    counts = {kind: {"count": 0, "bytes": 0} for kind in KINDS}
    for kind, times, size in found.values():
        counts[kind]["count"] += times
        counts[kind]["bytes"] += times * size
    return {kind: values for kind, values in counts.items() if values["count"]}


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines by computation, and the name of the entry."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            lines = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        else:
            lines.append(line)
    if not entry:
        raise ValueError("the text is no HLO module: it has no ENTRY computation")
    return computations, entry


def _turns(line: str, computations: dict[str, list[str]]) -> int | None:
    """Turns of a while loop: the compiler's, else the bound in its condition; None if neither is told."""
    known = _TRIPS.search(line)
    if known:
        return int(known[1])
    bounds = [int(n) for part in computations[_CONDITION.search(line)[1]] for n in _BOUND.findall(part)]
    return bounds[0] if len(bounds) == 1 else None


def _bytes(shapes: str, kind: str, *, asynchronous: bool) -> int:
    """Bytes of a result. The start of an asynchronous collective gives operands, results and context."""
    sizes = []
    for dtype, sides in _SHAPE.findall(shapes):
        if asynchronous and not sides:
            continue
        bits = _BITS[dtype] if dtype in _BITS else int(re.search(r"\d+", dtype)[0])
        sizes.append(math.prod(int(side) for side in sides.split(",") if side) * bits // 8)
    if asynchronous and kind != "all-reduce":
        sizes = sizes[len(sizes) // 2 :]
    return sum(sizes)
