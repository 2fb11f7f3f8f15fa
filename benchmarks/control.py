"""Times what our Trainer adds to a step of Detectron2's DefaultTrainer, beside the model.

    python benchmarks/control.py              # 1, 2, 4 and 8 gloo processes
    python benchmarks/control.py --processes 2 --rounds 40

Both train the same almost empty model with a CGBN layer under DDP, with all their hooks, on images
that are in memory. The model labels as many samples as an RPN and a box head take of each image, so
that ours counts them for Table 1. The trainers take turns in blocks of 20 steps, of which the last
one writes the metrics. The extra time of a step is the median over rounds of ours minus theirs. CPU
time is the mean over the processes, with all their threads. Wall time is that of rank 0. If there
are more processes than cores they wait for each other's cores, so it is multiplied by cores over
processes. The extra time is the larger of the two. Where other programs have the cores from the
start, wall time says nothing; the extra time is then CPU time alone, and the script says so.

It is divided by a step of Faster R-CNN R50-FPN with 2 images per GPU: 0.21 s in Detectron2's model
zoo (8 V100, R50-FPN 1x). A step on this CPU takes longer, and is in the JSON. The last line has the
largest ratio of such a step with and without the extra time. The script prints a table, and writes
JSON to --output, with the load of the machine.
"""

import argparse
import itertools
import json
import logging
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.layers import get_norm
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from norm import processor
from tabulate import tabulate
from torch import Tensor, nn
from train_step import Step, make_inputs, norms

import megdet_d2
from megdet_d2 import Trainer, launch, prepare_config
from megdet_d2.engine.ddp import ddp_without_device_ids

ROOT = Path(__file__).parent.parent
BASE = ROOT / "configs" / "ablations" / "Base-study.yaml"
COLUMNS = ("processes", "stock, ms", "ours, ms", "extra CPU, us", "extra wall, us", "ratio")
GPU_STEP = 0.21  # seconds, 2 images per V100: MODEL_ZOO.md of Detectron2, faster_rcnn_R_50_FPN_1x
SAMPLES = {"anchors": 256, "proposals": 512}  # per image
BLOCK = 20  # steps; Detectron2's writers write once in 20


class Labels(nn.Module):
    """A module with the two methods whose labels our trainer counts."""

    num_classes = 80

    def label_and_sample_anchors(self, images: int) -> tuple[list[Tensor], None]:
        """Returns the labels of each image's anchors: half of them are objects."""
        return [torch.arange(SAMPLES["anchors"]) % 2 for _ in range(images)], None

    def label_and_sample_proposals(self, images: int) -> list[Instances]:
        """Returns each image's proposals: an 81st of them is background."""
        classes = torch.arange(SAMPLES["proposals"]) % 81
        return [Instances((1, 1), gt_classes=classes) for _ in range(images)]


@META_ARCH_REGISTRY.register()
class AlmostEmpty(nn.Module):
    """A convolution, a norm, two losses, and labels of samples."""

    def __init__(self, cfg: CfgNode):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = get_norm(cfg.MODEL.RESNETS.NORM, 4)
        self.proposal_generator, self.roi_heads = Labels(), Labels()

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Returns two losses that do not depend on the images."""
        self.proposal_generator.label_and_sample_anchors(len(batch))
        self.roi_heads.label_and_sample_proposals(len(batch))
        x = self.norm(self.conv(torch.ones(len(batch), 3, 4, 4)))
        return {"loss_a": x.square().mean(), "loss_b": x.abs().mean()}


def begin(trainer: Any) -> None:
    """Prepares a trainer for ``make_steps``, which can be called again and again."""
    trainer.iter = trainer.start_iter = 0
    trainer.storage = EventStorage()
    with trainer.storage:
        trainer.before_train()


def make_steps(trainer: Any, steps: int) -> None:
    """Makes the next steps of a training, with its hooks."""
    with trainer.storage:
        for _ in range(steps):
            trainer.before_step()
            trainer.run_step()
            trainer.after_step()
            trainer.iter += 1


class Contender:
    """A trainer that can be run for some steps, and then again."""

    def __init__(self, kind: type[DefaultTrainer], cfg: CfgNode):
        with ddp_without_device_ids(cfg):
            self._trainer: Any = kind(cfg)
        inner = self._trainer._trainer
        inner._data_loader_iter_obj = itertools.repeat(next(inner._data_loader_iter))
        begin(self._trainer)

    def run(self, steps: int) -> tuple[float, float]:
        """Makes steps; returns CPU and wall time of one of them, in seconds."""
        comm.synchronize()
        cpu, wall = time.process_time(), time.perf_counter()
        make_steps(self._trainer, steps)
        return (time.process_time() - cpu) / steps, (time.perf_counter() - wall) / steps


def run(args: argparse.Namespace) -> None:
    """Measures in every process; rank 0 writes the result to ``args.result``."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    cfg = get_cfg()
    megdet_d2.add_megdet_config(cfg)
    cfg.merge_from_file(str(BASE))
    processes = comm.get_world_size()
    changes = {
        "MODEL.META_ARCHITECTURE": "AlmostEmpty",
        "MODEL.DEVICE": "cpu",
        "MODEL.CGBN.BN_SIZE": 2 * processes,
        "DATASETS.DIGITS.NUM_TRAIN": 16,
        "DATASETS.TEST": (),
        "TEST.EVAL_PERIOD": 0,
        "SOLVER.IMS_PER_BATCH": 2 * processes,
        "SOLVER.CHECKPOINT_PERIOD": 10**6,
        "SOLVER.MAX_ITER": 10**6,
        "MEGDET.POLICY": "",
        "OUTPUT_DIR": args.folder,
    }
    cfg.merge_from_list([x for pair in changes.items() for x in pair])
    prepare_config(cfg)
    stock, ours = Contender(DefaultTrainer, cfg), Contender(Trainer, cfg)
    rounds = []
    for i in range(args.rounds + 2):
        order = (stock, ours) if i % 2 else (ours, stock)
        times = {contender: contender.run(BLOCK) for contender in order}
        rounds.append((*times[stock], *times[ours]))
    all_rounds = comm.gather(rounds[2:])  # the first two warm up
    if comm.is_main_process():
        Path(args.result).write_text(json.dumps(all_rounds))


def summarize(all_rounds: list[list[list[float]]]) -> dict[str, float]:
    """Returns median seconds per step over rounds: CPU as a mean over processes, wall of rank 0."""
    cpu_of = [[(r[0], r[2]) for r in rounds] for rounds in all_rounds]
    cpu = [
        tuple(statistics.mean(pair[i] for pair in pairs) for i in (0, 1))
        for pairs in zip(*cpu_of, strict=True)
    ]
    return {
        "stock": statistics.median(stock for stock, _ in cpu),
        "ours": statistics.median(ours for _, ours in cpu),
        "extra_cpu": statistics.median(ours - stock for stock, ours in cpu),
        "extra_wall": statistics.median(r[3] - r[1] for r in all_rounds[0]),
    }


def detector_step(repeats: int = 3) -> float:
    """Returns the median CPU seconds of an R50-FPN step in this process."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    inputs = make_inputs(argparse.Namespace(images=2, height=320, width=448))
    step = Step(norms(device)["CGBN"], device, inputs)
    times = []
    for _ in range(repeats):
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    return statistics.median(times)


def main() -> None:
    """Runs all numbers of processes, prints the table and the ratio, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=10, help=f"blocks of {BLOCK} steps of each")
    output = ROOT / "docs" / "results" / f"control_cpu_{date.today()}.json"
    parser.add_argument("--output", default=str(output), help="JSON file; '' for none")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:  # in a process of this script
        args.num_gpus, args.num_machines, args.machine_rank = args.worker, 1, 0
        args.dist_url = "auto"
        launch(run, args)
        return
    logging.disable(logging.WARNING)
    busy = os.getloadavg()[0] > 0.75 * (os.cpu_count() or 1)
    r50 = detector_step()
    results, rows, ratio = {}, [], 1.0
    for processes in args.processes:
        with tempfile.TemporaryDirectory() as folder:
            command = [
                *(sys.executable, "-W", "ignore", __file__, "--rounds", str(args.rounds)),
                *("--worker", str(processes), "--folder", folder),
                *("--result", os.path.join(folder, "result.json")),
            ]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env)
            result = summarize(json.loads(Path(folder, "result.json").read_text()))
        results[processes] = result
        cores = min(1.0, (os.cpu_count() or 1) / processes)
        wall = 0.0 if busy else cores * result["extra_wall"]
        of_this = 1 + max(result["extra_cpu"], wall) / GPU_STEP
        ratio = max(ratio, of_this)
        rows.append(
            (processes, 1e3 * result["stock"], 1e3 * result["ours"], 1e6 * result["extra_cpu"],
             1e6 * result["extra_wall"], of_this)
        )  # fmt: skip
        print(tabulate(rows[-1:], COLUMNS if len(rows) == 1 else (), "plain", floatfmt=".4g"))
    print(f"An R50-FPN step takes {GPU_STEP} s on a V100, and {r50:.2f} s of CPU time here.")
    if busy:
        print("Other programs use the cores: the ratio is of CPU time alone.")
    if args.output:
        about = {
            "command": shlex.join(["python", *sys.argv]),
            "date": str(date.today()),
            "hardware": processor(),
            "load": os.getloadavg()[0],
            "ratio_of": "CPU time" if busy else "the larger of CPU and wall time",
            "torch": torch.__version__,
            "r50_fpn_step_seconds": GPU_STEP,
            "r50_fpn_step_cpu_seconds": r50,
            "seconds_per_step": results,
            "ratio": ratio,
        }
        Path(args.output).write_text(json.dumps(about, indent=1) + "\n")
    print(f"ratio control {ratio:.4f}")


if __name__ == "__main__":
    main()
