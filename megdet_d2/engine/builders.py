"""The class methods of a trainer: build the parts of a training from a config, and evaluate."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import nn
from torch.utils.data import DataLoader

from megdet_d2.data.finding import Finding, raise_findings
from megdet_d2.data.mapping import Mapper
from megdet_d2.data.stream import build_train_loader
from megdet_d2.memory import checkpoint_stages
from megdet_d2.modeling.tta import build_tta
from megdet_d2.norm.batch_norm import cgbn_layers
from megdet_d2.norm.configure import configure_cgbn, group_ranks
from megdet_d2.norm.running_statistics import averaged_statistics
from megdet_d2.optim.build import build_optimizer
from megdet_d2.schedule.build import build_lr_scheduler, images_per_micro_batch

from .check_evaluation import CLASS_FAULTS, inspect_evaluation
from .compiled import prepare_model
from .ema import SUFFIX
from .evaluation import build_evaluator, build_test_loader
from .overrides import accepts, check_tta_method, overrides
from .saved_classes import find_other_classes, read_classes

logger = logging.getLogger(__name__)

OWN_DATA = ("build_train_loader", "build_mapper")
"""Methods by which a project may give the model other images or classes than the data set's."""
OWN_EVALUATION = ("build_evaluator", "test")
"""Methods by which a project may compare the model's classes with the data set's in its own way."""


class Builders(DefaultTrainer):
    """The class methods of ``Trainer``, each of which a subclass may override.

    They need a config and no trainer: ``Trainer.build_model(cfg)`` builds a model for evaluation.
    """

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Builds the model with every ``MODEL.CGBN`` and ``MODEL.SUBLINEAR`` key applied.

        ``MODEL.CHANNELS_LAST`` and ``MODEL.COMPILE`` are applied too.
        Every process has to call it. Where the processes cannot form groups of BN_SIZE images, as
        in an evaluation on fewer GPUs, it warns and leaves one group per machine. The constructor
        of a ``Trainer`` raises there.
        """
        model = super().build_model(cfg)
        if cgbn_layers(model):
            configured, images_per_gpu = _fit_bn_size(cfg)
            configure_cgbn(model, configured, images_per_gpu)
        if cfg.MODEL.SUBLINEAR.ENABLED:
            checkpoint_stages(model, cfg.MODEL.SUBLINEAR.STAGES)
        return prepare_model(model, cfg)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Builds the optimizer of ``MEGDET.OPTIMIZER``; see ``megdet_d2.build_optimizer``."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(
        cls, cfg: CfgNode, optimizer: torch.optim.Optimizer
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Builds the scheduler; see ``megdet_d2.build_lr_scheduler``."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_mapper(cls, cfg: CfgNode, is_train: bool) -> Mapper:
        """Builds the mapper, which turns an entry of a data set into an input of the model.

        A subclass with its own mapper or augmentations overrides this method. Resumes stay exact.

        Args:
            cfg: a config.
            is_train: True for the training set, False for a test set.
        """
        return DatasetMapper(cfg, is_train=is_train)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, mapper: Mapper | None = None) -> DataLoader:
        """Builds Detectron2's loader over a stream of images whose place a checkpoint has.

        Args:
            cfg: a config.
            mapper: in place of that of ``build_mapper``.
        """
        images_per_gpu = images_per_micro_batch(cfg, comm.get_world_size())
        return build_train_loader(cfg, images_per_gpu, mapper or cls.build_mapper(cfg, True))

    @classmethod
    def build_test_loader(
        cls, cfg: CfgNode, dataset_name: str, mapper: Mapper | None = None
    ) -> DataLoader:
        """Builds Detectron2's loader; an image that cannot be read raises ``BadImageError``.

        Args:
            cfg: a config.
            dataset_name: a registered data set.
            mapper: in place of that of ``build_mapper``.
        """
        return build_test_loader(cfg, dataset_name, mapper or cls.build_mapper(cfg, False))

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_dir: str | None = None
    ) -> DatasetEvaluator:
        """Builds the evaluator of the data set's type; see ``engine.evaluation``."""
        return build_evaluator(cfg, dataset_name, output_dir)

    @classmethod
    def check_evaluators(cls, cfg: CfgNode) -> None:
        """Checks what the evaluators need, which would else be found after the training.

        A subclass with its own ``build_evaluator`` or ``test`` is not checked.

        Raises:
            FileNotFoundError, ValueError: an evaluation of DATASETS.TEST would fail, or
                ``test_with_tta`` takes no suffix where the average needs one.
        """
        check_tta_method(cfg, cls)
        if overrides(cls, Builders, *OWN_EVALUATION):
            return
        raise_findings(cls._softened(inspect_evaluation(cfg)))

    @classmethod
    def check_saved_classes(
        cls, cfg: CfgNode, classes: Sequence[str] | None, checkpoint: str = "MODEL.WEIGHTS"
    ) -> None:
        """Compares the classes of a checkpoint with those of DATASETS.TEST.

        Args:
            cfg: a config.
            classes: the names in the checkpoint; None if it has none.
            checkpoint: its name in messages.

        Raises:
            ValueError: a set has them in another order or number. A subclass that may map classes
                by its methods gets a warning.
        """
        if not classes:  # then the sets are not read
            return
        raise_findings(
            cls._softened(
                finding
                for name in cfg.DATASETS.TEST
                for finding in find_other_classes(
                    f"DATASETS.TEST {name!r}", read_classes(name), checkpoint, classes
                )
            )
        )

    @classmethod
    def _softened(cls, findings: Iterable[Finding]) -> Iterator[Finding]:
        """Yields faults of classes as warnings where a method of the user may merge classes."""
        soft = CLASS_FAULTS if overrides(cls, Builders, *OWN_DATA, *OWN_EVALUATION) else ()
        for finding in findings:
            yield replace(finding, level="warning") if finding.kind in soft else finding

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None
    ) -> dict[str, Any]:
        """Evaluates the model with the mean of the BN groups' running statistics.

        Every process has to call it.
        """
        with averaged_statistics(model):
            return super().test(cfg, model, evaluators)

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module, suffix: str = "") -> dict[str, Any]:
        """Evaluates the model with the augmentation of ``TEST.AUG``.

        Args:
            suffix: "_EMA" for the averaged model, which goes before "_TTA" in all names.

        Returns:
            results by name: "bbox_TTA" in place of "bbox". Files are in OUTPUT_DIR/inference_TTA.
        """
        cfg = cfg.clone()
        cfg.defrost()
        cfg.INPUT.MIN_SIZE_TEST = 0  # each scale is made from the file's pixels, in one step
        return cls._test_aside(cfg, build_tta(cfg, model), f"{suffix}_TTA")

    @classmethod
    def test_ema(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluates the averaged model of ``MEGDET.EMA_DECAY``.

        Returns:
            results by name: "bbox_EMA" in place of "bbox". Files are in OUTPUT_DIR/inference_EMA.
        """
        return cls._test_aside(cfg, model, SUFFIX)

    @classmethod
    def _test_aside(cls, cfg: CfgNode, model: nn.Module, suffix: str) -> dict[str, Any]:
        """Evaluates with files in OUTPUT_DIR/inference{suffix}; names of results get the suffix."""
        folder = os.path.join(cfg.OUTPUT_DIR, f"inference{suffix}")
        evaluators = cls._build_evaluators(cfg, folder)
        if evaluators is None:
            PathManager.mkdirs(folder)
            cfg = cfg.clone()
            cfg.defrost()
            cfg.OUTPUT_DIR = folder
            results = cls.test(cfg, model)
        else:
            results = cls.test(cfg, model, evaluators)
        return {f"{name}{suffix}": result for name, result in (results or {}).items()}

    @classmethod
    def _build_evaluators(cls, cfg: CfgNode, folder: str) -> list[DatasetEvaluator] | None:
        """Builds the evaluators of all test sets; None where ``test`` has to build them.

        It has to where a project overrides a method with ``DefaultTrainer``'s arguments or fewer,
        and where a set has no evaluator, which ``test`` leaves out.
        """
        takes_folder = accepts(cls.build_evaluator, cfg, "", folder)
        if not takes_folder or not accepts(cls.test, cfg, None, []):
            return None
        try:
            return [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        except NotImplementedError:
            return None


def _fit_bn_size(cfg: CfgNode) -> tuple[CfgNode, int]:
    """Returns a config whose BN_SIZE the processes can form, and the images per GPU."""
    keys = cfg.MODEL.CGBN
    try:
        images_per_gpu = images_per_micro_batch(cfg, comm.get_world_size())
        group_ranks(keys.BN_SIZE, images_per_gpu, keys.CROSS_MACHINE)
        return cfg, images_per_gpu
    except ValueError as error:
        logger.warning(
            f"Evaluation only, with each machine as one group, since training could not do: {error}"
        )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.CGBN.BN_SIZE, cfg.MODEL.CGBN.CROSS_MACHINE = -1, False
    return cfg, 1
