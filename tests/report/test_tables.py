"""Tests the tables of the report."""

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
