"""Imports with a Detectron2 that lacks what the trainer or the models need, as before 0.6."""

import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.processes import environment

# Detectron2 itself is loaded before it loses the name, as one that never had it.
START = """
import detectron2.config, detectron2.engine, detectron2.layers, detectron2.modeling
del detectron2.{module}.{name}
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", UserWarning)
    import megdet_d2
print([str(w.message) for w in caught if "megdet_d2" in str(w.message)])
"""
NORM = """
import torch
from detectron2.modeling import build_model
cfg = detectron2.config.get_cfg()
megdet_d2.add_megdet_config(cfg)
cfg.MODEL.DEVICE, cfg.MODEL.RESNETS.NORM = "cpu", "CGBN"
cfg.MODEL.META_ARCHITECTURE = {architecture!r}
cfg.MODEL.RETINANET.NORM, cfg.MODEL.CGBN.IGNORE_PADDING = "CGBN", True
if {architecture!r} == "RetinaNet":
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
model = megdet_d2.configure_cgbn(build_model(cfg).train(), cfg, 1)
features = model.backbone(torch.randn(1, 3, 64, 64))
sum(feature.sum() for feature in features.values()).backward()
layers = [m for m in model.modules() if isinstance(m, megdet_d2.CrossGPUBatchNorm)]
print(len(layers), megdet_d2.revert_cgbn(megdet_d2.convert_cgbn(torch.nn.BatchNorm2d(3))))
for name in ("Trainer", "prepare_config", "scale_config"):
    try:
        getattr(megdet_d2, name)
    except ImportError as error:
        print(error)
print(hasattr(megdet_d2, "no_such_name"))
"""


def run(code):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment(), cwd=ROOT,
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines(), result.stderr


@pytest.mark.parametrize(
    "module, name, architecture, layers",
    [
        ("layers", "CycleBatchNormList", "RetinaNet", 42 + 8),  # before 0.6
        ("config", "LazyConfig", "GeneralizedRCNN", 42),  # before 0.5
    ],
)
def test_the_norm_alone_works_and_the_rest_names_the_version(module, name, architecture, layers):
    start = START.format(module=module, name=name)
    lines, log = run(start + NORM.format(architecture=architecture))
    warning, made, *errors, unknown = lines
    assert "registers its norm alone" in warning and name in warning and "0.6 or later" in warning
    assert made.startswith(f"{layers} BatchNorm2d(3")
    assert len(errors) == 3 and unknown == "False"
    for error, public in zip(errors, ("Trainer", "prepare_config", "scale_config"), strict=True):
        assert (
            error.startswith(f"megdet_d2.{public}: it needs Detectron2 0.6 or later")
            and name in error
        )
    assert ("share their running statistics" in log) == (architecture == "RetinaNet")


def test_another_missing_package_is_its_own_error():
    code = "import sys; sys.modules['fvcore.common.checkpoint'] = None\nimport megdet_d2"
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode != 0 and "registers its norm alone" not in result.stderr
