"""The builders of an evaluation: the test loader, and the evaluator of a data set's type."""

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
)
from torch.utils.data import DataLoader

from megdet_d2.data.mapping import CheckedMapper, Mapper
from megdet_d2.data.stream import shield_loader_worker


def build_test_loader(cfg: CfgNode, dataset_name: str, mapper: Mapper) -> DataLoader:
    """Builds Detectron2's test loader; an image that cannot be read raises ``BadImageError``."""
    loader = build_detection_test_loader(cfg, dataset_name, mapper=CheckedMapper(mapper))
    if loader.num_workers:
        loader.timeout = cfg.MEGDET.TIMEOUT
        loader.worker_init_fn = shield_loader_worker
    return loader


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_dir: str | None = None
) -> DatasetEvaluator:
    """Builds the evaluator of the data set's type: COCO, LVIS or Pascal VOC.

    With several test sets each gets a folder of its name, since they would overwrite each other.

    Args:
        cfg: a config.
        dataset_name: a registered data set.
        output_dir: folder of the detections; None stands for OUTPUT_DIR/inference.

    Raises:
        NotImplementedError: another type. Detectron2 then warns, and trains on.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    output_dir = output_dir or os.path.join(cfg.OUTPUT_DIR, "inference")
    if len(cfg.DATASETS.TEST) > 1:
        output_dir = os.path.join(output_dir, dataset_name)
    if kind in ("coco", "coco_panoptic_seg"):
        return COCOEvaluator(dataset_name, output_dir=output_dir)
    if kind == "lvis":
        return LVISEvaluator(dataset_name, output_dir=output_dir)
    if kind == "pascal_voc":
        return PascalVOCDetectionEvaluator(dataset_name)
    raise NotImplementedError(
        f"DATASETS.TEST has {dataset_name!r} of evaluator_type {kind!r}; override "
        "Trainer.build_evaluator to evaluate it"
    )
