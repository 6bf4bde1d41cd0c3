"""Counts the communication of a compiled program from its HLO text."""

from __future__ import annotations

import re

from pixart_jax.benchmarking import hlo

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_CHANNEL = re.compile(r"channel_id=(\d+)")


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
    found: dict[str, tuple[str, int, int]] = {}
    for instruction, times in hlo.executed(hlo.parse(text)):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        if times is None:
            raise ValueError(f"a collective in a loop of unknown length: {instruction.text[:200]}")
        channel = _CHANNEL.search(instruction.text)
        key = channel[1] if channel else instruction.name
        found[key] = (kind, times, _bytes(instruction.result, kind, asynchronous=kind != instruction.opcode))
    counts = {kind: {"count": 0, "bytes": 0} for kind in KINDS}
    for kind, times, size in found.values():
        counts[kind]["count"] += times
        counts[kind]["bytes"] += times * size
    return {kind: values for kind, values in counts.items() if values["count"]}


def _bytes(result: str, kind: str, *, asynchronous: bool) -> int:
    """Bytes of a result. The start of an asynchronous collective gives operands, results and context."""
    arrays = [(dtype, sides) for dtype, sides in hlo.shapes(result) if sides or not asynchronous]
    if asynchronous and kind != "all-reduce":
        arrays = arrays[len(arrays) // 2 :]
    return sum(hlo.array_bytes(*array) for array in arrays)
