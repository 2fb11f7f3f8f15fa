"""A small model with the modules of a detector, and training steps by plain loops in float64."""

import numpy as np
import torch
from torch import nn

import megdet_d2


class Detector(nn.Module):
    """Regresses numbers, with a detector's names; a loss is a mean over the images."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.bottom_up = nn.Sequential(nn.Conv2d(3, 6, 3), norm(6), nn.ReLU())
        self.backbone.fpn_lateral2 = nn.Conv2d(6, 5, 1)
        self.proposal_generator = nn.Conv2d(5, 4, 1)
        self.roi_heads = nn.Module()
        self.roi_heads.box_head = nn.Linear(5, 7)

    def forward(self, batch):
        x = torch.stack(list(batch))
        features = self.backbone.fpn_lateral2(self.backbone.bottom_up(x))
        regions = self.roi_heads.box_head(features.mean((2, 3)))
        # Targets that differ between images, so that all gradients do.
        return {
            "rpn": (self.proposal_generator(features) - x[:, :1, 1:5, 1:5] - 0.3).square().mean(),
            "box": (regions - 2 * x.flatten(1)[:, :7] - 1).square().mean(),
        }


def make(name, *keys, norm=nn.BatchNorm2d):
    """Returns a model of seed 0 and its optimizer of ``MEGDET.OPTIMIZER``."""
    torch.manual_seed(0)
    model = Detector(norm)
    cfg = megdet_d2.load_config(
        opts=[str(word) for word in ("MODEL.DEVICE", "cpu", "MEGDET.OPTIMIZER", name, *keys)]
    )
    return model, megdet_d2.build_optimizer(cfg, model)


def images(count, seed=0):
    """Returns images of noise."""
    return list(torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed)))


def gradients(model, batch):
    """Computes the gradients of a batch, as ``p.grad``."""
    model.zero_grad()
    sum(model(batch).values()).backward()


def weights(model):
    """Returns copies of all parameters in float64, by name."""
    return {n: p.detach().double().numpy().copy() for n, p in model.named_parameters()}


def grads(model):
    """Returns the gradients in float64, by name; zeros for none."""
    return {
        n: np.zeros(p.shape) if p.grad is None else p.grad.double().numpy().copy()
        for n, p in model.named_parameters()
    }


def check_steps(model, optimizer, step, count=4, rtol=2e-5, atol=2e-7):
    """Compares ``count`` updates with ``step(name, w, g, state, t)``, which returns the new w."""
    expected, state = weights(model), {}
    for t in range(1, count + 1):
        gradients(model, images(4, t))
        for name, g in grads(model).items():
            expected[name] = step(name, expected[name], g, state.setdefault(name, {}), t)
        optimizer.step()
        for name, w in weights(model).items():
            np.testing.assert_allclose(w, expected[name], rtol, atol, err_msg=f"{name}, step {t}")
            expected[name] = w  # so that a difference does not grow over the steps
