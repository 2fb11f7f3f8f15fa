"""Writes the training losses of the headline's pair, epoch by epoch, from the trainings' folders.

    python -m scripts.headline_loss output/ablations/headline

Lines of trainings whose folders are not there stay in the file. scripts/headline_page.py makes a
table of it.
"""

import csv
import sys
from pathlib import Path

import numpy as np

from megdet_d2.report.run import Run
from scripts.headline_page import FILES, PAIR

FILE = FILES / "headline_loss.csv"
LOSSES = ("total_loss", "loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc")
COLUMNS = ("row", "seed", "epoch", *LOSSES)


def mean_losses(run: Run, epoch: int) -> list[float]:
    """Returns the means of the losses in metrics.json over an epoch, counted from 1."""
    means = []
    for name in LOSSES:
        iterations, values = run.series(name)
        at = run.epochs(iterations)
        means.append(float(values[(at > epoch - 1) & (at <= epoch)].mean()))
    return means


def read_folder(folder: Path) -> dict[tuple[str, str, str], list[str]]:
    """Returns (row, seed, epoch) -> losses, of the finished trainings of the pair in a folder."""
    found = {}
    for row in PAIR:
        for path in sorted(folder.glob(f"{row}/seed*")):
            try:
                run = Run.read(path)
            except (FileNotFoundError, ValueError):  # it has hardly begun
                continue
            if run.final() is None:
                continue
            epochs = int(np.ceil(run.epochs(run.series("total_loss")[0])[-1]))
            for epoch in range(1, epochs + 1):
                key = row, path.name.removeprefix("seed"), str(epoch)
                found[key] = [f"{loss:.4f}" for loss in mean_losses(run, epoch)]
    return found


def main(folder: Path) -> None:
    """Adds the trainings of a folder to the file."""
    lines = {}
    if FILE.is_file():
        with open(FILE, newline="") as file:
            lines = {tuple(line[:3]): line[3:] for line in list(csv.reader(file))[1:]}
    lines |= read_folder(folder)
    ordered = sorted(lines.items(), key=lambda item: (*item[0][:2], int(item[0][2])))
    with open(FILE, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([*key, *losses] for key, losses in ordered)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
