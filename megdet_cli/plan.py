"""Predicts the time of trainings on machines that are not there, and tests its predictions.

--back-test prints every row of the paper's Table 3 and of MLPerf's Mask R-CNN submissions:
measured, predicted, error, and whether it was fitted. --simulate goes through numbers of
machines, with stragglers, failures, checkpoints and the epochs to equal AP. --dry-run resolves a
config for every rank of a cluster, without a GPU, and ends with the error that the cluster would.

  megdet plan --back-test
  megdet plan --simulate --hardware A100-SXM-80GB --images-per-gpu 2 --bn-size 16
  megdet plan --simulate --target-batch 256 --machines 1,2,4,8,16
  megdet plan --dry-run megdet_R50_FPN_b256_normal.yaml --machines 16 --gpus 8 KEY VALUE ...
"""

import argparse
from pathlib import Path

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("config", nargs="?", default="", metavar="CONFIG", help="for --dry-run")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--back-test", action="store_true", help="predictions against measured rows")
    task.add_argument("--simulate", action="store_true", help="a training on growing clusters")
    task.add_argument("--dry-run", action="store_true", help="the start of a training, every rank")
    add = parser.add_argument
    add("--json", action="store_true", help="print everything as json")

    group = parser.add_argument_group("cluster, for --simulate")
    add = group.add_argument
    add(
        "--machines",
        type=_integers,
        default=[2**power for power in range(10)],
        metavar="1,2,4",
        help="numbers of machines (default 1,2,4,...,512)",
    )
    add("--gpus", type=int, default=8, help="GPUs per machine (default 8)")
    add(
        "--hardware",
        default="A100-SXM-80GB",
        metavar="NAME",
        help="accelerator of MLPerf's table, for seconds per image and the link between GPUs "
        "(default A100-SXM-80GB)",
    )
    add("--seconds-per-image", type=float, help="of your own measurement, one image on one GPU")
    add("--network-gbit", type=float, default=1600, help="Gb/s per machine (default 1600)")
    add("--loader", type=float, metavar="RATE", help="images/s that one rank's loader decodes")

    group = parser.add_argument_group("training, for --simulate")
    add = group.add_argument
    add("--images-per-gpu", type=int, default=2, help="in one micro-batch (default 2)")
    add("--target-batch", type=int, help="accumulate up to this batch (default: grow with GPUs)")
    add("--bn-size", type=int, default=16, help="images; 0 for frozen norms (default 16)")
    add("--layers", type=int, default=50, help="layers of CGBN (default 50: R50-FPN, frozen stem)")
    add("--variation", type=float, help="of the cost of an image (default: fitted on MLPerf)")
    add("--parameters", type=float, default=41.5e6, help="that are trained (default 41.5e6)")
    add("--gradient-bytes", type=int, default=4, help="per parameter (default 4)")
    add(
        "--epochs-like",
        choices=("maskrcnn", "retinanet"),
        default="maskrcnn",
        help="E_min and B_crit of this model (default maskrcnn)",
    )
    add("--least-epochs", type=float, help="E_min of your own")
    add("--critical-batch", type=float, help="B_crit of your own, as of megdet variance")

    group = parser.add_argument_group("failures, for --simulate")
    add = group.add_argument
    add("--mtbf-hours", type=float, default=6300, help="of one machine (default 6300); inf: none")
    add("--restart-seconds", type=float, default=300, help="from failure to update (default 300)")
    add("--save-seconds", type=float, default=5, help="of a checkpoint (default 5)")
    add("--checkpoint-period", type=int, help="updates (default: one epoch)")

    group = parser.add_argument_group("simulation")
    add = group.add_argument
    add("--steps", type=int, default=100, help="updates to simulate per point (default 100)")
    add("--seed", type=int, default=0, help="of the random numbers (default 0)")
    add("--output", type=Path, metavar="FOLDER", help="draw simulation.png there")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    if args.dry_run:
        from megdet_d2.planner import dry_run

        dry_run.run(args)
        return
    from megdet_d2.planner import command

    command.run(args)


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]
