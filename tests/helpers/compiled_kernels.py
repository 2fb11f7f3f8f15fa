"""Compiles the Triton kernels for a GPU that is not here, as the layer would launch them.

Triton's compiler takes a target in place of a device, and its wheel has ptxas, cuobjdump and
nvdisasm. For an AMD target it has everything in itself.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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
# Shapes that reach the three kinds of tile; v more columns make loads of v values.
LAYOUTS = {
    "wide": lambda v: (2, 8, 4096 + v),
    "narrow": lambda v: (20, 8, 48 + v),
    "innermost": lambda v: (64, 64 + v),
}
# Tensors of x's size, and those of other dtypes. The others are statistics.
LIKE_X = {"x", "dy", "dx", "dresidual", "residual", "y"}
DOUBLE = {"message", "second", "own", "values_of_all"}
COUNTS = {"tracked": "i64", "skipped": "i64", "tickets": "i32", "mismatch": "i32", "valid": "u8"}
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
        for layout in LAYOUTS:
            for vector in widths:
                for kernel, cases in PASSES.items():
                    every = vector == widths[-1] or (vector, dtype) == (1, torch.bfloat16)
                    for case in cases if every else cases[:1]:
                        yield Variant(kernel, dtype, layout, vector, tuple(case.items()))
    for dtype in (torch.float32, torch.float64):
        for kernel, cases in PER_CHANNEL.items():
            for case in cases:
                yield Variant(kernel, dtype, "", 0, tuple(case.items()))


def compile_variant(variant: Variant, target: str) -> Any:
    """Returns what ``triton.compile`` makes of a variant, for pointers aligned to 16 bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megdet_d2.norm.kernels import elementwise, launch, per_channel, reductions, tiling

    modules = (reductions, elementwise, per_channel)
    kernel = next(vars(m)[variant.kernel] for m in modules if variant.kernel in vars(m))
    constants: dict[str, Any] = dict(variant.given)
    if variant.layout:
        x = torch.empty(LAYOUTS[variant.layout](variant.vector), dtype=variant.dtype)
        tiles = tiling.tiling_of(x).constants
        assert tiles["VECTOR"] == variant.vector, tiles
        constants |= {"STAGES": tiling.STAGES, **tiles}
        warps = constants.pop("num_warps")
    else:
        constants |= {"BLOCK": launch.CHANNELS}
        warps = (2 if variant.kernel == "finish" else 1) * tiling.NUM_WARPS
    statistics = torch.float64 if variant.dtype == torch.float64 else torch.float32
    name_of_x = next(name for name, dtype in DTYPES.items() if dtype == variant.dtype)
    signature, values, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], values[(i,)] = "constexpr", constants[argument]
            continue
        if argument in LIKE_X:
            kind = f"*{name_of_x}"
        elif argument in DOUBLE or (argument == "partials" and variant.kernel == "moments"):
            kind = "*fp64"
        elif argument in COUNTS:
            kind = f"*{COUNTS[argument]}"
        elif argument == "momentum":
            kind = "fp32"
        elif argument in _INTEGERS:
            kind = "i32"
        else:
            kind = f"*{NAMES[statistics]}"
        signature[argument] = kind
        if kind.startswith("*"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel, signature, values, attributes),
        target=GPUTarget(*TARGETS[target]),
        options={"num_warps": warps},
    )


_INTEGERS = "rows channels vectors groups tiles splits end second_end processes stamp".split()


def check_code(variant: Variant, compiled: Any) -> None:
    """Checks the code for NVIDIA with the widest loads, and of the kernels per channel.

    No spills, loads and stores of 16 bytes, and copies beside the arithmetic of a reduction.
    """
    widest = variant.vector * variant.dtype.itemsize == 16
    if variant.layout and not widest:
        return
    registers, spilled = registers_and_spills(compiled)
    # 4 programs of a multiprocessor have 128 registers for each of their threads.
    assert registers <= 128 and spilled == 0, (str(variant), registers, spilled)
    found = memory_instructions(compiled)
    local = sum(n for name, n in found.items() if name.startswith(("LDL", "STL")))
    # A division in float64 is a call, which may save a register.
    assert local <= 2 * (variant.dtype == torch.float64), (str(variant), found)
    if not variant.layout:
        return
    reduces = variant.kernel in ("moments", "gradient_sums")
    wide = "LDGSTS.E.BYPASS.128" if reduces else "LDG.E.128"
    assert found[wide] >= 1, (str(variant), found)
    if not reduces:
        assert found["STG.E.128"] >= 1, (str(variant), found)
    if variant.dtype.itemsize == 2 and ("valid", None) in variant.given:
        # No value is loaded or stored alone.
        assert not [n for n in found if ".U16" in n or ".S16" in n], (str(variant), found)


def memory_instructions(compiled: Any) -> Counter:
    """Returns the loads and stores in the SASS of an NVIDIA kernel, with their counts."""
    code = _tool(compiled, "cuobjdump", "--dump-sass")
    words = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9.]+)", code)
    return Counter(w for w in words if w.startswith(("LDG", "STG", "LDL", "STL", "LDGSTS")))


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
