"""Tests that what an extra installs may be missing: the rest works, or says what to install."""

import subprocess
import sys

# All that the extras of pyproject.toml install, by the names of their modules.
OPTIONAL = (
    "ensemble_boxes", "hotcoco", "matplotlib", "mlflow", "mlxtend", "panopticapi", "scipy",
    "simplejpeg", "skimage", "sklearn", "timm", "wandb",
)  # fmt: skip
IMPORT_ALL = f"""
import pkgutil, sys
for name in {OPTIONAL}:
    sys.modules[name] = None  # its import fails
import megdet_cli, megdet_d2
for package in (megdet_d2, megdet_cli):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".", lambda name: 0):
        if module.name.endswith("__main__"):
            continue
        try:
            __import__(module.name)
        except ImportError as error:
            print(module.name, error)
"""


def run(*words):
    return subprocess.run([sys.executable, "-W", "ignore", *words], capture_output=True, text=True)


def test_every_module_without_the_extras():
    result = run("-c", IMPORT_ALL)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = result.stdout.splitlines()
    assert any("scipy" in line for line in lines)
    assert [line for line in lines if "pip install" not in line] == []


def test_a_command_without_its_extra_is_one_line():
    call = "from megdet_d2.cli import main; main(sys.argv[1:])"
    code = f"import sys; sys.modules['scipy'] = None; {call}"
    for words in (
        ["ablate", "configs/ablations/headline", "--print"],
        ["variance", "configs/ablations/headline/01_b8_bn8.yaml", "--branch", "--images", "8"],
    ):
        result = run("-c", code, *words)
        assert result.returncode == 1
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ") and 'scipy: run  pip install -e ".[demo]"' in last
