"""Tests the tables of the report."""

import json

from megdet_d2.report import plots, tables
from megdet_d2.report.run import Run
from tests.helpers.runs import needs_demo_extra, write_run

pytestmark = needs_demo_extra


def test_the_overview_has_the_runs_numbers(tmp_path):
    runs = [Run.read(write_run(tmp_path / "a")), Run.read(write_run(tmp_path / "b", 32, ap=40.0))]
    a, b = tables.overview(runs)
    assert (a["batch"], a["BN size"], a["AP"], a["AP50"], a["AP75"]) == (
        "16", "8", "30.0", "60.0", "15.0",
    )  # fmt: skip
    assert (b["LR"], b["AP"], b["images/s"]) == ("0.04", "40.0", "64.0")
    assert a["cgbn skipped batches"] == "1"


def test_table_1_is_drawn_and_tabulated_beside_the_papers(tmp_path):
    plain = Run.read(write_run(tmp_path / "a"))
    assert plots.plot_samples([plain], tmp_path / "none.png") is None
    assert tables.table1([plain]) == []
    run = Run.read(write_run(tmp_path / "b", 256, samples=[(1, 5.0), (2, 7.0), (6, 9.0)]))
    assert plots.plot_samples([plain, run], tmp_path / "samples.png").is_file()
    first, sixth = tables.table1([plain, run])
    assert (first["epoch"], first["RPN, of sums"], first["RPN, mean"]) == ("1", "5.00", "6.00")
    assert (first["R-CNN, of sums"], first["paper, 16"], first["paper, 256"]) == (
        "33.00", "5.58", "9.82",
    )  # fmt: skip
    assert (sixth["epoch"], sixth["batch"]) == ("6", "256")


def test_the_time_of_a_resumed_run_is_that_of_all_its_parts(tmp_path):
    folder = write_run(tmp_path / "a")
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    rows = [r | {"training_time": 60.0 * r["iteration"]} if "time" in r else r for r in rows]
    (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # The log has a line for each start that came to its end.
    (folder / "log.txt").write_text("Total training time: 0:00:09 (0:00:01 on hooks)\n")
    assert "Training took 1:39:00 (h:mm:ss), without evaluations" in tables.summarize(folder)


def test_without_times_a_log_of_two_starts_does_not_tell_the_time(run):
    assert "Training took 1 day, 2:03:04" in tables.summarize(run)
    log = run / "log.txt"
    log.write_text(log.read_text() * 2)
    assert "Training took" not in tables.summarize(run)
