"""Parses command lines in tests without using the global absl flags, and numbers that flags must reject."""

import math

from absl import flags

from pixart_jax.flags import LARGEST, SMALLEST, define, read


def parse(cls, *arguments):
    """Returns the flags of a command line as an instance of `cls`: parse(Flags, "fid", "--out=x")."""
    values = flags.FlagValues()
    define(cls, values)
    return read(cls, values(["command", *arguments]), values)


def outside(field, kind):
    """Returns numbers that a flag or a config field must reject: just outside its range, and far outside."""
    limits = field.metadata
    excluded = [limits["above"], limits["below"]]
    low = limits["minimum"] if limits["above"] is None else limits["above"]
    high = limits["maximum"] if limits["below"] is None else limits["below"]
    high = LARGEST[kind] if high is None else high
    near = [*excluded, low - 1, high + 1 if kind is int else high * 1.01]
    far = [2**31, 2**63, 2**64, 10**20, 10**400] if kind is int else [1e39, 1e308, 1e-308, -1e-308]

    def allowed(number):
        within = low <= number <= high and number not in excluded and not 0 < abs(number) < SMALLEST
        return within or number == limits["also"]

    found = [number for number in (*near, *far) if number is not None and not allowed(number)]
    return [*found, math.nan, math.inf, -math.inf]
