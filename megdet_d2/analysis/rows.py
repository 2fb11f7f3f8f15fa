"""The rows of an ablation: a folder of configs, or a list of overrides of one, read and checked.

And the same rows for a laptop: ``reduce_row`` keeps their ratios on a small model and the embedded
data set.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import yaml
from detectron2.config import CfgNode

from megdet_d2.config import load_config
from megdet_d2.data import register_datasets
from megdet_d2.norm.groups import ranks_per_group
from megdet_d2.schedule.build import images_per_micro_batch, scale_config

GPUS_PER_MACHINE = 8
REDUCED_BASE = Path("configs/ablations/Base-reduced.yaml")
# Images of a mini-batch and of a BN size become so many times fewer. 2 is the most that Table 3's
# smallest row, BN size 2, can bear.
IMAGE_DIVISOR = 2
# Epochs of a reduced row between two evaluations.
REDUCED_EVAL_EPOCHS = 3
_NORMS = ("MODEL.RESNETS.NORM", "MODEL.FPN.NORM", "MODEL.ROI_BOX_HEAD.NORM")
# What a reduced row takes over as it is: all that the rows of configs/ablations differ in, besides
# images and GPUs. (Those of challenge differ in more, and are reduced as they stand.)
CARRIED = (
    *_NORMS,
    "MODEL.CGBN.ALGORITHM",
    *(
        f"MEGDET.{key}"
        for key in ("POLICY", "EPOCHS", "DECAY_EPOCHS", "DECAY_FACTORS", "SCALING_RULE")
        + ("LR_FACTOR", "WARMUP_EPOCHS", "WARMUP_START")
    ),
)

# What a reduced row has of the base, so that no row can be about it.
ARCHITECTURE = (
    "MODEL.META_ARCHITECTURE",
    "MODEL.BACKBONE.NAME",
    "MODEL.RPN.HEAD_NAME",
    "MODEL.ROI_HEADS.NAME",
    "MODEL.ROI_BOX_HEAD.NAME",
)


@dataclass(frozen=True)
class Row:
    """One training of an ablation, but for its seed.

    Attributes:
        name: of its folder, and in the table.
        config_file: what to train.
        opts: overrides, KEY VALUE ..., as on train_net.py's command line.
        cfg: what both come to, the schedule resolved for ``processes``.
        processes: over all machines.
        paper_ap: the paper's mmAP in percent, or "failed".
        paper_hours: the paper's.
        gpus_per_machine: of the machines that it is for.
    """

    name: str
    config_file: Path
    opts: tuple[str, ...]
    cfg: CfgNode
    processes: int
    paper_ap: float | str | None = None
    paper_hours: float | None = None
    gpus_per_machine: int = GPUS_PER_MACHINE

    @property
    def batch_size(self) -> int:
        return self.cfg.SOLVER.IMS_PER_BATCH

    @property
    def bn_size(self) -> int:
        """Images that a group normalises over; 0 without CGBN, as in the paper's Table 3."""
        if not _uses_cgbn(self.cfg):
            return 0
        if self.cfg.MODEL.CGBN.BN_SIZE != -1:
            return self.cfg.MODEL.CGBN.BN_SIZE
        group = _most_of_a_group(self.cfg, self.processes, self.gpus_per_machine)
        return images_per_micro_batch(self.cfg, self.processes) * group

    @property
    def images(self) -> int:
        """Of the whole training."""
        return self.cfg.SOLVER.MAX_ITER * self.batch_size


def read_rows(
    source: str | Path,
    overrides: Sequence[str] = (),
    cores: int = 0,
    gpus_per_machine: int = GPUS_PER_MACHINE,
    patterns: str = "*",
) -> list[Row]:
    """The rows that ``source`` names, in order, each checked before any is trained.

    Args:
        source: a folder of configs, one a row, by name; or a YAML file with ``CONFIG``, a path
            beside it, and ``ROWS``, for each name the keys to override and their values.
        overrides: KEY VALUE ..., for every row, after the row's own.
        cores: 0 for the rows as they are; else reduced ones, on so many processes where groups
            allow.
        gpus_per_machine: what BN groups have to fit into, but for ``CROSS_MACHINE``.
        patterns: only rows of these names, "0[6-9]*,1*".

    Raises:
        FileNotFoundError, ValueError: no row, or one that cannot be trained, by its name.
    """
    source = Path(source)
    if source.is_dir():
        files = [p for p in sorted(source.glob("*.yaml")) if not p.name.startswith("Base-")]
        listed = {path.stem: (path, ()) for path in files}
    elif source.is_file():
        listed = _read_list(source)
    else:
        raise FileNotFoundError(f"{source} is neither a folder of configs nor a YAML list of rows")
    if not listed:
        raise ValueError(f"{source} has no row: a row is a .yaml that does not begin with Base-")
    chosen = [n for n in listed if any(fnmatch(n, p) for p in patterns.split(","))]
    if not chosen:
        raise ValueError(f"--rows {patterns} fits none of {', '.join(listed)}")
    rows = []
    for name in chosen:
        config_file, opts = listed[name]
        try:
            row = _load(name, config_file, (*opts, *(() if cores else overrides)), gpus_per_machine)
            rows.append(reduce_row(row, cores, overrides) if cores else row)
        except (FileNotFoundError, TypeError, ValueError) as error:
            raise ValueError(f"row {name} of {source}: {error}") from error
    return rows


def reduce_row(row: Row, cores: int, overrides: Sequence[str] = ()) -> Row:
    """A row's ratios on ``REDUCED_BASE``: what it says of norms, rule and policy, fewer images.

    Mini-batch and BN size are divided by ``IMAGE_DIVISOR``, so that the number of groups and k, the
    mini-batch over the reference, are the paper's. GPUs become processes, one a core at the most.
    Groups that the cores have no room for come one after another, as micro-batches of an update.

    Raises:
        ValueError: a mini-batch or BN size that cannot be divided; a row of another architecture,
            or reduced as it is.
    """
    base = load_config(REDUCED_BASE, overrides)
    _check_carried(row.cfg, base)
    bn_size = row.bn_size or row.batch_size  # without CGBN there is nothing to keep whole
    for key, value in (("SOLVER.IMS_PER_BATCH", row.batch_size), ("MODEL.CGBN.BN_SIZE", bn_size)):
        if value % IMAGE_DIVISOR:
            raise ValueError(f"{key} is {value}, and --reduced divides it by {IMAGE_DIVISOR}")
    groups = row.batch_size // bn_size
    batch_size, bn_size = row.batch_size // IMAGE_DIVISOR, bn_size // IMAGE_DIVISOR
    at_once = _largest_divisor(groups, cores)
    per_group = _largest_divisor(bn_size, min(row.processes // groups, cores // at_once))

    epoch = -(-base.MEGDET.EPOCH_IMAGES // batch_size)
    carried = {key: _get(row.cfg, key) for key in CARRIED}
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
    return _load(row.name, REDUCED_BASE, (*_to_opts(carried | sizes), *overrides))


def _check_carried(cfg: CfgNode, base: CfgNode) -> None:
    """Refuses rows that would all become the base, whatever they are about."""
    if cfg.DATASETS.TRAIN == load_config(REDUCED_BASE).DATASETS.TRAIN:
        raise ValueError("it is of the embedded data set as it is; run it without --reduced")
    for key in ARCHITECTURE:
        if _get(cfg, key) != _get(base, key):
            raise ValueError(
                f"{key} is {_get(cfg, key)}, and --reduced has {_get(base, key)} for all rows; "
                f"make a row of {REDUCED_BASE} with it, and run that without --reduced"
            )


def _largest_divisor(number: int, most: int) -> int:
    return max((n for n in range(1, most + 1) if number % n == 0), default=1)


def _read_list(source: Path) -> dict[str, tuple[Path, tuple[str, ...]]]:
    try:
        content = yaml.safe_load(source.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not YAML: {error}") from error
    if not isinstance(content, dict) or set(content) != {"CONFIG", "ROWS"}:
        raise ValueError(
            f"{source} is not a list of rows: it has to have CONFIG, the path of a config, and "
            "ROWS, for each row's name the keys to override: {MEGDET.SCALING_RULE: sqrt}"
        )
    rows = content["ROWS"]
    if not isinstance(rows, dict) or not all(isinstance(k, dict | None) for k in rows.values()):
        raise ValueError(
            f"ROWS of {source} is {rows!r}; give a name to each row, and to each name the keys to "
            "override: half: {MEGDET.LR_FACTOR: 0.5}"
        )
    config_file = source.parent / content["CONFIG"]
    return {str(name): (config_file, _to_opts(keys or {})) for name, keys in rows.items()}


def _to_opts(keys: dict) -> tuple[str, ...]:
    return tuple(str(word) for pair in keys.items() for word in pair)


def _load(
    name: str, config_file: Path, opts: Sequence[str], gpus_per_machine: int = GPUS_PER_MACHINE
) -> Row:
    cfg = load_config(config_file, opts)
    processes = cfg.MEGDET.ABLATION.GPUS
    if cfg.MEGDET.POLICY and not cfg.MEGDET.EPOCH_IMAGES:
        register_datasets(cfg)  # an epoch is to be counted in it
    scale_config(cfg, world_size=processes)
    if _uses_cgbn(cfg):
        images = images_per_micro_batch(cfg, processes)
        most = _most_of_a_group(cfg, processes, gpus_per_machine)
        ranks_per_group(cfg.MODEL.CGBN.BN_SIZE, images, most)
    paper = cfg.MEGDET.ABLATION
    return Row(
        name, config_file, tuple(opts), cfg, processes, paper.PAPER_AP, paper.PAPER_HOURS,
        gpus_per_machine,
    )  # fmt: skip


def _uses_cgbn(cfg: CfgNode) -> bool:
    return any(_get(cfg, key) == "CGBN" for key in _NORMS)


def _most_of_a_group(cfg: CfgNode, processes: int, gpus_per_machine: int) -> int:
    """Processes that a BN group can have."""
    return processes if cfg.MODEL.CGBN.CROSS_MACHINE else min(processes, gpus_per_machine)


def _get(cfg: CfgNode, key: str):
    for part in key.split("."):
        cfg = cfg[part]
    return cfg
