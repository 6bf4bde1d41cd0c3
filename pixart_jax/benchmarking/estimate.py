"""Estimates the time of a compiled training step from its HLO text. Nothing is run or measured.

For TPUs, the compiler annotates each instruction with `estimated_cycles`:

    seconds = sum over instructions (runs x cycles) / clock

For GPUs, an instruction takes as long as its arithmetic or its memory traffic, whichever is longer:

    seconds = sum over instructions runs x max(FLOPs / (0.7 x peak), bytes / bandwidth)

where only the FLOPs of matrix products count, and bytes are those that the instruction reads and writes.
(XLA's own cost models for GPUs, `xla_gpu_collect_cost_model_stats`, are not usable here: without tuning on
the GPU they are wrong by up to 80 times for matrix products, and by orders of magnitude for Triton kernels.)

Attention kernels are opaque to the compilers. For TPUs, their time is estimated as

    seconds = FLOPs of the matrix products / peak + 8 x logits / vector operations per second

with the head width padded to 128 lanes. The 8 vector operations are those of the softmax (maximum,
subtraction, exponential, sum, casts) or of its gradient; they are assumed not to overlap with the products.
For GPUs, cuDNN is assumed to reach the shares of the peak in `CUDNN_SHARES`.

The estimate does not include the time spent waiting for collectives, the time between kernels, or custom
calls that cannot be estimated (`Estimate.left_out` lists them).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

from pixart_jax.benchmarking import hlo
from pixart_jax.benchmarking.collectives import KINDS
from pixart_jax.benchmarking.measuring import DATASHEET, TPU_CLOCK, TPU_VECTOR, chip_name
from pixart_jax.benchmarking.topology import GPUS

# Groups of instructions. The estimated time is reported for each group.
GROUPS = (
    # Projections, MLPs and embeddings, including operations that are fused with them.
    "matrix_products",
    # Logits, softmax and weighted sums, including layout changes around a kernel.
    "self_attention",
    "cross_attention",
    # Layer norm, modulation, gates, residual sums and activations.
    "elementwise",
    # Sums of the backward pass: gradients of biases, shifts, scales and gates, and of the layer norm.
    "reductions",
    # Optimizer, moving average and divergence guard.
    "update",
    # Copies, transposes, slices and casts.
    "data_movement",
    # On TPUs, the arithmetic of collectives. Waiting for other devices is not included.
    "collectives",
    "other",
)

# Assumed shares of the datasheet's peak on a GPU, for matrix products and for cuDNN attention (forward,
# backward). The latter are 400 and 350 TFLOP/s on an H100.
PRODUCT_SHARE = 0.7
CUDNN_SHARES = (0.4, 0.35)
# Assumed number of vector operations per logit of a TPU attention kernel, forward or backward.
OPERATIONS_PER_LOGIT = 8
# Number of lanes of a TPU's vectors.
LANES = 128

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_OPERAND_SHAPES = re.compile(r"operand_layout_constraints=\{(.*?\})\}")
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")
_SPLASH_LAYOUTS = re.compile(r"\b([qk])_layout\W+(\d)")
_LOGITS = re.compile(r'"intermediate_tensor_shape":.*?"dimensions":\s*\[([^\]]*)\]')
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions":\[)([^\]}]*)')
_FLOATS = re.compile(r"(?:bf|f)\d+$")

# On GPUs, a "fusion-start" runs asynchronously.
_FUSIONS = ("fusion", "fusion-start")
_CONTROL = frozenset({"while", "conditional", "call", "async-start"})
_SLICES = frozenset({"slice", "dynamic-slice", "gather"})
_FREE = frozenset(
    {
        "parameter",
        "constant",
        "bitcast",
        "tuple",
        "get-tuple-element",
        "after-all",
        "partition-id",
        "replica-id",
    }
)
# Operations that take no time on a GPU, or an unknown time: control flow, collectives, custom calls.
_UNCOUNTED = _FREE | _CONTROL | set(KINDS) | {"custom-call"}
_MOVEMENT = _FREE | _SLICES | {
    *("copy", "copy-start", "transpose", "reshape", "convert", "broadcast", "concatenate", "pad", "iota"),
    *("dynamic-update-slice", "reverse"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The estimated time of a step on one device."""

    seconds: float
    # Seconds by group (see `GROUPS`); groups that take no time are absent.
    groups: dict[str, float]
    # Custom calls that could not be estimated: name and number of runs.
    left_out: dict[str, int]
    # The assumptions, in words.
    assumptions: str


@dataclasses.dataclass(frozen=True)
class Chip:
    """The properties of a chip that an estimate uses."""

    # Dense bfloat16 FLOP/s.
    peak: float
    # Cycles and vector operations per second (TPUs).
    clock: float | None = None
    vector: float | None = None
    # Bytes per second to and from memory (GPUs).
    bandwidth: float | None = None


def find_chip(device_kind: str) -> Chip | None:
    """Returns the chip with JAX's name `device_kind`, or None if its time cannot be estimated."""
    name = chip_name(device_kind)
    if name in TPU_CLOCK:
        return Chip(DATASHEET[name], clock=TPU_CLOCK[name], vector=TPU_VECTOR[name])
    for gpu in GPUS.values():
        if gpu.name == device_kind:
            return Chip(DATASHEET[name], bandwidth=gpu.bandwidth)
    return None


def estimate_step(text: str, chip: Chip) -> Estimate:
    """Estimates the time of one run of a compiled program on one device.

    An instruction in a loop counts once per iteration. A fusion counts as a whole; the instructions inside it
    do not count again.

    Args:
      text: `jax.stages.Compiled.as_text()`.
      chip: chip for which the program was compiled.

    Raises:
      ValueError: if the text is not an HLO module, or if an instruction that takes time is in a loop whose
        number of iterations is unknown.
    """
    program = hlo.parse(text)
    groups = dict.fromkeys(GROUPS, 0.0)
    left_out: dict[str, int] = {}
    kernels: set[str] = set()
    for instruction, times in hlo.executed(program, lambda found: found.opcode in _CONTROL):
        parts = list(_parts(program, instruction))
        found = [kernel for kernel in map(attention_kernel, parts) if kernel]
        kernels.update(kernel.library for kernel in found)
        if found:
            seconds = sum(kernel.seconds(chip) for kernel in found)
        elif chip.clock:
            cycles = _CYCLES.search(instruction.text)
            seconds = int(cycles[1]) / chip.clock if cycles else 0.0
        else:
            seconds = _gpu_seconds(program, instruction, chip)
        opaque = [] if seconds else [name for name in (_opaque(part, chip) for part in parts) if name]
        if not seconds and not opaque:
            continue
        if times is None:
            raise ValueError(f"time in a loop of unknown length: {instruction.text[:200]}")
        for name in opaque:
            left_out[name] = left_out.get(name, 0) + times
        groups[_group(program, instruction, parts)] += times * seconds
    return Estimate(
        seconds=sum(groups.values()),
        groups={name: seconds for name, seconds in groups.items() if seconds},
        left_out=left_out,
        assumptions=_assumptions(chip, kernels),
    )


def _assumptions(chip: Chip, kernels: set[str]) -> str:
    if chip.clock:
        assumed = [f"the compiler's cycles at {chip.clock / 1e9:g} GHz"]
    else:
        bandwidth = f"{chip.bandwidth / 1e12:.2f} TB/s"
        assumed = [f"matrix products at {PRODUCT_SHARE:.0%} of the peak, other instructions at {bandwidth}"]
    if "cudnn" in kernels:
        forward, backward = CUDNN_SHARES
        assumed.append(f"cudnn attention at {forward:.0%} of the peak forward, {backward:.0%} backward")
    if "splash" in kernels:
        assumed.append(
            f"splash attention: products at the peak with the head width padded to {LANES}, then "
            f"{OPERATIONS_PER_LOGIT} vector operations per logit"
        )
    return "; ".join([*assumed, "no waiting for collectives"])


def _parts(program: hlo.Program, instruction: hlo.Instruction) -> Iterator[hlo.Instruction]:
    """Yields the instruction or, for a fusion, the instructions inside it."""
    if instruction.opcode not in _FUSIONS:
        yield instruction
        return
    for callee in instruction.calls:
        for inner in program.computations[callee].values():
            yield from _parts(program, inner)


def _opaque(instruction: hlo.Instruction, chip: Chip) -> str | None:
    """Returns the name of a custom call whose work is not estimated, or None for other instructions."""
    target = _custom_call(instruction)
    if target == "tpu_custom_call":
        return f"{target} {re.sub(r'[.][0-9]+$', '', instruction.name)}"
    # Other custom calls on a TPU do no work: they are markers of the compiler, such as AsyncCollectiveStart
    # and ConcatBitcast.
    return None if chip.clock else target or None


def _custom_call(instruction: hlo.Instruction) -> str:
    """Returns the target of a custom call, or '' for other instructions."""
    return _TARGET.search(instruction.text)[1] if instruction.opcode == "custom-call" else ""


# --- Attention kernels --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An attention kernel."""

    library: str
    # FLOPs of its matrix products, including the padding of the head width.
    flops: float
    # Number of logits.
    logits: int
    backward: bool

    def seconds(self, chip: Chip) -> float:
        """Estimates the time of the kernel, as described in the module docstring."""
        if self.library == "cudnn":
            return self.flops / (chip.peak * CUDNN_SHARES[self.backward])
        return self.flops / chip.peak + OPERATIONS_PER_LOGIT * self.logits / chip.vector


def attention_kernel(instruction: hlo.Instruction) -> Kernel | None:
    """Returns the attention kernel that an instruction calls, or None for other instructions.

        FLOPs = products x 2 B H N S K

    with B samples, H heads, N queries, S keys and head width K. The forward pass has 2 products: logits and
    weighted sum. In the backward pass, cuDNN and the fused kernel of splash have 5: logits and the gradients
    of the probabilities, v, k and q. The separate kernels of splash have 3 (for q) and 4 (for k and v).
    """
    target = _custom_call(instruction)
    if target.startswith("__cudnn$fmha"):
        backward = "Backward" in target
        logits = [int(side) for side in re.findall(r"\d+", _LOGITS.search(instruction.text)[1])]
        width = _operand_shapes(instruction)[0][-1]
        products = 5 if backward else 2
        return Kernel("cudnn", products * 2.0 * math.prod(logits) * width, math.prod(logits), backward)
    phase = _SPLASH.search(instruction.text)
    if target != "tpu_custom_call" or not phase:
        return None
    query, key = _operand_shapes(instruction)[:2]
    layouts = dict(_SPLASH_LAYOUTS.findall(instruction.text))
    # In layout 2 (SEQ_MINOR) the last axis is the tokens.
    query, key = (
        (*shape[:-2], shape[-1], shape[-2]) if layouts.get(name) == "2" else shape
        for name, shape in (("q", query), ("k", key))
    )
    width = math.ceil(query[-1] / LANES) * LANES
    products = {"fwd": 2, "dq": 3, "dkv": 4}[phase[1]]
    # Unlike the separate kernel for k and v, the fused one also returns partial gradients of q, one for each
    # block of keys.
    parts = (
        len(sides) == len(query) + 1 and sides[-2:] == query[-2:] for sides in _floats(instruction.result)
    )
    if phase[1] == "dkv" and any(parts):
        products = 5
    logits = math.prod(query[:-1]) * key[-2]
    return Kernel("splash", products * 2.0 * logits * width, logits, phase[1] != "fwd")


def _operand_shapes(instruction: hlo.Instruction) -> list[tuple[int, ...]]:
    """Returns the shapes of the floating-point operands: query, key, value and those of a backward pass."""
    return _floats(_OPERAND_SHAPES.search(instruction.text)[1])


def _floats(types: str) -> list[tuple[int, ...]]:
    return [sides for dtype, sides in hlo.shapes(types) if _FLOATS.match(dtype)]


# --- Instructions of a GPU ----------------------------------------------------------------------------


def _gpu_seconds(program: hlo.Program, instruction: hlo.Instruction, chip: Chip) -> float:
    opcode = instruction.opcode
    uncounted = opcode in _UNCOUNTED or opcode.endswith(("-start", "-done"))
    if uncounted and opcode not in _FUSIONS and not _is_product(instruction):
        return 0.0
    products = (part for part in _parts(program, instruction) if _is_product(part))
    flops = sum(product_flops(program, product) for product in products)
    return max(flops / (PRODUCT_SHARE * chip.peak), traffic(program, instruction) / chip.bandwidth)


def _is_product(instruction: hlo.Instruction) -> bool:
    """Whether an instruction is a matrix product, which the TPU compiler represents as a convolution."""
    return instruction.opcode in ("dot", "convolution") or _custom_call(instruction).startswith("__cublas$")


def product_flops(program: hlo.Program, product: hlo.Instruction) -> float:
    """Returns the FLOPs of a matrix product on a GPU; a multiplication and an addition count as two."""
    # Library calls also return a workspace, after the result.
    result = hlo.shapes(product.result)[0][1]
    left = hlo.shapes(program.operands(product)[0].result)[0][1]
    contracted = [int(axis) for axis in re.findall(r"\d+", _CONTRACTED.search(product.text)[1])]
    return 2.0 * math.prod(result) * math.prod(left[axis] for axis in contracted)


def traffic(program: hlo.Program, instruction: hlo.Instruction) -> int:
    """Returns the bytes that an instruction reads and writes.

    A fusion reads each operand once. If it only slices an operand, only the slices count; if it updates an
    array in place, only the update counts.
    """
    if instruction.opcode not in _FUSIONS:
        types = [found.result for found in (*program.operands(instruction), instruction)]
        return sum(map(hlo.type_bytes, types))
    fused = program.computations[instruction.calls[0]]
    users: dict[str, list[hlo.Instruction]] = {name: [] for name in fused}
    for inner in fused.values():
        for name in inner.operands:
            users[name].append(inner)
    reads = sum(_read(inner, users) for inner in fused.values() if inner.opcode == "parameter")
    *_, root = fused.values()
    results = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return reads + sum(_written(result, fused) for result in results)


def _read(source: hlo.Instruction, users: dict[str, list[hlo.Instruction]]) -> int:
    full = hlo.type_bytes(source.result)
    total = 0
    for user in users[source.name]:
        if user.opcode == "bitcast":
            total += _read(user, users)
        elif user.opcode in _SLICES and user.operands[0] == source.name:
            total += hlo.type_bytes(user.result)
        elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == source.name):
            return full
    return min(total, full)


def _written(result: hlo.Instruction, fused: dict[str, hlo.Instruction]) -> int:
    while result.opcode == "bitcast":
        result = fused[result.operands[0]]
    if result.opcode == "dynamic-update-slice":
        result = fused[result.operands[1]]
    return hlo.type_bytes(result.result)


# --- Groups -------------------------------------------------------------------------------------------


def _group(program: hlo.Program, instruction: hlo.Instruction, parts: list[hlo.Instruction]) -> str:
    """Returns the group of an instruction (see `GROUPS`).

    It is determined by the `jax.named_scope`s of the model and the training step, and by the opcodes.
    """
    path = _path(program, instruction)
    scopes = set(re.findall(r"\w+", path))
    opcodes = {part.opcode for part in parts}
    if "attend" in scopes:
        return "cross_attention" if "cross_attention" in scopes else "self_attention"
    if any(map(_is_product, parts)):
        return "matrix_products"
    if "update" in scopes:
        return "update"
    if any(opcode.removesuffix("-start") in KINDS for opcode in opcodes):
        return "collectives"
    backward = "transpose(jvp" in path and "rematted_computation" not in scopes
    if backward and opcodes & {"reduce", "reduce-window"}:
        return "reductions"
    if opcodes <= _MOVEMENT:
        return "data_movement"
    if scopes & {"block", "modulate", "mlp"}:
        return "elementwise"
    return "other"


def _path(program: hlo.Program, instruction: hlo.Instruction) -> str:
    """Returns the scopes in which JAX traced an instruction, '' if unknown."""
    named = _OP_NAME.search(instruction.text)
    if named or not _is_product(instruction):
        return named[1] if named else ""
    # The GPU compiler may drop the name of a batched product. Use the names of its operands and users.
    around = program.computations[instruction.computation]
    results = {instruction.name}
    results |= {
        one.name for one in around.values() if one.opcode == "get-tuple-element" and results & {*one.operands}
    }
    near = [*program.operands(instruction), *(one for one in around.values() if results & {*one.operands})]
    return " ".join(found[1] for found in (_OP_NAME.search(one.text) for one in near) if found)
