"""Parses command lines in tests without using the global absl flags."""

from absl import flags

from pixart_jax.flags import define, read


def parse(cls, *arguments):
    """Returns the flags of a command line as an instance of `cls`: parse(Flags, "fid", "--out=x")."""
    values = flags.FlagValues()
    define(cls, values)
    return read(cls, values(["command", *arguments]), values)
