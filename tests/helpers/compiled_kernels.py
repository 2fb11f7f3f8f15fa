"""Checks of the code that Triton compiles for a GPU that is not here."""

import re
from collections import Counter
from typing import Any

from benchmarks.offline_compiler import (
    REDUCTIONS,
    Variant,
    compile_variant,
    instructions,
    memory_instructions,
    registers_and_spills,
)


def compile_and_check(variant: Variant, target: str) -> str:
    """Returns what is wrong with the code of a variant, or an empty text."""
    try:
        compiled = compile_variant(variant, target)
        if target.startswith("sm"):
            check_code(variant, compiled)
        else:
            registers, spilled = registers_and_spills(compiled)
            assert not spilled, (registers, spilled)
    except Exception as error:
        return f"{variant}: {type(error).__name__}: {error}"
    return ""


def check_code(variant: Variant, compiled: Any) -> None:
    """Checks the code for NVIDIA with the widest loads, and of the kernels per channel.

    No spills, loads and stores of 16 bytes, and copies beside the arithmetic of a reduction.
    """
    flat, size = variant.layout.startswith("flat"), variant.dtype.itemsize
    reduces = variant.kernel in REDUCTIONS
    # A reduction with channels outermost loads 16 bytes of half precision whatever the size.
    odd = reduces and size == 2 and variant.layout in ("wide", "narrow")
    widest = variant.vector * size == 16
    if variant.layout and not (widest or flat or odd):
        return
    registers, spilled = registers_and_spills(compiled)
    # 4 programs of a multiprocessor have 128 registers for each of their threads.
    assert registers <= 128 and spilled == 0, (str(variant), registers, spilled)
    found = memory_instructions(compiled)
    local = sum(n for name, n in found.items() if name.startswith(("LDL", "STL")))
    # A division in float64 is a call, which may save a register.
    assert local <= 2 * (size == 8), (str(variant), found)
    if not variant.layout:
        return
    wide = "LDGSTS.E.BYPASS.128" if reduces else "LDG.E.128"
    assert found[wide] >= 1, (str(variant), found)
    if not reduces:
        assert found["STG.E.128"] >= 1, (str(variant), found)
    if size == 2 and widest and ("valid", None) in variant.given:
        # No value is loaded or stored alone.
        assert not [n for n in found if ".U16" in n or ".S16" in n], (str(variant), found)


def affine_values(compiled: Any) -> int:
    """Returns how many values a thread computes as fma(x - mean, scale, bias), from the PTX."""
    code = compiled.asm["ptx"]
    differences = set(re.findall(r"sub(?:\.rn)?\.f32\s+(%\w+),", code))
    found = re.findall(r"fma\.rn\.f32\s+%\w+, (%\w+), (%\w+), (%\w+);", code)
    # Values share scale and bias; other sums of products have an accumulator each.
    shared = Counter((scale, bias) for _, scale, bias in found)
    return sum(x in differences and shared[scale, bias] > 1 for x, scale, bias in found)


def fused_in_hardware(compiled: Any) -> int:
    """Returns the fused multiply-adds of float32 in the SASS."""
    return sum(name.startswith("FFMA") for _, name, _ in instructions(compiled))
