"""Draws docs/assets/ap_over_epochs.png from the committed results.

python scripts/readme_plot.py [OUTPUT]
"""

import csv
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from megdet_d2.report.style import make_figure, tidy

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "docs" / "results" / "experiments" / "epochs.csv"
OUTPUT = ROOT / "docs" / "assets" / "ap_over_epochs.png"
# Rows of the file, and the mini-batches of the paper that they stand for.
ROWS = {"bccd/06_b16_bn16": 16, "bccd/10_b64_bn16": 64, "bccd/12_b128_bn16": 128}


def read_curves(path: Path) -> dict[str, dict[float, list[float]]]:
    """Returns row -> epoch -> the AP of each seed, in percent."""
    curves: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    with open(path, newline="") as file:
        for line in csv.DictReader(file):
            curves[line["row"]][float(line["epoch"])].append(float(line["ap"]))
    return curves


def draw(path: Path) -> Path:
    """Draws mean and sample deviation over the seeds, one curve per mini-batch."""
    curves = read_curves(SOURCE)
    figure = make_figure(6.4, 3.4)
    axes = figure.subplots()
    for colour, (row, mini_batch) in enumerate(ROWS.items()):
        epochs = sorted(curves[row])
        means = [statistics.mean(curves[row][epoch]) for epoch in epochs]
        spread = [statistics.stdev(curves[row][epoch]) for epoch in epochs]
        label = f"mini-batch {mini_batch // 2}, the paper's {mini_batch}"
        axes.errorbar(epochs, means, spread, color=f"C{colour}", marker=".", capsize=3, label=label)
    for decay in (8, 10):
        axes.axvline(decay, color="grey", linestyle="--", linewidth=0.8, alpha=0.6)
    axes.set_xlabel("epoch; dashed: the learning rate is divided by 10")
    axes.set_ylabel("box AP (%)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="lower right")
    tidy(axes)
    figure.savefig(path)
    return path


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT)
