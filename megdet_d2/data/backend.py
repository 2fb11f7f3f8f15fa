"""Reads and resizes images faster than Detectron2's mapper does, with its random numbers.

``INPUT.BACKEND`` chooses the library. Detectron2 reads and resizes by PIL, which takes most of a
mapper's time. torch resizes 8-bit pixels by PIL's own filter, with vector instructions. JPEG files
are decoded by simplejpeg where it is installed, and else by torchvision, both by libjpeg-turbo.
"""

import contextlib
import copy
import io
import logging
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode, Instances
from detectron2.utils.file_io import PathManager
from fvcore.transforms.transform import Transform, TransformList
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_jpeg

from .mapping import Mapper, reads_8_bits

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

logger = logging.getLogger(__name__)

BACKENDS = ("pil", "torchvision")
"""The values of ``INPUT.BACKEND``."""

_JPEG = b"\xff\xd8\xff"  # how a JPEG file begins
_ORIENTATION = 274  # the EXIF tag; 1 is upright
# Augmentations that keep no reference to the image.
_FORGETTING = (T.RandomCrop, T.RandomFlip, T.Resize, T.ResizeScale, T.ResizeShortestEdge)


def find_backend_fault(backend: str) -> str:
    """Returns the fault of an ``INPUT.BACKEND`` with its fix; "" if it can be used here."""
    if backend not in BACKENDS:
        return f"INPUT.BACKEND is {backend!r}; use one of {', '.join(BACKENDS)}"
    if backend == "pil":
        return ""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    try:
        _decode(file.getvalue(), "RGB")
    except (AttributeError, RuntimeError) as error:
        return (
            f"INPUT.BACKEND is 'torchvision', whose decoder does not work here ({error}): "
            "pip install simplejpeg, or a torchvision that is built with libjpeg, or set "
            "INPUT.BACKEND 'pil'"
        )
    return ""


def apply_backend(mapper: Mapper, backend: str) -> Mapper:
    """Returns a mapper that does the same by the library ``backend``.

    A mapper whose ``__call__`` is a project's own reads images by itself. It is returned as it is,
    with a warning. Augmentations of a project work with every backend.

    Args:
        mapper: Detectron2's ``DatasetMapper``, or a subclass.
        backend: one of ``BACKENDS``.
    """
    if backend == "pil":
        return mapper
    if not reads_8_bits(mapper):
        kind = type(mapper).__name__
        name = getattr(mapper, "__qualname__", kind)  # of a function
        logger.warning(
            f"INPUT.BACKEND {backend!r} has no effect: the mapper {name} reads and transforms "
            "images by itself. Make it a subclass of Detectron2's DatasetMapper that does not "
            "override __call__, or use megdet_d2.data.backend.read_image and FastAugInput in it"
        )
        return mapper
    return TorchvisionMapper(mapper)


def pins_memory(cfg: CfgNode) -> bool:
    """Returns True if a loader's tensors are to be in pinned memory, which a GPU reads faster."""
    return cfg.INPUT.BACKEND != "pil" and cfg.MODEL.DEVICE != "cpu" and torch.cuda.is_available()


class TorchvisionMapper:
    """Does what Detectron2's ``DatasetMapper`` does, with faster decoding and resizing.

    Boxes, masks, keypoints and random numbers are the same. A resized pixel differs from PIL's by
    at most one grey level, and seldom. The channels of a pixel stay together in memory, where
    Detectron2 copies the image once more; its tensor (3, height, width) is not contiguous then.

    Args:
        stock: the mapper of Detectron2, or of a subclass that inherits ``__call__``. Its
            augmentations and its methods for annotations are used.
    """

    def __init__(self, stock: Any):
        self.stock = stock
        inherited = type(stock)._transform_annotations is DatasetMapper._transform_annotations
        self._together = inherited and not stock.use_keypoint  # keypoints: one object after another
        # Other augmentations may keep the image, so its memory is not used again.
        self._forgets_images = all(type(aug) in _FORGETTING for aug in stock.augmentations.augs)

    def __call__(self, entry: dict) -> dict:
        """Returns the model's input for an entry of a data set."""
        stock, entry = self.stock, self._copied(entry)
        image = read_image(entry["file_name"], stock.image_format)
        utils.check_image_size(entry, image)
        sem_seg = None
        if "sem_seg_file_name" in entry:
            sem_seg = utils.read_image(entry.pop("sem_seg_file_name"), "L").squeeze(2)
        augmented = FastAugInput(image, sem_seg=sem_seg)
        transforms = stock.augmentations(augmented)
        shape = augmented.image.shape[:2]
        resized = augmented.resized if self._forgets_images else None
        entry["image"] = _to_tensor(augmented.image, resized)
        if augmented.sem_seg is not None:
            entry["sem_seg"] = torch.as_tensor(augmented.sem_seg.astype("long"))
        if stock.proposal_topk is not None:
            utils.transform_proposals(entry, shape, transforms, proposal_topk=stock.proposal_topk)
        if not stock.is_train:
            entry.pop("annotations", None)
        elif "annotations" in entry:
            if self._together and _transform_together(stock, entry["annotations"], transforms):
                entry["instances"] = _to_instances(stock, entry.pop("annotations"), shape)
            else:
                stock._transform_annotations(entry, transforms, shape)
        return entry

    def _copied(self, entry: dict) -> dict:
        """Returns a copy whose changes do not reach the caller's entry."""
        if not self._together or "annotations" not in entry:
            return copy.deepcopy(entry)
        # Boxes and masks are replaced, never changed in place: a deep copy of all numbers of all
        # polygons takes a tenth of the mapper's time.
        rows = [dict(row) for row in entry["annotations"]]
        rest = {key: value for key, value in entry.items() if key != "annotations"}
        return copy.deepcopy(rest) | {"annotations": rows}


class FastAugInput(T.AugInput):
    """An input of augmentations that resizes 8-bit images by torch.

    The image stays an array (height, width, channels), so that all augmentations work. Other
    transforms are applied as Detectron2 does.
    """

    image: np.ndarray
    boxes: np.ndarray | None
    sem_seg: np.ndarray | None
    resized: np.ndarray | None = None
    """The image that torch has resized last, which nothing else has had."""

    def transform(self, tfm: Transform) -> None:
        """Applies a transform to the image, the boxes and the labels of pixels, in place."""
        for part in tfm.transforms if type(tfm) is TransformList else [tfm]:
            resized = _resize(part, self.image) if type(part) is T.ResizeTransform else None
            if resized is None:
                self.image = part.apply_image(self.image)
            else:
                self.image = self.resized = resized
        if self.boxes is not None:
            self.boxes = tfm.apply_box(self.boxes)
        if self.sem_seg is not None:
            self.sem_seg = tfm.apply_segmentation(self.sem_seg)


def read_image(file_name: str, format: str) -> np.ndarray:
    """Reads an image as Detectron2's ``read_image`` does, and JPEG files faster.

    Images that are turned by EXIF, those that are not JPEG files of grey or RGB pixels, and damaged
    ones are read by Detectron2's function.

    Args:
        file_name: path of a file.
        format: INPUT.FORMAT, such as "BGR".

    Returns:
        pixels (height, width, channels).

    Raises:
        OSError: the file is not an image, or is damaged.
    """
    if format in ("RGB", "BGR"):
        with PathManager.open(file_name, "rb") as file:
            content = file.read()
        if content.startswith(_JPEG) and _is_upright(content):
            # What a decoder refuses, PIL may still read; and its errors are those of Detectron2.
            with contextlib.suppress(RuntimeError, ValueError):
                pixels = _decode(content, format)
                if pixels is not None:
                    return pixels
    return utils.read_image(file_name, format=format)


def _is_upright(content: bytes) -> bool:
    if b"Exif" not in content:
        return True
    with Image.open(io.BytesIO(content)) as image:  # reads the header only
        return image.getexif().get(_ORIENTATION, 1) == 1


def _decode(content: bytes, format: str) -> np.ndarray | None:
    """Returns the pixels of a JPEG file; None if they are neither grey nor RGB.

    Raises:
        RuntimeError, ValueError: the file is damaged.
    """
    if simplejpeg is None:
        return _decode_by_torchvision(content, format)
    if simplejpeg.decode_jpeg_header(content)[2] in ("CMYK", "YCCK"):
        return None
    return simplejpeg.decode_jpeg(content, format)


def _decode_by_torchvision(content: bytes, format: str) -> np.ndarray | None:
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    planes = decode_jpeg(encoded, mode=ImageReadMode.UNCHANGED)
    if len(planes) not in (1, 3):
        return None
    pixels = planes.permute(1, 2, 0).numpy()
    if len(planes) == 1:
        return cv2.cvtColor(pixels, cv2.COLOR_GRAY2BGR)
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if format == "BGR" else pixels


def _resize(resize: T.ResizeTransform, image: np.ndarray) -> np.ndarray | None:
    """Returns the resized image; None for one that Detectron2 has to resize, or to refuse."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
        return None
    if resize.interp != Image.Resampling.BILINEAR or image.shape[:2] != (resize.h, resize.w):
        return None
    # A batch of one, in channels-last memory: torch has its fastest path there.
    batch = torch.from_numpy(np.ascontiguousarray(image))[None].permute(0, 3, 1, 2)
    size = (resize.new_h, resize.new_w)
    resized = interpolate(batch, size, mode="bilinear", align_corners=False, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _to_tensor(image: np.ndarray, resized: np.ndarray | None) -> torch.Tensor:
    """Returns an image as a tensor (channels, height, width), without a copy where that is safe.

    Args:
        image: (height, width, channels).
        resized: an array that nothing else refers to, which the image may be, or a view of it.
    """
    mirrored = image.strides[1] < 0  # Detectron2's flip returns a view
    pixels = image[:, ::-1] if mirrored else image
    if resized is not None and _is_same(pixels, resized):
        if mirrored:
            cv2.flip(resized, 1, resized)
        return torch.from_numpy(resized).permute(2, 0, 1)
    if image.dtype != np.uint8 or image.shape[2] != 3 or not pixels.flags.c_contiguous:
        return torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
    planes = np.empty((3, *image.shape[:2]), dtype=np.uint8)
    cv2.split(pixels, list(planes))  # several times as fast as NumPy's transposed copy
    for plane in planes if mirrored else ():
        cv2.flip(plane, 1, plane)  # in place: new memory costs more than the flip
    return torch.from_numpy(planes)


def _is_same(a: np.ndarray, b: np.ndarray) -> bool:
    """Returns True if both arrays are the same values in memory, in the same order."""
    first, second = a.__array_interface__, b.__array_interface__
    return all(first[key] == second[key] for key in ("data", "shape", "strides", "typestr"))


def _transform_together(
    stock: DatasetMapper, annotations: list[dict], transforms: TransformList
) -> bool:
    """Applies the transforms to the boxes and polygons of all objects of an image, in place.

    Detectron2 takes one object after another, which takes longer than resizing the image. The
    numbers are the same.

    Returns:
        False, with nothing changed, if there are masks of pixels or other than plain boxes.
    """
    for row in annotations:
        if type(row["bbox"]) is not list or len(row["bbox"]) != 4:
            return False
        if stock.use_instance_mask and type(row.get("segmentation", [])) is not list:
            return False
    alike: dict[tuple, list[dict]] = {}  # boxes of whole numbers stay whole in Detectron2
    for row in annotations:
        whole = all(type(value) is int for value in row["bbox"])
        alike.setdefault((row["bbox_mode"], whole), []).append(row)
    for (mode, _), rows in alike.items():
        # A tensor, since Detectron2 converts a list to one, and its numbers to float32.
        boxes = BoxMode.convert(torch.tensor([a["bbox"] for a in rows]), mode, BoxMode.XYXY_ABS)
        for row, box in zip(rows, transforms.apply_box(np.array(boxes.tolist())), strict=True):
            row["bbox"], row["bbox_mode"] = box, BoxMode.XYXY_ABS
    for row in annotations if stock.use_instance_mask else ():
        if "segmentation" in row:
            polygons = [np.asarray(p).reshape(-1, 2) for p in row["segmentation"]]
            polygons = transforms.apply_polygons(polygons)
            row["segmentation"] = [polygon.reshape(-1) for polygon in polygons]
    return True


def _to_instances(
    stock: DatasetMapper, annotations: list[dict], shape: tuple[int, int]
) -> Instances:
    """Returns what ``DatasetMapper._transform_annotations`` makes of transformed objects."""
    rows = [row for row in annotations if row.get("iscrowd", 0) == 0]
    limits = [*shape, *shape][::-1]
    for row in rows:
        row["bbox"] = np.minimum(row["bbox"].clip(min=0), limits)
        row.pop("keypoints", None)
        if not stock.use_instance_mask:
            row.pop("segmentation", None)
    instances = utils.annotations_to_instances(rows, shape, mask_format=stock.instance_mask_format)
    if stock.recompute_boxes:
        instances.set("gt_boxes", instances.gt_masks.get_bounding_boxes())
    return utils.filter_empty_instances(instances)
