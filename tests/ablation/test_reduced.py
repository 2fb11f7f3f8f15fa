"""Tests the reduction of rows to one machine: ratios stay, differences stay."""

from operator import attrgetter
from pathlib import Path

import pytest

from megdet_d2.ablation.reduced import CARRIED, REDUCED_BASE, reduce_rows
from megdet_d2.ablation.rows import read_rows
from tests.helpers.ablation import TABLE3
from tests.helpers.paths import ROOT

# The mapping of docs/experiments.md on 2 cores: mini-batch, BN size, processes, micro-batches.
REDUCED = {
    "01_b16_base": (8, 0, 2, 1),
    "02_b2_bn2": (1, 1, 1, 1),
    "03_b4_bn4": (2, 2, 2, 1),
    "04_b8_bn8": (4, 4, 2, 1),
    "05_b16_bn2": (8, 1, 2, 4),
    "06_b16_bn16": (8, 8, 2, 1),
    "07_b32_bn32": (16, 16, 2, 1),
    "08_b64_bn64": (32, 32, 2, 1),
    "09_b64_bn32": (32, 16, 2, 1),
    "10_b64_bn16": (32, 8, 2, 2),
    "11_b128_bn32": (64, 16, 2, 2),
    "12_b128_bn16": (64, 8, 2, 4),
    "13_b256_bn32": (128, 16, 2, 4),
    "14_b256_bn16": (128, 8, 2, 8),
}


OLD = Path("configs/ablations/Base-reduced.yaml")
FOLDERS = ["table2", "bn_size", "warmup", "scaling", "algorithm", "placement"]


@pytest.mark.parametrize(("base", "epoch"), [(REDUCED_BASE, 34_944), (OLD, 364)])
def test_reduced_rows_keep_the_papers_ratios(base, epoch):
    full, reduced = read_rows(TABLE3), reduce_rows(read_rows(TABLE3), 2, base=base)
    long = {"15": "06", "16": "07", "17": "09", "18": "11", "19": "13", "20": "14"}
    expected = REDUCED | {
        row.name: next(v for k, v in REDUCED.items() if k.startswith(long[row.name[:2]]))
        for row in full[14:]
    }
    for a, b in zip(full, reduced, strict=True):
        steps = b.cfg.MEGDET.ACCUMULATION_STEPS
        assert (b.batch_size, b.bn_size, b.processes, steps) == expected[b.name]
        if a.bn_size:
            assert b.batch_size / b.bn_size == a.batch_size / a.bn_size  # groups
        k = [r.batch_size / r.cfg.MEGDET.REFERENCE_BATCH_SIZE for r in (a, b)]
        assert k[0] == k[1]
        assert b.cfg.SOLVER.WARMUP_FACTOR == a.cfg.SOLVER.WARMUP_FACTOR
        lr = [r.cfg.SOLVER.BASE_LR / r.cfg.MEGDET.REFERENCE_LR for r in (a, b)]
        assert lr[0] == pytest.approx(lr[1])
        # The decays are at the same fractions of the training, up to whole iterations.
        at = [[s / r.cfg.SOLVER.MAX_ITER for s in r.cfg.SOLVER.STEPS] for r in (a, b)]
        assert at[0] == pytest.approx(at[1], abs=0.02)
        epochs = 18 if b.name.endswith("long") else 11
        assert b.images == pytest.approx(epochs * epoch, rel=0.04)  # whole iterations
        assert b.images <= epochs * epoch
        assert (b.paper_ap, b.paper_hours) == (a.paper_ap, a.paper_hours)
        assert b.cfg.DATASETS.TRAIN == ("megdet_digits_train",)


@pytest.mark.parametrize("base", [REDUCED_BASE, OLD], ids=["study", "old"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_reduced_rows_carry_all_that_the_rows_differ_in(folder, base):
    full = read_rows(f"configs/ablations/{folder}")
    reduced = reduce_rows(full, 4, base=base)
    for a, b in zip(full, reduced, strict=True):
        for key in CARRIED:
            assert attrgetter(key)(b.cfg) == attrgetter(key)(a.cfg), key
    distinct = {
        (row.batch_size, row.bn_size, *(str(attrgetter(key)(row.cfg)) for key in CARRIED))
        for row in reduced
    }
    assert len(distinct) == len(full)


def test_a_box_head_keeps_a_convolution_for_its_norm():
    """Without a convolution the three rows of placement would be two detectors."""
    reduced = reduce_rows(read_rows("configs/ablations/placement"), 2)
    heads = [row.cfg.MODEL.ROI_BOX_HEAD for row in reduced]
    assert [(h.NUM_CONV, h.CONV_DIM, h.NORM) for h in heads] == [
        (1, 32, ""), (1, 32, ""), (1, 32, "CGBN"),
    ]  # fmt: skip
    plain = reduce_rows(read_rows(TABLE3, patterns="06*"), 2)[0]
    assert plain.cfg.MODEL.ROI_BOX_HEAD.NUM_CONV == 0


@pytest.mark.parametrize(
    ("base", "evaluations", "checkpoints"), [(REDUCED_BASE, 1, 1), (OLD, 3, 22)]
)
@pytest.mark.parametrize("words", [(), ("MEGDET.EPOCH_IMAGES", "1280")])
def test_periods_are_in_epochs(base, evaluations, checkpoints, words):
    """Also where the command line makes epochs shorter."""
    for row in reduce_rows(read_rows(TABLE3, patterns="02*,06*,14*"), 2, words, base):
        epoch = -(-row.cfg.MEGDET.EPOCH_IMAGES // row.batch_size)
        assert row.cfg.TEST.EVAL_PERIOD == evaluations * epoch, row.name
        assert row.cfg.SOLVER.CHECKPOINT_PERIOD == checkpoints * epoch, row.name


def test_a_missing_base_is_named():
    with pytest.raises(FileNotFoundError, match="there is no config Base-none.yaml"):
        reduce_rows(read_rows(TABLE3, patterns="06*"), 2, base=Path("Base-none.yaml"))


def test_more_cores_are_more_processes_a_group():
    def processes(cores):
        return [row.processes for row in reduce_rows(read_rows(TABLE3), cores)[:10]]

    assert processes(1) == [1] * 10
    assert processes(8) == [8, 1, 2, 4, 8, 8, 8, 8, 8, 8]


def test_a_size_that_cannot_be_halved_is_refused(tmp_path):
    (tmp_path / "odd.yaml").write_text(
        f'_BASE_: "{ROOT / TABLE3 / "06_b16_bn16.yaml"}"\n'
        "SOLVER: {IMS_PER_BATCH: 9}\nMODEL: {CGBN: {BN_SIZE: 9}}\nMEGDET: {ABLATION: {GPUS: 1}}\n"
    )
    with pytest.raises(ValueError, match="row odd: .*IMS_PER_BATCH is 9, and --reduced"):
        reduce_rows(read_rows(tmp_path), 2)


@pytest.mark.parametrize(
    ("folder", "match"),
    [
        (
            "challenge",
            "row 01_baseline: .*data set of Base-study.yaml: .* run it without --reduced",
        ),
        ("ohem", "row ohem: MODEL.ROI_HEADS.NAME is OHEMROIHeads, and --reduced takes rows that"),
    ],
)
def test_rows_that_would_all_be_the_base_are_not_reduced(folder, match, tmp_path):
    source = ROOT / "configs/ablations" / folder
    if folder == "ohem":
        source = tmp_path
        base = ROOT / TABLE3 / "06_b16_bn16.yaml"
        heads = 'MODEL: {ROI_HEADS: {NAME: "OHEMROIHeads"}}'
        (source / "ohem.yaml").write_text(f'_BASE_: "{base}"\n{heads}\n')
    with pytest.raises(ValueError, match=match):
        reduce_rows(read_rows(source), 2)


def test_rows_that_differ_in_what_is_not_kept_are_not_reduced(tmp_path):
    """They would all become the same row, and the table would compare it with itself."""
    path = tmp_path / "rows.yaml"
    rows = "{a: {SOLVER.MOMENTUM: 0.9}, b: {SOLVER.MOMENTUM: 0.95}}"
    path.write_text(f"CONFIG: {ROOT / TABLE3 / '06_b16_bn16.yaml'}\nROWS: {rows}\n")
    with pytest.raises(ValueError, match="row a has SOLVER.MOMENTUM 0.9, row b has 0.95, and --re"):
        reduce_rows(read_rows(path), 2)
