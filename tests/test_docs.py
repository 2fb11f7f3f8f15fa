"""What README and docs name is there: functions, config keys, files, make's targets."""

import functools
import importlib
import re

import pytest
from detectron2.config import get_cfg

from megdet_d2 import add_megdet_config
from tests.helpers.paths import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SECTIONS = "MODEL|MEGDET|SOLVER|TEST|INPUT|DATASETS|DATALOADER"
FOLDERS = "configs|tests|benchmarks|docs|megdet_d2"
MODULES = "ablation|data|engine|ensemble|gradient_noise|modeling|norm|report|schedule"


def found(pattern, page):
    return sorted(set(re.findall(pattern, page.read_text())))


def resolve(name):
    """The object of a dotted name, a module or what is in one."""
    module, attributes = name, []
    while True:
        try:
            thing = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, attribute = module.rpartition(".")
            attributes.insert(0, attribute)
    return functools.reduce(getattr, attributes, thing)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_names_is_there(page):
    for name in found(r"(?<!ops\.)\bmegdet_d2(?:\.\w+)+", page):
        resolve(name)

    cfg = get_cfg()
    add_megdet_config(cfg)
    for key in found(rf"\b(?:{SECTIONS})(?:\.[A-Z][A-Z0-9_]+)+\b(?!\*)", page):
        functools.reduce(getattr, key.split("."), cfg)

    # A leaf of the text's own making has no folder below these: configs/c.yaml.
    files = found(rf"\b(?:{FOLDERS})/(?:[\w.-]+/)+[\w.-]+\.(?:py|yaml|md|sbatch|csv|json)\b", page)
    files += [f"megdet_d2/{name}" for name in found(rf"(?<!/)\b(?:{MODULES})/\w+\.py\b", page)]
    assert not [name for name in files if not (ROOT / name).is_file()]

    links = [link for link in found(r"\]\(([^)#]+)", page) if "://" not in link]
    assert not [link for link in links if not (page.parent / link).exists()]

    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(found(r"`make ([a-z-]+)", page)) <= targets
