"""The builders of an evaluation: the test loader, and the evaluators of a data set's type."""

import logging
import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.utils.logger import log_first_n
from torch.utils.data import DataLoader

from megdet_d2.data.backend import apply_backend, pins_memory
from megdet_d2.data.coco import refuse_unreadable
from megdet_d2.data.mapping import CheckedMapper, Mapper
from megdet_d2.data.stream import shield_loader_worker

from .ap_limits import find_crowded_images
from .coco_api import HotcocoEvaluator
from .panoptic import OutputEvaluator, PanopticEvaluator, load_labels, pq_library

logger = logging.getLogger(__name__)

NO_PQ = (
    "it is a panoptic set, and neither hotcoco nor panopticapi is installed: PQ is not reported, "
    "only what needs neither (mIoU, AP of boxes and masks)",
    "pip install hotcoco",
)
"""Problem and fix where no library computes PQ."""


def build_test_loader(cfg: CfgNode, dataset_name: str, mapper: Mapper) -> DataLoader:
    """Builds Detectron2's test loader; an image that cannot be read raises ``BadImageError``."""
    refuse_unreadable([dataset_name], mapper)
    checked = CheckedMapper(apply_backend(mapper, cfg.INPUT.BACKEND))
    loader = build_detection_test_loader(cfg, dataset_name, mapper=checked)
    loader.pin_memory = pins_memory(cfg)
    if loader.num_workers:
        loader.prefetch_factor = cfg.DATALOADER.PREFETCH_FACTOR
        loader.timeout = cfg.MEGDET.TIMEOUT
        loader.worker_init_fn = shield_loader_worker
    return loader


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_dir: str | None = None
) -> DatasetEvaluator:
    """Builds the evaluator of the data set's type.

    The types are COCO, COCO panoptic, LVIS, Pascal VOC, Cityscapes and semantic segmentation. A
    panoptic set has PQ, mIoU and the AP of boxes and masks, each if the model returns it. With
    several test sets each gets a folder of its name, since they would overwrite each other.

    Args:
        cfg: a config.
        dataset_name: a registered data set.
        output_dir: folder of the detections; None stands for OUTPUT_DIR/inference.

    Raises:
        NotImplementedError: another type. Detectron2 then warns, and trains on.
    """
    metadata = MetadataCatalog.get(dataset_name)
    kind = metadata.get("evaluator_type", None)
    output_dir = output_dir or os.path.join(cfg.OUTPUT_DIR, "inference")
    if len(cfg.DATASETS.TEST) > 1:
        output_dir = os.path.join(output_dir, dataset_name)
    panoptic = kind == "coco_panoptic_seg"
    built: list[DatasetEvaluator] = []
    if kind == "sem_seg" or (panoptic and metadata.get("sem_seg_root", None)):
        evaluator = SemSegEvaluator(
            dataset_name, output_dir=output_dir, sem_seg_loading_fn=load_labels
        )
        built.append(OutputEvaluator(evaluator, "sem_seg"))
    if kind == "coco" or (panoptic and metadata.get("json_file", None)):
        sigmas = list(cfg.TEST.KEYPOINT_OKS_SIGMAS)
        coco = HotcocoEvaluator if cfg.TEST.COCO_API == "hotcoco" else COCOEvaluator
        of_coco = coco(dataset_name, output_dir=output_dir, kpt_oks_sigmas=sigmas)
        for finding in find_crowded_images(cfg, dataset_name, of_coco._coco_api.dataset):
            log_first_n(logging.WARNING, str(finding), name=__name__, key="message")
        built.append(of_coco)
    if panoptic and pq_library():
        built.append(OutputEvaluator(PanopticEvaluator(dataset_name, output_dir), "panoptic_seg"))
    elif panoptic:
        logger.warning(f"DATASETS.TEST {dataset_name!r}: {'; '.join(NO_PQ)}")
    if kind == "lvis":
        built.append(LVISEvaluator(dataset_name, output_dir=output_dir))
    if kind == "pascal_voc":
        built.append(PascalVOCDetectionEvaluator(dataset_name))
    if kind == "cityscapes_instance":
        built.append(CityscapesInstanceEvaluator(dataset_name))
    if kind == "cityscapes_sem_seg":
        built.append(CityscapesSemSegEvaluator(dataset_name))
    if not built:
        raise NotImplementedError(no_evaluator(dataset_name))
    return built[0] if len(built) == 1 else DatasetEvaluators(built)


def no_evaluator(dataset_name: str) -> str:
    """Returns the message for a data set whose type has no evaluator."""
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    return (
        f"DATASETS.TEST has {dataset_name!r} of evaluator_type {kind!r}; override "
        "Trainer.build_evaluator to evaluate it"
    )
