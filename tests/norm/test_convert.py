"""Tests the conversion of models to CGBN and back, and of state dicts."""

import pytest
import torch
from torch import nn

import megdet_d2
from megdet_d2.norm.batch_norm import CrossGPUBatchNorm
from megdet_d2.norm.groups import SELF


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


def test_a_norm_that_does_more_is_not_converted():
    class WithActivation(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(WithActivation(3)))
    with pytest.raises(ValueError, match="layer '1.0' is a WithActivation, whose forward may"):
        megdet_d2.convert_cgbn(model)
    assert type(model[0]) is nn.BatchNorm2d


def test_revert_gives_back_the_dimensions():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm3d(3))
    megdet_d2.convert_cgbn(model)
    model[0](torch.randn(4, 3)), model[1](torch.randn(2, 3, 2, 2, 2))
    megdet_d2.revert_cgbn(model)
    assert [type(m) for m in model] == [nn.BatchNorm1d, nn.BatchNorm3d]
