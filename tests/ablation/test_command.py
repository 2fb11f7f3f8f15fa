"""Tests megdet ablate: rows and their reduction, the trainings, the table of results."""

import csv
import fcntl
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from operator import attrgetter
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

pytest.importorskip("matplotlib", reason="the plot needs the demo extra")

from megdet_d2.ablation import local
from megdet_d2.ablation.job import Job
from megdet_d2.ablation.reduced import CARRIED, reduce_rows
from megdet_d2.ablation.results import Result, collate, read_result, summarize
from megdet_d2.ablation.rows import read_rows
from megdet_d2.cli import main

TABLE3 = "configs/ablations/table3"
# The mapping of docs/experiments.md on 2 cores: mini-batch, BN size, processes, micro-batches.
REDUCED = {
    "01_b16_base": (8, 0, 2, 1),
    "02_b2_bn2": (1, 1, 1, 1),
    "03_b4_bn4": (2, 2, 2, 1),
    "04_b8_bn8": (4, 4, 2, 1),
    "05_b16_bn2": (8, 1, 2, 4),
    "06_b16_bn16": (8, 8, 2, 1),
    "07_b32_bn32": (16, 16, 2, 1),
    "08_b64_bn64": (32, 32, 2, 1),
    "09_b64_bn32": (32, 16, 2, 1),
    "10_b64_bn16": (32, 8, 2, 2),
    "11_b128_bn32": (64, 16, 2, 2),
    "12_b128_bn16": (64, 8, 2, 4),
    "13_b256_bn32": (128, 16, 2, 4),
    "14_b256_bn16": (128, 8, 2, 8),
}


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    """Hides GPUs too, so that rows for 128 GPUs are not refused."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def listed(tmp_path):
    """Writes a YAML list of three rows of one config."""
    path = tmp_path / "rules.yaml"
    config = os.path.relpath(ROOT / TABLE3 / "14_b256_bn16.yaml", tmp_path)
    path.write_text(
        f"CONFIG: {config}\n"
        "ROWS:\n"
        "  linear: {}\n"
        "  half:\n"
        "    MEGDET.LR_FACTOR: 0.5\n"
        "    MEGDET.ABLATION.PAPER_AP: 36.0\n"
        "    MEGDET.ABLATION.PAPER_HOURS: null\n"
        "  none: {MEGDET.SCALING_RULE: none, MEGDET.ABLATION.PAPER_AP: null}\n"
    )
    return path


def test_a_folder_is_its_configs_in_order():
    names = [row.name for row in read_rows(TABLE3)]
    assert names == sorted(names) and len(names) == 20 and not any("Base" in n for n in names)


def test_a_list_overrides_one_config(listed):
    linear, half, none = read_rows(listed)
    assert linear.cfg.SOLVER.BASE_LR == pytest.approx(0.32) and linear.paper_ap == 37.1
    assert half.cfg.SOLVER.BASE_LR == pytest.approx(0.16) and half.paper_ap == 36.0
    assert none.cfg.SOLVER.BASE_LR == pytest.approx(0.02) and none.paper_ap is None
    assert (linear.batch_size, linear.bn_size, linear.processes) == (256, 16, 128)
    assert half.opts[:2] == ("MEGDET.LR_FACTOR", "0.5")


def test_overrides_of_the_command_line_come_last(listed):
    for row in read_rows(listed, ["MEGDET.LR_FACTOR", "2.0"]):
        assert row.cfg.MEGDET.LR_FACTOR == 2


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("- 1\n", "not a list of rows"),
        ("CONFIG: nothing.yaml\nROWS: {a: {}}\n", "row a of .* there is no config"),
        ("CONFIG: @\nROWS: {a: {}\n", "is not YAML"),
        ("CONFIG: @\nROWS: {a: {MEGDET.NO: 1}}\n", "row a of .*MEGDET.NO"),
        ("CONFIG: @\nROWS: {a: {MODEL.CGBN.BN_SIZE: 3}}\n", "row a of .*BN_SIZE is 3"),
        ("CONFIG: @\nROWS: {a: {MEGDET.ABLATION.GPUS: 3}}\n", "row a of .* share evenly"),
        ("CONFIG: @\nROWS: {}\n", "has no row"),
    ],
)
def test_a_row_that_cannot_be_trained_is_refused_by_name(tmp_path, text, match):
    path = tmp_path / "rows.yaml"
    path.write_text(text.replace("@", str(ROOT / TABLE3 / "06_b16_bn16.yaml")))
    with pytest.raises(ValueError, match=match):
        read_rows(path)


def test_an_empty_or_missing_source_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no row"):
        read_rows(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        read_rows(tmp_path / "nowhere")


def test_reduced_rows_keep_the_papers_ratios():
    full, reduced = read_rows(TABLE3), reduce_rows(read_rows(TABLE3), 2)
    long = {"15": "06", "16": "07", "17": "09", "18": "11", "19": "13", "20": "14"}
    expected = REDUCED | {
        row.name: next(v for k, v in REDUCED.items() if k.startswith(long[row.name[:2]]))
        for row in full[14:]
    }
    for a, b in zip(full, reduced, strict=True):
        steps = b.cfg.MEGDET.ACCUMULATION_STEPS
        assert (b.batch_size, b.bn_size, b.processes, steps) == expected[b.name]
        if a.bn_size:
            assert b.batch_size / b.bn_size == a.batch_size / a.bn_size  # groups
        k = [r.batch_size / r.cfg.MEGDET.REFERENCE_BATCH_SIZE for r in (a, b)]
        assert k[0] == k[1]
        assert b.cfg.SOLVER.WARMUP_FACTOR == a.cfg.SOLVER.WARMUP_FACTOR
        lr = [r.cfg.SOLVER.BASE_LR / r.cfg.MEGDET.REFERENCE_LR for r in (a, b)]
        assert lr[0] == pytest.approx(lr[1])
        # The decays are at the same fractions of the training, up to whole iterations.
        at = [[s / r.cfg.SOLVER.MAX_ITER for s in r.cfg.SOLVER.STEPS] for r in (a, b)]
        assert at[0] == pytest.approx(at[1], abs=0.02)
        assert b.images <= 4004 + 2548 * b.name.endswith("long")
        assert (b.paper_ap, b.paper_hours) == (a.paper_ap, a.paper_hours)
        assert b.cfg.DATASETS.TRAIN == ("megdet_digits_train",)


@pytest.mark.parametrize(
    "folder", ["table2", "bn_size", "warmup", "scaling", "algorithm", "placement"]
)
def test_reduced_rows_carry_all_that_the_rows_differ_in(folder):
    full = read_rows(f"configs/ablations/{folder}")
    for a, b in zip(full, reduce_rows(read_rows(f"configs/ablations/{folder}"), 4), strict=True):
        for key in CARRIED:
            assert attrgetter(key)(b.cfg) == attrgetter(key)(a.cfg), key
    distinct = {
        (row.batch_size, row.bn_size, *(str(attrgetter(key)(row.cfg)) for key in CARRIED))
        for row in reduce_rows(read_rows(f"configs/ablations/{folder}"), 4)
    }
    assert len(distinct) == len(full)


def test_more_cores_are_more_processes_a_group():
    def processes(cores):
        return [row.processes for row in reduce_rows(read_rows(TABLE3), cores)[:10]]

    assert processes(1) == [1] * 10
    assert processes(8) == [8, 1, 2, 4, 8, 8, 8, 8, 8, 8]


def test_a_size_that_cannot_be_halved_is_refused(tmp_path):
    (tmp_path / "odd.yaml").write_text(
        f'_BASE_: "{ROOT / TABLE3 / "06_b16_bn16.yaml"}"\n'
        "SOLVER: {IMS_PER_BATCH: 9}\nMODEL: {CGBN: {BN_SIZE: 9}}\nMEGDET: {ABLATION: {GPUS: 1}}\n"
    )
    with pytest.raises(ValueError, match="row odd: .*IMS_PER_BATCH is 9, and --reduced"):
        reduce_rows(read_rows(tmp_path), 2)


@pytest.mark.parametrize(
    ("folder", "match"),
    [
        ("challenge", "row 01_baseline: .*embedded data set: .* run it without --reduced"),
        ("ohem", "row ohem: MODEL.ROI_HEADS.NAME is OHEMROIHeads, and --reduced has Standard"),
    ],
)
def test_rows_that_would_all_be_the_base_are_not_reduced(folder, match, tmp_path):
    source = ROOT / "configs/ablations" / folder
    if folder == "ohem":
        source = tmp_path
        base = ROOT / TABLE3 / "06_b16_bn16.yaml"
        heads = 'MODEL: {ROI_HEADS: {NAME: "OHEMROIHeads"}}'
        (source / "ohem.yaml").write_text(f'_BASE_: "{base}"\n{heads}\n')
    with pytest.raises(ValueError, match=match):
        reduce_rows(read_rows(source), 2)


def test_rows_that_differ_in_what_is_not_kept_are_not_reduced(tmp_path):
    """They would all become the same row, and the table would compare it with itself."""
    path = tmp_path / "rows.yaml"
    rows = "{a: {SOLVER.MOMENTUM: 0.9}, b: {SOLVER.MOMENTUM: 0.95}}"
    path.write_text(f"CONFIG: {ROOT / TABLE3 / '06_b16_bn16.yaml'}\nROWS: {rows}\n")
    with pytest.raises(ValueError, match="row a has SOLVER.MOMENTUM 0.9, row b has 0.95, and --re"):
        reduce_rows(read_rows(path), 2)


def test_a_group_may_span_machines(tmp_path):
    path = tmp_path / "rows.yaml"
    rows = "{a: {MODEL.CGBN.BN_SIZE: 32, MODEL.CGBN.CROSS_MACHINE: true}}"
    path.write_text(f"CONFIG: {ROOT / TABLE3 / '14_b256_bn16.yaml'}\nROWS: {rows}\n")
    assert read_rows(path)[0].bn_size == 32
    path.write_text(path.read_text().replace("true", "false"))
    with pytest.raises(ValueError, match="row a of .*BN_SIZE is 32"):
        read_rows(path)


def test_launch_lines_are_torchruns(listed, capsys):
    main(["ablate", str(listed), "--print", "--seeds", "1,2", "--output", "out", "SEED", "7"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    words = shlex.split(lines[1])
    assert words[0] == "torchrun" and "--rdzv-endpoint" in words
    assert words[words.index("--nnodes") + 1] == "16"
    assert words[words.index("--nproc-per-node") + 1] == "8"
    assert words[words.index("MEGDET.LR_FACTOR") + 1] == "0.5"
    # Each training has its own seed and folder, even if an override has another seed.
    tail = [shlex.split(line)[-4:] for line in lines]
    assert tail[1] == ["SEED", "1", "OUTPUT_DIR", "out/half/seed1"]
    assert tail[4] == ["SEED", "2", "OUTPUT_DIR", "out/half/seed2"]


def test_one_machine_needs_no_rendezvous(capsys):
    main(["ablate", TABLE3, "--print", "--gpus-per-machine", "4", "--rows", "0[12]*"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("torchrun --standalone --nproc-per-node 2 train_net.py")
    assert lines[0].startswith("torchrun --nnodes 2 --rdzv-backend c10d")
    assert "--rdzv-id 01_b16_base-seed1" in lines[0]


def test_groups_have_to_fit_into_the_machines_at_hand():
    """A BN size of 16 with 2 images per GPU needs 8 GPUs, and the machines have 4."""
    with pytest.raises(SystemExit, match="row 06_b16_bn16 .*no equal groups of the 4 processes"):
        main(["ablate", TABLE3, "--print", "--gpus-per-machine", "4", "--rows", "06*"])


def test_submitting_fills_in_the_schedulers_command(listed, tmp_path):
    log = tmp_path / "submitted"
    command = f"echo {{machines}} {{gpus}} {{name}} {{line}} >> {log}"
    main(["ablate", str(listed), "--submit", command, "--output", str(tmp_path / "out")])
    lines = log.read_text().splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["16", "8", f"{name}-seed1"] for name in ("linear", "half", "none")
    ]
    assert all("torchrun --nnodes 16" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "a\nFloatingPointError: Loss became inf\n\nSIGTERM\n",
            "FloatingPointError: Loss became inf",
        ),
        ("x\ny.z.DivergenceError: rank 1\n", "DivergenceError: rank 1"),
        ("one\nValueError: two\n\n", "ValueError: two"),
        (  # an error before the last start does not count
            "DivergenceError: loss is nan\nStarting training from iteration 20\nOut of memory\n",
            "Out of memory",
        ),
        ("", "it printed nothing"),
    ],
)
def test_failure_reason(text, reason):
    assert local.failure_reason(text) == reason


# Replaces a training: it writes the files that Detectron2 writes.
SCRIPT = """
import json, os, shutil, sys
args = sys.argv[1:]
value = lambda key: args[args.index(key) + 1]
folder = value("OUTPUT_DIR")
with open("{log}", "a") as log:
    log.write(folder + "\\n")
os.makedirs(folder, exist_ok=True)
shutil.copy("{config}." + os.path.basename(os.path.dirname(folder)), folder + "/config.yaml")
with open(folder + "/log.txt", "a") as file:
    file.write("Starting training from iteration 0\\n")
    if "half" in folder:
        file.write("FloatingPointError: Loss became infinite or NaN\\n")
if "half" in folder:
    sys.exit("FloatingPointError: Loss became infinite or NaN")
end = 5070
rows = [{{"iteration": end - 1, "total_loss": 1.0, "lr": 0.1, "time": 0.5}}]
if "linear" in folder or "{finish}":
    ap = 30.0 + float(value("SEED"))
    rows.append({{"iteration": end, "bbox/AP": ap, "bbox/AP50": 50.0, "bbox/AP75": 40.0}})
with open(folder + "/metrics.json", "w") as file:
    file.writelines(json.dumps(row) + "\\n" for row in rows)
"""


def write_script(listed, tmp_path, finish="yes", overrides=()):
    script, log, config = (tmp_path / name for name in ("train.py", "log", "config.yaml"))
    for row in read_rows(listed, overrides):
        Path(f"{config}.{row.name}").write_text(row.cfg.dump())
    script.write_text(SCRIPT.format(log=log, config=config, finish=finish))
    log.touch()
    return str(script), log


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


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


def test_a_folder_that_another_process_trains_in_is_left_to_it(listed, tmp_path, capfd):
    """A training may outlive the command that started it."""
    script, log = write_script(listed, tmp_path)
    busy = tmp_path / "out/half/seed1"
    busy.mkdir(parents=True)
    with open(busy / "console.txt", "w") as console:
        fcntl.flock(console, fcntl.LOCK_EX)
        main(["ablate", str(listed), "--script", script, "--output", str(tmp_path / "out")])
    assert [Path(line).parent.name for line in log.read_text().splitlines()] == ["linear", "none"]
    assert f"{busy}: another process trains it" in capfd.readouterr().err


def test_several_trainings_at_a_time(tmp_path, monkeypatch):
    """Each of the two trainings waits for the other one, so both must run at the same time."""
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys, time\n"
        "args = sys.argv[1:]\n"
        "folder = args[args.index('OUTPUT_DIR') + 1]\n"
        f"meet = {str(tmp_path / 'meet')!r}\n"
        "os.makedirs(meet, exist_ok=True)\n"
        "open(os.path.join(meet, folder.replace(os.sep, '_')), 'w').close()\n"
        "end = time.monotonic() + 60\n"
        "while len(os.listdir(meet)) < 2 and time.monotonic() < end:\n"
        "    time.sleep(0.05)\n"
        "met = 'met' if len(os.listdir(meet)) == 2 else 'alone'\n"
        "sys.exit(f'{met}, {os.environ[\"OMP_NUM_THREADS\"]} threads')\n"
    )
    output = tmp_path / "out"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = max(1, os.cpu_count() // 2)
    command = ["ablate", "configs/ablations/table2", "--script", str(script), "--reduced"]
    command += ["--output", str(output), "--rows", "1_*,5_*", "--cores", "2", "--jobs", "2"]
    main(command)
    runs = read_csv(output / "runs.csv")
    assert [(r["row"], r["reason"]) for r in runs] == [
        ("1_b16_frozen", f"met, {threads} threads"),
        ("5_b128_frozen_half_lr", f"met, {threads} threads"),
    ]
    assert [r["processes"] for r in read_csv(output / "results.csv")] == ["1", "1"]


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
    assert read_result(job).reason == "torch.OutOfMemoryError: CUDA out of memory"
    (tmp_path / "failure.json").write_text("")  # as a full disk leaves it
    assert "failure.json cannot be read" in read_result(job).reason
    (tmp_path / "failure.json").write_text('{"reason": "no GPU"}')
    assert read_result(job).reason == "no GPU"
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


def test_the_documented_slurm_line_starts_every_machine(listed, tmp_path, monkeypatch):
    """The sbatch of this test runs its script here, and the srun runs it once per machine."""
    text = (ROOT / "docs/experiments.md").read_text()
    template = text.partition("--submit '")[2].partition("'\n")[0].replace("\\\n", "")
    log = tmp_path / "log"
    scripts = {
        "sbatch": 'echo "$1 $2" >> $LOG; while [ "$1" != --wrap ]; do shift; done; sh -c "$2"',
        "srun": '"$@"; "$@"',
        "hostname": "echo first",
        "torchrun": 'printf "%s|" "$@" >> $LOG; echo >> $LOG',
    }
    for name, script in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(log))
    command = ["ablate", str(listed), "--rows", "half", "--output", str(tmp_path / "an out")]
    main([*command, "--submit", template])
    job, *lines = log.read_text().splitlines()
    assert job == "--nodes 16" and len(lines) == 2 and lines[0] == lines[1]
    words = lines[0].split("|")
    assert words[words.index("--rdzv-endpoint") + 1] == "first:29500"
    assert words[words.index("MEGDET.LR_FACTOR") + 1] == "0.5"
    assert words[words.index("OUTPUT_DIR") + 1] == f"{tmp_path}/an out/half/seed1"


@pytest.mark.parametrize("rows", ["", "[a, b]", "{a: half}"])
def test_a_list_that_names_no_keys_is_refused(rows, tmp_path):
    path = tmp_path / "rows.yaml"
    path.write_text(f"CONFIG: x.yaml\nROWS: {rows}\n")
    with pytest.raises(ValueError, match=f"ROWS of {path} is .*; give a name to each row"):
        read_rows(path)


@pytest.mark.parametrize(
    ("command", "match"),
    [
        ("echo ${{HOME}} {nodes}", "KeyError.*it may contain {line}"),
        ("[ {name} != half-seed1 ]", "half-seed1: .* 1; submitted before it: linear-seed1"),
    ],
)
def test_a_submission_that_fails_is_one_line(command, match, listed, tmp_path):
    with pytest.raises(SystemExit, match=match):
        main(["ablate", str(listed), "--submit", command, "--output", str(tmp_path / "out")])


def test_what_failed_is_submitted_again_when_asked(listed, tmp_path):
    output, log = tmp_path / "out", tmp_path / "submitted"
    (output / "half/seed1").mkdir(parents=True)
    (output / "half/seed1/failure.json").write_text('{"reason": "diverged"}')
    command = ["ablate", str(listed), "--submit", f"echo {{name}} >> {log}"]
    main([*command, "--output", str(output)])
    assert log.read_text().split() == ["linear-seed1", "none-seed1"]
    main([*command, "--output", str(output), "--retry"])
    assert "half-seed1" in log.read_text()


def test_trainings_at_a_time_are_not_for_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(SystemExit, match="--jobs is 2; .* for CPUs"):
        main(["ablate", "configs/ablations/table2", "--jobs", "2", "MEGDET.ABLATION.GPUS", "1"])


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


def test_a_training_that_was_told_to_stop_has_not_failed(listed, tmp_path):
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit(75)\n")
    output = tmp_path / "out"
    main(["ablate", str(listed), "--script", str(script), "--output", str(output)])
    assert {row["status"] for row in read_csv(output / "runs.csv")} == {"unfinished"}


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


def test_a_closed_terminal_ends_the_trainings_unless_nohup_says_no():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler in (signal.SIG_DFL, signal.SIG_IGN):
            signal.signal(signal.SIGHUP, handler)
            with local._signals_exit():
                if handler is signal.SIG_DFL:
                    with pytest.raises(SystemExit):
                        os.kill(os.getpid(), signal.SIGHUP)
                        time.sleep(5)
                else:
                    os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_scheduler_that_stops_the_command_stops_its_training(listed, tmp_path):
    script = tmp_path / "sleep.py"
    script.write_text(
        f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "megdet_d2.cli", "ablate", str(listed)]
        + ["--script", str(script), "--output", str(tmp_path / "out")],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    pid_file = tmp_path / "pid"
    deadline = time.monotonic() + 120
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    child = int(pid_file.read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(60)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert not (tmp_path / "out/linear/seed1/failure.json").exists()


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
