"""train_net.py as a user runs it, and what it leaves behind."""

import importlib
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model
from torch import nn

import megdet_d2
import train_net
from megdet_d2.engine import prepare_config
from megdet_d2.engine.launch import launch
from megdet_d2.norm.batch_norm import cgbn_layers
from megdet_d2.norm.running_statistics import average_statistics, own_statistics
from megdet_d2.report import command as report
from megdet_d2.report.run import Run
from tests.helpers import training
from tests.helpers.models import tiny_config
from tests.helpers.paths import HELPERS, TINY, TRAIN_NET


@pytest.fixture(scope="module", autouse=True)
def datasets_root(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(tmp_path_factory.mktemp("datasets")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


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
def trained(tmp_path_factory):
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
weights, norm, config, out = sys.argv[1:]
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
torch.save([*features.values(), box], out)
"""


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_a_checkpoint_loads_where_the_plugin_is_unknown(trained, tmp_path, norm):
    # a config without the plugin's keys
    cfg, stock = tiny_config(), get_cfg()
    del cfg["MEGDET"]
    for ours, theirs in ((cfg.MODEL, stock.MODEL), (cfg.DATASETS, stock.DATASETS)):
        for key in set(ours) - set(theirs):
            del ours[key]
    (tmp_path / "plain.yaml").write_text(cfg.dump())
    weights, out = str(trained / "model_final.pth"), str(tmp_path / "out.pt")
    run("-c", PLAIN, weights, norm, str(tmp_path / "plain.yaml"), out)

    model = build_model(tiny_config()).eval()
    DetectionCheckpointer(model).load(weights)
    torch.manual_seed(0)
    ours = [*model.backbone(torch.randn(2, 3, 64, 64)).values()]
    ours.append(model.roi_heads.box_head(torch.randn(3, 16, 4, 4)))
    for a, b in zip(ours, torch.load(out), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "FrozenBN"])
def test_other_checkpoints_load_into_cgbn(tmp_path, norm):
    other = tiny_config()
    for node in (other.MODEL.RESNETS, other.MODEL.FPN, other.MODEL.ROI_BOX_HEAD):
        node.NORM = norm
    theirs, ours = build_model(other).eval(), build_model(tiny_config()).eval()
    for name, buffer in theirs.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(torch.rand(buffer.shape))
    DetectionCheckpointer(theirs, str(tmp_path)).save("other")
    DetectionCheckpointer(ours).load(str(tmp_path / "other.pth"))
    x = torch.randn(2, 3, 64, 64)
    for a, b in zip(ours.backbone(x).values(), theirs.backbone(x).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def detections(output, folder="inference"):
    found = json.loads((output / folder / "coco_instances_results.json").read_text())
    return sorted((d["image_id"], round(d["score"], 4), d["category_id"]) for d in found)


def test_eval_only_gives_the_same_ap_on_one_process(trained, tmp_path):
    run(
        TRAIN_NET, "--config-file", str(trained / "config.yaml"), "--eval-only",
        "OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", str(trained / "model_final.pth"),
    )  # fmt: skip
    assert len(detections(trained)) > 20
    assert detections(tmp_path) == detections(trained)


@pytest.fixture
def loggers():
    """As they were, once ``default_setup`` has been called in this process."""
    before = [logging.getLogger(name) for name in ("fvcore", "detectron2", "megdet_d2")]
    before = [(logger, logger.level, logger.propagate, logger.handlers[:]) for logger in before]
    yield
    for logger, level, propagate, handlers in before:
        logger.setLevel(level)
        logger.propagate, logger.handlers = propagate, handlers


def test_eval_only_resumes_and_leaves_the_trainings_config(trained, tmp_path, loggers):
    for name in ("model_final.pth", "last_checkpoint", "config.yaml"):
        shutil.copy(trained / name, tmp_path)
    config = str(tmp_path / "config.yaml")
    words = ["--config-file", config, "--eval-only", "--resume", "OUTPUT_DIR", str(tmp_path)]
    train_net.main(default_argument_parser().parse_args(words))
    assert detections(tmp_path) == detections(trained)
    assert (tmp_path / "config.yaml").read_bytes() == (trained / "config.yaml").read_bytes()


@pytest.fixture(scope="module")
def two_test_sets(tmp_path_factory):
    """A training that is evaluated on two sets: of small objects, and of medium ones."""
    output, coco = tmp_path_factory.mktemp("two_test_sets"), []
    for name, shift, side in (("mixed", 0, 20), ("other", 100, 40)):
        folder = tmp_path_factory.mktemp(name)
        ((_, path, root),) = training.write_images(folder, images=8)
        content = json.loads(Path(path).read_text())
        for image in content["images"]:
            image["id"] += shift
        for annotation in content["annotations"]:
            annotation["image_id"] += shift
            annotation |= {"bbox": [4, 4, side, side], "area": side**2}
        Path(path).write_text(json.dumps(content))
        coco.append([name, path, root])
    overrides = ("DATASETS.TEST", ("mixed", "other"))
    rows = training.train(0, str(output), coco, overrides)["rows"]
    cfg = training.config(output, coco, *overrides)
    prepare_config(cfg)
    (output / "config.yaml").write_text(cfg.dump())
    return output, rows


def test_each_test_set_has_a_folder_of_its_own(two_test_sets):
    output, _ = two_test_sets
    for name, ids in (("mixed", range(1, 9)), ("other", range(101, 109))):
        found = detections(output, f"inference/{name}")
        assert {image for image, *_ in found} == set(ids)


def test_the_ap_of_a_run_is_of_the_first_of_its_test_sets(two_test_sets):
    output, rows = two_test_sets
    run = Run.read(output)
    assert run.final() == rows[-1]["mixed/bbox/AP"]
    assert math.isfinite(run.final("APs")) and math.isnan(run.final("APm"))
    assert math.isfinite(rows[-1]["other/bbox/APm"])


def test_detections_of_the_first_test_set_are_drawn(two_test_sets):
    pytest.importorskip("matplotlib", reason="the report needs the demo extra")
    picture = report.draw_detections(
        two_test_sets[0], two_test_sets[0] / "detections.png", num_images=2
    )
    assert picture.stat().st_size > 10_000


def test_evaluation_needs_no_training_images(trained):
    cfg = tiny_config("DATASETS.COCO", [["gone", "nowhere.json", "nowhere"]])
    cfg.DATASETS.TRAIN = ("gone",)
    assert prepare_config(cfg, eval_only=True) == ""
    with pytest.raises(FileNotFoundError):
        prepare_config(cfg)


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


def average_task(rank):
    model = nn.Sequential(
        megdet_d2.CrossGPUBatchNorm(2), nn.BatchNorm2d(2), megdet_d2.CrossGPUBatchNorm(3)
    )
    for layer in model:
        layer.running_mean.fill_(rank)
        layer.running_var.fill_(rank**2)
    average_statistics(model)
    for layer in (model[0], model[2]):
        assert layer.running_mean.eq(1.5).all() and layer.running_var.eq(14 / 4).all()
    assert model[1].running_mean.eq(rank).all()


def test_running_statistics_are_averaged_over_all_ranks(pool4):
    pool4.run(average_task)


def train_in_groups_of_one(rank, output):
    """Trains four iterations; returns this process's statistics at each checkpoint."""
    from megdet_d2.engine import Trainer
    from megdet_d2.engine.checkpoint import Checkpointer

    cfg = tiny_config(
        "MODEL.CGBN.BN_SIZE", 4, "OUTPUT_DIR", output, "SOLVER.CHECKPOINT_PERIOD", 2,
        "MEGDET.EPOCHS", 0.5, "MEGDET.DECAY_EPOCHS", (), "MEGDET.DECAY_FACTORS", (),
        "MEGDET.WARMUP_EPOCHS", 0.0, "TEST.EVAL_PERIOD", 4, "MODEL.CGBN.ALGORITHM", "two_pass",
    )  # fmt: skip
    prepare_config(cfg)
    own, evaluated, stock = [], [], Checkpointer.gather

    def gather(self):
        stock(self)
        own.append(own_statistics(self.model))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpointer, "gather", gather)
        trainer = Trainer(cfg)
        layers = cgbn_layers(trainer.model)

        def note(layer, inputs):
            if not layer.training:
                evaluated.append(layer.running_mean.clone())

        layers[0].register_forward_pre_hook(note)
        trainer.resume_or_load(resume=False)
        trainer.train()
    assert all(layer.group_size() == 1 and layer.algorithm == "two_pass" for layer in layers)
    # neither the checkpoint nor the evaluation after it has touched them
    kept = own_statistics(trainer.checkpointer.model)
    assert all(kept[name].equal(own[-1][name]) for name in kept)
    # what was evaluated is what a checkpoint has, not a model of this process's own
    name = next(name for name in kept if kept[name].equal(layers[0].running_mean))
    return own, evaluated, name


def test_checkpoints_hold_the_mean_of_the_groups_statistics(pool2, tmp_path):
    results = pool2.run(train_in_groups_of_one, str(tmp_path), timeout=200)
    (first, evaluated, name), (second, _, _) = results
    assert len(first) == len(second) == 3  # iterations 2 and 4, and for whoever saves after it
    for mean in evaluated + results[1][1]:
        torch.testing.assert_close(mean, (first[1][name] + second[1][name]) / 2)
    assert evaluated and results[1][1]
    first, second = first[:2], second[:2]
    for name, own0, own1 in zip(
        ["model_0000001.pth", "model_final.pth"], first, second, strict=True
    ):
        state = torch.load(tmp_path / name)
        variances = {k: v for k, v in state["model"].items() if k.endswith("running_var")}
        assert variances
        for key, variance in variances.items():
            assert not own0[key].equal(own1[key])
            torch.testing.assert_close(variance, (own0[key] + own1[key]) / 2)
            for own, saved in zip((own0, own1), state["processes"]["statistics"], strict=True):
                assert own[key].equal(saved[key])


def build_over_machines(rank, output, coco):
    from megdet_d2.engine import Trainer

    overrides = ("MODEL.CGBN.BN_SIZE", 8)  # of 8 images, on four processes
    with pytest.raises(ValueError, match="BN_SIZE is 8.*work: 2 and 4.*CGBN.CROSS_MACHINE"):
        prepare_config(training.config(output, coco, *overrides))
    cfg = training.config(output, coco, *overrides, "MODEL.CGBN.CROSS_MACHINE", True)
    prepare_config(cfg)
    return {layer.group_size() for layer in cgbn_layers(Trainer(cfg).model)}


def test_cross_machine_lets_a_group_span_two_machines(two_machines, tmp_path):
    coco = training.write_images(tmp_path)
    assert two_machines.run(build_over_machines, str(tmp_path / "out"), coco) == [{4}] * 4


def test_a_config_without_the_plugins_keys_is_named():
    from megdet_d2.engine import Trainer

    with pytest.raises(ValueError, match=r"call megdet_d2.add_megdet_config\(cfg\) first"):
        Trainer(get_cfg())


# --- two processes of two images train as one of four -------------------------------------------


def ten_losses(rank, world_size):
    with pytest.MonkeyPatch.context() as patch:
        return _ten_losses(rank, world_size, patch)


def _ten_losses(rank, world_size, patch):
    nms = importlib.import_module("detectron2.layers.nms")  # the package has a function so named
    from detectron2.structures import Boxes, Instances
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(7)
    # Every anchor and every proposal is kept, so that no random choice depends on the process,
    # and every image gives the same number of regions: Detectron2 divides by a process's count.
    cfg = tiny_config(
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 10000, "MODEL.RPN.POSITIVE_FRACTION", 1.0,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 10000, "MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0,
        "MODEL.RPN.NMS_THRESH", 1.0,
    )  # fmt: skip
    model = build_model(cfg).double()
    # Detectron2 hands float32 boxes with the model's scores to an operator that wants one dtype.
    stock = nms.box_ops.batched_nms
    patch.setattr(nms.box_ops, "batched_nms", lambda b, s, i, t: stock(b, s.float(), i, t))
    generator = torch.Generator().manual_seed(1)
    batch = []
    for _ in range(4):
        corner = torch.randint(0, 30, (3, 2), generator=generator).double()
        size = torch.randint(12, 30, (3, 2), generator=generator).double()
        instances = Instances((64, 64))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + size], 1))
        instances.gt_classes = torch.randint(0, 10, (3,), generator=generator)
        image = torch.randint(0, 256, (3, 64, 64), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": 64, "width": 64})
    if world_size > 1:
        megdet_d2.set_bn_size(model, 4, 2)
        model = DistributedDataParallel(model, broadcast_buffers=False)
        batch = batch[2 * rank : 2 * rank + 2]
    # Small steps: at a rate that trains, rounding grows fifty-fold an iteration in this model.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    from detectron2.utils.events import EventStorage

    rows = []
    with EventStorage():
        for _ in range(10):
            losses = model(batch)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            rows.append({name: float(loss) for name, loss in losses.items()})
    return rows


def test_two_processes_of_two_images_are_one_of_four(pool2):
    whole = ten_losses(0, 1)
    halves = pool2.run(ten_losses, 2, timeout=120)
    assert whole[0] != whole[9]
    for step, losses in enumerate(whole):
        for name, loss in losses.items():
            mean = sum(half[step][name] for half in halves) / 2
            assert mean == pytest.approx(loss, rel=1e-5), f"{name} at step {step}"


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("MODEL.CGBN.BN_SIZE", 3), "BN_SIZE is 3.*Nearest valid sizes: 8"),
        (("MODEL.CGBN.ALGORITHM", "fast"), "ALGORITHM is 'fast'; use one of one_reduce, two_pass"),
        (("SOLVER.AMP.ENABLED", True), "AMP.ENABLED is True, and there is no GPU"),
        (("MODEL.WEIGHTS", "nowhere.pkl"), "MODEL.WEIGHTS: there is no file 'nowhere.pkl'"),
        (("MODEL.ROI_HEADS.NUM_CLASSES", 9), "NUM_CLASSES is 9"),
        (("DATASETS.DIGITS.DIFFICULTY", "simple"), "(?i)difficulty.*simple"),
        (("DATASETS.TRAIN", ("mine",)), "DATASETS.TRAIN has 'mine', which is not registered"),
    ],
)
def test_bad_input_is_refused_before_work_starts(overrides, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare_config(tiny_config(*overrides))


def test_a_schedule_on_the_command_line_is_refused_beside_a_policy(tmp_path):
    """Detectron2's own default among them, which the config cannot show."""
    words = ["--config-file", TINY, "OUTPUT_DIR", str(tmp_path), "SOLVER.BASE_LR", "0.001"]
    with pytest.raises(ValueError, match="SOLVER.BASE_LR is set on the command line"):
        train_net.setup(default_argument_parser().parse_args(words))


def test_evaluation_needs_no_training_keys():
    cfg = tiny_config("MODEL.CGBN.BN_SIZE", 3, "SOLVER.AMP.ENABLED", True)
    assert prepare_config(cfg, eval_only=True) == ""


def test_flags_that_contradict_torchrun(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    args = default_argument_parser().parse_args(["--num-gpus", "8"])
    with pytest.raises(ValueError, match="--num-gpus 8 .* leave these flags to torchrun"):
        launch(print, args)


def test_the_ddp_patch_lasts_as_long_as_the_constructor():
    import detectron2.engine.defaults as defaults

    from megdet_d2.engine.ddp import ddp_without_device_ids

    stock = defaults.create_ddp_model
    with pytest.raises(RuntimeError), ddp_without_device_ids(tiny_config()):
        assert defaults.create_ddp_model.keywords == {"device_ids": None}
        raise RuntimeError
    assert defaults.create_ddp_model is stock
    gpu = tiny_config("MODEL.DEVICE", "cuda")
    with ddp_without_device_ids(gpu):
        assert defaults.create_ddp_model is stock
