"""Tests what is found in the headers of image files: before training, in all sets, all at once."""

import functools
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import read_image
from PIL import Image

from megdet_d2.data import images as module
from megdet_d2.data.mapping import BadImageError, CheckedMapper
from megdet_d2.engine import Trainer, prepare_config
from tests.helpers.coco_data import (
    HEIGHT,
    WIDTH,
    assert_says,
    check,
    coco_config,
    refusal,
    warnings_in,
)
from tests.helpers.training import config, train, write_images

pytestmark = pytest.mark.usefixtures("clean_catalogs")


def pixels(height=HEIGHT, width=WIDTH):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def spoil(path: Path, how: str) -> None:
    if how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("<html>404</html>")
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "swapped":
        Image.fromarray(pixels(WIDTH, HEIGHT)).save(path)
    elif how == "smaller":
        Image.fromarray(pixels(HEIGHT - 1, WIDTH)).save(path)


SAID = {
    "empty": ("cannot be opened", "it is empty"),
    "text": ("cannot be opened", "cannot identify"),
    "folder": ("cannot be opened", "IsADirectory"),
    "swapped": ("another width and height", "64 x 48 in the json, 48 x 64 in the file"),
    "smaller": ("another width and height", "64 x 48 in the json, 64 x 47 in the file"),
}


@pytest.mark.parametrize("how", SAID)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_bad_file_is_found_from_its_header_in_either_set(val, how, split):
    spoil(val.root / "9.png", how)
    sets = {split: [val.write()]}
    assert_says(refusal(coco_config(**sets)), "1 of 2 images", "id 9 '9.png'", *SAID[how])


def test_all_kinds_of_both_sets_are_one_error(train, val):
    (train.root / "5.png").unlink()
    spoil(train.root / "9.png", "empty")
    spoil(val.root / "9.png", "swapped")
    message = refusal(coco_config([train.write()], [val.write()]))
    assert_says(message, "3 faults", "images are not in", "cannot be opened", "48 x 64 in the file")


def oriented(path, orientation, size, form):
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(pixels(*size)).save(path, form, exif=exif)


def late_exif(path):
    """Moves the eXIf chunk of a PNG behind its pixels, where its header does not show it."""
    data, position, chunks = path.read_bytes(), 8, []
    while position < len(data):
        length = struct.unpack(">I", data[position : position + 4])[0] + 12
        chunks.append(data[position : position + length])
        position += length
    chunks.sort(key=lambda chunk: (chunk[4:8] == b"IEND", chunk[4:8] == b"eXIf"))
    assert zlib.crc32(chunks[-2][4:-4]) == struct.unpack(">I", chunks[-2][-4:])[0]
    path.write_bytes(data[:8] + b"".join(chunks))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["jpeg", "png", "late png", "webp", "tiff"])
def test_sizes_are_those_after_the_exif_orientation_as_detectron2_reads_it(
    train, orientation, form
):
    path = train.root / "9.png"  # the name does not decide the format
    # Of a TIFF, PIL turns the pixels, and Detectron2 turns them again.
    swapped = orientation > 4 and form != "tiff"
    size = (WIDTH, HEIGHT) if swapped else (HEIGHT, WIDTH)
    oriented(path, orientation, size, form.split()[-1])
    if form == "late png":
        late_exif(path)
    assert read_image(str(path), "BGR").shape == (HEIGHT, WIDTH, 3)
    check(coco_config([train.write()]))
    if orientation > 4 and form != "late png":
        row = train.json["images"][1]
        row["width"], row["height"] = HEIGHT, WIDTH
        assert_says(refusal(coco_config([train.write()])), "turned by its EXIF orientation")


def test_with_skip_bad_images_training_skips_them_and_evaluation_does_not(train, val, caplog):
    for data in (train, val):
        spoil(data.root / "9.png", "text")
        data.write()
    cfg = coco_config([train])
    cfg.MEGDET.SKIP_BAD_IMAGES = True
    check(cfg)
    assert_says(caplog.text, "1 of 2 images cannot be opened", "'9.png'")
    cfg = coco_config(test=[val])
    cfg.MEGDET.SKIP_BAD_IMAGES = True
    assert_says(refusal(cfg), "1 of 2 images cannot be opened")


DEEP = {
    "16 bits": np.full((HEIGHT, WIDTH), 40000, np.uint16),
    "12 of 16 bits": np.full((HEIGHT, WIDTH), 4000, np.uint16),
    "32 bits": np.full((HEIGHT, WIDTH), 70000, np.int32),
    "floats to 1": np.full((HEIGHT, WIDTH), 0.5, np.float32),
    "floats to 4000": np.full((HEIGHT, WIDTH), 4000, np.float32),
}
SHALLOW = {
    "8 of 16 bits": np.full((HEIGHT, WIDTH), 200, np.uint16),
    "floats to 255": np.full((HEIGHT, WIDTH), 200, np.float32),
    "grey": np.full((HEIGHT, WIDTH), 200, np.uint8),
    "two values": np.ones((HEIGHT, WIDTH), bool),
}


def deep(data, values):
    for row in data.json["images"]:
        (data.root / row["file_name"]).unlink()
        row["file_name"] = f"{row['id']}.tif"
        Image.fromarray(values).save(data.root / row["file_name"])
    return data.write()


@pytest.mark.parametrize("case", DEEP)
def test_images_of_more_than_8_bits_are_refused_by_detectron2s_mapper(train, case, caplog):
    cfg = coco_config([deep(train, DEEP[case])])
    check(cfg)  # a mapper of the user's may read them
    assert_says(caplog.text, "2 of 2 images have more than 8 bits", "id 5 '5.tif'", "8 bits")
    mapper = CheckedMapper(DatasetMapper(cfg, is_train=False))
    with pytest.raises(BadImageError, match=r"5\.tif: it has more than 8 bits .*build_mapper"):
        mapper({"file_name": str(train.root / "5.tif")})


@pytest.mark.parametrize("case", SHALLOW)
def test_images_that_detectron2_reads_right_are_no_fault(train, case, caplog):
    cfg = coco_config([deep(train, SHALLOW[case])])
    check(cfg)
    assert not warnings_in(caplog)
    mapper = CheckedMapper(DatasetMapper(cfg, is_train=False))
    assert mapper({"file_name": str(train.root / "5.tif")})["image"].shape[0] == 3


class OwnMapper:
    """A mapper that scales 16 bits, as projects with such images have it."""

    def __call__(self, entry):
        import torch

        values = np.asarray(Image.open(entry["file_name"])).astype("float32") / 257
        return {"image": torch.from_numpy(values).expand(3, -1, -1), "file_name": "a"}


def test_a_mapper_of_the_users_may_read_any_format(train):
    for row in train.json["images"]:
        (train.root / row["file_name"]).unlink()
        row["file_name"] = f"{row['id']}.npy"
        np.save(train.root / row["file_name"], pixels())
    check(coco_config([train.write()]))  # a warning
    deep(train, DEEP["16 bits"])
    mapped = CheckedMapper(OwnMapper())({"file_name": str(train.root / "5.tif")})
    assert mapped["image"].max() == pytest.approx(40000 / 257)


class OwnTrainer(Trainer):
    @classmethod
    def build_mapper(cls, cfg, is_train):
        return OwnMapper()


@pytest.mark.parametrize("split", ["TRAIN", "TEST"])
@pytest.mark.parametrize("trainer", [Trainer, OwnTrainer])
def test_the_trainer_refuses_them_before_the_first_step(tmp_path, split, trainer):
    name, coco = {}, []
    for key in ("TRAIN", "TEST"):
        folder = tmp_path / key
        folder.mkdir()
        _, file, root = write_images(folder, images=8)[0]
        name[key] = f"set_{key.lower()}"
        coco.append([name[key], file, root])
    for path in (tmp_path / split).glob("*.png"):
        size = Image.open(path).size[::-1]
        Image.fromarray(np.full(size, 30000, np.uint16)).save(path)
    sets = ("DATASETS.TRAIN", (name["TRAIN"],), "DATASETS.TEST", (name["TEST"],))
    cfg = config(tmp_path / "out", coco, *sets)
    prepare_config(cfg)
    if trainer is OwnTrainer:
        trainer(cfg)
        return
    with pytest.raises(ValueError, match=rf"{name[split]}.*8 of 8 images have more than 8 bits"):
        trainer(cfg)


def test_an_evaluation_alone_refuses_them_too(tmp_path):
    coco = write_images(tmp_path, images=4)
    for path in tmp_path.glob("*.png"):
        Image.fromarray(np.full(Image.open(path).size[::-1], 30000, np.uint16)).save(path)
    cfg = config(tmp_path / "out", coco, "DATASETS.TEST", ("mixed",))
    prepare_config(cfg, eval_only=True)
    with pytest.raises(ValueError, match="4 of 4 images have more than 8 bits"):
        Trainer.build_test_loader(cfg, "mixed")


def refused(rank, output, coco):
    """Returns this process's error, and the number of headers that it has read."""
    looked = []
    look = module._look
    module._look = lambda *args: looked.append(args) or look(*args)
    try:
        prepare_config(config(output, coco))
    except ValueError as error:
        return str(error), len(looked)
    finally:
        module._look = look


def test_one_process_of_a_machine_looks_and_all_say_the_same(pool2, tmp_path):
    coco = write_images(tmp_path, images=8)
    spoil(tmp_path / "3.png", "empty")
    (first, looked), (second, none) = pool2.run(refused, str(tmp_path / "out"), coco)
    assert first == second and "1 of 8 images cannot be opened" in first
    assert (looked, none) == (8, 0)


def count_parses(rank, output, coco, counts):
    """Trains, and counts how often a json is parsed, by the name of the file."""
    load = json.load

    def counting(file, *args, **kwargs):
        counts[file.name] = counts.get(file.name, 0) + 1
        return load(file, *args, **kwargs)

    json.load = counting
    try:
        train(rank, output, coco)
    finally:
        json.load = load
    return counts


def test_the_json_of_a_training_set_is_parsed_once(pool2, tmp_path):
    coco = write_images(tmp_path, images=8)
    run = functools.partial(count_parses, counts={})
    for counts in pool2.run(run, str(tmp_path / "out"), coco):
        assert counts[coco[0][1]] == 1


def test_a_json_that_changes_after_its_check_is_read_again(train, tmp_path):
    from detectron2.data import DatasetCatalog

    check(coco_config([train.write()]))
    train.json["annotations"].pop()
    train.write()
    records = DatasetCatalog.get("my_train")
    assert sum(len(record["annotations"]) for record in records) == 2
