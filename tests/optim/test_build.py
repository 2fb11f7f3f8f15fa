"""Keys that fit no optimizer, learning rates of SGD, and the state of another optimizer."""

import logging

import pytest
import torch
from torch import nn

import megdet_d2
from megdet_d2.engine.switches import check_switches
from megdet_d2.optim.build import OPTIMIZERS, build_optimizer, check_optimizer, optimizer_name
from megdet_d2.optim.groups import default_groups, split_groups
from tests.helpers.optimizers import Detector, gradients, images, make

pytestmark = pytest.mark.timeout(120)  # the first import of timm reads a thousand files

CLIP = "SOLVER.CLIP_GRADIENTS"


def config(*keys):
    return megdet_d2.load_config(opts=[str(key) for key in ("MODEL.DEVICE", "cpu", *keys)])


@pytest.mark.parametrize(
    "keys, words",
    [
        (("adam",), "MEGDET.OPTIMIZER is 'adam'; use one of sgd, lars, lamb, muon, agvm"),
        (
            ("lars", "SOLVER.SGD_IMPLEMENTATION", "fused"),
            "SOLVER.SGD_IMPLEMENTATION is 'fused', but MEGDET.OPTIMIZER 'lars' is no SGD of torch; "
            'set SOLVER.SGD_IMPLEMENTATION ""',
        ),
        (("muon", "SOLVER.MOMENTUM", 1.0), "SOLVER.MOMENTUM is 1.0; give 0 to below 1"),
        (("agvm", "SOLVER.MOMENTUM", -0.1), "SOLVER.MOMENTUM is -0.1; give 0 to below 1"),
        (("sgd", "SOLVER.MOMENTUM", 9.0), "SOLVER.MOMENTUM is 9.0; give 0 to below 1"),
        (
            ("sgd", f"{CLIP}.ENABLED", True, f"{CLIP}.CLIP_VALUE", 0.0),
            "CLIP_VALUE is 0.0, which leaves no gradient; .*ENABLED False",
        ),
        (("lamb", "SOLVER.NESTEROV", True), "'lamb' has no such momentum; set SOLVER.NESTEROV Fa"),
        (
            ("lars", "SOLVER.NESTEROV", True, "SOLVER.MOMENTUM", 0.0),
            "SOLVER.MOMENTUM is 0.0, but .* with SOLVER.NESTEROV needs momentum; set SOLVER.MOM",
        ),
        (
            ("lars", "SOLVER.WEIGHT_DECAY_NORM", 1e-4),
            "SOLVER.WEIGHT_DECAY_NORM is 0.0001, but .* set SOLVER.WEIGHT_DECAY_NORM 0.0",
        ),
        (
            ("lamb", "SOLVER.WEIGHT_DECAY_BIAS", 1e-4),
            "SOLVER.WEIGHT_DECAY_BIAS is 0.0001, but MEGDET.OPTIMIZER 'lamb' decays no norm",
        ),
        (("lars", "MEGDET.LARS.TRUST_COEFFICIENT", 0.0), "TRUST_COEFFICIENT is 0.0; give above 0"),
        (("agvm", "MEGDET.AGVM.INTERVAL", 0), "MEGDET.AGVM.INTERVAL is 0; give 1 or more"),
        (("agvm", "MEGDET.AGVM.AFTER_WARMUP", -1), "AFTER_WARMUP is -1; give 0 or more"),
        (("agvm", "MEGDET.AGVM.SMOOTHING", 1.0), "SMOOTHING is 1.0; give 0 to below 1"),
    ],
)
def test_keys_that_cannot_be_are_refused(keys, words):
    cfg = config("MEGDET.OPTIMIZER", *keys)
    with pytest.raises(ValueError, match=words):
        check_switches(cfg)
    with pytest.raises(ValueError, match=words):
        build_optimizer(cfg, Detector())
    check_switches(cfg, eval_only=True)


@pytest.mark.parametrize(
    "keys, warned",
    [
        (("sgd",), ""),
        (("agvm",), ""),
        (("lars",), "SOLVER.BASE_LR 0.001 is the default"),
        (("lars", "SOLVER.BASE_LR", 2.0), ""),
        (("muon", "MEGDET.POLICY", "normal"), "MEGDET.REFERENCE_LR 0.02 is the default"),
        (("lamb", "MEGDET.POLICY", "normal", "MEGDET.REFERENCE_LR", 0.002), ""),
    ],
)
def test_a_learning_rate_of_sgd_is_named(keys, warned, caplog):
    with caplog.at_level(logging.WARNING, "megdet_d2"):
        check_optimizer(config("MEGDET.OPTIMIZER", *keys))
        build_optimizer(config("MEGDET.OPTIMIZER", *keys), Detector())
    assert len(caplog.records) == bool(warned)
    assert warned in caplog.text


def test_a_config_without_the_plugins_keys_has_stock_sgd():
    from detectron2.config import get_cfg

    assert type(build_optimizer(get_cfg(), nn.Linear(2, 2))) is torch.optim.SGD


@pytest.mark.parametrize("saved", OPTIMIZERS)
def test_the_state_of_another_optimizer_is_refused(saved):
    model, optimizer = make(saved)
    gradients(model, images(2))
    optimizer.step()
    state = optimizer.state_dict()
    for name in OPTIMIZERS:
        _, other = make(name)
        assert optimizer_name(other) == name
        if name == saved:
            other.load_state_dict(state)
            continue
        words = f"has the optimizer '{saved}', but MEGDET.OPTIMIZER is '{name}'. To resume, set "
        with pytest.raises(ValueError, match=words):
            other.load_state_dict(state)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("decay_bias", [None, 0.0])
def test_groups_have_detectron2s_learning_rates_and_decay(name, decay_bias):
    cfg = config("SOLVER.BIAS_LR_FACTOR", 2.0, "SOLVER.WEIGHT_DECAY", 0.01)
    cfg.SOLVER.WEIGHT_DECAY_BIAS, cfg.MEGDET.OPTIMIZER = decay_bias, name
    model = Detector()
    optimizer = build_optimizer(cfg, model)
    stock = {
        id(p): (group["lr"], group.get("weight_decay", 0.01))
        for group in default_groups(cfg, model)
        for p in group["params"]
    }
    found = {
        id(p): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    for p in model.parameters():
        lr, decay = stock[id(p)]
        none = name in ("lars", "lamb") and p.ndim < 2
        assert found[id(p)] == (lr, 0.0 if none else decay)
    assert len(found) == sum(len(g["params"]) for g in optimizer.param_groups) == len(stock)


def test_split_groups_keep_the_order():
    a, b, c = (torch.zeros(n) for n in (1, 2, 1))
    groups = [{"params": [a, b, c], "lr": 1.0, "x": 0}, {"params": [b], "lr": 2.0}]
    split = split_groups(groups, lambda p: {"x": len(p)})
    assert [(g["lr"], g["x"], [len(p) for p in g["params"]]) for g in split] == [
        (1.0, 1, [1, 1]),
        (1.0, 2, [2]),
        (2.0, 2, [2]),
    ]
    assert groups[0]["params"] == [a, b, c] and groups[0]["x"] == 0
