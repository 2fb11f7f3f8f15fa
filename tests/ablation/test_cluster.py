"""Tests launch lines and their submission to a scheduler."""

import os
import shlex

import pytest

from megdet_d2.cli import main
from tests.helpers.ablation import TABLE3
from tests.helpers.paths import ROOT


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
    (output / "half/seed1/failure.json").write_text('{"reason": "DivergenceError: rank 1"}')
    command = ["ablate", str(listed), "--submit", f"echo {{name}} >> {log}"]
    main([*command, "--output", str(output)])
    assert log.read_text().split() == ["linear-seed1", "none-seed1"]
    main([*command, "--output", str(output), "--retry"])
    assert "half-seed1" in log.read_text()
