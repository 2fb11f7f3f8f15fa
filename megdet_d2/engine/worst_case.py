"""Makes the training image that takes the most memory: the largest, with the most objects."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances

from megdet_d2.data.mapping import Mapper
from megdet_d2.data.records import load_training_records

_TRIES = 20  # images, since a mapper may refuse some


def worst_image(cfg: CfgNode, mapper: Mapper) -> dict[str, Any]:
    """Returns a model's input of the size of the largest image, with the most objects.

    The image with the most objects goes through the mapper, so that masks, keypoints and fields of
    a project are there. Then noise of the largest padded size takes the place of its pixels. With
    masks or keypoints the objects are repeated, until as many regions are positive as may be.

    Args:
        cfg: a config whose data sets are registered.
        mapper: of the training.

    Raises:
        ValueError: the mapper refuses the images.
    """
    proposals = cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None
    records = load_training_records(cfg, proposals)
    busiest = sorted(records, key=lambda record: -len(record.get("annotations", ())))[:_TRIES]
    mapped = (mapper(copy.deepcopy(record)) for record in busiest)
    image = next((image for image in mapped if image is not None), None)
    if image is None:
        raise ValueError(
            f"MEGDET.AUTO_MICRO_BATCH: the mapper returns None for the {len(busiest)} images with "
            "the most objects; set MEGDET.AUTO_MICRO_BATCH False and MEGDET.ACCUMULATION_STEPS"
        )
    return enlarge(cfg, image, largest_shape(cfg, records))


def enlarge(cfg: CfgNode, image: dict[str, Any], shape: Sequence[int]) -> dict[str, Any]:
    """Returns a copy of a model's input with noise of at least ``shape``, and more objects."""
    pixels = image["image"]
    height, width = (max(pair) for pair in zip(shape, pixels.shape[-2:], strict=True))
    noise = torch.randint(0, 256, (*pixels.shape[:-2], height, width)).to(pixels.dtype)
    larger = {**image, "image": noise}
    if "sem_seg" in image:
        larger["sem_seg"] = image["sem_seg"].new_zeros(height, width)
    instances = image.get("instances")
    if (cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON) and instances is not None and len(instances):
        heads = cfg.MODEL.ROI_HEADS
        positive = int(heads.BATCH_SIZE_PER_IMAGE * heads.POSITIVE_FRACTION)
        times = -(-positive // len(instances))
        larger["instances"] = Instances.cat([instances] * max(1, times))
    return larger


def largest_shape(cfg: CfgNode, records: Iterable[dict[str, Any]]) -> tuple[int, int]:
    """Returns the height and width to which a batch may be padded at most.

    Args:
        cfg: a config.
        records: of the training set. Where one does not know its size, or where random crops change
            the shapes, the bound follows from INPUT alone.
    """
    short, long = max(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN
    sizes: set[tuple[Any, Any]] = {
        (record.get("height"), record.get("width")) for record in records
    }
    if cfg.INPUT.CROP.ENABLED and short or not all(h and w for h, w in sizes):
        short = min(short or long, long)
        shapes = [(short, long), (long, short)]
    else:
        shapes = [_resized(h, w, short, long) for h, w in sizes]
    # Detectron2 groups by this condition.
    wide = [shape for shape in shapes if shape[1] > shape[0]]
    tall = [shape for shape in shapes if shape[1] <= shape[0]]
    batches = [wide, tall] if cfg.DATALOADER.ASPECT_RATIO_GROUPING else [shapes]
    padded = [(max(h for h, _ in b), max(w for _, w in b)) for b in batches if b]
    return max(padded, key=lambda shape: shape[0] * shape[1])


def _resized(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """Returns the size of an image after Detectron2's ``ResizeShortestEdge``."""
    if not short:
        return height, width
    scale = short / min(height, width)
    scale *= min(1.0, long / (scale * max(height, width)))
    return int(height * scale + 0.5), int(width * scale + 0.5)
