"""Counts the collectives of a compiled program in its HLO text."""

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
    """Counts the collectives that one run of a program executes.

    An operation in a loop counts once per iteration. The TPU compiler may split one collective over several
    fused computations to overlap it with arithmetic; these have the same channel and count once. The kinds
    are those of the compiled program: the TPU compiler replaces most reduce-scatters by an all-reduce and a
    slice, or by a ring of permutes.

    Args:
      text: `jax.stages.Compiled.as_text()`.

    Returns:
      kind -> {"count", "bytes"}, where bytes is the size of the results on one device.

    Raises:
      ValueError: if the text is not an HLO module, or if a collective is in a loop whose number of iterations
        is unknown.
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
    """Returns the bytes of a result.

    The start of an asynchronous collective other than all-reduce returns operands, results and scalar
    context; only the results count.
    """
    arrays = [(dtype, sides) for dtype, sides in hlo.shapes(result) if sides or not asynchronous]
    if asynchronous and kind != "all-reduce":
        arrays = arrays[len(arrays) // 2 :]
    return sum(hlo.array_bytes(*array) for array in arrays)
