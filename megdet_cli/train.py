"""Trains a detector, or evaluates one, with Detectron2's flags.

A machine without a GPU runs --num-gpus processes on its CPU. Under torchrun, leave --num-gpus and
--num-machines to torchrun.

  megdet train --config-file COCO-Detection/megdet_R50_FPN_b16_normal.yaml --num-gpus 8
  torchrun --nproc-per-node 8 -m megdet_cli train --config-file ...
"""

import argparse
import os

TAKES_OVERRIDES = True
# Those of detectron2.engine.default_argument_parser, whose module takes seconds to import.
FLAGS = (
    "config_file",
    "resume",
    "eval_only",
    "num_gpus",
    "num_machines",
    "machine_rank",
    "dist_url",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.set_defaults(shows_traceback=True)
    add = parser.add_argument
    add(
        "--config-file", metavar="FILE", default="", help="path of a config, or name of one of ours"
    )
    add(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in OUTPUT_DIR, if there is one",
    )
    add("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS; do not train")
    add("--num-gpus", metavar="N", type=int, default=1, help="GPUs of each machine (default 1)")
    add("--num-machines", metavar="N", type=int, default=1, help="machines (default 1)")
    add(
        "--machine-rank",
        metavar="N",
        type=int,
        default=0,
        help="number of this machine, from 0 (default 0)",
    )
    # Detectron2 gives every user a port, so that an orphan of the user shows as a port in use.
    port = 2**15 + 2**14 + hash(os.getuid()) % 2**14
    add(
        "--dist-url",
        metavar="URL",
        default=f"tcp://127.0.0.1:{port}",
        help="address of machine 0; auto for a free port on one machine (default tcp://127.0.0.1 "
        "and a port of this user)",
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from megdet_d2.engine import command

    # Other processes get the arguments, and those of our parser cannot be pickled.
    flags = {name: getattr(args, name) for name in FLAGS}
    command.run(argparse.Namespace(**flags, opts=args.opts))
