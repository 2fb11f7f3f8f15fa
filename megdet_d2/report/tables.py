"""Tabulates runs: their numbers, the paper's Table 1, and a summary in words."""

import re
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from megdet_d2.engine.sample_ratio import PAPER, STAGES, read_samples

from .run import SKIP_COUNTERS, Run, labels, read_metrics


def overview(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Returns one row per run: its mini-batch, learning rate, AP, hours; "" for unknown values."""
    rows = []
    for run, label in zip(runs, labels(runs), strict=True):
        aps = {name: run.evaluations(name)[1] for name in ("AP", "AP50", "AP75")}
        _, bn_size = run.series("bn_size")
        rate = run.images_per_second()
        skips = {key: run.series(key)[1] for key in SKIP_COUNTERS}
        rows.append(
            {
                "run": label,
                "batch": str(run.cfg.SOLVER.IMS_PER_BATCH),
                "BN size": f"{bn_size[-1]:g}" if len(bn_size) else "",
                "LR": f"{run.cfg.SOLVER.BASE_LR:.6g}",
                **{name: f"{ap[-1]:.1f}" if len(ap) else "" for name, ap in aps.items()},
                "hours": f"{run.hours():.2f}" if rate else "",
                "images/s": f"{rate:.1f}" if rate else "",
                **{k.replace("_", " "): f"{v[-1]:g}" for k, v in skips.items() if len(v)},
            }
        )
    return rows


def table1(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Returns the rows of the paper's Table 1 that the runs have recorded, in percent.

    There is one row per run and epoch of the table, with the paper's values for batch 16 and 256.
    """
    rows = []
    for run, label in zip(runs, labels(runs), strict=True):
        for line in read_samples(run.path):
            if int(line["epoch"]) in PAPER:
                paper = PAPER[int(line["epoch"])]
                rows.append(
                    {"epoch": f"{line['epoch']:g}", "run": label}
                    | {"batch": str(run.cfg.SOLVER.IMS_PER_BATCH)}
                    | {
                        f"{stage.upper().replace('RCNN', 'R-CNN')}, {kind}": f"{line[column]:.2f}"
                        for stage in STAGES
                        for column, kind in (
                            (f"{stage}_ratio", "of sums"),
                            (f"{stage}_mean_ratio", "mean"),
                        )
                    }
                    | {"paper, 16": f"{paper[16]:.2f}", "paper, 256": f"{paper[256]:.2f}"}
                )
    return rows


def summarize(run: str | Path) -> str:
    """Returns the final AP, the time of the training, and where its files are, in lines of text.

    Raises:
        FileNotFoundError, ValueError: see ``read_metrics``.
    """
    run = Path(run)
    final = (read_metrics(run)[1] or [{}])[-1]
    lines = [
        f"{key} {final[key]:.1f}, AP50 {final[key + '50']:.1f} (%)"
        for key in sorted(final)
        if key.endswith("bbox/AP")
    ]
    log = run / "log.txt"
    lines += _training_time(run, log)
    lines.append(f"Numbers:  {run / 'metrics.json'}, {log}")
    lines.append(f"Scalars:  {Path(sys.executable).parent / 'tensorboard'} --logdir {run}")
    return "\n".join(lines)


def _training_time(run: Path, log: Path) -> list[str]:
    """Returns a line with the time of the training, those before its resumes included."""
    seconds = Run.read(run).hours() * 3600
    if seconds > 0:
        time = timedelta(seconds=round(seconds))
        return [f"Training took {time} (h:mm:ss), without evaluations."]
    # Without times in metrics.json. The log has one line per start that came to its end.
    times = re.findall(r"Total training time: (.+?) \(", log.read_text()) if log.is_file() else []
    return [f"Training took {times[0]} (h:mm:ss), evaluation included."] if len(times) == 1 else []
