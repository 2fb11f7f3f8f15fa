"""Images that cannot be read, annotations that make no sense, loader workers that die."""

import functools
import os
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from megdet_d2.data.mapping import BadImageError, CheckedMapper
from megdet_d2.engine import Trainer, prepare_config
from tests.helpers.processes import children
from tests.helpers.training import config, train, write_images


@pytest.fixture
def coco(tmp_path):
    (tmp_path / "images").mkdir()
    return write_images(tmp_path / "images")


# --- files that go bad after the check at the start ----------------------------------------------


def remove(path):
    os.remove(path)


def empty(path):
    os.truncate(path, 0)


def truncate(path):
    os.truncate(path, os.path.getsize(path) // 2)


def scramble(path):
    with open(path, "r+b") as file:
        file.seek(40)
        file.write(bytes(2000))


def resize(path):
    import cv2

    cv2.imwrite(path, np.zeros((8, 8, 3), np.uint8))


def break_files(damage, names, trainer):
    for name in names:
        damage(os.path.join(os.path.dirname(trainer.cfg.DATASETS.COCO[0][1]), name))


@pytest.mark.parametrize(
    "damage, said",
    [
        (remove, "FileNotFoundError"),
        (empty, "UnidentifiedImageError"),
        (truncate, "OSError"),
        (scramble, "Error: "),
        (resize, "Mismatched image shape"),
    ],
)
def test_an_image_that_goes_bad_is_an_error_that_names_it(coco, tmp_path, damage, said):
    overrides = ("DATALOADER.NUM_WORKERS", int(damage is truncate))
    fault = functools.partial(break_files, damage, ["3.png"])
    with pytest.raises(BadImageError, match=rf"images/3\.png: .*{said}(.|\n)*SKIP_BAD_IMAGES True"):
        train(0, str(tmp_path / "out"), coco, overrides, fault=fault)


def test_by_key_it_is_skipped_and_counted_on_all_ranks(pool2, coco, tmp_path):
    names = [f"{i}.png" for i in range(6)]
    fault = functools.partial(break_files, truncate_once, names)
    overrides = ("MEGDET.SKIP_BAD_IMAGES", True)
    run = functools.partial(train, fault=fault)
    results = pool2.run(run, str(tmp_path / "out"), coco, overrides, timeout=120)
    seen = [image for result in results for batch in result["images"] for image, _ in batch]
    assert len(seen) == 48 and not set(seen) & {1, 2, 3, 4, 5, 6}
    skipped = results[0]["rows"][-1]["skipped_images"]
    # two epochs of six, and those that were drawn in their place and were bad themselves
    assert 12 <= skipped <= 30


def truncate_once(path):
    if os.path.getsize(path) > 3000:  # of two ranks the second finds it done
        os.truncate(path, 2000)


def test_skipping_is_the_same_after_a_resume(coco, tmp_path):
    from tests.helpers.training import copy_checkpoint

    fault = functools.partial(break_files, truncate_once, ["0.png", "5.png"])
    overrides = ("MEGDET.SKIP_BAD_IMAGES", True)
    workers = ("DATALOADER.NUM_WORKERS", 1)
    whole = train(0, str(tmp_path / "out"), coco, (*overrides, *workers), fault=fault)
    copy_checkpoint(tmp_path / "out", tmp_path / "resumed", "model_0000002.pth")
    resumed = train(0, str(tmp_path / "resumed"), coco, overrides, True)
    assert resumed["images"] == whole["images"][3:] and resumed["state"] == whole["state"]


def test_when_every_image_is_bad_it_ends_all_the_same(coco, tmp_path):
    fault = functools.partial(break_files, empty, [f"{i}.png" for i in range(24)])
    overrides = ("MEGDET.SKIP_BAD_IMAGES", True)
    with pytest.raises(RuntimeError, match=r"refused 100 images in a row, the last: .*\.png: "):
        train(0, str(tmp_path / "out"), coco, overrides, fault=fault)


def test_in_evaluation_a_bad_image_is_an_error_and_never_skipped(coco, tmp_path):
    overrides = ("MEGDET.SKIP_BAD_IMAGES", True, "DATASETS.TEST", ("mixed",), "TEST.EVAL_PERIOD", 1)
    fault = functools.partial(break_files, truncate, ["3.png"])
    with pytest.raises(BadImageError, match=r"images/3\.png: OSError"):
        train(0, str(tmp_path / "out"), coco, overrides, fault=fault)


# --- annotations ---------------------------------------------------------------------------------


def mapped(box=(1.0, 1.0, 5.0, 5.0), label=0, image=None):
    instances = Instances((8, 8), gt_boxes=Boxes(torch.tensor([box])))
    instances.gt_classes = torch.tensor([label])
    return {"image": torch.zeros(3, 8, 8) if image is None else image, "instances": instances}


@pytest.mark.parametrize(
    "output, said",
    [
        (
            mapped(box=(1.0, float("nan"), 5.0, 5.0)),
            r"the box \[1.0, nan, 5.0, 5.0\] is not finite",
        ),
        (mapped(box=(1.0, 1.0, float("inf"), 5.0)), "the box .* is not finite"),
        (mapped(label=3), "the class 3 is none of the model's, 0 to 2"),
        (mapped(label=-1), "the class -1 is none"),
        (mapped(image=torch.full((3, 2, 2), float("nan"))), "a pixel is not finite"),
    ],
)
def test_what_a_mapper_returns_is_checked(output, said):
    mapper = CheckedMapper(lambda entry: output, num_classes=3)
    with pytest.raises(BadImageError, match=f"^a.png: {said}"):
        mapper({"file_name": "a.png"})


def test_what_is_right_passes():
    assert CheckedMapper(lambda entry: None)({}) is None
    for output in (mapped(), mapped(label=2), {"image": torch.zeros(3, 1, 1)}):
        assert CheckedMapper(lambda entry, output=output: output, 3)({}) is output
    assert CheckedMapper(lambda entry: mapped(label=9))({})["instances"].gt_classes == 9


def spoil_annotation(value, trainer):
    """In the data set that the loader holds, after the check: a box that no longer is one."""
    stream = trainer.data_loader.dataset
    entries = stream.dataset._dataset
    entry = entries[3]
    entry["annotations"][0].update(value)

    class Spoilt(torch.utils.data.Dataset):
        def __len__(self):
            return len(entries)

        def __getitem__(self, index):
            return entry if index == 3 else entries[index]

    stream.dataset._dataset = Spoilt()


@pytest.mark.parametrize(
    "value, said",
    [
        ({"bbox": [float("nan"), 0, 9, 9]}, "not finite"),
        ({"bbox": [1, 2]}, "Error"),
        ({"category_id": 7}, "the class 7 is none of the model's, 0 to 0"),
    ],
)
def test_an_annotation_that_becomes_invalid_mid_run(coco, tmp_path, value, said):
    with pytest.raises(BadImageError, match=rf"images/3\.png: .*{said}"):
        train(0, str(tmp_path / "out"), coco, fault=functools.partial(spoil_annotation, value))


# --- loader workers ------------------------------------------------------------------------------


def kill_worker(trainer):
    """Kills the loader's workers in the second step."""
    others = children(os.getpid())  # of the test session

    def kill(module, inputs):
        if trainer.iter == 1:
            workers = [child for child in children(os.getpid()) if child not in others]
            assert workers
            for worker in workers:
                os.kill(worker, signal.SIGKILL)

    trainer.checkpointer.model.register_forward_pre_hook(kill)


def hang_worker(trainer):
    """On its 12th image, as on a file system that has gone away."""
    stream = trainer.data_loader.dataset
    load, count = stream.dataset._mapper, iter(range(10**6))

    def hang(entry):
        if next(count) == 12:
            time.sleep(1000)
        return load(entry)

    stream.dataset._mapper = hang


@pytest.mark.parametrize(
    "fault, said",
    [
        (kill_worker, r"DataLoader worker \(pid.*\) (is killed by signal|exited unexpectedly)"),
        (hang_worker, "DataLoader timed out after 6 seconds"),
    ],
)
@pytest.mark.timeout(100)
def test_a_worker_that_dies_or_hangs(coco, tmp_path, fault, said):
    overrides = ("DATALOADER.NUM_WORKERS", 1, "MEGDET.TIMEOUT", 6)
    with pytest.raises(RuntimeError, match=said):
        train(0, str(tmp_path / "out"), coco, overrides, fault=fault)


def test_an_evaluations_worker_outlives_a_schedulers_signal(tmp_path):
    """Which comes to every process, and from none of them."""
    overrides = ("DATASETS.TEST", ("mixed",), "DATALOADER.NUM_WORKERS", 1, "MEGDET.TIMEOUT", 50)
    cfg = config(tmp_path / "out", write_images(tmp_path, images=8), *overrides)
    prepare_config(cfg, eval_only=True)
    assert Trainer.build_test_loader(cfg, "mixed").timeout == 50
    model, workers = Trainer.build_model(cfg), []
    others = children(os.getpid())  # of the test session, such as the server of the gloo pools

    def loader_workers():
        return [child for child in children(os.getpid()) if child not in others]

    def terminate(module, inputs):
        if not workers:
            workers.extend(loader_workers())
            subprocess.run(["kill", "-TERM", *map(str, workers)], check=True)
            time.sleep(0.2)
            assert workers and loader_workers() == workers

    model.register_forward_pre_hook(terminate)
    results = Trainer.test(cfg, model)
    assert workers and "AP" in results["bbox"]
