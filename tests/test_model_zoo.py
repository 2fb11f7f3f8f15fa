"""Configs by name, as Detectron2's model_zoo has its own."""

import inspect
import os
import shutil
import subprocess
import sys

import detectron2.model_zoo
import pytest
from detectron2.config import LazyConfig
from omegaconf import OmegaConf

import megdet_d2
from megdet_d2 import model_zoo
from megdet_d2.ablation.reduced import reduce_rows
from megdet_d2.ablation.rows import read_rows
from tests.helpers.paths import CONFIGS, ROOT

NAME = "COCO-Detection/megdet_R50_FPN_b16_normal.yaml"
LAZY = "LazyConfig/megdet_R50_FPN_b16_normal.py"


def test_a_config_by_its_name():
    assert model_zoo.get_config_file(NAME) == str(CONFIGS / NAME)
    assert model_zoo.get_config(NAME) == megdet_d2.load_config(CONFIGS / NAME)
    lazy = model_zoo.get_config(LAZY)
    assert OmegaConf.is_config(lazy)
    assert LazyConfig.to_py(lazy) == LazyConfig.to_py(LazyConfig.load(str(CONFIGS / LAZY)))


@pytest.mark.parametrize("function", ["get_config_file", "get_config"])
def test_the_functions_take_what_detectron2s_take(function):
    ours, stock = (getattr(zoo, function) for zoo in (model_zoo, detectron2.model_zoo))
    parameters = [
        [(p.name, p.default) for p in inspect.signature(f).parameters.values()]
        for f in (ours, stock)
    ]
    assert parameters[0] == parameters[1]


def test_errors_name_what_there_is():
    with pytest.raises(FileNotFoundError, match=f"no config .*b16_norml.yaml.* names are .*{NAME}"):
        model_zoo.get_config(NAME.replace("normal", "norml"))
    with pytest.raises(FileNotFoundError, match="All are below .*configs"):
        model_zoo.get_config_file("x")
    with pytest.raises(ValueError, match="no trained weights .* MODEL.WEIGHTS"):
        model_zoo.get_config(NAME, trained=True)


def test_a_path_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (NAME, f"configs/{NAME}"):
        assert model_zoo.find(name) == CONFIGS / NAME
    assert model_zoo.find("table3", folder="ablations") == CONFIGS / "ablations" / "table3"
    (tmp_path / "configs" / "COCO-Detection").mkdir(parents=True)
    own = tmp_path / "configs" / NAME
    own.touch()
    assert model_zoo.find(f"configs/{NAME}").resolve() == own
    for absent in ("table3", "x.yaml", "/x.yaml", str(ROOT / "nothing")):
        with pytest.raises(FileNotFoundError, match=f"no config {absent}, neither"):
            model_zoo.find(absent)


@pytest.mark.parametrize("name", ["table2", "ablations/table2", "configs/ablations/table2"])
def test_the_rows_of_a_table_by_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = read_rows(name)
    assert [row.config_file.parent for row in rows] == [CONFIGS / "ablations" / "table2"] * 5
    assert len(reduce_rows(rows, cores=2)) == 5


def test_a_copy_without_configs_imports_and_says_so(tmp_path):
    """Projects copy the package into their own tree."""
    shutil.copytree(ROOT / "megdet_d2", tmp_path / "megdet_d2")
    code = f"import megdet_d2\nmegdet_d2.model_zoo.get_config_file({NAME!r})"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert f"copy the folder configs to {tmp_path / 'configs'}" in result.stderr
