"""A roofline of the four passes: models their time on a GPU from the compiled code, without a GPU.

    python benchmarks/roofline.py                               # prints a table
    python benchmarks/roofline.py --output docs/results/roofline_2026-11-30.json

It compiles the kernels for sm_90 as a layer would launch them, and reads registers, shared memory
and instructions. The time of a kernel is the largest of three, for each wave of programs:

* memory: its bytes at the bandwidth of a copy, after the first load.
* latency: by Little's law it has no more bandwidth than bytes in flight / latency. A program of a
  reduction has several tiles in flight where its loads are asynchronous, and all others have one.
* issue: its instructions, at four per cycle and multiprocessor.

Added to it are the start of a kernel, the merge of the splits in a reduction, and in the moments of
rows with odd starts the tile of the pivot, for which the others wait.
"share" is the time of a copy of as many bytes over the time of the kernel. "of peak" is the time of
these bytes without any start, which is what a benchmark compares with the copy of a huge tensor.
The last column is the measured share, from docs/results/gpu_kernels_*.json, where there is one.
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from offline_compiler import compile_kernel, loop, registers_and_spills
from tabulate import tabulate

from megdet_d2.norm.kernels.tiling import STAGES, Tiling, tiling_of

RESULTS = Path(__file__).parent.parent / "docs/results"


@dataclass(frozen=True)
class GPU:
    """A GPU, as far as the model needs to know it."""

    bandwidth: float  # bytes per second of a copy
    in_flight: int  # bytes per multiprocessor that reach this bandwidth
    processors: int = 132
    # Compute capability 9.0 in the CUDA C++ Programming Guide, table of technical specifications.
    registers: int = 65536
    shared: int = 228 * 1024
    threads: int = 2048
    programs: int = 32
    clock: float = 1.7e9  # cycles per second under load; an assumption


# Processors and bandwidth: NVIDIA's data sheets (4.8 and 3.35 TB/s), of which a copy reaches about
# 0.9: an assumption. Bytes in flight: NVIDIA's CUB, tuning_transform.cuh, "32 for H100, 48 for
# H200" KiB.
GPUS = {"H200": GPU(4.3e12, 48 * 1024), "H100": GPU(3.0e12, 32 * 1024)}
# Seconds; assumptions until something is measured. A kernel that follows another one in a stream;
# a load from memory while the device is idle; a trip to the L2 cache and back.
START, LOAD, CACHE = 1.0e-6, 0.7e-6, 0.3e-6

# The shapes of R50-FPN for two images of 800x1344; the heads on 512 regions of each image; res5 of
# a size that is odd.
SHAPES = [
    (2, c, 800 // s, 1344 // s)
    for c, s in [(64, 2), (64, 4), (256, 4), (128, 8), (512, 8)]
    + [(256, 16), (1024, 16), (512, 32), (2048, 32)]
] + [(1024, 256, 7, 7), (2, 2048, 25, 43)]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
# Tensors of x's size that a pass reads and writes, and the arguments that its plain form lacks.
PASSES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "moments": (1, 0, {"valid": None, "own": None}),
    "gradient_sums": (2, 0, {"RELU": False, "y": None}),
    "normalize": (1, 1, {"RELU": False, "residual": None}),
    "input_gradient": (2, 1, {"RELU": False, "y": None, "dresidual": None, "valid": None}),
}
REDUCTIONS = ("moments", "gradient_sums")


@dataclass(frozen=True)
class Code:
    """The code of a kernel, as the compiler has made it."""

    registers: int
    shared: int  # bytes
    threads: int
    instructions: int  # of a thread, for a tile in the loop of a reduction, else for all; see loop
    asynchronous: bool  # the loop loads by cp.async


def code_of(name: str, dtype: torch.dtype, tiling: Tiling) -> Code:
    """Reads the code of a kernel, after compiling it."""
    compiled = compile_kernel(name, dtype, {**tiling.constants, **PASSES[name][2]}, "sm_90")
    count, loads = loop(compiled)
    return Code(
        registers_and_spills(compiled)[0],
        compiled.metadata.shared,
        32 * compiled.metadata.num_warps,
        count,
        any(load.startswith("LDGSTS") for load in loads),
    )


def resident(code: Code, gpu: GPU) -> int:
    """Returns the programs that one multiprocessor runs at once."""
    registers = code.threads * 8 * math.ceil(code.registers / 8)
    shared = code.shared + 1024  # of the system, per program
    limits = gpu.registers // registers, gpu.shared // shared, gpu.threads // code.threads
    return min(*limits, gpu.programs)


def model(name: str, size: int, tiling: Tiling, code: Code, gpu: GPU) -> dict[str, float]:
    """Returns the modelled time of a pass over ``size`` bytes of x, and what limits it."""
    reads, writes, _ = PASSES[name]
    moved = size * (reads + writes)
    tile = size / (tiling.groups * tiling.tiles)  # bytes of x, on average
    per_program = tiling.tiles / tiling.splits if name in REDUCTIONS else 1
    grid = tiling.groups * math.ceil(tiling.tiles / per_program)
    most = math.ceil(per_program)  # tiles of the program that has most
    slots = resident(code, gpu) * gpu.processors
    piped = min(STAGES - 1, most) if code.asynchronous else 1
    latency = gpu.in_flight * gpu.processors / gpu.bandwidth

    def seconds(programs: int) -> float:
        """Returns the time of a wave of so many programs."""
        work = programs * per_program * tile
        memory = LOAD + work * (reads + writes) / gpu.bandwidth
        waits = latency * most / piped
        warps = math.ceil(programs / gpu.processors) * most * code.threads / 32
        issue = LOAD + warps * code.instructions / (4 * gpu.clock)
        return max(memory, waits, issue)

    waves = grid / slots
    if name in REDUCTIONS:
        whole, rest = divmod(grid, slots)
        time = START + whole * seconds(slots) + (seconds(rest) if rest else 0)
    else:  # a program that ends makes place for the next
        time = START + LOAD + (seconds(min(grid, slots)) - LOAD) * max(1.0, waves)
    if name == "moments" and tiling.constants["LOAD"] != tiling.constants["VECTOR"]:
        time += LOAD  # the pivot, before the loop
    if name in REDUCTIONS:
        time += (3 if tiling.splits > 1 else 2) * CACHE  # ticket, values of the splits, result
    copy = START + LOAD + moved / gpu.bandwidth
    flight = min(grid, slots) * piped * tile * reads / gpu.processors
    issue = grid * most * code.threads / 32 * code.instructions / (4 * gpu.clock * gpu.processors)
    return {
        "grid": grid,
        "resident": resident(code, gpu),
        "waves": round(waves, 2),
        "in_flight_kib": round(flight / 1024, 1),
        "needed_kib": gpu.in_flight / 1024,
        "issue": round(issue * gpu.bandwidth / moved, 2),
        "latency_us": round(1e6 * latency, 2),
        "us": round(1e6 * time, 1),
        "share": round(min(1.0, copy / time), 3),
        "of_peak": round(moved / gpu.bandwidth / time, 3),
    }


def cases() -> Iterator[tuple[str, str, tuple[int, ...], torch.Tensor]]:
    """Yields dtype, layout, shape and a tensor without values."""
    for dtype, kind in DTYPES.items():
        for layout, memory_format in LAYOUTS.items():
            for shape in SHAPES:
                x = torch.empty(shape, dtype=kind, device="meta", memory_format=memory_format)
                yield dtype, layout, shape, x


def measured() -> dict[tuple, float]:
    """Returns the measured shares by dtype, layout, shape and pass; empty without a file."""
    shares = {}
    for path in sorted(RESULTS.glob("gpu_kernels*.json")):
        for row in json.loads(path.read_text())["rows"]:
            for name, share in row["share"]["CGBN"].items():
                shares[row["dtype"], row["layout"], tuple(row["shape"]), name] = share
    return shares


def rows(gpu: GPU) -> list[dict[str, Any]]:
    """Returns the model of each pass over each tensor."""
    codes: dict[tuple, Code] = {}
    found, shares = [], measured()
    for dtype, layout, shape, x in cases():
        size = x.numel() * x.element_size()
        for name in PASSES:
            tiling = tiling_of(x, name in REDUCTIONS)
            key = name, x.dtype, *(v for k, v in tiling.constants.items() if k != "ACC")
            if key not in codes:
                codes[key] = code_of(name, x.dtype, tiling)
            found.append(
                {
                    "dtype": dtype,
                    "layout": layout,
                    "shape": shape,
                    "pass": name,
                    "mb": round(size / 1e6, 1),
                    "vector": tiling.constants["VECTOR"],
                    "splits": tiling.splits if name in REDUCTIONS else 0,
                    **asdict(codes[key]),
                    **model(name, size, tiling, codes[key], gpu),
                    "measured": shares.get((dtype, layout, shape, name)),
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", choices=GPUS, default="H200")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    parser.add_argument(
        "--before", type=Path, help="JSON file of an earlier run, whose shares are kept beside"
    )
    args = parser.parse_args()
    found = rows(GPUS[args.gpu])
    if args.before:
        earlier = json.loads(args.before.read_text())["rows"]
        old = {(r["dtype"], r["layout"], *r["shape"], r["pass"]): r["share"] for r in earlier}
        for row in found:
            row["before"] = old.get((row["dtype"], row["layout"], *row["shape"], row["pass"]))
    shown = [
        {
            k: "x".join(map(str, v)) if k == "shape" else v
            for k, v in row.items()
            if k != "needed_kib"
        }
        for row in found
    ]
    print(tabulate(shown, headers="keys"))
    if args.output:
        import triton

        about = {
            "command": shlex.join(["python", "benchmarks/roofline.py", *sys.argv[1:]]),
            "date": str(date.today()),
            "hardware": f"none: a model of {args.gpu}",
            "torch": torch.__version__,
            "triton": triton.__version__,
            "gpu": asdict(GPUS[args.gpu]),
            "seconds": {"start": START, "load": LOAD, "cache": CACHE},
        }
        args.output.write_text(json.dumps({**about, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
