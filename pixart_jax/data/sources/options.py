"""Parsing the flags of commands that read a source."""

from __future__ import annotations

from collections.abc import Sequence

from pixart_jax.errors import UserError
from pixart_jax.flags import whole_number

# Largest number of parts. The names of the files of a part have five digits.
MOST_PARTS = 99_999


def parse_part(text: str) -> tuple[int, int]:
    """Parses the value of `--shard`, "i/n" for part i of n.

    Raises:
      UserError: the text is not of that form, or i is not in 0 .. n - 1.
    """
    i, _, n = text.partition("/")
    part, parts = whole_number(i, 0, MOST_PARTS), whole_number(n, 1, MOST_PARTS)
    if part is None or parts is None or part >= parts:
        raise UserError(
            f"--shard is '{text}': it must be i/n with 0 <= i < n <= {MOST_PARTS}, for example 0/4."
        )
    return part, parts


def parse_options(pairs: Sequence[str]) -> dict[str, str]:
    """Parses the values of `--source_option`, each of the form NAME=VALUE.

    Raises:
      UserError: a value has no "=".
    """
    out = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise UserError(
                f"--source_option is '{pair}': it must be NAME=VALUE, for example image_root=photos."
            )
        out[name] = value
    return out
