"""Tests that prepare_config refuses bad input before work starts."""

import pytest

from megdet_d2.engine import prepare_config
from tests.helpers.models import tiny_config

pytestmark = pytest.mark.usefixtures("datasets_root")


def test_evaluation_needs_no_training_images():
    cfg = tiny_config("DATASETS.COCO", [["gone", "nowhere.json", "nowhere"]])
    cfg.DATASETS.TRAIN = ("gone",)
    assert prepare_config(cfg, eval_only=True) == ""
    with pytest.raises(FileNotFoundError):
        prepare_config(cfg)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("MODEL.CGBN.BN_SIZE", 3), "BN_SIZE is 3.*Nearest valid sizes: 8"),
        (("MODEL.CGBN.ALGORITHM", "fast"), "ALGORITHM is 'fast'; use one of one_reduce, two_pass"),
        (("SOLVER.AMP.ENABLED", True), "AMP.ENABLED is True, and there is no GPU"),
        (("SOLVER.CHECKPOINT_PERIOD", 0), "CHECKPOINT_PERIOD is 0; give iterations, 1 or more"),
        (("SOLVER.CHECKPOINT_PERIOD", -1), "CHECKPOINT_PERIOD is -1; .*at its end only"),
        (("MODEL.WEIGHTS", "nowhere.pkl"), "MODEL.WEIGHTS: there is no file 'nowhere.pkl'"),
        (("MODEL.ROI_HEADS.NUM_CLASSES", 9), "NUM_CLASSES is 9"),
        (("DATASETS.DIGITS.DIFFICULTY", "simple"), "(?i)difficulty.*simple"),
        (("DATASETS.TRAIN", ("mine",)), "DATASETS.TRAIN has 'mine', which is not registered"),
    ],
)
def test_bad_input_is_refused_before_work_starts(overrides, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare_config(tiny_config(*overrides))


def test_evaluation_needs_no_training_keys():
    cfg = tiny_config("MODEL.CGBN.BN_SIZE", 3, "SOLVER.AMP.ENABLED", True)
    assert prepare_config(cfg, eval_only=True) == ""
