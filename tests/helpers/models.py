"""Builds small detectors, and the configs of small and of shipped ones."""

from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

import megdet_d2
from megdet_d2.memory import checkpoint_stages
from megdet_d2.modeling.fused_resnet import fuse_activations
from megdet_d2.norm.retinanet import separate_retinanet_levels
from tests.helpers.paths import CONFIGS, TINY

# Keys of stock Detectron2 that make its detectors thin.
THIN = [
    "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RESNETS.WIDTH_PER_GROUP", 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "MODEL.FPN.OUT_CHANNELS", 16,
    "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"],
    "MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3"],
    "MODEL.RPN.IN_FEATURES", ["p2", "p3"], "MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64]],
    "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_CONV", 1,
    "MODEL.ROI_BOX_HEAD.NUM_FC", 1, "MODEL.ROI_BOX_HEAD.FC_DIM", 8,
    "MODEL.ROI_BOX_HEAD.CONV_DIM", 8,
    "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead", "MODEL.ROI_MASK_HEAD.CONV_DIM", 8,
    "MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 8,
]  # fmt: skip
# Detectron2 dilates and groups only bottlenecks, so this is a thin ResNet-50.
THIN_R50 = [
    "MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.STEM_OUT_CHANNELS", 16,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 8,
]  # fmt: skip
ATROUS = [
    *THIN_R50, "MODEL.BACKBONE.NAME", "build_atrous_resnet_fpn_backbone",
    "MODEL.RESNETS.RES5_DILATION", 2, "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res5"],
    "MODEL.FPN.IN_FEATURES", ["res2", "res3", "res5"],
]  # fmt: skip
NORMS = [
    "MODEL.RESNETS.NORM", "MODEL.FPN.NORM", "MODEL.ROI_BOX_HEAD.NORM", "MODEL.ROI_MASK_HEAD.NORM"
]  # fmt: skip


def load_config(name: str) -> CfgNode:
    """Loads a config of the repository, such as ``ablations/Base-reduced``."""
    cfg = get_cfg()
    megdet_d2.add_megdet_config(cfg)
    cfg.merge_from_file(str(CONFIGS / f"{name}.yaml"))
    return cfg


def cpu_config(file: str | Path, *overrides) -> CfgNode:
    """Loads a config for a random model on CPU, then merges key, value, key, value, ..."""
    cfg = get_cfg()
    megdet_d2.add_megdet_config(cfg)
    cfg.merge_from_file(str(file))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.merge_from_list(list(overrides))
    return cfg


def tiny_config(*overrides) -> CfgNode:
    """Loads the config of a detector with CGBN that trains in seconds."""
    return cpu_config(TINY, *overrides)


def thin_config(*overrides) -> CfgNode:
    """Returns Detectron2's defaults, without CGBN, with thin layers and all parts of a detector."""
    cfg = get_cfg()
    megdet_d2.add_megdet_config(cfg)
    cfg.merge_from_list([*THIN, *overrides])
    return cfg


def retinanet_config(norm: str, device: str = "cpu") -> CfgNode:
    """Returns a thin RetinaNet's config, with ``norm`` in its head."""
    return thin_config(
        "MODEL.DEVICE", device,
        "MODEL.META_ARCHITECTURE", "RetinaNet",
        "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone",
        "MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"],
        "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"],
        "MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256], [512]],
        "MODEL.RETINANET.NORM", norm, "MODEL.RETINANET.NUM_CONVS", 2,
    )  # fmt: skip


def reduced_config(*overrides) -> CfgNode:
    """Loads the config of the ablations' reduced detector, made smaller."""
    cfg = cpu_config(CONFIGS / "ablations" / "Base-reduced.yaml")
    cfg.MODEL.FPN.OUT_CHANNELS = cfg.MODEL.ROI_BOX_HEAD.CONV_DIM = 16
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    cfg.merge_from_list(list(overrides))
    return cfg


def with_norm(norm: str) -> list[str]:
    """Returns overrides that set ``norm`` in the backbone and all heads."""
    return [item for key in NORMS for item in (key, norm)]


def build(cfg: CfgNode) -> torch.nn.Module:
    """Builds a detector for training, with the same weights in every process."""
    torch.manual_seed(0)
    model = separate_retinanet_levels(build_model(cfg)).train()
    if cfg.MODEL.CGBN.FUSE_ACTIVATION:
        assert fuse_activations(model) > 0
    if cfg.MODEL.SUBLINEAR.ENABLED:
        checkpoint_stages(model, cfg.MODEL.SUBLINEAR.STAGES)
    return model


def build_on_meta(cfg: CfgNode) -> torch.nn.Module:
    """Builds a model without memory for its parameters, for models of full size."""
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)
