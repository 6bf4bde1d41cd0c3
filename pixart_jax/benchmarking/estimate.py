"""How long a compiled training step takes, estimated from its HLO text. Nothing runs, nothing is measured.

On a TPU the compiler writes `estimated_cycles` beside each instruction:

    seconds = sum over instructions (runs x cycles) / clock

On a GPU an instruction takes as long as its arithmetic or its memory traffic, whichever is longer:

    seconds = sum over instructions runs x max(FLOPs / (0.7 x peak), bytes / bandwidth)

with the FLOPs of matrix products alone and the bytes that it reads and writes. (XLA's own models of a GPU,
`xla_gpu_collect_cost_model_stats`, are of no use here: without tuning on the card they misjudge matrix
products by up to 80 times, and what Triton compiles by orders of magnitude.)

Attention kernels are opaque to the compilers. On a TPU the estimate of one is

    seconds = FLOPs of its products / peak + 8 x logits / vector operations a second

with the head width padded to 128 lanes; the 8 stand for the softmax (maximum, subtraction, exponential, sum,
casts) or its gradient, and nothing overlapped. On a GPU cuDNN is assumed to reach the shares `CUDNN_SHARES`.

Not in the estimate: waiting for collectives, the time between kernels, and what `Estimate.left_out` names.
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

# What the time goes into:
GROUPS = (
    # projections, MLPs and embeddings, with what the compiler fuses into them
    "matrix_products",
    # logits, softmax and weighted sums, and the layouts around a kernel
    "self_attention",
    "cross_attention",
    # layer norm, modulation, gates, residual sums and activations
    "elementwise",
    # sums of the backward pass: gradients of biases, shifts, scales and gates, and the layer norm's own
    "reductions",
    # optimizer, moving average and the check for divergence
    "update",
    # copies, transposes, slices and casts
    "data_movement",
    # on a TPU, what collectives compute; nowhere what they wait
    "collectives",
    "other",
)

# Assumed shares of the datasheet's peak on a GPU: of a matrix product, and of cuDNN attention (forward,
# backward), which are 400 and 350 TFLOP/s on an H100.
PRODUCT_SHARE = 0.7
CUDNN_SHARES = (0.4, 0.35)
# Assumed vector operations of an attention kernel of a TPU for each logit, forward or backward.
OPERATIONS_PER_LOGIT = 8
# A TPU computes with vectors of this many lanes.
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

# The second runs beside what follows it, on a GPU.
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
# What takes no time on a GPU, or none that is known: marks, control, collectives, copies beside the work.
_UNCOUNTED = _FREE | _CONTROL | set(KINDS) | {"custom-call"}
_MOVEMENT = _FREE | _SLICES | {
    *("copy", "copy-start", "transpose", "reshape", "convert", "broadcast", "concatenate", "pad", "iota"),
    *("dynamic-update-slice", "reverse"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one step on one device."""

    seconds: float
    # Seconds by group, those of `GROUPS` that take any.
    groups: dict[str, float]
    # Custom calls of the program that the estimate cannot judge: name and runs.
    left_out: dict[str, int]
    # What was assumed, in words.
    assumptions: str


@dataclasses.dataclass(frozen=True)
class Chip:
    """What an estimate takes from a chip: FLOP/s, and cycles and vector operations a second (TPU) or bytes
    a second (GPU)."""

    peak: float
    clock: float | None = None
    vector: float | None = None
    bandwidth: float | None = None


def find_chip(device_kind: str) -> Chip | None:
    """The chip that JAX calls so; None for one that cannot be estimated."""
    name = chip_name(device_kind)
    if name in TPU_CLOCK:
        return Chip(DATASHEET[name], clock=TPU_CLOCK[name], vector=TPU_VECTOR[name])
    for gpu in GPUS.values():
        if gpu.name == device_kind:
            return Chip(DATASHEET[name], bandwidth=gpu.bandwidth)
    return None


def estimate_step(text: str, chip: Chip) -> Estimate:
    """Estimates one run of a compiled program on one device.

    An instruction in a loop counts once per turn. A fusion counts as a whole: what is fused into it does not
    count again.

    Args:
      text: `jax.stages.Compiled.as_text()`.
      chip: the program's target.

    Raises:
      ValueError: no HLO module, or time in a loop whose turns are not known.
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
        told = [f"the compiler's cycles at {chip.clock / 1e9:g} GHz"]
    else:
        bandwidth = f"{chip.bandwidth / 1e12:.2f} TB/s"
        told = [f"matrix products at {PRODUCT_SHARE:.0%} of the peak, all else at {bandwidth}"]
    if "cudnn" in kernels:
        forward, backward = CUDNN_SHARES
        told.append(f"cudnn attention at {forward:.0%} of the peak forward, {backward:.0%} backward")
    if "splash" in kernels:
        told.append(
            f"splash attention: products at the peak with the head width padded to {LANES}, then "
            f"{OPERATIONS_PER_LOGIT} vector operations a logit"
        )
    return "; ".join([*told, "no waiting for collectives"])


def _parts(program: hlo.Program, instruction: hlo.Instruction) -> Iterator[hlo.Instruction]:
    """The instruction, or all that is fused into it."""
    if instruction.opcode not in _FUSIONS:
        yield instruction
        return
    for callee in instruction.calls:
        for inner in program.computations[callee].values():
            yield from _parts(program, inner)


def _opaque(instruction: hlo.Instruction, chip: Chip) -> str | None:
    """The name of a custom call that does work which nobody estimates."""
    target = _custom_call(instruction)
    if target == "tpu_custom_call":
        return f"{target} {re.sub(r'[.][0-9]+$', '', instruction.name)}"
    # The other calls of a TPU are the compiler's marks, such as AsyncCollectiveStart and ConcatBitcast.
    return None if chip.clock else target or None


def _custom_call(instruction: hlo.Instruction) -> str:
    """The target of a custom call, '' for anything else."""
    return _TARGET.search(instruction.text)[1] if instruction.opcode == "custom-call" else ""


# --- Attention kernels --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An attention kernel: FLOPs of its products as it computes them, padding of the head width included."""

    library: str
    flops: float
    # Entries of the tables that softmax works on.
    logits: int
    backward: bool

    def seconds(self, chip: Chip) -> float:
        """As the head of this module says."""
        if self.library == "cudnn":
            return self.flops / (chip.peak * CUDNN_SHARES[self.backward])
        return self.flops / chip.peak + OPERATIONS_PER_LOGIT * self.logits / chip.vector


def attention_kernel(instruction: hlo.Instruction) -> Kernel | None:
    """The attention kernel that an instruction calls, None for anything else.

        FLOPs = products x 2 B H N S K

    Products are 2 forward (logits, weighted sum). Backward, cuDNN and splash's fused kernel have 5 (logits,
    gradients of the probabilities, of v, k and q); splash's separate kernels have 3 for q and 4 for k and v.
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
    # Layout 2 has the tokens last.
    query, key = (
        (*shape[:-2], shape[-1], shape[-2]) if layouts.get(name) == "2" else shape
        for name, shape in (("q", query), ("k", key))
    )
    width = math.ceil(query[-1] / LANES) * LANES
    products = {"fwd": 2, "dq": 3, "dkv": 4}[phase[1]]
    # Of the kernels for k and v, the fused one also gives q's gradient in parts, one for each block of keys.
    parts = (
        len(sides) == len(query) + 1 and sides[-2:] == query[-2:] for sides in _floats(instruction.result)
    )
    if phase[1] == "dkv" and any(parts):
        products = 5
    logits = math.prod(query[:-1]) * key[-2]
    return Kernel("splash", products * 2.0 * logits * width, logits, phase[1] != "fwd")


def _operand_shapes(instruction: hlo.Instruction) -> list[tuple[int, ...]]:
    """Sides of the floating-point operands: query, key, value, and what a backward pass takes on top."""
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
    """A matrix product, which the TPU's compiler calls a convolution."""
    return instruction.opcode in ("dot", "convolution") or _custom_call(instruction).startswith("__cublas$")


def product_flops(program: hlo.Program, product: hlo.Instruction) -> float:
    """FLOPs of a matrix product on a GPU: two for each multiplication and addition."""
    # The first array is the result, also where a library returns its workspace.
    result = hlo.shapes(product.result)[0][1]
    left = hlo.shapes(program.operands(product)[0].result)[0][1]
    contracted = [int(axis) for axis in re.findall(r"\d+", _CONTRACTED.search(product.text)[1])]
    return 2.0 * math.prod(result) * math.prod(left[axis] for axis in contracted)


def traffic(program: hlo.Program, instruction: hlo.Instruction) -> int:
    """Bytes that an instruction reads and writes.

    A fusion reads each operand once; of an operand that it only slices, it reads the slices, and of an array
    that it updates in place it reads nothing and writes the update.
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
    whole = hlo.type_bytes(source.result)
    total = 0
    for user in users[source.name]:
        if user.opcode == "bitcast":
            total += _read(user, users)
        elif user.opcode in _SLICES and user.operands[0] == source.name:
            total += hlo.type_bytes(user.result)
        elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == source.name):
            return whole
    return min(total, whole)


def _written(result: hlo.Instruction, fused: dict[str, hlo.Instruction]) -> int:
    while result.opcode == "bitcast":
        result = fused[result.operands[0]]
    if result.opcode == "dynamic-update-slice":
        result = fused[result.operands[1]]
    return hlo.type_bytes(result.result)


# --- Groups -------------------------------------------------------------------------------------------


def _group(program: hlo.Program, instruction: hlo.Instruction, parts: list[hlo.Instruction]) -> str:
    """Of `GROUPS`: by the scopes that the model and the step name, and by the parts of a fusion."""
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
    """Where JAX says that an instruction is from, '' if it does not."""
    named = _OP_NAME.search(instruction.text)
    if named or not _is_product(instruction):
        return named[1] if named else ""
    # A GPU's compiler may drop the name of a batched product: what is before and after it tells.
    around = program.computations[instruction.computation]
    results = {instruction.name}
    results |= {
        one.name for one in around.values() if one.opcode == "get-tuple-element" and results & {*one.operands}
    }
    near = [*program.operands(instruction), *(one for one in around.values() if results & {*one.operands})]
    return " ".join(found[1] for found in (_OP_NAME.search(one.text) for one in near) if found)
