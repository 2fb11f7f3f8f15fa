"""Every example runs end to end, on a few digits."""

import json
import subprocess
import sys

import pytest
import torch
from detectron2.config import LazyConfig

from tests.helpers.paths import ROOT
from tests.helpers.processes import environment

EXAMPLES = ROOT / "examples"
DIGITS = "Digits-Detection/megdet_R18_FPN_b32_bn32.yaml"
# Four updates of a small detector.
SMALL = [
    "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.ROI_BOX_HEAD.CONV_DIM", "16",
    "MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "20",
    "DATASETS.DIGITS.NUM_TRAIN", "16", "DATASETS.DIGITS.NUM_VAL", "4",
    "SOLVER.IMS_PER_BATCH", "8", "MODEL.CGBN.BN_SIZE", "8", "MEGDET.POLICY", "custom",
    "MEGDET.EPOCHS", "2.0", "MEGDET.DECAY_EPOCHS", "(1.0,)", "MEGDET.DECAY_FACTORS", "(0.1,)",
    "TEST.EVAL_PERIOD", "0",
]  # fmt: skip

pytest.importorskip("sklearn", reason="the embedded digits need the demo extra")


def run(name, folder, *words):
    """Runs an example in a folder, and returns what it prints."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(EXAMPLES / name), *map(str, words)],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    """The folder of a training by own_loop.py, on two processes, and what that printed."""
    folder = tmp_path_factory.mktemp("loop")
    words = ["--num-gpus", "2", "--dist-url", "auto", *SMALL, "OUTPUT_DIR", "run"]
    return folder, run("own_loop.py", folder, *words)


def test_own_loop(loop):
    folder, printed = loop
    assert "update 3: loss " in printed and "Evaluation results for bbox" in printed
    model = torch.load(folder / "run" / "model_final.pth", weights_only=True)["model"]
    assert all(torch.isfinite(value).all() for value in model.values())
    assert model["backbone.bottom_up.stem.conv1.norm.num_batches_tracked"] == 4


def test_export(loop):
    """The exported file runs where there is neither Detectron2 nor this plugin."""
    folder, _ = loop
    assert "detects the same " in run("export.py", folder, "run")
    code = (
        "import sys, torch, torchvision\n"
        "model = torch.jit.load('run/model.ts')\n"
        "boxes = model(torch.zeros(3, 64, 64))[0]\n"
        "assert boxes.shape[1] == 4 and 'detectron2' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, timeout=120)


def test_own_mapper(tmp_path):
    words = ["--config-file", DIGITS, *SMALL, "SOLVER.CHECKPOINT_PERIOD", "2", "OUTPUT_DIR"]
    printed = run("own_mapper.py", tmp_path, *words, "a")
    assert "RandomContrast" in printed
    losses = read_losses(tmp_path / "a")
    # Interrupted after two updates: it goes on with the same images, augmented in the same way.
    (tmp_path / "b").mkdir()
    (tmp_path / "a/model_0000001.pth").rename(tmp_path / "b/model_0000001.pth")
    (tmp_path / "b/last_checkpoint").write_text("model_0000001.pth")
    printed = run("own_mapper.py", tmp_path, "--resume", *words, "b")
    assert "its images start over" not in printed
    assert read_losses(tmp_path / "b")[-1] == losses[-1]


def test_lazy_config(tmp_path):
    words = ["--config-file", EXAMPLES / "lazy_digits.py", "--num-gpus", "2", "--dist-url", "auto"]
    words += ["train.max_iter=2", "dataloader.train.total_batch_size=4", "BN_SIZE=4"]
    printed = run("lazy_train.py", tmp_path, *words, "train.output_dir=run")
    # After two updates it detects nothing yet.
    assert "Evaluating predictions with official COCO API" in printed
    assert (tmp_path / "run" / "model_final.pth").is_file()
    assert LazyConfig.load(str(tmp_path / "run" / "config.yaml")).BN_SIZE == 4


def test_every_example_is_run_here():
    source = (ROOT / "tests" / "test_examples.py").read_text()
    assert all(f'"{path.name}"' in source for path in EXAMPLES.glob("*.py"))


def read_losses(folder):
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return [line["total_loss"] for line in lines if "total_loss" in line]
