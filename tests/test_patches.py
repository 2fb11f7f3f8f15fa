"""Checks that docs/architecture.md lists every patch and private name of other packages in use."""

import ast
import importlib
import re

import pytest

from tests.helpers.foreign_names import find_patches, find_private_names, own_attributes
from tests.helpers.paths import ROOT

PACKAGE = ROOT / "megdet_d2"
TREES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
OWN = own_attributes(TREES.values())
# Attributes of other packages that are set as those packages document it.
DOCUMENTED = {
    ("ablation/local.py", "total"),  # tqdm
    ("ensemble/evaluation.py", "dataset"),  # pycocotools
    ("_moved.py", "vars(module)"),  # a module of this package
}


def listed() -> list[set[tuple[str, str]]]:
    """Returns (file, name) of every row, one set per table of the page's section."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    section = page.split("\n## Patches and private names\n")[1].split("\n## ")[0]
    tables = re.findall(r"^\| Where .*\n\|[-|]+\n((?:\|.*\n)+)", section, re.MULTILINE)
    rows = [[re.split(r"(?<!\\)\|", line)[1:3] for line in table.splitlines()] for table in tables]
    return [
        {
            (where.strip(" `"), name)
            for where, names in table
            for name in re.findall("`(.+?)`", names)
        }
        for table in rows
    ]


def found() -> list[set[tuple[str, str]]]:
    patches, private = set(), set()
    for path, tree in TREES.items():
        where = str(path.relative_to(PACKAGE))
        module = where.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        namespace = vars(importlib.import_module(f"megdet_d2.{module}"))
        patches |= {(where, name) for name in find_patches(tree, namespace, OWN)}
        private |= {(where, name) for name in find_private_names(tree, namespace)}
    assert patches >= DOCUMENTED, f"DOCUMENTED here, not in the code: {DOCUMENTED - patches}"
    return [patches - DOCUMENTED, private]


def test_the_page_lists_what_is_in_the_code():
    for kind, in_code, in_page in zip(("patch", "private name"), found(), listed(), strict=True):
        missing, gone = sorted(in_code - in_page), sorted(in_page - in_code)
        assert not missing, f"docs/architecture.md: add rows for each {kind} of {missing}"
        assert not gone, f"docs/architecture.md: no {kind} is there any more, of {gone}"


SYNTHETIC = """
import os, torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer, defaults as d2
from detectron2.utils import comm
from torch.utils._pytree import tree_map
from torch.nn.modules.batchnorm import _BatchNorm

class Own:
    size = 0
    def __init__(self):
        self._kept = {}
    def forward(self, x):
        return x

class Mine(SimpleTrainer):
    def run_step(self):
        self._mine = next(self._data_loader_iter)
        self.after_train = None
    def _write_metrics(self):
        pass

def f(model, own, cfg, ctx):
%s
"""
PATCHES = {
    "d2.create_ddp_model = f": "create_ddp_model",
    "model.forward = f": "forward",
    "model.roi_heads[0].forward = f": "forward",
    "del model.forward": "forward",
    "model.a, model.b.forward = 1, f": "forward",
    "model.__class__ = Own": "__class__",
    "type(model).forward = f": "forward",
    "setattr(model, 'forward', f)": "forward",
    "setattr(model, name, f)": "setattr(model, name)",
    "object.__setattr__(model, name, f)": "object.__setattr__(model, name)",
    "vars(model)['forward'] = f": "vars(model)",
    "model.__dict__.update(forward=f)": "model.__dict__.update",
    "for model.forward in (f,): pass": "forward",
    "with f() as model.forward: pass": "forward",
}
PRIVATE = {
    "comm._LOCAL_PROCESS_GROUP": "_LOCAL_PROCESS_GROUP",
    "dist.distributed_c10d._resolve_process_group('')": "_resolve_process_group",
    "model._modules['x'] = own": "_modules",
    "model.layer._seed = 1": "_seed",
    "getattr(model, '_buffers')": "_buffers",
    "from detectron2.utils.comm import _get_global_gloo_group": "_get_global_gloo_group",
    "import torch._dynamo": "_dynamo",
    "TABLES = ('_hooks',)": "_hooks",
}
FINE = [
    "own.size = 3",
    "own._kept",
    "cfg.MODEL.DEVICE = 'cpu'",
    "ctx.group = 1",
    "f.cache = own",
    "os._exit(1)",
    "model.size",
    "len(model.__dict__)",
]
# By Mine, on self: a method of SimpleTrainer; what it calls and overrides; two imports.
ALWAYS_PATCHED = {"after_train"}
ALWAYS_PRIVATE = {"_data_loader_iter", "_write_metrics", "_pytree", "_BatchNorm"}


def search(line):
    source = SYNTHETIC % f"    {line}"
    tree, namespace = ast.parse(source), {"__name__": "megdet_d2.synthetic"}
    exec(compile(source, "synthetic", "exec"), namespace)
    patches = find_patches(tree, namespace, own_attributes([tree]))
    return patches, find_private_names(tree, namespace)


@pytest.mark.parametrize("line", PATCHES)
def test_a_patch_is_found(line):
    assert PATCHES[line] in search(line)[0] - ALWAYS_PATCHED


@pytest.mark.parametrize("line", PRIVATE)
def test_a_private_name_is_found(line):
    assert search(line)[1] == ALWAYS_PRIVATE | {PRIVATE[line]}


@pytest.mark.parametrize("line", FINE)
def test_what_is_ours_is_not_found(line):
    assert search(line) == (ALWAYS_PATCHED, ALWAYS_PRIVATE)
