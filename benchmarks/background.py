"""Times the steps of a training while TEST.BACKGROUND evaluates beside it, and while it does not.

    python benchmarks/background.py              # one training process, some minutes

A real training of the ablations' detector on the digits takes one core, and the other process
evaluates the digits on another core. Blocks of steps take turns: in one of each pair the evaluation
runs, in the other one it is stopped by a signal. So both see the same machine. The ratio is the
median over the pairs. Where other programs use the cores too, wall time mostly shows how long the
training waits for a core. Linux counts this wait, and the second row is without it: the time where
cores are free. Its ratio is the last line. Elsewhere it is wall time. The script prints a table and
writes JSON to --output, with the load of the machine.
"""

import argparse
import itertools
import logging
import multiprocessing
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from control import begin, make_steps
from detectron2.config import CfgNode
from norm import write_json
from tabulate import tabulate

from megdet_d2 import Trainer, load_config, prepare_config
from megdet_d2.engine.background import BackgroundEvaluation

ROOT = Path(__file__).parents[1]
KINDS = ("wall time", "wall time without waits for a core", "CPU time")


def make_config(folder: str, images: int) -> CfgNode:
    """Returns the config of the training, which is evaluated only when the benchmark asks."""
    cfg = load_config(ROOT / "configs" / "ablations" / "Base-study.yaml")
    changes = {
        "MODEL.DEVICE": "cpu",
        "MODEL.CGBN.BN_SIZE": 8,
        "DATASETS.DIGITS.NUM_TRAIN": 64,
        "DATASETS.DIGITS.NUM_VAL": images,
        "DATALOADER.NUM_WORKERS": 0,
        "SOLVER.IMS_PER_BATCH": 8,
        "SOLVER.MAX_ITER": 10**6,
        "SOLVER.CHECKPOINT_PERIOD": 10**6,
        "TEST.EVAL_PERIOD": 10**6,
        "TEST.BACKGROUND": True,
        "MEGDET.POLICY": "",
        "OUTPUT_DIR": folder,
    }
    cfg.merge_from_list([x for pair in changes.items() for x in pair])
    prepare_config(cfg)
    return cfg


class Training:
    """A training that makes some steps, and then again.

    Args:
        cfg: its config.
    """

    def __init__(self, cfg: CfgNode):
        self.trainer: Any = Trainer(cfg)
        begin(self.trainer)
        found = (h for h in self.trainer._hooks if isinstance(h, BackgroundEvaluation))
        self.evaluation: BackgroundEvaluation = next(found)

    def run(self, steps: int) -> tuple[float, float, float]:
        """Makes steps; returns the times of ``KINDS`` of one of them, in seconds."""
        wall, cpu, waited = time.perf_counter(), time.process_time(), waited_for_core()
        make_steps(self.trainer, steps)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return wall / steps, (wall - waited_for_core() + waited) / steps, cpu / steps

    def hand_over(self) -> float:
        """Starts an evaluation; returns the seconds that this takes."""
        began = time.perf_counter()
        self.trainer.checkpointer.gather()
        self.evaluation.hand_over()
        return time.perf_counter() - began


def waited_for_core() -> float:
    """Returns the seconds that this thread was ready and had no core; 0 where that is not known."""
    try:
        return 1e-9 * int(Path("/proc/thread-self/schedstat").read_text().split()[1])
    except OSError:  # not Linux
        return 0.0


def interval(ratios: list[float]) -> tuple[float, float]:
    """Returns the 95 % interval of the median, by the bootstrap."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[50], medians[-51]


def send(number: int) -> None:
    """Sends a signal to the process that evaluates."""
    for child in multiprocessing.active_children():
        if child.name == "evaluation" and child.pid is not None:
            os.kill(child.pid, number)


def wait(condition: Callable[[], bool], limit: float = 240) -> None:
    """Waits until ``condition`` is true."""
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"the evaluation did not begin within {limit:g} s")
        time.sleep(0.2)


def main(args: argparse.Namespace) -> None:
    """Runs the benchmark."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    load = os.getloadavg()[0]
    pairs: list[tuple[tuple[float, ...], tuple[float, ...]]] = []
    handed: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        training = Training(make_config(folder, args.evaluated))
        log = Path(folder, "background", "log.txt")
        training.run(args.steps)  # warms up
        handed.append(training.hand_over())
        wait(lambda: log.is_file() and "Start inference" in log.read_text())
        try:
            for i in itertools.count():
                if len(pairs) == args.rounds:
                    break
                times: dict[bool, tuple[float, ...]] = {}
                for runs in (True, False) if i % 2 else (False, True):
                    send(signal.SIGCONT if runs else signal.SIGSTOP)
                    times[runs] = training.run(args.steps)
                    send(signal.SIGCONT)
                if training.evaluation.pending:  # it ran to the end of this pair
                    pairs.append((times[True], times[False]))
                else:
                    handed.append(training.hand_over())
        finally:
            training.evaluation.close()
    ratios = {
        kind: statistics.median(runs[k] / rests[k] for runs, rests in pairs)
        for k, kind in enumerate(KINDS)
    }
    low, high = interval([runs[1] / rests[1] for runs, rests in pairs])
    rows = [
        (
            kind,
            1e3 * statistics.median(rests[k] for _, rests in pairs),
            1e3 * statistics.median(runs[k] for runs, _ in pairs),
            ratios[kind],
        )
        for k, kind in enumerate(KINDS)
    ]
    headers = ("of a step", "alone, ms", "while it evaluates, ms", "ratio")
    print(tabulate(rows, headers, "pipe", floatfmt=".4g"))
    print(f"The 95 % interval of the second ratio is {low:.3f} to {high:.3f}.")
    print(f"Handing a model over takes {statistics.median(handed):.2f} s.")
    result = {
        "load": load, "columns": headers, "rows": rows, "pairs": pairs,
        "hand_over_seconds": handed, "ratio": ratios[KINDS[1]],
        "ratio_interval": (low, high),
    }  # fmt: skip
    write_json(args, torch.device("cpu"), result)
    print(f"ratio background {ratios[KINDS[1]]:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=24, help="pairs of blocks")
    parser.add_argument("--steps", type=int, default=8, help="steps of a block")
    parser.add_argument("--evaluated", type=int, default=2000, help="images of an evaluation")
    output = ROOT / "docs" / "results" / f"background_cpu_{date.today()}.json"
    parser.add_argument("--output", default=str(output), metavar="FILE", help="'' for none")
    main(parser.parse_args())
