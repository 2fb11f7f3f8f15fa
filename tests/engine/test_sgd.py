"""torch's implementations of SGD give stock Detectron2's weights, also after a resume."""

import copy

import pytest
import torch
from detectron2.solver import build_optimizer
from torch import nn

import megdet_d2
from megdet_d2.engine.sgd import check_sgd, set_sgd_implementation


def make(name, clip):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
    cfg = megdet_d2.load_config(
        opts=["SOLVER.WEIGHT_DECAY_NORM", "0.0", "SOLVER.CLIP_GRADIENTS.ENABLED", str(clip)]
    )
    optimizer = build_optimizer(cfg, model)
    set_sgd_implementation(optimizer, name)
    return model, optimizer


def step(model, optimizer, seed):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("name", ["for_loop", "foreach", "fused"])
def test_an_implementation_trains_as_stock_does_and_stays_after_a_resume(name, clip):
    (stock, stock_optimizer), (model, optimizer) = make("", clip), make(name, clip)
    for seed in range(3):
        step(stock, stock_optimizer, seed)
    model.load_state_dict(stock.state_dict())
    optimizer.load_state_dict(copy.deepcopy(stock_optimizer.state_dict()))
    for group in optimizer.param_groups:
        assert group["fused"] == (name == "fused") and group["foreach"] == (name == "foreach")
    for seed in range(3, 6):
        step(stock, stock_optimizer, seed)
        step(model, optimizer, seed)
    for a, b in zip(stock.parameters(), model.parameters(), strict=True):
        if name == "foreach":
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)


def test_what_cannot_be_is_refused():
    cfg = megdet_d2.load_config(opts=["MODEL.DEVICE", "cpu", "SOLVER.SGD_IMPLEMENTATION", "fast"])
    with pytest.raises(ValueError, match="SGD_IMPLEMENTATION is 'fast'; use one of for_loop"):
        check_sgd(cfg)
    cfg.MODEL.DEVICE, cfg.SOLVER.SGD_IMPLEMENTATION = "meta", "fused"
    with pytest.raises(ValueError, match="on meta"):
        check_sgd(cfg)
    with pytest.raises(ValueError, match="is a Adam; set SOLVER.SGD_IMPLEMENTATION"):
        set_sgd_implementation(torch.optim.Adam(nn.Linear(1, 1).parameters()), "fused")
