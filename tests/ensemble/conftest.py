"""Fixtures of the tests of megdet ensemble."""

import json

import numpy as np
import pytest

from tests.helpers import training
from tests.helpers.detections import result


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return training.write_images(tmp_path_factory.mktemp("images"), images=4)


@pytest.fixture(scope="module")
def noisy(coco, tmp_path_factory):
    """Writes the results of three detectors: the objects, shifted, and false ones."""
    folder, files = tmp_path_factory.mktemp("noisy"), []
    truth = json.loads(open(coco[0][1]).read())
    for seed in range(3):
        rng, rows = np.random.default_rng(seed), []
        for a in truth["annotations"]:
            box = (np.array(a["bbox"]) + [*rng.uniform(-4, 4, 2), 0, 0]).tolist()
            rows.append(result(box, rng.uniform(0.3, 1), a["image_id"], 1))
            rows.append(result([*rng.uniform(0, 30, 2), 12, 12], rng.uniform(0, 0.5), 1, 1))
        files.append(folder / f"{seed}.json")
        files[-1].write_text(json.dumps(rows))
    return files
