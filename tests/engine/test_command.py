"""Tests train_net.py as a user runs it, and what it leaves in OUTPUT_DIR."""

import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model

import megdet_d2
import train_net
from megdet_d2.engine import prepare_config
from megdet_d2.norm.batch_norm import cgbn_layers
from tests.helpers import training
from tests.helpers.models import tiny_config
from tests.helpers.paths import HELPERS, TINY, TRAIN_NET

pytestmark = pytest.mark.usefixtures("datasets_root")


def run(*command, check=True, **env):
    result = subprocess.run(
        [sys.executable, "-W", "default", *command],
        env={**os.environ, **env}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    if check:
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    ours = re.findall(r".*/(?:megdet_d2/|train_net\.py).*Warning.*", result.stderr)
    assert not ours, ours
    return result


def read_metrics(output):
    merged = {}
    for line in (output / "metrics.json").read_text().splitlines():
        row = json.loads(line)
        merged.setdefault(row["iteration"], {}).update(row)
    return merged


@pytest.fixture(scope="module")
def trained(tmp_path_factory, datasets_root):
    """Twelve iterations by Detectron2's launcher, two processes."""
    output = tmp_path_factory.mktemp("trained")
    run(
        TRAIN_NET, "--config-file", TINY, "--num-gpus", "2", "--dist-url", "auto",
        "OUTPUT_DIR", str(output),
    )  # fmt: skip
    return output


def test_training_leaves_what_detectron2_users_expect(trained):
    for name in ("model_0000003.pth", "model_final.pth", "last_checkpoint", "config.yaml"):
        assert (trained / name).stat().st_size > 0
    assert list(trained.glob("events.out.tfevents.*"))
    assert (trained / "inference" / "coco_instances_results.json").exists()

    metrics = read_metrics(trained)
    last = metrics[11]
    assert last["effective_batch_size"] == 8 and last["bn_size"] == 8
    assert math.isfinite(last["total_loss"])
    # 64 images / 8 = 8 iterations an epoch; the learning rate of 8 images is 0.01, decayed at 8.
    assert last["lr"] == pytest.approx(0.001)
    assert any("bbox/AP" in row for row in metrics.values())

    log = (trained / "log.txt").read_text()
    layers = len(cgbn_layers(build_model(tiny_config())))
    assert f"CGBN: {layers} layers, each over 8 images on 2 processes (one_reduce)" in log
    assert re.search(r"SOLVER.MAX_ITER\s+\|\s+40000\s+\|\s+12\s+\| 1.5 epochs x 64 images / 8", log)


def test_dumped_config_is_the_resolved_one(trained):
    dumped = get_cfg()
    megdet_d2.add_megdet_config(dumped)
    dumped.merge_from_file(str(trained / "config.yaml"))
    assert (dumped.SOLVER.BASE_LR, dumped.SOLVER.MAX_ITER) == (0.01, 12)
    assert tuple(dumped.SOLVER.STEPS) == (8,)
    before = dumped.dump()
    prepare_config(dumped)
    assert dumped.dump() == before


def test_statistics_of_a_checkpoint_are_those_of_every_rank(trained):
    state = torch.load(trained / "model_final.pth", weights_only=False)["model"]
    counted = [v for k, v in state.items() if k.endswith("num_batches_tracked")]
    assert counted and all(int(v) == 12 for v in counted)


PLAIN = """
import sys, torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.checkpoint import DetectionCheckpointer
weights, config, out = sys.argv[1:]
found = {}
for norm in ("BN", "FrozenBN"):
    cfg = get_cfg()
    cfg.merge_from_file(config, allow_unsafe=True)
    for node in (cfg.MODEL.RESNETS, cfg.MODEL.FPN, cfg.MODEL.ROI_BOX_HEAD):
        node.NORM = norm
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(weights)
    torch.manual_seed(0)
    features = model.backbone(torch.randn(2, 3, 64, 64))
    box = model.roi_heads.box_head(torch.randn(3, 16, 4, 4))
    assert not [m for m in sys.modules if m.startswith("megdet")]
    found[norm] = [*features.values(), box]
torch.save(found, out)
"""


def keep_stock_keys(cfg, stock):
    for key in set(cfg) - set(stock):
        del cfg[key]
    for key, node in stock.items():
        if isinstance(node, CfgNode):
            keep_stock_keys(cfg[key], node)


@pytest.fixture(scope="module")
def features_without_the_plugin(trained, tmp_path_factory):
    """Features that stock Detectron2 computes from the checkpoint, by norm."""
    folder = tmp_path_factory.mktemp("plain")
    # a config without the plugin's keys
    cfg = tiny_config()
    keep_stock_keys(cfg, get_cfg())
    (folder / "plain.yaml").write_text(cfg.dump())
    weights, out = str(trained / "model_final.pth"), str(folder / "out.pt")
    run("-c", PLAIN, weights, str(folder / "plain.yaml"), out)
    return torch.load(out)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_a_checkpoint_loads_where_the_plugin_is_unknown(trained, features_without_the_plugin, norm):
    model = build_model(tiny_config()).eval()
    DetectionCheckpointer(model).load(str(trained / "model_final.pth"))
    torch.manual_seed(0)
    ours = [*model.backbone(torch.randn(2, 3, 64, 64)).values()]
    ours.append(model.roi_heads.box_head(torch.randn(3, 16, 4, 4)))
    for a, b in zip(ours, features_without_the_plugin[norm], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_eval_only_gives_the_same_ap_on_one_process(trained, tmp_path):
    run(
        TRAIN_NET, "--config-file", str(trained / "config.yaml"), "--eval-only",
        "OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", str(trained / "model_final.pth"),
    )  # fmt: skip
    assert len(training.read_detections(trained)) > 20
    assert training.read_detections(tmp_path) == training.read_detections(trained)


def test_eval_only_resumes_and_leaves_the_trainings_config(trained, tmp_path):
    for name in ("model_final.pth", "last_checkpoint", "config.yaml"):
        shutil.copy(trained / name, tmp_path)
    config = str(tmp_path / "config.yaml")
    words = ["--config-file", config, "--eval-only", "--resume", "OUTPUT_DIR", str(tmp_path)]
    train_net.main(default_argument_parser().parse_args(words))
    assert training.read_detections(tmp_path) == training.read_detections(trained)
    assert (tmp_path / "config.yaml").read_bytes() == (trained / "config.yaml").read_bytes()


def test_torchrun_resumes_what_the_launcher_began(trained, tmp_path):
    for name in ("model_0000003.pth", "model_0000007.pth"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    (tmp_path / "last_checkpoint").write_text("model_0000007.pth")
    run(
        "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
        TRAIN_NET, "--config-file", TINY, "--resume", "OUTPUT_DIR", str(tmp_path),
        "TEST.EVAL_PERIOD", "0",
    )  # fmt: skip
    log = (tmp_path / "log.txt").read_text()
    assert "Starting training from iteration 8" in log
    assert "each over 8 images on 2 processes" in log
    assert (tmp_path / "model_final.pth").exists()


def test_plain_project_by_the_environment_module(tmp_path):
    config = tmp_path / "plain.yaml"
    config.write_text(f"_BASE_: {HELPERS / 'plain.yaml'}\nMODEL: {{RESNETS: {{NORM: CGBN}}}}\n")
    result = run(
        str(HELPERS / "plain_project.py"), "--config-file", str(config),
        "OUTPUT_DIR", str(tmp_path),
        DETECTRON2_ENV_MODULE="megdet_d2.env",
    )  # fmt: skip
    assert "plugin imported: True" in result.stdout
    assert int(re.search(r"CGBN layers: (\d+)", result.stdout)[1]) > 20


def test_a_schedule_on_the_command_line_is_refused_beside_a_policy(tmp_path):
    """Before the data sets are read; Detectron2's own default is not, since it undoes a value."""
    words = ["--config-file", TINY, "OUTPUT_DIR", str(tmp_path), "SOLVER.BASE_LR"]
    with pytest.raises(ValueError, match="SOLVER.BASE_LR is 0.01, but MEGDET.POLICY"):
        train_net.setup(default_argument_parser().parse_args([*words, "0.01"]))
    cfg = train_net.setup(default_argument_parser().parse_args([*words, "0.001"]))
    assert cfg.SOLVER.BASE_LR == 0.01  # 0.02 x 8 / 16
