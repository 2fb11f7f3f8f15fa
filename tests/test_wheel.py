"""A wheel is enough: built, installed into an empty folder, and used far from the checkout."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers.paths import CONFIGS, ROOT

CONFIG = "Digits-Detection/megdet_R18_FPN_b32_bn32.yaml"
# Four updates of a small detector on a few digits.
SMALL = [
    "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.ROI_BOX_HEAD.CONV_DIM", "16",
    "MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "20",
    "DATASETS.DIGITS.NUM_TRAIN", "16", "DATASETS.DIGITS.NUM_VAL", "4",
    "SOLVER.IMS_PER_BATCH", "8", "MEGDET.EPOCH_IMAGES", "16", "MEGDET.POLICY", "custom",
    "MEGDET.EPOCHS", "2.0", "MEGDET.DECAY_EPOCHS", "(1.0,)", "MEGDET.DECAY_FACTORS", "(0.1,)",
    "MEGDET.WARMUP_EPOCHS", "0.5", "TEST.EVAL_PERIOD", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Builds from a copy: setuptools leaves its files in the folder that it builds from."""
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "wheel"))
    for name in ("configs", "megdet_cli", "megdet_d2"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "-q", "--no-input", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", out, source]
    subprocess.run(build, check=True, timeout=120)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """Runs Python with the installed wheel, in an empty folder, without the checkout."""
    site, here = (tmp_path_factory.mktemp(name) for name in ("site", "here"))
    install = [sys.executable, "-m", "pip", "-q", "--no-input", "--disable-pip-version-check"]
    install += ["install", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run(install, check=True, timeout=120)

    def run(*words: str) -> str:
        env = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [sys.executable, "-W", "ignore", *words],
            cwd=here, env=env, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    run.here, run.site = here, site
    return run


def test_it_carries_both_packages_and_every_config(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("megdet_cli", "megdet_d2"):
        files = [p for p in (ROOT / package).rglob("*.py") if "__pycache__" not in p.parts]
        assert {str(path.relative_to(ROOT)) for path in files} <= names
    configs = {str(p.relative_to(ROOT)) for s in ("py", "yaml") for p in CONFIGS.rglob(f"*.{s}")}
    carried = {name.removeprefix("megdet_d2/") for name in names if "/configs/" in name}
    assert carried == configs
    assert "megdet_d2/py.typed" in names
    for path in (ROOT / "megdet_d2").rglob("*.csv"):
        assert str(path.relative_to(ROOT)) in names
    assert not [name for name in names if name.startswith(("tests", "configs", "benchmarks"))]


def test_its_configs_load(run):
    code = (
        "import megdet_d2\n"
        "cfg = megdet_d2.model_zoo.get_config('COCO-Detection/megdet_R50_FPN_b256_long.yaml')\n"
        "lazy = megdet_d2.model_zoo.get_config('LazyConfig/megdet_R50_FPN_b256_normal.py')\n"
        "print(megdet_d2.__file__)\n"
        "print(cfg.SOLVER.IMS_PER_BATCH, lazy.dataloader.train.total_batch_size)\n"
    )
    assert run("-c", code).split() == [f"{run.site}/megdet_d2/__init__.py", "256", "256"]


def test_a_table_by_its_name(run):
    """Launch lines train what the wheel carries, by ``megdet train``."""
    lines = run("-m", "megdet_cli", "ablate", "table3", "--print").splitlines()
    assert len(lines) == 20
    assert all(" -m megdet_cli train --config-file " in line for line in lines)
    config = Path(lines[0].split("--config-file ")[1].split()[0])
    assert config == Path(run.site, "megdet_d2/configs/ablations/table3/01_b16_base.yaml")
    assert "OUTPUT_DIR output/ablations/table3/01_b16_base/seed1" in lines[0]


def test_a_reduced_table_by_its_name(run):
    line = run("-m", "megdet_cli", "ablate", "table2", "--reduced", "--print", "--rows", "1*")
    assert f"{run.site}/megdet_d2/configs/ablations/Base-study.yaml" in line
    command = ["ablate", "table2", "--reduced", "--reduced-base", "ablations/Base-reduced.yaml"]
    line = run("-m", "megdet_cli", *command, "--print", "--rows", "1*")
    assert f"{run.site}/megdet_d2/configs/ablations/Base-reduced.yaml" in line


@pytest.mark.slow
def test_it_trains_evaluates_and_tabulates(run):
    pytest.importorskip("sklearn")
    train = ["-m", "megdet_cli", "train", "--dist-url", "auto", "--config-file", CONFIG]
    words = [*SMALL, "MODEL.CGBN.BN_SIZE", "8", "OUTPUT_DIR", "output/a"]
    run(*train, "--num-gpus", "2", *words)
    metrics = (run.here / "output/a/metrics.json").read_text().splitlines()
    last = json.loads(metrics[-1])
    assert last["iteration"] == 4 and "bbox/AP" in last
    run(*train, "--eval-only", "--resume", *words)

    table = ["-m", "megdet_cli", "ablate", "table2", "--reduced", "--rows", "1*", "--cores", "2"]
    run(*table, *SMALL)
    folder = run.here / "output/ablations/table2_reduced"
    assert "1_b16_frozen" in (folder / "results.csv").read_text()
    trained = folder / "1_b16_frozen/seed1"
    assert (trained / "model_final.pth").is_file(), (trained / "console.txt").read_text()
