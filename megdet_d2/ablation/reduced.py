"""Reduces the rows of an ablation for a laptop and keeps their ratios, for ``--reduced``.

The reduced rows have a small model and the embedded data set. docs/experiments.md has the mapping.
"""

from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

from detectron2.config import CfgNode

from megdet_d2 import model_zoo
from megdet_d2.config import load_config

from .rows import Row, differences, load_row, to_opts

REDUCED_BASE = Path("configs/ablations/Base-reduced.yaml")
# Divides mini-batch and BN size. 2 is the largest divisor for Table 3, whose smallest BN size is 2.
IMAGE_DIVISOR = 2
# Epochs between two evaluations of a reduced row.
REDUCED_EVAL_EPOCHS = 3
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
# A reduced row takes these keys from REDUCED_BASE. A row with another value cannot be reduced.
ARCHITECTURE = (
    "MODEL.META_ARCHITECTURE",
    "MODEL.BACKBONE.NAME",
    "MODEL.RPN.HEAD_NAME",
    "MODEL.ROI_HEADS.NAME",
    "MODEL.ROI_BOX_HEAD.NAME",
)


def reduce_rows(rows: Sequence[Row], cores: int, overrides: Sequence[str] = ()) -> list[Row]:
    """Returns the rows with their norms, scaling rules and policies on ``REDUCED_BASE``.

    Mini-batch and BN size are divided by ``IMAGE_DIVISOR``. So the number of groups and k, the
    mini-batch over the reference, are the paper's. GPUs become processes, at most one per core. If
    there are more groups than cores, they run one after another, as micro-batches of an update.

    Args:
        cores: the most processes.
        overrides: KEY VALUE ..., for every reduced row.

    Raises:
        ValueError: a mini-batch or a BN size cannot be divided, a row has another architecture or
            is small already, or rows differ in a key that is not kept.
    """
    reduced = []
    for row in rows:
        try:
            reduced.append(_reduce(row, cores, overrides))
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"row {row.name}: {error}") from error
    _check_differences(rows)
    return reduced


def _reduce(row: Row, cores: int, overrides: Sequence[str]) -> Row:
    base_file = model_zoo.find(REDUCED_BASE)
    base = load_config(base_file, overrides)
    _check_reducible(row.cfg, base)
    bn_size = row.bn_size or row.batch_size  # without CGBN, the mini-batch is one group
    for key, value in (("SOLVER.IMS_PER_BATCH", row.batch_size), ("MODEL.CGBN.BN_SIZE", bn_size)):
        if value % IMAGE_DIVISOR:
            raise ValueError(f"{key} is {value}, and --reduced divides it by {IMAGE_DIVISOR}")
    groups = row.batch_size // bn_size
    batch_size, bn_size = row.batch_size // IMAGE_DIVISOR, bn_size // IMAGE_DIVISOR
    at_once = _largest_divisor(groups, cores)
    per_group = _largest_divisor(bn_size, min(row.processes // groups, cores // at_once))

    epoch = -(-base.MEGDET.EPOCH_IMAGES // batch_size)
    carried = {key: attrgetter(key)(row.cfg) for key in CARRIED}
    sizes = {
        "SOLVER.IMS_PER_BATCH": batch_size,
        "MODEL.CGBN.BN_SIZE": bn_size if row.bn_size else -1,
        "TEST.EVAL_PERIOD": REDUCED_EVAL_EPOCHS * epoch,
        "SOLVER.CHECKPOINT_PERIOD": row.images,  # only the last: a training takes minutes
        "MEGDET.ACCUMULATION_STEPS": groups // at_once,
        "MEGDET.ABLATION.GPUS": at_once * per_group,
        "MEGDET.ABLATION.PAPER_AP": row.paper_ap,
        "MEGDET.ABLATION.PAPER_HOURS": row.paper_hours,
    }
    return load_row(row.name, base_file, (*to_opts(carried | sizes), *overrides))


def _check_reducible(cfg: CfgNode, base: CfgNode) -> None:
    """Raises a ``ValueError`` for a row whose difference from other rows would be lost."""
    if cfg.DATASETS.TRAIN == load_config(model_zoo.find(REDUCED_BASE)).DATASETS.TRAIN:
        raise ValueError(
            f"DATASETS.TRAIN is {tuple(cfg.DATASETS.TRAIN)}, the embedded data set: the row is "
            "small already; run it without --reduced"
        )
    for key in ARCHITECTURE:
        value, reduced = (attrgetter(key)(c) for c in (cfg, base))
        if value != reduced:
            raise ValueError(
                f"{key} is {value}, and --reduced has {reduced} for all rows; make a row based on "
                f"{REDUCED_BASE} with this value, and run it without --reduced"
            )


def _check_differences(rows: Sequence[Row]) -> None:
    """Raises a ``ValueError`` if rows differ in a key that is not kept."""
    for row in rows[1:]:
        for key, (first, other) in differences(rows[0].cfg, row.cfg).items():
            if key not in CARRIED and not key.startswith(REDUCED):
                raise ValueError(
                    f"row {rows[0].name} has {key} {first}, row {row.name} has {other}, and "
                    f"--reduced takes it from {REDUCED_BASE}; make rows based on that file with "
                    "these values, and run them without --reduced"
                )


def _largest_divisor(number: int, most: int) -> int:
    """Returns the largest divisor of ``number`` that is at most ``most``."""
    return max((n for n in range(1, most + 1) if number % n == 0), default=1)
