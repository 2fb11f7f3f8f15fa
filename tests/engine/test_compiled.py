"""MODEL.COMPILE and CHANNELS_LAST: the same names and values, few compilations for all sizes."""

import copy

import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch._dynamo.utils import counters

import megdet_d2
from megdet_d2.engine import Trainer, compiled
from tests.helpers.paths import CONFIGS

STUDY = CONFIGS / "ablations" / "Base-study.yaml"  # traced in seconds
SIZES = ((64, 64), (64, 96), (96, 64), (128, 160), (160, 96), (64, 64), (192, 320))


def images(height, width):
    generator = torch.Generator().manual_seed(height * width)
    batch = []
    for _ in range(2):
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[4.0, 4, 30, 30], [10, 10, 40, 44]]))
        instances.gt_classes = torch.tensor([1, 2])
        pixels = torch.randint(256, (3, height, width), generator=generator)
        batch.append({"image": pixels.to(torch.uint8), "instances": instances})
    return batch


def build_tiny(*opts):
    torch.manual_seed(0)
    cfg = megdet_d2.load_config(STUDY, ["MODEL.DEVICE", "cpu", *opts])
    return Trainer.build_model(cfg).train()


def step(model, size):
    """Returns the loss, and the gradient of the first weight."""
    torch.manual_seed(1)
    model.zero_grad()
    with EventStorage():
        loss = sum(model(images(*size)).values())
    loss.backward()
    return loss.detach(), next(model.backbone.bottom_up.parameters()).grad


def compilations():
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def traced(monkeypatch):
    """Traces and compiles without machine code, which takes a tenth of the time."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("keys", [(), ("MODEL.CGBN.FUSE_ACTIVATION", "True")], ids=["", "fused"])
def test_a_second_epoch_compiles_nothing_and_equals_the_plain_model(traced, keys):
    plain, model = build_tiny(*keys), build_tiny("MODEL.COMPILE", "True", *keys)
    assert list(model.state_dict()) == list(plain.state_dict())
    after = []
    for size in 2 * SIZES:
        for expected, value in zip(step(plain, size), step(model, size), strict=True):
            assert (value - expected).norm() < 1e-3 * expected.norm()
        after.append(compilations())
    assert after[0] == 4  # backbone, RPN head, box head, box predictor
    # Not once per size: the sizes are variables, but equal ones are taken for one variable.
    assert after[-1] == after[len(SIZES) - 1] <= 4 + 3, f"compiled again: {after}"
    assert not counters["graph_break"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-3, atol=1e-3, msg=name)
    assert copy.deepcopy(model).backbone._compiled_call_impl is None  # an average runs plainly


@pytest.mark.slow
def test_machine_code_gives_the_loss_of_the_plain_model():
    if not any(map(compiled.shutil.which, compiled._COMPILERS)):
        pytest.skip("needs a C++ compiler")
    plain, model = build_tiny(), build_tiny("MODEL.COMPILE", "True")
    for expected, value in zip(step(plain, SIZES[0]), step(model, SIZES[0]), strict=True):
        assert (value - expected).norm() < 1e-3 * expected.norm()


def test_no_compiler_is_an_error_before_the_training(monkeypatch):
    cfg = megdet_d2.load_config(STUDY, ["MODEL.DEVICE", "cpu", "MODEL.COMPILE", "True"])
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="MODEL.COMPILE is True.* needs a C.. compiler"):
        compiled.check_compile(cfg)


def test_channels_last_keeps_names_and_values():
    plain, model = build_tiny(), build_tiny("MODEL.CHANNELS_LAST", "True")
    weight = model.backbone.bottom_up.res3[1].conv2.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    state = plain.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.backbone.register_forward_hook(lambda m, i, out: seen.extend(out.values()))
    seen = []
    for expected, value in zip(step(plain, (64, 96)), step(model, (64, 96)), strict=True):
        assert (value - expected).norm() < 1e-3 * expected.norm()
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


def two_steps(rank):
    """Returns the loss of two steps of a compiled model in DDP."""
    compiled.BACKEND = "aot_eager"
    model = build_tiny("MODEL.COMPILE", "True")
    ddp = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    losses = []
    for size in SIZES[:2]:
        torch.manual_seed(rank)
        with EventStorage():
            loss = sum(ddp(images(*size)).values())
        loss.backward()
        losses.append(float(loss.detach()))
        gradient = next(model.backbone.bottom_up.parameters()).grad.norm().item()
    return losses, gradient


@pytest.mark.slow
def test_a_compiled_model_trains_in_ddp(pool2):
    results = pool2.run(two_steps, timeout=280)
    assert all(torch.tensor(losses).isfinite().all() for losses, _ in results)
    assert results[0][1] == results[1][1] > 0  # one averaged gradient
