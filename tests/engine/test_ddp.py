"""Tests DDP on CPU: the patch of Detectron2 that it needs, and gradients that it misses."""

import functools

import pytest
from detectron2.layers import FrozenBatchNorm2d

from tests.helpers.models import tiny_config
from tests.helpers.training import train


def test_the_ddp_patch_lasts_as_long_as_the_constructor():
    import detectron2.engine.defaults as defaults

    from megdet_d2.engine.ddp import ddp_without_device_ids

    stock = defaults.create_ddp_model
    with pytest.raises(RuntimeError), ddp_without_device_ids(tiny_config()):
        assert defaults.create_ddp_model.keywords == {"device_ids": None}
        raise RuntimeError
    assert defaults.create_ddp_model is stock
    gpu = tiny_config("MODEL.DEVICE", "cuda")
    with ddp_without_device_ids(gpu):
        assert defaults.create_ddp_model is stock


def leave_out(forward, part, trainer):
    """Makes the losses independent of a layer in the n-th forward of the training."""
    forwards = []

    def detach(module, inputs, output):
        forwards.append(1)
        if len(forwards) == forward:
            return tuple(each.detach() if i == part else each for i, each in enumerate(output))
        return output

    model = trainer.checkpointer.model
    for norm in (m for m in model.modules() if isinstance(m, FrozenBatchNorm2d)):
        norm.running_mean.fill_(0.01)  # as if weights had been loaded
    model.roi_heads.box_predictor.register_forward_hook(detach)


def error_of(rank, output, coco, overrides, forward, part):
    try:
        train(rank, output, coco, overrides, fault=functools.partial(leave_out, forward, part))
    except RuntimeError as error:
        return str(error)
    return None


TWO = ("MEGDET.ACCUMULATION_STEPS", 2)
FROZEN = ("MODEL.BACKBONE.FREEZE_AT", 3, "MODEL.RESNETS.NORM", "FrozenBN")


@pytest.mark.parametrize(
    "overrides, forward, part, layer, iteration",
    [((), 2, 0, "cls_score", 1), (FROZEN, 1, 1, "bbox_pred", 0), (TWO, 4, 0, "cls_score", 1)],
    ids=["plain", "beside frozen ones", "in the last micro-batch alone"],
)
def test_a_gradient_that_ddp_misses_is_named_on_its_rank(
    pool2, coco, tmp_path, overrides, forward, part, layer, iteration
):
    """Here on both ranks, so that none waits. Of one rank alone: test_killed.py."""
    replies = pool2.run(error_of, str(tmp_path), coco, overrides, forward, part, timeout=120)
    for rank, message in enumerate(replies):
        name = f"roi_heads.box_predictor.{layer}"
        assert message.startswith(
            f"Rank {rank} has no gradient for {name}.weight, {name}.bias in iteration {iteration}:"
        )
        assert message.count(".png") in (4, 8) and "add 0 times" in message


def test_a_micro_batch_before_the_last_may_leave_a_layer_out(pool2, coco, tmp_path):
    assert pool2.run(error_of, str(tmp_path), coco, TWO, 3, 0, timeout=120) == [None, None]


def test_one_process_may_leave_a_layer_out(coco, tmp_path):
    assert error_of(0, str(tmp_path), coco, (), 2, 0) is None
