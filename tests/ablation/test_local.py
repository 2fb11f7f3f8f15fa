"""Tests the trainings of an ablation on this machine: processes, signals, failures."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.ablation import read_csv, write_script

pytest.importorskip("matplotlib", reason="the plot needs the demo extra")

from megdet_d2.ablation import local
from megdet_d2.cli import main


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
    with pytest.raises(SystemExit, match="2 of 2 trainings ended by an error .* 1_b16_frozen"):
        main(command)
    runs = read_csv(output / "runs.csv")
    assert [(r["row"], r["status"], r["reason"]) for r in runs] == [
        ("1_b16_frozen", "error", f"met, {threads} threads"),
        ("5_b128_frozen_half_lr", "error", f"met, {threads} threads"),
    ]
    assert [r["processes"] for r in read_csv(output / "results.csv")] == ["1", "1"]


def test_a_training_that_was_told_to_stop_has_not_failed(listed, tmp_path):
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit(75)\n")
    output = tmp_path / "out"
    main(["ablate", str(listed), "--script", str(script), "--output", str(output)])
    assert {row["status"] for row in read_csv(output / "runs.csv")} == {"unfinished"}


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
