"""Runs what `make gpu` runs, on a CPU with tiny shapes, and checks limits, files and resumption."""

import importlib.util
import json
import os
import subprocess
import sys
import time

import pytest

from tests.helpers.paths import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu.py"
# Made by `make older`: Python 3.12, torch 2.11 and Triton 3.6, as GPU machines have them.
OLDER = ROOT / ".nox" / "tests-torch-2-11"


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module  # a dataclass looks itself up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu"]


@pytest.fixture
def two_parts(gpu, monkeypatch, tmp_path):
    """Returns a function that runs two parts, of which the second fails as often as it is told."""
    runs = []

    def run_part(part, limit, output, log, dry):
        runs.append((part.name, round(limit)))
        output.write_text("{}")
        return "failed (1)" if part.name == "second" and len(runs) < 3 else "passed"

    parts = [gpu.Part("first", 30, ["first.py"]), gpu.Part("second", 20, ["second.py"])]
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "run_part", run_part)
    monkeypatch.setattr(gpu, "machine", lambda python: {})

    def main(*options):
        status = gpu.main(gpu.parse(["--output", str(tmp_path), "--date", "today", *options]))
        done, runs[:] = list(runs), runs if status else []
        return status, done

    return main


def test_the_limits_fit_into_eight_minutes_and_the_files_into_eight(gpu):
    assert sum(part.limit for part in gpu.PARTS) <= 60 * gpu.MINUTES
    # A result for each part, the run's own, and the log.
    assert len(gpu.PARTS) + 2 <= 8


def test_every_part_is_a_script_that_takes_an_output(gpu):
    for part in gpu.PARTS:
        script = ROOT / "benchmarks" / part.command[0]
        assert '"--output"' in script.read_text(), part
        for option in [*part.command[1:], *part.dry]:
            if option.startswith("--"):
                assert f'"{option}"' in script.read_text(), (part, option)


def test_a_part_that_has_passed_is_not_repeated(two_parts, tmp_path):
    status, runs = two_parts()
    assert status == 1 and runs == [("first", 30), ("second", 50)]
    status, runs = two_parts()
    assert status == 0 and runs[2:] == [("second", 20)]
    assert two_parts() == (0, [])
    assert two_parts("--parts", "first", "--force") == (0, [("first", 30)])
    state = json.loads((tmp_path / "gpu_run_today.json").read_text())
    assert [part["ended"] for part in state["parts"].values()] == ["passed", "passed"]


def test_a_part_ends_at_its_limit_with_its_processes(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "waits.py").write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "print('begun', flush=True)\n"
        "time.sleep(60)\n"
    )
    with open(tmp_path / "log", "a") as log:
        part = gpu.Part("waits", 5, ["waits.py"])
        assert gpu.run_part(part, 5, tmp_path / "out.json", log, True) == "stopped at 5 s"
    assert "begun" in (tmp_path / "log").read_text()
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):  # a killed process is there until it gets a core
        status = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], stdout=subprocess.PIPE)
        if status.stdout.strip() in (b"", b"Z", b"Zs"):
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} has not ended")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_dry_run_passes(tmp_path):
    older = (OLDER / ".ready").exists()
    python = str(OLDER / "bin" / "python") if older else sys.executable
    command = [python, str(SCRIPT), "--dry-run", "--output", str(tmp_path), "--date", "today"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, "--patience", "8"], env=env, capture_output=True, text=True, timeout=1400
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    files = sorted(path.name for path in tmp_path.iterdir())
    names = ["exactness", "kernels", "layer", "memory", "run", "tests", "train_step"]
    assert files == [*(f"dry_{name}_today.json" for name in names), "gpu.log"]
    results = {
        name: json.loads((tmp_path / f"dry_{name}_today.json").read_text()) for name in names
    }
    outcomes = [row["outcome"] for row in results["tests"]["rows"]]
    assert outcomes.count("passed") > 60 and "failed" not in outcomes
    assert all(part["ended"] == "passed" for part in results["run"]["parts"].values())
    assert all(results[name]["rows"] for name in names if name != "run")
    versions = results["run"]["machine"]["versions"]
    assert versions["torch"].startswith("2.11.") or not older
