"""Instructions that compute with numbers, compare them and convert them."""

from __future__ import annotations

import numpy as np

from compile_for_gpu.emulator.block import Block, instruction
from compile_for_gpu.emulator.numbers import BITS, FLOATS, INTEGERS, PLAIN_BITS, REALS, Array
from compile_for_gpu.emulator.program import EmulatorError, Instruction

SMALLEST_NORMAL = np.finfo(np.float32).smallest_normal

ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}
ARITHMETIC |= {"min": np.fmin, "max": np.fmax}
EXTREMES = {"min": np.minimum, "max": np.maximum}  # of integers; NaN if one of two floats is
FUNCTIONS = {"ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "rcp": np.reciprocal}
COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
COMPARISONS |= {"ge": np.greater_equal}
ROUNDED = {"rzi": np.trunc, "rni": np.rint, "rpi": np.ceil, "rmi": np.floor}


def _flushed(numbers: Array, found: Instruction) -> Array:
    """Return zeros for subnormal numbers if the instruction asks for it."""
    return np.where(np.abs(numbers) < SMALLEST_NORMAL, numbers * 0, numbers) if "ftz" in found.parts else numbers


@instruction("add sub div rem", f"rn full approx ftz {INTEGERS} {REALS}")
@instruction("min max", f"NaN ftz {INTEGERS} {REALS}")
@instruction("mul", f"rn ftz lo hi wide {INTEGERS} {REALS}")
def compute(block: Block, found: Instruction) -> None:
    """Compute with two numbers."""
    name, kind = found.parts[0], found.type
    x, y = (block.read(operand, kind) for operand in found.operands[1:])
    if kind in FLOATS:
        operation = EXTREMES[name] if "NaN" in found.parts else ARITHMETIC[name]
        result = _flushed(operation(_flushed(x, found), _flushed(y, found)), found)
        block.write(found.operands[0], result, kind)
    elif name in ("div", "rem"):
        divisor = np.where(y == 0, y.dtype.type(1), y)  # what it gives is not specified
        quotient = np.abs(x) // np.abs(divisor)  # towards zero
        if x.dtype == np.int64:
            quotient = quotient * np.sign(x) * np.sign(divisor)
        block.write(found.operands[0], quotient if name == "div" else x - quotient * divisor, kind)
    else:
        result = (ARITHMETIC | EXTREMES)[name](x, y)
        _write_product(block, found, result)


def _write_product(block: Block, found: Instruction, result: Array) -> None:
    """Write the lower half of a product, the upper one, or all of it."""
    kind = found.type
    if "hi" in found.parts:
        if BITS[kind] == 64:
            raise EmulatorError("unknown instruction")
        result = result >> result.dtype.type(BITS[kind])
    block.write(found.operands[0], result, f"b{2 * BITS[kind]}" if "wide" in found.parts else kind)


@instruction("fma mad", f"rn rm ftz lo wide {INTEGERS} {REALS}")
def multiply_and_add(block: Block, found: Instruction) -> None:
    """Compute x * y + z, rounding once, to the nearest or downwards (rm)."""
    kind, last = found.type, found.type
    if kind not in FLOATS:
        last = f"{kind[0]}{2 * BITS[kind]}" if "wide" in found.parts else kind
    x, y, z = map(block.read, found.operands[1:], (kind, kind, last))
    if kind in FLOATS:
        x, y, z = (_flushed(number, found).astype(np.float64) for number in (x, y, z))
        result = x * y + z
        rounded = result.astype(np.float32) if kind == "f32" else result
        if "rm" in found.parts:
            if kind != "f32":
                raise EmulatorError("unknown instruction")
            rounded = np.where(rounded > result, np.nextafter(rounded, rounded.dtype.type(-np.inf)), rounded)
        block.write(found.operands[0], _flushed(rounded, found), kind)
    else:
        _write_product(block, found, x * y + z)


@instruction("neg abs", f"ftz {INTEGERS} {REALS}")
def change_sign(block: Block, found: Instruction) -> None:
    """Negate, or take the absolute value."""
    operation = np.negative if found.parts[0] == "neg" else np.abs
    block.write(found.operands[0], _flushed(operation(block.read(found.operands[1], found.type)), found), found.type)


@instruction("ex2 lg2 sqrt rsqrt rcp", "approx rn ftz f32")
def apply_function(block: Block, found: Instruction) -> None:
    """Compute a function of one number; approximate ones exactly."""
    x = _flushed(block.read(found.operands[1], "f32"), found)
    block.write(found.operands[0], _flushed(FUNCTIONS[found.parts[0]](x.astype(np.float64)), found), "f32")


@instruction("setp", f"eq ne lt le gt ge equ neu ltu leu gtu geu num nan ftz {PLAIN_BITS} {INTEGERS} {REALS}")
def compare(block: Block, found: Instruction) -> None:
    """Compare two numbers; comparisons that end in u are true if one is NaN, others false."""
    name = found.parts[1]
    x, y = (block.read(operand, found.type) for operand in found.operands[1:])
    is_nan = (x != x) | (y != y)
    if name in ("num", "nan"):
        result = is_nan == (name == "nan")
    else:
        result = COMPARISONS[name[:2]](x, y)
        result = result | is_nan if name.endswith("u") else result & ~is_nan
    block.write(found.operands[0], result, "pred")


@instruction("cvt", f"rn rz rzi rni rpi rmi ftz sat u8 s8 e4m3x2 {INTEGERS} {REALS}")
def convert(block: Block, found: Instruction) -> None:
    """Convert between types. Integers of floats are limited to their range, and 0 for NaN; with "sat" to 0 to 1."""
    to, kind = found.parts[-2:]
    numbers = [block.read(operand, kind) for operand in found.operands[1:]]
    if to.endswith("x2") and kind == "f32":
        numbers = [np.stack(numbers[::-1])]  # the first operand becomes the upper half
    elif len(numbers) != 1:
        raise EmulatorError("unknown instruction")
    [x] = numbers
    if found.parts[1] in ROUNDED:
        x = ROUNDED[found.parts[1]](x)
    elif "rz" in found.parts or (kind in FLOATS and to not in FLOATS):
        raise EmulatorError("unknown instruction")
    if "sat" in found.parts:
        if to not in FLOATS:
            raise EmulatorError("unknown instruction")
        x = np.nan_to_num(np.clip(x, 0, 1))
    if kind in FLOATS and to not in FLOATS:
        block.write(found.operands[0], _limited(x, to), to)
    else:
        block.write(found.operands[0], x, to)


def _limited(numbers: Array, kind: str) -> Array:
    """Return whole numbers as integers of a type, limited to its range."""
    if not kind.startswith("s"):
        raise EmulatorError("unknown instruction")
    end = 2.0 ** (BITS[kind] - 1)
    x = np.nan_to_num(numbers.astype(np.float64), nan=0.0, posinf=end, neginf=-end)
    inside = np.clip(x, -end, np.nextafter(end, 0)).astype(np.int64)
    return np.where(x >= end, np.int64(2 ** (BITS[kind] - 1) - 1), inside)
