"""Running statistics where BN groups are smaller than the world, and so differ between processes.

Within a group they are equal. Evaluation and a checkpoint that others load take the mean over the
groups; training itself, and an exact resume, keep each group's own.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from megdet_d2.norm.batch_norm import CrossGPUBatchNorm


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Makes the running statistics of every CGBN layer the mean over all processes, in place.

    One all-reduce, which every process has to join.
    """
    statistics = _averaged(model)
    if comm.get_world_size() == 1 or not statistics:
        return
    flat = torch.cat([statistic.double().flatten() for statistic in statistics.values()])
    dist.all_reduce(flat)
    flat /= comm.get_world_size()
    parts = flat.split([statistic.numel() for statistic in statistics.values()])
    for statistic, mean in zip(statistics.values(), parts, strict=True):
        statistic.copy_(mean)


@contextlib.contextmanager
def averaged_statistics(model: nn.Module) -> Iterator[None]:
    """``average_statistics`` for the length of a ``with``; then each process has its own again."""
    own = {name: statistic.clone() for name, statistic in _averaged(model).items()}
    average_statistics(model)
    try:
        yield
    finally:
        load_statistics(model, own)


def processes_per_group(model: nn.Module) -> int:
    """Processes whose running statistics are equal: those of the model's smallest group."""
    world = comm.get_world_size()
    sizes = [world]
    for layer in _batch_norms(model).values():
        if isinstance(layer, CrossGPUBatchNorm):
            sizes.append(layer.group_size())
        elif not isinstance(layer, nn.SyncBatchNorm):
            sizes.append(1)
    return min(sizes)


def own_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Copies, on the CPU, of all buffers of this process's batch norms, by name."""
    return {name: buffer.detach().cpu().clone() for name, buffer in _buffers(model).items()}


@torch.no_grad()
def load_statistics(model: nn.Module, statistics: dict[str, Tensor]) -> None:
    """Puts buffers back where ``own_statistics`` found them; those the model has not are left."""
    buffers = _buffers(model)
    for name in statistics.keys() & buffers.keys():
        buffers[name].copy_(statistics[name])


@torch.no_grad()
def mean_statistics(model: nn.Module, groups: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean over the groups of what ``average_statistics`` averages, by name."""
    return {
        name: torch.stack([group[name].double() for group in groups]).mean(0).to(buffer.dtype)
        for name, buffer in _averaged(model).items()
    }


def own_normalizers(model: nn.Module) -> dict[str, float]:
    """The moving averages by which RetinaNet and FCOS divide their losses, by module.

    Plain attributes that differ by process, and that no ``state_dict`` has.
    """
    return {
        name: module.loss_normalizer
        for name, module in model.named_modules()
        if isinstance(getattr(module, "loss_normalizer", None), (int, float))
    }


def load_normalizers(model: nn.Module, normalizers: dict[str, float]) -> None:
    """Puts back what ``own_normalizers`` found."""
    for name, module in model.named_modules():
        if name in normalizers:
            module.loss_normalizer = normalizers[name]


def _batch_norms(model: nn.Module) -> dict[str, Any]:
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    }


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": buffer
        for name, layer in _batch_norms(model).items()
        for key, buffer in layer.named_buffers(recurse=False)
    }


def _averaged(model: nn.Module) -> dict[str, Tensor]:
    """The running means and variances of CGBN layers; of plain batch norms rank 0's stand."""
    return {
        f"{name}.{key}": getattr(layer, key)
        for name, layer in _batch_norms(model).items()
        if isinstance(layer, CrossGPUBatchNorm)
        for key in ("running_mean", "running_var")
    }
