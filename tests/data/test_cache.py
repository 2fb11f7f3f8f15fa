"""The cache of mapped images: the same training, each image loaded once, nothing random kept."""

import copy

import pytest
import torch
from detectron2.data import DatasetMapper

from megdet_d2.data.cache import Cache
from megdet_d2.data.stream import Sample, SeededDataset
from megdet_d2.engine import Trainer, prepare_config
from tests.helpers.training import SHORT, config, differing, train, write_images

# 12 images for each of two epochs, in a cycle of 8.
FIXED = (
    "INPUT.MIN_SIZE_TRAIN", (48,), "INPUT.CROP.ENABLED", False, "INPUT.RANDOM_FLIP", "none",
    "MEGDET.EPOCH_IMAGES", 12, "DATALOADER.ASPECT_RATIO_GROUPING", False,
)  # fmt: skip


@pytest.fixture
def coco(tmp_path):
    (tmp_path / "images").mkdir()
    return write_images(tmp_path / "images", images=8)


@pytest.fixture
def loads(monkeypatch):
    """Counts the images that Detectron2's mapper maps."""
    count, stock = [0], DatasetMapper.__call__

    def counted(self, entry):
        count[0] += 1
        return stock(self, entry)

    monkeypatch.setattr(DatasetMapper, "__call__", counted)
    return count


@pytest.mark.parametrize("more", [(), ("MODEL.MASK_ON", False, "INPUT.BACKEND", "torchvision")])
def test_the_same_training_with_each_image_loaded_once(coco, tmp_path, loads, more):
    runs = []
    for megabytes, expected in ((0, 24), (1, 8)):
        loads[0] = 0
        keys = (*SHORT, *FIXED, "DATALOADER.CACHE_MB", megabytes, *more)
        runs.append(train(0, str(tmp_path / str(megabytes)), coco, keys))
        if not more:  # TorchvisionMapper does not call the stock one
            assert loads[0] == expected
    assert differing(*runs) == []


def test_what_a_model_does_to_its_input_is_not_kept():
    mapped = {"image": torch.zeros(3, 4, 4), "annotations": [[1.0]]}
    data = SeededDataset([0], lambda _: mapped, cache=Cache(1))
    sample = Sample(0, 5)
    for _ in range(3):
        given = data[sample]
        assert given["image"].sum() == 0 and given["annotations"] == [[1.0]]
        given["image"] += 1
        given["annotations"][0].append(2.0)
        mapped = copy.deepcopy(given)  # would be another image, if the mapper were asked


def test_a_full_cache_says_so_once(caplog):
    asked = []

    def load(index):
        asked.append(index)
        return {"image": torch.zeros(2**18 * 3 // 4)}  # three quarters of a megabyte

    data = SeededDataset(list(range(3)), load, cache=Cache(1))
    for _ in range(2):
        for index in range(3):
            data[Sample(index, 1)]
    assert asked == [0, 1, 2, 1, 2]
    assert [r.getMessage() for r in caplog.records] == [
        "DATALOADER.CACHE_MB is full: 1 images are in it. The others are loaded each time"
    ]


def test_an_image_in_place_of_another_is_not_kept():
    data = SeededDataset(list(range(9)), lambda i: {"i": i} if i % 2 else None, cache=Cache(1))
    drawn = {data[Sample(4, seed)]["i"] for seed in range(20)}
    assert drawn > {1, 3}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (FIXED[2:4], "ResizeShortestEdge may be random; set one size in INPUT.MIN_SIZE_TRAIN, or"),
        ((), "RandomCrop may be random; set DATALOADER.CACHE_MB 0"),
        (FIXED[:4], 'RandomFlip may be random; set INPUT.RANDOM_FLIP "none", or DATALOADER'),
    ],
)
def test_random_augmentations_are_refused(coco, tmp_path, keys, said):
    cfg = config(tmp_path, coco, "DATALOADER.CACHE_MB", 1, *keys)
    prepare_config(cfg)
    with pytest.raises(ValueError, match=f"DATALOADER.CACHE_MB is .*{said}.*"):
        Trainer.build_train_loader(cfg)


class Random(DatasetMapper):
    """May do anything in its methods."""


def test_mappers_of_a_project_are_refused(coco, tmp_path):
    cfg = config(tmp_path, coco, "DATALOADER.CACHE_MB", 1, *FIXED)
    prepare_config(cfg)
    for mapper, name in ((Random(cfg), "Random"), (lambda entry: entry, ".*lambda")):
        with pytest.raises(ValueError, match=f"the mapper {name}.* may map an image differently"):
            Trainer.build_train_loader(cfg, mapper)
