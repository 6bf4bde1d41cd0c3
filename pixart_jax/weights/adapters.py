"""Low-rank adapters in memory: LoRA (arXiv 2106.09685), rsLoRA (2312.03732) and DoRA (2402.09353).

An adapter changes the kernels W [out, in] of some modules:

    LoRA    W' = W + s B A
    DoRA    W' = m (W + s B A) / ||W + s B A||      with the norm of each output row

with A [r, in] and B [out, r]. s is alpha / r, or alpha / sqrt(r) for rsLoRA. For the patch convolution, A is
a convolution [r, in, rows, columns], and the norm is over all axes but the first.

Modules have the names that they have in diffusers' `PixArtTransformer2DModel`, and factors the layout of
PyTorch. `adapter_files.py` and `adapter_export.py` read and write files.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from pixart_jax.errors import UserError
from pixart_jax.models.configs import PixArtConfig
from pixart_jax.weights.backbones import backbone_table
from pixart_jax.weights.tables import Entry, Path, Table, by, first_names


class Factors(NamedTuple):
    """The adapter of one module."""

    down: np.ndarray  # A, [r, in], or [r, in, rows, columns] for the patch convolution; float32
    up: np.ndarray  # B, [out, r], also for the convolution; float32
    scale: float  # s
    magnitude: np.ndarray | None  # m of DoRA, [out]; None without DoRA

    @property
    def rank(self) -> int:
        return len(self.down)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The factors of an adapter, and where it comes from."""

    # By the name of the module in diffusers, such as 'transformer_blocks.0.attn1.to_q' or 'pos_embed.proj'.
    modules: Mapping[str, Factors]
    # Whether formats that state alpha and use_rslora get alpha = s sqrt(r) instead of s r.
    rslora: bool = False
    # The weights that the adapter belongs to, as its file names them; '' if it does not.
    base: str = ""
    # How it was made.
    manifest: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # Its path, for messages.
    name: str = "the adapter"
    # Messages for the user who loads it.
    notes: tuple[str, ...] = ()
    # The licence of its base weights, a key of `cards.LICENCES`; '' if it is not known.
    licence: str = ""

    def alpha(self, module: str) -> float:
        """alpha of a module: the number from which s is computed, see `rslora`."""
        factors = self.modules[module]
        return factors.scale * (math.sqrt(factors.rank) if self.rslora else factors.rank)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the factors, whatever file they are read from."""
        digest = hashlib.sha256()
        for module, factors in sorted(self.modules.items()):
            shapes = [part.shape for part in factors[:2]], factors.scale, factors.magnitude is not None
            digest.update(f"{module} {shapes}".encode())
            for part in (factors.down, factors.up, factors.magnitude):
                digest.update(b"" if part is None else np.ascontiguousarray(part, "<f4").tobytes())
        return digest.hexdigest()


# --- Merging ----------------------------------------------------------------------------------------


def merge(
    params: Mapping[str, Any], config: PixArtConfig, adapters: Sequence[tuple[Adapter, float]]
) -> dict[str, Any]:
    """Adds adapters to the kernels of a network.

        W' = W + sum_i w_i (W'_i - W)

    where W'_i is the kernel with adapter i alone. The sum is exact for LoRA, whose changes do not depend on
    each other. Everything is computed in float32.

    Args:
      params: nested dict of float32 arrays in the tree of `config`.
      config: of the network.
      adapters: each with its weight w_i. A weight of 0 changes nothing.

    Returns:
      the parameters. Arrays that no adapter changes are those of `params`.

    Raises:
      UserError: see `check_fits`; or a merged kernel has values that are not finite.
    """
    flat = nnx.traversals.flatten_mapping(dict(params))
    merged = dict(merged_kernels(flat, config, adapters))
    return nnx.traversals.unflatten_mapping({**flat, **merged})


def merged_kernels(
    flat: Mapping[Path, Any], config: PixArtConfig, adapters: Sequence[tuple[Adapter, float]]
) -> Iterator[tuple[Path, np.ndarray]]:
    """Yields path and value of each parameter that adapters change; see `merge`.

    Args:
      flat: parameters by path. Those that no adapter changes are not needed.
      config, adapters: as for `merge`.
    """
    for adapter, _ in adapters:
        check_fits(adapter, config)
    active = [(adapter, weight) for adapter, weight in adapters if weight]
    table = backbone_table("diffusers", config)
    for path, entries in changed(table, [adapter for adapter, _ in active]).items():
        parameter = np.array(flat[path], np.float32)
        for entry in entries:
            kernel = entry.layout.to_theirs(parameter[entry.index])
            change = np.zeros(kernel.shape, np.float32)
            with np.errstate(all="ignore"):  # the result is checked
                for adapter, weight in active:
                    if factors := adapter.modules.get(_module(entry)):
                        change += np.float32(weight) * _change(kernel, factors)
                kernel = kernel + change
            if not np.isfinite(kernel).all():
                names = " and ".join(f"'{adapter.name}'" for adapter, _ in active)
                raise UserError(
                    f"{_module(entry)} with {names} has values that are NaN or infinite: give a smaller "
                    "weight, or another file."
                )
            parameter[entry.index] = entry.layout.to_ours(kernel, table.part_shape(entry))
        yield path, parameter


def changed(table: Table, adapters: Sequence[Adapter]) -> dict[Path, list[Entry]]:
    """The parameters that adapters change, with the entries of the modules that they consist of."""
    modules = {module for adapter in adapters for module in adapter.modules}
    found = {path: [e for e in entries if _module(e) in modules] for path, entries in table.by_path()}
    return {path: entries for path, entries in found.items() if entries}


def check_fits(adapter: Adapter, config: PixArtConfig) -> None:
    """Checks the modules and shapes of an adapter.

    Raises:
      UserError: it has modules that the network lacks, or factors of another shape. Names the first ones.
    """
    if config.kind != "pixart":
        raise UserError(f"'{adapter.name}' is an adapter of a PixArt, and these weights are a DiT.")
    table = backbone_table("diffusers", config)
    shapes = {_module(entry): table.their_shape(entry) for entry in table.entries if _module(entry)}
    unknown, wrong = [module for module in adapter.modules if module not in shapes], []
    for module, factors in adapter.modules.items():
        out, *inputs = shapes.get(module, (0,))
        wanted = {
            "A": (factors.down.shape, (factors.rank, *inputs)),
            "B": (factors.up.shape, (out, factors.rank)),
            "m": ((out,) if factors.magnitude is None else factors.magnitude.shape, (out,)),
        }
        wrong += [
            f"{name} of {module} {by(shape)} for {by(expected)}"
            for name, (shape, expected) in wanted.items()
            if module in shapes and shape != expected
        ]
    problems = [
        f"{len(names)} {what}: {first_names(names)}"
        for what, names in (("modules unknown", unknown), ("factors of the wrong shape", wrong))
        if names
    ]
    if problems:
        raise UserError(
            f"'{adapter.name}' does not fit these weights of width {config.hidden_size} and depth "
            f"{config.depth}: {'; '.join(problems)}. Give the weights that it was trained from."
        )


def _module(entry: Entry) -> str:
    """The name of the module whose kernel an entry is; '' if it is something else."""
    return entry.key.removesuffix(".weight") if entry.path[-1] == "kernel" else ""


def _change(kernel: np.ndarray, factors: Factors) -> np.ndarray:
    """W' - W of one adapter; kernel [out, …]."""
    rows = kernel.reshape(len(kernel), -1)
    change = np.float32(factors.scale) * (factors.up @ factors.down.reshape(factors.rank, -1))
    if factors.magnitude is not None:
        tuned = rows + change
        change = factors.magnitude[:, None] * tuned / np.linalg.norm(tuned, axis=1, keepdims=True) - rows
    return change.reshape(kernel.shape)


# --- Fused projections ------------------------------------------------------------------------------


def split(fused: Factors, names: Sequence[str]) -> dict[str, Factors]:
    """Splits the adapter of a fused projection, such as query, key and value, into those of its members.

    All members have the same A and s, and their rows of B and m. The components of A that the rows of a
    member do not use, as in the block-diagonal adapters that `fuse` makes, are removed. A member that uses
    none has no adapter. Both are exact, because their products are zero.
    """
    if len(names) == 1:
        return {names[0]: fused}
    count, out = len(names), {}
    magnitudes = [None] * count if fused.magnitude is None else np.split(fused.magnitude, count)
    for name, up, magnitude in zip(names, np.split(fused.up, count), magnitudes):
        used = up.any(axis=0)
        if not used.any():
            if magnitude is None and fused.up.any():
                continue
            used[:] = True
        out[name] = Factors(fused.down[used], up[:, used], fused.scale, magnitude)
    return out


def fuse(members: Sequence[Factors | None]) -> Factors:
    """Joins the adapters of the members of a fused projection; the inverse of `split`.

    A is the stack of their A, and B is block diagonal. Members with one and the same A and s keep that A. A
    member without an adapter has rows of zeros.

    Raises:
      ValueError: only some members have a magnitude, because that of the others is a property of the base; or
        their shapes differ.
    """
    given = [member for member in members if member is not None]
    first = given[0]
    dora = first.magnitude is not None
    if any((each.magnitude is not None) != dora for each in given) or (dora and len(given) < len(members)):
        raise ValueError("DoRA needs all members")
    if any(each.down.shape[1:] != first.down.shape[1:] or len(each.up) != len(first.up) for each in given):
        raise ValueError("members of different shapes")
    magnitude = np.concatenate([each.magnitude for each in given]) if dora else None
    if len(given) == len(members) and all(
        each.scale == first.scale and np.array_equal(each.down, first.down) for each in given
    ):
        return Factors(first.down, np.concatenate([each.up for each in given]), first.scale, magnitude)
    down = np.concatenate([each.down for each in given])
    # Members may have different scales. Dividing a scale by itself gives 1, so equal ones change nothing.
    scale = next((each.scale for each in given if each.scale), 1.0)
    up = np.zeros((len(first.up) * len(members), len(down)), np.float32)
    column = 0
    for number, each in enumerate(members):
        if each is not None:
            rows = slice(number * len(first.up), (number + 1) * len(first.up))
            up[rows, column : column + each.rank] = each.up * np.float32(each.scale / scale)
            column += each.rank
    return Factors(down, up, scale, magnitude)
