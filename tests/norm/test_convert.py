"""Tests the conversion of models to CGBN and back, and of state dicts."""

import copy
import functools

import detectron2.layers
import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.utils import parametrize, prune

import megdet_d2
from megdet_d2.norm.batch_norm import CrossGPUBatchNorm
from megdet_d2.norm.groups import SELF

X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_state_dict_goes_both_ways():
    from detectron2.layers import FrozenBatchNorm2d

    torch.manual_seed(0)
    trained = CrossGPUBatchNorm(4)
    for _ in range(3):
        trained(torch.randn(4, 4, 3, 3) * 2 + 1)
    trained.eval()
    x = torch.randn(2, 4, 3, 3)
    for other in (nn.BatchNorm2d(4), nn.SyncBatchNorm(4), FrozenBatchNorm2d(4)):
        state = trained.state_dict()
        if isinstance(other, FrozenBatchNorm2d):
            state.pop("num_batches_tracked")
        other.load_state_dict(state)
        torch.testing.assert_close(other.eval()(x), trained(x))
        back = CrossGPUBatchNorm(4).eval()
        back.load_state_dict(other.state_dict(), strict=not isinstance(other, FrozenBatchNorm2d))
        torch.testing.assert_close(back(x), trained(x))


@pytest.mark.parametrize("include_frozen", [False, True])
def test_convert_and_revert(include_frozen):
    from detectron2.layers import FrozenBatchNorm2d

    shared = nn.BatchNorm2d(3, eps=0.1, momentum=0.3)
    frozen = FrozenBatchNorm2d(3, eps=0.2)
    frozen.running_mean.fill_(0.5)
    for layer in (shared, frozen):
        layer.running_var.fill_(0.01)  # so that a lost ε is seen
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1), shared, nn.Sequential(nn.SyncBatchNorm(3, momentum=0.2), frozen), shared
    ).eval()
    parameters = {name: p for name, p in model.named_parameters()}
    calls = []
    handle = shared.register_forward_hook(lambda *_, **__: calls.append(1), with_kwargs=True)
    x = torch.randn(2, 3, 4, 4)
    y = model(x)

    assert megdet_d2.convert_cgbn(model, process_group=SELF, include_frozen=include_frozen) is model
    assert isinstance(model[1], CrossGPUBatchNorm) and model[3] is model[1]
    assert model[2][0].momentum == 0.2 and model[2][0].process_group is SELF
    assert isinstance(model[2][1], CrossGPUBatchNorm) == include_frozen
    assert not model[1].training
    for name, p in parameters.items():
        assert model.get_parameter(name) is p
    torch.testing.assert_close(model(x), y)

    megdet_d2.revert_cgbn(model)
    assert not any(isinstance(m, CrossGPUBatchNorm) for m in model.modules())
    assert type(model[1]) is nn.BatchNorm2d and model[3] is model[1]
    assert (model[1].eps, model[1].momentum, model[2][0].momentum) == (0.1, 0.3, 0.2)
    torch.testing.assert_close(model(x), y)
    handle.remove()
    model(x)
    assert len(calls) == 6  # the shared layer, twice each in three forwards
    torch.testing.assert_close(
        megdet_d2.convert_cgbn(nn.BatchNorm2d(3)).eval()(x), nn.BatchNorm2d(3).eval()(x)
    )


def test_converted_where_the_model_is():
    """Converts on the device of the state, as for a model that Detectron2 has built on a GPU."""
    model = megdet_d2.convert_cgbn(nn.Sequential(nn.BatchNorm2d(3)).to("meta"))
    devices = {name: buffer.device.type for name, buffer in model[0].named_buffers()}
    assert set(devices.values()) == {"meta"} and "num_batches_skipped" in devices


class Squared(nn.Module):
    def forward(self, w):
        return w.square()


class Noted(nn.BatchNorm2d):
    """A user's class with an attribute and a method."""

    def __init__(self, channels):
        super().__init__(channels)
        self.note, self.qconfig = "mine", object()

    def twice(self, x):
        return self(self(x))


def without_bias():
    layer = nn.BatchNorm2d(3)
    layer.bias = None  # as torch 2.15's BatchNorm2d(3, bias=False)
    return layer


def without_statistics():
    layer = nn.BatchNorm2d(3)
    layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    return layer


def initialised():
    layer = nn.LazyBatchNorm2d()
    layer(torch.randn(2, 3, 4, 4))
    return layer


LAYERS = {
    "plain": lambda: nn.BatchNorm2d(3, eps=1e-2),
    "not affine": lambda: nn.BatchNorm2d(3, affine=False),
    "without bias": without_bias,
    "without statistics": without_statistics,
    "not tracking": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "parametrized": lambda: parametrize.register_parametrization(
        parametrize.register_parametrization(nn.BatchNorm2d(3), "weight", Squared()),
        "bias",
        Squared(),
    ),
    "pruned": torch.no_grad()(lambda: prune.random_unstructured(nn.BatchNorm2d(3), "weight", 1)),
    "of a user's class": lambda: Noted(3),
    "once lazy": initialised,
    "float64": lambda: nn.BatchNorm2d(3).double(),
    "synchronized": lambda: nn.SyncBatchNorm(3),
    "torchvision's frozen": lambda: torchvision.ops.FrozenBatchNorm2d(3, eps=0.1),
    "Detectron2's frozen": lambda: detectron2.layers.FrozenBatchNorm2d(3, eps=0.1),
}


def randomise(layer):
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        if tensor.is_floating_point() and "mask" not in name:
            nn.init.uniform_(tensor, 0.5, 2)
    return layer


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_layer_keeps_everything(make):
    old = randomise(make())
    frozen = not isinstance(old, nn.modules.batchnorm._BatchNorm)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(old)).to(next(old.buffers(), X).dtype)
    model.references = [old]  # Detectron2's FPN keeps its convolutions so
    x = X.to(next(model.parameters()).dtype)
    mode = not frozen and not isinstance(old, nn.SyncBatchNorm)  # torch's trains on a GPU only
    plain = copy.deepcopy(model).train(mode)
    state = {name: value.clone() for name, value in plain.state_dict().items()}
    parameters = {name: id(p) for name, p in model.named_parameters()}

    assert megdet_d2.convert_cgbn(model.train(mode), SELF, include_frozen=True) is model
    layer = model[1][0]
    assert isinstance(layer, CrossGPUBatchNorm) and layer is model.references[0]
    assert layer.process_group is SELF and layer.name == "1.0"
    if not frozen:
        assert {name: id(p) for name, p in model.named_parameters()} == parameters
    for name, value in state.items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=name)
    torch.testing.assert_close(model(x), plain(x))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=name)
    if isinstance(old, Noted):
        assert layer.note == "mine" and layer.qconfig is old.qconfig
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())

    plain.load_state_dict(model.state_dict(), strict=not frozen)
    assert megdet_d2.revert_cgbn(model) is model
    assert not isinstance(layer, CrossGPUBatchNorm)
    if not frozen and not isinstance(plain[1][0], nn.SyncBatchNorm):
        assert [type(m).__name__ for m in model.modules()] == [
            type(m).__name__ for m in plain.modules()
        ]
        assert vars(model[1][0]).keys() == vars(plain[1][0]).keys()
        torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(model.eval()(x), plain.eval()(x))
    if isinstance(plain[1][0], Noted):
        layer.twice(x)


def test_a_parametrization_can_be_removed_after_the_conversion():
    model = nn.Sequential(LAYERS["parametrized"](), LAYERS["parametrized"]())
    twin = copy.deepcopy(model)
    megdet_d2.convert_cgbn(model)
    assert not any(isinstance(layer, CrossGPUBatchNorm) for layer in twin), "a copy shares classes"
    weight = model[0].weight.detach().clone()
    for tensor in ("weight", "bias"):
        parametrize.remove_parametrizations(model[0], tensor)
    assert type(model[0]) is CrossGPUBatchNorm and torch.equal(model[0].weight, weight)
    assert parametrize.is_parametrized(model[1])
    assert isinstance(copy.deepcopy(model)[1], CrossGPUBatchNorm)


class WithActivation(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def with_its_own_forward():
    layer = nn.BatchNorm2d(3)
    layer.forward = functools.partial(torch.relu)
    return layer


def without_eps():
    class FrozenBatchNorm2d(torchvision.ops.FrozenBatchNorm2d):  # as DETR's
        def __init__(self):
            super().__init__(3)
            del self.eps

    return FrozenBatchNorm2d()


REFUSED = {
    "activation": (lambda: WithActivation(3), "'1.0' is a WithActivation, whose forward may"),
    "own forward": (with_its_own_forward, "'1.0' is a BatchNorm2d, whose forward may"),
    "lazy": (nn.LazyBatchNorm2d, "'1.0' is a LazyBatchNorm2d that does not know its channels"),
    "lazy 3-D": (nn.LazyBatchNorm3d, "'1.0' is a LazyBatchNorm3d that does not know"),
    "scripted": (lambda: torch.jit.script(nn.BatchNorm2d(3)), "'1.0' is a BatchNorm2d of Torch"),
    "traced": (lambda: torch.jit.trace(nn.BatchNorm2d(3), X), "'1.0' is a BatchNorm2d of Torch"),
    "no ε": (without_eps, "'1.0' is a FrozenBatchNorm2d without eps"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("make, message", REFUSED.values(), ids=REFUSED)
def test_a_refused_layer_leaves_the_model_unchanged(make, message):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(make()), nn.BatchNorm2d(3))
    before = [(type(m), list(vars(m))) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        megdet_d2.convert_cgbn(model, include_frozen=True)
    assert [(type(m), list(vars(m))) for m in model.modules()] == before


def test_a_wrong_group_leaves_the_model_unchanged():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    for group, error in ((dist.GroupMember.NON_GROUP_MEMBER, ValueError), ([0, 1], TypeError)):
        with pytest.raises(error, match="process.group"):
            megdet_d2.convert_cgbn(model, group)
    assert all(type(layer) is nn.BatchNorm2d for layer in model)


class Rectified(CrossGPUBatchNorm):
    def forward(self, x):
        return super().forward(x).relu()


def checkpointed():
    layer = CrossGPUBatchNorm(3)
    megdet_d2.checkpoint_modules([layer])
    return layer


@pytest.mark.parametrize("make", [lambda: Rectified(3), checkpointed])
def test_revert_refuses_what_does_more(make):
    model = nn.Sequential(CrossGPUBatchNorm(3), make())
    y = model.eval()(X)
    with pytest.raises(ValueError, match="layer '1' is a .* whose forward may do more"):
        megdet_d2.revert_cgbn(model)
    assert isinstance(model[0], CrossGPUBatchNorm)
    assert torch.equal(model(X), y)


def test_revert_gives_back_the_dimensions():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm3d(3))
    megdet_d2.convert_cgbn(model)
    model[0](torch.randn(4, 3)), model[1](torch.randn(2, 3, 2, 2, 2))
    megdet_d2.revert_cgbn(model)
    assert [type(m) for m in model] == [nn.BatchNorm1d, nn.BatchNorm3d]
