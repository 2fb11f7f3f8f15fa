"""Reads and checks the rows of an ablation: a folder of configs, or a list of overrides."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode

from megdet_d2 import model_zoo
from megdet_d2.config import load_config
from megdet_d2.data import register_datasets
from megdet_d2.norm.groups import ranks_per_group
from megdet_d2.norm.registry import uses_cgbn, uses_norm
from megdet_d2.schedule.build import images_per_micro_batch, scale_config, scheduled_images

GPUS_PER_MACHINE = 8
SYNCHRONIZED = ("SyncBN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
"""Detectron2's norms over all processes."""


@dataclass(frozen=True)
class Row:
    """A config of an ablation, which is trained once per seed.

    Attributes:
        name: name of the folder, and in the table.
        config_file: the config.
        opts: overrides, KEY VALUE ..., as on the command line of train_net.py.
        cfg: config and overrides merged, the schedule resolved for ``processes``.
        processes: number of processes on all machines.
        paper_ap: the paper's mmAP in percent, or "failed"; None if the paper has no such row.
        paper_hours: the paper's hours of training.
        gpus_per_machine: GPUs of each machine, which limit a BN group.
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
        """Returns the images of a mini-batch."""
        return self.cfg.SOLVER.IMS_PER_BATCH

    @property
    def bn_size(self) -> int:
        """Returns the images that a group normalises over; 0 without CGBN, as in Table 3."""
        if not uses_cgbn(self.cfg):
            return 0
        if self.cfg.MODEL.CGBN.BN_SIZE != -1:
            return self.cfg.MODEL.CGBN.BN_SIZE
        group = _largest_group(self.cfg, self.processes, self.gpus_per_machine)
        return images_per_micro_batch(self.cfg, self.processes) * group

    @property
    def statistics_images(self) -> tuple[int, ...]:
        """Returns the images of batch statistics that no key gives; see ``statistics_images``."""
        return statistics_images(self.cfg, self.processes, self.gpus_per_machine)

    @property
    def images(self) -> int:
        """Returns the images of the whole training."""
        return scheduled_images(self.cfg)


def read_rows(
    source: str | Path,
    overrides: Sequence[str] = (),
    gpus_per_machine: int = GPUS_PER_MACHINE,
    patterns: str = "*",
) -> list[Row]:
    """Returns the rows of ``source``, in order and checked.

    Args:
        source: a folder with one config per row; or a YAML file with ``CONFIG``, a path relative to
            the file, and ``ROWS``, which has the keys to override for each name. If there is no
            such path, it is the name of a shipped ablation: "table3", "ablations/table3".
        overrides: KEY VALUE ..., for every row, after the overrides of the row.
        gpus_per_machine: the most processes in a BN group, unless ``CROSS_MACHINE`` is set.
        patterns: names of rows to take, as in "0[6-9]*,1*".

    Raises:
        FileNotFoundError: there is no ``source``.
        ValueError: there is no row, or a row cannot be trained. The message names the row.
    """
    with contextlib.suppress(FileNotFoundError):
        source = model_zoo.find(source, folder="ablations")
    source = Path(source)
    if source.is_dir():
        files = [p for p in sorted(source.glob("*.yaml")) if not p.name.startswith("Base-")]
        listed: dict[str, tuple[Path, tuple[str, ...]]] = {path.stem: (path, ()) for path in files}
    elif source.is_file():
        listed = _read_list(source)
    else:
        raise FileNotFoundError(f"{source} is neither a folder of configs nor a YAML list of rows")
    if not listed:
        raise ValueError(f"{source} has no row: a row is a .yaml file not named Base-...")
    chosen = [n for n in listed if any(fnmatch(n, p) for p in patterns.split(","))]
    if not chosen:
        raise ValueError(f"--rows {patterns} matches none of {', '.join(listed)}")
    rows = []
    for name in chosen:
        config_file, opts = listed[name]
        try:
            rows.append(load_row(name, config_file, (*opts, *overrides), gpus_per_machine))
        except (FileNotFoundError, TypeError, ValueError) as error:
            raise ValueError(f"row {name} of {source}: {error}") from error
    return rows


def differences(a: CfgNode, b: CfgNode) -> dict[str, tuple[Any, Any]]:
    """Returns the keys, as "SOLVER.BASE_LR", in which two configs differ, with both values."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in a.keys() | b.keys():
        one, other = a.get(key), b.get(key)
        if isinstance(one, CfgNode) and isinstance(other, CfgNode):
            found |= {f"{key}.{k}": v for k, v in differences(one, other).items()}
        elif plain(one) != plain(other):
            found[key] = (one, other)
    return dict(sorted(found.items()))


def plain(value: Any) -> Any:
    """Returns a value of a config with lists in place of tuples."""
    # A list may become a tuple, or a tuple a list, when a config is written and read again.
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _read_list(source: Path) -> dict[str, tuple[Path, tuple[str, ...]]]:
    try:
        content = yaml.safe_load(source.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not YAML: {error}") from error
    if not isinstance(content, dict) or set(content) != {"CONFIG", "ROWS"}:
        raise ValueError(
            f"{source} is not a list of rows: it needs CONFIG, the path of a config, and ROWS, "
            "with the keys to override for each name: {sqrt: {MEGDET.SCALING_RULE: sqrt}}"
        )
    rows = content["ROWS"]
    if not isinstance(rows, dict) or not all(isinstance(k, dict | None) for k in rows.values()):
        raise ValueError(
            f"ROWS of {source} is {rows!r}; give a name to each row, and the keys to override to "
            "each name: half: {MEGDET.LR_FACTOR: 0.5}"
        )
    config_file = source.parent / content["CONFIG"]
    return {str(name): (config_file, to_opts(keys or {})) for name, keys in rows.items()}


def to_opts(keys: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns keys and values as overrides of a command line, KEY VALUE ...."""
    return tuple(str(word) for pair in keys.items() for word in pair)


def load_row(
    name: str, config_file: Path, opts: Sequence[str], gpus_per_machine: int = GPUS_PER_MACHINE
) -> Row:
    """Returns a row, checked, its schedule resolved for its number of processes.

    Raises:
        FileNotFoundError, ValueError: it cannot be trained, or has no test set for the AP.
    """
    cfg = load_config(config_file, opts)
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty; name the data set for the AP of the rows")
    processes = cfg.MEGDET.ABLATION.GPUS
    if cfg.MEGDET.POLICY and not cfg.MEGDET.EPOCH_IMAGES:
        register_datasets(cfg)  # to count the images of an epoch
    scale_config(cfg, world_size=processes)
    if uses_cgbn(cfg):
        images = images_per_micro_batch(cfg, processes)
        most = _largest_group(cfg, processes, gpus_per_machine)
        ranks_per_group(cfg.MODEL.CGBN.BN_SIZE, images, most)
    paper = cfg.MEGDET.ABLATION
    return Row(
        name, config_file, tuple(opts), cfg, processes, paper.PAPER_AP, paper.PAPER_HOURS,
        gpus_per_machine,
    )  # fmt: skip


def statistics_images(cfg: CfgNode, processes: int, gpus_per_machine: int) -> tuple[int, ...]:
    """Returns the images of batch statistics that follow from micro-batches and processes alone.

    Trainings that differ in them are not the same, though no key but ACCUMULATION_STEPS does.

    Returns:
        one number for CGBN with BN_SIZE -1, and one for other batch norms; () where BN_SIZE says
        it, or norms are frozen.
    """
    images, found = images_per_micro_batch(cfg, processes), []
    if uses_norm(cfg, "CGBN") and cfg.MODEL.CGBN.BN_SIZE == -1:
        found.append(images * _largest_group(cfg, processes, gpus_per_machine))
    if uses_norm(cfg, "BN"):
        found.append(images)
    if uses_norm(cfg, *SYNCHRONIZED):
        found.append(images * processes)
    return tuple(found)


def _largest_group(cfg: CfgNode, processes: int, gpus_per_machine: int) -> int:
    """Returns the most processes that a BN group can have."""
    return processes if cfg.MODEL.CGBN.CROSS_MACHINE else min(processes, gpus_per_machine)
