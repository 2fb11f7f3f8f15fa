"""Resolves a training for every rank of a cluster, in one process and without a GPU.

The first rank runs the checks of a training's start, and builds its model, optimizer, scheduler and
loader. Then each rank forms its BN group and takes its part of one epoch, by the code that
trainings run. So what would fail on the cluster fails here, with the same error.
"""

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from tabulate import tabulate

from megdet_d2.config import load_config
from megdet_d2.data.stream import StreamSampler, find_stream
from megdet_d2.engine import Trainer, prepare_config
from megdet_d2.engine.auto_micro_batch import possible_micro_batches, with_micro_batch
from megdet_d2.engine.command import find_config
from megdet_d2.engine.model_classes import check_model_classes
from megdet_d2.engine.model_reads import ModelReads
from megdet_d2.engine.overrides import check_base_lr
from megdet_d2.engine.progress import Layout
from megdet_d2.norm.batch_norm import CrossGPUBatchNorm, cgbn_layers
from megdet_d2.norm.configure import set_bn_size
from megdet_d2.norm.groups import SelfGroup

from .fake_cluster import fake_rank
from .resolved import refuse_batch_warmup
from .without_gpus import without_gpus


@dataclass(frozen=True)
class Groups:
    """The BN groups of all ranks.

    Attributes:
        number: of groups.
        images: in each group, the BN size.
        first: ranks of the first group.
        inside_machines: whether no group spans machines.
    """

    number: int
    images: int
    first: tuple[int, ...]
    inside_machines: bool


@dataclass(frozen=True)
class Epoch:
    """The images that the ranks read in the updates of one epoch.

    Attributes:
        images: of the training set, as the loader filters it.
        updates: that take as many images as an epoch has, rounded up.
        least, most: images that a rank reads in these updates.
        is_disjoint: whether each place of the stream is read by one rank only.
        held_back: images that grouping by aspect ratio leaves for the next updates.
        is_complete: whether all other images of the epoch are read.
    """

    images: int
    updates: int
    least: int
    most: int
    is_disjoint: bool
    held_back: int
    is_complete: bool


@dataclass(frozen=True)
class DryRun:
    """A training as its ranks would start it.

    Attributes:
        layout: processes, micro-batches and images that make up a mini-batch.
        groups: None without a layer of CGBN.
        epoch: None where the loader is not the plugin's stream.
        not_checked: keys that only GPUs can check that this machine does not have.
    """

    machines: int
    gpus: int
    layout: Layout
    groups: Groups | None
    base_lr: float
    first_lr: float
    warmup_iters: int
    max_iter: int
    steps: tuple[int, ...]
    epoch: Epoch | None
    not_checked: tuple[str, ...]

    @property
    def epochs(self) -> float | None:
        """The epochs of the training."""
        if self.epoch is None:
            return None
        return self.max_iter * self.layout.batch_size / self.epoch.images


def run(args: argparse.Namespace) -> None:
    """Runs ``megdet plan --dry-run`` with the arguments of ``megdet_cli.plan``.

    Raises:
        FileNotFoundError, OSError, ValueError: as a training on this cluster would.
    """
    machines = args.machines or [1]
    if len(machines) != 1:
        raise ValueError(
            f"--machines is {','.join(map(str, machines))}; a dry run takes one number, such as "
            "--machines 128"
        )
    gpus = torch.cuda.device_count() or 8 if args.gpus is None else args.gpus
    cfg = load_config(find_config(args.config), args.opts or ())
    result = dry_run(cfg, machines[0], gpus)
    print(json.dumps(to_json(result), indent=1) if args.json else to_text(result))


def dry_run(cfg: CfgNode, machines: int, gpus: int) -> DryRun:
    """Resolves a training for every rank.

    Args:
        cfg: a config with the keys of ``add_megdet_config``, not resolved; it stays as it is.
        machines: number of machines.
        gpus: processes of each machine.

    Raises:
        FileNotFoundError, OSError, ValueError: as a training on this cluster would.
    """
    for flag, value in (("machines", machines), ("gpus", gpus)):
        if value < 1:
            raise ValueError(f"--{flag} is {value}; give 1 or more")
    refuse_batch_warmup(cfg)
    cfg, not_checked = without_gpus(cfg, torch.cuda.device_count())
    with fake_rank(0, machines, gpus):
        cfg, layout, first_lr, uses_cgbn, stream = _start(cfg)
    cut = _cut(stream, layout) if stream else []
    groups: list[tuple[int, ...]] = []
    taken: list[list[int]] = []
    for rank in range(layout.processes):
        with fake_rank(rank, machines, gpus):
            if uses_cgbn:
                groups.append(_group(cfg, layout, rank))
            if stream:
                taken.append(_CutStream(stream, cut).places())
    return DryRun(
        machines,
        gpus,
        layout,
        _summarise_groups(groups, layout, gpus) if groups else None,
        cfg.SOLVER.BASE_LR,
        first_lr,
        cfg.SOLVER.WARMUP_ITERS,
        cfg.SOLVER.MAX_ITER,
        tuple(cfg.SOLVER.STEPS),
        _summarise_epoch(taken, cut, layout, stream.size) if stream else None,
        not_checked,
    )


def to_json(result: DryRun) -> dict[str, Any]:
    """Returns a dry run as plain data."""
    return asdict(result) | {"epochs": result.epochs, "batch_size": result.layout.batch_size}


def to_text(result: DryRun) -> str:
    """Returns a dry run as a table, and a sentence on what it has not checked."""
    layout, groups, epoch = result.layout, result.groups, result.epoch
    rows = [
        ("processes", f"{layout.processes:,}: {result.machines:,} machines x {result.gpus}"),
        ("mini-batch", f"{layout.batch_size:,} images"),
        ("images per GPU", f"{layout.images_per_gpu} x {layout.accumulation_steps} micro-batches"),
        ("BN groups", "no layer of CGBN"),
        ("learning rate", f"{result.base_lr:g}, the first {result.first_lr:g}"),
        ("warm-up", f"{result.warmup_iters:,} iterations"),
        ("iterations", f"{result.max_iter:,}, steps at {_list(result.steps) or 'none'}"),
    ]
    if groups:
        where = "inside a machine" if groups.inside_machines else "across machines"
        rows[3] = (
            "BN groups",
            f"{groups.number:,} of {groups.images} images, all {where}; the first: ranks "
            f"{_list(groups.first)}",
        )
    if epoch is None:
        rows.append(("images", "the loader is not a stream, so its order is not known"))
    else:
        each = f"{epoch.least}" if epoch.least == epoch.most else f"{epoch.least} to {epoch.most}"
        rows += [
            ("epochs", f"{result.epochs:.4g} of {epoch.images:,} images"),
            ("images that a rank reads per epoch", f"{each}, in {epoch.updates:,} updates"),
            ("ranks read different images", "yes" if epoch.is_disjoint else "NO"),
            (
                "together they read the epoch",
                ("yes" if epoch.is_complete else "NO")
                + (f", {epoch.held_back} later (by aspect ratio)" if epoch.held_back else ""),
            ),
        ]
    text = tabulate(rows, headers=("", "value"), tablefmt="pipe", disable_numparse=True)
    if result.not_checked:
        found = torch.cuda.device_count()
        here = f"{found or 'no'} GPU{'s' if found > 1 else ''}"
        text += f"\n\nNot checked, since this machine has {here}: {', '.join(result.not_checked)}."
    return text


def _start(cfg: CfgNode) -> tuple[CfgNode, Layout, float, bool, StreamSampler | None]:
    """Does on one rank what the start of a training does, up to the first step."""
    prepare_config(cfg)
    cfg = Trainer.auto_scale_workers(cfg, dist.get_world_size())
    if cfg.MEGDET.AUTO_MICRO_BATCH:
        cfg = with_micro_batch(cfg, possible_micro_batches(cfg)[-1])  # if the memory allows it
    layout = Layout.from_config(cfg)
    reads = ModelReads(Trainer.build_model)
    model = reads(cfg)
    optimizer = Trainer.build_optimizer(cfg, model)
    loader = Trainer.build_train_loader(cfg)
    Trainer.build_lr_scheduler(cfg, optimizer)
    check_model_classes(cfg, reads.keys)
    Trainer.check_evaluators(cfg)
    check_base_lr(cfg, optimizer, Trainer.__name__)
    first_lr = max(group["lr"] for group in optimizer.param_groups)
    return cfg, layout, first_lr, bool(cgbn_layers(model)), find_stream(loader)


def _group(cfg: CfgNode, layout: Layout, rank: int) -> tuple[int, ...]:
    """Returns the ranks of the BN group that this rank forms."""
    keys = cfg.MODEL.CGBN
    layer = CrossGPUBatchNorm(1)
    set_bn_size(layer, keys.BN_SIZE, layout.images_per_gpu, keys.CROSS_MACHINE)
    group: Any = layer.process_group
    return (rank,) if isinstance(group, SelfGroup) else tuple(dist.get_process_group_ranks(group))


def _summarise_groups(groups: Sequence[tuple[int, ...]], layout: Layout, gpus: int) -> Groups:
    for rank, group in enumerate(groups):
        for other in group:
            if rank not in group or groups[other] != group:
                raise RuntimeError(
                    f"the BN group of rank {rank} is {group}, and that of rank {other} is "
                    f"{groups[other]}; please report this with your config"
                )
    inside = all(group[0] // gpus == group[-1] // gpus for group in groups)
    images = len(groups[0]) * layout.images_per_gpu
    return Groups(len(set(groups)), images, groups[0], inside)


def _cut(stream: StreamSampler, layout: Layout) -> list[tuple[list, list]]:
    """Returns the micro-batches of all ranks in the updates of one epoch."""
    updates = -(-stream.size // layout.batch_size)
    micro_batches = updates * layout.accumulation_steps * layout.processes
    return list(itertools.islice(stream.micro_batches(), micro_batches))


class _CutStream(StreamSampler):
    """A rank's part of a stream that is cut already, since cutting it for each rank takes long."""

    def __init__(self, stream: StreamSampler, cut: list[tuple[list, list]]):
        super().__init__(stream.stock, stream.images_per_gpu, stream.seed, stream.size)
        self._cut = cut

    def micro_batches(self) -> Iterator[tuple[list, list]]:
        return iter(self._cut)

    def places(self) -> list[int]:
        """Returns the places in the stream that this rank takes."""
        return [position for batch in self.own_batches() for position, _ in batch]


def _summarise_epoch(
    taken: Sequence[Sequence[int]], cut: list[tuple[list, list]], layout: Layout, images: int
) -> Epoch:
    everything = [position for places in taken for position in places]
    read = set(everything)
    held = {position for position, _ in cut[-1][1] if position < images}
    lengths = [len(places) for places in taken]
    return Epoch(
        images,
        len(cut) // (layout.accumulation_steps * layout.processes),
        min(lengths),
        max(lengths),
        len(read) == len(everything),
        len(held),
        set(range(images)) - read == held,
    )


def _list(ranks: Sequence[int]) -> str:
    if len(ranks) > 3 and ranks == tuple(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]} to {ranks[-1]}"
    return ", ".join(map(str, ranks))
