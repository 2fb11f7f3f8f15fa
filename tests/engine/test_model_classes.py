"""Tests NUM_CLASSES of built models, of Detectron2's and of other architectures."""

import copy
import json
import logging
import pickle

import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    GeneralizedRCNN,
    PanopticFPN,
    ProposalNetwork,
)
from torch import nn

from megdet_d2.engine import Trainer, prepare_config
from tests.helpers import training
from tests.helpers.panoptic_data import register_panoptic, unregister_panoptic, write_panoptic

CLASSES = {"first": 1, "second": 2, "third": 3}


@META_ARCH_REGISTRY.register()
class OwnRCNN(GeneralizedRCNN):
    """A subclass, as most projects have it."""


@META_ARCH_REGISTRY.register()
class OwnPanoptic(PanopticFPN):
    """A subclass of a model that counts things and stuff."""


@META_ARCH_REGISTRY.register()
class OwnDetector(nn.Module):
    """A detector with its own key, and a second key that it does not read."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg.clone()  # as many projects do
        self.classify = nn.Linear(1, self.cfg.MODEL.OWN.NUM_CLASSES)


@META_ARCH_REGISTRY.register()
class FixedDetector(nn.Module):
    """A detector whose number of classes is no key."""

    def __init__(self, cfg):
        super().__init__()
        self.classify = nn.Linear(1, 3)


@pytest.fixture
def registered(tmp_path):
    """Registers images of three classes by Detectron2's function, as most projects do."""
    ((_, path, root),) = training.write_images(tmp_path, images=8)
    with open(path) as file:
        content = json.load(file)
    content["categories"] = [{"id": i, "name": name} for name, i in CLASSES.items()]
    for i, annotation in enumerate(content["annotations"]):
        annotation["category_id"] = 1 + i % 3
    with open(path, "w") as file:
        json.dump(content, file)
    register_coco_instances("own_set", {}, path, root)
    yield path, root
    for name in ("own_set", "bare_set"):
        if name in DatasetCatalog.list():
            DatasetCatalog.pop(name)
        MetadataCatalog.pop(name, None)


def own_config(tmp_path, architecture, *overrides):
    cfg = training.config(tmp_path / "out", [])
    cfg.MODEL.OWN = CfgNode({"NUM_CLASSES": 80})
    cfg.MODEL.OTHER = CfgNode({"NUM_CLASSES": 80})
    cfg.merge_from_list([
        "DATASETS.TRAIN", ("own_set",), "MODEL.META_ARCHITECTURE", architecture, *overrides
    ])  # fmt: skip
    prepare_config(cfg)
    return cfg


class ModelOnly(Trainer):
    """A trainer with its own build_model, which does not call that of its parent."""

    @classmethod
    def build_model(cls, cfg):
        return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)


@pytest.mark.parametrize("classes", [1, 2, 4])
@pytest.mark.parametrize(
    "architecture, key, trainer",
    [
        ("GeneralizedRCNN", "ROI_HEADS", Trainer),
        ("OwnRCNN", "ROI_HEADS", Trainer),
        ("OwnRCNN", "ROI_HEADS", ModelOnly),
        ("RetinaNet", "RETINANET", Trainer),
    ],
)
def test_another_number_of_classes_is_refused_of_every_architecture(
    registered, tmp_path, architecture, key, trainer, classes
):
    retina = ("MODEL.RETINANET.IN_FEATURES", ["p3", "p4", "p5", "p6"])
    right = own_config(tmp_path, architecture, f"MODEL.{key}.NUM_CLASSES", 3, *retina)
    trainer(right)
    MetadataCatalog.get("own_set").__dict__.pop("thing_classes")  # as before the first loading
    wrong = own_config(tmp_path, architecture, f"MODEL.{key}.NUM_CLASSES", classes, *retina)
    with pytest.raises(ValueError, match=f"{key}.NUM_CLASSES is {classes}, but 'own_set' has"):
        trainer(wrong)


def test_too_few_classes_in_a_key_of_the_project_are_refused(registered, tmp_path):
    with pytest.raises(ValueError, match="OWN.NUM_CLASSES is 2.* set MODEL.OWN.NUM_CLASSES 3$"):
        ModelOnly(own_config(tmp_path, "OwnDetector", "MODEL.OWN.NUM_CLASSES", 2))


def test_more_classes_in_a_key_of_the_project_are_a_warning(registered, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        ModelOnly(own_config(tmp_path, "OwnDetector"))
    assert "MODEL.OWN.NUM_CLASSES is 80, and 'own_set' has 3 classes" in caplog.text
    assert "MODEL.OTHER" not in caplog.text  # the model does not read it


def test_the_right_number_and_models_without_a_key_are_left_alone(registered, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = ModelOnly(own_config(tmp_path, "OwnDetector", "MODEL.OWN.NUM_CLASSES", 3))
        ModelOnly(own_config(tmp_path, "FixedDetector"))
        Trainer(own_config(tmp_path, "ProposalNetwork"))
    assert issubclass(META_ARCH_REGISTRY.get("ProposalNetwork"), ProposalNetwork)
    assert "NUM_CLASSES" not in caplog.text
    # A config that the model keeps stays a config.
    kept = pickle.loads(pickle.dumps(copy.deepcopy(trainer.model.cfg)))
    assert kept.MODEL.OWN.NUM_CLASSES == 3 and kept.is_frozen() == trainer.cfg.is_frozen()


def test_an_own_mapper_may_merge_classes(registered, tmp_path, caplog):
    class Merging(Trainer):
        @classmethod
        def build_mapper(cls, cfg, is_train):
            mapper = super().build_mapper(cfg, is_train)

            def merge(entry):
                entry = copy.deepcopy(entry)
                for annotation in entry["annotations"]:
                    annotation["category_id"] = 0
                return mapper(entry)

            return merge

    with caplog.at_level(logging.WARNING):
        Merging(own_config(tmp_path, "GeneralizedRCNN", "MODEL.ROI_HEADS.NUM_CLASSES", 1))
    assert "MODEL.ROI_HEADS.NUM_CLASSES is 1, but 'own_set' has 3 categories" in caplog.text
    assert "merges classes" in caplog.text


def test_a_data_set_without_metadata_is_left_alone(registered, tmp_path):
    DatasetCatalog.register("bare_set", lambda: load_coco_json(*registered))
    Trainer(own_config(tmp_path, "GeneralizedRCNN", "DATASETS.TRAIN", ("bare_set",)))


@pytest.fixture
def streets(tmp_path):
    """Registers a panoptic set of two things and, with "things", two stuff classes."""
    yield register_panoptic("streets", write_panoptic(tmp_path / "streets"))
    unregister_panoptic("streets")


@pytest.mark.parametrize("key, wrong", [("ROI_HEADS", 1), ("SEM_SEG_HEAD", 1), ("SEM_SEG_HEAD", 3)])
@pytest.mark.parametrize("architecture", ["PanopticFPN", "OwnPanoptic"])
def test_things_and_stuff_of_a_panoptic_model_are_counted(
    streets, tmp_path, architecture, key, wrong
):
    heads = (
        "MODEL.MASK_ON", True, "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p3", "p4", "p5"],
        "MODEL.SEM_SEG_HEAD.CONVS_DIM", 8, "MODEL.SEM_SEG_HEAD.NORM", "CGBN",
        "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead", "MODEL.ROI_MASK_HEAD.CONV_DIM", 8,
        "MODEL.ROI_HEADS.NUM_CLASSES", 2, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 2,
        "SOLVER.IMS_PER_BATCH", 2, "DATASETS.TRAIN", (streets,),
    )  # fmt: skip
    Trainer(own_config(tmp_path, architecture, *heads))
    with pytest.raises(ValueError, match=f"MODEL.{key}.NUM_CLASSES is {wrong}, but 'streets_sep"):
        Trainer(own_config(tmp_path, architecture, *heads, f"MODEL.{key}.NUM_CLASSES", wrong))


@pytest.mark.parametrize("wrong", [1, 54])
def test_the_stuff_of_a_semantic_model_is_counted(streets, tmp_path, wrong):
    heads = (
        "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p3", "p4", "p5"], "SOLVER.IMS_PER_BATCH", 2,
        "DATASETS.TRAIN", ("streets_stuffonly",), "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False,
        "DATALOADER.ASPECT_RATIO_GROUPING", False, "MEGDET.EPOCH_IMAGES", 4,
    )  # fmt: skip
    own_config(tmp_path, "SemanticSegmentor", *heads, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 2)
    with pytest.raises(ValueError, match=f"NUM_CLASSES is {wrong}, .* has 2 stuff classes"):
        own_config(tmp_path, "SemanticSegmentor", *heads, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", wrong)
