"""Tests --ledger, by which a study goes on without the folders of its trainings."""

import csv
import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the plot needs the demo extra")

from megdet_d2.ablation.command import check_same
from megdet_d2.ablation.job import make_jobs
from megdet_d2.ablation.ledger import COLUMNS, Ledger, config_digest
from megdet_d2.ablation.results import Result
from megdet_d2.ablation.rows import read_rows
from megdet_d2.cli import main
from megdet_d2.engine.auto_micro_batch import with_micro_batch
from tests.helpers.paths import ROOT, TINY


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "pair.yaml"
    path.write_text(
        f"CONFIG: {TINY}\nROWS:\n  small: {{}}\n  large: {{SOLVER.IMS_PER_BATCH: 16}}\n"
    )
    return path


def finish(job, aps):
    """Writes the files of a finished training, with these APs at even steps."""
    job.folder.mkdir(parents=True)
    (job.folder / "config.yaml").write_text(job.row.cfg.dump())
    last = job.row.cfg.SOLVER.MAX_ITER
    lines = [{"iteration": last - 1, "total_loss": 1.0, "lr": 0.01, "training_time": 3.0,
              "images_seen": last * job.row.batch_size,
              "effective_batch_size": job.row.batch_size}]  # fmt: skip
    for i, ap in enumerate(aps, start=1):
        at = last * i // len(aps)
        lines.append({"iteration": at, "bbox/AP": ap, "bbox/AP50": ap, "bbox/AP75": ap})
    lines.sort(key=lambda line: line["iteration"])
    (job.folder / "metrics.json").write_text("".join(json.dumps(x) + "\n" for x in lines))


def table(source, output, ledger, *flags):
    argv = ["ablate", str(source), "--output", str(output), "--ledger", str(ledger), "--collate"]
    main([*argv, "--seeds", "1,2,3", *flags])
    with open(output / "results.csv", newline="") as file:
        return {line["row"]: line for line in csv.DictReader(file)}


def test_lines_stand_for_the_folders(source, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    output, ledger = tmp_path / "out", tmp_path / "ledger.csv"
    small, large = read_rows(source)
    for job in make_jobs([small, large], [1, 2, 3], output):
        finish(job, [10.0, 50.0 + job.seed + 0.1 * (job.row is large)])
    before = table(source, output, ledger, "--baseline", "small")
    assert float(before["large"]["gain"]) == pytest.approx(0.1)
    with open(ledger, newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["row"] for line in lines] == ["large"] * 3 + ["small"] * 3
    assert tuple(lines[0]) == COLUMNS and lines[0]["batch"] == "16" and lines[0]["failed"] == "0"
    assert lines[3]["ap_by_epoch"].endswith("51.00") and lines[3]["norm"] == "CGBN"

    shutil.rmtree(output)
    after = table(source, output, ledger, "--baseline", "small")
    assert after == before
    assert float(after["large"]["gain_p_equal"]) < 1e-3


def test_without_epochs_the_curve_is_over_iterations(source, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    output, ledger = tmp_path / "out", tmp_path / "ledger.csv"
    source.write_text(f'CONFIG: {TINY}\nROWS:\n  a: {{MEGDET.POLICY: "", SOLVER.MAX_ITER: 100}}\n')
    (job,) = make_jobs(read_rows(source), [1], output)
    finish(job, [10.0, 20.0])
    table(source, output, ledger)
    with open(ledger, newline="") as file:
        assert [line["ap_by_epoch"] for line in csv.DictReader(file)] == ["51:10.00 100:20.00"]


def test_what_has_a_line_is_not_trained(source, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    ledger, output = tmp_path / "ledger.csv", tmp_path / "out"
    for job in make_jobs(read_rows(source), [1], output):
        finish(job, [20.0, 30.0])
    table(source, output, ledger)
    shutil.rmtree(output)
    refusing = tmp_path / "train.py"
    refusing.write_text("raise SystemExit('trained again')")
    main(["ablate", str(source), "--output", str(output), "--ledger", str(ledger),
          "--script", str(refusing)])  # fmt: skip
    assert not list(output.glob("*/seed*"))


def test_a_line_of_another_config_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    ledger, output = tmp_path / "ledger.csv", tmp_path / "out"
    for job in make_jobs(read_rows(source), [1], output):
        finish(job, [20.0, 30.0])
    table(source, output, ledger)
    shutil.rmtree(output)
    with pytest.raises(SystemExit, match="small, seed 1, was trained with the config"):
        table(source, output, ledger, "MODEL.ROI_HEADS.POSITIVE_FRACTION", "0.5")


def test_another_file_is_refused(tmp_path):
    path = Path(tmp_path / "other.csv")
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has the columns"):
        Ledger(path)


def test_a_failure_is_replaced_by_a_training_that_is_done(source, tmp_path):
    job = make_jobs(read_rows(source), [1], tmp_path / "out")[0]
    ledger = Ledger(tmp_path / "ledger.csv")
    ledger.add(job, Result(job.row.name, 1, "failed", "diverged"))
    ledger.add(job, Result(job.row.name, 1, "unfinished"))
    assert Ledger(ledger.path).find(job).reason == "diverged"
    ledger.add(job, Result(job.row.name, 1, "done", ap=40.0))
    assert Ledger(ledger.path).find(job).ap == 40.0


def test_a_reason_has_no_folders_of_this_machine(source, tmp_path):
    job = make_jobs(read_rows(source)[:1], [1], tmp_path / "out")[0]
    reason = "DivergenceError: loss 1.5/x; images: /home/me/data/1.png, /data/2.png. Lower x/y"
    ledger = Ledger(tmp_path / "ledger.csv")
    ledger.add(job, Result("small", 1, "failed", reason))
    written = "DivergenceError: loss 1.5/x; images: 1.png, 2.png. Lower x/y"
    assert Ledger(ledger.path).find(job).reason == written


def test_a_digest_is_of_what_changes_the_result(source):
    small, large = read_rows(source)
    same = read_rows(source, ["OUTPUT_DIR", "elsewhere", "SEED", "7"])[0]
    assert config_digest(small) == config_digest(same) != config_digest(large)


@pytest.mark.parametrize(
    "keys", [(), ("MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN"), ("MODEL.FPN.NORM", "SyncBN")]
)
def test_other_batch_statistics_are_another_training(source, tmp_path, keys):
    """Micro-batches decide them where no key does, and seeds of both were once one row."""
    keys = ("MODEL.CGBN.BN_SIZE", "-1", *keys)
    whole = read_rows(source, keys)[0]
    split = read_rows(source, (*keys, "MEGDET.ACCUMULATION_STEPS", "2"))[0]
    assert config_digest(whole) != config_digest(split)
    finish(make_jobs([whole], [1], tmp_path)[0], [20.0])
    check_same([whole], tmp_path)
    with pytest.raises(ValueError, match="batch statistics over .* small now has"):
        check_same([split], tmp_path)


def test_given_or_frozen_statistics_leave_micro_batches_free(source):
    frozen = ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "", "MODEL.ROI_BOX_HEAD.NORM", "")
    for keys in (("MODEL.CGBN.BN_SIZE", "4", "MEGDET.ABLATION.GPUS", "2"), frozen):
        whole, split = (
            read_rows(source, (*keys, "MEGDET.ACCUMULATION_STEPS", steps), patterns="small")[0]
            for steps in ("1", "2")
        )
        assert config_digest(whole) == config_digest(split)


def test_a_line_of_another_seed_and_config_ends_before_a_training(source, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    old = read_rows(source, ["MEGDET.WARMUP_EPOCHS", "0.0"])[0]
    ledger = Ledger(tmp_path / "ledger.csv")
    ledger.add(make_jobs([old], [5], tmp_path)[0], Result("small", 5, "done", ap=1.0))
    command = ["ablate", str(source), "--seeds", "1", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="small, seed 5, was trained with the config"):
        main([*command, "--ledger", str(ledger.path)])
    assert not (tmp_path / "out").exists()


def test_what_the_memory_chose_is_not_a_change(source, tmp_path):
    keys = ("MEGDET.AUTO_MICRO_BATCH", "True", "MEGDET.AUTO_SUBLINEAR", "True")
    row = read_rows(source, (*keys, "MODEL.CGBN.BN_SIZE", "8", "MEGDET.MEMORY_LIMIT_MB", "4000"),
                    patterns="small")[0]  # fmt: skip
    job = make_jobs([row], [1], tmp_path)[0]
    job.folder.mkdir(parents=True)
    (job.folder / "config.yaml").write_text(with_micro_batch(row.cfg, 8, True).dump())
    check_same([row], tmp_path)


def test_an_error_that_says_nothing_of_the_row_is_no_result(source, tmp_path, monkeypatch, capsys):
    """A training whose data are missing once stood in the file as one that diverged."""
    monkeypatch.chdir(ROOT)
    ledger, output = tmp_path / "ledger.csv", tmp_path / "out"
    command = ["ablate", str(source), "--rows", "small", "--output", str(output)]
    command += ["--ledger", str(ledger), "MODEL.WEIGHTS", "nowhere.pth"]
    for _ in range(2):  # the second command trains it again
        with pytest.raises(SystemExit, match="1 of 1 trainings ended by an error .*nowhere"):
            main(command)
        assert "not counted:\n\n* small, seed 1: " in capsys.readouterr().out
    starts = (output / "small/seed1/console.txt").read_text().count("nowhere")
    assert starts >= 2 and not ledger.exists()
    with open(output / "results.csv", newline="") as file:
        assert [(r["seeds"], r["failed"]) for r in csv.DictReader(file)] == [("0", "0")]
