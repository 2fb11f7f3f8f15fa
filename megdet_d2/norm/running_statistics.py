"""Running statistics of several BN groups: averaging, saving and loading.

Running statistics are equal within a group and differ between groups. Evaluation uses the mean over
the groups, and so does a checkpoint for other programs. Training and an exact resume use the
statistics of each group.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from megdet_d2.norm.batch_norm import CrossGPUBatchNorm


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Replaces the running statistics of every CGBN layer by their mean over all processes.

    Every process has to call it, because it makes one all-reduce. In place.
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


@torch.no_grad()
def average_in_groups(model: nn.Module) -> None:
    """Replaces the running statistics of every CGBN layer by their mean over its group, in place.

    Groups that were merged have several. Every process has to call it, between two steps.
    """
    for layer in _batch_norms(model).values():
        if isinstance(layer, CrossGPUBatchNorm) and layer.group_size() > 1:
            statistics: Any = [layer.running_mean, layer.running_var]
            flat = torch.cat([statistic.double() for statistic in statistics])
            dist.all_reduce(flat, group=cast(Any, layer.process_group))
            for statistic, mean in zip(statistics, flat.chunk(2), strict=True):
                statistic.copy_(mean / layer.group_size())


@contextlib.contextmanager
def averaged_statistics(model: nn.Module) -> Iterator[None]:
    """Averages the statistics for the length of a ``with`` block, and then restores them."""
    own = {name: statistic.clone() for name, statistic in _averaged(model).items()}
    average_statistics(model)
    try:
        yield
    finally:
        load_statistics(model, own)


def processes_per_group(model: nn.Module) -> int:
    """Returns the number of processes with equal running statistics, the smallest group's size."""
    world = comm.get_world_size()
    sizes = [world]
    for layer in _batch_norms(model).values():
        if isinstance(layer, CrossGPUBatchNorm):
            sizes.append(layer.group_size())
        elif not isinstance(layer, nn.SyncBatchNorm):
            sizes.append(1)
    return min(sizes)


def own_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Returns copies, on the CPU, of all buffers of this process's batch norms, by name."""
    return {name: buffer.detach().cpu().clone() for name, buffer in _buffers(model).items()}


@torch.no_grad()
def load_statistics(model: nn.Module, statistics: dict[str, Tensor]) -> None:
    """Loads buffers that ``own_statistics`` returned; ignores names that are not in the model."""
    buffers = _buffers(model)
    for name in statistics.keys() & buffers.keys():
        buffers[name].copy_(statistics[name])


@torch.no_grad()
def mean_statistics(model: nn.Module, groups: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the mean over the groups of the statistics that ``average_statistics`` averages.

    Args:
        groups: for each group the buffers of ``own_statistics``.
    """
    return {
        name: torch.stack([group[name].double() for group in groups]).mean(0).to(buffer.dtype)
        for name, buffer in _averaged(model).items()
    }


def own_normalizers(model: nn.Module) -> dict[str, float]:
    """Returns the moving averages by which RetinaNet and FCOS divide their losses, by module name.

    They are plain attributes that differ between processes and are in no ``state_dict``.
    """
    return {
        name: module.loss_normalizer
        for name, module in model.named_modules()
        if isinstance(getattr(module, "loss_normalizer", None), (int, float))
    }


def load_normalizers(model: nn.Module, normalizers: dict[str, float]) -> None:
    """Loads the values that ``own_normalizers`` returned; those not in it go back to the first."""
    for name in own_normalizers(model).keys() - normalizers.keys():
        delattr(model.get_submodule(name), "loss_normalizer")  # Detectron2 makes it in forward
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
    """Returns the running means and variances of CGBN layers; others are not averaged."""
    return {
        f"{name}.{key}": getattr(layer, key)
        for name, layer in _batch_norms(model).items()
        if isinstance(layer, CrossGPUBatchNorm)
        for key in ("running_mean", "running_var")
    }
