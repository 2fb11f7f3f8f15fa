"""Measures the variance of the gradient against the mini-batch (Equations 2 to 4).

It uses the data and the weights of a config. With --branch it measures the critical batch: from
each checkpoint it trains branches at k times the mini-batch for equal images, and finds the largest
k whose loss is not worse. A branch that has ended is not repeated.

  megdet variance configs/Digits-Detection/megdet_R18_FPN_b32_bn32.yaml \\
      MODEL.WEIGHTS output/demo/model_final.pth
  megdet variance output/demo/config.yaml --branch --images 8192 --factors 1,2,4,8 \\
      --checkpoints output/demo/model_0000099.pth,output/demo/model_0000199.pth --seeds 1,2,3
"""

import argparse
from pathlib import Path

TAKES_OVERRIDES = True
RULES = ("linear", "sqrt", "none")
# Flags of --branch alone, with their defaults.
BRANCH = {
    "checkpoints": None,
    "factors": [1, 2, 4, 8],
    "images": None,
    "seeds": [1, 2, 3],
    "rules": ["linear"],
    "tolerance": 0.01,
    "points": 4,
    "loss_images": 256,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add = parser.add_argument
    add("config", metavar="CONFIG", help="config file; MODEL.WEIGHTS are the weights to measure at")
    add(
        "--sizes",
        type=_integers,
        default=[1, 2, 4, 8, 16, 32, 64],
        metavar="1,2,4",
        help="mini-batch sizes N (default 1,2,4,8,16,32,64)",
    )
    add("--pairs", type=int, default=8, help="pairs of mini-batches per size (default 8)")
    add(
        "--images-per-forward",
        type=int,
        help="images per forward pass, which CGBN normalises over and memory must hold (default "
        "the BN size of the config, or the largest N; with --branch, or its micro-batch)",
    )
    add("--output", type=Path, help="folder for the results (default OUTPUT_DIR/variance)")

    add = parser.add_argument_group("critical batch").add_argument
    add("--branch", action="store_true", help="train branches from checkpoints of one training")
    add(
        "--checkpoints",
        type=_paths,
        metavar="A.pth,B.pth",
        help="with the optimizer's state (default MODEL.WEIGHTS)",
    )
    add(
        "--factors",
        type=_integers,
        metavar="1,2,4",
        help="k, mini-batches of a branch over that of the training (default 1,2,4,8)",
    )
    add("--images", type=int, help="images that each branch trains on")
    add("--seeds", type=_integers, metavar="1,2,3", help="orders of the images (default 1,2,3)")
    add(
        "--rules",
        type=_words,
        metavar="linear,sqrt",
        help=f"learning rate of k, any of {', '.join(RULES)} (default linear)",
    )
    add(
        "--tolerance",
        type=float,
        help="relative increase of the loss that is not worse (default 0.01)",
    )
    add(
        "--points",
        type=int,
        help="losses in the second half of a branch that are averaged (default 4)",
    )
    add("--loss-images", type=int, help="images that the loss is measured on (default 256)")


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        ValueError: a flag of --branch is given without it.
    """
    given = [name for name in BRANCH if getattr(args, name) is not None]
    if given and not args.branch:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"only --branch uses {flags}; give --branch too, or leave them out")
    if args.branch:
        for name in BRANCH.keys() - given:
            setattr(args, name, BRANCH[name])
        from megdet_d2.gradient_noise import branch_command

        branch_command.run(args)
        return
    from megdet_d2.gradient_noise import command

    command.run(args)


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _words(text: str) -> list[str]:
    return text.split(",")


def _paths(text: str) -> list[Path]:
    return [Path(part) for part in text.split(",")]
