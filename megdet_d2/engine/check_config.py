"""The checks between merging and freezing a config: bad input ends here, not in training."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from megdet_d2.data import Inspection, register_datasets
from megdet_d2.data.backend import find_backend_fault
from megdet_d2.data.coco import left_to_mapper
from megdet_d2.data.finding import raise_findings
from megdet_d2.memory import check_stages
from megdet_d2.modeling.tta import check_tta
from megdet_d2.norm.configure import group_ranks
from megdet_d2.norm.functional import ALGORITHMS
from megdet_d2.norm.registry import uses_cgbn
from megdet_d2.schedule.build import (
    images_per_micro_batch,
    refuse_solver_overrides,
    scale_config,
)

from .advice import count_images, find_schedule_faults
from .auto_micro_batch import possible_micro_batches
from .best import check_best
from .coco_api import find_coco_api_fault
from .disk import check_output_dir
from .early_log import kept_log
from .input_keys import find_input_faults
from .launch import limit_waiting
from .modulation import check_modulation
from .rollback import ON_DIVERGENCE
from .same_config import check_same_config
from .switches import check_switches

logger = logging.getLogger(__name__)


def prepare_config(cfg: CfgNode, eval_only: bool = False, opts: Sequence[str] = ()) -> str:
    """Chooses the device, registers and checks the data sets, checks values, resolves the schedule.

    Every process has to call it, after the last change of ``cfg``.

    Args:
        cfg: a config with the keys of ``add_megdet_config``, not frozen; changed in place.
        eval_only: skip the keys that only a training uses.
        opts: the command line's overrides, which ``cfg`` already contains; no longer used.

    Returns:
        the table of ``scale_config``, for the log.

    Raises:
        FileNotFoundError: a file of the weights or of a data set is missing.
        OSError: OUTPUT_DIR cannot be written.
        ValueError: a value is not valid, or processes differ in config or code. The message names
            the key, the value and the fix.
    """
    _check_faults(cfg)  # before TIMEOUT is used
    limit_waiting(cfg.MEGDET.TIMEOUT)
    with kept_log():
        schedule = _prepare(cfg, eval_only)
    check_same_config(cfg, eval_only=eval_only)
    return schedule


def _prepare(cfg: CfgNode, eval_only: bool) -> str:
    check_keys(cfg, eval_only)
    raise_findings(find_input_faults(cfg, eval_only))
    if eval_only:
        _register_datasets(cfg, ("TEST",))
        return ""
    found = _register_datasets(cfg, ("TRAIN", "TEST"))
    check_best(cfg)
    schedule = scale_config(cfg)
    if cfg.MEGDET.OPTIMIZER == "agvm" and not cfg.MEGDET.AUTO_MICRO_BATCH:
        check_modulation(cfg)
    raise_findings(find_schedule_faults(cfg, count_images(cfg, found)))
    if uses_cgbn(cfg):
        world_size = comm.get_world_size()
        scaled = DefaultTrainer.auto_scale_workers(cfg, world_size)
        # Only for errors: the groups are made when there is a model.
        if cfg.MEGDET.AUTO_MICRO_BATCH:
            possible_micro_batches(scaled)
            return schedule
        images_per_gpu = images_per_micro_batch(scaled, world_size)
        group_ranks(cfg.MODEL.CGBN.BN_SIZE, images_per_gpu, cfg.MODEL.CGBN.CROSS_MACHINE)
    return schedule


def check_keys(cfg: CfgNode, eval_only: bool = False) -> None:
    """Checks the keys that depend on no data set. MODEL.DEVICE becomes "cpu" without a GPU.

    Args, Raises: see ``prepare_config``.
    """
    _check_faults(cfg)
    _check_device(cfg)
    check_switches(cfg, eval_only)
    check_output_dir(cfg.OUTPUT_DIR)
    # A resume does not need the weights.
    if eval_only or not Path(cfg.OUTPUT_DIR, "last_checkpoint").is_file():
        _check_weights(cfg.MODEL.WEIGHTS)
    if cfg.MODEL.CGBN.ALGORITHM not in ALGORITHMS:
        raise ValueError(
            f"MODEL.CGBN.ALGORITHM is {cfg.MODEL.CGBN.ALGORITHM!r}; "
            f"use one of {', '.join(ALGORITHMS)}"
        )
    check_stages(cfg.MODEL.SUBLINEAR.STAGES)
    if fault := find_backend_fault(cfg.INPUT.BACKEND):
        raise ValueError(fault)
    if fault := find_coco_api_fault(cfg.TEST.COCO_API):
        raise ValueError(fault)
    if cfg.DATALOADER.PREFETCH_FACTOR < 1:
        raise ValueError(
            f"DATALOADER.PREFETCH_FACTOR is {cfg.DATALOADER.PREFETCH_FACTOR}; give 1 or more"
        )
    if cfg.DATALOADER.CACHE_MB < 0:
        raise ValueError(
            f"DATALOADER.CACHE_MB is {cfg.DATALOADER.CACHE_MB}; give 0 for no cache, or megabytes "
            "for each process of the loader"
        )
    check_tta(cfg)
    if not eval_only:
        refuse_solver_overrides(cfg)
        _check_checkpoint_period(cfg)


def _register_datasets(cfg: CfgNode, splits: Sequence[str]) -> list[Inspection]:
    """Registers and checks the data sets; one process of each machine looks at the images.

    Raises:
        FileNotFoundError, ValueError: in every process, what the first of them has found.
    """
    alone = comm.get_world_size() == 1
    first = alone or comm._LOCAL_PROCESS_GROUP is None or comm.get_local_rank() == 0
    found, error = [], None
    try:
        found = register_datasets(cfg, splits, images=first)
    except (FileNotFoundError, ValueError) as refused:
        error = refused
    left = {item.name: item.by_mapper for item in found if item.by_mapper}
    for other_error, other_left in comm.all_gather((error, left)):
        if other_error is not None:
            raise error or other_error
        left_to_mapper.update(other_left)
    return found


def _check_faults(cfg: CfgNode) -> None:
    keys = cfg.MEGDET
    if keys.ON_DIVERGENCE not in ON_DIVERGENCE:
        raise ValueError(
            f"MEGDET.ON_DIVERGENCE is {keys.ON_DIVERGENCE!r}; use one of {', '.join(ON_DIVERGENCE)}"
        )
    if keys.MAX_ROLLBACKS < 0:
        raise ValueError(f"MEGDET.MAX_ROLLBACKS is {keys.MAX_ROLLBACKS}; give 0 or more")
    if keys.TIMEOUT < 1:
        raise ValueError(f"MEGDET.TIMEOUT is {keys.TIMEOUT}; give seconds, from 1 (default: 600)")


def _check_checkpoint_period(cfg: CfgNode) -> None:
    """Checks what fvcore divides by after each update: below 0 it would save in every one."""
    period = cfg.SOLVER.CHECKPOINT_PERIOD
    if period < 1:
        raise ValueError(
            f"SOLVER.CHECKPOINT_PERIOD is {period}; give iterations, 1 or more. A number above the "
            "length of the training, such as 1000000000, saves at its end only"
        )


def _check_device(cfg: CfgNode) -> None:
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        if comm.is_main_process():
            logger.warning("MODEL.DEVICE is %r and there is no GPU: using cpu", cfg.MODEL.DEVICE)
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE != "cpu":
        return
    if dist.is_initialized() and dist.get_backend() == "nccl":
        raise ValueError(
            "MODEL.DEVICE is 'cpu', but the launcher has chosen NCCL because this machine has "
            "GPUs, and NCCL cannot send CPU tensors; hide the GPUs: "
            "CUDA_VISIBLE_DEVICES= python train_net.py ..."
        )


def _check_weights(weights: str) -> None:
    path = weights.split("?")[0]  # Detectron2 takes options after the path
    if path and "://" not in path and not PathManager.isfile(path):
        raise FileNotFoundError(
            f"MODEL.WEIGHTS: there is no file {path!r}; give the path of a checkpoint, or "
            '"" to start from scratch'
        )
