"""Reads the results of an ablation and writes them beside the paper's: Markdown, CSV and a plot."""

import csv
import json
import math
import os
import platform
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from megdet_d2.report.run import Run
from megdet_d2.report.style import make_figure, save_figure, tidy

from .equivalence import assess_equivalence, wilson_interval
from .job import Job
from .rows import Row


@dataclass(frozen=True)
class Result:
    """The result of one job.

    Attributes:
        row: name of the row.
        seed: SEED of the training.
        status: "done"; "failed", which is a result: it diverged, or detects nothing; "error": it
            ended by another error, such as a missing file, and is no result; or "unfinished".
        reason: why it is not done.
        ap, ap50, ap75: COCO's box AP in percent; None unless it is done.
        hours: hours of training, without evaluations.
        images_per_second: mean throughput of all processes together.
    """

    row: str
    seed: int
    status: str
    reason: str = ""
    ap: float | None = None
    ap50: float | None = None
    ap75: float | None = None
    hours: float | None = None
    images_per_second: float | None = None


# A file in OUTPUT_DIR, written if a local training ended by an error: its exit code, the reason.
FAILURE = "failure.json"
# Errors of a loss or gradient that is not finite: Detectron2's own, and ours.
DIVERGENCE = re.compile(r"(?:FloatingPoint|Divergence)Error: .+")
# By default, rows whose AP differs by less than this are equally accurate.
MARGIN = 0.5
MEASURES = ("ap", "ap50", "ap75", "hours", "images_per_second")


def read_result(job: Job) -> Result:
    """Returns the result of a job from its files.

    The job may still run, here or on another machine. A finished training is "done", even if it
    had errors before.
    """
    row, seed, folder = job.row, job.seed, job.folder
    try:
        run = Run.read(folder)
    except (FileNotFoundError, ValueError):
        run = None
    if run is not None and (ap := run.final()) is not None:
        if math.isnan(ap):  # Detectron2 writes NaN if there is no detection
            return Result(row.name, seed, "failed", "no detection on the test set")
        return Result(
            row.name,
            seed,
            "done",
            ap=ap,
            ap50=run.final("AP50"),
            ap75=run.final("AP75"),
            hours=run.hours(),
            images_per_second=run.images_per_second(),
        )
    failure, log = folder / FAILURE, folder / "log.txt"
    if failure.is_file():
        try:
            reason = json.loads(failure.read_text())["reason"]
        except (KeyError, ValueError):
            reason = f"{failure} cannot be read"
    else:  # On a cluster there is no failure.json. The log has the error.
        reason = find_error(log.read_text(errors="replace")) if log.is_file() else None
    if reason is None:
        return Result(row.name, seed, "unfinished", "not at its end")
    return Result(row.name, seed, "failed" if DIVERGENCE.match(reason) else "error", reason)


def find_error(text: str) -> str | None:
    """Returns the error that ended a training, from its log; None if there is none.

    It is a divergence, or the error of a traceback. Errors before the training was last started or
    rolled back do not count.
    """
    latest = text.rpartition("Starting training from iteration")[2]
    diverged = DIVERGENCE.findall(latest)
    failed = latest.rpartition("Exception during training:")[2] if "Exception d" in latest else ""
    errors = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception)\b.*", failed, re.MULTILINE)
    return next(iter(diverged[-1:] + errors[-1:]), None)


def summarize(
    rows: Sequence[Row],
    results: Sequence[Result],
    baseline: str | None = None,
    margin: float = MARGIN,
) -> list[dict[str, Any]]:
    """Returns one dict per row: mean and sample deviation over the finished seeds, and failures.

    "gain" is the AP minus that of the row ``baseline`` with the same seed. Trainings of one seed
    draw the same images, so the gain deviates less than the difference of two means. The interval
    and the p-value of equality within ``margin`` come from ``assess_equivalence``.
    """
    reference = {r.seed: r.ap for r in results if r.row == baseline and r.status == "done"}
    summary = []
    for row in rows:
        own = [result for result in results if result.row == row.name]
        done = [result for result in own if result.status == "done"]
        failed = sum(result.status == "failed" for result in own)
        line = {
            "row": row.name,
            "batch": row.batch_size,
            "bn_size": row.bn_size,
            "processes": row.processes,
            "lr": row.cfg.SOLVER.BASE_LR,
            "iterations": row.cfg.SOLVER.MAX_ITER,
            "seeds": len(done) + failed,
            "failed": failed,
            "failure_rate": failed / (len(done) + failed) if done or failed else None,
        }
        line["failure_low"], line["failure_high"] = (
            wilson_interval(failed, len(done) + failed) if done or failed else (None, None)
        )
        measured: dict[str, list[float | None]] = {
            measure: [getattr(result, measure) for result in done] for measure in MEASURES
        }
        if baseline is not None:
            pairs = [(result.ap, reference.get(result.seed)) for result in done]
            measured["gain"] = [a - b for a, b in pairs if a is not None and b is not None]
        for measure, found in measured.items():
            values = [value for value in found if value is not None]
            line[measure] = statistics.fmean(values) if values else None
            line[f"{measure}_std"] = statistics.stdev(values) if len(values) > 1 else None
            if measure == "gain":
                test = assess_equivalence(values, margin)
                line["gain_low"] = test.low if test else None
                line["gain_high"] = test.high if test else None
                line["gain_p_equal"] = test.p if test else None
                line["gain_equal"] = test.answer if test else None
        line |= {"paper_ap": row.paper_ap, "paper_hours": row.paper_hours}
        summary.append(line)
    return summary


def collate(
    rows: Sequence[Row],
    results: Sequence[Result],
    output: Path,
    title: str,
    baseline: str | None = None,
    margin: float = MARGIN,
) -> str:
    """Writes results.md, results.csv, results.png and runs.csv; returns the Markdown table.

    Args:
        output: the folder; it is made if necessary.
        title: heading of results.md.
        baseline: name of the row with which each is compared, if any.
        margin: AP within which a row counts as equal to the baseline.
    """
    output.mkdir(parents=True, exist_ok=True)
    summary = summarize(rows, results, baseline, margin)
    table = to_markdown(summary, results, baseline, margin)
    head = (
        f"# {title}\n\n{_hardware()}. AP in percent, mean and sample deviation over seeds. Hours "
        "are those of training, without evaluations. The paper's numbers are for COCO on its "
        "GPUs.\n\n"
    )
    (output / "results.md").write_text(head + table + "\n")
    _write_csv(output / "results.csv", list(summary[0]), summary)
    _write_csv(output / "runs.csv", [f.name for f in fields(Result)], map(asdict, results))
    plot(summary, output / "results.png")
    return table


def to_markdown(
    summary: Sequence[dict[str, Any]],
    results: Sequence[Result],
    baseline: str | None = None,
    margin: float = MARGIN,
) -> str:
    """Returns the table of ``summarize`` and, below it, the reasons of failures and errors."""
    lines = [
        {
            "row": line["row"],
            "batch": line["batch"],
            "BN size": line["bn_size"],
            "processes": line["processes"],
            "LR": f"{line['lr']:.6g}",
            "AP": _cell(line, "ap", 1),
            **({f"gain on {baseline}": _cell(line, "gain", 1, "+")} if baseline else {}),
            **({f"equal within {margin:g}": _equality(line)} if baseline else {}),
            "AP50": _cell(line, "ap50", 1),
            "AP75": _cell(line, "ap75", 1),
            "hours": _cell(line, "hours", 2),
            "images/s": _cell(line, "images_per_second", 1),
            "failed": f"{line['failed']}/{line['seeds']}" if line["seeds"] else "",
            "paper AP": "" if line["paper_ap"] is None else str(line["paper_ap"]),
            "paper hours": "" if line["paper_hours"] is None else str(line["paper_hours"]),
        }
        for line in summary
    ]
    text = [tabulate(lines, headers="keys", tablefmt="pipe", disable_numparse=True)]
    for status, title in (("failed", "Failed:"), ("error", "Ended by an error, not counted:")):
        notes = [
            f"* {result.row}, seed {result.seed}: {result.reason}"
            for result in results
            if result.status == status
        ]
        text += ["", title, "", *notes] if notes else []
    return "\n".join(text)


def plot(summary: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the measured AP with its deviation, and in a second panel the paper's AP."""
    has_paper = any(line["paper_ap"] is not None for line in summary)
    figure = make_figure(9 if has_paper else 7, 1.2 + 0.3 * len(summary))
    panels = figure.subplots(1, 2 if has_paper else 1, sharey=True, squeeze=False)[0]
    y = range(len(summary))
    for axes, key, title in zip(panels, ("ap", "paper_ap"), ("here", "the paper"), strict=False):
        for i, line in enumerate(summary):
            value = line[key]
            failed = value == "failed" or (key == "ap" and value is None and line["failed"])
            if isinstance(value, (int, float)):
                deviation = line["ap_std"] or 0 if key == "ap" else 0
                axes.errorbar(value, i, xerr=deviation, fmt="o", color="C0", capsize=3)
            elif failed:
                axes.text(0.02, i, "failed", transform=axes.get_yaxis_transform(), va="center")
        axes.set_title(title, loc="left")
        axes.set_xlabel("box AP (%)")
        tidy(axes)
    panels[0].set_yticks(y, [line["row"] for line in summary], parse_math=False)
    panels[0].set_ylim(len(summary) - 0.5, -0.5)
    save_figure(figure, path)


def _cell(line: dict[str, Any], measure: str, digits: int, sign: str = "-") -> str:
    """Returns mean ± deviation, "failed", or "" if there is no value."""
    mean, deviation = line[measure], line[f"{measure}_std"]
    if mean is None:
        return "failed" if line["failed"] and measure == "ap" else ""
    spread = "" if deviation is None else f" ± {deviation:.{digits}f}"
    return f"{mean:{sign}.{digits}f}{spread}"


def _equality(line: dict[str, Any]) -> str:
    """Returns the answer of the equivalence test with the interval of the gain."""
    if line["gain_equal"] is None:
        return ""
    return f"{line['gain_equal']} ({line['gain_low']:+.1f} to {line['gain_high']:+.1f})"


def _write_csv(path: Path, columns: list[str], lines: Iterable[dict[str, Any]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(lines)


def _hardware() -> str:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return (
        f"Tabulated on {', '.join(gpus) or 'no GPU'}, {os.cpu_count()} cores "
        f"({platform.machine()}), torch {torch.__version__}"
    )
