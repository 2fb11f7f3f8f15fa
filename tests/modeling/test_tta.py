"""Checks test-time augmentation on one and two processes, scale jitter, and ROIAlign everywhere."""

import json

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import default_argument_parser
from detectron2.layers import ROIAlign
from detectron2.modeling import build_model

import megdet_d2
import train_net
from megdet_d2.engine import Trainer, prepare_config
from megdet_d2.modeling.tta import TrainedFlipMapperTTA, build_tta, check_tta
from megdet_d2.report.run import Run
from tests.helpers import training
from tests.helpers.paths import CONFIG_FILES


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return training.write_images(tmp_path_factory.mktemp("images"), images=3)


def tta_config(coco, *overrides, output="unused"):
    return training.config(
        output, coco, "DATASETS.TEST", ("mixed",), "TEST.AUG.ENABLED", True,
        "TEST.AUG.MIN_SIZES", (48,), "TEST.AUG.MAX_SIZE", 200, "TEST.AUG.FLIP", False, *overrides,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(coco):
    torch.manual_seed(0)
    return training.settle(build_model(tta_config(coco))).eval()


def pixels(*shape):
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (3, *shape), dtype=np.uint8))


@torch.no_grad()
def detect(detector, image):
    """Returns scores, classes and boxes of a (3, H, W) image."""
    height, width = image.shape[1:]
    found = detector([{"image": image, "height": height, "width": width}])[0]["instances"]
    assert found.image_size == (height, width)
    return found.scores, found.pred_classes, found.pred_boxes.tensor


def test_the_image_at_its_own_size_alone_changes_nothing(coco, model):
    image = pixels(48, 72)
    plain = detect(model, image)
    assert len(plain[0]) > 10
    augmented = detect(build_tta(tta_config(coco), model), image)
    for ours, expected in zip(augmented, plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)


def test_two_scales_are_both_scales_detections(coco, model):
    image = pixels(48, 72)
    cfg = tta_config(coco, "TEST.AUG.MIN_SIZES", (32, 64), "TEST.DETECTIONS_PER_IMAGE", 1000)
    cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST = 1.0  # keeps all
    both = detect(build_tta(cfg, model), image)
    alone = []
    for size in (32, 64):
        cfg.TEST.AUG.MIN_SIZES = (size,)
        alone.append(detect(build_tta(cfg, model), image))
    # Scales are independent: they are not padded to one size.
    for ours, expected in zip(both, map(torch.cat, zip(*alone, strict=True)), strict=True):
        torch.testing.assert_close(ours.sort(0)[0], expected.sort(0)[0], rtol=1e-4, atol=1e-3)


def test_with_its_mirror_image_left_and_right_are_alike(coco, model):
    image = pixels(48, 72)
    detector = build_tta(tta_config(coco, "TEST.AUG.FLIP", True), model)
    scores, classes, boxes = detect(detector, image)
    mirrored = boxes[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1]) + torch.tensor([72, 0, 72, 0])
    for ours, expected in zip(
        detect(detector, image.flip(2)), (scores, classes, mirrored), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)
    plain = detect(model, image.flip(2))[0]
    assert len(plain) != len(scores) or not torch.allclose(plain, scores, rtol=1e-4)


def test_nothing_detected_at_any_scale_is_no_detection(coco, model, monkeypatch):
    monkeypatch.setattr(model.roi_heads.box_predictor, "test_score_thresh", 2.0)
    scores, classes, boxes = detect(build_tta(tta_config(coco), model), pixels(48, 72))
    assert scores.shape == classes.shape == (0,) and boxes.shape == (0, 4)


@pytest.mark.parametrize(
    ("trained", "asked", "versions"),
    [("horizontal", True, 4), ("horizontal", False, 2), ("none", True, 2), ("vertical", True, 2)],
)
def test_mirrors_only_what_was_trained_on_mirror_images(coco, trained, asked, versions):
    cfg = tta_config(coco, "INPUT.RANDOM_FLIP", trained, "TEST.AUG.FLIP", asked)
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE = (24, 96), 96
    image = pixels(48, 72)
    made = TrainedFlipMapperTTA(cfg)({"image": image, "height": 48, "width": 72})
    shapes = [(24, 36), (64, 96)]  # the longer side is at its limit
    assert [tuple(d["image"].shape[1:]) for d in made] == sorted(shapes * (versions // 2))


def test_evaluates_with_and_without_by_the_command(tmp_path, coco, model):
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    cfg = tta_config(coco, "MODEL.WEIGHTS", str(tmp_path / "model.pth"), output=tmp_path)
    # The loader's size has no influence on the scales.
    cfg.INPUT.MIN_SIZE_TEST = 24
    (tmp_path / "config.yaml").write_text(cfg.dump())
    arguments = ["--config-file", str(tmp_path / "config.yaml"), "--eval-only"]
    results = train_net.main(default_argument_parser().parse_args(arguments))
    assert set(results) == {"bbox", "bbox_TTA"}
    assert results["bbox_TTA"].keys() == results["bbox"].keys()

    same = train_net.main(
        default_argument_parser().parse_args(
            [*arguments, "INPUT.MIN_SIZE_TEST", "48", "TEST.AUG.ENABLED", "False",
             "OUTPUT_DIR", str(tmp_path / "plain")]
        )
    )  # fmt: skip
    assert set(same) == {"bbox"}
    ours, expected = (
        json.loads((tmp_path / folder / "coco_instances_results.json").read_text())
        for folder in ("inference_TTA", "plain/inference")
    )
    assert len(ours) == len(expected) > 10
    for a, b in zip(ours, expected, strict=True):
        assert a["image_id"] == b["image_id"]
        assert [*a["bbox"], a["score"]] == pytest.approx([*b["bbox"], b["score"]], abs=1e-2)


def test_two_processes_evaluate_after_training(tmp_path, coco, pool2):
    overrides = (
        "DATASETS.TEST", ("mixed",), "TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (40, 48),
        "MEGDET.EPOCH_IMAGES", 8, "MEGDET.EPOCHS", 1.0, "MEGDET.DECAY_EPOCHS", (),
        "MEGDET.DECAY_FACTORS", (), "INPUT.MIN_SIZE_TRAIN", (48,), "SOLVER.IMS_PER_BATCH", 4,
        "TEST.EVAL_PERIOD", 1,
    )  # fmt: skip
    rows = pool2.run(training.train, str(tmp_path), coco, overrides)[0]["rows"]
    assert [("bbox/AP" in row, "bbox_TTA/AP" in row) for row in rows[-2:]] == [
        (True, False),
        (True, True),  # only at the end
    ]
    cfg = training.config(tmp_path, coco, *overrides)
    prepare_config(cfg)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    run = Run.read(tmp_path)
    assert run.final() == rows[-1]["bbox_TTA/AP"]
    assert run.final("AP50") == rows[-1]["bbox_TTA/AP50"]
    found = json.loads((tmp_path / "inference_TTA" / "coco_instances_results.json").read_text())
    assert {result["image_id"] for result in found} == {1, 2, 3}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("MODEL.META_ARCHITECTURE", "RetinaNet"),
            "META_ARCHITECTURE is 'RetinaNet'.*ENABLED False",
        ),
        (("MODEL.META_ARCHITECTURE", "PanopticFPN"), "META_ARCHITECTURE is 'PanopticFPN'"),
        (("MODEL.KEYPOINT_ON", True), "MODEL.KEYPOINT_ON"),
        (("MODEL.LOAD_PROPOSALS", True), "MODEL.LOAD_PROPOSALS"),
        (("TEST.AUG.MIN_SIZES", ()), r"MIN_SIZES is \(\)"),
        (("TEST.AUG.MIN_SIZES", (0, 800)), r"MIN_SIZES is \(0, 800\)"),
        (("TEST.AUG.MAX_SIZE", 0), "MAX_SIZE is 0"),
    ],
)
def test_refuses_before_training_what_would_fail_after_it(coco, overrides, message):
    cfg = tta_config(coco, *overrides)
    with pytest.raises(ValueError, match=message):
        prepare_config(cfg)
    cfg.TEST.AUG.ENABLED = False
    check_tta(cfg)


def test_every_config_with_regions_aligns_them(coco, model):
    """Checks for ROIAlign [14] with the half-pixel correction of Detectron2's V2."""
    checked = 0
    for path in CONFIG_FILES:
        cfg = get_cfg()
        megdet_d2.add_megdet_config(cfg)
        cfg.merge_from_file(str(path))
        if cfg.MODEL.META_ARCHITECTURE != "RetinaNet":
            assert cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE == "ROIAlignV2", path
            checked += 1
    assert checked > 40
    for level in model.roi_heads.box_pooler.level_poolers:
        assert isinstance(level, ROIAlign) and level.aligned


def test_scale_jitter_draws_every_size(coco, tmp_path):
    sizes = (48, 64, 80)
    cfg = training.config(
        tmp_path, coco, "INPUT.MIN_SIZE_TRAIN", sizes, "INPUT.CROP.ENABLED", False,
        "SOLVER.IMS_PER_BATCH", 3, "MEGDET.POLICY", "",
    )  # fmt: skip
    prepare_config(cfg)
    loader = iter(Trainer.build_train_loader(cfg))
    seen = {min(d["image"].shape[1:]) for _ in range(10) for d in next(loader)}
    assert seen == set(sizes)
