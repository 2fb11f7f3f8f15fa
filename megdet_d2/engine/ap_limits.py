"""Finds what keeps COCO's AP below what the detector has learned: few or confident detections."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode

from megdet_d2.data.classes import class_keys, value_of
from megdet_d2.data.finding import Finding

STOCK_THRESHOLD = 0.05
"""Detectron2's SCORE_THRESH_TEST, with which results are published."""


def find_score_threshold(cfg: CfgNode) -> Iterator[Finding]:
    """Yields a warning for each threshold that leaves out detections which AP counts."""
    for classes in class_keys(cfg, "thing"):
        key = classes.replace("NUM_CLASSES", "SCORE_THRESH_TEST")
        section: Any = value_of(cfg, classes.removesuffix(".NUM_CLASSES"))
        score = section.get("SCORE_THRESH_TEST", 0)
        if score > STOCK_THRESHOLD:
            yield Finding(
                "warning",
                "score-threshold",
                f"{key} is {score:g}",
                "",
                "the evaluation has no detections below it, so AP is lower than at Detectron2's "
                f"{STOCK_THRESHOLD:g}, with which results are published",
                f"set {key} {STOCK_THRESHOLD:g}, and filter where you show detections",
            )


def find_crowded_images(
    cfg: CfgNode, name: str, content: dict[str, Any], most_of_class: int = 100
) -> Iterator[Finding]:
    """Yields a warning if images have more objects than detections are kept and counted.

    Args:
        cfg: its ``TEST.DETECTIONS_PER_IMAGE`` is how many detections an image keeps, below 0 all.
        name: the data set.
        content: of its COCO json.
        most_of_class: detections of a class in an image that AP counts, by default as COCO's.
    """
    kept = cfg.TEST.DETECTIONS_PER_IMAGE
    if not class_keys(cfg, "thing"):  # another architecture may keep another number
        return
    objects = Counter(
        (row["image_id"], row["category_id"])
        for row in content.get("annotations", ())
        if not row.get("iscrowd")
    )
    of_images, countable = Counter[Any](), Counter[Any]()
    for (image, _), number in objects.items():
        of_images[image] += number
        countable[image] += min(number, most_of_class)
    if kept >= 0:
        countable = Counter({image: min(number, kept) for image, number in countable.items()})
    missed = of_images - countable  # those above 0
    if not missed:
        return
    crowded = [image for image, _ in missed.most_common()]
    fixes = []
    if 0 <= kept < max(of_images.values()):
        fixes.append(f"set TEST.DETECTIONS_PER_IMAGE {max(of_images.values())}")
    if (largest := max(objects.values())) > most_of_class:
        fixes.append(
            "for an AP that counts more, which is not COCO's, override Trainer.build_evaluator "
            f"with Detectron2's COCOEvaluator(..., max_dets_per_image={largest})"
        )
    yield Finding(
        "warning",
        "crowded-images",
        f"DATASETS.TEST {name!r}",
        "",
        f"have more objects than detections that are kept (TEST.DETECTIONS_PER_IMAGE is {kept}) "
        f"and counted ({most_of_class} of a class), so {missed.total() / objects.total():.2%} of "
        "all objects cannot be found",
        "; ".join(fixes),
        rows="images",
        ids=tuple(crowded),
        values=tuple(f"{of_images[image]} objects" for image in crowded),
        num_rows=len(content.get("images", ())),
    )
