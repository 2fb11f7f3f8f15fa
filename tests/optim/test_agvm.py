"""AGVM: the maths against loops over float64 arrays, and the optimizer against SGD."""

import copy
import math

import numpy as np
import pytest
import torch
from detectron2.solver import build_optimizer as d2_build_optimizer

import megdet_d2
from megdet_d2.engine.sgd import set_sgd_implementation
from megdet_d2.optim.agvm import AGVM, ratios, relative_variances
from megdet_d2.optim.groups import module_of
from tests.helpers.optimizers import Detector, gradients, images, make, weights


def reference_variances(pairs):
    """1 - cos by loops."""
    flat = {}
    for module, a, b in pairs:
        left, right = flat.setdefault(module, ([], []))
        left += a.double().flatten().tolist()
        right += b.double().flatten().tolist()
    result = {}
    for module, (a, b) in flat.items():
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        result[module] = 1 - dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    return result


def test_the_variance_is_one_less_the_cosine():
    pairs = [(m, torch.randn(3, 4), torch.randn(3, 4)) for m in ("backbone", "fpn", "backbone")]
    modules, variances = relative_variances(pairs)
    expected = reference_variances(pairs)
    assert modules == ["backbone", "fpn"] and variances.dtype == torch.float64
    np.testing.assert_allclose(variances, [expected[m] for m in modules], 1e-6)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 65536.0])
def test_it_is_exact_for_gradients_that_hardly_differ_and_has_no_scale(scale):
    a = torch.randn(100_000)
    b = a + 1e-3 * torch.randn(100_000)
    expected = reference_variances([("backbone", a, b)])["backbone"]  # about 5e-7
    _, variances = relative_variances([("backbone", scale * a, 3 * scale * b)])
    assert variances.item() == pytest.approx(expected, rel=1e-3) and expected < 1e-6


def test_it_is_the_relative_variance_of_the_gradient():
    """Near sigma^2 / (n |G|^2) for halves of n images."""
    n, mean, sigma = 50, torch.randn(4000), 0.5
    halves = [(mean + sigma * torch.randn(n, 4000)).mean(0) for _ in range(2)]
    _, variances = relative_variances([("backbone", *halves)])
    expected = 4000 * sigma**2 / (n * mean.square().sum().item())
    assert variances.item() == pytest.approx(expected, rel=0.1)


def test_ratios_are_bounded_and_relative_to_the_backbone():
    found = ratios({"backbone": 0.2, "fpn": 0.8, "head": 1e-9, "mask": 0.1, "box": math.nan})
    assert found == {
        "backbone": 1.0,
        "fpn": math.sqrt(0.5),
        "head": math.sqrt(10),
        "mask": pytest.approx(math.sqrt(2), rel=1e-5),
    }
    assert ratios({"backbone": math.nan, "fpn": 0.3}) == {} == ratios({"fpn": 0.3})


def test_a_zero_gradient_has_no_variance():
    _, variances = relative_variances([("backbone", torch.zeros(3), torch.ones(3))])
    assert variances.isnan().all()


def test_factors_are_a_moving_average():
    _, optimizer = make("agvm", "MEGDET.AGVM.SMOOTHING", 0.9)
    optimizer.update_factors({"backbone": 0.2, "fpn": 0.1, "roi_heads.box": math.nan})
    optimizer.update_factors({"backbone": 0.2, "fpn": 0.05, "roi_heads.box": math.inf})
    first = 0.9 + 0.1 * math.sqrt(2)
    assert optimizer.factors == {
        "backbone": pytest.approx(1.0),
        "fpn": pytest.approx(0.9 * first + 0.1 * 2, rel=1e-5),
        "proposal_generator": 1.0,
        "roi_heads.box": 1.0,
    }
    optimizer.update_factors({"backbone": math.nan, "fpn": 0.05})
    assert optimizer.factors["fpn"] == pytest.approx(0.9 * first + 0.2, rel=1e-5)


NAMES = {
    "backbone.bottom_up.res2.0.conv1.weight": "backbone",
    "backbone.res4.0.conv1.weight": "backbone",
    "backbone.net.blocks.0.norm1.weight": "backbone",
    "backbone.fpn_lateral2.norm.weight": "fpn",
    "backbone.top_block.p6.weight": "fpn",
    "backbone.simfp_2.0.weight": "fpn",
    "proposal_generator.rpn_head.conv.weight": "proposal_generator",
    "roi_heads.box_head.0.fc1.weight": "roi_heads.box",
    "roi_heads.box_predictor.cls_score.weight": "roi_heads.box",
    "roi_heads.mask_head.mask_fcn1.weight": "roi_heads.mask",
    "roi_heads.res5.0.conv1.weight": "roi_heads.res5",
    "head.cls_subnet.0.weight": "head",
    "sem_seg_head.p2.0.weight": "sem_seg_head",
    "weight": "weight",
}


@pytest.mark.parametrize("name", NAMES)
def test_modules(name):
    assert module_of(name) == NAMES[name]


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("implementation", ["", "for_loop", "fused"])
def test_with_factors_of_one_it_is_sgd_to_the_bit(clip, implementation):
    keys = ("SOLVER.BASE_LR", 0.1, "SOLVER.NESTEROV", True, "SOLVER.BIAS_LR_FACTOR", 2.0,
            "SOLVER.WEIGHT_DECAY_BIAS", 0.003, "SOLVER.CLIP_GRADIENTS.ENABLED", clip)  # fmt: skip
    trained = []
    for name in ("sgd", "agvm"):
        model, optimizer = make(name, *keys)
        set_sgd_implementation(optimizer, implementation)
        for seed in range(3):
            gradients(model, images(4, seed))
            optimizer.step()
        trained.append(model.state_dict())
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_sgd_is_detectron2s():
    cfg = megdet_d2.load_config()
    model = Detector()
    ours, stock = megdet_d2.build_optimizer(cfg, model), d2_build_optimizer(cfg, model)
    assert type(ours) is type(stock) is torch.optim.SGD
    assert ours.state_dict() == stock.state_dict()


def test_a_step_has_the_effective_learning_rates_and_leaves_the_schedules():
    model, optimizer = make("agvm", "SOLVER.BASE_LR", 0.1, "SOLVER.WEIGHT_DECAY", 0.01)
    optimizer.smoothing = 0.0
    variances = {"backbone": 0.3, "fpn": 0.1, "proposal_generator": 0.9, "roi_heads.box": 0.2}
    optimizer.update_factors(variances)
    expected, momentum = weights(model), {}
    for t in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (t + 1)
        gradients(model, images(4, t))
        for name, p in model.named_parameters():
            is_norm = name.startswith("backbone.bottom_up.1")
            decay = 0.0 if is_norm else 0.01
            g = p.grad.double().numpy() + decay * expected[name]
            v = momentum[name] = 0.9 * momentum[name] + g if t else g
            module = 0.3 / variances[module_of(name)]
            factor = math.sqrt(min(max(module, 0.5), 10))
            expected[name] = expected[name] - factor * 0.1 / (t + 1) * v
        optimizer.step()
        assert {group["lr"] for group in optimizer.param_groups} == {0.1 / (t + 1)}
        for name, w in weights(model).items():
            np.testing.assert_allclose(w, expected[name], 1e-5, 1e-6, err_msg=name)


def test_the_learning_rate_is_put_back_after_an_error():
    _, optimizer = make("agvm", "SOLVER.BASE_LR", 0.1)

    def fail():
        raise RuntimeError("closure")

    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step(fail)
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}


def test_its_state_has_the_factors():
    model, optimizer = make("agvm")
    gradients(model, images(2))
    optimizer.step()
    optimizer.update_factors({"backbone": 0.3, "fpn": 0.1})
    _, other = make("agvm")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.factors == optimizer.factors and other.factors["fpn"] > 1


def test_a_frozen_backbone_is_nothing_to_compare_with():
    model = Detector()
    model.backbone.bottom_up.requires_grad_(False)
    cfg = megdet_d2.load_config(opts=["MEGDET.OPTIMIZER", "agvm"])
    with pytest.raises(ValueError, match="no parameter of model.backbone is trained; lower MODEL"):
        megdet_d2.build_optimizer(cfg, model)
    model.backbone.bottom_up[0].bias.requires_grad_(True)
    assert isinstance(megdet_d2.build_optimizer(cfg, model), AGVM)
