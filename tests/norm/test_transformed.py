"""Compares the layer with nn.BatchNorm2d under torch.func, in torch.fx, TorchScript and ONNX."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vmap
from torchvision.models.feature_extraction import create_feature_extractor

import megdet_d2
from megdet_d2 import CrossGPUBatchNorm
from megdet_d2.norm.batch_norm import cgbn_layers
from megdet_d2.norm.padding import ValidRegion

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def models(training=False, **options):
    """Returns a small CGBN model and the same model with plain batch norms."""
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options), nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2, **options)),
    )  # fmt: skip
    plain(X)  # running statistics that are not 0 and 1
    ours = megdet_d2.convert_cgbn(copy.deepcopy(plain))
    return ours.train(training), plain.train(training)


def assert_same(ours, plain):
    torch.testing.assert_close(ours(X), plain(X))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


# --- torch.func and forward mode -----------------------------------------------------------------


def per_sample(model):
    return vmap(lambda x: model(x[None])[0])(X)


def gradient(model):
    def loss(parameters):
        return functional_call(model, parameters, (X,)).exp().sum()

    return grad(loss)(dict(model.named_parameters()))["1.weight"]


def curvature(model):
    def loss(weight):
        return functional_call(model, {"1.weight": weight}, (X,)).pow(3).sum()

    return hessian(loss)(model[1].weight)


def tangent(model):
    return jvp(model, (X,), (X.flip(0),))[1]


def dual_numbers(model):
    with torch.autograd.forward_ad.dual_level():
        y = model(torch.autograd.forward_ad.make_dual(X, X.flip(0)))
        return torch.autograd.forward_ad.unpack_dual(y).tangent


TRANSFORMS = [per_sample, gradient, curvature, tangent, dual_numbers]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("training", [False, True])
def test_torch_func_does_what_it_does_with_batch_norm(transform, training):
    # In training vmap cannot write to running statistics; torch says so for its own layers too.
    ours, plain = models(training, track_running_stats=not training)
    torch.testing.assert_close(transform(ours), transform(plain))


@pytest.mark.parametrize("momentum, steps", [(0.1, 1), (None, 1), (0.1, 4)])
def test_running_statistics_move_under_a_transform(momentum, steps):
    layer = CrossGPUBatchNorm(3, momentum=momentum)
    layer.accumulation_steps = steps
    twin = copy.deepcopy(layer)
    for _ in range(2):
        layer(X)
        dual_numbers(twin)
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], value)


def run_transforms(rank):
    ours, _ = models(training=True, track_running_stats=False)
    for transform in [*TRANSFORMS, trace]:
        with pytest.raises(RuntimeError, match="CGBN layer 1 .* several processes.*revert_cgbn"):
            transform(ours)
    for layer in cgbn_layers(ours):
        layer.process_group = megdet_d2.norm.groups.SELF
    for transform in [*TRANSFORMS, trace]:
        transform(ours)


def test_over_several_processes_the_way_out_is_named(pool2):
    pool2.run(run_transforms)


def test_padding_is_not_counted_silently():
    layer = CrossGPUBatchNorm(3, track_running_stats=False)
    layer.valid_region = ValidRegion([(6, 6), (4, 6), (6, 3), (6, 6)], (6, 6))
    with pytest.raises(RuntimeError, match="leaves out padding"):
        jvp(layer, (X,), (X,))


# --- graphs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_fx_has_the_layer_as_a_leaf(training):
    ours, plain = models(training)
    graph = torch.fx.symbolic_trace(ours)
    assert [str(n.target) for n in graph.graph.nodes if n.op == "call_module"] == [
        "0", "1", "2", "3.0", "3.1"
    ]  # fmt: skip
    assert isinstance(graph.get_submodule("3.1"), CrossGPUBatchNorm)
    assert_same(graph, plain)


class Block(nn.Module):
    def __init__(self, relu):
        super().__init__()
        self.norm, self.relu = CrossGPUBatchNorm(3), relu

    def forward(self, x):
        return self.norm(x, residual=x, relu=self.relu)


@pytest.mark.parametrize("relu", [False, True])
def test_fx_keeps_the_arguments_of_the_layer(relu):
    block = Block(relu)
    torch.testing.assert_close(torch.fx.symbolic_trace(block)(X), block(X))


def test_feature_extractor():
    ours, plain = models()
    nodes = {"1": "norm", "3.1": "out"}
    features = [create_feature_extractor(model, nodes)(X) for model in (ours, plain)]
    for name in nodes.values():
        torch.testing.assert_close(features[0][name], features[1][name])


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("track", [False, True])
def test_script_in_evaluation(track):
    ours, plain = models(track_running_stats=track)
    scripted = torch.jit.script(ours)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    torch.testing.assert_close(loaded(X), plain(X))
    assert isinstance(ours[1], CrossGPUBatchNorm), "the model itself is as before"
    with pytest.raises(Exception, match="revert_cgbn"):
        scripted.train()(X)
    megdet_d2.revert_cgbn(ours)
    torch.testing.assert_close(torch.jit.script(ours.train())(X), plain.train()(X))


def trace(model):
    return torch.jit.trace(model, X, check_trace=False)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize("training", [False, True])
def test_trace_can_be_saved(training):
    ours, plain = models(training)
    file = io.BytesIO()
    torch.jit.save(trace(ours), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(X), plain(X))


@pytest.mark.parametrize("training", [False, True])
def test_export(training):
    ours, plain = models(training)
    program = torch.export.export(ours, (X,))
    torch.testing.assert_close(program.module()(X), plain(X))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_onnx_has_the_operators_of_batch_norm(tmp_path, training, dynamo):
    onnx = pytest.importorskip("onnx")
    if dynamo:
        pytest.importorskip("onnxscript")
    mode = torch.onnx.TrainingMode
    graphs = []
    for i, model in enumerate(models(training)):
        file = tmp_path / f"{i}.onnx"
        torch.onnx.export(
            model, (X,), file, dynamo=dynamo, training=mode.TRAINING if training else mode.EVAL
        )
        graphs.append([node.op_type for node in onnx.load(file).graph.node])
    assert graphs[0] == graphs[1]
