"""Command lines as tests give them, without the flags of the process."""

from absl import flags

from pixart_jax.flags import define, read


def parse(cls, *arguments):
    """What a command whose flags are `cls` would be given: parse(Flags, "fid", "--out=x")."""
    values = flags.FlagValues()
    define(cls, values)
    return read(cls, values(["command", *arguments]), values)
