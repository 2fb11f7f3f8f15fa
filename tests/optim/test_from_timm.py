"""LARS, LAMB and Muon against loops over float64 arrays."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

import megdet_d2
from megdet_d2.norm.batch_norm import CrossGPUBatchNorm
from megdet_d2.optim import from_timm
from tests.helpers.optimizers import check_steps, gradients, grads, images, make, weights

DECAY = 0.01
KEYS = ("SOLVER.WEIGHT_DECAY", DECAY)
NORMS = [nn.BatchNorm2d, CrossGPUBatchNorm, lambda channels: nn.GroupNorm(2, channels)]
pytestmark = pytest.mark.timeout(120)  # the first import of timm reads a thousand files


def lars(lr, momentum, nesterov, trust=0.001, clip=None):
    def step(name, w, g, state, t):
        if clip:
            g = g * min(1, clip / (np.linalg.norm(g) + 1e-6))
        if w.ndim > 1:
            ratio = trust * np.linalg.norm(w) / (np.linalg.norm(g) + DECAY * np.linalg.norm(w))
            g = ratio * (g + DECAY * w)
        v = state["v"] = momentum * state["v"] + g if t > 1 else g
        return w - lr * (g + momentum * v if nesterov else v)

    return step


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("nesterov", [False, True])
def test_lars(norm, nesterov):
    keys = ("SOLVER.BASE_LR", 0.5, "SOLVER.NESTEROV", nesterov)
    model, optimizer = make("lars", *KEYS, *keys, norm=norm)
    check_steps(model, optimizer, lars(0.5, 0.9, nesterov))


def test_lars_without_a_gradient_decays_as_sgd_does():
    model, optimizer = make("lars", *KEYS, "SOLVER.BASE_LR", 0.5)
    gradients(model, images(2))
    model.zero_grad(set_to_none=False)
    before = weights(model)
    optimizer.step()
    for name, w in weights(model).items():
        expected = before[name] * (1 - 0.5 * DECAY * (w.ndim > 1))
        np.testing.assert_allclose(w, expected, 1e-6)


def test_lars_of_another_trust_coefficient_and_no_momentum():
    keys = ("SOLVER.BASE_LR", 1.0, "SOLVER.MOMENTUM", 0.0, "MEGDET.LARS.TRUST_COEFFICIENT", 0.02)
    check_steps(*make("lars", *KEYS, *keys), lars(1.0, 0.0, False, trust=0.02))


def test_gradients_are_clipped_before_lars_as_detectron2_does():
    clip = "SOLVER.CLIP_GRADIENTS"
    keys = ("SOLVER.BASE_LR", 3.0, f"{clip}.ENABLED", True, f"{clip}.CLIP_TYPE", "norm",
            f"{clip}.CLIP_VALUE", 0.05)  # fmt: skip
    model, optimizer = make("lars", *KEYS, *keys)
    assert type(optimizer).__name__ == "LarsWithGradientClip"
    check_steps(model, optimizer, lars(3.0, 0.9, False, clip=0.05))


def lamb(lr, beta=0.9):
    def step(name, w, g, state, t):
        p = state["p"] = beta * state.get("p", 0) + (1 - beta) * g
        q = state["q"] = 0.999 * state.get("q", 0) + 0.001 * g * g
        u = (p / (1 - beta**t)) / (np.sqrt(q / (1 - 0.999**t)) + 1e-6)
        if w.ndim > 1:
            u = u + DECAY * w
            u = np.linalg.norm(w) / np.linalg.norm(u) * u
        return w - lr * u

    return step


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("beta", [0.9, 0.8])
def test_lamb(norm, beta):
    keys = ("SOLVER.BASE_LR", 0.01, "SOLVER.MOMENTUM", beta)
    # An update of Adam divides by the gradient's size, so float32 is as exact as the gradient.
    check_steps(*make("lamb", *KEYS, *keys, norm=norm), lamb(0.01, beta), rtol=1e-4, atol=2e-5)


def adamw(lr, decay):
    def step(name, w, g, state, t):
        p = state["p"] = 0.9 * state.get("p", 0) + 0.1 * g
        q = state["q"] = 0.95 * state.get("q", 0) + 0.05 * g * g
        u = (p / (1 - 0.9**t)) / (np.sqrt(q / (1 - 0.95**t)) + 1e-7)
        return (1 - lr * decay) * w - lr * u

    return step


def newton_schulz(m):
    x = m / np.linalg.norm(m)
    x = x.T if len(m) > m.shape[1] else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if len(m) > m.shape[1] else x


def matrices(model):
    return [(name, p) for name, p in model.named_parameters() if p.ndim > 1]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_of_matrices(norm, nesterov):
    lr = 0.02
    keys = ("SOLVER.BASE_LR", lr, "SOLVER.NESTEROV", nesterov)
    model, optimizer = make("muon", *KEYS, *keys, norm=norm)
    momentum = {}
    bases = {n: torch.linalg.svd(p.detach().flatten(1), False) for n, p in matrices(model)}
    for t in range(3):
        for name, p in matrices(model):
            u, _, v = bases[name]
            values = torch.linspace(0.5, 1, len(v)).roll(t)
            p.grad = ((u * values) @ v).view(p.shape)
        before, g = weights(model), grads(model)
        optimizer.step()
        for name, w in weights(model).items():
            if w.ndim < 2:
                continue
            v = momentum[name] = 0.9 * momentum.get(name, 0) + 0.1 * g[name]
            v = 0.9 * v + 0.1 * g[name] if nesterov else v
            ortho = newton_schulz(v.reshape(len(v), -1))
            expected = 0.2 * np.sqrt(max(ortho.shape)) * ortho
            update = ((1 - lr * DECAY) * before[name] - w).reshape(ortho.shape) / lr
            # The library iterates in bfloat16, with 8 bits. So all singular values are near 1 here:
            # the iteration raises small ones, with the rounding beside them.
            assert np.linalg.norm(update - expected) < 0.06 * np.linalg.norm(expected), name


def test_muon_leaves_the_rest_to_adamw():
    lr, step = 0.02, adamw(0.02, DECAY)
    model, optimizer = make("muon", *KEYS, "SOLVER.BASE_LR", lr)
    no_decay, state = adamw(lr, 0.0), {}
    vectors = [name for name, p in model.named_parameters() if p.ndim < 2]
    assert "backbone.bottom_up.1.weight" in vectors and "roi_heads.box_head.bias" in vectors
    for t in range(1, 4):
        gradients(model, images(4, t))
        before, g = weights(model), grads(model)
        optimizer.step()
        for name in vectors:
            rule = no_decay if name.startswith("backbone.bottom_up.1") else step
            if name == "backbone.bottom_up.0.bias":
                continue  # a batch norm follows: its gradient is rounding
            expected = rule(name, before[name], g[name], state.setdefault(name, {}), t)
            np.testing.assert_allclose(weights(model)[name], expected, 1e-4, 1e-6, err_msg=name)


@pytest.mark.parametrize(
    "shape, expected",
    [((8,), False), ((1, 8), False), ((8, 1, 3, 3), False), ((3, 8, 1, 1), True), ((81, 9), True)],
)
def test_what_muon_updates(shape, expected):
    assert from_timm.is_matrix(torch.zeros(shape)) == expected


@pytest.mark.parametrize("name", from_timm.NAMES)
def test_frozen_parameters_and_bias_learning_rates(name):
    torch.manual_seed(0)
    model, _ = make(name)
    model.backbone.bottom_up.requires_grad_(False)
    keys = ["MEGDET.OPTIMIZER", name, "SOLVER.BASE_LR", "0.1", "SOLVER.BIAS_LR_FACTOR", "2.0"]
    optimizer = megdet_d2.build_optimizer(megdet_d2.load_config(opts=keys), model)
    lrs = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n: lrs[id(p)] for n, p in trained.items()} == {
        n: 0.2 if n.endswith("bias") else 0.1 for n in trained
    }
    before = weights(model)
    gradients(model, images(2))
    model.proposal_generator.weight.grad = None  # a head that had no part in the loss
    optimizer.step()
    same = {n for n, w in weights(model).items() if np.array_equal(w, before[n])}
    assert same == set(before) - set(trained) | {"proposal_generator.weight"}


@pytest.mark.parametrize("name", from_timm.NAMES)
def test_a_missing_package_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # as an import finds it
    monkeypatch.setattr(from_timm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'run  pip install "megdet_d2\[optimizers\]"'):
        make(name)
