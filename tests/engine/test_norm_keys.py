"""Tests what the log says of NORM keys: of Detectron2's models and of projects with other code."""

import re

import pytest
from detectron2.config import CfgNode
from detectron2.layers import get_norm
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from torch import nn

import megdet_d2
from megdet_d2.engine import Trainer, prepare_config
from megdet_d2.norm.batch_norm import cgbn_layers
from tests.helpers.training import config

NORM = "MODEL.OWN.NORM"


class Own(GeneralizedRCNN):
    """A detector with a tower of norms, which a subclass makes as its project does."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.tower = nn.Sequential(*[self.norm(cfg.MODEL.OWN.NORM) for _ in range(3)])

    def forward(self, batch):
        return super().forward(batch)


@META_ARCH_REGISTRY.register()
class ComparesNames(Own):
    """Makes norms as AdelaiDet's FCOS does, by a comparison of names."""

    def norm(self, name):
        kinds = {"GN": lambda: nn.GroupNorm(4, 8), "BN": lambda: nn.BatchNorm2d(8)}
        return kinds.get(name, nn.Identity)()


@META_ARCH_REGISTRY.register()
class HardCoded(Own):
    """Has its batch norms in its code, and does not look at the key's value."""

    def norm(self, name):
        return nn.BatchNorm2d(8)


@META_ARCH_REGISTRY.register()
class MakesStrings(Own):
    """Calls get_norm, with a string that it has made of the key's."""

    def norm(self, name):
        return get_norm(name.lower().upper(), 8)


@META_ARCH_REGISTRY.register()
class CallsGetNorm(Own):
    """Calls get_norm with a copy of the config, as Detectron2's code does with the config."""

    def __init__(self, cfg):
        super().__init__(cfg.clone())

    def norm(self, name):
        return get_norm(name, 8)


def messages(caplog, cfg, trainer=Trainer):
    prepare_config(cfg)
    caplog.clear()
    with caplog.at_level("INFO", "megdet_d2"):
        model = trainer(cfg).model
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("CGBN: ")]
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    return line, [w for w in warnings if "NORM" in w], model


def own_config(output, coco, architecture, norm, *overrides):
    cfg = config(output, coco)
    cfg.MODEL.OWN = CfgNode({"NORM": norm})
    cfg.merge_from_list(["MODEL.META_ARCHITECTURE", architecture, *overrides])
    return cfg


STOCK = {"MODEL.RESNETS.NORM": 53, "MODEL.FPN.NORM": 6, "MODEL.ROI_BOX_HEAD.NORM": 1}


def by_key(line):
    """Returns the numbers of layers in the line, by key."""
    found = re.search("layers made by key: ([^;]*)", line)
    return {key: int(n) for key, n in re.findall(r"([\w. ]+) (\d+)(?:, )?", found[1])}


def test_detectron2s_keys_and_the_layers_of_each(coco, tmp_path, caplog):
    frozen = ("MODEL.BACKBONE.FREEZE_AT", 2)
    cfg = config(tmp_path, coco, *frozen, "MODEL.ROI_MASK_HEAD.NORM", "CGBN")
    line, warnings, model = messages(caplog, cfg)
    assert by_key(line) == STOCK and "; this model does not read MODEL.ROI_MASK_HEAD.NORM" in line
    assert f"CGBN: {len(cgbn_layers(model))} layers" in line and "plain" not in line
    assert len(cgbn_layers(model)) < 60 and not warnings


NOT_MADE = f'{NORM} is "CGBN" and the model reads it, but makes no layer .*Set {NORM} "BN"'
PLAIN = "3 batch norms are plain BatchNorm2d.*: tower.0, tower.1, tower.2. No NORM key made them"


@pytest.mark.parametrize(
    "architecture, norm, own, plain, said",
    [
        ("ComparesNames", "CGBN", {NORM: 0}, 0, [NOT_MADE]),
        ("ComparesNames", "BN", {}, 3, []),
        ("ComparesNames", "GN", {}, 0, []),
        ("HardCoded", "GN", {}, 3, [PLAIN]),
        ("HardCoded", "CGBN", {NORM: 0}, 3, [NOT_MADE, PLAIN]),
        ("MakesStrings", "CGBN", {NORM: 0, "no known key": 3}, 0, []),
        ("CallsGetNorm", "CGBN", {NORM: 3}, 0, []),
        ("CallsGetNorm", "BN", {}, 3, []),
    ],
)
def test_a_project_that_makes_norms_by_itself(
    coco, tmp_path, caplog, architecture, norm, own, plain, said
):
    line, warnings, model = messages(caplog, own_config(tmp_path, coco, architecture, norm))
    assert by_key(line) == STOCK | own
    assert (f"{plain} are plain" in line) == (plain > 0)
    assert len(warnings) == len(said)
    for warning, pattern in zip(warnings, said, strict=True):
        assert re.search(pattern, warning) and "convert_cgbn" in warning


def test_converting_them_as_the_warning_says(coco, tmp_path, caplog):
    class Converting(Trainer):
        @classmethod
        def build_model(cls, cfg):
            return megdet_d2.convert_cgbn(super().build_model(cfg))

    cfg = own_config(tmp_path, coco, "ComparesNames", "BN", "MEGDET.ACCUMULATION_STEPS", 2)
    line, warnings, model = messages(caplog, cfg, Converting)
    assert "CGBN: 63 layers" in line and "plain" not in line and not warnings
    assert {layer.accumulation_steps for layer in cgbn_layers(model)} == {2}


def test_a_build_model_without_super_and_a_config_that_names_no_cgbn(coco, tmp_path, caplog):
    class Without(Trainer):
        @classmethod
        def build_model(cls, cfg):
            return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)

    cfg = own_config(tmp_path, coco, "HardCoded", "CGBN")
    line, warnings, _ = messages(caplog, cfg, Without)
    assert by_key(line) == STOCK | {NORM: 0} and len(warnings) == 2
    keys = ("MODEL.RESNETS.NORM", "MODEL.FPN.NORM", "MODEL.ROI_BOX_HEAD.NORM", NORM)
    cfg = own_config(tmp_path, coco, "HardCoded", "BN", *(word for k in keys for word in (k, "BN")))
    line, warnings, _ = messages(caplog, cfg)
    assert "no layer" in line and "by key" not in line and not warnings
