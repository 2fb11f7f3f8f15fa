"""Trains the appendix's backbones and heads together, in half precision and sublinear memory."""

import pytest

from megdet_d2.memory import STAGES
from tests.helpers.bitwise import compare_detectors
from tests.helpers.models import ATROUS
from tests.helpers.step import check_two_steps, with_gradient

TOGETHER = [
    "MODEL.ATROUS.BOTTOM_UP", "build_se_resnet_backbone", "MODEL.RESNETS.NUM_GROUPS", 4,
    "MODEL.RPN.HEAD_NAME", "LargeKernelRPNHead", "MODEL.LARGE_KERNEL.MID_CHANNELS", 8,
    "MODEL.LARGE_KERNEL.SIZE", 7, "MODEL.LARGE_KERNEL.NORM", "CGBN",
    "MODEL.ROI_BOX_HEAD.NAME", "MaxoutBoxHead", "MODEL.ROI_BOX_HEAD.NUM_CONV", 2,
]  # fmt: skip


def test_all_train_with_autocast_and_sublinear_memory(pool2):
    memory = ["MODEL.SUBLINEAR.ENABLED", True, "MODEL.SUBLINEAR.STAGES", STAGES]
    sums = check_two_steps(pool2, [*ATROUS, *TOGETHER, *memory], half=True)
    for part in ("activation.fc2", "top_block.p5", "rpn_head.conv", "conv2", "fc1.linear"):
        assert with_gradient(sums, part)


@pytest.mark.parametrize("box_head", ["MaxoutBoxHead", "LargeKernelBoxHead"])
def test_sublinear_memory_equals_the_plain_run(box_head):
    overrides = [
        *TOGETHER, "MODEL.BACKBONE.NAME", "build_atrous_resnet_fpn_backbone",
        "MODEL.RESNETS.RES5_DILATION", 2, "MODEL.RESNETS.OUT_FEATURES", ["res3", "res5"],
        "MODEL.FPN.IN_FEATURES", ["res3", "res5"], "MODEL.ROI_HEADS.IN_FEATURES", ["p3", "p4"],
        "MODEL.ROI_BOX_HEAD.NAME", box_head,
    ]  # fmt: skip
    assert compare_detectors(0, overrides, STAGES) == ([], 0)
