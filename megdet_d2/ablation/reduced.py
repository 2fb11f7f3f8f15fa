"""``--reduced``: the rows of an ablation for a laptop, their ratios kept.

On a small model and the embedded data set; docs/experiments.md has the mapping.
"""

from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

from detectron2.config import CfgNode

from megdet_d2 import model_zoo
from megdet_d2.config import load_config

from .rows import Row, differences, load_row, to_opts

REDUCED_BASE = Path("configs/ablations/Base-reduced.yaml")
# Images of a mini-batch and of a BN size become so many times fewer. 2 is the most that Table 3's
# smallest row, BN size 2, can bear.
IMAGE_DIVISOR = 2
# Epochs of a reduced row between two evaluations.
REDUCED_EVAL_EPOCHS = 3
# What a reduced row takes over as it is: all that the rows of configs/ablations differ in, besides
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
# What rows may differ in besides: it is reduced, follows from what is, or changes no result.
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
# A reduced row takes these from REDUCED_BASE, so that a row of another cannot be reduced.
ARCHITECTURE = (
    "MODEL.META_ARCHITECTURE",
    "MODEL.BACKBONE.NAME",
    "MODEL.RPN.HEAD_NAME",
    "MODEL.ROI_HEADS.NAME",
    "MODEL.ROI_BOX_HEAD.NAME",
)


def reduce_rows(rows: Sequence[Row], cores: int, overrides: Sequence[str] = ()) -> list[Row]:
    """The rows' ratios on ``REDUCED_BASE``: what they say of norms, rule and policy, fewer images.

    Mini-batch and BN size are divided by ``IMAGE_DIVISOR``, so that the number of groups and k, the
    mini-batch over the reference, are the paper's. GPUs become processes, one a core at the most.
    Groups that the cores have no room for come one after another, as micro-batches of an update.

    Args:
        cores: how many processes there is room for.
        overrides: KEY VALUE ..., for every reduced row.

    Raises:
        ValueError: a mini-batch or BN size that cannot be divided; a row of another architecture,
            or small as it is; rows that differ in what none of them would keep.
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
    bn_size = row.bn_size or row.batch_size  # without CGBN there is nothing to keep whole
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
        "SOLVER.CHECKPOINT_PERIOD": row.images,  # none but the last: minutes are soon repeated
        "MEGDET.ACCUMULATION_STEPS": groups // at_once,
        "MEGDET.ABLATION.GPUS": at_once * per_group,
        "MEGDET.ABLATION.PAPER_AP": row.paper_ap,
        "MEGDET.ABLATION.PAPER_HOURS": row.paper_hours,
    }
    return load_row(row.name, base_file, (*to_opts(carried | sizes), *overrides))


def _check_reducible(cfg: CfgNode, base: CfgNode) -> None:
    """Refuses rows that would all become the base, whatever they are about."""
    if cfg.DATASETS.TRAIN == load_config(model_zoo.find(REDUCED_BASE)).DATASETS.TRAIN:
        raise ValueError(
            f"DATASETS.TRAIN is {tuple(cfg.DATASETS.TRAIN)}, the embedded data set: the row is "
            "small as it is; run it without --reduced"
        )
    for key in ARCHITECTURE:
        value, reduced = (attrgetter(key)(c) for c in (cfg, base))
        if value != reduced:
            raise ValueError(
                f"{key} is {value}, and --reduced has {reduced} for all rows; make a row of "
                f"{REDUCED_BASE} with it, and run that without --reduced"
            )


def _check_differences(rows: Sequence[Row]) -> None:
    for row in rows[1:]:
        for key, (first, other) in differences(rows[0].cfg, row.cfg).items():
            if key not in CARRIED and not key.startswith(REDUCED):
                raise ValueError(
                    f"row {rows[0].name} has {key} {first}, row {row.name} has {other}, and "
                    f"--reduced takes it from {REDUCED_BASE}; make rows of that with it, and run "
                    "them without --reduced"
                )


def _largest_divisor(number: int, most: int) -> int:
    return max((n for n in range(1, most + 1) if number % n == 0), default=1)
