"""Tests megdet ablate from its words to the table of results."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ablation import TABLE3, read_csv, write_script
from tests.helpers.paths import ROOT

pytest.importorskip("matplotlib", reason="the plot needs the demo extra")

from megdet_d2.cli import main


def test_the_loop_trains_tabulates_and_goes_on_where_it_stopped(listed, tmp_path, capsys):
    script, log = write_script(listed, tmp_path)
    output = tmp_path / "out"
    command = ["ablate", str(listed), "--script", script, "--output", str(output)]
    main([*command, "--seeds", "1,2"])
    trained = log.read_text().splitlines()
    # The first seed of every row comes first, so that every row is in the table early.
    assert trained == [
        str(output / f"{row}/seed{seed}") for seed in (1, 2) for row in ("linear", "half", "none")
    ]
    linear, half, none = read_csv(output / "results.csv")
    assert float(linear["ap"]) == 31.5 and float(linear["ap_std"]) == pytest.approx(math.sqrt(0.5))
    assert float(linear["failure_rate"]) == 0 and linear["paper_ap"] == "37.1"
    assert (linear["ap50"], linear["ap75"]) == ("50.0", "40.0")
    assert float(linear["hours"]) == pytest.approx(5070 * 0.5 / 3600)
    assert float(linear["images_per_second"]) == pytest.approx(256 / 0.5)
    assert half["ap"] == "" and float(half["failure_rate"]) == 1 and half["paper_ap"] == "36.0"
    out = capsys.readouterr().out
    assert "31.5 ± 0.7" in out and "2/2" in out
    assert "half, seed 2: FloatingPointError: Loss became infinite or NaN" in out
    assert (output / "results.png").stat().st_size > 5_000
    assert out.split("\n\n")[0].strip() in (output / "results.md").read_text()

    # Finished and failed trainings are not repeated, unfinished ones are.
    (output / "none/seed1/metrics.json").unlink()
    main([*command, "--seeds", "1,2"])
    more = log.read_text().splitlines()[len(trained) :]
    names = [f"{Path(p).parent.name}/{Path(p).name}" for p in more]
    assert names == ["none/seed1"]
    main([*command, "--retry"])
    assert log.read_text().splitlines()[-1].endswith("half/seed1")
    assert len(log.read_text().splitlines()) == len(trained) + len(more) + 1


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--baseline", "9_b"], "--baseline is 9_b, and the rows are 1_b16_frozen, "),
        (["--rows", "9_*"], "--rows 9_.* matches none of 1_b16_frozen, "),
        (["--jobs", "2", "--cores", "4"], "--jobs is 2, and row 1_.* 8 processes, .*GPUS 2"),
        (["--jobs", "3", "--reduced", "--cores", "2"], "--jobs is 3"),
        (["--jobs", "0", "--reduced"], "--jobs is 0"),
        (["--gpus-per-machine", "0"], "--gpus-per-machine is 0"),
        (["--seeds", "1,1"], "--seeds is .*give different ones"),
        (["DATASETS.TEST", "()"], "row 1_b16_frozen of .*DATASETS.TEST is empty"),
    ],
)
def test_flags_that_cannot_be(words, match):
    with pytest.raises(SystemExit, match=match):
        main(["ablate", "configs/ablations/table2", *words])


def test_rows_for_more_gpus_than_there_are_do_not_fail_but_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    with pytest.raises(SystemExit, match="row 09_b64_bn32 is for 16 GPUs, and .* has 8: .*--rows"):
        main(["ablate", TABLE3, "--output", str(tmp_path / "out"), "--rows", "0[89]*"])


def test_trainings_at_a_time_are_not_for_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(SystemExit, match="--jobs is 2; .* for CPUs"):
        main(["ablate", "configs/ablations/table2", "--jobs", "2", "MEGDET.ABLATION.GPUS", "1"])


@pytest.mark.parametrize("words", [["--no-such-flag"], ["KEY"], ["KEY", "1", "--flag", "2"]])
def test_what_is_no_override_is_refused(words, capsys):
    with pytest.raises(SystemExit):
        main(["ablate", TABLE3, *words])
    assert "unrecognized arguments" in capsys.readouterr().err


def test_report_takes_no_overrides(capsys):
    with pytest.raises(SystemExit):
        main(["report", "somewhere", "--images", "3", "--KEY", "1"])
    assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_reduced_rows_train_for_real(tmp_path):
    """Of two rows with few images one finishes and one diverges; nothing is done twice."""
    folder = tmp_path / "rows"
    folder.mkdir()
    for name, extra in (("fine", ""), ("wild", "MEGDET: {LR_FACTOR: 1.0e+12}\n")):
        base = ROOT / TABLE3 / "06_b16_bn16.yaml"
        (folder / f"{name}.yaml").write_text(f'_BASE_: "{base}"\n{extra}')
    data = tmp_path / "data"
    (data / "megdet_digits").mkdir(parents=True)
    output = tmp_path / "out"
    command = [sys.executable, "-W", "ignore", "-m", "megdet_d2.cli", "ablate", str(folder)]
    command += ["--reduced", "--cores", "2", "--output", str(output)]
    command += ["MEGDET.EPOCH_IMAGES", "16", "DATASETS.DIGITS.NUM_TRAIN", "16"]
    command += ["DATASETS.DIGITS.NUM_VAL", "8", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]

    def run():
        env = {**os.environ, "DETECTRON2_DATASETS": str(data), "PYTHONPATH": str(ROOT)}
        result = subprocess.run(command, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
        return result.stdout

    out = run()
    fine, wild = read_csv(output / "runs.csv")
    assert fine["status"] == "done" and float(fine["ap"]) >= 0, fine
    assert float(fine["images_per_second"]) > 0
    assert wild["status"] == "failed" and "diverged" in wild["reason"], wild
    summary = read_csv(output / "results.csv")
    assert [(r["batch"], r["bn_size"], r["processes"]) for r in summary] == [("8", "8", "2")] * 2
    assert [r["iterations"] for r in summary] == ["22"] * 2 and "wild" in out
    assert (output / "fine/seed1/samples.csv").is_file()
    failure = json.loads((output / "wild/seed1/failure.json").read_text())
    assert failure["exit_code"] != 0
    before = (output / "fine/seed1/metrics.json").stat().st_mtime_ns
    run()
    assert (output / "fine/seed1/metrics.json").stat().st_mtime_ns == before
