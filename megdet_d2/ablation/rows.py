"""The rows of an ablation: a folder of configs, or a list of overrides of one, read and checked."""

import contextlib
from collections.abc import Sequence
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
from megdet_d2.norm.registry import uses_cgbn
from megdet_d2.schedule.build import images_per_micro_batch, scale_config

GPUS_PER_MACHINE = 8


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
        if not uses_cgbn(self.cfg):
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
    gpus_per_machine: int = GPUS_PER_MACHINE,
    patterns: str = "*",
) -> list[Row]:
    """The rows that ``source`` names, in order, each checked before any is trained.

    Args:
        source: a folder of configs, one a row, by name; or a YAML file with ``CONFIG``, a path
            beside it, and ``ROWS``, for each name the keys to override and their values. Where
            there is no such path, the name of a shipped one: "table3", "ablations/table3".
        overrides: KEY VALUE ..., for every row, after the row's own.
        gpus_per_machine: what BN groups have to fit into, but for ``CROSS_MACHINE``.
        patterns: only rows of these names, "0[6-9]*,1*".

    Raises:
        FileNotFoundError, ValueError: no row, or one that cannot be trained, by its name.
    """
    with contextlib.suppress(FileNotFoundError):
        source = model_zoo.find(source, folder="ablations")
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
            rows.append(load_row(name, config_file, (*opts, *overrides), gpus_per_machine))
        except (FileNotFoundError, TypeError, ValueError) as error:
            raise ValueError(f"row {name} of {source}: {error}") from error
    return rows


def differences(a: CfgNode, b: CfgNode) -> dict[str, tuple[Any, Any]]:
    """The keys, as "SOLVER.BASE_LR", in which two configs differ, with both values."""
    found = {}
    for key in a.keys() | b.keys():
        one, other = a.get(key), b.get(key)
        if isinstance(one, CfgNode) and isinstance(other, CfgNode):
            found |= {f"{key}.{k}": v for k, v in differences(one, other).items()}
        elif _plain(one) != _plain(other):
            found[key] = (one, other)
    return dict(sorted(found.items()))


def _plain(value: Any) -> Any:
    # A list of a config is a tuple in what is dumped and read again, or the other way.
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


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
    return {str(name): (config_file, to_opts(keys or {})) for name, keys in rows.items()}


def to_opts(keys: dict) -> tuple[str, ...]:
    """{KEY: value} as on train_net.py's command line, KEY VALUE ...."""
    return tuple(str(word) for pair in keys.items() for word in pair)


def load_row(
    name: str, config_file: Path, opts: Sequence[str], gpus_per_machine: int = GPUS_PER_MACHINE
) -> Row:
    """A row of these, its schedule resolved for its number of processes, and checked.

    Raises:
        FileNotFoundError, ValueError: it cannot be trained, or would have no AP.
    """
    cfg = load_config(config_file, opts)
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty; name the set that the rows' AP is of")
    processes = cfg.MEGDET.ABLATION.GPUS
    if cfg.MEGDET.POLICY and not cfg.MEGDET.EPOCH_IMAGES:
        register_datasets(cfg)  # an epoch is to be counted in it
    scale_config(cfg, world_size=processes)
    if uses_cgbn(cfg):
        images = images_per_micro_batch(cfg, processes)
        most = _most_of_a_group(cfg, processes, gpus_per_machine)
        ranks_per_group(cfg.MODEL.CGBN.BN_SIZE, images, most)
    paper = cfg.MEGDET.ABLATION
    return Row(
        name, config_file, tuple(opts), cfg, processes, paper.PAPER_AP, paper.PAPER_HOURS,
        gpus_per_machine,
    )  # fmt: skip


def _most_of_a_group(cfg: CfgNode, processes: int, gpus_per_machine: int) -> int:
    """Processes that a BN group can have."""
    return processes if cfg.MODEL.CGBN.CROSS_MACHINE else min(processes, gpus_per_machine)
