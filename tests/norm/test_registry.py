"""Checks "CGBN" wherever Detectron2 takes the name of a norm, in every order of imports."""

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from detectron2.config import LazyCall, instantiate
from detectron2.layers import CycleBatchNormList, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.roi_heads import build_box_head, build_mask_head

import megdet_d2
from megdet_d2 import CrossGPUBatchNorm
from megdet_d2.norm import registry
from megdet_d2.norm.batch_norm import cgbn_layers
from megdet_d2.norm.configure import describe_norms
from megdet_d2.norm.retinanet import separate_retinanet_levels
from tests.helpers.models import THIN, retinanet_config, thin_config


def norms(module):
    return {type(m) for m in module.modules() if "Norm" in type(m).__name__}


@pytest.mark.parametrize("freeze_at, frozen", [(0, 0), (2, 11)])
def test_resnet_and_freeze_at(freeze_at, frozen):
    backbone = build_backbone(
        thin_config("MODEL.RESNETS.NORM", "CGBN", "MODEL.BACKBONE.FREEZE_AT", freeze_at)
    )
    assert len(cgbn_layers(backbone)) == 53 - frozen
    assert sum(isinstance(m, FrozenBatchNorm2d) for m in backbone.modules()) == frozen
    log = describe_norms(backbone, images_per_gpu=4)
    assert f"{53 - frozen} layers, each over 4 images" in log and f"{frozen} batch norms" in log


def test_fpn_and_heads():
    cfg = thin_config(
        "MODEL.FPN.NORM", "CGBN", "MODEL.ROI_BOX_HEAD.NORM", "CGBN",
        "MODEL.ROI_MASK_HEAD.NORM", "CGBN", "MODEL.SEM_SEG_HEAD.NORM", "CGBN",
    )  # fmt: skip
    backbone = build_backbone(cfg)
    assert len(cgbn_layers(backbone)) == 8  # lateral and output, four levels
    features = ShapeSpec(channels=16, height=7, width=7)
    assert len(cgbn_layers(build_box_head(cfg, features))) == 1
    assert len(cgbn_layers(build_mask_head(cfg, features))) == 1
    from detectron2.modeling.meta_arch import build_sem_seg_head

    assert cgbn_layers(build_sem_seg_head(cfg, backbone.output_shape()))


def test_optimizer_gives_norms_their_own_weight_decay():
    from detectron2.solver import build_optimizer

    cfg = thin_config("MODEL.RESNETS.NORM", "CGBN", "SOLVER.WEIGHT_DECAY_NORM", 0.125)
    model = build_backbone(cfg)
    decay = {
        id(p): group["weight_decay"]
        for group in build_optimizer(cfg, model).param_groups
        for p in group["params"]
    }
    assert all(decay[id(layer.weight)] == 0.125 for layer in cgbn_layers(model))


@pytest.mark.parametrize("norm", ["CGBN", CrossGPUBatchNorm])
def test_lazy_config_takes_the_name_or_the_class(norm):
    from detectron2.modeling.backbone import BasicStem

    stem = instantiate(LazyCall(BasicStem)(in_channels=3, out_channels=4, norm=norm))
    assert isinstance(stem.conv1.norm, CrossGPUBatchNorm)


def test_stock_names_still_work_and_a_wrong_one_lists_both():
    from detectron2.layers import get_norm

    assert get_norm("", 4) is None and get_norm(None, 4) is None
    assert isinstance(get_norm("FrozenBN", 4), FrozenBatchNorm2d)
    assert isinstance(get_norm("BN", 4), torch.nn.BatchNorm2d)
    assert get_norm(lambda c: c + 1, 4) == 5
    with pytest.raises(KeyError, match="'CGNB'.*megdet_d2 has CGBN; Detectron2 has BN, SyncBN"):
        get_norm("CGNB", 4)


def test_installing_again_does_not_wrap_twice():
    from detectron2.layers import get_norm

    registry.install()
    from detectron2.layers import get_norm as again

    assert again is get_norm and not hasattr(get_norm._megdet_stock, "_megdet_stock")


def retinanet(norm, device="cpu"):
    return build_model(retinanet_config(norm, device))


def test_retinanet_warns_of_shared_statistics_where_nobody_separates_them(caplog):
    retinanet("CGBN")
    assert "Shared BatchNorm" in caplog.text


def test_retinanets_levels_stay_on_the_models_device():
    with torch.device("meta"):
        model = retinanet("CGBN", "meta")
    separate_retinanet_levels(model.eval())
    assert {t.device.type for t in model.head.state_dict().values()} == {"meta"}
    assert not any(m.training for m in model.head.modules())


def test_retinanet_keeps_statistics_apart_by_level():
    stock, ours = retinanet("SyncBN"), separate_retinanet_levels(retinanet("CGBN"))
    assert ours.state_dict().keys() == stock.state_dict().keys()
    assert len(cgbn_layers(ours.head)) == 2 * 2 * 5
    levels = [torch.randn(2, 16, 8, 8) * (i + 1) for i in range(5)]
    ours.head(levels)
    variances = [layer.running_var.mean().item() for layer in ours.head.cls_subnet[1]]
    assert len(set(variances)) == 5
    assert separate_retinanet_levels(ours) is ours  # again: nothing left to do
    assert len(cgbn_layers(ours.head)) == 2 * 2 * 5


def test_separated_levels_keep_parameters_and_start_from_the_shared_statistics():
    cfg = retinanet_config("CGBN")
    cfg.merge_from_list(["MODEL.CGBN.ALGORITHM", "two_pass", "MODEL.CGBN.IGNORE_PADDING", True])
    model = build_model(cfg)
    shared = model.head.cls_subnet[1]
    shared.running_mean.fill_(3.0)
    parameters = dict(model.named_parameters())  # as an optimizer has them
    for _ in range(2):
        megdet_d2.configure_cgbn(model, cfg, images_per_gpu=2)
        now = dict(model.named_parameters())
        assert now.keys() == parameters.keys()
        assert all(now[name] is parameters[name] for name in now)
        levels = model.head.cls_subnet[1]
        assert len(levels) == 5 and all((level.running_mean == 3).all() for level in levels)
        assert levels[0].running_mean is not levels[1].running_mean
        assert [level.name for level in levels] == [f"head.cls_subnet.1.{i}" for i in range(5)]
        for level in levels:
            assert level.algorithm == "two_pass" and level.valid_region is not None


def test_the_trainer_separates_retinanets_levels():
    head = megdet_d2.Trainer.build_model(retinanet_config("CGBN")).head
    for subnet in (head.cls_subnet, head.bbox_subnet):
        assert isinstance(subnet[1], CycleBatchNormList) and len(cgbn_layers(subnet[1])) == 5


# --- imports, each in a fresh interpreter ---------------------------------------------------------

CHECK = """
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
import detectron2.modeling.backbone.fpn as fpn, detectron2.layers.batch_norm as home
cfg = get_cfg()
cfg.merge_from_list({thin} + ["MODEL.RESNETS.NORM", "CGBN", "MODEL.FPN.NORM", "CGBN"])
n = sum(type(m).__name__ == "CGBN" for m in build_backbone(cfg).modules())
assert n == 50, n  # 42 above FREEZE_AT 2 in the ResNet, 8 in the FPN
assert fpn.get_norm is home.get_norm
"""
ORDERS = {
    "plugin first": "import megdet_d2",
    "everything else first": "import detectron2.modeling, detectron2.projects; import megdet_d2",
    "norm alone first": "import megdet_d2.norm.registry; import detectron2.modeling",
    "twice": """
        import importlib, megdet_d2
        import megdet_d2
        importlib.reload(megdet_d2.norm.registry)
        importlib.reload(megdet_d2)
    """,
    "a project that bound the name": """
        import types, sys
        project = types.ModuleType("project"); sys.modules["project"] = project
        exec("from detectron2.layers import get_norm as make_norm", project.__dict__)
        import megdet_d2
        assert isinstance(project.make_norm("CGBN", 3), megdet_d2.CrossGPUBatchNorm)
    """,
    "by the environment": "import detectron2",
}


def test_every_order_of_imports():
    def run(order):
        code = textwrap.dedent(ORDERS[order]) + CHECK.format(thin=THIN)
        env = dict(os.environ, OMP_NUM_THREADS="1")
        if order == "by the environment":
            env["DETECTRON2_ENV_MODULE"] = "megdet_d2.env"
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env=env, capture_output=True, text=True, timeout=200,
        )  # fmt: skip

    with ThreadPoolExecutor(2) as threads:
        for order, result in zip(ORDERS, threads.map(run, ORDERS), strict=True):
            assert result.returncode == 0, f"{order}:\n{result.stderr}"
