"""The gradients of two halves, in one process and in several, against gradients of the images."""

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from megdet_d2.engine.accumulation import AMPAccumulationTrainer, accumulate
from megdet_d2.engine.modulation import Modulation
from megdet_d2.engine.precision import BFloat16Trainer
from megdet_d2.norm.batch_norm import CrossGPUBatchNorm
from megdet_d2.optim.agvm import relative_variances
from megdet_d2.optim.groups import module_of
from megdet_d2.optim.halves import Halves, check_halves
from tests.helpers.optimizers import gradients, images, make

BATCH = 12
KEYS = ("SOLVER.BASE_LR", 0.05, "MEGDET.AGVM.SMOOTHING", 0.0)


class Progress:
    """Ends its warm-up after two updates."""

    warmup_iters = 2


PROGRESS = Progress()  # Modulation has a weak reference


def no_norm(channels):
    return nn.Identity()


def train(batches, steps, updates, distributed=False, norm=no_norm, kind=accumulate, **options):
    """Trains; returns the weights, the factors after each update, and the scalars."""
    model, optimizer = make("agvm", *KEYS, norm=norm)
    if distributed:
        model = DistributedDataParallel(model)
    inner = kind(SimpleTrainer(model, batches, optimizer), steps)
    for name, value in options.items():
        setattr(inner, name, value)
    inner.modulation = Modulation(optimizer, PROGRESS, 2, 1, "A trainer")
    factors, scalars = [], []
    with EventStorage() as storage:
        for inner.iter in range(updates):
            inner.run_step()
            inner.modulation.check(inner.iter)
            factors.append(dict(optimizer.factors))
            scalars.append({k: v[0] for k, v in storage.latest().items() if "agvm" in k})
            storage.step()
    state = (getattr(model, "module", model)).state_dict()
    return {name: value.clone() for name, value in state.items()}, factors, scalars


def reference(batch, cut, weights, norm=no_norm):
    """The factors that two parts of a batch give, each in one forward without a norm."""
    pair = []
    for part in (batch[:cut], batch[cut:]):
        model, _ = make("agvm", norm=norm)
        model.load_state_dict(weights)
        gradients(model.train(), part)
        pair.append({name: p.grad.clone() for name, p in model.named_parameters()})
    _, optimizer = make("agvm", *KEYS)
    modules, variances = relative_variances(
        (module_of(name), pair[0][name], pair[1][name]) for name in pair[0]
    )
    optimizer.update_factors(dict(zip(modules, variances.tolist(), strict=True)))
    return optimizer.factors


def close(found, expected):
    assert found == {name: pytest.approx(value, rel=2e-4) for name, value in expected.items()}


def parts(seed, steps):
    batch, size = images(BATCH, seed), BATCH // steps
    return [batch[i : i + size] for i in range(0, BATCH, size)]


@pytest.mark.parametrize("steps, cut", [(2, 6), (3, 4), (4, 6)])
def test_micro_batches_of_one_process(steps, cut):
    batches = [part for seed in range(4) for part in parts(seed, steps)]
    _, factors, scalars = train(batches, steps, 4)
    assert all(set(f.values()) == {1.0} for f in factors[:3])  # not before 2 + 1 updates
    weights, _, _ = train(batches, steps, 3)
    expected = reference(images(BATCH, 3), cut, weights)
    assert expected["backbone"] == 1.0 and len(set(expected.values())) == 4
    close(factors[3], expected)
    assert scalars[3] == {f"agvm/{name}": factor for name, factor in factors[3].items()}
    assert scalars[2] == {}


def test_the_interval():
    batches = [part for seed in range(8) for part in parts(seed, 2)]
    _, factors, _ = train(batches, 2, 8)
    changed = [i for i in range(1, 8) if factors[i] != factors[i - 1]]
    assert changed == [3, 5, 7]


def distributed_task(rank, steps, updates):
    mine = []
    for seed in range(updates):
        own = images(BATCH, seed)[6 * rank : 6 * rank + 6]
        mine += [own[i : i + 6 // steps] for i in range(0, 6, 6 // steps)]
    return train(mine, steps, updates, distributed=True)


@pytest.mark.parametrize("steps", [1, 2])
def test_two_processes_under_ddp(pool2, steps):
    one, two = pool2.run(distributed_task, steps, 4)
    assert one[1:] == two[1:]
    assert all(torch.equal(one[0][name], two[0][name]) for name in one[0])
    weights, _, _ = pool2.run(distributed_task, steps, 3)[0]
    close(one[1][3], reference(images(BATCH, 3), 6, weights))
    # One process with a micro-batch for each of them has the same halves.
    batches = [part for seed in range(4) for part in parts(seed, 2)]
    alone, factors, _ = train(batches, 2, 4)
    close(one[1][3], factors[3])
    for name in alone:
        torch.testing.assert_close(one[0][name], alone[name], rtol=1e-4, atol=1e-6)


def measured_task(rank, every):
    """The weights of updates that all measure, or of which none does, at factors of 1."""
    model, optimizer = make("agvm", *KEYS)
    model = DistributedDataParallel(model)
    batches = [images(4, 10 * seed + rank) for seed in range(3)]
    inner = accumulate(SimpleTrainer(model, batches, optimizer), 1)
    if every:
        inner.modulation = Modulation(optimizer, PROGRESS, 1, -2, "A trainer")
        inner.modulation._optimizer.update_factors = lambda variances: None
    with EventStorage():
        for inner.iter in range(3):
            inner.run_step()
    return model.module.state_dict()


def test_a_measurement_changes_no_bit_of_the_gradient(pool2):
    plain, measured = pool2.run(measured_task, False)[0], pool2.run(measured_task, True)[0]
    assert all(torch.equal(plain[name], measured[name]) for name in plain)


def halves_task(rank):
    """Three processes: the first against the other two; one has no gradient for a parameter."""
    parameters = [torch.zeros(2, 3), torch.zeros(4), torch.zeros(1)]
    own = [torch.full_like(p, rank + 1.0) for p in parameters]
    for p, g in zip(parameters, own, strict=True):
        p.grad = None if rank == 1 and p.numel() == 4 else g
    halves = Halves(parameters)
    halves.keep(1, 1)
    halves.exchange()
    for p, mean in zip(parameters, (2.0, 4 / 3, 2.0), strict=True):
        p.grad = torch.full_like(p, mean)  # as DDP averages them
    return [(a.flatten()[0].item(), b.flatten()[0].item()) for a, b in halves.split()]


def test_three_processes_and_a_missing_gradient(pool3):
    expected = [(1 / 3, 5 / 3), (1 / 3, 1.0), (1 / 3, 5 / 3)]
    for found in pool3.run(halves_task):
        assert found == [pytest.approx(pair, rel=1e-6) for pair in expected]


def test_one_process_with_one_micro_batch_is_refused():
    with pytest.raises(ValueError, match="use two or more processes, or MEGDET.ACCUMULATION_STEP"):
        check_halves(1)
    check_halves(2)
    with pytest.raises(ValueError, match="one process with MEGDET.ACCUMULATION_STEPS 1"):
        train([images(4)] * 4, 1, 4)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, CrossGPUBatchNorm, no_norm])
def test_bfloat16(norm):
    batches = [part for seed in range(4) for part in parts(seed, 2)]
    _, factors, _ = train(batches, 2, 4, norm=norm, kind=BFloat16Trainer)
    _, plain, _ = train(batches, 2, 4, norm=norm)
    assert factors[3] != plain[3]
    assert factors[3] == {k: pytest.approx(v, rel=0.2) for k, v in plain[3].items()}


class Scaled:
    """Makes an AMP trainer whose forward is in float32, with a scaler that works on CPUs."""

    def __init__(self, scale):
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    def __call__(self, trainer, steps):
        inner = AMPAccumulationTrainer.__new__(AMPAccumulationTrainer)
        SimpleTrainer.__init__(inner, trainer.model, trainer.data_loader, trainer.optimizer)
        inner.grad_scaler, inner.precision, inner.steps = self.scaler, torch.bfloat16, steps
        inner.exchange = inner.repeater = None
        inner._precision = lambda: torch.autocast("cpu", enabled=False)
        return inner


def test_a_loss_scale_changes_nothing():
    batches = [part for seed in range(6) for part in parts(seed, 2)]
    weights, factors, _ = train(batches, 2, 6, kind=Scaled(1024.0))
    plain, expected, _ = train(batches, 2, 6)
    close(factors[5], expected[5])
    for name in plain:
        torch.testing.assert_close(weights[name], plain[name], rtol=1e-4, atol=1e-6)


def test_gradients_that_overflow_keep_the_factors():
    scaled = Scaled(1e38)
    batches = [part for seed in range(4) for part in parts(seed, 2)]
    _, factors, _ = train([[1e6 * i for i in part] for part in batches], 2, 4, kind=scaled)
    assert scaled.scaler.get_scale() < 1e38  # it has skipped an update
    assert set(factors[3].values()) == {1.0}
