"""Runs ``megdet report``: draws and tabulates the runs, and writes the page."""

import argparse
from pathlib import Path

from megdet_d2._moved import renamed

from .page import Content, write_page
from .plots import draw_detections, plot_accuracy, plot_curves, plot_health, plot_samples
from .run import Run, labels
from .tables import overview, summarize, table1

__getattr__ = renamed(__name__, SCORE_THRESHOLD="megdet_d2.report.plots.SCORE_THRESHOLD")


def run(args: argparse.Namespace) -> None:
    """Runs the command with the arguments of ``megdet_cli.report``.

    Raises:
        FileNotFoundError, ValueError: a file of a run is missing or wrong. Missing detections are
            reported at the end, after everything else has been written.
    """
    runs = [Run.read(path) for path in args.runs]
    output = args.output or (runs[0].path if len(runs) == 1 else Path("output/report"))
    output.mkdir(parents=True, exist_ok=True)
    sections: list[tuple[str, Content]] = [
        ("Runs", overview(runs)),
        ("Accuracy (Figures 1 and 4)", plot_accuracy(runs, output / "accuracy.png")),
        ("Throughput, skipped batches and images", plot_health(runs, output / "health.png")),
    ]
    samples = plot_samples(runs, output / "samples.png")
    if samples:
        sections.append(("Ratio of positives and negatives (Table 1)", samples))
    if table := table1(runs):
        sections.append(("Table 1, in percent", table))
    missing = []
    for number, (each, label) in enumerate(zip(runs, labels(runs), strict=True), start=1):
        mark = f"_{number}" if len(runs) > 1 else ""
        curves = plot_curves(each.path, output / f"curves{mark}.png")
        sections.append((f"{label}: learning rate, losses, AP", curves))
        if not each.cfg.DATASETS.TEST:
            sections.append((f"{label}: detections", "DATASETS.TEST is empty: none to draw"))
            continue
        try:
            picture = draw_detections(each.path, output / f"detections{mark}.png", args.images)
        except (FileNotFoundError, ValueError) as error:
            missing.append(str(error))
            sections.append((f"{label}: detections", str(error)))
        else:
            sections.append((f"{label}: ground truth and detections (Figure 5)", picture))
    title = f"megdet_d2: {', '.join(labels(runs))}"
    page = write_page(output / "report.html", title, sections)
    for each in runs:
        print(summarize(each.path))
    pictures = [str(content) for _, content in sections if isinstance(content, Path)]
    print(f"Pictures: {', '.join(pictures)}\nPage:     {page}")
    if missing:
        raise ValueError("; ".join(missing))
