"""The megdet command: help without torch, without a warning, and the words that it takes."""

import argparse
import os
import pickle
import re
import subprocess
import sys

import pytest
from detectron2.engine import default_argument_parser

import megdet_cli
from megdet_cli.ensemble import IOU_THRESHOLDS
from megdet_d2.engine import command
from megdet_d2.ensemble import fusion
from tests.helpers.paths import ROOT

HEAVY = ("torch", "detectron2", "numpy", "megdet_d2")
HELP = f"""
import sys
import megdet_cli
try:
    megdet_cli.main(sys.argv[1:])
finally:
    found = set(sys.modules) & set({HEAVY})
    assert not found, found
"""


@pytest.mark.parametrize(
    "words",
    [["--help"], *([name, "--help"] for name in megdet_cli.COMMANDS)],
    ids=lambda words: words[0],
)
def test_help_imports_nothing_heavy_and_warns_of_nothing(words):
    result = subprocess.run(
        [sys.executable, "-c", HELP, *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: megdet ")


@pytest.mark.parametrize("words", [["repart", "x"], ["report"], ["ablate", "x", "--seeds", "a"]])
def test_a_mistyped_line_is_refused_as_fast(words):
    result = subprocess.run(
        [sys.executable, "-c", HELP, *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("usage: megdet ") and "error: " in result.stderr


@pytest.mark.parametrize("module", ["megdet_cli", "megdet_d2.cli"])
def test_the_command_runs_as_a_module(module):
    command = [sys.executable, "-m", module, "report", "nowhere"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("error: There is no nowhere/config.yaml; train first")
    if module == "megdet_cli":  # the other imports torch before it can ignore anything
        assert len(lines) == 1, result.stderr


def test_every_commands_help_begins_with_a_sentence():
    for name, module in megdet_cli.COMMANDS.items():
        assert module.__doc__.partition("\n")[0].endswith("."), name


def test_the_defaults_in_help_are_those_of_the_flags():
    checked = 0
    for name, module in megdet_cli.COMMANDS.items():
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        later = {**getattr(module, "BRANCH", {}), **getattr(module, "SIMULATED", {})}
        for action in parser._actions:
            said = re.search(r"\(default ([\d.,e]+)(?= s\)|[):,])", action.help or "")
            default = later.get(action.dest, action.default)
            if not said or default is None:  # None: it depends on other flags
                continue
            checked += 1
            values = default if isinstance(default, list) else [default]
            assert [float(n) for n in said[1].split(",")] == values, (name, action.dest)
    assert checked >= 25


def test_the_fusions_are_those_of_the_package():
    assert IOU_THRESHOLDS == fusion.IOU_THRESHOLDS


def test_train_has_the_flags_of_detectron2():
    stock = default_argument_parser().parse_args([])
    ours = megdet_cli.parse(["train"])
    for name in megdet_cli.train.FLAGS:
        assert getattr(ours, name) == getattr(stock, name)
        assert type(getattr(ours, name)) is type(getattr(stock, name))
    assert set(megdet_cli.train.FLAGS) == set(vars(stock)) - {"opts"}


def test_train_takes_overrides_anywhere(monkeypatch):
    seen = []
    monkeypatch.setattr(command, "run", seen.append)
    words = "train --config-file a.yaml MODEL.CGBN.BN_SIZE -1 --num-gpus 2 --resume SEED 1"
    megdet_cli.main(words.split())
    args = seen[0]
    assert (args.config_file, args.num_gpus, args.resume, args.eval_only) == (
        "a.yaml",
        2,
        True,
        False,
    )
    assert args.opts == ["MODEL.CGBN.BN_SIZE", "-1", "SEED", "1"]
    assert pickle.loads(pickle.dumps(args)) == args  # the launcher gives it to other processes


def test_an_error_of_a_training_has_its_traceback():
    with pytest.raises(FileNotFoundError, match="no config nothing.yaml"):
        megdet_cli.main(["train", "--config-file", "nothing.yaml"])


WARNS = """
import subprocess, sys, warnings
import megdet_cli
if len(sys.argv) > 1:
    megdet_cli._ignore_deprecations()
    subprocess.run([sys.executable, __file__], check=True)
warnings.warn("deprecated", FutureWarning)
warnings.warn("torch.meshgrid: in an upcoming release", UserWarning)
"""


@pytest.mark.parametrize("users_filter", ["", "error::FutureWarning"])
def test_deprecations_are_hidden_in_child_processes_too(users_filter, tmp_path):
    script = tmp_path / "warns.py"
    script.write_text(WARNS)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": users_filter}
    command = [sys.executable, str(script), "hide"]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    if users_filter:  # it comes before ours
        assert "FutureWarning: deprecated" in result.stderr and result.returncode == 1
    else:
        assert (result.returncode, result.stderr) == (0, "")
