"""Trains and evaluates by Detectron2's command line, for ``megdet train`` and train_net.py."""

import argparse
import logging
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from megdet_d2 import model_zoo
from megdet_d2.config import load_config

from .check_config import prepare_config
from .disk import naming_output_dir
from .early_log import write_kept_log
from .ema import SUFFIX, build_average, load_average
from .launch import launch
from .precision import set_float32_precision
from .saved_classes import saved_names
from .trainer import Trainer
from .weights_only import WeightsOnlyCheckpointer

logger = logging.getLogger(__name__)


def read_config(args: argparse.Namespace) -> CfgNode:
    """Reads the config of the command line. Its schedule is not resolved.

    Args:
        args: Detectron2's. ``config_file`` is a path, or the name of a config in ``model_zoo``; ""
            leaves every key at its default.

    Raises:
        FileNotFoundError: there is no such config.
        ValueError: the file is not valid, or an override is not.
    """
    return load_config(find_config(args.config_file), args.opts)


def setup(args: argparse.Namespace) -> CfgNode:
    """Resolves and checks the config of the command line, logs it, and writes it to OUTPUT_DIR.

    Call it in every process, before anything is built. With ``--eval-only`` an existing
    OUTPUT_DIR/config.yaml stays as it is.

    Args:
        args: see ``read_config``.

    Returns:
        the config, frozen.

    Raises:
        FileNotFoundError, ValueError: see ``read_config`` and ``prepare_config``.
    """
    cfg = read_config(args)
    schedule = prepare_config(cfg, args.eval_only, args.opts)
    cfg.freeze()
    dumped = Path(cfg.OUTPUT_DIR, "config.yaml")
    trained = dumped.read_bytes() if args.eval_only and dumped.is_file() else None
    config_file = str(find_config(args.config_file) or "")  # default_setup prints the file
    with naming_output_dir(cfg.OUTPUT_DIR):
        default_setup(cfg, argparse.Namespace(**{**vars(args), "config_file": config_file}))
    if trained is not None and comm.is_main_process():
        dumped.write_bytes(trained)  # an evaluation leaves keys unresolved that a training resolves
    logger = setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="megdet_d2")
    write_kept_log()
    if schedule:
        logger.info("The schedule that follows from MEGDET.POLICY:\n%s", schedule)
    return cfg


def evaluate(
    cfg: CfgNode, resume: bool = False, trainer: type[Trainer] = Trainer
) -> dict[str, Any]:
    """Evaluates a checkpoint on DATASETS.TEST; with TEST.AUG.ENABLED by augmented tests too.

    With ``MEGDET.EMA_DECAY`` the averaged model of the checkpoint is evaluated beside the last one.

    Args:
        cfg: from ``setup``.
        resume: take the last checkpoint in OUTPUT_DIR instead of MODEL.WEIGHTS, if there is one.
        trainer: the class that builds the model, the loaders and the evaluators.

    Returns:
        the results of each task, as ``Trainer.test``.
    """
    trainer.check_evaluators(cfg)
    set_float32_precision(cfg)
    model = trainer.build_model(cfg)
    average = build_average(cfg, model)
    checkpointer = WeightsOnlyCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
    if not cfg.MODEL.WEIGHTS and not (resume and checkpointer.has_checkpoint()):
        logger.warning(
            "MODEL.WEIGHTS is '', so random weights are evaluated; set it to a checkpoint, such as "
            "OUTPUT_DIR/model_final.pth"
        )
    rest = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    trainer.check_saved_classes(cfg, saved_names(rest))
    with naming_output_dir(cfg.OUTPUT_DIR):
        results = trainer.test(cfg, model)
        average = load_average(average, rest)
        if average is not None:
            results.update(trainer.test_ema(cfg, average.model))
        if cfg.TEST.AUG.ENABLED:
            results.update(trainer.test_with_tta(cfg, model))
            if average is not None:
                results.update(trainer.test_with_tta(cfg, average.model, SUFFIX))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    """Trains in one process, or evaluates with ``--eval-only``.

    Returns:
        the results of the last evaluation; after a training only if TEST.EXPECTED_RESULTS is set.
    """
    cfg = setup(args)
    if args.eval_only:
        return evaluate(cfg, args.resume)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def run(args: argparse.Namespace) -> None:
    """Runs ``main`` in every process of the training, see ``launch``."""
    launch(main, args, timeout=read_config(args).MEGDET.TIMEOUT)


def find_config(config_file: str) -> str | Path | None:
    """Returns the path of a config, which may be the name of one of ours; None for ""."""
    if not config_file or "://" in config_file:
        return config_file or None
    return model_zoo.find(config_file)
