"""DDP (``DistributedDataParallel``) on CPUs, deterministic to the last bit."""

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence

import detectron2.engine.defaults as d2_defaults
import torch
from detectron2.config import CfgNode
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from megdet_d2._moved import renamed


def finalize_ddp_buckets(model: nn.Module) -> None:
    """Sets the order of DDP's gradient buckets before the first step.

    DDP fixes it after its first step. The sum over three or more processes depends, in the last
    bit, on the place in the bucket, so the first step of a resumed run would differ. On GPUs the
    order set here would prevent the overlap of communication with backward; do not call it there.

    Args:
        model: as it is called in training; changed only if it is a ``DistributedDataParallel``.
    """
    if isinstance(model, DistributedDataParallel):
        model.reducer._push_all_rebuilt_params()
        model.reducer._rebuild_buckets()


def summed_parameters(model: nn.Module) -> list[str]:
    """Returns the names of the parameters whose gradients DDP sums, in its order; none without DDP.

    Args:
        model: as it is called in training. Call it right after DDP was built, because DDP keeps
            those that were trained then.
    """
    if not isinstance(model, DistributedDataParallel):
        return []
    return [
        name
        for name, parameter in model.module.named_parameters()
        if parameter.requires_grad and name not in model.parameters_to_ignore
    ]


def parameters_without_gradient(model: nn.Module, summed: Sequence[str]) -> list[str]:
    """Returns the parameters whose gradients DDP has missed on this process in the last backward.

    Without them DDP can neither finish here, nor on the processes that have them and wait.

    Args:
        model: as it is called in training.
        summed: see ``summed_parameters``.

    Returns:
        names; none if DDP has finished, looks for unused parameters, or is not used.
    """
    check = getattr(model, "_check_reducer_finalized", None)  # not on older versions of torch
    if check is None:
        return []
    try:
        check()
    except RuntimeError as error:
        found = re.search(r"did not receive grad for rank \d+: ([\d ,]+)", str(error))
        indices = [int(number) for number in re.findall(r"\d+", found[1])] if found else []
        return [summed[i] for i in indices] or [f"some parameters ({error})"]
    return []


def sum_gradients(model: nn.Module) -> None:
    """Lets DDP reduce gradients that backwards under ``no_sync`` have left.

    DDP does it in a backward that adds -0.0 to each gradient, which changes no bit of it.

    Args:
        model: as it is called in training; without DDP there is nothing to do.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    model.reducer.prepare_for_forward()
    model.reducer.prepare_for_backward([])
    zeros = [p.sum() * -0.0 for p in model.module.parameters() if p.grad is not None]
    torch.stack(zeros).sum().backward()


@contextlib.contextmanager
def ddp_without_device_ids(cfg: CfgNode) -> Iterator[None]:
    """Lets ``DefaultTrainer``'s constructor make a DDP on CPU, during a ``with``.

    The constructor gives DDP ``device_ids``, which DDP refuses on CPU. So Detectron2's
    ``create_ddp_model`` is replaced until the end of the ``with``.

    Args:
        cfg: nothing is done unless its MODEL.DEVICE is "cpu".
    """
    if cfg.MODEL.DEVICE != "cpu":
        yield
        return
    stock = d2_defaults.create_ddp_model
    d2_defaults.create_ddp_model = functools.partial(stock, device_ids=None)
    try:
        yield
    finally:
        d2_defaults.create_ddp_model = stock


__getattr__ = renamed(__name__, settle_buckets="finalize_ddp_buckets")
