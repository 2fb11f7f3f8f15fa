"""Runs tests/norm/test_cuda.py, and writes each result when its test ends.

    python benchmarks/gpu_tests.py --processes 8 --output result.json

Several processes share one GPU, and above all the time to compile the kernels. They take
pytest-xdist; without it one process runs all tests.
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_timing import GPU, Record
from norm import processor

TESTS = Path(__file__).parents[1] / "tests" / "norm" / "test_cuda.py"


class Recorder:
    """A plugin of pytest that records results.

    Args:
        record: takes a row for each test.
    """

    def __init__(self, record: Record) -> None:
        self.record = record

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Records a test that has run, or that has not come so far."""
        if report.when == "call" or report.outcome != "passed":
            row = {"test": report.nodeid.partition("::")[2], "outcome": report.outcome}
            row["seconds"] = round(report.duration, 2)
            if report.failed:
                row["error"] = str(report.longrepr)[-2000:]
            elif report.skipped:
                row["reason"] = report.longrepr[-1]
            self.record.add(row)


def main() -> int:
    """Runs the tests, and returns pytest's status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=8, metavar="N")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON file")
    args, options = parser.parse_known_args()
    options += ["-q", "--no-header", "-p", "no:cacheprovider"]
    if args.processes > 1 and importlib.util.find_spec("xdist"):
        options += ["-n", str(args.processes)]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout", "120"]
    about = {
        "hardware": torch.cuda.get_device_name() if GPU else processor(),
        "torch": torch.__version__,
    }
    recorder = Recorder(Record(args.output, about))
    return pytest.main([str(TESTS), *options], plugins=[recorder])


if __name__ == "__main__":
    sys.exit(main())
