"""Tests how results are read from folders of trainings, and their table."""

import json
import math

import pytest

from tests.helpers.ablation import read_csv, write_script

pytest.importorskip("matplotlib", reason="the plot needs the demo extra")

from megdet_d2.ablation.job import Job
from megdet_d2.ablation.results import Result, collate, read_result, summarize
from megdet_d2.ablation.rows import read_rows
from megdet_d2.cli import main


def test_the_table_has_what_earlier_commands_have_trained(listed, tmp_path):
    script, log = write_script(listed, tmp_path)
    output = tmp_path / "out"
    command = ["ablate", str(listed), "--script", script, "--output", str(output)]
    main([*command, "--seeds", "1,2", "--rows", "linear"])
    main([*command, "--rows", "none"])
    assert log.read_text().splitlines()[2:] == [str(output / "none/seed1")]
    linear, none = read_csv(output / "results.csv")
    assert (linear["row"], linear["seeds"], none["row"], none["seeds"]) == (
        "linear",
        "2",
        "none",
        "1",
    )


def test_a_gain_is_of_the_seeds_that_both_rows_have(listed, tmp_path, capsys):
    """Seeds differ by 10 AP, the rows of a seed by 1 and 2: the gain is 1.5 and varies little."""
    aps = {"linear": (30.0, 40.0, 50.0), "half": (31.0, 42.0, None)}
    results = [
        Result(row, seed, "done" if ap else "failed", ap=ap)
        for row, values in aps.items()
        for seed, ap in enumerate(values)
    ]
    linear, half, none = summarize(read_rows(listed), results, baseline="linear")
    assert (half["gain"], half["gain_std"]) == (1.5, pytest.approx(math.sqrt(0.5)))
    assert (linear["gain"], linear["gain_std"], none["gain"]) == (0, 0, None)

    script, _ = write_script(listed, tmp_path)
    command = ["ablate", str(listed), "--script", script, "--output", str(tmp_path / "out")]
    main([*command, "--seeds", "1,2", "--baseline", "none"])
    linear, half, none = read_csv(tmp_path / "out/results.csv")
    assert (linear["gain"], half["gain"], none["gain"]) == ("0.0", "", "0.0")
    assert "gain on none" in (out := capsys.readouterr().out) and "+0.0 ± 0.0" in out


def test_other_overrides_are_not_taken_for_these(listed, tmp_path):
    script, log = write_script(listed, tmp_path, overrides=["MODEL.WEIGHTS", "a.pth"])
    command = ["ablate", str(listed), "--script", script, "--output", str(tmp_path / "out")]
    main([*command, "MODEL.WEIGHTS", "a.pth"])
    trained = log.read_text()
    for words in (["--collate"], []):
        with pytest.raises(SystemExit, match="MODEL.WEIGHTS a.pth, and row .*another --output"):
            main([*command, *words])
    # Now a row of the same name has another value.
    listed.write_text(listed.read_text().replace("LR_FACTOR: 0.5", "LR_FACTOR: 0.25"))
    with pytest.raises(SystemExit, match="MEGDET.LR_FACTOR 0.5, and row half now has 0.25"):
        main([*command, "MODEL.WEIGHTS", "a.pth"])
    assert log.read_text() == trained


def test_what_a_run_overcame_is_no_failure(listed, tmp_path):
    """Errors before a roll-back or a new start do not count; a finished training is done."""
    row = read_rows(listed)[0]
    job = Job(row, 1, tmp_path)
    log = tmp_path / "log.txt"
    start, error = "Starting training from iteration 20\n", "DivergenceError: loss is nan\n"
    log.write_text(start + error + start)
    assert read_result(job).status == "unfinished"
    log.write_text(start + error)
    assert read_result(job).status == "failed"
    log.write_text(
        start + "[01/01 ERROR]: Exception during training:\nTraceback (most recent call last):\n"
        '  File "x.py", line 3, in f\n    raise ValueError\n'
        "torch.OutOfMemoryError: CUDA out of memory\n[01/01 INFO]: Total training time\n"
    )
    memory = "torch.OutOfMemoryError: CUDA out of memory"
    assert (read_result(job).status, read_result(job).reason) == ("error", memory)
    (tmp_path / "failure.json").write_text("")  # as a full disk leaves it
    assert "failure.json cannot be read" in read_result(job).reason
    (tmp_path / "failure.json").write_text('{"reason": "no GPU"}')
    assert (read_result(job).status, read_result(job).reason) == ("error", "no GPU")
    (tmp_path / "failure.json").write_text('{"reason": "DivergenceError: loss is inf"}')
    assert read_result(job).status == "failed"
    (tmp_path / "config.yaml").write_text(row.cfg.dump())
    last = {"iteration": row.cfg.SOLVER.MAX_ITER, "bbox/AP": 30, "bbox/AP50": 50, "bbox/AP75": 30}
    training = {"iteration": 19, "total_loss": 1.0, "time": 0.5}
    lines = [json.dumps(training), json.dumps(last)]
    (tmp_path / "metrics.json").write_text("\n".join(lines) + "\n")
    result = read_result(job)
    assert (result.status, result.ap) == ("done", 30)
    last["bbox/AP"] = math.nan  # as Detectron2 writes it without detections
    lines = [json.dumps(training), json.dumps(last)]
    (tmp_path / "metrics.json").write_text("\n".join(lines) + "\n")
    result = read_result(job)
    assert (result.status, result.reason) == ("failed", "no detection on the test set")


def test_a_training_that_stops_short_is_no_result(listed, tmp_path, capsys):
    script, _ = write_script(listed, tmp_path, finish="")
    output = tmp_path / "out"
    main(["ablate", str(listed), "--script", script, "--output", str(output)])
    runs = {row["row"]: row for row in read_csv(output / "runs.csv")}
    assert (runs["linear"]["status"], runs["none"]["status"]) == ("done", "unfinished")
    assert runs["none"]["ap"] == ""
    capsys.readouterr()
    main(["ablate", str(listed), "--collate", "--output", str(output)])
    table = [line.split("|") for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert [line[1].strip() for line in table[2:]] == ["linear", "half", "none"]
    assert [line[6].strip() for line in table[2:]] == ["31.0", "failed", ""]


def test_a_clusters_divergence_is_read_from_the_log(listed, tmp_path):
    job = Job(read_rows(listed)[0], 1, tmp_path)
    assert read_result(job).status == "unfinished"
    (tmp_path / "log.txt").write_text("...\nFloatingPointError: Loss became NaN at iteration=3!\n")
    result = read_result(job)
    assert (result.status, result.reason) == (
        "failed",
        "FloatingPointError: Loss became NaN at iteration=3!",
    )


def test_mean_deviation_and_failure_rate(listed, tmp_path):
    ours = read_rows(listed)
    results = [
        Result("linear", 1, "done", ap=30.0, hours=2.0),
        Result("linear", 2, "done", ap=33.0, hours=4.0),
        Result("linear", 3, "failed", "why"),
        Result("half", 1, "unfinished"),
    ]
    linear, half, none = summarize(ours, results)
    assert (linear["ap"], linear["ap_std"]) == (31.5, pytest.approx(math.sqrt(4.5)))
    assert (linear["hours"], linear["failed"]) == (3, 1)
    assert linear["failure_rate"] == pytest.approx(1 / 3)
    assert half["ap"] is None and half["failure_rate"] is None and none["seeds"] == 0
    table = collate(ours, results, tmp_path, "title")
    assert "| 31.5 ± 2.1 |" in table and "| 1/3 " in table and "linear, seed 3: why" in table
