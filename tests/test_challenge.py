"""The whole challenge entry at once: two of its detectors train, evaluate and are fused."""

import json
import math
import os
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

LOSSES = {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc", "loss_segmentation"}
# The challenge's configs as they are, but thin, on digits of 48 px, and 36 iterations long.
SMALL = """
MODEL.WEIGHTS "" MODEL.BACKBONE.FREEZE_AT 0 MODEL.RESNETS.DEPTH 50 MODEL.RESNETS.WIDTH_PER_GROUP 4
MODEL.RESNETS.STEM_OUT_CHANNELS 16 MODEL.RESNETS.RES2_OUT_CHANNELS 32 MODEL.FPN.OUT_CHANNELS 16
MODEL.ROI_BOX_HEAD.CONV_DIM 16 MODEL.ROI_BOX_HEAD.FC_DIM 32 MODEL.SEGMENTATION.CONV_DIM 16
MODEL.LARGE_KERNEL.MID_CHANNELS 8 MODEL.ROI_HEADS.NUM_CLASSES 10
MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16 MODEL.RPN.POST_NMS_TOPK_TRAIN 50
MODEL.RPN.POST_NMS_TOPK_TEST 20 MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0
MODEL.ANCHOR_GENERATOR.SIZES [[8],[12],[16],[24],[32]]
DATASETS.TRAIN ("megdet_digits_train",) DATASETS.TEST ("megdet_digits_val",)
DATASETS.DIGITS.IMAGE_SIZE 48 DATASETS.DIGITS.NUM_TRAIN 16 DATASETS.DIGITS.NUM_VAL 4
INPUT.MIN_SIZE_TRAIN (40,48,56) INPUT.MAX_SIZE_TRAIN 56 INPUT.MIN_SIZE_TEST 48
INPUT.MAX_SIZE_TEST 48 TEST.AUG.MIN_SIZES (40,48,56) TEST.AUG.MAX_SIZE 56
TEST.DETECTIONS_PER_IMAGE 10 DATALOADER.NUM_WORKERS 0
SOLVER.IMS_PER_BATCH 4 MODEL.CGBN.BN_SIZE 4 MEGDET.EPOCH_IMAGES 8
TEST.EVAL_PERIOD 18 SOLVER.CHECKPOINT_PERIOD 18
""".split()
SMALL[SMALL.index('""')] = ""
GROUPS = {
    "megdet_challenge_X101": ["MODEL.RESNETS.NUM_GROUPS", "4"],
    "megdet_challenge_SE_R101": [],
}


def run(data, *words):
    env = {**os.environ, "DETECTRON2_DATASETS": str(data), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, words)],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_all_at_once_trains_evaluates_and_is_fused(tmp_path):
    (tmp_path / "megdet_digits").mkdir()
    for name, groups in GROUPS.items():
        run(
            tmp_path, "train_net.py", "--config-file", f"configs/COCO-Detection/{name}.yaml",
            "--num-gpus", "2", "--dist-url", "auto", *SMALL, *groups,
            "OUTPUT_DIR", tmp_path / name,
        )  # fmt: skip
        lines = (tmp_path / name / "metrics.json").read_text().splitlines()
        metrics = [json.loads(line) for line in lines]
        losses = [{k: v for k, v in row.items() if k in LOSSES} for row in metrics if "lr" in row]
        assert losses and all(set(row) == LOSSES for row in losses)
        assert all(math.isfinite(v) for row in losses for v in row.values())
        # It learns: the losses of the last rows are below the first's.
        assert sum(losses[-1].values()) < sum(losses[0].values())
        final = [row for row in metrics if "bbox_TTA/AP" in row][-1]
        assert final["iteration"] >= 35 and "bbox/AP" in final
    names = [tmp_path / name for name in GROUPS]
    out = run(tmp_path, "-m", "megdet_d2.cli", "ensemble", *names, "--output", tmp_path / "both")
    table = (tmp_path / "both" / "ensemble.md").read_text()
    assert (
        all(str(name) in table for name in names) and "ensemble" in table and table.strip() in out
    )
    fused = json.loads((tmp_path / "both" / "coco_instances_results.json").read_text())
    assert len({box["image_id"] for box in fused}) == 4
