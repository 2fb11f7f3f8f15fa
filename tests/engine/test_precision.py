"""bfloat16 without a scaler, with accumulation and the guard; float32's precision."""

import pytest
import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils.events import EventStorage
from torch import nn

import megdet_d2
from megdet_d2.engine.divergence import DivergenceError
from megdet_d2.engine.precision import build_inner_trainer, check_precision, set_float32_precision
from tests.helpers.training import train

BF16 = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16")


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))

    def forward(self, batch):
        y = self.layers(torch.stack(list(batch)))
        assert y.dtype == torch.bfloat16
        return {"a": y.float().square().mean()}


@pytest.mark.parametrize("steps", [1, 2])
def test_a_step_is_that_of_autocast_and_nothing_is_scaled(steps):
    batches = [list(torch.randn(4, 5).unbind()) for _ in range(steps)]
    model, expected = Regression(), Regression()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    cfg = megdet_d2.load_config(
        opts=[*map(str, BF16), "MEGDET.ACCUMULATION_STEPS", str(steps)],
    )
    stock = AMPTrainer(model, batches, optimizer)
    trainer = build_inner_trainer(stock, cfg)
    with EventStorage():
        trainer.iter = 0
        trainer.run_step()
    for batch in batches:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = expected(batch)["a"] / steps
        loss.backward()
    torch.optim.SGD(expected.parameters(), 0.1).step()
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)
    # Checkpoints are those of float32: a run may change its precision.
    plain = SimpleTrainer(expected, batches, torch.optim.SGD(expected.parameters(), 0.1))
    assert trainer.state_dict().keys() == plain.state_dict().keys()


def test_the_guard_sees_a_gradient_that_is_not_finite(coco, tmp_path):
    def fault(trainer):
        weight = trainer.model.roi_heads.box_predictor.cls_score.weight
        weight.register_hook(lambda grad: grad * float("nan") if trainer.iter == 1 else grad)

    with pytest.raises(DivergenceError, match="cls_score.weight is not finite"):
        train(0, str(tmp_path), coco, BF16, fault=fault)


def test_values_are_checked_and_set():
    def make(*opts):
        return megdet_d2.load_config(opts=["MODEL.DEVICE", "cpu", *opts])

    for opts, said in [
        (("SOLVER.AMP.PRECISION", "half"), "PRECISION is 'half'; use one of float16, bfloat16"),
        (("SOLVER.AMP.ENABLED", "True"), 'set SOLVER.AMP.PRECISION "bfloat16"'),
        (("FLOAT32_PRECISION", "tf32"), "FLOAT32_PRECISION is 'tf32'; use one of highest, high"),
    ]:
        with pytest.raises(ValueError, match=said):
            check_precision(make(*opts))
    check_precision(make("SOLVER.AMP.ENABLED", "True"), eval_only=True)
    before = torch.get_float32_matmul_precision()
    try:
        set_float32_precision(make())
        assert torch.get_float32_matmul_precision() == before
        set_float32_precision(make("FLOAT32_PRECISION", "high"))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
