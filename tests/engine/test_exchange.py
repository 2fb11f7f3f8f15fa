"""One exchange per update: what it carries, and how often a step waits for others or the device."""

import collections
import contextlib
import itertools

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch.utils._python_dispatch import TorchDispatchMode

from megdet_d2.engine import Trainer, prepare_config
from megdet_d2.engine.exchange import LOSSES, SIGNAL, WIDTH, StepExchange
from megdet_d2.engine.metrics import put_losses
from tests.helpers.training import config

# --- the table -----------------------------------------------------------------------------------


def exchange_in_turn(rank):
    """Several updates, in which one process has something to tell."""
    exchange, seen = StepExchange(), []
    exchange.begin()
    exchange.signal = 15 * rank
    exchange.losses, exchange.data_time = {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, 0.5
    exchange(0, {"a": rank + 0.1, "b": 1e30})
    again = exchange.complete() is exchange.table  # no second exchange
    seen.append((exchange.table[:, SIGNAL].tolist(), again, exchange.data_times.tolist()))
    gathered = exchange.gathered(exchange.losses)
    seen.append({name: values.tolist() for name, values in gathered.items()})
    seen.append(exchange.gathered(dict(exchange.losses)))  # others of the same names

    exchange.begin()
    exchange.losses = {"a": torch.tensor(1.0), "c" if rank else "b": torch.tensor(2.0)}
    exchange(0, dict.fromkeys(exchange.losses, 1.0))
    seen.append(exchange.gathered(exchange.losses))  # other names in another process

    exchange.begin()
    exchange.losses = {str(i): torch.tensor(1.0) for i in range(WIDTH - LOSSES + rank)}
    exchange(0, dict.fromkeys(exchange.losses, 1.0))
    seen.append(exchange.gathered(exchange.losses))  # more than there is room for, in one process

    exchange.begin()
    seen.append(exchange.complete()[:, SIGNAL].tolist())  # a step without after_backward
    return seen


def test_every_process_gets_every_row(pool2):
    first, second = pool2.run(exchange_in_turn)
    assert first == second
    assert first[0] == ([0, 15], True, [0.5, 0.5])
    assert first[1] == {"a": [0.1, 1.1], "b": [1e30, 1e30]}  # float64: nothing is rounded
    assert first[2:5] == [{}, {}, {}]
    assert first[5] == [0, 15]


def late(rank):
    exchange = StepExchange()
    if rank:
        return "absent"
    with pytest.raises(RuntimeError):
        exchange(patience=0.5)
    return "ended"


def test_patience_has_an_end():
    from tests.helpers.gloo_pool import GlooPool

    pool = GlooPool(2)
    try:
        assert pool.run(late) == ["ended", "absent"]
    finally:
        pool.close()


def written(rank):
    """The same losses through Detectron2's gather and through ours."""
    from detectron2.engine import SimpleTrainer

    torch.manual_seed(rank)
    losses = {name: torch.rand(()) for name in ("x", "y", "z")}
    with EventStorage() as stock:
        SimpleTrainer.write_metrics(losses, 0.25 * rank, 0)
    exchange = StepExchange()
    exchange.losses, exchange.data_time = losses, 0.25 * rank
    exchange(0, {name: loss.item() for name, loss in losses.items()})
    with EventStorage() as ours:
        put_losses(ours, exchange.gathered(losses), exchange.data_times)
    return stock.latest(), ours.latest()


def test_the_metrics_are_detectron2s_to_the_bit(pool2):
    for stock, ours in pool2.run(written):
        assert stock == ours and "rank_data_time" in ours


# --- what a step costs ---------------------------------------------------------------------------

# Operators that wait for the device where there is one.
WAITS = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero")
COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_object", "gather", "gather_object", "broadcast",
    "broadcast_object_list", "reduce", "scatter", "barrier", "all_gather_into_tensor", "send",
    "reduce_scatter_tensor", "all_to_all", "all_to_all_single",
)  # fmt: skip


class Tiny(torch.nn.Module):
    """A model of two losses that reads nothing from the device."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, batch):
        x = self.layer(torch.ones(2, 4))
        return {"a": x.square().mean(), "b": x.abs().mean()}


class Waits(TorchDispatchMode):
    """Counts the operators that read from a device."""

    def __init__(self, found):
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in WAITS:
            self._found[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted(found):
    """Counts collectives, waits and ``tolist`` of tensors inside of a ``with``."""
    with pytest.MonkeyPatch.context() as patch, Waits(found):
        for name in COLLECTIVES:
            patch.setattr(dist, name, _counting(getattr(dist, name), name, found))
        for name in ("tolist", "cpu", "numpy"):
            method = getattr(torch.Tensor, name)
            patch.setattr(torch.Tensor, name, _counting(method, f"Tensor.{name}", found))
        yield


def _counting(function, name, found):
    def call(*args, **kwargs):
        found[name] += 1
        return function(*args, **kwargs)

    return call


def cost_of_steps(rank, output, coco, steps):
    """Collectives and waits of four updates of our trainer, per update, with all its hooks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "build_model", classmethod(_build_tiny))
        cfg = config(output, coco, "MEGDET.ACCUMULATION_STEPS", steps, "MEGDET.POLICY", "")
        cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.MAX_ITER = 1000, 1000
        prepare_config(cfg)
        trainer = Trainer(cfg)
    batch = next(trainer._trainer._data_loader_iter)  # loading is not counted
    trainer._trainer._data_loader_iter_obj = itertools.repeat(batch)
    found = collections.Counter()
    trainer.iter = trainer.start_iter = 0
    trainer.max_iter = 1000
    with EventStorage() as trainer.storage:
        for hook in trainer._hooks:
            hook.before_train()
        for trainer.iter in range(6):
            with counted(found) if trainer.iter >= 2 else contextlib.nullcontext():
                trainer.before_step()
                trainer.run_step()
                trainer.after_step()
        trainer._hooks.clear()
    assert comm.get_world_size() == 2
    return {name: count / 4 for name, count in found.items()}


def _build_tiny(cls, cfg):
    torch.manual_seed(0)
    return Tiny()


@pytest.mark.parametrize("steps", [1, 2])
def test_a_step_has_one_collective_and_one_wait(pool2, coco, tmp_path, steps):
    """Beside those of DDP, which are in C++, and of the norm, which the model does not have."""
    for cost in pool2.run(cost_of_steps, str(tmp_path), coco, steps):
        assert cost.pop("Tensor.tolist") == 1  # losses and gradient norms together
        assert cost.pop("all_gather") == 1  # the exchange
        assert cost == {}
