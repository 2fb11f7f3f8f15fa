"""Data sets from config: the user's COCO json files, and the embedded digits."""

from collections.abc import Sequence

from detectron2.config import CfgNode

from .coco import Inspection, check_datasets, inspect_coco, inspect_datasets, register_coco
from .digits import register_digits
from .finding import Finding

__all__ = [
    "Finding",
    "Inspection",
    "check_datasets",
    "inspect_coco",
    "inspect_datasets",
    "register_coco",
    "register_datasets",
    "register_digits",
]


def register_datasets(
    cfg: CfgNode, splits: Sequence[str] = ("TRAIN", "TEST"), images: bool = True
) -> list[Inspection]:
    """Registers the data sets of ``DATASETS.COCO`` and ``DATASETS.DIGITS``; checks those in use.

    Args:
        splits: the keys of ``DATASETS`` that are in use.
        images: whether to look for the image files and into their headers.

    Returns:
        what is known of each data set, see ``inspect_datasets``.

    Raises:
        ValueError, FileNotFoundError: see ``check_datasets``.
    """
    digits = cfg.DATASETS.DIGITS
    register_digits(
        image_size=digits.IMAGE_SIZE,
        num_train=digits.NUM_TRAIN,
        num_val=digits.NUM_VAL,
        difficulty=digits.DIFFICULTY,
    )
    register_coco(cfg.DATASETS.COCO, cfg.MODEL.MASK_ON)
    return check_datasets(cfg, splits, images)
