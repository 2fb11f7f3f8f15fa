"""Reduces the rows of an ablation for a laptop and keeps their ratios, for ``--reduced``.

The reduced rows have a small detector and the embedded data set. docs/experiments.md has the
mapping.
"""

from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

from detectron2.config import CfgNode

from megdet_d2 import model_zoo
from megdet_d2.config import load_config

from .rows import Row, differences, load_row, to_opts

# The base of reduced rows, unless --reduced-base names another.
REDUCED_BASE = Path("configs/ablations/Base-study.yaml")
# The base of the paper's rows: what a row has in common with it, the reduced base replaces.
PAPER_BASE = Path("configs/Base-MegDet-R50-FPN.yaml")
# Divides mini-batch and BN size. 2 is the largest divisor for Table 3, whose smallest BN size is 2.
IMAGE_DIVISOR = 2
# Keys that a reduced row keeps: all keys in which the rows of configs/ablations differ, except for
# images and GPUs. The rows of challenge are small already and run without --reduced.
CARRIED = (
    "MODEL.RESNETS.NORM",
    "MODEL.FPN.NORM",
    "MODEL.ROI_BOX_HEAD.NORM",
    "MODEL.CGBN.ALGORITHM",
    "MEGDET.POLICY",
    "MEGDET.EPOCHS",
    "MEGDET.DECAY_EPOCHS",
    "MEGDET.DECAY_FACTORS",
    "MEGDET.SCALING_RULE",
    "MEGDET.LR_FACTOR",
    "MEGDET.WARMUP_EPOCHS",
    "MEGDET.WARMUP_START",
)
# Other keys in which rows may differ: they are reduced, follow from reduced ones, or do not change
# the result.
REDUCED = (
    "MEGDET.ABLATION.",
    "MEGDET.ACCUMULATION_STEPS",
    "MEGDET.RESOLVED.",
    "MODEL.CGBN.BN_SIZE",
    "MODEL.ROI_BOX_HEAD.NUM_CONV",
    "MODEL.ROI_BOX_HEAD.NUM_FC",
    "MODEL.SUBLINEAR.",
    "OUTPUT_DIR",
    "SOLVER.BASE_LR",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.IMS_PER_BATCH",
    "SOLVER.MAX_ITER",
    "SOLVER.STEPS",
    "SOLVER.WARMUP_",
    "TEST.EVAL_PERIOD",
)
# A reduced row takes these keys from the reduced base. A row with another value than the paper's
# base cannot be reduced.
ARCHITECTURE = (
    "MODEL.META_ARCHITECTURE",
    "MODEL.BACKBONE.NAME",
    "MODEL.RPN.HEAD_NAME",
    "MODEL.ROI_HEADS.NAME",
    "MODEL.ROI_BOX_HEAD.NAME",
)


def reduce_rows(
    rows: Sequence[Row], cores: int, overrides: Sequence[str] = (), base: Path = REDUCED_BASE
) -> list[Row]:
    """Returns the rows with their norms, scaling rules and policies on a small base.

    Mini-batch and BN size are divided by ``IMAGE_DIVISOR``. So the number of groups and k, the
    mini-batch over the reference, are the paper's. GPUs become processes, at most one per core. If
    there are more groups than cores, they run one after another, as micro-batches of an update.

    Args:
        cores: the most processes.
        overrides: KEY VALUE ..., for every reduced row.
        base: the small config. Its IMS_PER_BATCH stands for the paper's 16 images, and its
            EVAL_PERIOD and CHECKPOINT_PERIOD are as many epochs in every row.

    Raises:
        FileNotFoundError: there is no such base.
        ValueError: a mini-batch or a BN size cannot be divided, a row has another architecture or
            is small already, or rows differ in a key that is not kept.
    """
    base = model_zoo.find(base)
    reduced = []
    for row in rows:
        try:
            reduced.append(_reduce(row, cores, overrides, base))
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"row {row.name}: {error}") from error
    _check_differences(rows, base)
    return reduced


def _reduce(row: Row, cores: int, overrides: Sequence[str], base_file: Path) -> Row:
    small, base = load_config(base_file), load_config(base_file, overrides)
    _check_reducible(row.cfg, base_file)
    bn_size = row.bn_size or row.batch_size  # without CGBN, the mini-batch is one group
    for key, value in (("SOLVER.IMS_PER_BATCH", row.batch_size), ("MODEL.CGBN.BN_SIZE", bn_size)):
        if value % IMAGE_DIVISOR:
            raise ValueError(f"{key} is {value}, and --reduced divides it by {IMAGE_DIVISOR}")
    groups = row.batch_size // bn_size
    batch_size, bn_size = row.batch_size // IMAGE_DIVISOR, bn_size // IMAGE_DIVISOR
    at_once = _largest_divisor(groups, cores)
    per_group = _largest_divisor(bn_size, min(row.processes // groups, cores // at_once))

    def in_epochs(period: int) -> int:
        """Returns the iterations of this row in as many epochs as ``period`` is in the base."""
        epochs = round(period * small.SOLVER.IMS_PER_BATCH / small.MEGDET.EPOCH_IMAGES)
        return max(1, epochs) * -(-base.MEGDET.EPOCH_IMAGES // batch_size)

    carried = {key: attrgetter(key)(row.cfg) for key in CARRIED}
    sizes = {
        "SOLVER.IMS_PER_BATCH": batch_size,
        "MODEL.CGBN.BN_SIZE": bn_size if row.bn_size else -1,
        "TEST.EVAL_PERIOD": in_epochs(small.TEST.EVAL_PERIOD),
        "SOLVER.CHECKPOINT_PERIOD": in_epochs(small.SOLVER.CHECKPOINT_PERIOD),
        "MEGDET.ACCUMULATION_STEPS": groups // at_once,
        "MEGDET.ABLATION.GPUS": at_once * per_group,
        "MEGDET.ABLATION.PAPER_AP": row.paper_ap,
        "MEGDET.ABLATION.PAPER_HOURS": row.paper_hours,
    }
    head = base.MODEL.ROI_BOX_HEAD
    if row.cfg.MODEL.ROI_BOX_HEAD.NUM_CONV and not head.NUM_CONV:
        # Only convolutions of the box head have a norm. One stands for the row's.
        sizes["MODEL.ROI_BOX_HEAD.NUM_CONV"] = 1
        sizes["MODEL.ROI_BOX_HEAD.CONV_DIM"] = base.MODEL.FPN.OUT_CHANNELS
    return load_row(row.name, base_file, (*to_opts(carried | sizes), *overrides))


def _check_reducible(cfg: CfgNode, base_file: Path) -> None:
    """Raises a ``ValueError`` for a row whose difference from other rows would be lost."""
    if cfg.DATASETS.TRAIN == load_config(base_file).DATASETS.TRAIN:
        raise ValueError(
            f"DATASETS.TRAIN is {tuple(cfg.DATASETS.TRAIN)}, the data set of {base_file.name}: the "
            "row is small already; run it without --reduced"
        )
    paper = load_config(model_zoo.find(PAPER_BASE))
    for key in ARCHITECTURE:
        value, kept = (attrgetter(key)(c) for c in (cfg, paper))
        if value != kept:
            raise ValueError(
                f"{key} is {value}, and --reduced takes rows that have {kept}; make a row based on "
                f"{base_file.name} with this value, and run it without --reduced"
            )


def _check_differences(rows: Sequence[Row], base_file: Path) -> None:
    """Raises a ``ValueError`` if rows differ in a key that is not kept."""
    for row in rows[1:]:
        for key, (first, other) in differences(rows[0].cfg, row.cfg).items():
            if key not in CARRIED and not key.startswith(REDUCED):
                raise ValueError(
                    f"row {rows[0].name} has {key} {first}, row {row.name} has {other}, and "
                    f"--reduced takes it from {base_file.name}; make rows based on that file with "
                    "these values, and run them without --reduced"
                )


def _largest_divisor(number: int, most: int) -> int:
    """Returns the largest divisor of ``number`` that is at most ``most``."""
    return max((n for n in range(1, most + 1) if number % n == 0), default=1)
