"""Tests and measures CGBN on one GPU in 8 minutes; `make gpu` runs it.

    python benchmarks/gpu.py                      # results into docs/results/
    python benchmarks/gpu.py --output folder      # results and the log into a folder
    python benchmarks/gpu.py --parts kernels layer --force
    python benchmarks/gpu.py --dry-run --output folder      # on CPU, with tiny shapes

The parts run in order of value. Each has a limit, and what one leaves of its time the next ones may
use. A part writes its results as they come. What has ended well is not repeated, so after a stop
the same command goes on. `gpu_run_<date>.json` says what this machine is, and how each part ended.
"""

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 8
PACKAGES = ("torch", "triton", "torchvision", "numpy", "sal-detectron2", "fvcore", "pytest")


@dataclass(frozen=True)
class Part:
    """A command of this folder that writes a JSON file.

    Attributes:
        limit: seconds.
        command: the script and its arguments.
        dry: arguments that replace those of the command in a dry run.
    """

    name: str
    limit: int
    command: list[str]
    dry: list[str] = field(default_factory=list)


PARTS = [
    Part(
        "tests",
        150,
        ["gpu_tests.py", "--processes", "8"],
        ["--processes", "1"],
    ),
    Part(
        "kernels",
        70,
        ["gpu_kernels.py"],
        ["--height", "8", "--width", "8", "--limit", "1"],
    ),
    Part(
        "layer",
        50,
        ["gpu_layer.py"],
        ["--tiny", "--repeats", "1"],
    ),
    Part(
        "train_step",
        90,
        ["gpu_step.py"],
        ["--height", "64", "--width", "96", "--images", "1", "--repeats", "1"]
        + ["--dtypes", "float32", "--warm-up", "1"],
    ),
    Part(
        "memory",
        35,
        ["memory.py", "--repeats", "3"],
        ["--height", "64", "--width", "64", "--repeats", "1"],
    ),
    Part(
        "exactness",
        70,
        # The most telling rows first. The last waits where a norm hangs.
        ["exactness.py", "--devices", "cuda", "--rows", "N, H, W", "1e4 sigma"]
        + ["host waits", "one inf", "empty, float32"],
        ["--devices", "cpu", "--rows", "N, H, W"],
    ),
]


def machine(python: str) -> dict[str, Any]:
    """Returns the GPU, its driver and clocks, and the versions of what the parts use."""
    versions: dict[str, str] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "no metadata"
    query = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm"
    commands = {
        "gpu": ["nvidia-smi", f"--query-gpu={query}", "--format=csv"],
        "commit": ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
        "norm": [
            python,
            "-c",
            "import torch; from megdet_d2.norm import kernels;"
            "print('cuda', torch.version.cuda, torch.cuda.is_available(), 'triton', "
            "kernels.available())",
        ],
    }
    answers: dict[str, Any] = {name: _answer(command) for name, command in commands.items()}
    return {**answers, "cores": os.cpu_count(), "versions": versions}


def _answer(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env=_environment(False)
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stdout or done.stderr).strip()[-2000:]


def _environment(dry: bool) -> dict[str, str]:
    """Returns the environment of the parts."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = os.pathsep.join([str(ROOT), *(str(Path(p).resolve()) for p in given if p)])
    env = {
        **os.environ,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
        "MEGDET_TEST_GPU": "dry-run" if dry else "1",
    }
    if dry:
        env |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return env


def run_part(part: Part, limit: float, output: Path, log: TextIO, dry: bool) -> str:
    """Runs a part and returns how it ended: "passed", "failed (status)" or "stopped at n s".

    Its output goes to the terminal and to ``log``. A part that is stopped ends with all processes
    that it has started.
    """
    script, *arguments = part.command
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / script)]
    command += [*(part.dry if dry else arguments), "--output", str(output)]
    log.write(f"\n=== {part.name}: {shlex.join(command)}\n")
    log.flush()
    place = log.tell()
    process = subprocess.Popen(
        command, stdout=log, stderr=log, env=_environment(dry), start_new_session=True
    )
    try:
        status = process.wait(limit)
        ended = "passed" if status == 0 else f"failed ({status})"
    except subprocess.TimeoutExpired:
        ended = f"stopped at {limit:.0f} s"
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
    with open(log.name, errors="replace") as file:
        file.seek(place)
        sys.stdout.write(file.read()[-6000:])
    return ended


def main(args: argparse.Namespace) -> int:
    """Runs the parts; returns 1 if one has not passed."""
    args.output.mkdir(parents=True, exist_ok=True)
    args.log.parent.mkdir(parents=True, exist_ok=True)
    kind = "dry" if args.dry_run else "gpu"
    state_file = args.output / f"{kind}_run_{args.date}.json"
    state: dict[str, Any] = {"parts": {}}
    if state_file.exists():
        state = json.loads(state_file.read_text())
    state |= {"command": shlex.join(["python", *sys.argv]), "date": args.date}
    state["machine"] = machine(sys.executable)
    print(json.dumps(state["machine"], indent=1), flush=True)
    start, allowed, ended = time.monotonic(), 0.0, []
    with open(args.log, "a") as log:
        for part in PARTS:
            if args.parts and part.name not in args.parts:
                continue
            output = args.output / f"{kind}_{part.name}_{args.date}.json"
            before = state["parts"].get(part.name, {})
            if before.get("ended") == "passed" and output.exists() and not args.force:
                print(f"\n=== {part.name}: has passed before, see {output.name}", flush=True)
                continue
            allowed += part.limit * args.patience
            began = time.monotonic()
            print(f"\n=== {part.name}, at {began - start:.0f} s", flush=True)
            end = run_part(part, allowed - (began - start), output, log, args.dry_run)
            took = round(time.monotonic() - began, 1)
            state["parts"][part.name] = {"ended": end, "seconds": took}
            state_file.write_text(json.dumps(state, indent=1) + "\n")
            ended.append(end)
            print(f"=== {part.name}: {end}, {took} s", flush=True)
    return int(any(end != "passed" for end in ended))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=[], help="only these parts")
    parser.add_argument("--force", action="store_true", help="repeat what has passed")
    parser.add_argument("--dry-run", action="store_true", help="on CPU, with tiny shapes")
    parser.add_argument("--patience", type=float, default=1.0, help="factor of all limits")
    parser.add_argument("--date", default=str(date.today()), help="in the names of the files")
    parser.add_argument("--output", type=Path, help="folder for results and log")
    args = parser.parse_args(arguments)
    output = ROOT / "output" / "gpu"
    args.log = (args.output or output) / "gpu.log"
    args.output = args.output or (output if args.dry_run else ROOT / "docs" / "results")
    return args


if __name__ == "__main__":
    sys.exit(main(parse()))
