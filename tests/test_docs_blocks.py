"""Every block of README and docs does what it shows: Python runs, command lines parse."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed.run as torchrun
import yaml
from detectron2.engine import default_argument_parser

import megdet_cli
from megdet_d2 import load_config, model_zoo, read_config
from megdet_d2.ablation.reduced import reduce_rows
from megdet_d2.ablation.rows import read_rows
from tests.helpers.markdown import Block, blocks
from tests.helpers.paths import ROOT
from tests.helpers.processes import environment

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCKS = [block for page in PAGES for block in blocks(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
SHELL = [block for block in BLOCKS if block.language == "bash"]
# Blocks with a comment <!-- not run: reason --> above them: the page's name and the reason.
NOT_RUN: list[tuple[str, str]] = []
# Programs of command lines, and the variables that those use.
PROGRAMS = ("git", "make", "megdet", "pip", "pre-commit", "python", "sbatch", "srun", "torchrun")
VARIABLES = {"HOST0": "host0", "RANK": "1", "SLURM_JOB_ID": "1"}
RECORD = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""


def test_every_block_says_what_it_is():
    """A block that is neither code nor YAML is ``text``."""
    assert {block.language for block in BLOCKS} <= {"bash", "python", "text", "yaml"}
    assert len(PYTHON) >= 8 and len(SHELL) >= 12


def test_the_blocks_that_are_not_run():
    assert [(block.page.name, block.not_run) for block in BLOCKS if block.not_run] == NOT_RUN


def test_python_blocks_run(tmp_path_factory):
    """Each in a fresh process, as typed, in an empty folder; two at a time."""

    def run(block: Block) -> str:
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-W", "error::DeprecationWarning:__main__", "-"],
            input=block.code, env=environment(), cwd=tmp_path_factory.mktemp("block"),
            capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        return f"{block}: {result.stderr}" if result.returncode else ""

    with ThreadPoolExecutor(2) as pool:
        failed = list(filter(None, pool.map(run, [b for b in PYTHON if not b.not_run])))
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=str)
def test_yaml_blocks_are_yaml(block):
    content = yaml.safe_load(block.code)
    if isinstance(content, dict) and "ROWS" in content:  # its keys are those of a config
        opts = [str(w) for row in content["ROWS"].values() for pair in row.items() for w in pair]
        load_config(None, opts)


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_command_lines_parse(block, tmp_path, monkeypatch):
    """Bash expands the lines and calls programs that note their words; we parse those."""
    commands = expand(block.code, tmp_path)
    assert commands, "no command"
    monkeypatch.chdir(ROOT)
    for program, *words in commands:
        check(program, ["x" if word == "..." else word for word in words])


@pytest.mark.parametrize(
    "line",
    [
        "megdet ablate configs/ablations/table3 --seds 1",
        "megdet ablate configs/ablations/table4 --print",
        "megdet ablate configs/ablations/table3 --rows 99*",
        "megdet variance configs/Base-MegDet-R50-FPN.yaml MODEL.NOTHING 1",
        "python train_net.py --config-file configs/nothing.yaml",
        "python train_net.py --eval-onyl",
        "python train_net.py SOLVER.IMS_PER_BATCH many",
        "python benchmarks/norm.py --widht 3",
        "python benchmarks/nothing.py",
        "torchrun --nproc 2 --nothing 1 train_net.py",
        "torchrun --nproc-per-node 2 train_net.py MODEL.NOTHING 1",
        "torchrun -m megdet_cli train MODEL.NOTHING 1",
        "srun x torchrun x train_net.py --nothing",
        "make nothing",
        "pip install -e .[nothing]",
        "sbatch docs/launch/nothing.sbatch",
        "megdt report a",
        "make demo NO_SUCH_VARIABLE=1",
        "for x in a; do make demo",
    ],
)
def test_a_wrong_line_is_found(line, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, OSError, SystemExit, ValueError)):
        for program, *words in expand(line, tmp_path):
            check(program, words)


def expand(code: str, folder: Path) -> list[list[str]]:
    """Returns the words of every command that bash would run; runs none of them."""
    programs, record = folder / "bin", folder / "record"
    programs.mkdir()
    for name in PROGRAMS:
        (programs / name).write_text(RECORD)
        (programs / name).chmod(0o755)
    result = subprocess.run(
        # A placeholder <like this> would be a redirection.
        ["/bin/bash", "-c", "source() { :; }; cd() { :; }\n" + re.sub(r"<[\w ]+>", "x", code)],
        env={"PATH": str(programs), "RECORD": str(record), **VARIABLES},
        cwd=folder, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert not result.stderr, result.stderr  # also a program that is not in PROGRAMS
    return [json.loads(line) for line in record.read_text().splitlines()]


def check(program: str, words: list[str]) -> None:
    """Checks what can be known of a command without running it: flags, files, keys, targets."""
    if program == "megdet":
        check_megdet(words)
    elif program == "python":
        check_script(*words)
    elif program == "torchrun":
        args = torchrun.get_args_parser().parse_args(words)
        if args.module:
            assert args.training_script == "megdet_cli"
            check_megdet(args.training_script_args)
        else:
            check_script(args.training_script, *args.training_script_args)
    elif program == "srun" and "train_net.py" in words:
        check_script(*words[words.index("train_net.py") :])
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text()
        known = re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)
        variables = re.findall(r"^([A-Z_]+) \?= ", makefile, re.MULTILINE)
        assert words and {word for word in words if "=" not in word} <= set(known)
        assert {word.split("=")[0] for word in words if "=" in word} <= set(variables)
    elif program == "sbatch":
        assert (ROOT / words[-1]).is_file()
    elif program == "pip":
        extras = re.findall(r"^\.\[(.+)\]$", "\n".join(words), re.MULTILINE)
        extras = [extra for several in extras for extra in several.split(",")]
        pyproject = (ROOT / "pyproject.toml").read_text()
        assert all(f"\n{extra} = [" in pyproject for extra in extras)


def check_script(script: str, *words: str) -> None:
    if script == "train_net.py":
        args = default_argument_parser().parse_args(words)
        if args.config_file == "x":
            args.config_file = ""
        read_config(args)
        return
    source = (ROOT / script).read_text()
    for flag in [word for word in words if word.startswith("--")]:
        assert f'"{flag}"' in source, f"{script} has no {flag}"


def check_megdet(words: list[str]) -> None:
    args = megdet_cli.parse(words)
    if words[0] == "train":
        read_config(args)
    elif words[0] == "ablate":
        overrides = () if args.reduced else args.opts
        rows = read_rows(args.source, overrides, args.gpus_per_machine, args.rows)
        if args.reduced:
            reduce_rows(rows, args.cores, args.opts)
    elif words[0] == "variance":
        load_config(model_zoo.find(args.config), args.opts)
    elif words[0] == "ensemble":
        load_config(None, args.opts)
