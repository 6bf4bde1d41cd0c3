"""Parsing the flags of commands that read a source."""

from __future__ import annotations

from collections.abc import Sequence

from pixart_jax.errors import UserError


def parse_part(text: str) -> tuple[int, int]:
    """Parses the value of `--shard`, "i/n" for part i of n.

    Raises:
      UserError: the text is not of that form, or i is not in 0 .. n - 1.
    """
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise UserError(f"--shard is '{text}': it must be i/n with 0 <= i < n, for example 0/4.")
    return int(i), int(n)


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
