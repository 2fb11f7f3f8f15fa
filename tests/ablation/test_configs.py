"""Tests that every row of Tables 2 and 3 resolves to the paper's numbers at its world size."""

import re

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.testing._internal.distributed.fake_pg import FakeStore

import megdet_d2
from megdet_d2.ablation.ledger import config_digest
from megdet_d2.ablation.rows import read_rows
from megdet_d2.norm import groups
from megdet_d2.norm.batch_norm import cgbn_layers
from megdet_d2.norm.configure import describe_norms
from tests.helpers.models import build_on_meta, load_config
from tests.helpers.paths import CONFIGS, ROW_LISTS
from tests.helpers.schedules import GPUS_PER_MACHINE, LONG, NORMAL

# batch, factor on the learning rate, mmAP, hours
TABLE2 = {
    "1_b16_frozen": (16, 1, 36.2, 33.2),
    "2_b32_frozen": (32, 1, 36.4, 15.1),
    "3_b64_frozen": (64, 1, "failed", None),
    "4_b64_frozen_half_lr": (64, 0.5, 36.0, 7.5),
    "5_b128_frozen_half_lr": (128, 0.5, "failed", None),
}
# batch, BN size, GPUs, mmAP, hours
TABLE3 = {
    "01_b16_base": (16, 0, 8, 36.2, 33.2),
    "02_b2_bn2": (2, 2, 2, 31.5, 131.2),
    "03_b4_bn4": (4, 4, 4, 34.9, 91.4),
    "04_b8_bn8": (8, 8, 8, 35.9, 71.5),
    "05_b16_bn2": (16, 2, 8, 31.0, 45.6),
    "06_b16_bn16": (16, 16, 8, 37.0, 39.5),
    "07_b32_bn32": (32, 32, 8, 37.3, 45.5),
    "08_b64_bn64": (64, 64, 8, 35.3, 40.9),
    "09_b64_bn32": (64, 32, 16, 37.1, 19.6),
    "10_b64_bn16": (64, 16, 32, 37.1, 11.2),
    "11_b128_bn32": (128, 32, 32, 37.1, 11.3),
    "12_b128_bn16": (128, 16, 64, 37.0, 6.5),
    "13_b256_bn32": (256, 32, 64, 37.1, 7.2),
    "14_b256_bn16": (256, 16, 128, 37.1, 4.1),
    "15_b16_bn16_long": (16, 16, 8, 37.7, 65.2),
    "16_b32_bn32_long": (32, 32, 8, 37.8, 60.3),
    "17_b64_bn32_long": (64, 32, 16, 37.6, 30.1),
    "18_b128_bn32_long": (128, 32, 32, 37.6, 15.8),
    "19_b256_bn32_long": (256, 32, 64, 37.7, 9.4),
    "20_b256_bn16_long": (256, 16, 128, 37.7, 5.4),
}
# Mini-batches below the reference have a constant warm-up, because min(r, r̂) = r̂.
SMALL = {
    2: (2, 0.0025, 649000, (472000, 590000), 59000, 1.0),
    4: (4, 0.005, 324500, (236000, 295000), 29500, 1.0),
    8: (8, 0.01, 162250, (118000, 147500), 14750, 1.0),
}
ROWS = {
    **{f"table2/{n}": (b, 0, b // 2, f, ap, h) for n, (b, f, ap, h) in TABLE2.items()},
    **{f"table3/{n}": (b, bn, g, 1, ap, h) for n, (b, bn, g, ap, h) in TABLE3.items()},
}
# Rows that are not in the paper's tables: GPUs, BN size, learning rate, start of the warm-up,
# CGBN layers.
BACKBONE, FPN, HEADS = 42, 8, 4
OTHERS = {
    "warmup/1_b64_frozen_reference": (32, 0, 0.08, 0.25, 0),
    "warmup/2_b64_frozen_zero": (32, 0, 0.08, 0.001, 0),
    "warmup/3_b128_frozen_reference": (64, 0, 0.16, 0.125, 0),
    "warmup/4_b128_frozen_zero": (64, 0, 0.16, 0.001, 0),
    "warmup/5_b256_frozen_reference": (128, 0, 0.32, 0.0625, 0),
    "warmup/6_b256_frozen_zero": (128, 0, 0.32, 0.001, 0),
    "warmup/7_b256_bn16_reference": (128, 16, 0.32, 0.0625, BACKBONE + FPN),
    "warmup/8_b256_bn16_zero": (128, 16, 0.32, 0.001, BACKBONE + FPN),
    **{
        f"bn_size/{n}": (gpus, bn, 0.08, 0.25, BACKBONE + FPN)
        for n, gpus, bn in (
            ("1_b64_bn2", 32, 2),
            ("2_b64_bn4", 32, 4),
            ("3_b64_bn8", 32, 8),
            ("4_b64_bn16", 32, 16),
            ("5_b64_bn32", 16, 32),
            ("6_b64_bn64", 8, 64),
        )
    },
    "scaling/1_b256_linear": (128, 16, 0.32, 0.0625, BACKBONE + FPN),
    "scaling/2_b256_sqrt": (128, 16, 0.08, 0.25, BACKBONE + FPN),
    "scaling/3_b256_none": (128, 16, 0.02, 1.0, BACKBONE + FPN),
    "algorithm/1_one_reduce": (8, 16, 0.02, 1.0, BACKBONE + FPN),
    "algorithm/2_two_pass": (8, 16, 0.02, 1.0, BACKBONE + FPN),
    "placement/1_backbone": (8, 16, 0.02, 1.0, BACKBONE),
    "placement/2_backbone_fpn": (8, 16, 0.02, 1.0, BACKBONE + FPN),
    "placement/3_backbone_fpn_heads": (8, 16, 0.02, 1.0, BACKBONE + FPN + HEADS),
}


@pytest.fixture
def fake_world():
    """Starts a world of fake ranks in this process: groups are real, but no message is sent."""

    def start(world_size: int) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
        comm.create_local_process_group(min(GPUS_PER_MACHINE, world_size))

    yield start
    dist.destroy_process_group()
    comm._LOCAL_PROCESS_GROUP = None
    comm.create_local_process_group.cache_clear()
    groups._cache.clear()


def test_every_row_is_here_and_no_other():
    found = (CONFIGS / "ablations").glob("*/*.yaml")
    # Rows for the small detectors only have tests below.
    small = ("challenge", "headline")
    rows = {f"{p.parent.name}/{p.stem}" for p in found if p.parent.name not in small}
    assert rows == set(ROWS) | set(OTHERS)
    assert (len(TABLE2), len(TABLE3)) == (5, 20)


@pytest.mark.parametrize("name", ROWS)
def test_row_is_the_papers(name, fake_world):
    batch, bn_size, gpus, factor, ap, hours = ROWS[name]
    cfg = load_config(f"ablations/{name}")
    assert (
        cfg.MEGDET.ABLATION.GPUS,
        cfg.MEGDET.ABLATION.PAPER_AP,
        cfg.MEGDET.ABLATION.PAPER_HOURS,
    ) == (gpus, ap, hours)
    fake_world(gpus)
    megdet_d2.scale_config(cfg)
    policy = LONG if name.endswith("_long") else NORMAL | SMALL
    _, lr, max_iter, steps, warmup, start = policy[batch]
    solver = cfg.SOLVER
    assert solver.IMS_PER_BATCH == batch
    assert solver.BASE_LR == pytest.approx(lr * factor, rel=1e-12)
    assert (solver.MAX_ITER, tuple(solver.STEPS)) == (max_iter, steps)
    assert solver.WARMUP_ITERS == warmup
    assert solver.WARMUP_FACTOR == pytest.approx(min(1, start / factor))
    epochs = 18 if name.endswith("_long") else 11
    period = cfg.TEST.EVAL_PERIOD
    assert period == solver.CHECKPOINT_PERIOD
    assert (epochs - 1) * period < max_iter <= epochs * period
    assert cfg.OUTPUT_DIR == f"output/{name}"
    # "When the BN size >= 32, the sublinear memory is applied."
    assert cfg.MODEL.SUBLINEAR.ENABLED == (bn_size >= 32)
    check_groups(cfg, gpus, bn_size, BACKBONE + FPN if bn_size else 0)


@pytest.mark.parametrize("name", OTHERS)
def test_variation_is_what_its_name_says(name, fake_world):
    gpus, bn_size, lr, warmup_start, layers = OTHERS[name]
    batch_size = 64 if name.startswith("bn_size") else 2 * gpus
    cfg = load_config(f"ablations/{name}")
    assert cfg.MEGDET.ABLATION.GPUS == gpus and cfg.SOLVER.IMS_PER_BATCH == batch_size
    fake_world(gpus)
    megdet_d2.scale_config(cfg)
    assert cfg.SOLVER.BASE_LR == pytest.approx(lr)
    assert cfg.SOLVER.WARMUP_FACTOR == pytest.approx(warmup_start)
    assert cfg.SOLVER.MAX_ITER == NORMAL[batch_size][2]
    assert cfg.OUTPUT_DIR == f"output/{name}"
    assert (cfg.MODEL.CGBN.ALGORITHM == "two_pass") == name.endswith("two_pass")
    check_groups(cfg, gpus, bn_size, layers)


# Norms of the reduced detector: ResNet-18 has 20, the thin ResNet-50 has 52, since its res2 is as
# wide as the stem and needs no shortcut. The FPN has 8, the box head one.
R18, THIN_R50 = 20 + 8 + 1, 52 + 8 + 1
CHALLENGE = {
    "01_baseline": R18,
    "02_ohem": R18,
    "03_context": R18 + 1,
    "04_segmentation": R18 + 1,
    "05_se_resnet18": R18,
    "06_large_kernel_rpn": R18,
    "07_large_kernel_box": R18,
    "08_noc": R18 + 2,
    "09_maxout": R18,
    "10_multi_scale": R18,
    "11_tta": R18,
    "12_thin_baseline": THIN_R50,
    "13_thin_atrous": THIN_R50 - 2 + 1,
    "14_thin_dc5": THIN_R50 - 8,
    "15_thin_resnext": THIN_R50,
    "16_thin_se_resnext": THIN_R50,
}


def test_challenge_rows():
    """Each row is the reduced detector with one technique, and has the expected number of norms."""
    rows = {row.name: row for row in read_rows(CONFIGS / "ablations" / "challenge")}
    assert list(rows) == list(CHALLENGE)
    solvers = {str(row.cfg.SOLVER) for row in rows.values()}
    assert len(solvers) == 1 and len({str(row.cfg) for row in rows.values()}) == len(rows)
    for name, layers in CHALLENGE.items():
        row = rows[name]
        assert (row.batch_size, row.bn_size, row.processes) == (8, 8, 2)
        assert len(cgbn_layers(build_on_meta(row.cfg))) == layers, name


def check_groups(cfg, gpus: int, bn_size: int, num_layers: int) -> None:
    """Checks that the groups, made as in the trainer, have ``bn_size`` images."""
    model = build_on_meta(cfg)
    layers = cgbn_layers(model)
    assert len(layers) == num_layers
    if not bn_size:
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
        return
    images = cfg.SOLVER.IMS_PER_BATCH // gpus
    megdet_d2.set_bn_size(model, cfg.MODEL.CGBN.BN_SIZE, images)
    sizes = {layer.group_size() for layer in layers}
    assert sizes == {bn_size // images}
    assert f"each over {bn_size} images" in describe_norms(model, images)
    # The groups divide the world into equal parts without a rest.
    ranks = sizes.pop()
    assert gpus // ranks * bn_size == cfg.SOLVER.IMS_PER_BATCH and gpus % ranks == 0
    made = [group for group in groups._cache.values() if group is not groups.SELF]
    assert all(dist.get_world_size(group) == ranks for group in made)


HEADLINE = {
    "b8_bn8": 48_048,
    "b16_bn8": 24_024,
    "b32_bn8": 12_012,
    "b64_bn8": 6_006,
    "b128_bn8": 3_003,
    "b16_bn16": 24_024,
    "b32_bn16": 12_012,
    "b64_bn16": 6_006,
    "b128_bn16": 3_003,
    "b8_bn8_long": 78_624,
    "b128_bn8_long": 4_914,
    "b128_bn16_long": 4_914,
}


@pytest.mark.parametrize(
    "row", read_rows(CONFIGS / "ablations" / "headline"), ids=lambda row: row.name
)
def test_headline_row_is_its_name_at_half_the_papers_images(row):
    name = row.name.partition("_")[2]
    batch, bn_size = (int(part.strip("bn")) for part in name.split("_")[:2])
    solver = row.cfg.SOLVER
    assert (row.batch_size, row.bn_size, row.processes) == (batch, bn_size, 1)
    assert solver.MAX_ITER == HEADLINE[name]
    assert solver.BASE_LR == pytest.approx(0.02 * batch / 8)
    assert solver.WARMUP_ITERS == 34_944 // batch >= 150
    assert row.cfg.MEGDET.WARMUP_START == "zero"
    assert row.cfg.TEST.EVAL_PERIOD == solver.CHECKPOINT_PERIOD == 34_944 // batch
    long = name.endswith("_long")
    paper = {
        values[:2]: values[3] for key, values in TABLE3.items() if key.endswith("_long") == long
    }
    assert row.paper_ap == paper.get((2 * batch, 2 * bn_size))
    assert row.cfg.OUTPUT_DIR == f"output/headline/{row.name}"


def test_the_study_detector_has_a_norm_after_every_convolution_of_backbone_and_fpn():
    cfg = load_config("ablations/headline/05_b128_bn8")
    cfg.MODEL.DEVICE = "cpu"
    megdet_d2.scale_config(cfg)
    model = megdet_d2.Trainer.build_model(cfg)
    # A stem, two stages of two blocks with two convolutions and a shortcut each, FPN's 2 x 2.
    assert len(cgbn_layers(model)) == 1 + 2 * (2 * 2 + 1) + 2 * 2
    assert sum(p.numel() for p in model.parameters()) < 300_000


# Of each list: rows, images of a training, most iterations.
LISTS = {
    "headline_bccd": (2, 70_400, 8_800),
    "headline_bn_size": (12, 191_488, 5_984),
    "headline_full": (2, 649_088, 81_136),
    "headline_grid": (8, 95_744, 11_968),
    "headline_heads": (4, 191_488, 5_984),
    "headline_iterations": (10, None, 23_936),
    "headline_no_bn": (12, 23_936, 2_992),
    "headline_range": (6, 47_872, 374),
    "headline_rules": (8, 191_488, 1_496),
    "headline_switches": (10, 191_488, 1_496),
    "loader_backend": (2, 12_848, 1_606),
    "optimizers_grid": (20, 95_744, 374),
    "study_challenge": (12, 96_096, 3_003),
}


def test_every_list_of_rows_is_here():
    assert [path.stem for path in ROW_LISTS] == sorted(LISTS)


@pytest.mark.parametrize("path", ROW_LISTS, ids=lambda path: path.stem)
def test_the_rows_of_a_list_train_on_equal_images_and_differ(path, monkeypatch):
    monkeypatch.setattr("megdet_d2.ablation.rows.register_datasets", lambda cfg: None)
    number, images, most = LISTS[path.stem]
    rows = read_rows(path)
    assert len(rows) == number and max(row.cfg.SOLVER.MAX_ITER for row in rows) == most
    assert {row.images for row in rows} == ({images} if images else {r.images for r in rows})
    assert len({config_digest(row) for row in rows}) == number
    for row in rows:
        steps = row.cfg.MEGDET.ACCUMULATION_STEPS
        assert row.processes == 1, row.name
        assert not row.bn_size or row.batch_size == steps * row.bn_size, row.name
        assert row.cfg.SOLVER.MAX_ITER % row.cfg.TEST.EVAL_PERIOD == 0, row.name
        if match := re.match(r"b(\d+)_", row.name):
            assert row.batch_size == int(match[1]), row.name
        if match := re.match(r"(?:lr|\w+_lr)_(\d.*)", row.name):
            assert row.cfg.SOLVER.BASE_LR == pytest.approx(float(match[1])), row.name
        if match := re.match(r"warmup_(.+)", row.name):
            assert row.cfg.SOLVER.WARMUP_ITERS == int(match[1]), row.name
        if match := re.search(r"_bn(\d+)", row.name):
            assert row.bn_size == int(match[1]), row.name


def test_pairs_of_the_iterations_see_equal_images():
    rows = {row.name: row for row in read_rows(CONFIGS / "ablations" / "headline_iterations.yaml")}
    full = read_rows(CONFIGS / "ablations" / "headline", patterns="01_*")[0]
    for part, share in {"half": 2, "quarter": 4, "eighth": 8, "sixteenth": 16}.items():
        small, large = rows[f"b8_{part}"], rows[f"b128_{part}"]
        assert small.images == large.images == pytest.approx(full.images / share, rel=0.01)
        lr = [row.cfg.SOLVER.BASE_LR for row in (small, large)]
        assert lr == pytest.approx([0.02, 0.32])
