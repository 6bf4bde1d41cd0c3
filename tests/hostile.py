"""Hypothesis strategies that damage valid inputs: values, JSON, bytes, pickles."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

from hypothesis import strategies as st

# In JSON, these texts become something that `json.dumps` cannot write.
DEEP, DIGITS, HUGE = "@deep@", "@digits@", "@huge@"
_RAW = {
    f'"{DEEP}"': "[" * 100_000 + "]" * 100_000,
    f'"{DIGITS}"': "9" * 5_000,
    f'"{HUGE}"': "1e999",
}

NUMBERS = (
    *(0, -1, 1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 10**30),
    *(0.0, -0.0, 0.5, 1.5, 1e-45, 5e-324, 1e39, 1e308, float("inf"), float("-inf"), float("nan")),
)
TEXTS = (
    *("", " ", "\n", "\t", "a", "0", "1", "true", "null", "None", "nan", "-", "--", "=", ",", ":", "/", "."),
    *(
        "..",
        "../x",
        "../../escape",
        "/",
        "/dev/null",
        "/dev/zero",
        "/proc/self/mem",
        "~",
        "~root",
        "~nobody/x",
    ),
    *("\0", "a\0b", "\ud800", "a\udfff", "\x1b[31mred", "\x07", "\x7f", "\x85", "\u2028", "\u202e", "\ufeff"),
    *(
        "🙂",
        "ß",
        "İ",
        "x" * 256,
        "x" * 5_000,
        "a/" * 200,
        "é" * 130,
        "{}",
        "[]",
        "%s",
        "{0}",
        "$(touch canary)",
    ),
    *(
        "`touch canary`",
        "; touch canary",
        "<script>",
        "hub:a/b",
        "gs://b/x",
        "http://h/x",
        "float8",
        "O",
        "V9",
    ),
)
VALUES = (None, True, False, *NUMBERS, *TEXTS, DEEP, DIGITS, HUGE, [], {}, [[]], [None], {"": None})
VALUES_MORE = (
    [0],
    [1, 2, 3],
    ["a"],
    {"a": 1},
    [[1, 2], [3, 4]],
    [float("nan")] * 4,
    ["../x", 0],
    [1] * 1_000,
)

texts = st.sampled_from(TEXTS) | st.text(max_size=12)
numbers = st.sampled_from(NUMBERS) | st.integers() | st.floats()
# Copies, because `trees` changes what is in a tree.
values = st.sampled_from((*VALUES, *VALUES_MORE)).map(copy.deepcopy) | texts | numbers


def to_json(value: Any) -> str:
    """JSON, also of what `json.dumps` cannot write; NaN and infinity as Python writes them."""
    text = json.dumps(value)
    for mark, raw in _RAW.items():
        text = text.replace(mark, raw)
    return text


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values in a tree of lists and dicts."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


@st.composite
def trees(draw, valid: Any, at_most: int = 2):
    """A tree of lists and dicts with up to `at_most` values replaced, removed, moved or added."""
    tree = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, at_most))):
        path = draw(st.sampled_from(places(tree)))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                tree = draw(values)
            continue
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        old, how = parent[path[-1]], draw(st.integers(0, 9))
        if how == 0:
            del parent[path[-1]]
        elif how == 1 and isinstance(parent, dict):
            parent[draw(texts)] = parent.pop(path[-1])
        elif how == 2 and isinstance(parent, list):
            parent.append(old)
        elif how == 3:
            parent[path[-1]] = [old]
        elif how == 4 and isinstance(old, int | float | str):
            parent[path[-1]] = draw(_near(old))
        else:
            parent[path[-1]] = draw(values)
    return tree


def _near(value: Any) -> st.SearchStrategy:
    """Values that differ a little from a number or a text."""
    if isinstance(value, str):
        changed = [value[:-1], value + "x", value * 2, f"../{value}", f"{value}\0", value.upper(), [value]]
        return st.sampled_from([*changed, f"/{value}", f"{value}/", f" {value}", f"{value}\n"])
    return st.sampled_from([value + 1, value - 1, -value, value * 1000, str(value), float(value), [value]])


@st.composite
def damaged(draw, valid: bytes):
    """Bytes that differ from `valid`: truncated, overwritten, repeated, or something else."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        # Most formats are most fragile at their start and end.
        at = draw(st.sampled_from([at, min(at, 64), max(len(data) - 64, 0) + min(at, 64)]))
        match draw(st.integers(0, 6)):
            case 0:
                del data[at:]
            case 1:
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case 2:
                data[at:at] = draw(st.binary(max_size=8))
            case 3:
                data[at : at + 4] = draw(
                    st.sampled_from([b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\n"])
                )
            case 4:
                del data[at : at + draw(st.integers(1, 16))]
            case 5:
                data += data[at:]
            case _:
                data[at : at + 8] = draw(
                    st.sampled_from([b"[" * 8, b"\xed\xa0\x80", b"NaN", b'"\\ud800"', b"1e999"])
                )
    return bytes(data[: 2**20])


@st.composite
def json_files(draw, valid: Any):
    """The bytes of a JSON file: mostly a changed tree, sometimes damaged bytes or another encoding."""
    how = draw(st.integers(0, 11))
    if how == 0:
        return draw(
            damaged(json.dumps(valid, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass"))
        )
    if how == 1:
        return to_json(draw(values)).encode()
    if how == 2:
        codec = draw(st.sampled_from(["utf-8-sig", "utf-16", "utf-32", "latin-1"]))
        return json.dumps(draw(trees(valid)), ensure_ascii=True).encode(codec, "replace")
    return to_json(draw(trees(valid))).encode()


class Bomb:
    """Unpickling it writes the canary."""

    def __init__(self, canary: str, how: int):
        self.canary, self.how = canary, how

    def __reduce__(self):
        import os
        import pathlib
        import subprocess

        canary = pathlib.Path(self.canary)
        return (
            (os.system, (f"touch '{canary}'",)),
            (pathlib.Path.touch, (canary,)),
            (exec, (f"open({self.canary!r}, 'w')",)),
            (subprocess.call, (["touch", self.canary],)),
            (open, (self.canary, "w")),
            (getattr, (canary, "touch")),
        )[self.how]


def bombs(canary: str) -> st.SearchStrategy[Any]:
    """Objects that write the canary when they are unpickled."""
    return st.integers(0, 5).map(lambda how: Bomb(canary, how))


def pickled(value: Any, protocol: int = 2) -> bytes:
    return pickle.dumps(value, protocol)
