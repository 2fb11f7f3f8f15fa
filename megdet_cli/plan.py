"""Plans a training: which mini-batch and schedule, does it fit, how long will it take.

With a config it searches the settings that a cluster allows, best first, with schedule, memory,
hours and launch line. --measure times the config on this machine. --back-test prints predictions
against published rows. --simulate goes through numbers of machines, with failures. --dry-run
resolves a config for every rank of a cluster, and ends with the error that the cluster would.

  megdet plan COCO-Detection/megdet_R50_FPN_b16_normal.yaml --gpus 8 --hardware A100-SXM-80GB
  megdet plan my.yaml --gpus 4 --gpu-memory 24 --target-batch 64 SOLVER.AMP.ENABLED True
  megdet plan my.yaml --measure --output output/plan
  megdet plan my.yaml --dry-run --machines 128 --gpus 8 SOLVER.IMS_PER_BATCH 2048
  megdet plan --back-test
  megdet plan --simulate --hardware A100-SXM-80GB --images-per-gpu 2 --bn-size 16
"""

import argparse
from pathlib import Path

TAKES_OVERRIDES = True
# Flags of --simulate alone, with their defaults. With a config its own keys count instead.
SIMULATED = {
    "images_per_gpu": 2,
    "bn_size": 16,
    "layers": 50,
    "parameters": 41.5e6,
    "gradient_bytes": 4,
    "mtbf_hours": 6300.0,
    "restart_seconds": 300.0,
    "save_seconds": 5.0,
    "checkpoint_period": None,
    "steps": 100,
    "seed": 0,
}
# Flags of a prediction, which a dry run does not make.
PREDICTED = (
    "hardware", "seconds_per_image", "loader", "variation", "target_batch", "epochs_like",
    "least_epochs", "critical_batch", "output",
)  # fmt: skip
# Flags of a config alone.
OF_CONFIG = ("gpu_memory", "images", "rows", "report", "measure")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add = parser.add_argument
    add("config", metavar="CONFIG", nargs="?", help="path of a config, or name of one of ours")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--back-test", action="store_true", help="predictions against measured rows")
    task.add_argument("--simulate", action="store_true", help="a training on growing clusters")
    task.add_argument("--dry-run", action="store_true", help="CONFIG's start on every rank")
    add("--json", action="store_true", help="print everything as json")
    add("--output", type=Path, metavar="FOLDER", help="for plots, and for the file of --measure")

    add = parser.add_argument_group("cluster").add_argument
    add(
        "--machines",
        type=_integers,
        metavar="M",
        help="machines (default 1); with --simulate a list (default 1,2,4,...,512)",
    )
    add("--gpus", type=int, metavar="G", help="GPUs per machine (default: those here, or 8)")
    add("--gpu-memory", type=float, metavar="GB", help="of one GPU, in 10^9 bytes (default: its)")
    add(
        "--hardware",
        metavar="NAME",
        help="accelerator of MLPerf's table or of Detectron2's model zoo, or a json file of "
        "--measure (default: the GPU here, or A100-SXM-80GB)",
    )
    add("--seconds-per-image", type=float, help="of your own measurement, one image on one GPU")
    add("--network-gbit", type=float, default=1600, help="Gb/s per machine (default 1600)")
    add("--loader", type=float, metavar="RATE", help="images/s that one rank's loader decodes")
    add("--variation", type=float, help="of the cost of an image (default: fitted on MLPerf)")

    add = parser.add_argument_group("training").add_argument
    add("--target-batch", type=int, metavar="B", help="mini-batch to reach, by micro-batches")
    add(
        "--epochs-like",
        choices=("maskrcnn", "retinanet"),
        help="E_min and B_crit of this model (default: the nearest, or maskrcnn)",
    )
    add("--least-epochs", type=float, help="E_min of your own")
    add("--critical-batch", type=float, help="B_crit of your own, as of megdet variance")

    add = parser.add_argument_group("with CONFIG").add_argument
    add("--images", type=int, help="of an epoch, where the data is not here")
    add("--rows", type=int, metavar="N", help="settings to print (default 6)")
    add("--report", action="store_true", help="draw hours and efficiency against GPUs")
    add(
        "--measure",
        type=float,
        nargs="?",
        const=60.0,
        metavar="SECONDS",
        help="time steps, loader and collectives here (default 60 s), and plan with them",
    )

    add = parser.add_argument_group("with --simulate").add_argument
    add("--images-per-gpu", type=int, help="in one micro-batch (default 2)")
    add("--bn-size", type=int, help="images; 0 for frozen norms (default 16)")
    add("--layers", type=int, help="layers of CGBN (default 50: R50-FPN, frozen stem)")
    add("--parameters", type=float, help="that are trained (default 41.5e6)")
    add("--gradient-bytes", type=int, help="per parameter (default 4)")
    add("--mtbf-hours", type=float, help="of one machine (default 6300); inf: none")
    add("--restart-seconds", type=float, help="from failure to update (default 300)")
    add("--save-seconds", type=float, help="of a checkpoint (default 5)")
    add("--checkpoint-period", type=int, help="updates (default: one epoch)")
    add("--steps", type=int, help="updates to simulate per point (default 100)")
    add("--seed", type=int, help="of the random numbers (default 0)")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    check_task(args)
    if args.dry_run:
        from megdet_d2.planner import dry_run

        dry_run.run(args)
        return
    if args.config:
        args.rows = 6 if args.rows is None else args.rows
        args.output = args.output or Path("output/plan")
        from megdet_d2.planner import plan

        plan.run(args)
        return
    for name, default in SIMULATED.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    args.machines = args.machines or [2**power for power in range(10)]
    args.gpus = 8 if args.gpus is None else args.gpus
    args.hardware = args.hardware or "A100-SXM-80GB"
    args.epochs_like = args.epochs_like or "maskrcnn"
    from megdet_d2.planner import command

    command.run(args)


def check_task(args: argparse.Namespace) -> None:
    """Checks that there is one task, and no flag of another.

    Raises:
        SystemExit: the usage, with what is wrong.
    """
    if args.dry_run and not args.config:
        args.command.error("--dry-run needs a CONFIG")
    task = "--back-test" if args.back_test else "--simulate" if args.simulate else ""
    if bool(args.config) == bool(task):
        args.command.error(
            f"{args.config} and {task}: give one of them"
            if task
            else "give a CONFIG, or one of the arguments --back-test --simulate"
        )
    others = tuple(SIMULATED) if args.config else OF_CONFIG
    if args.dry_run:
        others = (*SIMULATED, *OF_CONFIG, *PREDICTED)
    values = {name: getattr(args, name) for name in others}
    given = [name for name, value in values.items() if value is not None and value is not False]
    if given:
        flag = f"--{given[0].replace('_', '-')}"
        if args.dry_run:
            args.command.error(f"{flag} is not for --dry-run")
        args.command.error(
            f"{flag} is for --simulate; a config has its own keys, such as MODEL.CGBN.BN_SIZE"
            if args.config
            else f"{flag} needs a CONFIG"
        )


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]
