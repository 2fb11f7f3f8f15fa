"""Counts the images of a config's data sets, and the pixels that the model gets of each."""

import logging
from dataclasses import dataclass
from statistics import mean

from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts

from megdet_d2.data import register_datasets
from megdet_d2.data.records import load_training_records
from megdet_d2.modeling.tta import TrainedFlipMapperTTA

from .stragglers import ASPECTS

logger = logging.getLogger(__name__)

COCO_TRAIN, COCO_VAL = 118_287, 5_000
"""Images of COCO's train2017 and val2017."""


@dataclass(frozen=True)
class TrainingImages:
    """The images of a training.

    Attributes:
        count: of an epoch.
        megapixels: that the model gets of a training image, on average.
        test_megapixels: the same of a test image.
        test: images of all test sets.
        notes: sentences about numbers that are assumed.
        are_here: the training set is on this machine.
        augmented_megapixels: of a test image in all its versions of TEST.AUG together; 0 without.
    """

    count: int
    megapixels: float
    test_megapixels: float
    test: int
    notes: tuple[str, ...] = ()
    are_here: bool = False
    augmented_megapixels: float = 0.0


def count_images(cfg: CfgNode, given: int | None = None) -> TrainingImages:
    """Returns the images of DATASETS.TRAIN and TEST, as a training reads them.

    Args:
        cfg: a config that is not frozen.
        given: images of an epoch, for a machine without the data.

    Raises:
        FileNotFoundError: a data set of the user is not there, and no number is given.
        ValueError: the data or the config has an error.
    """
    notes: list[str] = []
    found = _load(cfg, "TRAIN", given, notes)
    tested = _load(cfg, "TEST", 0, notes)
    if given is not None:
        count = given
    elif cfg.MEGDET.EPOCH_IMAGES:
        count = cfg.MEGDET.EPOCH_IMAGES
    elif found is not None:
        count = len(found)
    else:
        count = COCO_TRAIN
    if count < 1:
        raise ValueError(f"an epoch has {count} images; give 1 or more by --images")
    if given is not None and cfg.MEGDET.EPOCH_IMAGES not in (0, given):
        notes.append(
            f"--images {given} counts, and not MEGDET.EPOCH_IMAGES {cfg.MEGDET.EPOCH_IMAGES}: the "
            f"launch line sets MEGDET.EPOCH_IMAGES {given}."
        )
    if found is None and given is None:
        number = "MEGDET.EPOCH_IMAGES" if cfg.MEGDET.EPOCH_IMAGES else "COCO's train2017"
        notes.append(
            f"DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)} is not on this machine: an epoch is "
            f"counted as {count:,} images ({number}; or give --images), of COCO's shapes."
        )
    test = len(tested) if tested is not None else 0
    if tested is None and any(name.startswith("coco_2017_val") for name in cfg.DATASETS.TEST):
        test = COCO_VAL
    elif tested is None and cfg.DATASETS.TEST:
        notes.append(f"DATASETS.TEST {tuple(cfg.DATASETS.TEST)} is not here: no evaluation counts.")
    size = cfg.INPUT
    shapes = [(row["height"], row["width"]) for row in found or () if row.get("height")]
    test_shapes = [(row["height"], row["width"]) for row in tested or () if row.get("height")]
    sides = list(size.MIN_SIZE_TRAIN)
    if size.MIN_SIZE_TRAIN_SAMPLING == "range" and len(sides) == 2:
        sides = [sides[0], sum(sides) / 2, sides[1]]
    return TrainingImages(
        count,
        mean(mean_megapixels(shapes, side, size.MAX_SIZE_TRAIN) for side in sides),
        mean_megapixels(test_shapes, size.MIN_SIZE_TEST, size.MAX_SIZE_TEST),
        test,
        tuple(notes),
        found is not None,
        _augmented_megapixels(cfg, test_shapes),
    )


def _augmented_megapixels(cfg: CfgNode, shapes: list[tuple[int, int]]) -> float:
    if not cfg.TEST.AUG.ENABLED:
        return 0.0
    versions = TrainedFlipMapperTTA(cfg)
    return (1 + versions.flip) * sum(
        mean_megapixels(shapes, side, versions.max_size) for side in versions.min_sizes
    )


def mean_megapixels(shapes: list[tuple[int, int]], shortest: float, longest: float) -> float:
    """Returns the mean size of images after Detectron2's ResizeShortestEdge.

    Args:
        shapes: heights and widths; without any, COCO-like aspects.
        shortest: pixels of the shorter side; 0 keeps the image as it is.
        longest: pixels that the longer side has at most.
    """
    if not shortest:
        return mean(h * w for h, w in shapes or [(480, 640)]) / 1e6
    ratios = {max(h, w) / min(h, w): 0.0 for h, w in shapes}
    for h, w in shapes:
        ratios[max(h, w) / min(h, w)] += 1 / len(shapes)
    if not shapes:
        ratios = {}
        for aspect, share in ASPECTS.items():
            ratio = max(aspect, 1 / aspect)
            ratios[ratio] = ratios.get(ratio, 0.0) + share
    return sum(
        share * min(shortest, longest / ratio) ** 2 * ratio for ratio, share in ratios.items()
    ) / (1e6 * sum(ratios.values()))


def _load(cfg: CfgNode, split: str, given: int | None, notes: list[str]) -> list[dict] | None:
    """Returns the records of a split; None where they are not on this machine."""
    names = tuple(cfg.DATASETS[split])
    if not names:
        return [] if split == "TEST" else None
    try:
        register_datasets(cfg, (split,), images=False)
    except FileNotFoundError as error:
        stock = all(name.startswith("coco_") for name in names)
        if given is None and not stock:
            raise FileNotFoundError(f"{error}. To plan without the data, give --images") from None
        return None
    if split == "TRAIN":
        return load_training_records(cfg)
    return get_detection_dataset_dicts(names, filter_empty=False, check_consistency=False)
