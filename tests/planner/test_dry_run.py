"""A dry run of 1,024 ranks in one process: what it finds, and what would fail on the cluster."""

import json

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm

import megdet_cli
from megdet_d2.planner.dry_run import dry_run, to_text
from megdet_d2.planner.plan import check
from tests.helpers.paths import TINY
from tests.helpers.training import config, train, write_images

LARGE = (
    "SOLVER.IMS_PER_BATCH", 2048, "MODEL.CGBN.BN_SIZE", 16, "MEGDET.EPOCHS", 400.0,
    "MEGDET.DECAY_EPOCHS", (300,), "MEGDET.WARMUP_EPOCHS", 100.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def test_a_thousand_ranks_in_one_process(coco, tmp_path):
    result = dry_run(config(tmp_path / "new", coco, *LARGE), machines=128, gpus=8)
    assert vars(result.layout) == {"processes": 1024, "accumulation_steps": 1, "images_per_gpu": 2}
    assert result.groups.number == 128 and result.groups.first == tuple(range(8))
    assert result.groups.images == 16 and result.groups.inside_machines
    assert result.base_lr == pytest.approx(0.02 * 128) and result.first_lr == pytest.approx(0.02)
    assert (result.max_iter, result.steps, result.warmup_iters) == (4, (3,), 1)
    assert result.epochs == pytest.approx(4 * 2048 / 24)
    epoch = result.epoch
    assert (epoch.images, epoch.updates, epoch.least, epoch.most) == (24, 1, 2, 2)
    assert epoch.is_disjoint and epoch.is_complete
    assert not (tmp_path / "new").exists()
    assert not dist.is_initialized() and comm.get_world_size() == 1


def test_the_parts_of_the_ranks_are_those_of_a_training(coco, tmp_path, pool2):
    overrides = ("MODEL.CGBN.BN_SIZE", 2, "MEGDET.ACCUMULATION_STEPS", 2, "SOLVER.IMS_PER_BATCH", 8)
    result = dry_run(config(tmp_path / "a", coco, *overrides), machines=1, gpus=2)
    assert (result.groups.number, result.groups.first) == (2, (0,))
    epoch = result.epoch
    assert (epoch.updates, epoch.least, epoch.most) == (3, 12, 12)
    assert epoch.is_disjoint and epoch.is_complete
    real = pool2.run(train, str(tmp_path / "b"), coco, overrides, timeout=120)
    assert result.max_iter == len(real[0]["lr"])
    assert real[0]["lr"][0] == pytest.approx(result.first_lr)
    images = [image for rank in real for batch in rank["images"][:6] for image, _ in batch]
    assert len(images) == 24 and len(set(images)) == 24 - epoch.held_back


def test_agvm_on_one_gpu_is_refused_as_a_training_is(coco, tmp_path):
    overrides = ("SOLVER.IMS_PER_BATCH", 8, "MEGDET.OPTIMIZER", "agvm")
    dry_run(config(tmp_path, coco, *overrides), machines=1, gpus=2)
    with pytest.raises(ValueError, match="one process with MEGDET.ACCUMULATION_STEPS 1"):
        dry_run(config(tmp_path, coco, *overrides), machines=1, gpus=1)


def test_groups_across_machines(coco, tmp_path):
    cfg = config(
        tmp_path, coco, *LARGE, "SOLVER.IMS_PER_BATCH", 24, "MODEL.CGBN.BN_SIZE", -1,
        "MODEL.CGBN.CROSS_MACHINE", True,
    )  # fmt: skip
    result = dry_run(cfg, machines=2, gpus=3)
    assert result.groups.first == (0, 1, 2, 3, 4, 5) and not result.groups.inside_machines
    assert "all across machines; the first: ranks 0 to 5" in to_text(result)


def test_norms_without_groups_and_retinanet(coco, tmp_path):
    cfg = config(
        tmp_path, coco, *LARGE, "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "",
        "MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", 1,
        "MODEL.RETINANET.IN_FEATURES", ["p3", "p4", "p5", "p6"], "MODEL.RETINANET.NORM", "GN",
        "MODEL.FPN.OUT_CHANNELS", 32, "MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", True,
    )  # fmt: skip
    result = dry_run(cfg, machines=128, gpus=8)
    assert result.groups is None and "no layer of CGBN" in to_text(result)
    assert cfg.MODEL.DEVICE == "cuda" and cfg.SOLVER.MAX_ITER == 40000  # as they were
    assert "no GPU: MODEL.DEVICE, SOLVER.AMP.ENABLED" in to_text(result)


AUTO = ("MEGDET.AUTO_MICRO_BATCH", True, "MODEL.CGBN.BN_SIZE", 16, "MODEL.DEVICE", "cuda")
BESIDE = ("TEST.BACKGROUND", True, "TEST.EVAL_PERIOD", 2, "TEST.BACKGROUND_DEVICE", "cuda:3")


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks these keys by the GPUs")
def test_what_only_the_gpus_of_the_cluster_can_check(coco, tmp_path):
    keys = (*AUTO, *BESIDE, "SOLVER.SGD_IMPLEMENTATION", "fused", "SOLVER.IMS_PER_BATCH", 16)
    result = dry_run(config(tmp_path, coco, *keys), machines=1, gpus=8)
    assert vars(result.layout) == {"processes": 8, "accumulation_steps": 1, "images_per_gpu": 2}
    assert result.groups.images == 16
    assert to_text(result).endswith(
        "since this machine has no GPU: MODEL.DEVICE, TEST.BACKGROUND_DEVICE, "
        "SOLVER.SGD_IMPLEMENTATION, MEGDET.AUTO_MICRO_BATCH."
    )
    result = dry_run(config(tmp_path, coco, *BESIDE), machines=1, gpus=2)
    assert result.not_checked == ("TEST.BACKGROUND_DEVICE",)


@pytest.mark.parametrize(
    "keys, message",
    [
        ((*AUTO, "MODEL.CGBN.BN_SIZE", -1), "BN_SIZE is -1, all images that a machine holds"),
        ((*AUTO, "MEGDET.MEMORY_LIMIT_MB", -1), "MEMORY_LIMIT_MB is -1; give MiB, or 0"),
        ((*AUTO, "MODEL.DEVICE", "cpu"), "MODEL.DEVICE is 'cpu', where memory does not end"),
        ((*BESIDE, "TEST.BACKGROUND_DEVICE", "gpu"), "TEST.BACKGROUND_DEVICE is 'gpu'; give"),
        ((*AUTO, "SOLVER.SGD_IMPLEMENTATION", "x"), "SOLVER.SGD_IMPLEMENTATION is 'x'; use one"),
    ],
)
@pytest.mark.parametrize("run", [lambda cfg: dry_run(cfg, 1, 2), check], ids=["dry run", "plan"])
def test_values_that_are_wrong_on_every_machine_are_refused(coco, tmp_path, run, keys, message):
    with pytest.raises(ValueError, match=message):
        run(config(tmp_path, coco, *keys))


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("SOLVER.IMS_PER_BATCH", 2000), "is 2000, which 1024 processes cannot share evenly"),
        (("MODEL.CGBN.BN_SIZE", 3), "BN_SIZE is 3, but no equal groups of the 8 processes"),
        (("MODEL.CGBN.BN_SIZE", 32), "CROSS_MACHINE allows groups that span machines"),
        (("MEGDET.EPOCHS", 2.0, "MEGDET.DECAY_EPOCHS", (1,)), "0.01 mini-batches of 2048"),
        (("MODEL.WEIGHTS", "no.pkl"), "MODEL.WEIGHTS: there is no file"),
        (("MODEL.ROI_HEADS.NUM_CLASSES", 3), "ROI_HEADS.NUM_CLASSES is 3"),
        (("DATASETS.COCO", [["mixed", "no.json", "no"]]), "'no.json': there is no annotation file"),
        (("MODEL.SUBLINEAR.ENABLED", True, "MODEL.SUBLINEAR.STAGES", ("res2", "x")), "has 'x'"),
    ],
)
def test_what_would_fail_there_fails_here(coco, tmp_path, overrides, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        dry_run(config(tmp_path, coco, *LARGE, *overrides), machines=128, gpus=8)
    assert not dist.is_initialized()


def test_the_command(capsys):
    line = ["plan", "--dry-run", TINY, "--machines", "4", "--gpus", "2"]
    megdet_cli.main([*line, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["batch_size"] == 8 and found["layout"]["images_per_gpu"] == 1
    megdet_cli.main([*line, "SOLVER.IMS_PER_BATCH", "16"])
    text = capsys.readouterr().out
    assert "| processes                          | 8: 4 machines x 2" in text
    assert "4 of 4 images, all inside a machine; the first: ranks 0, 1" in text


@pytest.mark.parametrize(
    "words, message",
    [
        ([TINY, "--machines", "-1"], "--machines is -1; give 1 or more"),
        ([TINY, "--machines", "1,2"], "--machines is 1,2; a dry run takes one number"),
        ([TINY, "--machines", "0"], "--machines is 0; give 1 or more"),
        ([TINY, "--machines", "1", "--gpus", "-8"], "--gpus is -8; give 1 or more"),
        (["no.yaml", "--machines", "1"], "there is no config no.yaml"),
    ],
)
def test_mistakes_are_one_line(words, message):
    with pytest.raises(SystemExit) as error:
        megdet_cli.main(["plan", "--dry-run", *words])
    assert message in str(error.value)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--machines", "4"], "--dry-run needs a CONFIG"),
        ([TINY, "--back-test"], "not allowed with argument"),
        ([TINY, "--bn-size", "4"], "--bn-size is not for --dry-run"),
        ([TINY, "--report"], "--report is not for --dry-run"),
    ],
)
def test_mistakes_of_usage(words, message, capsys):
    with pytest.raises(SystemExit):
        megdet_cli.main(["plan", "--dry-run", *words])
    assert message in capsys.readouterr().err
