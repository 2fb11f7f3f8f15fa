"""Compares squeeze-and-excitation with its equations; loads weights of plain ResNets."""

import pickle

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_backbone
from torch.nn import functional as F

from megdet_d2.modeling.fused_resnet import fuse_activations
from megdet_d2.modeling.senet import OPEN
from tests.helpers.models import THIN_R50, build, reduced_config
from tests.helpers.step import check_two_steps, with_gradient

SE = ["MODEL.BACKBONE.NAME", "build_se_resnet_fpn_backbone"]
RESNEXT = ["MODEL.RESNETS.NUM_GROUPS", 4, "MODEL.RESNETS.WIDTH_PER_GROUP", 4]


@pytest.mark.parametrize("resnet", [[], [*THIN_R50, *RESNEXT]], ids=["R18", "ResNeXt"])
def test_block_is_the_papers(resnet):
    bottom_up = build_backbone(
        reduced_config(*SE, *resnet, "MODEL.RESNETS.NORM", "BN")
    ).bottom_up.eval()
    block = bottom_up.res3[1]  # its shortcut is the identity
    *first, last = [block.conv1, block.conv2, *([block.conv3] if resnet else [])]
    gate = last.activation
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    assert gate.fc1.out_channels == block.out_channels // 16
    x = torch.rand(2, block.in_channels, 6, 5)
    u = x
    for conv in first:
        u = conv(u).relu()
    u = last.norm(F.conv2d(u, last.weight, padding=last.padding))
    z = u.mean(dim=(2, 3))  # Equation 2
    delta = (z @ gate.fc1.weight.flatten(1).T + gate.fc1.bias).relu()
    s = (delta @ gate.fc2.weight.flatten(1).T + gate.fc2.bias).sigmoid()  # Equation 3
    torch.testing.assert_close(block(x), (x + s[:, :, None, None] * u).relu())


def test_every_gate_starts_as_one_constant():
    block = build_backbone(reduced_config(*SE)).bottom_up.res4[0]
    u = torch.randn(2, block.out_channels, 3, 3)
    torch.testing.assert_close(block.conv2.activation(u), torch.tensor(OPEN).sigmoid() * u)


def test_weights_of_a_resnet_load_and_only_gates_are_missing(tmp_path):
    plain = build_backbone(reduced_config(*THIN_R50)).bottom_up
    for tensor in plain.state_dict().values():
        tensor.add_(1)  # otherwise batch norms would agree anyway
    weights = {name: tensor.numpy() for name, tensor in plain.state_dict().items()}
    content = {"model": weights, "__author__": "a test", "matching_heuristics": True}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content))

    ours = build(reduced_config(*SE, *THIN_R50))
    DetectionCheckpointer(ours).load(str(tmp_path / "R-50.pkl"))
    loaded = ours.backbone.bottom_up.state_dict()
    new = loaded.keys() - plain.state_dict().keys()
    assert len(new) == 16 * 4 and all(".conv3.activation.fc" in name for name in new)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_gates_of_frozen_stages_are_frozen():
    bottom_up = build(reduced_config(*SE, "MODEL.BACKBONE.FREEZE_AT", 2)).backbone.bottom_up
    gates = {n: p.requires_grad for n, p in bottom_up.named_parameters() if "activation" in n}
    assert len(gates) == 8 * 4
    assert all(trained == ("res2" not in name) for name, trained in gates.items())


def test_fusing_leaves_blocks_with_gates_alone():
    bottom_up = build_backbone(reduced_config(*SE)).bottom_up
    x = torch.randn(2, 3, 64, 64)
    expected = bottom_up(x)["res5"]
    assert fuse_activations(bottom_up) == 1, "the stem"
    torch.testing.assert_close(bottom_up(x)["res5"], expected)


@pytest.mark.parametrize("reduction", [0, 128])
def test_a_reduction_that_leaves_no_channel_is_refused(reduction):
    with pytest.raises(ValueError, match=f"MODEL.SE.REDUCTION is {reduction}; give 1 to 64"):
        build(reduced_config(*SE, "MODEL.SE.REDUCTION", reduction))


def test_trains_with_a_process_without_proposals(pool2):
    sums = check_two_steps(pool2, [*SE, *THIN_R50, *RESNEXT])
    assert with_gradient(sums, "activation.fc2")  # fc1 gets a gradient once fc2 is not zero
