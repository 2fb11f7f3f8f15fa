"""The names of the classes in a checkpoint: other sets are compared with them."""

import json
import shutil

import pytest
import torch

from megdet_d2.engine import Trainer, evaluate, prepare_config
from megdet_d2.engine.ema import write_average
from megdet_d2.engine.saved_classes import SavedClasses, find_other_classes, saved_names
from tests.helpers.coco_data import assert_says
from tests.helpers.training import config, write_images

CLASSES = ("cat", "dog", "owl")
FILES = ("model_final.pth", "ema/model_final.pth")


def images(folder, name, classes):
    """Writes images and registers nothing: the triple of DATASETS.COCO."""
    folder.mkdir(exist_ok=True)
    ((_, path, root),) = write_images(folder, images=4)
    with open(path) as file:
        content = json.load(file)
    content["categories"] = [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]
    with open(path, "w") as file:
        json.dump(content, file)
    return [name, path, root]


def make(output, train=(), test=(), *keys):
    names = [tuple(triple[0] for triple in split) for split in (train, test)]
    return config(
        output, [*train, *test], "DATASETS.TRAIN", names[0], "DATASETS.TEST", names[1],
        "MODEL.ROI_HEADS.NUM_CLASSES", 3, "MEGDET.EPOCHS", 1.0, "MEGDET.DECAY_EPOCHS", (),
        "MEGDET.DECAY_FACTORS", (), "MEGDET.WARMUP_EPOCHS", 0.0, "SOLVER.IMS_PER_BATCH", 2, *keys,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    animals = images(folder / "images", "animals", CLASSES)
    cfg = make(folder / "out", [animals], (), "MEGDET.EMA_DECAY", 0.5)
    prepare_config(cfg)
    (folder / "out").mkdir(exist_ok=True)
    trainer = Trainer(cfg)
    trainer.resume_or_load(False)
    trainer.train()
    return folder / "out"


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_has_the_names(trained, name):
    file = torch.load(trained / name, weights_only=True)
    assert saved_names(file) == list(CLASSES)
    assert saved_names({"classes": ["of", "other", "code"]}) is None


def test_the_average_of_a_checkpoint_is_written_with_the_names(trained, tmp_path):
    state = torch.load(trained / "model_final.pth", weights_only=True)["ema"]
    for name, expected in (("now", list(CLASSES)), ("before", None)):  # of an earlier version
        write_average(str(tmp_path), name, state)
        assert saved_names(torch.load(tmp_path / "ema" / f"{name}.pth")) == expected
        state.pop("classes", None)


@pytest.mark.parametrize(
    ("classes", "level"),
    [
        (("dog", "cat", "pig"), "error"),
        (("cat", "owl", "pig"), "error"),  # the model's owls would be pigs
        (("cat", "dog"), "error"),
        (("cat", "dog", "pig"), "warning"),
        (("a", "b", "c"), "warning"),
        (("cat", "cat", "owl"), "error"),
    ],
)
def test_a_class_at_the_number_of_another_is_an_error(classes, level):
    found = find_other_classes("here", classes, "there", CLASSES)
    assert [finding.level for finding in found] == [level]


def test_a_name_that_stands_twice_at_its_own_places_is_no_error():
    (finding,) = find_other_classes("here", ("a", "B", "a"), "there", ("a", "b", "a"))
    assert finding.level == "warning"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("classes", "level"),
    [
        (CLASSES, ""),
        (("dog", "cat", "owl"), "error"),  # the AP of one class would be that of another
        (("Cat", "dog", "owl"), "warning"),
    ],
)
def test_an_evaluation_compares_its_test_set(trained, tmp_path, classes, level, name, caplog):
    weights = ("MODEL.WEIGHTS", str(trained / name))
    cfg = make(tmp_path / "out", (), [images(tmp_path / "images", "others", classes)], *weights)
    prepare_config(cfg, eval_only=True)
    if level == "error":
        with pytest.raises(ValueError) as error:
            evaluate(cfg)
        assert_says(
            str(error.value), "DATASETS.TEST 'others': its categories differ from those of MODEL.W",
            "[('cat', 'dog'), ('dog', 'cat')]", "the same names in the order of their ids",
        )  # fmt: skip
        return
    assert "bbox" in evaluate(cfg)
    assert ("'others': its categories differ" in caplog.text) == bool(level)


@pytest.mark.parametrize("method", ["build_mapper", "build_evaluator"])
def test_a_project_that_may_map_classes_is_warned(method, tmp_path, caplog):
    def inherited(cls, cfg, *args):
        return getattr(super(own, cls), method)(cfg, *args)

    own = type("Own", (Trainer,), {method: classmethod(inherited)})
    cfg = make(tmp_path, (), [images(tmp_path / "images", "merged", ("dog", "cat", "owl"))])
    prepare_config(cfg, eval_only=True)
    own.check_saved_classes(cfg, list(CLASSES))
    assert "'merged': its categories differ from those of MODEL.WEIGHTS" in caplog.text


@pytest.mark.parametrize("classes", [CLASSES, ("owl", "dog", "cat")])
def test_a_resume_compares_its_training_set(trained, tmp_path, classes):
    shutil.copytree(trained, tmp_path / "out")
    keys = ("MEGDET.EPOCHS", 2.0)
    cfg = make(tmp_path / "out", [images(tmp_path / "images", "again", classes)], (), *keys)
    prepare_config(cfg)
    trainer = Trainer(cfg)
    if classes != CLASSES:
        with pytest.raises(ValueError, match="DATASETS.TRAIN: its categories differ .*checkpoint"):
            trainer.resume_or_load(True)
        return
    trainer.resume_or_load(True)
    trainer.train()
    assert trainer.has_finished


def test_classes_that_are_not_known_are_not_compared(tmp_path):
    classes = SavedClasses(make(tmp_path))
    assert classes.state_dict() == {"names": None}
    classes.load_state_dict({"names": list(CLASSES)})
    classes.load_state_dict({})
