"""The offline compiler: compiles the Triton kernels for a GPU that is not here, as a layer does.

Triton's compiler takes a target in place of a device, and its wheel has ptxas, cuobjdump and
nvdisasm. For an AMD target it has everything in itself.
"""

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megdet_d2.norm.kernels import elementwise, launch, per_channel, reductions, tiling

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
# Shapes that reach each kind of tile; v more columns make loads of v values. With 7 channels x is
# not taken as flat, so elementwise kernels load v values too.
LAYOUTS: dict[str, Callable[[int], tuple[int, ...]]] = {
    "wide": lambda v: (2, 7, 4096 + v),
    "narrow": lambda v: (20, 7, 48 + v),
    "innermost": lambda v: (64, 64 + v),
    "flat, one image": lambda v: (1, 8, 4096 + v),
    "flat, two images": lambda v: (2, 8, 4096 + v),
    "flat": lambda v: (40, 8, 48 + v),
    "not aligned": lambda v: (2, 7, 4096 + v),
}
REDUCTIONS = ("moments", "gradient_sums")
# Tensors of x's size, and those of other dtypes. The others are statistics.
LIKE_X = {"x", "dy", "dx", "dresidual", "residual", "y"}
DOUBLE = {"message", "second", "own", "values_of_all"}
COUNTS = {"tracked": "i64", "skipped": "i64", "tickets": "i32", "mismatch": "i32", "valid": "u8"}
INTEGERS = "rows channels vectors groups tiles splits end second_end processes stamp".split()
NAMES = {torch.float64: "fp64", torch.float32: "fp32"}
# The optional arguments and the constants of each kernel's variants.
PASSES: dict[str, list[dict[str, Any]]] = {
    "moments": [
        {"valid": None, "own": None},
        {"own": None},
        {},
        {"valid": None, "own": None, "stamp": None},
    ],
    "gradient_sums": [
        {"RELU": False, "y": None},
        {"RELU": True, "y": None},
        {"RELU": True},
        {"RELU": False, "y": None, "stamp": None},
    ],
    "normalize": [
        {"RELU": relu, **residual}
        for relu in (False, True)
        for residual in ({}, {"residual": None})
    ],
    "input_gradient": [
        {"RELU": False, "y": None, "dresidual": None, "valid": None},
        {"RELU": False, "y": None, "dresidual": None, "valid": None, "mismatch": None},
        {"RELU": True, "y": None, "dresidual": None, "valid": None},
        {"RELU": True, "dresidual": None, "valid": None},
        {"RELU": True, "valid": None},
        {"RELU": True},
    ],
}
_NO_BUFFERS = dict.fromkeys(("running_mean", "running_var", "tracked", "skipped"))
_NO_GROUP = dict.fromkeys(("mismatch", "second"))
PER_CHANNEL: dict[str, list[dict[str, Any]]] = {
    "finish": [
        {"EPS": 1e-5, "CUMULATIVE": False, "second": None},
        {"EPS": 1e-5, "CUMULATIVE": True},
        {"EPS": 1e-5, "CUMULATIVE": False, "tracked": None, "skipped": None},
        {"EPS": 1e-5, "CUMULATIVE": False, "weight": None, "bias": None, **_NO_GROUP},
        {"EPS": 1e-5, "CUMULATIVE": False, **_NO_BUFFERS, **_NO_GROUP},
    ],
    "deviations": [{}],
}


@dataclass(frozen=True)
class Variant:
    """A kernel as it is launched for one dtype, layout and set of arguments."""

    kernel: str
    dtype: torch.dtype
    layout: str
    vector: int
    given: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        given = " ".join(f"{name}={value}" for name, value in self.given)
        return f"{self.kernel} {self.dtype} {self.layout} {self.vector} {given}"


def variants() -> Iterator[Variant]:
    """Yields the variants of all kernels that a layer can launch.

    Narrower loads have one set of arguments for each kernel, except single values of bfloat16.
    """
    for dtype in DTYPES.values():
        widths = [v for v in (1, 2, 4, 8) if v * dtype.itemsize <= 16]
        for kernel, cases in PASSES.items():
            for layout in LAYOUTS:
                flat, reduces = layout.startswith("flat"), kernel in REDUCTIONS
                if reduces and flat or layout == "not aligned" and not reduces:
                    continue
                for vector in widths:
                    if flat and vector == widths[-1]:
                        continue  # is not flat
                    every = vector == widths[-1] or (vector, dtype) == (1, torch.bfloat16)
                    for case in cases if every else cases[:1]:
                        yield Variant(kernel, dtype, layout, vector, tuple(case.items()))
    for dtype in (torch.float32, torch.float64):
        for kernel, cases in PER_CHANNEL.items():
            for case in cases:
                yield Variant(kernel, dtype, "", 0, tuple(case.items()))


def covering() -> Iterator[Variant]:
    """Yields variants that have between them every kernel, argument, dtype and kind of tile."""
    for v in variants():
        first = v.given == tuple((PASSES | PER_CHANNEL)[v.kernel][0].items())
        widest = v.vector * v.dtype.itemsize == 16
        if (
            not v.layout
            and v.dtype == torch.float32
            or v.dtype == torch.bfloat16
            and (widest and v.layout in ("wide", "innermost") or v.vector == 1 and first)
            or first
            and widest
            and v.layout in ("wide", "narrow", "innermost")
        ):
            yield v


def compile_variant(variant: Variant, target: str, **options: Any) -> Any:
    """Returns what ``triton.compile`` makes of a variant, for pointers aligned to 16 bytes.

    Args:
        options: of the compiler, such as ``maxnreg``.
    """
    constants: dict[str, Any] = dict(variant.given)
    if variant.layout:
        shape = LAYOUTS[variant.layout](variant.vector)
        others = [None] if variant.kernel == "gradient_sums" else []
        x = torch.empty(math.prod(shape) + 1, dtype=variant.dtype)
        x = (x[1:] if variant.layout == "not aligned" else x[:-1]).view(shape)
        tiles = tiling.tiling_of(x, variant.kernel in REDUCTIONS, *others).constants
        flat = tiles["LAYOUT"] == "flat"
        assert flat == variant.layout.startswith("flat"), (str(variant), tiles)
        assert flat or tiles["VECTOR"] == variant.vector, (str(variant), tiles)
        constants |= tiles
    else:
        warps = (2 if variant.kernel == "finish" else 1) * tiling.NUM_WARPS
        constants |= {"BLOCK": launch.CHANNELS, "num_warps": warps}
    return compile_kernel(variant.kernel, variant.dtype, constants, target, **options)


def compile_kernel(
    name: str, dtype: torch.dtype, constants: dict[str, Any], target: str, **options: Any
) -> Any:
    """Returns what ``triton.compile`` makes of a kernel.

    Args:
        name: of a kernel in ``PASSES`` or ``PER_CHANNEL``.
        dtype: of x.
        constants: of its tiling, its flags, and None for each argument that is not given.
        target: a key of ``TARGETS``.
        options: of the compiler.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    modules = (reductions, elementwise, per_channel)
    kernel = next(vars(module)[name] for module in modules if name in vars(module))
    constants = {"STAGES": tiling.STAGES, **constants}
    warps = constants.pop("num_warps")
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    name_of_x = next(key for key, value in DTYPES.items() if value == dtype)
    signature, values, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], values[(i,)] = "constexpr", constants[argument]
            continue
        if argument in LIKE_X:
            kind = f"*{name_of_x}"
        elif argument in DOUBLE or (argument == "partials" and name == "moments"):
            kind = "*fp64"
        elif argument in COUNTS:
            kind = f"*{COUNTS[argument]}"
        elif argument == "momentum":
            kind = "fp32"
        elif argument in INTEGERS:
            kind = "i32"
        else:
            kind = f"*{NAMES[statistics]}"
        signature[argument] = kind
        if kind.startswith("*"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel, signature, values, attributes),
        target=GPUTarget(*TARGETS[target]),
        options={"num_warps": warps, **options},
    )


def instructions(compiled: Any) -> list[tuple[int, str, str]]:
    """Returns address, name and operands of each instruction in the SASS of an NVIDIA kernel."""
    code = _tool(compiled, "cuobjdump", "--dump-sass")
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9.]+)([^;\n]*);", code)
    return [(int(address, 16), name, operands.strip()) for address, name, operands in found]


def memory_instructions(compiled: Any) -> Counter:
    """Returns the loads and stores in the SASS of an NVIDIA kernel, with their counts."""
    names = [name for _, name, _ in instructions(compiled)]
    return Counter(w for w in names if w.startswith(("LDG", "STG", "LDL", "STL", "LDGSTS")))


def loop(compiled: Any) -> tuple[int, list[str]]:
    """Returns the instructions of a turn of the first loop that loads from memory, and its loads.

    What a branch inside the loop passes over is not counted: only the first turn runs it. Without
    such a loop, of a kernel that has one tile, it returns the length of the whole.
    """
    code = [found for found in instructions(compiled) if found[1] != "NOP"]
    end = next((i for i, (_, name, _) in enumerate(code) if name.startswith("ATOM")), len(code))
    for i, (address, name, operands) in enumerate(code[:end]):
        start = _branch(name, operands)
        if start is not None and start < address:
            body = [found for found in code[: i + 1] if found[0] >= start]
            loads = [name for _, name, _ in body if name.startswith("LDG") and name != "LDGDEPBAR"]
            if loads:
                return _shortest(body), loads
    stop = next(i for i, (_, name, _) in enumerate(code) if name == "EXIT" and i > 20)
    return stop + 1, []


def _branch(name: str, operands: str) -> int | None:
    """Returns the address that an instruction jumps to; None if it is no branch."""
    target = re.search(r"0x([0-9a-f]+)", operands)
    return int(target[1], 16) if name == "BRA" and target else None


def _shortest(body: list[tuple[int, str, str]]) -> int:
    """Returns the number of instructions in a loop, without those that its branches pass over."""
    count, passed = 0, 0
    for address, name, operands in body:
        if address < passed:
            continue
        count += 1
        target = _branch(name, operands)
        if target is not None and address < target <= body[-1][0]:
            passed = target
    return count


def registers_and_spills(compiled: Any) -> tuple[int, int]:
    """Returns the registers of a thread, and the bytes of local memory that hold spilled ones."""
    if "amdgcn" in compiled.asm:
        code = compiled.asm["amdgcn"]
        return _number(r"\.vgpr_count:\s+(\d+)", code), _number(
            r"\.vgpr_spill_count:\s+(\d+)", code
        )
    usage = _tool(compiled, "cuobjdump", "--dump-resource-usage")
    return _number(r"REG:(\d+)", usage), _number(r"LOCAL:(\d+)", usage)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"no {pattern} in {text[:500]}"
    return int(found[1])


def _tool(compiled: Any, name: str, flag: str) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        result = subprocess.run([program, flag, file.name], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout
