"""Compares INPUT.BACKEND "torchvision" with Detectron2's mapper, on real photographs."""

import copy
import json
import logging

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from megdet_d2 import add_megdet_config
from megdet_d2.data import backend
from megdet_d2.data.backend import (
    TorchvisionMapper,
    apply_backend,
    find_backend_fault,
    read_image,
)
from megdet_d2.data.mapping import BadImageError, CheckedMapper
from megdet_d2.data.stream import seeded
from megdet_d2.engine.check_config import check_keys
from tests.helpers.training import copy_checkpoint, train, write_images


@pytest.fixture(params=["simplejpeg", "torchvision"])
def decoder(request, monkeypatch):
    """Reads JPEG files by each of the two decoders."""
    if request.param == "torchvision":
        monkeypatch.setattr(backend, "simplejpeg", None)
    else:
        assert backend.simplejpeg is not None
    return request.param


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Writes photographs of scikit-image as JPEG files; returns their paths."""
    data = pytest.importorskip("skimage.data", reason="the photographs are scikit-image's")
    folder, paths = tmp_path_factory.mktemp("photographs"), []
    for name in ("astronaut", "chelsea", "coffee"):
        paths.append(folder / f"{name}.jpg")
        Image.fromarray(getattr(data, name)()).save(paths[-1], quality=90)
    return paths


def entry(path, masks="polygon", whole=False):
    """Returns an image's entry with three objects, each with a box, a mask and keypoints."""
    with Image.open(path) as image:
        width, height = image.size
    rng, annotations = np.random.default_rng(0), []
    for i in range(3):
        x, y = rng.uniform(0, width / 2), rng.uniform(0, height / 2)
        w, h = rng.uniform(20, width / 2), rng.uniform(20, height / 2)
        angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
        outline = np.stack([x + w / 2 * (1 + np.cos(angles)), y + h / 2 * (1 + np.sin(angles))], 1)
        polygons = [outline.ravel().tolist()]
        box = [x, y, w, h]
        annotations.append({
            "bbox": [round(v) for v in box] if whole and i else box,
            "bbox_mode": BoxMode.XYWH_ABS, "category_id": i, "iscrowd": int(i == 2),
            "keypoints": [v for point in outline[:4].tolist() for v in (*point, 2)],
            "segmentation": polygons if masks == "polygon" else
            utils.mask_util.merge(utils.mask_util.frPyObjects(polygons, height, width)),
        })  # fmt: skip
    return {"file_name": str(path), "width": width, "height": height, "annotations": annotations}


def mappers(*overrides, train=True, **arguments):
    cfg = get_cfg()
    cfg.merge_from_list(list(overrides))
    stock = DatasetMapper(cfg, train, **arguments)
    return stock, TorchvisionMapper(stock)


def assert_same(given, stock, ours, seed=0, most=1, share=0.02):
    """Checks both outputs, and that as many random numbers were drawn."""
    before, results = copy.deepcopy(given), []
    for mapper in (stock, ours):
        with seeded(seed):
            results.append((mapper(given), np.random.random(), torch.rand(1).item()))
    (expected, *drawn), (got, *ours_drawn) = results
    assert drawn == ours_drawn and json.dumps(given, default=repr) == json.dumps(
        before, default=repr
    )
    difference = (expected["image"].int() - got["image"].int()).abs()
    image = got["image"]  # by planes as Detectron2's, or by pixels
    assert image.is_contiguous() or image.permute(1, 2, 0).is_contiguous()
    assert image.dtype == expected["image"].dtype and image.stride()[1] > 0
    assert difference.max() <= most and (difference > 0).float().mean() <= share
    assert expected.keys() == got.keys()
    if "instances" not in expected:
        return
    a, b = expected["instances"].get_fields(), got["instances"].get_fields()
    assert a.keys() == b.keys() and expected["instances"].image_size == got["instances"].image_size
    assert torch.equal(a["gt_boxes"].tensor, b["gt_boxes"].tensor)
    assert torch.equal(a["gt_classes"], b["gt_classes"])
    if "gt_masks" in a and hasattr(a["gt_masks"], "polygons"):
        for one, other in zip(a["gt_masks"].polygons, b["gt_masks"].polygons, strict=True):
            assert all(map(np.array_equal, one, other)) and len(one) == len(other)
    elif "gt_masks" in a:
        assert torch.equal(a["gt_masks"].tensor, b["gt_masks"].tensor)
    if "gt_keypoints" in a:
        assert torch.equal(a["gt_keypoints"].tensor, b["gt_keypoints"].tensor)


CROP = ("INPUT.CROP.ENABLED", True)
MASKS = ("MODEL.MASK_ON", True)


@pytest.mark.parametrize("overrides, masks", [
    ((), "polygon"),
    (CROP, "polygon"),
    (MASKS, "polygon"),
    ((*MASKS, "INPUT.MASK_FORMAT", "bitmask"), "rle"),
    (("INPUT.FORMAT", "RGB", "INPUT.MIN_SIZE_TRAIN", (200, 640)), "polygon"),  # smaller and larger
], ids=["boxes", "crop", "polygons", "bitmasks", "rgb"])  # fmt: skip
def test_output_and_random_numbers_are_those_of_detectron2(photographs, overrides, masks):
    stock, ours = mappers(*overrides)
    for i, path in enumerate(photographs):
        for seed in range(2):  # flipped and not
            assert_same(entry(path, masks, whole=i == 1), stock, ours, seed)


def test_keypoints_are_those_of_detectron2(photographs):
    keypoints = {"use_keypoint": True, "keypoint_hflip_indices": np.array([1, 0, 3, 2])}
    augmentations = [T.ResizeShortestEdge(300), T.RandomFlip(1.0)]
    ours = DatasetMapper(
        is_train=True, augmentations=augmentations, image_format="BGR", **keypoints
    )
    assert_same(entry(photographs[0]), ours, TorchvisionMapper(ours))


def test_images_of_an_evaluation(photographs):
    for path in photographs:
        assert_same(entry(path), *mappers(train=False))


class Blot(T.Augmentation):
    """A project's augmentation: it draws a number, and changes pixels in place."""

    def get_transform(self, image):
        return T.ColorTransform(lambda pixels: np.roll(pixels, np.random.randint(9), axis=1))


def test_augmentations_of_a_project_and_large_scale_jitter(photographs):
    jitter = [T.ResizeScale(0.1, 2.0, 512, 512), T.FixedSizeCrop((512, 512)), T.RandomFlip()]
    for augmentations in ([Blot(), *jitter], [T.RandomFlip(1.0), T.Resize((300, 200)), Blot()],
                          [T.RandomRotation([-9, 9]), T.ResizeShortestEdge(300)],
                          [T.ResizeShortestEdge(300, interp=Image.BICUBIC)]):  # fmt: skip
        stock = DatasetMapper(is_train=True, augmentations=augmentations, image_format="BGR")
        for seed in range(2):
            assert_same(entry(photographs[1]), stock, TorchvisionMapper(stock), seed)


@pytest.mark.parametrize("flips", [
    [T.RandomFlip(1.0)],
    [T.RandomFlip(1.0), T.RandomFlip(1.0)],
    [T.RandomFlip(1.0, horizontal=False, vertical=True)],
    [T.RandomFlip(1.0), T.RandomFlip(1.0, horizontal=False, vertical=True)],
    [T.RandomFlip(1.0), T.ResizeShortestEdge(200)],
    [T.RandomCrop("relative", (0.5, 0.5)), T.RandomFlip(1.0)],
])  # fmt: skip
def test_views_of_the_resized_image(photographs, flips):
    augmentations = [T.ResizeShortestEdge(300), *flips]
    stock = DatasetMapper(is_train=True, augmentations=augmentations, image_format="BGR")
    for seed in range(2):
        assert_same(entry(photographs[1]), stock, TorchvisionMapper(stock), seed)


class Keep(T.Augmentation):
    """A project's augmentation: it keeps the image, as a mosaic of several does."""

    def get_transform(self, image):
        self.kept = image
        return T.NoOpTransform()


def test_an_image_that_an_augmentation_keeps_is_copied(photographs):
    keep = Keep()
    augmentations = [T.ResizeShortestEdge(300), keep, T.RandomFlip(1.0)]
    stock = DatasetMapper(is_train=True, augmentations=augmentations, image_format="BGR")
    image = TorchvisionMapper(stock)(entry(photographs[0]))["image"]
    assert not np.shares_memory(image.numpy(), keep.kept)
    assert np.array_equal(image.numpy(), keep.kept[:, ::-1].transpose(2, 0, 1))


def test_semantic_labels_are_those_of_detectron2(photographs, tmp_path):
    given = entry(photographs[0])
    labels = np.arange(given["height"] * given["width"]).reshape(given["height"], -1) // 999 % 250
    Image.fromarray(labels.astype(np.uint8)).save(tmp_path / "labels.png")
    given["sem_seg_file_name"] = str(tmp_path / "labels.png")
    stock, ours = mappers()
    with seeded(0):
        expected = stock(given)["sem_seg"]
    with seeded(0):
        assert torch.equal(ours(given)["sem_seg"], expected)


# --- files ---------------------------------------------------------------------------------------


def oriented(image, path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    image.save(path, exif=exif)


SAVE = {
    "grey.jpg": lambda image, path: image.convert("L").save(path),
    "cmyk.jpg": lambda image, path: image.convert("CMYK").save(path),
    "progressive.jpg": lambda image, path: image.save(path, progressive=True),
    "subsampled.jpg": lambda image, path: image.save(path, subsampling=2, quality=30),
    "alpha.png": lambda image, path: image.convert("RGBA").save(path),
    "palette.png": lambda image, path: image.convert("P").save(path),
    "named.jpg": lambda image, path: image.save(path, "PNG"),
    **{f"turned{i}.jpg": lambda image, path, i=i: oriented(image, path, i) for i in range(1, 9)},
}


@pytest.mark.parametrize("name", SAVE)
def test_every_kind_of_file_is_read_as_detectron2_reads_it(photographs, tmp_path, name, decoder):
    with Image.open(photographs[0]) as image:
        SAVE[name](image.crop((0, 0, 201, 99)), tmp_path / name)
    for form in ("BGR", "RGB", "L"):
        expected = utils.read_image(str(tmp_path / name), form)
        assert np.array_equal(read_image(str(tmp_path / name), form), expected)


def test_photographs_are_decoded_as_by_pil(photographs, decoder):
    for path in photographs:
        difference = utils.read_image(str(path), "BGR").astype(int) - read_image(str(path), "BGR")
        assert abs(difference).max() <= 1 and (difference != 0).mean() <= 0.01


@pytest.mark.parametrize("damage", [b"", b"no image"])
def test_a_damaged_file_is_named(photographs, tmp_path, damage, decoder):
    path = tmp_path / "bad.jpg"
    path.write_bytes(damage or photographs[0].read_bytes()[:9000])
    given = entry(photographs[0]) | {"file_name": str(path)}
    with pytest.raises(BadImageError, match=r"bad\.jpg: \w*Error: "):
        CheckedMapper(mappers()[1])(given)


# --- the key -------------------------------------------------------------------------------------


def test_a_mapper_of_a_project_is_left_as_it_is_with_a_warning(caplog):
    class Annotations(DatasetMapper):
        def _transform_annotations(self, dataset_dict, transforms, image_shape):
            dataset_dict["mine"] = dataset_dict.pop("annotations")

    class Reads(DatasetMapper):
        def __call__(self, dataset_dict):
            return {}

    stock = {"augmentations": [], "image_format": "BGR"}
    own = Reads(True, **stock)
    with caplog.at_level(logging.WARNING):
        assert apply_backend(own, "torchvision") is own
        assert apply_backend(test_a_damaged_file_is_named, "torchvision").__name__
    assert "the mapper Reads reads" in caplog.text and "test_a_damaged_file" in caplog.text
    assert apply_backend(own, "pil") is own and len(caplog.records) == 2
    assert isinstance(apply_backend(Annotations(True, **stock), "torchvision"), TorchvisionMapper)


def test_a_method_of_a_subclass_is_called(photographs):
    class Annotations(DatasetMapper):
        def _transform_annotations(self, dataset_dict, transforms, image_shape):
            assert dataset_dict["annotations"][0]["bbox_mode"] == BoxMode.XYWH_ABS
            dataset_dict["mine"] = len(transforms)

    mapper = Annotations(True, augmentations=[T.ResizeShortestEdge(99)], image_format="BGR")
    assert TorchvisionMapper(mapper)(entry(photographs[0]))["mine"] == 1


@pytest.mark.parametrize("key, value, said", [
    ("INPUT.BACKEND", "opencv", "INPUT.BACKEND is 'opencv'; use one of pil, torchvision"),
    ("DATALOADER.PREFETCH_FACTOR", 0, "DATALOADER.PREFETCH_FACTOR is 0; give 1 or more"),
    ("DATALOADER.CACHE_MB", -1, "DATALOADER.CACHE_MB is -1; give 0 for no cache, or megabytes"),
])  # fmt: skip
def test_a_wrong_value_is_refused(tmp_path, key, value, said):
    cfg = get_cfg()
    add_megdet_config(cfg)
    cfg.merge_from_list([key, value, "OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", ""])
    with pytest.raises(ValueError, match=said):
        check_keys(cfg)


def test_a_torchvision_without_a_decoder_is_named(monkeypatch):
    def missing(*args, **kwargs):
        raise RuntimeError("no libjpeg")

    assert find_backend_fault("torchvision") == ""
    monkeypatch.setattr(backend, "decode_jpeg", missing)
    assert find_backend_fault("torchvision") == ""  # simplejpeg
    monkeypatch.setattr(backend, "simplejpeg", None)
    assert "no libjpeg" in find_backend_fault("torchvision")


@pytest.mark.slow
def test_a_resume_is_exact(tmp_path):
    coco = write_images(tmp_path)
    overrides = ("INPUT.BACKEND", "torchvision", "DATALOADER.PREFETCH_FACTOR", 3)
    workers = ("DATALOADER.NUM_WORKERS", 2)
    whole = train(0, str(tmp_path / "out"), coco, (*overrides, *workers))
    copy_checkpoint(tmp_path / "out", tmp_path / "resumed", "model_0000002.pth")
    resumed = train(0, str(tmp_path / "resumed"), coco, overrides, True)
    assert resumed["images"] == whole["images"][3:] and resumed["state"] == whole["state"]
