"""Checks the classes of a model that is built, of any architecture, against the data sets."""

import logging
from collections.abc import Collection

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, PanopticFPN, SemanticSegmentor

from megdet_d2.data.classes import check_num_classes, class_counts, value_of

logger = logging.getLogger(__name__)

# Keys that count things in every project. The others depend on the architecture.
_THINGS = ("MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES")


def check_model_classes(cfg: CfgNode, reads: Collection[str], refuse: bool = True) -> None:
    """Compares the NUM_CLASSES keys that the model has read with the classes of the data sets.

    Call it after the training set has been loaded: data sets that Detectron2's functions have
    registered know their classes only then.

    Args:
        cfg: the config of the model.
        reads: see ``ModelReads.keys``.
        refuse: False for a warning in place of every error, since a loader or mapper of the user
            may merge classes.

    Raises:
        ValueError: a key has another value than a data set has classes. A key of an unknown
            meaning is a warning, unless it is below every number of classes.
    """
    for name in dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)):
        for key in sorted(key for key in reads if key.endswith(".NUM_CLASSES")):
            try:
                _check_key(cfg, key, name)
            except ValueError as error:
                if refuse:
                    raise
                logger.warning(f"{error}, unless your mapper merges classes")


def _check_key(cfg: CfgNode, key: str, name: str) -> None:
    things, stuff = class_counts(name, "thing"), class_counts(name, "stuff")
    kind = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    kind = kind if isinstance(kind, type) else object
    if key in _THINGS:
        check_num_classes(cfg, "thing", key, name, things)
    elif issubclass(kind, SemanticSegmentor) or (
        issubclass(kind, PanopticFPN) and key == "MODEL.SEM_SEG_HEAD.NUM_CLASSES"
    ):
        check_num_classes(cfg, "stuff", key, name, stuff)
    else:
        metadata_kind = "thing" if things else "stuff"
        both = [a + b for a in things for b in stuff]
        counts = [*things, *stuff, *both]
        value = value_of(cfg, key)
        if counts and value < min(counts):
            check_num_classes(cfg, metadata_kind, key, name, counts)
        elif counts and value not in counts:
            logger.warning(
                f"{key} is {value}, and {name!r} has {counts[0]} classes; if the model counts the "
                f"classes of its objects there, set {key} {counts[0]}"
            )
