"""Finds images that a config both trains on and evaluates on."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .finding import Finding


def image_paths(rows: Iterable[Mapping[str, Any]], root: str = "") -> frozenset[str]:
    """Returns the absolute paths of images.

    Args:
        rows: of a COCO json; those without a file name are left out.
        root: the folder of relative names.
    """
    names = (row.get("file_name") for row in rows)
    return frozenset(
        os.path.abspath(os.path.join(root, name)) for name in names if name and type(name) is str
    )


def find_shared_images(
    trained: Sequence[str], evaluated: Sequence[str], paths: Mapping[str, frozenset[str]]
) -> Iterator[Finding]:
    """Yields a warning for each test set that has images of a training set.

    Args:
        trained, evaluated: ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        paths: the images of the data sets of which they are known, from ``image_paths``.
    """
    for test in evaluated:
        for train in trained:
            shared = paths.get(test, frozenset()) & paths.get(train, frozenset())
            if shared and test != train:  # who names one set for both knows it
                yield Finding(
                    "warning",
                    "trained-images",
                    f"DATASETS.TEST {test!r}",
                    "",
                    f"{len(shared)} of its {len(paths[test])} images are in DATASETS.TRAIN "
                    f"{train!r} too, such as {min(shared)!r}, so its AP is higher than that of new "
                    "images",
                    "take them out of one of the two",
                )
