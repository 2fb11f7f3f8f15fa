"""Writes the tables and the plot of the studies from their committed CSV files.

    python scripts/study_pages.py
    python scripts/study_pages.py output/ablations/headline    # also reads training losses there

``megdet ablate --ledger`` writes the files, one line per training. The tables go between the
markers of the pages in ``PAGES``; the text around them is written by hand.
"""

import csv
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megdet_d2.ablation.equivalence import assess_equivalence, seeds_needed, wilson_interval
from megdet_d2.ablation.results import MARGIN
from megdet_d2.report.run import Run
from megdet_d2.report.style import make_figure, save_figure, tidy

ROOT = Path(__file__).parent.parent
FILES = ROOT / "docs" / "results" / "experiments"
PAGE = ROOT / "docs" / "results" / "experiments.md"  # the headline's
PLOT = ROOT / "docs" / "assets" / "headline.png"
BEGIN = "<!-- The tables below are written by scripts/study_pages.py. -->"
END = "<!-- The tables end here. -->"
NOT_RUN = "**Not run.**"

Line = dict[str, str]


class Pair(NamedTuple):
    """A file, and its rows of both mini-batches at equal images."""

    file: str
    small: str
    large: str

    def read(self) -> list[Line]:
        """Returns the lines of the file, none where it is missing."""
        return read(FILES / self.file) if (FILES / self.file).is_file() else []


# With 3,003 updates of 128, and with the paper's 5,070. Figures 4 and 1 show the second one.
SHORTER = Pair("headline_runs.csv", "01_b8_bn8", "05_b128_bn8")
BETWEEN = [SHORTER._replace(large=row) for row in ("04_b64_bn8", "03_b32_bn8", "02_b16_bn8")]
HEADLINE = Pair("headline_full.csv", "b8", "b128")
PAIRS = [
    Pair("headline_iterations.csv", "b8_sixteenth", "b128_sixteenth"),
    Pair("headline_iterations.csv", "b8_eighth", "b128_eighth"),
    Pair("headline_iterations.csv", "b8_quarter", "b128_quarter"),
    Pair("headline_iterations.csv", "b8_half", "b128_half"),
    SHORTER,
    HEADLINE,
]
NAMES = ("8, the paper's 16", "128, the paper's 256")
# Table 3's hours for 11 epochs of COCO: 16 images on 8 GPUs, 256 on 128, BN size 16.
PAPER_HOURS = (39.5, 4.1)
# File -> heading, and the row with which each row is compared.
STUDIES: dict[str, tuple[str, Callable[[str], str]]] = {
    "headline_runs.csv": (
        "Mini-batches at equal epochs",
        lambda row: SHORTER.small + ("_long" if row.endswith("_long") else ""),
    ),
    "headline_full.csv": ("The pair with the paper's 5,070 iterations", lambda row: "b8"),
    "headline_iterations.csv": (
        "The same pair with fewer iterations",
        lambda row: row.partition("_grows")[0].replace("b128", "b8"),
    ),
    "headline_range.csv": ("The largest stable learning rate", lambda row: "lr_0.32"),
    "headline_grid.csv": (
        "Learning rates of both mini-batches",
        lambda row: row.split("_")[0] + "_lr_one",
    ),
    "headline_no_bn.csv": ("How often trainings without BN fail", lambda row: "b8_cgbn"),
    "headline_bn_size.csv": ("BN sizes", lambda row: row.split("_")[0] + "_bn8"),
    "headline_heads.csv": ("CGBN in the box head", lambda row: row.removesuffix("_cgbn")),
    "headline_rules.csv": ("Scaling rules, warm-ups, algorithms", lambda row: "linear"),
    "headline_bccd.csv": ("Photographs", lambda row: "b8"),
}
EPOCHS = ("1", "3", "6", "8", "9", "11")
LOSSES = ("total_loss", "loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc")
LOSS_FILE = FILES / "headline_loss.csv"


def read(path: Path) -> list[Line]:
    """Returns the lines of a ledger, one per training."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def paired_gaps(lines: list[Line], row: str, baseline: str) -> list[float]:
    """Returns AP of ``row`` minus AP of ``baseline`` for each seed that has both, in AP."""
    ap = {(line["row"], line["seed"]): float(line["ap"]) for line in lines if line["ap"]}
    seeds = sorted(seed for name, seed in ap if name == row)
    return [ap[row, s] - ap[baseline, s] for s in seeds if (baseline, s) in ap]


def by_numbers(row: str) -> list[tuple[float, str]]:
    """Returns a key that sorts names of rows with 8 before 16."""
    parts = re.split(r"(\d+(?:\.\d+)?)", row)
    return [(float(part), "") if i % 2 else (-1.0, part) for i, part in enumerate(parts)]


def study_table(lines: list[Line], baseline_of: Callable[[str], str]) -> str:
    """Returns one Markdown line per row: AP, failures, and the paired gap with its test."""
    rows: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        rows[line["row"]].append(line)
    table = [
        "| row | mini-batch | BN size | LR | iterations | seeds | failed (95 %) | AP "
        f"| gap, seed by seed | 90 % of the gap | equal within {MARGIN:g} |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row, own in sorted(rows.items(), key=lambda item: by_numbers(item[0])):
        first, failed = own[0], sum(int(line["failed"]) for line in own)
        low, high = wilson_interval(failed, len(own))
        aps = [float(line["ap"]) for line in own if line["ap"]]
        baseline = baseline_of(row)
        gaps = paired_gaps(lines, row, baseline) if row != baseline else []
        cells = [
            f"`{row}`", first["batch"], first["bn_size"], f"{float(first['lr']):g}",
            f"{int(first['iterations']):,}", str(len(own)),
            f"{failed} ({100 * low:.0f} to {100 * high:.0f} %)", spread(aps),
            *gap_cells(gaps),
        ]  # fmt: skip
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def gap_cells(gaps: list[float]) -> list[str]:
    """Returns the gap, its interval, and the answer of the test of equality, each "" without."""
    test = assess_equivalence(gaps, MARGIN)
    interval = f"{test.low:+.2f} to {test.high:+.2f}" if test else ""
    return [spread(gaps, "+"), interval, test.answer if test else ""]


def gap_table() -> str:
    """Returns the gap of the pair against the updates that the large mini-batch makes."""
    table = [
        "| updates of 128 | images | pairs | AP of 8 | AP of 128 | gap | 90 % of the gap "
        f"| equal within {MARGIN:g} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for pair in PAIRS:
        lines = pair.read()
        gaps = paired_gaps(lines, pair.large, pair.small)
        if not gaps:
            continue
        aps = [
            [float(line["ap"]) for line in lines if line["row"] == row and line["ap"]]
            for row in (pair.small, pair.large)
        ]
        first = first_large(lines, pair)
        cells = [
            f"{int(first['iterations']):,}", f"{int(first['images']):,}", str(len(gaps)),
            spread(aps[0]), spread(aps[1]), *gap_cells(gaps),
        ]  # fmt: skip
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def curve_table(pair: Pair) -> str:
    """Returns Figure 4 as Markdown: AP after some epochs for each seed of both ends."""
    lines = pair.read()
    curves = read_curves(lines)
    table = [
        f"| seed | mini-batch | {' | '.join(f'epoch {epoch}' for epoch in EPOCHS)} |",
        "|---|---|" + "---|" * len(EPOCHS),
    ]
    for seed in pair_seeds(lines, pair):
        for row, batch in zip((pair.small, pair.large), NAMES, strict=True):
            cells = [f"{curves[row, seed][epoch]:.1f}" for epoch in EPOCHS]
            table.append(f"| {seed} | {batch} | {' | '.join(cells)} |")
    return "\n".join(table)


def loss_table(lines: list[Line]) -> str:
    """Returns the training loss after some epochs, the mean over the seeds of headline_loss.csv."""
    table = [
        "| updates of 128 | mini-batch | seeds "
        f"| {' | '.join(f'epoch {epoch}' for epoch in EPOCHS)} |",
        "|---|---|---|" + "---|" * len(EPOCHS),
    ]
    for pair in (SHORTER, HEADLINE):
        for row, batch in zip((pair.small, pair.large), NAMES, strict=True):
            own = [line for line in lines if line["row"] == row]
            if not own:
                continue
            losses = [
                [float(line["total_loss"]) for line in own if line["epoch"] == epoch]
                for epoch in EPOCHS
            ]
            cells = [f"{statistics.fmean(values):.3f}" for values in losses]
            cells = [f"{updates(pair.read(), pair):,}", batch, str(len(losses[0])), *cells]
            table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def mean_losses(run: Run, epoch: int) -> list[float]:
    """Returns the means of the losses in metrics.json over an epoch, counted from 1."""
    means = []
    for name in LOSSES:
        iterations, values = run.series(name)
        at = run.epochs(iterations)
        means.append(float(values[(at > epoch - 1) & (at <= epoch)].mean()))
    return means


def read_losses(folder: Path) -> dict[tuple[str, ...], list[str]]:
    """Returns (row, seed, epoch) -> losses, of the finished trainings of a pair in a folder."""
    found: dict[tuple[str, ...], list[str]] = {}
    for row in (*SHORTER[1:], *HEADLINE[1:]):
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


def add_losses(folder: Path) -> None:
    """Adds the training losses of a folder to headline_loss.csv, and keeps its other lines."""
    lines = {}
    if LOSS_FILE.is_file():
        with open(LOSS_FILE, newline="") as file:
            lines = {tuple(line[:3]): line[3:] for line in list(csv.reader(file))[1:]}
    lines |= read_losses(folder)
    ordered = sorted(lines.items(), key=lambda item: (*item[0][:2], int(item[0][2])))
    with open(LOSS_FILE, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("row", "seed", "epoch", *LOSSES))
        writer.writerows([*key, *losses] for key, losses in ordered)


def read_curves(lines: list[Line]) -> dict[tuple[str, str], dict[str, float]]:
    """Returns (row, seed) -> epoch -> AP."""
    return {
        (line["row"], line["seed"]): {
            epoch: float(ap)
            for epoch, ap in (point.split(":") for point in line["ap_by_epoch"].split())
        }
        for line in lines
    }


def pair_seeds(lines: list[Line], pair: Pair) -> list[str]:
    """Returns the seeds for which both ends of a pair are trained."""
    small, large = ({x["seed"] for x in lines if x["row"] == row and x["ap"]} for row in pair[1:])
    return sorted(small & large, key=int)


def first_large(lines: list[Line], pair: Pair) -> Line:
    """Returns the first training of the large mini-batch."""
    return next(line for line in lines if line["row"] == pair.large)


def updates(lines: list[Line], pair: Pair) -> int:
    """Returns the updates that the large mini-batch makes."""
    return int(first_large(lines, pair)["iterations"])


def spread(values: list[float], sign: str = "-") -> str:
    """Returns mean ± sample deviation with two digits, or "" without values."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):{sign}.2f}"
    return mean + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def verdict(lines: list[Line], pair: Pair) -> str:
    """Returns a pair's result as an item of a list, in one sentence per fact."""
    gaps = paired_gaps(lines, pair.large, pair.small)
    test = assess_equivalence(gaps, MARGIN)
    size = f"{first_large(lines, pair)['batch']} images, {updates(lines, pair):,} updates"
    first = f"* **{size}**: pairs trained {len(gaps)} of 5."
    if test is None:
        return first
    answers = {"yes": "equal within", "no": "a gap above", "not shown": "not shown equal within"}
    deviation = statistics.stdev(gaps)
    try:
        needed = f"{seeds_needed(deviation, MARGIN)} seeds"
    except ValueError:
        needed = "more than 1,000 seeds"
    return (
        f"{first} The gap is {spread(gaps, '+')} AP, with an interval of 90 % from "
        f"{test.low:+.2f} to {test.high:+.2f}: {answers[test.answer]} {MARGIN:g} AP. If "
        f"there is no gap, {needed} at this deviation would show equality with a probability of "
        "80 %."
    )


def headline_tables() -> str:
    """Returns what docs/results/experiments.md has: the headline and its other questions."""
    results = "\n".join(verdict(pair.read(), pair) for pair in (HEADLINE, SHORTER, *BETWEEN))
    parts = [
        "Mini-batches of 128, 64, 32 and 16 against 8, the paper's 256, 128, 64 and 32 against 16, "
        "at equal epochs:",
        results,
        "![AP over epochs and over hours at both mini-batches](../assets/headline.png)",
        "### The gap against the number of updates",
        gap_table(),
    ]
    for name, (heading, baseline_of) in STUDIES.items():
        if (FILES / name).is_file():
            link = f"Every training is a line of [{name}](experiments/{name})."
            parts += [f"### {heading}", link, study_table(read(FILES / name), baseline_of)]
    for pair in (HEADLINE, SHORTER):
        heading = f"### Figure 4: AP after epochs, {updates(pair.read(), pair):,} updates of 128"
        parts += [heading, curve_table(pair)]
    name = LOSS_FILE.name
    link = f"Means over an epoch and over the seeds in [{name}](experiments/{name})."
    parts += ["### The training loss", link, loss_table(read(LOSS_FILE))]
    return "\n\n".join(parts)


def rate_table(lines: list[Line]) -> str:
    """Returns a line per optimizer, AP at each learning rate, from rows like sgd_lr_0.16."""
    found: dict[str, dict[float, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        optimizer, _, rate = line["row"].partition("_lr_")
        found[optimizer][float(rate)].append(line)
    columns = max(map(len, found.values()))
    table = [
        f"| `MEGDET.OPTIMIZER` |{' learning rate: AP |' * columns}",
        "|---|" + "---|" * columns,
    ]
    for optimizer, rates in found.items():
        cells = [f"{rate:g}: {outcome(own)}" for rate, own in sorted(rates.items())]
        table.append(f"| {' | '.join([optimizer, *cells])} |")
    return "\n".join(table)


def outcome(lines: list[Line]) -> str:
    """Returns AP of the trainings of a row, and how many failed."""
    failed = sum(int(line["failed"]) for line in lines)
    aps = spread([float(line["ap"]) for line in lines if line["ap"]])
    failures = f"{failed} of {len(lines)} failed" if failed else ""
    return ", ".join(part for part in (aps, failures) if part)


def table_of(name: str, make: Callable[[list[Line]], str]) -> str:
    """Returns the table of a CSV file for a page in docs, below a link to the file."""
    path = FILES / name
    if not path.is_file():
        return NOT_RUN
    link = f"Every training is a line of [{name}](results/experiments/{name})."
    return f"{link}\n\n{make(read(path))}"


def optimizer_tables() -> str:
    """Returns what docs/large_batch.md has: the grid of learning rates."""
    return table_of("optimizers_grid.csv", rate_table)


def challenge_table() -> str:
    """Returns what docs/challenge.md has: each technique against none, seed by seed."""
    return table_of("study_challenge.csv", lambda lines: study_table(lines, lambda row: "plain"))


PAGES = {
    PAGE: headline_tables,
    ROOT / "docs" / "large_batch.md": optimizer_tables,
    ROOT / "docs" / "challenge.md": challenge_table,
}


def render(path: Path) -> str:
    """Returns the text of a page of ``PAGES`` with its tables between its markers.

    Raises:
        ValueError: the page does not have each marker once.
    """
    before, rest = path.read_text().split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{PAGES[path]()}\n\n{END}{after}"


def draw(path: Path) -> Path:
    """Draws Figures 4 and 1, AP over epochs and over hours.

    A thin line is a seed, a thick one the mean of a mini-batch. The hours are those of the paper's
    clusters, in equal parts for each epoch: here is none.
    """
    pair, lines = HEADLINE, HEADLINE.read()
    curves, seeds = read_curves(lines), pair_seeds(lines, pair)
    figure = make_figure(9.6, 3.4)
    over_epochs, over_hours = figure.subplots(1, 2, sharey=True)
    for colour, (row, batch, hours) in enumerate(zip(pair[1:], (8, 128), PAPER_HOURS, strict=True)):
        epochs = sorted(curves[row, seeds[0]], key=float)
        aps = [[curves[row, seed][epoch] for epoch in epochs] for seed in seeds]
        means = list(map(statistics.fmean, zip(*aps, strict=True)))
        label = f"mini-batch {batch}, the paper's {2 * batch}"
        for axes, scale in ((over_epochs, 1.0), (over_hours, hours / float(epochs[-1]))):
            x = [scale * float(epoch) for epoch in epochs]
            for y in aps:
                axes.plot(x, y, color=f"C{colour}", linewidth=0.7, alpha=0.5)
            axes.plot(x, means, color=f"C{colour}", linewidth=2, marker=".", label=label)
    for decay in (8, 10):
        over_epochs.axvline(decay, color="grey", linestyle="--", linewidth=0.8, alpha=0.6)
    over_epochs.set_xlabel("epoch; dashed: the learning rate is divided by 10")
    over_epochs.set_ylabel("box AP (%)")
    over_epochs.legend(frameon=False, loc="lower right")
    over_hours.set_xscale("log")
    over_hours.set_xlabel("hours of the paper's 8 and 128 GPUs on COCO")
    over_hours.set_xticks([0.5, 1, 2, 4, 10, 20, 40], ["0.5", "1", "2", "4", "10", "20", "40"])
    over_hours.minorticks_off()
    for axes in (over_epochs, over_hours):
        tidy(axes)
    return save_figure(figure, path)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        add_losses(Path(sys.argv[1]))
    for page in PAGES:
        page.write_text(render(page))
    draw(PLOT)
