"""Measures the variance of the gradient against the mini-batch (Equations 2 to 4).

It uses the data and the weights of a config.

  megdet variance configs/Digits-Detection/megdet_R18_FPN_b32_bn32.yaml \\
      MODEL.WEIGHTS output/demo/model_final.pth
"""

import argparse
from pathlib import Path

TAKES_OVERRIDES = True


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
        "the BN size of the config, or the largest N)",
    )
    add("--output", type=Path, help="folder for the results (default OUTPUT_DIR/variance)")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from megdet_d2.gradient_noise import command

    command.run(args)


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]
